"""The networks of `build` with every block in a stage of its own, as the planner measures them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from infopro_fast.errors import PlanError
from infopro_fast.modules import LocalLoss, LocalNetwork, Stage, Tap, backbones, build
from infopro_fast.modules.families import PUBLISHED, family

from .costs import NoCut
from .released import with_released_losses

IMAGENET = ("resnet50", "resnet101", "resnet152", "resnext101_32x8d")
CITYSCAPES = ("deeplabv3_resnet101",)
ARCHS = (*backbones.BLOCKS, *IMAGENET, *CITYSCAPES)

# The stage in which a module of the authors' code can end: their auxiliary networks fit its maps alone.
STAGE_OF_RELEASED_LOSSES = dict.fromkeys(IMAGENET, 2) | dict.fromkeys(CITYSCAPES, 3)


class Chain(LocalNetwork):
    """A network whose every stage is one block. positions: (stage, block) of each, as in `build`'s cuts."""

    def __init__(
        self, stages: Sequence[Stage], losses: Sequence[LocalLoss], positions: Sequence[tuple[int, int]]
    ):
        super().__init__(stages, losses, positions[:-1], [""] * len(stages))
        self.positions = list(positions)


def published_size(arch: str) -> tuple[int, int]:
    """Height and width of the images that ``arch`` is published for."""
    return (224, 224) if arch in IMAGENET else (512, 1024) if arch in CITYSCAPES else (32, 32)


def chain(arch: str, size: tuple[int, int], losses: str, recompute: str = "none") -> Chain:
    """Return ``arch`` block by block, with a loss after every block that a module can end with, else `NoCut`.

    size: height and width of the images. losses: "ours" or "released".
    recompute: "norm", or anything else, which `ChainCosts` adds up from blocks measured without
        recomputation.

    Raises PlanError for an unknown name, and what `build` raises.
    """
    if arch not in ARCHS:
        raise PlanError(f"plan: arch: expected one of {ARCHS}, got {arch!r}")
    units = family(arch, None, size, PUBLISHED, PUBLISHED, label_smoothing=0.0, impl="auto").units
    # A tap belongs to the block before it, and no module can end between the two.
    tapped = next((i for i, unit in enumerate(units) if isinstance(unit.block, Tap)), len(units))
    stage = STAGE_OF_RELEASED_LOSSES.get(arch) if losses == "released" else None
    ends = [unit.position for unit in units[: tapped - 1] if stage in (None, unit.position[0])]
    local_loss = "contrast" if arch in backbones.BLOCKS else "softmax"
    net = build(arch, cuts=ends, local_loss=local_loss, lambdas=(1, 1, 1, 1), image_size=size)
    net = with_released_losses(net) if losses == "released" else net
    local_losses = dict(zip(ends, net.local_losses))
    groups: list[list[nn.Module]] = []
    for block in (block for module in net.stages for block in module):
        if isinstance(block, Tap):
            groups[-1].append(block)
        else:
            groups.append([block])
    positions = [unit.position for unit in units if not isinstance(unit.block, Tap)]
    kept = "norm" if recompute == "norm" else "none"
    stages = [Stage(OrderedDict((str(i), block) for i, block in enumerate(group)), kept) for group in groups]
    losses_in_order = [*(local_losses.get(at) or NoCut() for at in positions[:-1]), net.classifier]
    return Chain(stages, losses_in_order, positions)


def batch(arch: str, batch_size: int, size: tuple[int, int], real: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, random if ``real``, and labels: one an image, or one a pixel for segmentation."""
    make = torch.rand if real else torch.empty
    labels = (batch_size, *size) if arch in CITYSCAPES else (batch_size,)
    return make(batch_size, 3, *size), torch.zeros(labels, dtype=torch.long)
