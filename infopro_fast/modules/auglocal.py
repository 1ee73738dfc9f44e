"""AugLocal: auxiliary networks made of blocks of the network itself, so that a module learns for what follows it.

Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (ICLR 2024, arXiv 2402.17318): the auxiliary
network of a module is a few of the blocks that follow it, equally spaced up to the network's last, with weights of its own, then pooling
and a linear classifier; the deeper the module, the fewer (their pyramidal depth).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .backbones import BasicBlock, Unit
from .heads import GlobalAveragePool, classify

PYRAMID = 0.5  # of the way from this depth to 1 that the last local module's has come: the authors' scripts


def aux_depths(depth: int, modules: int) -> list[int]:
    """Blocks of the auxiliary networks of the K - 1 local modules: linear in the module's number, rounded, at least 1."""
    steps = max(1, modules - 2)
    return [max(1, round(depth - PYRAMID * (depth - 1) * module / steps)) for module in range(modules - 1)]


def sampled_blocks(end: int, blocks: int, depth: int) -> list[int]:
    """``depth`` of the blocks that follow block ``end`` of ``blocks``, equally spaced, the last among them; all where there are no more."""
    left = blocks - 1 - end
    if depth >= left:
        return list(range(end + 1, blocks))
    return [round(end + left * i / depth) for i in range(1, depth + 1)]


class AugmentedHead(nn.Module):
    """Residual blocks, global average pooling, linear classifier; cross entropy.

    inplanes, downscale: of the features (N, inplanes, h, w), as in `Unit`. blocks: those of the CIFAR ResNet to make anew, in order.
    class_num: classes. label_smoothing, impl: as in `ops.linear_cross_entropy`.

    A block has the channels of its original, and stride 2 where the map is still larger than the original's; where channels and size
    change twice between two samples, the second halving is left to the next block, or to the pooling.
    """

    def __init__(
        self,
        inplanes: int,
        downscale: float,
        blocks: Sequence[Unit],
        class_num: int = 10,
        *,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.label_smoothing, self.impl = label_smoothing, impl
        layers: list[nn.Module] = []
        for unit in blocks:
            stride = 2 if unit.downscale > downscale else 1
            layers.append(BasicBlock(inplanes, unit.channels, stride))
            inplanes, downscale = unit.channels, downscale * stride
        self.head = nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(inplanes, class_num))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, a 0-d tensor. features: (N, inplanes, h, w); target: (N,) integers."""
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and how many rows are classified right (0-d int64), from the same pass."""
        return classify(self.head, features, target, self.impl, self.label_smoothing)
