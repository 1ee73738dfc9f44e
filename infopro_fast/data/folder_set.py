"""A data set read from image files by worker processes; its epochs are a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .image_set import Batch, Epochs, epoch_seed, part_of

Transform = Callable[[Any, Any], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class FolderSet(Epochs):
    """A data set in files, of which nothing stays in memory. The number of workers changes no batch.

    train, test: datasets of (image, label) as the files have them.
    train_transform, test_transform: from such a pair to uint8 (3, H, W) and a label. The first draws from
    torch's CPU generator alone, which is seeded with (seed, epoch, index of the image).
    image_size: of the training images.
    test_batch: the largest batch in evaluation, if it must be smaller than in training.
    """

    name: str
    train: Any  # with a length, which Dataset lacks
    test: Any
    train_transform: Transform
    test_transform: Transform
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: tuple[int, int]
    dense: bool = False
    workers: int = 0
    test_batch: int | None = None
    classes: tuple[str, ...] = ()
    # Images read by each worker, in memory that the workers share with this process.
    _read: torch.Tensor = field(
        default_factory=lambda: torch.zeros(64, dtype=torch.int64).share_memory_(), repr=False, compare=False
    )

    device = "cpu"

    def images_read(self) -> int:
        """Return a number that changes with every image that this process or a worker reads."""
        return int(self._read.sum())

    def to(self, device: torch.device | str) -> FolderSet:
        """Return the set itself: its images stay in their files."""
        return self

    def uint8_batches(
        self, batch_size: int, seed: int, epoch: int, first: int, drop_last: bool, augmented: bool,
        part: tuple[int, int],
    ) -> Iterable[Batch]:
        """Return the batches of `train_epoch` before they are copied and normalised."""
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(self.train), generator=generator).tolist()
        starts = [i * batch_size for i in range(first, self.batches(batch_size, drop_last))]
        indices = [order[part_of(start, min(start + batch_size, len(order)), *part)] for start in starts]
        transform = self.train_transform if augmented else self.test_transform
        return self._loader(Samples(self.train, transform, (seed, epoch), self._read), indices)

    def uint8_test_batches(self, batch_size: int) -> Iterable[Batch]:
        size = min(batch_size, self.test_batch or batch_size)
        indices = [list(range(i, min(i + size, len(self.test)))) for i in range(0, len(self.test), size)]
        return self._loader(Samples(self.test, self.test_transform, (0, 0), self._read), indices)

    def _loader(self, samples: Dataset, indices: Sequence[list[int]]) -> DataLoader:
        # Without a generator the loader draws from the process' generator, so a resumed run would differ.
        own = torch.Generator()
        return DataLoader(samples, batch_sampler=indices, num_workers=self.workers, generator=own)


class Samples(Dataset):
    """Transformed pairs. Each transform draws from a generator seeded with (seed, epoch, index)."""

    def __init__(self, pairs: Any, transform: Transform, place: tuple[int, int], read: torch.Tensor):
        self.pairs, self.transform, self.place, self.read = pairs, transform, place, read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
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
