"""Cityscapes (Cordts et al. 2016) in its own layout, 19 classes (cityscapesScripts' createTrainIdLabelImgs).

    root/leftImg8bit/{train,val}/<city>/<name>_leftImg8bit.png
    root/gtFine/{train,val}/<city>/<name>_gtFine_labelTrainIds.png

The augmentation is the authors' (mmsegmentation's): a scale from 0.5 to 2; a random crop, drawn up to ten
times until no class has more than three quarters of the labelled pixels; a flip; photometric distortion;
padding with the mean colour, whose labels are ignored. The test takes whole images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from infopro_fast.errors import DataError

from .folder_set import FolderSet
from .imagenet import MEAN, STD, torchvision_parts
from .segmentation_set import IGNORE

CLASSES = 19
SCALES = (0.5, 2.0)
LARGEST_CLASS, TRIES = 0.75, 10
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
# Ranges of the distortion: an offset of values up to 255; factors; a part of the circle of hues (18 of
# OpenCV's 180 steps in the authors' configuration).
DISTORTION = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}


def load(root: str | Path, *, crop: tuple[int, int] = (512, 1024), workers: int = 0) -> FolderSet:
    """Return the set. Raises DataError naming the file or folder that is missing.

    root: holds `leftImg8bit` and `gtFine`. crop: (H, W) of the training images. workers: reading processes.
    """
    torchvision_parts("cityscapes")
    train, test = (Pairs(Path(root), part) for part in ("train", "val"))
    parts = ("cityscapes", train, test, Augmented(crop), whole)
    return FolderSet(*parts, CLASSES, MEAN, STD, crop, dense=True, workers=workers, test_batch=1)


class Pairs(Dataset):
    """Images and labels of "train" or "val", as PIL images, sorted by name."""

    def __init__(self, root: Path, part: str):
        folder = root / "leftImg8bit" / part
        self.images = sorted(folder.glob("*/*_leftImg8bit.png"))
        if not self.images:
            raise DataError(f"cityscapes: {folder}: no <city>/*_leftImg8bit.png found")
        self.labels = []
        for image in self.images:
            name = image.name.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
            label = root / "gtFine" / part / image.parent.name / name
            if not label.is_file():
                advice = "cityscapesScripts' createTrainIdLabelImgs makes the labelTrainIds files"
                raise DataError(f"cityscapes: {label} not found; {advice}")
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        from PIL import Image

        with Image.open(self.images[index]) as image, Image.open(self.labels[index]) as label:
            if image.size != label.size:
                sizes = f"expected the image's size {image.size}, got {label.size}"
                raise DataError(f"cityscapes: {self.labels[index]}: {sizes}")
            return image.convert("RGB"), label.copy()


def whole(image, label) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PIL images as uint8 (3, H, W) and (H, W)."""
    from torchvision.transforms.v2 import functional as F

    return F.pil_to_tensor(image), F.pil_to_tensor(label)[0]


class Augmented:
    """The training transform, on torch's generator."""

    def __init__(self, crop: tuple[int, int]):
        self.crop = crop
        self.distort = Distortion()

    def __call__(self, image, label) -> tuple[torch.Tensor, torch.Tensor]:
        from torchvision.transforms.v2 import functional as F

        scale = _uniform(*SCALES)
        size = [max(1, round(scale * side)) for side in (image.height, image.width)]
        # OpenCV, which the authors resize with, does not antialias.
        image = F.resize(F.pil_to_tensor(image), size, F.InterpolationMode.BILINEAR, antialias=False)
        label = F.pil_to_tensor(F.resize(label, size, F.InterpolationMode.NEAREST))[0]
        window = self._window(label)
        image, label = image[(slice(None), *window)], label[window]
        if _coin():
            image, label = image.flip(-1), label.flip(-1)
        return self._padded(self.distort(image), label)

    def _window(self, label: torch.Tensor) -> tuple[slice, ...]:
        for _ in range(TRIES):
            most = [max(0, side - want) for side, want in zip(label.shape, self.crop)]
            at = [int(torch.randint(last + 1, ())) for last in most]
            window = tuple(slice(start, start + want) for start, want in zip(at, self.crop))
            counts = torch.bincount(label[window].flatten().long(), minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < LARGEST_CLASS:
                break
        return window

    def _padded(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        H, W = self.crop
        h, w = label.shape
        if (h, w) == (H, W):
            return image.contiguous(), label.contiguous()
        full = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, H, W)
        labels = torch.full((H, W), IGNORE, dtype=torch.uint8)
        full[:, :h, :w], labels[:h, :w] = image, label
        return full, labels


class Distortion:
    """mmsegmentation's PhotoMetricDistortion, on torch's generator.

    Brightness, contrast, saturation and hue each apply with probability 1/2, by an amount that is uniform in
    its range (DISTORTION). Contrast comes before saturation and hue, or after them. Torchvision's distortion
    is another: here channels are never permuted, brightness is an offset, contrast a factor, and saturation
    is HSV's, which keeps the largest channel.
    """

    def draw(self) -> list[tuple[str, float]]:
        """Return the names and amounts of the steps, in order."""
        order = ["brightness", "saturation", "hue"]
        order.insert(1 if _coin() else 3, "contrast")
        return [(name, _uniform(*DISTORTION[name])) for name in order if _coin()]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return a distorted copy of the image, uint8 (3, H, W)."""
        for name, amount in self.draw():
            image = distorted(image, name, amount)
        return image


def distorted(image: torch.Tensor, name: str, amount: float) -> torch.Tensor:
    """Return uint8 (3, H, W) after a step of DISTORTION. Fractions are cut off, as in mmsegmentation."""
    from torchvision.transforms.v2 import functional as F

    if name == "hue":
        return F.adjust_hue(image, amount)
    if name == "contrast":
        return F.adjust_brightness(image, amount)  # a product: torchvision's contrast keeps the mean grey
    if name == "brightness":
        return (image.float() + amount).clamp_(0, 255).to(torch.uint8)
    largest, smallest = image.amax(0).float(), image.amin(0)
    factor = torch.clamp(largest / (largest - smallest).clamp(min=1), max=amount)  # saturation 1 at most
    return (largest - (largest - image) * factor).clamp_(0, 255).to(torch.uint8)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)
