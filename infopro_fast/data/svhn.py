"""SVHN (Netzer et al. 2011), cropped digits, from the original `train_32x32.mat` and `test_32x32.mat`.

A file holds X (32, 32, 3, N) uint8 and y (N, 1), where the digit 0 is labelled 10. The "extra" images are not
used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infopro_fast.errors import DataError

from .augment import Augmentation
from .files import require
from .image_set import ImageSet, Split

URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
MEAN = STD = (127.5 / 255,) * 3
AUGMENTATION = Augmentation(padding=2, mode="zeros", flip=False)


def load(root: str | Path, download: bool = False, md5: dict[str, str] = MD5) -> ImageSet:
    """Return SVHN. root: the folder that holds the .mat files. md5: their sums. Needs scipy."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("svhn: .mat files need scipy, which is not installed: pip install scipy") from error
    folder = Path(root)
    require("svhn", folder, md5, (lambda: _download(root)) if download else None)
    train, test = (_read(folder / name, loadmat) for name in MD5)
    return ImageSet("svhn", train, test, 10, MEAN, STD, AUGMENTATION)


def _download(root):
    from torchvision.datasets.utils import download_url

    for name, md5 in MD5.items():
        download_url(URL + name, str(root), name, md5)


def _read(path: Path, loadmat) -> Split:
    try:
        content = loadmat(path)
        images = torch.from_numpy(np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)))
        labels = torch.from_numpy(content["y"].astype(np.int64).reshape(-1))
    except Exception as error:  # scipy raises several kinds for files that are not MATLAB's
        raise DataError(f"svhn: {path} is not an SVHN file: {error!r}") from error
    return Split(images, torch.where(labels == 10, 0, labels))
