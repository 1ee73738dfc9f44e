"""Original files of a data set: checked against their published MD5 sums, downloaded only when asked."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

from infopro_fast.errors import DataError


def require(name: str, folder: Path, md5: dict[str, str], fetch: Callable[[], None] | None) -> None:
    """Make sure that ``folder`` holds the files named in ``md5``. fetch: downloads them; None forbids it.

    Raises DataError naming a file that is missing or damaged.
    """
    found = _first_problem(folder, md5)
    if found is None:
        return
    if fetch is None:
        raise DataError(f"{name}: {found}; put the original files there or add --download")
    try:
        fetch()
    except ImportError as error:
        raise DataError(f"{name}: a download needs torchvision ({error}): pip install torchvision") from error
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a wrong checksum
        raise DataError(f"{name}: download into {folder} failed: {error}") from error
    found = _first_problem(folder, md5)
    if found is not None:
        raise DataError(f"{name}: after the download: {found}")


def _first_problem(folder: Path, md5: dict[str, str]) -> str | None:
    return next(filter(None, (problem(folder / name, expected) for name, expected in md5.items())), None)


def fetch_archive(url: str, root: str | Path, md5: str) -> None:
    """Download and unpack an archive into ``root``."""
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(url, str(root), filename=url.rpartition("/")[2], md5=md5)


def problem(path: Path, expected: str) -> str | None:
    """Return what is wrong with the file, or None. expected: its MD5 sum."""
    if not path.is_file():
        return f"{path} not found"
    got = _md5(path)
    wrong = f"{path} is damaged or another version: MD5 expected {expected}, got {got}"
    return None if got == expected else wrong


def _md5(path: Path) -> str:
    """Return the MD5 sum of a file, for .gz of its content: mirrors compress the same images differently."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return f"none: {error}"
    return digest.hexdigest()
