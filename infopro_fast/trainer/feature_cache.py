"""Outputs of trained modules on the disk, memory-mapped: inputs of the next module in sequential training.

Each cached epoch has a file, and so have the test images. A file holds the batches in the order of training.
A list beside it holds the SHA-256 of each batch, one line written after its batch. So a process that dies
loses one batch, and a batch that has changed is found when it is first read. A file's space is reserved on
the disk before it is written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from infopro_fast.errors import RunError
from infopro_fast.plan_file import for_people
from infopro_fast.whole_files import PIECE, Moved, naming, nobody, sync_folder

from .checkpoint import is_channels_last

SUMS = ".sha256"


@dataclass(frozen=True)
class Features:
    """The features of one image: shape, dtype, and whether batches of them are channels_last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @staticmethod
    def of(batch: torch.Tensor) -> Features:
        return Features(tuple(batch.shape[1:]), batch.dtype, is_channels_last(batch))


class CacheFile:
    """A file of features, ``counts[i]`` images in batch i; it and its checksums need not exist yet."""

    def __init__(self, path: Path, features: Features, counts: list[int]):
        self.path, self.features, self.counts = path, features, counts
        self._sums_path = path.with_name(path.name + SUMS)
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + count * features.nbytes)
        self._map: torch.Tensor | None = None
        self._checked: set[int] = set()

    @property
    def nbytes(self) -> int:
        return self._starts[-1]

    @property
    def sums(self) -> list[str]:
        """SHA-256 of the batches that are written."""
        if not self._sums_path.is_file() or not self._is_reserved:
            return []
        lines = self._sums_path.read_text().split("\n")
        return lines[:-1]  # a last line without its end was cut short

    @property
    def is_complete(self) -> bool:
        return len(self.sums) == len(self.counts)

    @property
    def _is_reserved(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def reserve(self) -> None:
        """Reserve the file's space on the disk, unless that was done before."""
        if self._is_reserved:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._sums_path.unlink(missing_ok=True)  # it belongs to a file that is gone
        with naming(self.path), open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.nbytes))

    def write(self, batches: Iterable[torch.Tensor], moved: Moved = nobody) -> None:
        """Write the batches from the first missing one on, where ``batches`` begins. moved: called often."""
        self.reserve()
        done = self.sums
        with naming(self.path), open(self.path, "r+b") as file, open(self._sums_path, "w") as sums:
            sums.write("".join(f"{line}\n" for line in done))
            sums.flush()
            for i, batch in enumerate(batches, len(done)):
                moved()
                content = to_bytes(batch, self.features, self.counts[i], f"{self.path}, batch {i}")
                file.seek(self._starts[i])
                file.write(content)
                file.flush()
                if self._starts[i + 1] // PIECE > self._starts[i] // PIECE:  # or the last flush is a long one
                    os.fsync(file.fileno())
                sums.write(digest(content) + "\n")
                sums.flush()
                moved()
            os.fsync(file.fileno())
            os.fsync(sums.fileno())
        sync_folder(self.path.parent)

    def read(self, i: int) -> torch.Tensor:
        """Return batch i, mapped from the file, on the CPU. Raises RunError if it has changed."""
        if self._map is None:
            self._map = torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)
            self._expected = self.sums
        raw = self._map[self._starts[i] : self._starts[i + 1]]
        if i not in self._checked:
            if digest(raw.numpy().data) != self._expected[i]:
                advice = f"remove {self.path.parent} and continue the run, which makes it anew"
                raise RunError(f"{self.path}, batch {i}, is damaged: {advice}")
            self._checked.add(i)
        shape, count = self.features.shape, self.counts[i]
        flat = raw.view(self.features.dtype)
        if self.features.channels_last:
            C, H, W = shape
            return flat.view(count, H, W, C).permute(0, 3, 1, 2)
        return flat.view(count, *shape)


def digest(content: bytes | memoryview) -> str:
    """Return the SHA-256 of a batch."""
    return hashlib.sha256(content).hexdigest()


def to_bytes(batch: torch.Tensor, features: Features, count: int, what: str) -> memoryview:
    """Return a batch's bytes. Raises ValueError, naming ``what``, if it is not ``count`` of the features."""
    if len(batch) != count or Features.of(batch).shape != features.shape or batch.dtype != features.dtype:
        raise ValueError(f"{what}: expected {count} of {features}, got {tuple(batch.shape)} {batch.dtype}")
    own = batch.detach().to("cpu")
    own = own.permute(0, 2, 3, 1) if features.channels_last else own
    return own.contiguous().view(-1).view(torch.uint8).numpy().data


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise RunError if the disk has fewer than ``needed`` bytes free; those of ``folder`` count as free."""
    own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free + own
    if needed > free:
        raise RunError(
            f"{folder}: {what} takes {for_people(needed)}, the disk has {for_people(free)} free: "
            "cache fewer epochs (--cached-epochs), or none (--no-cache)"
        )
