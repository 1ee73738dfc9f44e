"""Data sets: `load(name)` returns an `ImageSet` (uint8 tensors in memory) or a `FolderSet` (image files)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from infopro_fast.errors import DataError
from infopro_fast.named_functions import is_named

from . import cifar10, cityscapes, fashion_mnist, fashion_mnist_full, imagenet, own, shapes_seg, stl10, svhn
from .augment import Augmentation, augment, draw, normalize
from .folder_set import FolderSet
from .image_set import ABOUT, ImageSet, Split, part_of
from .mixing import mixing
from .segmentation_set import SegmentationSet

__all__ = [
    "ABOUT", "Augmentation", "DataError", "FolderSet", "ImageSet", "SegmentationSet", "Split", "augment",
    "draw", "load", "mixing", "normalize", "part_of",
]


def load(
    name: str, root: str | Path | None = None, download: bool = False, *, crop: tuple[int, int] | None = None,
    workers: int = 0, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
) -> ImageSet | FolderSet:
    """Return a data set. Raises DataError saying what is wrong.

    name: "fashion_mnist" or "shapes_seg" (embedded in the package, need no root); "fashion_mnist_full",
        "cifar10", "svhn", "stl10", "imagenet", "imagefolder" or "cityscapes"; or package.module:function
        (`own.load`).
    root: folder with the original files. download: fetch missing files into ``root`` (not for folders).
    crop, workers: for folders (`imagenet.load`, `cityscapes.load`). mean, std: for images of your own; None:
    measured.
    """
    if is_named(name):
        return own.load(name, root, download, crop=crop, mean=mean, std=std)
    embedded: dict[str, Callable[[], ImageSet]]
    embedded = {"fashion_mnist": fashion_mnist.load, "shapes_seg": shapes_seg.load}
    if name in embedded:
        return embedded[name]()
    of_own = functools.partial(imagenet.load, name="imagefolder", mean=mean, std=std)
    folders: dict[str, Callable[..., FolderSet]]
    folders = {"imagenet": imagenet.load, "imagefolder": of_own, "cityscapes": cityscapes.load}
    readers = {
        "fashion_mnist_full": fashion_mnist_full.load, "cifar10": cifar10.load, "svhn": svhn.load,
        "stl10": stl10.load,
    }
    if name not in {**readers, **folders}:
        known = f"one of {(*embedded, *readers, *folders)} or package.module:function"
        raise DataError(f"load: name: expected {known}, got {name!r}")
    if root is None:
        raise DataError(f"{name}: expected a folder with its original files (--data-root), got none")
    if not download and not Path(root).is_dir():
        raise DataError(f"{name}: --data-root {root} is not a folder")
    if name in readers:
        return readers[name](root, download)
    if download:
        raise DataError(f"{name}: its files cannot be fetched without an account: put them under {root}")
    return folders[name](root, workers=workers, **({} if crop is None else {"crop": crop}))
