"""ImageNet (ILSVRC 2012), or any set of images in folders by class, as torchvision's ImageFolder reads it.

    root/train/<class>/*.JPEG    root/val/<class>/*.JPEG

Augmentation and crops of the released code: RandomResizedCrop to 224 and a flip; for the test the shorter side to 256, centre 224.
"""

from __future__ import annotations

from pathlib import Path

import torch

from infopro_fast.errors import DataError

from .folder_set import FolderSet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load(root: str | Path, *, crop: tuple[int, int] = (224, 224), workers: int = 0) -> FolderSet:
    """root: holds `train` and `val`. crop: size of the images; the test image is scaled as 256 is to 224. workers: processes that read.

    Raises DataError for a folder that is missing, has no images, or whose two parts have other classes.
    """
    v2, datasets = torchvision_parts("imagenet")
    parts = []
    for part in ("train", "val"):
        folder = Path(root) / part
        if not folder.is_dir():
            raise DataError(f"imagenet: {folder} not found: expected {root}/train and {root}/val, a folder of images a class in each")
        try:
            parts.append(datasets.ImageFolder(folder))
        except FileNotFoundError as error:
            raise DataError(f"imagenet: {folder}: {' '.join(str(error).split())}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"imagenet: {root}: train and val have other classes: {', '.join(differing[:5])}{', ...' * (len(differing) > 5)}")
    shorter = round(min(crop) * 256 / 224)
    return FolderSet(
        "imagenet", train, test,
        Images(v2.Compose([v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip(), v2.PILToTensor()])),
        Images(v2.Compose([v2.Resize(shorter), v2.CenterCrop(crop), v2.PILToTensor()])),
        len(train.classes), MEAN, STD, crop, workers=workers,
    )  # fmt: skip


class Images:
    """A transform of images alone; the label stays."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image, label) -> tuple[torch.Tensor, int]:
        return self.transform(image), label


def torchvision_parts(name: str):
    """torchvision.transforms.v2 and torchvision.datasets; DataError says what is missing."""
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise DataError(f"{name}: its images are read and augmented by torchvision ({error}): pip install torchvision") from error
    return v2, datasets
