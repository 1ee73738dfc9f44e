"""STL-10 (Coates et al. 2011) from its original files, `stl10_binary`: 5,000 training and 8,000 test images
of 96x96.

X files are uint8 in MATLAB's order, (N, 3, column, row). y files are uint8 labels from 1 to 10. The
unlabelled images are not used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infopro_fast.errors import DataError

from .augment import Augmentation
from .files import fetch_archive, require
from .image_set import ImageSet, Split

FOLDER = "stl10_binary"
URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
ARCHIVE_MD5 = "91f7769df0f17e558f3565bffb0c7dfb"
MD5 = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
MEAN = STD = (127.5 / 255,) * 3
AUGMENTATION = Augmentation(padding=4, mode="zeros", flip=True)


def load(root: str | Path, download: bool = False, md5: dict[str, str] = MD5) -> ImageSet:
    """Return STL-10. root: the folder that holds `stl10_binary`. md5: the sums its files must have."""
    folder = Path(root) / FOLDER
    require("stl10", folder, md5, (lambda: fetch_archive(URL, root, ARCHIVE_MD5)) if download else None)
    train, test = (_read(folder, part) for part in ("train", "test"))
    return ImageSet("stl10", train, test, 10, MEAN, STD, AUGMENTATION)


def _read(folder: Path, part: str) -> Split:
    pixels = np.fromfile(folder / f"{part}_X.bin", dtype=np.uint8)
    labels = np.fromfile(folder / f"{part}_y.bin", dtype=np.uint8)
    if len(pixels) != len(labels) * 3 * 96 * 96:
        expected = f"{3 * 96 * 96} for each of {len(labels)} labels"
        raise DataError(f"stl10: {folder}/{part}_X.bin holds {len(pixels)} bytes, expected {expected}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2))
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) - 1))
