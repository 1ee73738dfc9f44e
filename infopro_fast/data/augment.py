"""The released augmentations as pure functions of a uint8 batch: pad, crop at a random place, flip left to right or not.

The released code runs them image by image through PIL (pad and crop, `transforms.RandomCrop`, `RandomHorizontalFlip`); on
uint8 the result is the same pixels. Here one batch is one gather of windows: 1 ms for 128 CIFAR images on one CPU core, normalised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """padding: pixels added on every side before cropping back to the image's size; flip: mirror half of the images."""

    padding: int
    mode: Literal["reflect", "zeros"]
    flip: bool


@dataclass(frozen=True)
class Draws:
    """What was drawn for N images: first row and column of the crop in the padded image (N,) int64, flip (N,) bool."""

    top: torch.Tensor
    left: torch.Tensor
    flip: torch.Tensor

    def select(self, index: slice | torch.Tensor) -> Draws:
        return Draws(self.top[index], self.left[index], self.flip[index])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.top.to(device), self.left.to(device), self.flip.to(device))


def draw(count: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Crops and flips for ``count`` images, from a generator on the CPU: the same on every device."""
    places = 2 * augmentation.padding + 1
    top = torch.randint(places, (count,), generator=generator)
    left = torch.randint(places, (count,), generator=generator)
    flip = torch.randint(2, (count,), generator=generator, dtype=torch.bool) if augmentation.flip else torch.zeros(count, dtype=torch.bool)
    return Draws(top, left, flip)


def augment(images: torch.Tensor, augmentation: Augmentation, draws: Draws) -> torch.Tensor:
    """images: (N, C, H, W) uint8, not written to; draws: N of them, on the device of the images. Returns the same shape and dtype."""
    N, C, H, W = images.shape
    if images.dtype != torch.uint8 or draws.top.shape != (N,):
        raise ValueError(f"augment: expected uint8 images and {N} draws, got {images.dtype} and {tuple(draws.top.shape)}")
    padded = pad(images, augmentation.padding, augmentation.mode)
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (N, C, 2 padding + 1, 2 padding + 1, H, W), a view
    crops = windows[torch.arange(N, device=images.device), :, draws.top, draws.left]
    if augmentation.flip:
        crops = torch.where(draws.flip.view(N, 1, 1, 1), crops.flip(3), crops)
    return crops


def pad(images: torch.Tensor, padding: int, mode: str) -> torch.Tensor:
    """(N, C, H, W) uint8 to (N, C, H + 2 padding, W + 2 padding): "zeros" (black), or "reflect" without repeating the border."""
    if mode == "zeros":
        return F.pad(images, (padding,) * 4)
    H, W = images.shape[2:]
    if mode != "reflect" or padding >= min(H, W):
        raise ValueError(f"pad: expected zeros, or reflect with padding < {min(H, W)}, got {mode!r} with {padding}")
    # F.pad does not reflect uint8 on every device and version.
    return images.index_select(2, _reflected(H, padding, images.device)).index_select(3, _reflected(W, padding, images.device))


def _reflected(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Source index of each of size + 2 padding places: 2 1 0 1 2 ... size-1 size-2."""
    at = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(at < size, at, 2 * (size - 1) - at)


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(N, C, H, W) uint8 to ``dtype``: (x / 255 - mean) / std per channel, rounded as `ToTensor` then `Normalize` round."""
    mean, std = (_per_channel(tuple(v), dtype, images.device) for v in (mean, std))
    return images.to(dtype).div_(255).sub_(mean).div_(std)


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, C, 1, 1). Made once: a copy of Python numbers to a GPU waits for it, which no batch should."""
    with torch.inference_mode(False):  # an evaluation may be the first to ask, and training asks for the same one
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
