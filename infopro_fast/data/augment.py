"""The authors' augmentations as pure functions of a uint8 batch: padding, random crop, random flip.

The authors' code runs them image by image through PIL (`transforms.RandomCrop`, `RandomHorizontalFlip`). On
uint8 the pixels are the same. Here a batch is one gather of windows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """padding: pixels added on every side before a crop to the old size. flip: mirror half of the images."""

    padding: int
    mode: Literal["reflect", "zeros"]
    flip: bool


@dataclass(frozen=True)
class Draws:
    """Random numbers for N images: first row and column of the crop (N,) int64, whether to flip (N,) bool."""

    top: torch.Tensor
    left: torch.Tensor
    flip: torch.Tensor

    def select(self, index: slice | torch.Tensor) -> Draws:
        return Draws(self.top[index], self.left[index], self.flip[index])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(self.top.to(device), self.left.to(device), self.flip.to(device))


def draw(count: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Draw crops and flips for ``count`` images. generator: on the CPU, so that devices do not matter."""
    places = 2 * augmentation.padding + 1
    top = torch.randint(places, (count,), generator=generator)
    left = torch.randint(places, (count,), generator=generator)
    if augmentation.flip:
        return Draws(top, left, torch.randint(2, (count,), generator=generator, dtype=torch.bool))
    return Draws(top, left, torch.zeros(count, dtype=torch.bool))


def augment(images: torch.Tensor, augmentation: Augmentation, draws: Draws) -> torch.Tensor:
    """Return augmented images of the same shape and dtype.

    images: (N, C, H, W) uint8, left unchanged. draws: N of them, on the images' device.
    """
    N, _, H, W = images.shape
    if images.dtype != torch.uint8 or draws.top.shape != (N,):
        got = f"{images.dtype}, {len(draws.top)}"
        raise ValueError(f"augment: expected uint8 images and {N} draws, got {got}")
    padded = pad(images, augmentation.padding, augmentation.mode)
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (N, C, 2 padding + 1, 2 padding + 1, H, W), a view
    crops = windows[torch.arange(N, device=images.device), :, draws.top, draws.left]
    if augmentation.flip:
        crops = torch.where(draws.flip.view(N, 1, 1, 1), crops.flip(3), crops)
    return crops


def pad(images: torch.Tensor, padding: int, mode: str) -> torch.Tensor:
    """Pad (N, C, H, W) uint8: with "zeros" (black), or "reflect", which does not repeat the border."""
    if mode == "zeros":
        return F.pad(images, (padding,) * 4)
    H, W = images.shape[2:]
    if mode != "reflect" or padding >= min(H, W):
        expected = f"zeros, or reflect with padding < {min(H, W)}"
        raise ValueError(f"pad: expected {expected}, got {mode!r} with {padding}")
    # F.pad does not reflect uint8 on every device and version.
    rows, columns = (_reflected(side, padding, images.device) for side in (H, W))
    return images.index_select(2, rows).index_select(3, columns)


def _reflected(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Return the source index of each of size + 2 padding places: 2 1 0 1 2 ... size-1 size-2."""
    at = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(at < size, at, 2 * (size - 1) - at)


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return (x / 255 - mean) / std per channel of (N, C, H, W) uint8, with the rounding of torchvision."""
    offset, scale = (per_channel(tuple(v), dtype, images.device) for v in (mean, std))
    return images.to(dtype).div_(255).sub_(offset).div_(scale)


@functools.lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (1, C, 1, 1) on the device. Cached, because copying Python numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # training uses this tensor too, even if an evaluation makes it
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
