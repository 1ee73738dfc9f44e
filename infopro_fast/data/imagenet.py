"""ImageNet (ILSVRC 2012), and any images in folders by class, as torchvision's ImageFolder reads them.

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
MOST_MEASURED = 500  # images that mean and std are measured on


def load(
    root: str | Path, *, crop: tuple[int, int] = (224, 224), workers: int = 0, name: str = "imagenet",
    mean: tuple | None = MEAN, std: tuple | None = STD,
) -> FolderSet:
    """Return the set. Raises DataError for a missing or empty folder, or parts with different classes.

    root: holds `train` and `val`. crop: (H, W) of the images; 256 scales with it. workers: reading processes.
    mean, std: of each channel; None: measured on training images, evenly spread.
    """
    v2, datasets = torchvision_parts(name)
    parts = []
    for part in ("train", "val"):
        folder = Path(root) / part
        if not folder.is_dir():
            raise DataError(f"{name}: {folder} not found: expected a folder of images for each class in it")
        try:
            parts.append(datasets.ImageFolder(folder))
        except FileNotFoundError as error:
            raise DataError(f"{name}: {folder}: {' '.join(str(error).split())}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        names = ", ".join(differing[:5]) + ", ..." * (len(differing) > 5)
        raise DataError(f"{name}: {root}: train and val have different classes: {names}")
    shorter = round(min(crop) * 256 / 224)
    centre = Images(v2.Compose([v2.Resize(shorter), v2.CenterCrop(crop), v2.PILToTensor()]))
    if mean is None or std is None:
        step = -(-len(train) // MOST_MEASURED)
        mean, std = statistics(torch.stack([centre(*train[i])[0] for i in range(0, len(train), step)]))
    crops = v2.Compose([v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return FolderSet(
        name, train, test, Images(crops), centre, len(train.classes), mean, std, crop, workers=workers,
        classes=tuple(train.classes),
    )


def statistics(images: torch.Tensor) -> tuple[tuple, tuple]:
    """Return mean and standard deviation of each channel, in units of [0, 1]. images: (N, 3, H, W) uint8."""
    some = images[:: -(-len(images) // MOST_MEASURED)].double() / 255
    variance, mean = torch.var_mean(some, (0, 2, 3), correction=0)
    std = variance.sqrt().clamp(min=1 / 255)  # of images of one color, too
    return tuple(round(float(v), 4) for v in mean), tuple(round(float(v), 4) for v in std)


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
