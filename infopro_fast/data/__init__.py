"""Data sets as uint8 tensors on the device: `load(name)` gives an `ImageSet`, its `train_epoch` the augmented batches."""

from __future__ import annotations

from pathlib import Path

from . import cifar10, fashion_mnist, stl10, svhn
from .augment import Augmentation, augment, draw, normalize
from .image_set import DataError, ImageSet, Split

__all__ = ["Augmentation", "DataError", "ImageSet", "Split", "augment", "draw", "load", "normalize"]


def load(name: str, root: str | Path | None = None, download: bool = False) -> ImageSet:
    """name: "fashion_mnist" (embedded; takes no root), "cifar10", "svhn" or "stl10", whose original files lie under ``root``.

    download: fetch missing files into ``root``; nothing is fetched otherwise. Raises DataError saying what is wrong.
    """
    if name == "fashion_mnist":
        return fashion_mnist.load()
    readers = {"cifar10": cifar10.load, "svhn": svhn.load, "stl10": stl10.load}
    if name not in readers:
        raise DataError(f"load: name: expected one of {('fashion_mnist', *readers)}, got {name!r}")
    if root is None:
        raise DataError(f"{name}: expected a folder with its original files (--data-root), got none")
    if not download and not Path(root).is_dir():
        raise DataError(f"{name}: --data-root {root} is not a folder")
    return readers[name](root, download)
