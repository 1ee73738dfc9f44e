"""CIFAR-10 (Krizhevsky 2009) from its original Python files in `cifar-10-batches-py`.

A file is a pickle of {"data": (10000, 3072) uint8, rows of R, G and B planes; "labels": list of int}.
Unpickling can run any code. So this reader builds arrays, strings, numbers, lists and dictionaries, and
refuses anything else.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from infopro_fast.errors import DataError

from .augment import Augmentation
from .files import fetch_archive, require
from .image_set import ImageSet, Split

FOLDER = "cifar-10-batches-py"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
AUGMENTATION = Augmentation(padding=4, mode="reflect", flip=True)


def load(root: str | Path, download: bool = False, md5: dict[str, str] = MD5) -> ImageSet:
    """Return CIFAR-10. root: the folder that holds `cifar-10-batches-py`. md5: the sums of its files."""
    folder = Path(root) / FOLDER
    require("cifar10", folder, md5, (lambda: fetch_archive(URL, root, ARCHIVE_MD5)) if download else None)
    return ImageSet("cifar10", _read(folder, TRAIN), _read(folder, TEST), 10, MEAN, STD, AUGMENTATION, NAMES)


def _read(folder: Path, names: tuple[str, ...]) -> Split:
    images, labels = [], []
    for name in names:
        path = folder / name
        try:
            with open(path, "rb") as file:
                entry = _ArrayUnpickler(file, encoding="latin1").load()
            pixels = np.ascontiguousarray(entry["data"], dtype=np.uint8)
            images.append(torch.from_numpy(pixels).view(-1, 3, 32, 32))
            labels.append(torch.tensor(entry["labels"], dtype=torch.int64))
        except DataError:
            raise
        except Exception as error:  # a pickle that is no CIFAR batch can fail in any way
            raise DataError(f"cifar10: {path} is not a CIFAR-10 batch: {error!r}") from error
    return Split(torch.cat(images), torch.cat(labels))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays alone."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _latin1
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct  # the first module is numpy 1's, the second numpy 2's
        raise DataError(f"cifar10: a file needs {module}.{name}, which no CIFAR-10 batch contains: refused")


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _reconstruct(kind, shape, typecode):
    return np.ndarray.__new__(np.ndarray, shape, typecode)
