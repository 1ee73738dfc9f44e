"""AugLocal: auxiliary networks built like later blocks, so that a module learns for what follows it.

Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (ICLR 2024, arXiv
2402.17318). The auxiliary network of a module copies the shape of a few blocks that follow it, equally spaced
up to the last, with weights of its own; then come pooling and a linear classifier. Deeper modules get fewer
blocks (the paper's pyramidal depth).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .backbones import BasicBlock, Unit
from .heads import GlobalAveragePool, Head

PYRAMID = 0.5  # how far the last local module has gone from the depth of the first to 1: the authors' scripts


def aux_depths(depth: int, modules: int) -> list[int]:
    """Return the blocks of the K - 1 auxiliary networks: linear in the module's number, at least 1."""
    steps = max(1, modules - 2)
    return [max(1, round(depth - PYRAMID * (depth - 1) * module / steps)) for module in range(modules - 1)]


def sampled_blocks(end: int, blocks: int, depth: int) -> list[int]:
    """Return ``depth`` of the blocks after block ``end``, equally spaced, with the last; at most all."""
    left = blocks - 1 - end
    if depth >= left:
        return list(range(end + 1, blocks))
    return [round(end + left * i / depth) for i in range(1, depth + 1)]


class AugmentedHead(Head):
    """Residual blocks, global average pooling, linear classifier; cross entropy.

    inplanes, downscale: of the features (N, inplanes, h, w), as in `Unit`. blocks: the CIFAR ResNet's blocks
    to copy, in order. class_num: classes. label_smoothing, impl: as in `Head`.

    A block has the channels of its original, and stride 2 where the map is still larger than the original's.
    It halves the map once at most: a second halving is left to the next block, or to the pooling.
    """

    def __init__(
        self, inplanes: int, downscale: float, blocks: Sequence[Unit], class_num: int = 10, *,
        label_smoothing: float = 0.0, impl: str = "auto",
    ):
        layers: list[nn.Module] = []
        for unit in blocks:
            stride = 2 if unit.downscale > downscale else 1
            layers.append(BasicBlock(inplanes, unit.channels, stride))
            inplanes, downscale = unit.channels, downscale * stride
        head = nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(inplanes, class_num))
        super().__init__(head, "cross_entropy", label_smoothing, impl)
