"""`load`: a run's network, ready to predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from infopro_fast import data
from infopro_fast.errors import RunError
from infopro_fast.modules import LocalNetwork

from . import run_folder, setup


class Trained(nn.Module):
    """A trained network and what its images are. In evaluation mode, without gradients.

    net: the network. num_classes, classes: how many, and their names, () where the data set has none.
    image_size: (H, W) of the training images. mean, std: of each channel of images in [0, 1]; `forward`
    normalises by them.
    """

    def __init__(self, net: LocalNetwork, about: SimpleNamespace):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.eval()
        self.num_classes, self.classes = about.num_classes, tuple(about.classes)
        self.image_size, self.mean, self.std = tuple(about.image_size), tuple(about.mean), tuple(about.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes), or (N, num_classes, h, w) of a network that segments.

        images: (N, 3, H, W), uint8, or floating point in [0, 1]; on the network's device.
        Raises ValueError for other images.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"Trained: images: expected (N, 3, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"Trained: images: expected uint8 or floating point, got {images.dtype}")
        if images.is_floating_point():
            least, most = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 0.0)
            if not (0 <= least and most <= 1):
                expected = "numbers in [0, 1], not normalised"
                raise ValueError(f"Trained: images: expected {expected}, got {least:.4g} to {most:.4g}")
            images = images * 255
        weight = next(self.net.parameters())
        return self.net(data.normalize(images, self.mean, self.std, weight.dtype))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return the probability of each class: the softmax of `forward`."""
        return self(images).softmax(1)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, image_size={self.image_size}"


def load(run: str | Path, *, device: str = "cpu") -> Trained:
    """Return the network of a run folder with its weights; the data set is not needed.

    Raises RunError for a folder that is no run, has no weights yet, or was written by a version that did not
    keep what its images are.
    """
    run = Path(run)
    config, weights, about = run_folder.read_config(run), run_folder.read_weights(run), run_folder.about(run)
    if "num_classes" not in about:
        what = "does not say what its images are, as runs of this version do"
        raise RunError(f"{run / run_folder.WEIGHTS} {what}")
    images: Any = SimpleNamespace(**{name: about[name] for name in data.ABOUT})
    config = dataclasses.replace(config.to_look_at(device=device), init=None)
    with setup.machine(config):
        return Trained(setup.build_trained(config, images, run, weights), images)
