"""Networks with every block in a stage of its own, as the planner measures them."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from infopro_fast.modules import (
    LocalLoss,
    LocalNetwork,
    Place,
    Stage,
    Tap,
    backbones,
    cityscapes,
    imagenet,
    named,
)
from infopro_fast.modules.families import PUBLISHED, Family, family
from infopro_fast.modules.network import assemble
from infopro_fast.named_functions import is_named
from infopro_fast.published import WEIGHTED

from .costs import NoCut
from .fake import build_fake, copy_to_meta
from .released import with_released_losses

# The stage in which a module of the authors' code can end: their auxiliary networks fit its maps alone.
STAGE_OF_RELEASED_LOSSES = dict.fromkeys(imagenet.ARCHS, 2) | dict.fromkeys(cityscapes.ARCHS, 3)


class Chain(LocalNetwork):
    """A network whose every stage is one block.

    found: what it was made of. positions: (stage, block) of each stage, as in `build`'s cuts.
    """

    def __init__(
        self, found: Family, stages: Sequence[Stage], losses: Sequence[LocalLoss],
        positions: Sequence[tuple[int, int]],
    ):
        super().__init__(stages, losses, positions[:-1], [""] * len(stages))
        self.found, self.positions = found, list(positions)


@dataclass(frozen=True)
class Source:
    """A network to plan, and the losses of its modules. The arguments are those of `build`.

    losses: "ours", or "released", the authors'. options: of the auxiliary nets. A network of your own is
    copied, never changed.
    """

    arch: str | nn.Module
    image_size: int | tuple[int, int] | None = None
    num_classes: int | None = None
    arch_args: Mapping[str, Any] | None = None
    image_mean: Sequence[float] | str | None = PUBLISHED
    image_std: Sequence[float] | str | None = PUBLISHED
    local_loss: str | Callable[[Place], LocalLoss] = "softmax"
    losses: str = "ours"
    options: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def network(self) -> str | nn.Module:
        """The network itself if it is a user's or another package's, else its name."""
        if not is_named(self.arch):
            return self.arch
        with torch.device("cpu"):  # code that makes a network may read the values of tensors
            return named.network(self.arch, self.num_classes, self.arch_args or {})

    def family(self, meta: bool) -> Family:
        """Return the network's blocks. meta: their tensors have no values."""
        arch = self.network
        if isinstance(arch, nn.Module):
            arch = copy_to_meta(arch) if meta else copy.deepcopy(arch)
        with torch.device("meta" if meta else "cpu"):
            found = family(arch, self.num_classes, self.image_size, self.image_mean, self.image_std)
        return replace(found, name=self.arch) if isinstance(self.arch, str) else found

    def chain(self, recompute: str = "none", *, real: bool = False) -> Chain:
        """Return the network block by block, with a loss after each that can end a module, else `NoCut`.

        recompute: "norm", or anything else, which `ChainCosts` adds up from blocks measured without
            recomputation. real: with random weights; otherwise with fake ones, inside a `FakeTensorMode`.

        Raises what `build` raises.
        """
        if real:
            return self._chain(self.family(meta=False), recompute)
        return build_fake(lambda: self._chain(self.family(meta=True), recompute))

    def _chain(self, found: Family, recompute: str) -> Chain:
        units = found.units
        # A tap belongs to the block before it, and no module can end between the two.
        tapped = next((i for i, unit in enumerate(units) if isinstance(unit.block, Tap)), len(units))
        stage = STAGE_OF_RELEASED_LOSSES.get(found.name) if self.losses == "released" else None
        ends = [unit.position for unit in units[: tapped - 1] if stage in (None, unit.position[0])]
        weights = (1, 1, 1, 1) if self.local_loss in WEIGHTED else (0, 0, 0, 0)
        net = assemble(found, ends, self.local_loss, weights, **self.options)
        net = with_released_losses(net) if self.losses == "released" else net
        local_losses = dict(zip(ends, net.local_losses))
        groups: list[list[nn.Module]] = []
        for block in (block for module in net.stages for block in module):
            if isinstance(block, Tap):
                groups[-1].append(block)
            else:
                groups.append([block])
        positions = [unit.position for unit in units if not isinstance(unit.block, Tap)]
        kept = "norm" if recompute == "norm" else "none"
        stages = [Stage(OrderedDict((str(i), b) for i, b in enumerate(group)), kept) for group in groups]
        losses = [*(local_losses.get(at) or NoCut() for at in positions[:-1]), net.classifier]
        return Chain(found, stages, losses, positions)


def usual_loss(arch: str) -> str:
    """Return the local loss that the paper trains a network with."""
    return "contrast" if arch in backbones.BLOCKS else "softmax"


def batch(found: Family, batch_size: int, real: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, random if ``real``, and labels: one an image, or one a pixel for segmentation."""
    make = torch.rand if real else torch.empty
    labels = (batch_size, *found.image_size) if found.dense else (batch_size,)
    return make(batch_size, 3, *found.image_size), torch.zeros(labels, dtype=torch.long)
