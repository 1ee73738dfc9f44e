"""A data set held as uint8 tensors on the device, and its epochs: a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from infopro_fast.errors import DataError

from .augment import Augmentation, Draws, augment, draw, normalize
from .prefetch import prefetch


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8; labels: (N,) int64 in [0, num_classes)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """Everything training needs to know of a data set. mean, std: per channel, of images in [0, 1]."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation

    dense = False  # labels are one a pixel

    def __post_init__(self):
        size = self.train.images.shape[1:]
        for part, split in (("train", self.train), ("test", self.test)):
            images, labels = split.images, split.labels
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or images.shape[1:] != size:
                raise DataError(f"{self.name}: {part} images: expected (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or len(labels) == 0:
                got = f"{tuple(labels.shape)} {labels.dtype}"
                raise DataError(f"{self.name}: {part} labels: expected {len(images)} > 0 of int64, got {got}")
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise DataError(
                    f"{self.name}: {part} labels: expected in [0, {self.num_classes}), got {labels.min():d} to {labels.max():d}"
                )

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def train_count(self) -> int:
        return len(self.train)

    def images_read(self) -> int:
        """0: a batch is made at once (`FolderSet.images_read`)."""
        return 0

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with all images and labels on ``device``."""
        train, test = (Split(s.images.to(device), s.labels.to(device)) for s in (self.train, self.test))
        return replace(self, train=train, test=test)

    def shrunk(self, factor: int) -> ImageSet:
        """The same set with every ``factor`` x ``factor`` pixels averaged, rounded to uint8; mean and std stay those of the full images.

        Raises DataError if factor does not divide the image's sides.
        """
        H, W = self.train.images.shape[2:]
        if H % factor or W % factor:
            raise DataError(f"{self.name}: shrink: expected a divisor of {H} and {W}, got {factor}")
        train, test = (Split(_averaged(s.images, factor), s.labels) for s in (self.train, self.test))
        return replace(self, train=train, test=test)

    def held_out(self, count: int) -> ImageSet:
        """Training without its last ``count`` images, and these for testing. Raises DataError if none would be left."""
        if not 0 < count < len(self.train):
            raise DataError(f"{self.name}: hold_out: expected 1 to {len(self.train) - 1} of the training images, got {count}")
        images, labels = self.train.images, self.train.labels
        return replace(self, train=Split(images[:-count], labels[:-count]), test=Split(images[-count:], labels[-count:]))

    def batches(self, batch_size: int, drop_last: bool = False) -> int:
        """Batches in an epoch; the last one may be smaller, unless it is dropped."""
        return len(self.train) // batch_size if drop_last else math.ceil(len(self.train) / batch_size)

    def train_epoch(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        first: int = 0,
        drop_last: bool = False,
        augmented: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``first``, ``first`` + 1, ... of an epoch: image (B, 3, H, W) normalised in ``dtype``, label (B,).

        The order, the crops and the flips depend on (seed, epoch) alone and are drawn for the whole epoch at once, so that
        starting at batch ``first`` gives the very batches that the whole epoch has there, on any device.
        device: where the batches go; None leaves them where the images are. On their way they are uint8.
        part: (i, n) for the i-th of n parts of every batch (`part_of`).
        """
        batches = self._augmented(batch_size, seed, epoch, first, drop_last, augmented, part)
        for batch, label in prefetch(batches, device or self.train.images.device):
            yield normalize(batch, self.mean, self.std, dtype), label

    def _augmented(
        self, batch_size: int, seed: int, epoch: int, first: int, drop_last: bool, augmented: bool, part: tuple[int, int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels = self.train.images, self.train.labels
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(images), generator=generator).to(images.device)
        draws = draw(len(images), self.augmentation, generator).to(images.device)
        for i in range(first, self.batches(batch_size, drop_last)):
            here = part_of(i * batch_size, min((i + 1) * batch_size, len(images)), *part)
            batch, label = images.index_select(0, order[here]), labels.index_select(0, order[here])
            if augmented:
                batch, label = augment(batch, self.augmentation, draws.select(here)), self.augment_labels(label, draws.select(here))
            yield batch, label

    def augment_labels(self, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Labels of a batch after its augmentation: the same, they are the image's."""
        return labels

    def test_batches(
        self, batch_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The test images in order, normalised, and their labels. device: as in `train_epoch`."""
        batches = zip(self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True)
        for image, label in prefetch(batches, device or self.test.images.device):
            yield normalize(image, self.mean, self.std, dtype), label


def _averaged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 to (N, 3, H / factor, W / factor): sums of bytes are exact, and halves round up, on every device."""
    N, C, H, W = images.shape
    small = images.new_empty(N, C, H // factor, W // factor)
    for to, part in zip(small.split(1000), images.split(1000)):  # the sums take four times the bytes
        blocks = part.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
        to.copy_((blocks.sum((3, 5), dtype=torch.int32) + factor * factor // 2) // (factor * factor))
    return small


def part_of(start: int, stop: int, part: int, parts: int) -> slice:
    """Part ``part`` of the images ``start`` to ``stop``, cut into ``parts`` in order, whose sizes are one apart at most."""
    count = stop - start
    return slice(start + count * part // parts, start + count * (part + 1) // parts)


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch's generator: hashed, so that epoch 1 of seed 0 has nothing to do with epoch 0 of seed 1."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
