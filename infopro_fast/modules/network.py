"""A network cut into local modules, each with its local loss. `assemble` makes one, the trainer trains it."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from infopro_fast.published import AUX_DEPTH, WEIGHTED

from . import backbones, norm_recompute, split
from .chain import Joined
from .families import Family
from .local_loss import Classifier, LocalLoss, Place, interpolate_lambdas
from .segmentation import Tap

RECOMPUTE = ("none", "norm", "block", "sqrt")


class Stage(nn.Sequential):
    """The blocks of one local module.

    recompute: what backward computes again. "norm": each convolution's normalised input, of which the map
    before the norm is kept (`norm_recompute`); "block": each block, from its input; "sqrt": segments of
    sqrt(blocks) blocks (Chen et al. 2016). Running statistics move once a step, in the first forward.
    Gradients are the same bits as with "none", where torch's kernels are deterministic.
    random: blocks may draw random numbers (dropout), so a second forward must draw the same ones.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module], recompute: str = "none", random: bool = False):
        super().__init__(blocks)
        if recompute not in RECOMPUTE:
            raise ValueError(f"Stage: recompute: expected one of {RECOMPUTE}, got {recompute!r}")
        self.recompute, self.random = recompute, random

    def segments(self) -> list[nn.Module]:
        """Return the parts that are run again as one: blocks, or for "sqrt" several blocks in a row."""
        size = max(1, round(math.sqrt(len(self)))) if self.recompute == "sqrt" else 1
        found: list[list[nn.Module]] = []
        for block in self:
            alone = isinstance(block, Tap) or (found and isinstance(found[-1][-1], Tap))
            if not found or alone or len(found[-1]) == size:
                found.append([])
            found[-1].append(block)
        return [blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks) for blocks in found]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if self.recompute == "norm":
            for block in self:
                x = norm_recompute.run_block(block, x)
            return x
        for segment in self.segments():
            if isinstance(segment, Tap):  # keeps no map and must run once
                x = segment(x)
                continue

            def contexts(segment=segment):
                return contextlib.nullcontext(), self.second_forward(segment)

            x = run_checkpointed(
                segment, x, use_reentrant=False, preserve_rng_state=self.random, context_fn=contexts
            )
        return x

    def second_forward(self, segment: nn.Module) -> contextlib.AbstractContextManager:
        """Return the context in which backward runs a segment again."""
        return _statistics_kept(segment)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch norms move copies of their running statistics, which are dropped at the end."""
    own = [(module, dict(module.named_buffers(recurse=False))) for module in block.modules()]
    for module, buffers in own:
        for name, buffer in buffers.items():
            setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in own:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


class LocalNetwork(nn.Module):
    """K local modules: ``stages[k]`` are the blocks of module k, ``local_losses[k]`` trains it.

    The last loss is ``classifier``, the network's own: pooling, linear layer and cross entropy, or the head
    of a segmentation network. ``cuts`` are the (stage, block) at which all modules but the last end. A call
    returns logits and uses no auxiliary net.
    """

    def __init__(
        self, stages: Sequence[Stage], local_losses: Sequence[LocalLoss], cuts: Sequence[split.Cut],
        prefixes: Sequence[str],
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.local_losses = nn.ModuleList(local_losses)
        self.cuts = tuple(cuts)
        self._prefixes = tuple(prefixes)  # of each block's names in the authors' code

    @property
    def classifier(self) -> LocalLoss:
        return self.local_losses[-1]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network's own loss; None in a part without it."""
        end = self.classifier  # whose last layer may have been replaced, by one that does not tell
        known = getattr(end, "class_num", None)
        return getattr(end.fc, "out_features", known) if isinstance(end, Classifier) else known

    def part(self, span: range) -> LocalNetwork:
        """Return the modules ``span`` (from 0) as a network; blocks and losses are shared with this one."""
        blocks = [len(stage) for stage in self.stages]
        start, stop, own = sum(blocks[: span.start]), sum(blocks[: span.stop]), slice(span.start, span.stop)
        prefixes = self._prefixes[start:stop]
        return LocalNetwork(self.stages[own], self.local_losses[own], self.cuts[own], prefixes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits of normalised images (N, 3, H, W): (N, num_classes), for segmentation (N,
        num_classes, h, w).

        Segmentation's maps are smaller than the image.
        """
        for stage in self.stages:
            image = stage(image)
        return self.classifier(image)

    def _released_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        return _original(zip(self._prefixes, (block for stage in self.stages for block in stage)))

    def released_block_names(self) -> list[str]:
        """Return the authors' names of the blocks' tensors, without heads and auxiliary nets."""
        return [prefix + name for prefix, module in self._released_blocks() for name in module.state_dict()]

    def released_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (prefix, module): prefix + name in the module is the authors' name. Auxiliary nets last."""
        yield from self._released_blocks()
        yield from _original(self.classifier.released_nets(0, 0).items())
        for end, local_loss in zip(self.cuts, self.local_losses):
            yield from local_loss.released_nets(*end).items()

    def released_state_dict(self) -> dict[str, torch.Tensor]:
        """Return `state_dict` by the authors' names; the tensors are the network's own."""
        states = ((prefix, module.state_dict()) for prefix, module in self.released_modules())
        return {prefix + name: tensor for prefix, state in states for name, tensor in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As nn.Module's. Raises ValueError for tensors by the authors' names, such as a run's weights."""
        names = set(unwrapped(state_dict))
        if strict and not names & self.state_dict().keys() and names & self.released_state_dict().keys():
            what = "expected this network's own names, got the authors', as a run's weights have"
            raise ValueError(f"load_state_dict: {what}: use load_released_state_dict")
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def load_released_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state_dict of the authors' code, or of its nn.DataParallel (names begin with "module.").

        A checkpoint with a ``state_dict`` inside will do. Raises ValueError naming missing and unexpected
        keys and different shapes, before anything is copied.
        """
        state = unwrapped(state)
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            got = type(state).__name__
            raise ValueError(f"load_released_state_dict: expected tensors by name, got {got}")
        if state and all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        own = self.released_state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        problems = [f"missing {', '.join(missing)}"] if missing else []
        problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        for name in sorted(own.keys() & state.keys()):
            if not isinstance(state[name], torch.Tensor):
                problems.append(f"{name}: expected a tensor, got {type(state[name]).__name__}")
            elif own[name].shape != state[name].shape:
                problems.append(f"{name}: expected {tuple(own[name].shape)}, got {tuple(state[name].shape)}")
        if problems:
            raise ValueError("load_released_state_dict: " + "; ".join(problems))
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _original(blocks: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield blocks with their prefixes, a joined one as the layers that it was made of."""
    for prefix, block in blocks:
        yield from block.original() if isinstance(block, Joined) else [(prefix, block)]


def unwrapped(state: Any) -> Any:
    """Return the state_dict inside a training script's checkpoint; anything else as it is."""
    return state["state_dict"] if isinstance(state, Mapping) and "state_dict" in state else state


def assemble(
    found: Family, cuts: Sequence[split.Cut], local_loss: str | Callable[[Place], LocalLoss],
    lambdas: Sequence[float], *, net_config: str | None = None, widen: float = 1, feature_dim: int = 128,
    aux_depth: int | None = None, recompute: str = "none",
) -> LocalNetwork:
    """Return a network in local modules. cuts: checked, (stage, block). The others: as in `build`."""
    modules = len(cuts) + 1

    def make_loss(place: Place) -> LocalLoss:
        if callable(local_loss):
            return _made(local_loss, place)
        weights = interpolate_lambdas(lambdas, place.module, modules)
        if local_loss in WEIGHTED and weights == (0, 0):
            module = f"local module {place.module + 1} of {modules}"
            raise ValueError(f"build: lambdas: {tuple(lambdas)} leave {module} without any loss")
        nets: dict[str, Any] = {"net_config": net_config, "widen": widen, "feature_dim": feature_dim}
        return found.local_loss(local_loss, place, weights, **nets, aux_depth=aux_depth or AUX_DEPTH)

    units = found.units
    positions = [unit.position for unit in units]
    ends = [positions.index(cut) for cut in cuts]
    losses = [make_loss(place) for place in found.places(ends)]
    for i, (loss, end) in enumerate(zip(losses, ends)):
        loss.output, loss.input = units[end].features, units[ends[i - 1]].features if i else None
    starts = [0, *(end + 1 for end in ends), len(units)]
    losses.append(found.make_end(units[starts[-2] :]))
    blocks = [OrderedDict((unit.name, unit.block) for unit in units[a:b]) for a, b in zip(starts, starts[1:])]
    stages = [Stage(some, recompute, random=not found.cifar) for some in blocks]
    net = LocalNetwork(stages, losses, cuts, [unit.released_prefix for unit in units])
    made = net if found.ours else net.local_losses[:-1]
    backbones.initialize(made)
    # Convolutions follow their weights' memory format; they and batch norms are faster in this one, on the
    # CPU too. A user's own layers keep theirs.
    made.to(memory_format=torch.channels_last)
    return net


def _made(make: Callable[[Place], LocalLoss], place: Place) -> LocalLoss:
    """Return a user's own loss."""
    loss = make(place)
    if not isinstance(loss, LocalLoss):
        got = type(loss).__name__
        raise ValueError(f"build: local_loss: expected the function to return a LocalLoss, got {got}")
    return loss
