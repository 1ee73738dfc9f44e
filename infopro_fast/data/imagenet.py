"""ImageNet (ILSVRC 2012), or any images in folders by class, as torchvision's ImageFolder reads them.

    root/train/<class>/*.JPEG    root/val/<class>/*.JPEG

The crops are the authors': RandomResizedCrop to 224 and a flip for training; the test image is scaled to a
shorter side of 256, and its centre of 224 is taken.
"""

from __future__ import annotations

from pathlib import Path

import torch

from infopro_fast.errors import DataError

from .folder_set import FolderSet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load(root: str | Path, *, crop: tuple[int, int] = (224, 224), workers: int = 0) -> FolderSet:
    """Return the set. Raises DataError for a missing or empty folder, or parts with different classes.

    root: holds `train` and `val`. crop: (H, W) of the images; 256 scales with it. workers: reading processes.
    """
    v2, datasets = torchvision_parts("imagenet")
    parts = []
    for part in ("train", "val"):
        folder = Path(root) / part
        if not folder.is_dir():
            raise DataError(f"imagenet: {folder} not found: expected a folder of images for each class in it")
        try:
            parts.append(datasets.ImageFolder(folder))
        except FileNotFoundError as error:
            raise DataError(f"imagenet: {folder}: {' '.join(str(error).split())}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        names = ", ".join(differing[:5]) + ", ..." * (len(differing) > 5)
        raise DataError(f"imagenet: {root}: train and val have different classes: {names}")
    shorter = round(min(crop) * 256 / 224)
    return FolderSet(
        "imagenet", train, test,
        Images(v2.Compose([v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip(), v2.PILToTensor()])),
        Images(v2.Compose([v2.Resize(shorter), v2.CenterCrop(crop), v2.PILToTensor()])),
        len(train.classes), MEAN, STD, crop, workers=workers,
    )


class Images:
    """A transform of images; the label stays the same."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image, label) -> tuple[torch.Tensor, int]:
        return self.transform(image), label


def torchvision_parts(name: str):
    """Return torchvision.transforms.v2 and torchvision.datasets. Raises DataError where they are missing."""
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise DataError(f"{name}: its images need torchvision ({error}): pip install torchvision") from error
    return v2, datasets
