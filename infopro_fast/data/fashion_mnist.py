"""The embedded set: 8,000 training and 2,000 test images of Fashion-MNIST (Xiao et al. 2017), class-balanced.

The licence is MIT. Grey images of 28x28 are padded with black to 32x32 and repeated to three channels, the
shape of CIFAR-10. The paper has no augmentation for this set; here it is a shift by up to one pixel. Stronger
augmentation does not pay in a few epochs.
"""

from __future__ import annotations

import importlib.resources

import numpy as np
import torch
import torch.nn.functional as F

from .augment import Augmentation
from .image_set import ImageSet, Split

FILE = "fashion_mnist_10k.npz"
MEAN = (0.2193,) * 3  # of the padded training images
STD = (0.3324,) * 3
NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
AUGMENTATION = Augmentation(padding=1, mode="zeros", flip=False)


def load() -> ImageSet:
    """Return the embedded set; needs no other file."""
    with (importlib.resources.files(__package__) / "embedded" / FILE).open("rb") as file:
        content = dict(np.load(file, allow_pickle=False))
    parts = ("train", "test")
    train, test = (padded(content[f"{part}_images"], content[f"{part}_labels"]) for part in parts)
    return ImageSet("fashion_mnist", train, test, 10, MEAN, STD, AUGMENTATION, NAMES)


def padded(images: np.ndarray, labels: np.ndarray) -> Split:
    """Return images (N, 28, 28) uint8 as (N, 3, 32, 32), with their labels."""
    larger = F.pad(torch.from_numpy(images), (2, 2, 2, 2))
    return Split(larger[:, None].repeat(1, 3, 1, 1), torch.from_numpy(labels.astype(np.int64)))
