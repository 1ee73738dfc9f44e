"""CIFAR ResNets (the authors' networks/resnet.py) as a flat list of blocks: any slice can be a local module.

A ResNet of depth 6 n + 2 is a stem (conv3x3, BatchNorm, ReLU; no pooling) and three stages of n BasicBlocks
with 16, 32 and 64 channels. The first block of the second and third stage has stride 2 and a conv1x1
shortcut. Pooling and the linear classifier belong to the loss of the last module (`local_loss.Classifier`).
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import nn

from .features import Features

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}  # BasicBlocks a stage
WIDTHS = (16, 16, 32, 64)  # channels of the stem (stage 0) and of the stages 1 to 3


class Unit(typing.NamedTuple):
    """A block of the flat list."""

    position: tuple[int, int]  # (stage, block) in the authors' tables
    released_prefix: str  # of its names in the authors' code
    block: nn.Module
    channels: int  # of its output
    downscale: float  # image size / size of its output map
    label: str = ""  # its name in torchvision's and users' networks
    size: tuple[int, int] = (0, 0)  # of its output map, in these
    features: Features | None = None  # its output as a map, in these

    @property
    def name(self) -> str:
        """Name inside a stage: "stem", "layer1_0", ..."""
        stage, block = self.position
        return f"layer{stage}_{block}" if self.position != (0, 0) else "stem"


class Stem(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(image)), inplace=True)


class BasicBlock(nn.Module):
    """ReLU of the sum of two branches: conv3x3, BatchNorm, ReLU, conv3x3, BatchNorm; and the input.

    Where the shape changes, the input goes through conv1x1 and BatchNorm.
    """

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            conv = nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # BatchNorm's backward needs its input alone, so its output may be overwritten.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def units(arch: str) -> list[Unit]:
    """Return the blocks of ``arch`` ("resnet20", 32, 44, 56 or 110) in order, the stem first."""
    if arch not in BLOCKS:
        raise ValueError(f"build: arch: expected one of {tuple(BLOCKS)}, got {arch!r}")
    found = [Unit((0, 0), "", Stem(WIDTHS[0]), WIDTHS[0], 1)]
    for stage in (1, 2, 3):
        for block in range(BLOCKS[arch]):
            stride = 2 if stage > 1 and block == 0 else 1
            layer, name = BasicBlock(found[-1].channels, WIDTHS[stage], stride), f"layer{stage}.{block}."
            found.append(Unit((stage, block), name, layer, WIDTHS[stage], 2 ** (stage - 1)))
    return found


@torch.no_grad()
def initialize(net: nn.Module) -> None:
    """Initialise as the authors do: Conv2d He-normal (std = sqrt(2 / (k k out))), BatchNorm 1 and 0.

    This includes auxiliary nets. Biases of convolutions and linear layers keep torch's default.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
