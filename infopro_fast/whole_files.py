"""Write files that are whole or not there, and on the disk when a call returns."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

ASIDE = ".aside-"  # begins the name of a file or folder that is being written or removed
PIECE = 16 * 2**20  # bytes between two flushes to the disk
Moved = Callable[[], None]  # called after each piece of work, for a watch (`Watch.moved`)


def nobody() -> None:
    pass


def write_file(path: Path, content: bytes, moved: Moved = nobody) -> None:
    """Write a file in pieces, each of which is on the disk before ``moved`` is called and the next begins."""
    view = memoryview(content)
    with naming(path), open(path, "wb") as file:
        for start in range(0, len(view), PIECE):
            file.write(view[start : start + PIECE])
            file.flush()
            os.fsync(file.fileno())
            moved()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an error of writing that lacks it, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_folder(path: Path) -> None:
    """Flush a folder: without this, names created in it do not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, moved: Moved = nobody) -> None:
    """Replace the file at ``path``, or leave it as it was."""
    aside = path.with_name(ASIDE + path.name)
    try:
        write_file(aside, content, moved)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
