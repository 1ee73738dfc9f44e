"""A data set held as uint8 tensors on the device; its epochs are a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from infopro_fast.errors import DataError

from .augment import Augmentation, Draws, augment, draw, normalize
from .prefetch import prefetch

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels


ABOUT = ("num_classes", "image_size", "mean", "std", "classes")  # what a trained network needs to be told


class Epochs:
    """Normalised batches of training and test images: what `ImageSet` and `FolderSet` share."""

    train: Any
    image_size: Any
    num_classes: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: Any
    uint8_batches: Callable[..., Iterable[Batch]]
    uint8_test_batches: Callable[..., Iterable[Batch]]

    def about(self) -> dict[str, Any]:
        """Return what the images of a trained network have to be, as JSON. classes: names, or ()."""
        found = {name: getattr(self, name) for name in ABOUT}
        size = self.image_size
        return found | {"image_size": (size, size) if isinstance(size, int) else size}

    @property
    def train_count(self) -> int:
        return len(self.train)

    def batches(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in an epoch; the last one may be smaller, unless it is dropped."""
        return len(self.train) // batch_size if drop_last else math.ceil(len(self.train) / batch_size)

    def train_epoch(
        self, batch_size: int, *, seed: int, epoch: int, first: int = 0, drop_last: bool = False,
        augmented: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first`` on: image (B, 3, H, W) in ``dtype``, label (B,).

        Order and augmentation depend on (seed, epoch) alone. So a start at batch ``first`` gives the same
        batches as a whole epoch, on any device.
        device: of the batches; None: that of the images. They are copied as uint8 and normalised there.
        part: (i, n) for part i of n of every batch (`part_of`).
        """
        batches = self.uint8_batches(batch_size, seed, epoch, first, drop_last, augmented, part)
        yield from self._normalized(batches, dtype, device)

    def test_batches(
        self, batch_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Iterator[Batch]:
        """Yield the test images in order, normalised, and their labels. device: as in `train_epoch`."""
        yield from self._normalized(self.uint8_test_batches(batch_size), dtype, device)

    def _normalized(self, batches: Iterable[Batch], dtype: torch.dtype, device) -> Iterator[Batch]:
        for image, label in prefetch(batches, device or self.device):
            yield normalize(image, self.mean, self.std, dtype), label


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8; labels: (N,) int64 in [0, num_classes)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet(Epochs):
    """A data set in memory. mean, std: of each channel of images in [0, 1]."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation
    classes: tuple[str, ...] = ()

    dense = False  # whether every pixel has a label

    def __post_init__(self):
        expected = (3, *self.train.images.shape[2:])
        for part, split in (("train", self.train), ("test", self.test)):
            images, where = split.images, f"{self.name}: {part}"
            if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
                got = f"{tuple(images.shape)} {images.dtype}"
                raise DataError(f"{where} images: expected (N > 0, 3, H, W) uint8, got {got}")
            self.check_labels(split.labels, images.shape, f"{where} labels")

    def check_labels(self, labels: torch.Tensor, shape: torch.Size, where: str) -> None:
        """Raise DataError unless these are labels of images of this shape. where: begins the message."""
        if labels.dtype != torch.int64 or labels.shape != shape[:1]:
            raise DataError(f"{where}: expected {shape[0]} int64, got {tuple(labels.shape)} {labels.dtype}")
        least, most = labels.min(), labels.max()
        if least < 0 or most >= self.num_classes:
            raise DataError(f"{where}: expected in [0, {self.num_classes}), got {least:d} to {most:d}")

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    def images_read(self) -> int:
        """Return 0: a batch is made at once (`FolderSet.images_read`)."""
        return 0

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with all images and labels on ``device``."""
        train, test = (Split(s.images.to(device), s.labels.to(device)) for s in (self.train, self.test))
        return replace(self, train=train, test=test)

    def shrunk(self, factor: int) -> ImageSet:
        """Return the set with every ``factor`` x ``factor`` pixels averaged and rounded to uint8.

        mean and std stay those of the full images. Raises DataError if factor does not divide the sides.
        """
        H, W = self.train.images.shape[2:]
        if H % factor or W % factor:
            raise DataError(f"{self.name}: shrink: expected a divisor of {H} and {W}, got {factor}")
        train, test = (Split(_averaged(s.images, factor), s.labels) for s in (self.train, self.test))
        return replace(self, train=train, test=test)

    def held_out(self, count: int) -> ImageSet:
        """Return the set with its last ``count`` training images as the test images.

        Raises DataError if no training image would be left.
        """
        images, labels, most = self.train.images, self.train.labels, len(self.train) - 1
        if not 0 < count <= most:
            raise DataError(f"{self.name}: hold_out: expected 1 to {most} training images, got {count}")
        train, test = (Split(images[at], labels[at]) for at in (slice(-count), slice(-count, None)))
        return replace(self, train=train, test=test)

    def uint8_batches(
        self, batch_size: int, seed: int, epoch: int, first: int, drop_last: bool, augmented: bool,
        part: tuple[int, int],
    ) -> Iterator[Batch]:
        """Yield the batches of `train_epoch` before they are copied and normalised.

        All random numbers of an epoch are drawn at once.
        """
        images, labels = self.train.images, self.train.labels
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(images), generator=generator).to(images.device)
        draws = draw(len(images), self.augmentation, generator).to(images.device)
        for i in range(first, self.batches(batch_size, drop_last)):
            here = part_of(i * batch_size, min((i + 1) * batch_size, len(images)), *part)
            batch, label = images.index_select(0, order[here]), labels.index_select(0, order[here])
            if augmented:
                some = draws.select(here)
                batch, label = augment(batch, self.augmentation, some), self.augment_labels(label, some)
            yield batch, label

    def augment_labels(self, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Return the labels of an augmented batch: the same, since a label belongs to the whole image."""
        return labels

    def uint8_test_batches(self, batch_size: int) -> Iterable[Batch]:
        return zip(self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True)


def _averaged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Return (N, 3, H / factor, W / factor) uint8. Sums are exact and halves round up, on every device."""
    N, C, H, W = images.shape
    small = images.new_empty(N, C, H // factor, W // factor)
    for to, part in zip(small.split(1000), images.split(1000)):  # the sums take four times the bytes
        blocks = part.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
        to.copy_((blocks.sum((3, 5), dtype=torch.int32) + factor * factor // 2) // (factor * factor))
    return small


def part_of(start: int, stop: int, part: int, parts: int) -> slice:
    """Return part ``part`` of ``parts`` of the images ``start`` to ``stop``; sizes differ by one at most."""
    count = stop - start
    return slice(start + count * part // parts, start + count * (part + 1) // parts)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's generator: a hash, so that neighbouring seeds are unrelated."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
