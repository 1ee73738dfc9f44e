"""Fashion-MNIST (Xiao et al. 2017), all 60,000 training and 10,000 test images, from gzipped IDX files.

An IDX file holds four bytes (0, 0, type of the elements, number of axes), the axes' lengths as big-endian
32-bit integers, then the elements, here unsigned bytes. The rest is as in `fashion_mnist`.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from infopro_fast.errors import DataError

from . import fashion_mnist
from .files import problem, require
from .image_set import ImageSet, Split

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # no HTTPS there: MD5 checks the content
MD5 = {  # of the uncompressed content: Debian's package compresses it differently
    "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
}
UNSIGNED_BYTES = 8


def load(root: str | Path, download: bool = False, md5: dict[str, str] = MD5) -> ImageSet:
    """Return Fashion-MNIST. root: the folder that holds the four files. md5: the sums they must have."""
    folder, small = Path(root), fashion_mnist
    require("fashion_mnist_full", folder, md5, (lambda: _download(folder, md5)) if download else None)
    train, test = (_split(folder, part) for part in ("train", "t10k"))
    about = 10, small.MEAN, small.STD, small.AUGMENTATION, small.NAMES
    return ImageSet("fashion_mnist_full", train, test, *about)


def _download(folder: Path, md5: dict[str, str]) -> None:
    from torchvision.datasets.utils import download_url

    for name, expected in md5.items():
        if problem(folder / name, expected) is not None:
            (folder / name).unlink(missing_ok=True)  # torchvision would keep any file of this name
            download_url(URL + name, str(folder), name)


def _split(folder: Path, part: str) -> Split:
    images = folder / f"{part}-images-idx3-ubyte.gz"
    pixels, classes = _read(images, 3), _read(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    if pixels.shape[1:] != (28, 28):
        raise DataError(f"fashion_mnist_full: {images}: expected images of 28x28, got {pixels.shape[1:]}")
    return fashion_mnist.padded(pixels, classes)


def _read(path: Path, axes: int) -> np.ndarray:
    """Return the array of an IDX file of unsigned bytes."""
    with gzip.open(path) as file:
        content = file.read()
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes((0, 0, UNSIGNED_BYTES, axes)):
        begin = content[:4].hex()
        raise DataError(f"fashion_mnist_full: {path} is not an IDX file of bytes with {axes} axes: {begin}")
    shape, count = struct.unpack(f">{axes}I", content[4:start]), len(content) - start
    if count != math.prod(shape):
        expected = f"{math.prod(shape)} bytes for {shape}"
        raise DataError(f"fashion_mnist_full: {path}: expected {expected}, got {count}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
