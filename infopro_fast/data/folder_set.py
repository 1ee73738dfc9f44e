"""A data set read from image files by worker processes; its epochs are a function of (seed, epoch), however many workers there are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .augment import normalize
from .image_set import epoch_seed, part_of
from .prefetch import prefetch

Transform = Callable[[Any, Any], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FolderSet:
    """As `ImageSet`, but nothing is kept in memory.

    train, test: datasets of (image, label) as their files have them. train_transform, test_transform: of such a pair to uint8
    (3, H, W) and a label; the first draws from torch's CPU generator alone. image_size: of the training images.
    test_batch: images at once in evaluation, if they cannot be as many as in training.
    """

    name: str
    train: Dataset
    test: Dataset
    train_transform: Transform
    test_transform: Transform
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: tuple[int, int]
    dense: bool = False
    workers: int = 0
    test_batch: int | None = None
    # Images that were read, by each of so many workers at most, in memory that they share with the process whose workers they are.
    _read: torch.Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.int64).share_memory_(), repr=False, compare=False)

    def images_read(self) -> int:
        """A number that changes with every image that is read, by workers too, be its batch complete or not."""
        return int(self._read.sum())

    def to(self, device: torch.device | str) -> FolderSet:
        """Itself: its images stay in their files."""
        return self

    @property
    def train_count(self) -> int:
        return len(self.train)

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
        """Batches ``first``, ``first`` + 1, ... of an epoch, as `ImageSet.train_epoch`.

        The order depends on (seed, epoch), an image's augmentation on (seed, epoch, its index) alone. augmented=False: the test transform.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch_seed(seed, epoch))).tolist()
        spans = [(i * batch_size, min((i + 1) * batch_size, len(order))) for i in range(first, self.batches(batch_size, drop_last))]
        indices = [order[part_of(*span, *part)] for span in spans]
        samples = _Samples(self.train, self.train_transform if augmented else self.test_transform, (seed, epoch), self._read)
        yield from self._batches(samples, indices, dtype, device)

    def test_batches(
        self, batch_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The test images in order, normalised, and their labels."""
        size = min(batch_size, self.test_batch or batch_size)
        indices = [list(range(i, min(i + size, len(self.test)))) for i in range(0, len(self.test), size)]
        yield from self._batches(_Samples(self.test, self.test_transform, (0, 0), self._read), indices, dtype, device)

    def _batches(self, samples: Dataset, indices: Sequence[list[int]], dtype, device):
        # A generator of its own, or the loader would draw from the process' one, and continued runs differ from uninterrupted ones.
        loader = DataLoader(samples, batch_sampler=indices, num_workers=self.workers, generator=torch.Generator())
        for image, label in prefetch(loader, device or "cpu"):
            yield normalize(image, self.mean, self.std, dtype), label


class _Samples(Dataset):
    """Transformed pairs; each is drawn from a generator seeded by (seed, epoch, index)."""

    def __init__(self, pairs: Dataset, transform: Transform, place: tuple[int, int], read: torch.Tensor):
        self.pairs, self.transform, self.place, self.read = pairs, transform, place, read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.pairs[index]
        digest = hashlib.blake2b(f"{self.place[0]} {self.place[1]} {index}".encode(), digest_size=7).digest()
        generator, state = torch.default_generator, torch.get_rng_state()
        generator.manual_seed(int.from_bytes(digest, "little"))
        try:
            image, label = self.transform(image, label)
        finally:
            generator.set_state(state)
        worker = get_worker_info()
        self.read[0 if worker is None else worker.id % len(self.read)] += 1
        return image, torch.as_tensor(label)
