"""The embedded segmentation set: scenes of 2 or 3 Fashion-MNIST items, 48x48, 11 classes with the background.

Each item is cut out, tinted and pasted at a random place, over earlier items. The background is a dim colour
with noise. A pixel's label is the class of its item (1 to 10, in Fashion-MNIST's order) or 0. Outlines are
ignored, as in PASCAL VOC. Training scenes consist of training images, test scenes of test images; every load
gives the same scenes. Augmentation: flips.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import fashion_mnist
from .augment import Augmentation
from .image_set import Split
from .segmentation_set import IGNORE, SegmentationSet

SIDE, ITEM = 48, 28
SCENES = {"train": 2000, "test": 400}
ITEMS = (2, 3)  # fewest and most in a scene
CLASSES = 11
MEAN = (0.2853, 0.2886, 0.2851)  # of the training scenes
STD = (0.2076, 0.2058, 0.2070)
AUGMENTATION = Augmentation(padding=0, mode="zeros", flip=True)


@functools.cache
def load() -> SegmentationSet:
    """Return the set; needs no file beside the package."""
    items = fashion_mnist.load()
    train, test = _scenes(items.train, SCENES["train"], seed=0), _scenes(items.test, SCENES["test"], seed=1)
    return SegmentationSet("shapes_seg", train, test, CLASSES, MEAN, STD, AUGMENTATION)


def _scenes(items: Split, count: int, seed: int) -> Split:
    g = torch.Generator().manual_seed(seed)
    grey = items.images[:, 0, 2:-2, 2:-2]  # (N, 28, 28): without the padding of 32x32
    most = ITEMS[1]
    number = torch.randint(ITEMS[0], most + 1, (count,), generator=g)
    which = torch.randint(len(grey), (count, most), generator=g)
    place = torch.randint(SIDE - ITEM + 1, (count, most, 2), generator=g)
    tint = 0.5 + 0.5 * torch.rand(count, most, 3, 1, 1, generator=g)
    colour = 60 * torch.rand(count, 3, 1, 1, generator=g)
    images = colour + 30 * torch.rand(count, 3, SIDE, SIDE, generator=g)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    shapes = silhouettes(grey)
    for scene in range(count):
        for i in range(number[scene]):
            item, (y, x) = which[scene, i], place[scene, i].tolist()
            window = (slice(y, y + ITEM), slice(x, x + ITEM))
            inside = shapes[item]
            shown = images[scene][(slice(None), *window)]
            shown.copy_(torch.where(inside, 40 + 215 / 255 * grey[item] * tint[scene, i], shown))
            label = labels[scene][window]
            label[inside] = items.labels[item].to(torch.uint8) + 1
            label[outline(inside)] = IGNORE
    return Split(images.round().clamp(0, 255).to(torch.uint8), labels)


def silhouettes(grey: torch.Tensor) -> torch.Tensor:
    """Return bool (N, h, w): the pixels that are lit, or have a lit pixel on all four sides."""
    lit = grey > 24
    before = [lit.cummax(axis).values for axis in (1, 2)]
    behind = [lit.flip(axis).cummax(axis).values.flip(axis) for axis in (1, 2)]
    return torch.stack(before + behind).all(0)


def outline(inside: torch.Tensor) -> torch.Tensor:
    """Return bool (h, w): the pixels on either side of a silhouette's border."""
    mask = inside[None, None].float()
    grown = F.max_pool2d(mask, 3, 1, 1)
    kept = 1 - F.max_pool2d(1 - mask, 3, 1, 1)
    return (grown != kept)[0, 0]
