"""A segmentation set in memory: uint8 images and one uint8 label a pixel, augmented alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopro_fast.errors import DataError

from .augment import Draws, augment
from .image_set import ImageSet

IGNORE = 255  # label of pixels that are neither trained nor counted


@dataclass(frozen=True)
class SegmentationSet(ImageSet):
    """An `ImageSet` with labels (N, H, W) uint8 in [0, num_classes) or IGNORE. Padded pixels get IGNORE."""

    dense = True

    def check_labels(self, labels: torch.Tensor, shape: torch.Size, where: str) -> None:
        expected = (shape[0], *shape[2:])
        if labels.dtype != torch.uint8 or labels.shape != expected:
            raise DataError(f"{where}: expected {expected} uint8, got {tuple(labels.shape)} {labels.dtype}")
        if not ((labels < self.num_classes) | (labels == IGNORE)).all():
            allowed = f"below {self.num_classes} or {IGNORE}"
            raise DataError(f"{where}: expected {allowed}, got up to {labels.max():d}")

    def augment_labels(self, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        inverted = augment((IGNORE - labels)[:, None], self.augmentation, draws)
        return IGNORE - inverted[:, 0]  # the padding, 0 in between, becomes IGNORE
