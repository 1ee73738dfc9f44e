"""The paper's ImageNet networks, which are torchvision's, and the authors' auxiliary nets for them.

The authors' nets (networks/resnet.py of their ImageNet code) fit one place, 512 channels at 28x28. Here the
same rule makes nets for any width and size.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from infopro_fast.ops.linear_cross_entropy import logits_cross_entropy
from infopro_fast.ops.plain import not_plain

from . import chain
from .backbones import Unit
from .heads import GlobalAveragePool, Head, classify, conv_norm_relu
from .local_loss import InfoPro, LocalLoss, Term

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

WIDEST = 512  # most channels before the head's last conv1x1, which has four times as many
SMALLEST = 7  # a head halves its map until the shorter side is at most this


def network(arch: str, num_classes: int) -> nn.Module:
    """Return torchvision's network of this name, with random weights. Without torchvision: ImportError."""
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(f"build: {arch} needs torchvision: pip install 'infopro-fast[data]'") from error
    return getattr(torchvision.models, arch)(num_classes=num_classes)


class StridedHead(Head):
    """The authors' ImageNet head: conv1x1 to C/4, conv3x3 of stride 2 until the map is small, conv1x1.

    Each conv3x3 doubles the channels. No convolution has a bias; each is followed by BatchNorm and ReLU. From
    512 channels at 28x28 the widths are the authors': 128, 256, 512, 2048.
    inplanes: channels C. size: (h, w) of the features. class_num: classes.
    feature_dim: width of the output for contrast. The other arguments: as in `Head`.
    """

    def __init__(
        self, inplanes: int, size: tuple[int, int], class_num: int = 1000, loss_mode: str = "cross_entropy",
        feature_dim: int = 128, *, label_smoothing: float = 0.0, impl: str = "auto",
    ):
        width, side = max(16, min(inplanes // 4, WIDEST)), min(size)
        layers = conv_norm_relu(inplanes, width, 1)
        while side > SMALLEST:
            side, planes = math.ceil(side / 2), min(2 * width, WIDEST)
            layers += conv_norm_relu(width, planes, 3, 2)
            width = planes
        layers += [*conv_norm_relu(width, 4 * width, 1), GlobalAveragePool(), nn.Flatten()]
        layers.append(nn.Linear(4 * width, feature_dim if loss_mode == "contrast" else class_num))
        super().__init__(nn.Sequential(*layers), loss_mode, label_smoothing, impl)


class ReleasedNames(InfoPro):
    """`InfoPro` with the authors' names for larger networks. alone: omit the number of the only module."""

    names: tuple[str, str] = ("decoder", "head")

    def __init__(self, *args, alone: bool):
        super().__init__(*args)
        self.alone = alone

    def released_nets(self, stage, block):
        end = "." if self.alone else f"_{stage}_{block}."
        return {self.names[0] + end: self.decoder, self.names[1] + end: self.aux_classifier.head}


class Tail(LocalLoss):
    """The last layers of a network, from features (N, C, h, w) to class scores; cross entropy.

    links: these layers, with their names in the network. class_num: classes.
    """

    def __init__(
        self, links: Sequence[chain.Link], class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"
    ):
        super().__init__()
        self.layers = nn.Sequential(*(link.module for link in links))
        self._prefixes = tuple(link.prefix for link in links)
        self.class_num, self.label_smoothing, self.impl = class_num, label_smoothing, impl

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes)."""
        return self.layers(features)

    def terms(self, features, image, label):
        if isinstance(self.layers[-1], nn.Linear):
            layers = (self,) if not_plain(self, Tail) else self.layers
            found = classify(layers, features, label, self.impl, self.label_smoothing)
        else:
            options = {"label_smoothing": self.label_smoothing}
            found = logits_cross_entropy(self(features), label, **options)
        yield Term("cross_entropy", 1.0, *found)

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {"": chain.Joined(OrderedDict(self.layers.named_children()), self._prefixes)}


def units_and_tail(
    net: nn.Module, image_size: tuple[int, int]
) -> tuple[list[Unit], list[chain.Link], dict[str, str]]:
    """Return a classifier's blocks, the links of its end, and why it cannot be cut elsewhere."""
    traced = chain.trace(net)
    links = chain.with_shapes(traced.links, image_size)
    body, tail, reasons = chain.without_end(net, links, image_size)
    return chain.units_of(body, image_size), tail, reasons | traced.reasons
