"""What is trained on each data set unless settings say otherwise, and the names of networks and data sets.

A name with a colon is a network or a data set of your own, or of another package: package.module:function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dataset = Literal[
    "fashion_mnist", "fashion_mnist_full", "shapes_seg", "cifar10", "svhn", "stl10", "imagenet",
    "imagefolder", "cityscapes",
]
Arch = Literal[
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "densenet_bc_100_12",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet20",
]
Schedule = Literal["cosine", "step", "one_cycle", "half_cosine", "poly"]
CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
SEGMENTERS = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet20")
EMBEDDED = ("fashion_mnist", "shapes_seg")  # data sets that come with the package
FOLDERS = ("imagenet", "imagefolder", "cityscapes")  # folders of images, read during training in crops
SEGMENTATION = ("shapes_seg", "cityscapes")
MEASURED = ("imagefolder",)  # data sets whose mean and std are measured; those of your own are, too
OWN = "package.module:function"
WARM = ("cosine", "one_cycle")  # schedules with a warm-up


@dataclass(frozen=True)
class Recipe:
    """How to train on a data set. warmup: in epochs; iterations: steps, in place of epochs."""

    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    warmup: int = 0
    arch: Arch = "resnet32"
    modules: int = 4
    local_loss: str = "contrast"
    weight_decay: float = 1e-4
    nesterov: bool = True
    drop_last: bool = False
    iterations: int | None = None

    def default_warmup(self, schedule: str, epochs: int) -> int:
        """Return the epochs of warm-up for which a run has room; 0 for a schedule without one."""
        return min(self.warmup, epochs - 1) if schedule in WARM else 0


RECIPES: dict[str, Recipe] = {
    # Ours, for a few minutes on two CPU cores.
    "fashion_mnist": Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one_cycle", warmup=1),
    "fashion_mnist_full": Recipe(epochs=5, batch_size=64, lr=0.1, schedule="one_cycle", warmup=1),
    "shapes_seg": Recipe(
        epochs=12, batch_size=32, lr=0.1, schedule="one_cycle", warmup=2,
        arch="fcn_resnet20", modules=2, local_loss="softmax",
    ),
    # The paper's, for every architecture and number of modules (README of the authors' code).
    "cifar10": Recipe(epochs=160, batch_size=1024, lr=0.8, schedule="cosine", warmup=10),
    "svhn": Recipe(epochs=160, batch_size=1024, lr=0.8, schedule="cosine", warmup=10),
    "stl10": Recipe(epochs=160, batch_size=128, lr=0.1, schedule="cosine", warmup=10),
    "imagenet": Recipe(
        epochs=90, batch_size=1024, lr=0.4, schedule="half_cosine",
        arch="resnet101", modules=2, local_loss="softmax",
    ),
    # Ours, to begin with.
    "imagefolder": Recipe(
        epochs=90, batch_size=64, lr=0.05, schedule="one_cycle", warmup=5, arch="resnet18", modules=4,
        local_loss="softmax",
    ),
    OWN: Recipe(epochs=30, batch_size=64, lr=0.1, schedule="one_cycle", warmup=2),
    "cityscapes": Recipe(
        epochs=108, batch_size=8, lr=0.01, schedule="poly", arch="deeplabv3_resnet101", modules=2,
        local_loss="softmax", weight_decay=5e-4, nesterov=False, drop_last=True, iterations=40000,
    ),
}

IMAGE_SIZES: dict[str, int | tuple[int, int]] = {
    "fashion_mnist": 32, "fashion_mnist_full": 32, "shapes_seg": 48, "cifar10": 32, "svhn": 32, "stl10": 96,
    "imagenet": 224, "imagefolder": 224, OWN: 32, "cityscapes": (512, 1024),
}


def kind(dataset: str) -> str:
    """Return the key of a data set in the tables here."""
    return OWN if ":" in dataset else dataset
