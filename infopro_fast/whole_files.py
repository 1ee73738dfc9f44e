"""Files that are whole or not there, and on the disk when a call returns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

ASIDE = ".aside-"  # a folder being written or removed
PIECE = 16 * 2**20  # bytes that are given to the disk at once
Moved = Callable[[], None]  # called whenever some of the work is done (`Watch.moved`)


def nobody() -> None:
    pass


def write_file(path: Path, content: bytes, moved: Moved = nobody) -> None:
    """``moved`` is called after every piece that is on the disk."""
    view = memoryview(content)
    with naming(path), open(path, "wb") as file:
        for start in range(0, len(view), PIECE):
            file.write(view[start : start + PIECE])
            file.flush()
            os.fsync(file.fileno())
            moved()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing, as of a full disk, says which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_folder(path: Path) -> None:
    """Names created in a folder survive a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, moved: Moved = nobody) -> None:
    """Write ``path`` anew, or leave what was there."""
    aside = path.with_name(ASIDE + path.name)
    try:
        write_file(aside, content, moved)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
