"""A segmentation set in memory: uint8 images and one uint8 label a pixel, augmented together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopro_fast.errors import DataError

from .augment import Draws, augment
from .image_set import ImageSet

IGNORE = 255  # label of pixels that count nothing


@dataclass(frozen=True)
class SegmentationSet(ImageSet):
    """As `ImageSet`, with labels (N, H, W) uint8 in [0, num_classes) or IGNORE. What augmentation pads is ignored."""

    dense = True

    def __post_init__(self):
        size = self.train.images.shape[1:]
        for part, split in (("train", self.train), ("test", self.test)):
            images, labels = split.images, split.labels
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or images.shape[1:] != size or len(images) == 0:
                raise DataError(f"{self.name}: {part} images: expected (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
            if labels.dtype != torch.uint8 or labels.shape != (len(images), *size[1:]):
                got = f"{tuple(labels.shape)} {labels.dtype}"
                raise DataError(f"{self.name}: {part} labels: expected {(len(images), *size[1:])} uint8, got {got}")
            if not ((labels < self.num_classes) | (labels == IGNORE)).all():
                raise DataError(f"{self.name}: {part} labels: expected below {self.num_classes} or {IGNORE}, got up to {labels.max():d}")

    def augment_labels(self, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        inverted = augment((IGNORE - labels)[:, None], self.augmentation, draws)  # padding is 0 there, so that it ends as IGNORE
        return IGNORE - inverted[:, 0]
