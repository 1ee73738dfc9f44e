"""Outputs of trained modules on the disk, memory-mapped: what the next module is trained on when one is trained after the other.

One file for each cached epoch and one for the test images, batch after batch as they are trained on, and beside each a list of the
SHA-256 of every batch, a line being written when its batch is. So a process that dies loses one batch, and a batch that has changed is
found when it is first read. The space of a file is taken from the disk before anything is written into it.
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
from infopro_fast.whole_files import PIECE, Moved, naming, nobody, sync_folder

SUMS = ".sha256"


@dataclass(frozen=True)
class Features:
    """Of one image: shape, dtype and whether batches of them are channels_last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @staticmethod
    def of(batch: torch.Tensor) -> Features:
        channels_last = batch.dim() == 4 and not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last)
        return Features(tuple(batch.shape[1:]), batch.dtype, channels_last)


class CacheFile:
    """The features of ``counts[i]`` images in batch i, of a fixed order; ``path`` and its list of checksums may or may not exist."""

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
        """Of the batches that are written."""
        if not self._sums_path.is_file() or not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return []
        lines = self._sums_path.read_text().split("\n")
        return lines[:-1]  # what follows the last end of line was cut short

    @property
    def is_complete(self) -> bool:
        return len(self.sums) == len(self.counts)

    def reserve(self) -> None:
        """Take the file's space from the disk, if it has not been taken."""
        if self.path.is_file() and self.path.stat().st_size == self.nbytes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._sums_path.unlink(missing_ok=True)  # of a file that is gone
        with naming(self.path), open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.nbytes))

    def write(self, batches: Iterable[torch.Tensor], moved: Moved = nobody) -> None:
        """Write the batches from the first that is missing on; ``batches`` begins there. moved: as in `checkpoint.save`."""
        self.reserve()
        done = self.sums
        with naming(self.path), open(self.path, "r+b") as file, open(self._sums_path, "w") as sums:
            sums.write("".join(f"{line}\n" for line in done))
            sums.flush()
            for i, batch in enumerate(batches, len(done)):
                moved()
                content = _bytes(batch, self.features, self.counts[i], f"{self.path}, batch {i}")
                file.seek(self._starts[i])
                file.write(content)
                file.flush()
                if self._starts[i + 1] // PIECE > self._starts[i] // PIECE:  # or all of it would wait for the last call
                    os.fsync(file.fileno())
                sums.write(_digest(content) + "\n")
                sums.flush()
                moved()
            os.fsync(file.fileno())
            os.fsync(sums.fileno())
        sync_folder(self.path.parent)

    def read(self, i: int) -> torch.Tensor:
        """Batch i as it was written, on the CPU, mapped from the file. Raises RunError if it is another one."""
        if self._map is None:
            self._map = torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)
            self._expected = self.sums
        raw = self._map[self._starts[i] : self._starts[i + 1]]
        if i not in self._checked:
            if _digest(raw.numpy()) != self._expected[i]:
                raise RunError(f"{self.path}, batch {i}, is damaged: remove {self.path.parent} and continue the run, which makes it anew")
            self._checked.add(i)
        shape, count = self.features.shape, self.counts[i]
        flat = raw.view(self.features.dtype)
        if self.features.channels_last:
            C, H, W = shape
            return flat.view(count, H, W, C).permute(0, 3, 1, 2)
        return flat.view(count, *shape)


def _digest(content) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(batch: torch.Tensor, features: Features, count: int, what: str) -> memoryview:
    if len(batch) != count or Features.of(batch).shape != features.shape or batch.dtype != features.dtype:
        raise ValueError(f"{what}: expected {count} of {features}, got {tuple(batch.shape)} {batch.dtype}")
    own = batch.detach().to("cpu")
    own = own.permute(0, 2, 3, 1) if features.channels_last else own
    return memoryview(own.contiguous().view(-1).view(torch.uint8).numpy())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises RunError if the disk of ``folder`` has not ``needed`` bytes free, beside what the folder itself has."""
    own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free + own
    if needed > free:
        from infopro_fast.plan import for_people

        raise RunError(
            f"{folder}: {what} takes {for_people(needed)}, the disk has {for_people(free)} free: cache fewer epochs (--cached-epochs), or "
            "none (--no-cache)"
        )
