"""CIFAR ResNets as a flat list of blocks, so that any contiguous slice is a local module (released networks/resnet.py).

A ResNet of depth 6 n + 2 is a stem (conv3x3, BatchNorm, ReLU; no pooling) and three stages of n BasicBlocks of 16, 32 and 64
channels, the first block of the second and third with stride 2 and a conv1x1 shortcut. Pooling and the linear classifier
belong to the loss of the last module (`local_loss.Classifier`).
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}  # BasicBlocks a stage
WIDTHS = (16, 16, 32, 64)  # channels of the stem (stage 0) and of the stages 1 to 3


class Unit(typing.NamedTuple):
    """A block of the flat list: its (stage, block) in the released tables, the released prefix of its names, its output."""

    position: tuple[int, int]
    released_prefix: str
    block: nn.Module
    channels: int
    downscale: float  # image size / size of its output map
    label: str = ""  # its name in a network that is not of this file
    size: tuple[int, int] = (0, 0)  # of its output map, there

    @property
    def name(self) -> str:
        """Its name inside a stage: "stem", "layer1_0", ..."""
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
    """conv3x3, BatchNorm, ReLU, conv3x3, BatchNorm, plus the input (through conv1x1 and BatchNorm where its shape changes), ReLU."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # BatchNorm's backward needs its input, not its output: adding and rectifying in place costs autograd nothing.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def units(arch: str) -> list[Unit]:
    """The blocks of ``arch`` ("resnet20", 32, 44, 56 or 110) in order, the stem first. Raises ValueError for another name."""
    if arch not in BLOCKS:
        raise ValueError(f"build: arch: expected one of {tuple(BLOCKS)}, got {arch!r}")
    found = [Unit((0, 0), "", Stem(WIDTHS[0]), WIDTHS[0], 1)]
    for stage in (1, 2, 3):
        for block in range(BLOCKS[arch]):
            stride = 2 if stage > 1 and block == 0 else 1
            inplanes = found[-1].channels
            found.append(
                Unit((stage, block), f"layer{stage}.{block}.", BasicBlock(inplanes, WIDTHS[stage], stride), WIDTHS[stage], 2 ** (stage - 1))
            )
    return found


@torch.no_grad()
def initialize(net: nn.Module) -> None:
    """Released initialisation: every Conv2d He-normal (std = sqrt(2 / (k k out))), auxiliary nets included; BatchNorm 1 and 0.

    Convolutions' biases and linear layers keep torch's default.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
