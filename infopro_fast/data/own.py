"""Data sets of other code: torch Datasets of (image, label), such as torchvision's, brought to one size.

A name is package.module:function. The function is called with train=True, then with train=False, and with
root and download where it takes them.
"""

from __future__ import annotations

import inspect
import operator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infopro_fast import named_functions
from infopro_fast.errors import DataError

from .augment import Augmentation
from .image_set import ImageSet, Split
from .imagenet import statistics, torchvision_parts


def load(
    name: str, root: str | Path | None = None, download: bool = False, *,
    crop: tuple[int, int] | None = None, mean: tuple | None = None, std: tuple | None = None,
) -> ImageSet:
    """Return the data set in memory. Raises DataError that names it, the image or label, and what it found.

    crop: (H, W) that all images are scaled to; None: (32, 32). Grey images get three equal channels.
    mean, std: of each channel; None: measured on the training images. The classes are the dataset's
    ``classes`` where it has them, else 0 to the largest label. Training images are padded by an eighth,
    cropped at random and flipped.
    """
    try:
        make = named_functions.find(name)
    except ImportError as error:
        raise DataError(f"{name}: {error}") from error
    options = {"root": root, "download": download}
    taken = inspect.signature(make).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    given = {k: v for k, v in options.items() if v and (k in taken or any_name)}
    if root is not None and "root" not in given:
        raise DataError(f"{name}: takes no root: leave out --data-root")
    parts = []
    for train in (True, False):
        try:
            parts.append(make(train=train, **given))
        except Exception as error:  # the user's own code, or a file that is missing
            what = next(iter(str(error).splitlines()), "")
            raise DataError(f"{name}(train={train}): {type(error).__name__}: {what}") from error
    size = crop or (32, 32)
    train_part = _split(f"{name}, train=True", parts[0], size)
    test_part = _split(f"{name}, train=False", parts[1], size)
    names = tuple(map(str, getattr(parts[0], "classes", None) or ()))
    classes = len(names) or 1 + int(train_part.labels.max())
    if mean is None or std is None:
        mean, std = statistics(train_part.images)
    padding = max(1, min(size) // 8)
    augmentation = Augmentation(padding, "reflect", True)
    return ImageSet(name, train_part, test_part, classes, mean, std, augmentation, names)


def _split(where: str, dataset: Any, size: tuple[int, int]) -> Split:
    """Return all images and labels of a dataset."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"{where}: expected a Dataset with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise DataError(f"{where}: expected at least one image, got none")
    v2, _ = torchvision_parts(where)
    resize = v2.Resize(size, antialias=True)
    images, labels = torch.empty(len(dataset), 3, *size, dtype=torch.uint8), torch.empty(len(dataset)).long()
    for i in range(len(dataset)):
        pair = dataset[i]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"{where}: image {i}: expected (image, label), got {type(pair).__name__}")
        image, label = pair
        image = _pixels(f"{where}: image {i}", image)
        images[i] = image if image.shape[1:] == size else resize(image)
        try:
            labels[i] = operator.index(label)
        except TypeError:
            raise DataError(f"{where}: label {i}: expected an integer, got {label!r}") from None
    return Split(images, labels)


def _pixels(where: str, image: Any) -> torch.Tensor:
    """Return (3, H, W) uint8 of a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W)."""
    is_tensor = isinstance(image, torch.Tensor)
    try:
        pixels = image if is_tensor else torch.from_numpy(np.array(image))
    except TypeError:
        raise DataError(f"{where}: expected an image, an array or a tensor, got {image!r:.80}") from None
    if pixels.dim() not in (2, 3) or pixels.numel() == 0:
        raise DataError(f"{where}: expected (H, W) or three dimensions, got {tuple(pixels.shape)}")
    pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels if is_tensor else pixels.permute(2, 0, 1)
    if pixels.dtype.is_floating_point and 0 <= pixels.min() and pixels.max() <= 1:
        pixels = (255 * pixels).round().to(torch.uint8)
    if pixels.dtype != torch.uint8 or pixels.shape[0] not in (1, 3, 4):
        got = f"{tuple(pixels.shape)} {pixels.dtype}"
        raise DataError(f"{where}: expected uint8, or numbers in [0, 1], of 1 or 3 channels, got {got}")
    return pixels[:3].expand(3, -1, -1)
