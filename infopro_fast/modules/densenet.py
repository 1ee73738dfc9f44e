"""DenseNet-BC for CIFAR (Huang et al. 2017) as a flat list: stem, dense layers, transitions, last norm.

Depth 100 and growth 12, as in the paper's Table 2: three blocks of 16 layers with bottlenecks, compression
0.5, 24 channels at the start, 0.77 M parameters for 10 classes. The authors published no code for it; the
names are our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import Unit

ARCHS = {"densenet_bc_100_12": (100, 12)}


class DenseLayer(nn.Module):
    """The input, then ``growth`` channels: BatchNorm, ReLU, conv1x1 (4 growth), BatchNorm, ReLU, conv3x3."""

    def __init__(self, inplanes: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, conv1x1 to half the channels, average pooling to half the size."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(inplanes)
        self.conv = nn.Conv2d(inplanes, planes, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class LastNorm(nn.Module):
    def __init__(self, planes: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(x), inplace=True)


def units(arch: str) -> list[Unit]:
    """Return the units of ``arch`` in order; (1, 16), (2, 16): the transitions, (3, 16): the last norm."""
    depth, growth = ARCHS[arch]
    layers = (depth - 4) // 6
    channels = 2 * growth
    found = [Unit((0, 0), "conv.", nn.Conv2d(3, channels, 3, padding=1, bias=False), channels, 1)]
    for stage in (1, 2, 3):
        scale = 2 ** (stage - 1)
        for layer in range(layers):
            block = DenseLayer(channels, growth)
            channels += growth
            found.append(Unit((stage, layer), f"block{stage}.{layer}.", block, channels, scale))
        if stage < 3:
            transition = Transition(channels, channels // 2)
            channels //= 2
            found.append(Unit((stage, layers), f"transition{stage}.", transition, channels, 2 * scale))
        else:
            found.append(Unit((stage, layers), "norm.", LastNorm(channels), channels, scale))
    return found
