"""The paper's ImageNet networks, on torchvision's, and the released auxiliary nets for them (its folder for ImageNet, networks/resnet.py).

The released nets fit one place, 512 channels at 28x28; here they go on the same way to any width and size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from infopro_fast import ops

from . import chain
from .backbones import Unit
from .heads import GlobalAveragePool, classify, run_head
from .local_loss import InfoPro, LocalLoss, Term

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

WIDEST = 512  # channels of the last convolution before the head's conv1x1 to four times as many
SMALLEST = 7  # maps are halved until their shorter side is no longer than this


def network(arch: str, num_classes: int) -> nn.Module:
    """torchvision's network of this name, with random weights. ImportError says what is missing."""
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(f"build: {arch} is torchvision's: pip install 'infopro-fast[data]' ({error})") from error
    return getattr(torchvision.models, arch)(num_classes=num_classes)


class StridedHead(nn.Module):
    """The released ImageNet head: conv1x1 to C/4, conv3x3 of stride 2 and twice the channels until the map is small, conv1x1, classifier.

    Every convolution is without bias and followed by BatchNorm and ReLU. From 512 channels at 28x28: 128, 256, 512, 2048, as released.
    inplanes: channels C. size: (h, w) of the features. class_num: classes. loss_mode: "cross_entropy" or "contrast".
    feature_dim: width of the output for contrast. label_smoothing: of the cross entropy. impl: as in the ops.
    """

    def __init__(
        self,
        inplanes: int,
        size: tuple[int, int],
        class_num: int = 1000,
        loss_mode: str = "cross_entropy",
        feature_dim: int = 128,
        *,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.loss_mode, self.label_smoothing, self.impl = loss_mode, label_smoothing, impl
        width, side = max(16, min(inplanes // 4, WIDEST)), min(size)
        layers = _conv_norm_relu(inplanes, width, 1)
        while side > SMALLEST:
            side, planes = math.ceil(side / 2), min(2 * width, WIDEST)
            layers += _conv_norm_relu(width, planes, 3, 2)
            width = planes
        layers += [*_conv_norm_relu(width, 4 * width, 1), GlobalAveragePool(), nn.Flatten()]
        self.head = nn.Sequential(*layers, nn.Linear(4 * width, feature_dim if loss_mode == "contrast" else class_num))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean loss, a 0-d tensor. features: (N, inplanes, h, w); target: (N,) integers."""
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.loss_mode == "contrast":
            return ops.supcon_loss(run_head(self.head, features, self.impl), target, impl=self.impl), None
        return classify(self.head, features, target, self.impl, self.label_smoothing)


def _conv_norm_relu(inplanes: int, planes: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inplanes, planes, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


class ReleasedNames(InfoPro):
    """`InfoPro` under the names of a released network, which has one local module: decoder and head have no numbers where ``alone``."""

    names: tuple[str, str] = ("decoder", "head")

    def __init__(self, *args, alone: bool):
        super().__init__(*args)
        self.alone = alone

    def released_nets(self, stage, block):
        end = "." if self.alone else f"_{stage}_{block}."
        return {self.names[0] + end: self.decoder, self.names[1] + end: self.aux_classifier.head}


class Tail(LocalLoss):
    """The end of a network as its own layers: features (N, C, h, w) to class scores; cross entropy.

    links: the layers, by the names they have in the network. class_num: classes.
    """

    def __init__(self, links: Sequence[chain.Link], class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.layers = nn.Sequential(*(link.module for link in links))
        self._prefixes = tuple(link.prefix for link in links)
        self.class_num, self.label_smoothing, self.impl = class_num, label_smoothing, impl

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes)."""
        return self.layers(features)

    def terms(self, features, image, label):
        last = self.layers[-1]
        if type(last) is nn.Linear:
            yield Term("cross_entropy", 1.0, *classify(self.layers, features, label, self.impl, self.label_smoothing))
            return
        logits = self.layers(features)
        loss = nn.functional.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        yield Term("cross_entropy", 1.0, loss, (logits.detach().argmax(1) == label).sum())

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {prefix or f"layers.{i}.": layer for i, (prefix, layer) in enumerate(zip(self._prefixes, self.layers))}


def units_and_tail(net: nn.Module, image_size: tuple[int, int]) -> tuple[list[Unit], list[chain.Link], dict[str, str]]:
    """A network for classification as its blocks and the links of its end; and why it cannot be cut elsewhere."""
    traced = chain.trace(net)
    body, tail = chain.without_end(chain.with_shapes(traced.links, image_size))
    return chain.units_of(body, image_size), tail, traced.reasons
