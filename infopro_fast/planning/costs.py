"""Bytes and seconds of a local module from any block to any other, added up from measurements of each block.

A step's memory rises and falls block by block, so sums of what blocks keep and need for a moment give a
module's highest point. Equal blocks or auxiliary networks at the same shape are measured once.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch import nn

from infopro_fast.modules import LocalLoss, LocalNetwork, Stage, Tap
from infopro_fast.modules.local_step import GradientOf, local_step

from .live import LiveBytes, nbytes, seconds


class BlockCost(typing.NamedTuple):
    """Bytes of one block without its input; seconds of forward and backward, or 0 where nothing ran.

    inner: kept for backward beside input and output. output: its map. forward: highest point of forward.
    backward: rise of backward above what is alive at its start: inner, output and the output's gradient.
    backward_last: the same where the output stays alive until the end, as a module's own output does.
    parameters: its parameters; their gradients take as much.
    """

    inner: int
    output: int
    forward: int
    backward: int
    backward_last: int
    parameters: int
    seconds: float = 0.0


class LossCost(typing.NamedTuple):
    """Bytes of a local loss without the features: kept at most, highest point, parameters; seconds.

    left: stays until the module's backward beside the gradient of its output: the gradient at a `Tap`.
    """

    saved: int
    peak: int
    parameters: int
    seconds: float = 0.0
    left: int = 0


class ChainCosts:
    """Costs of all contiguous modules of a network.

    blocks: in order. losses: of a module that ends with the block of this number; None: none can end there.
    image: bytes of the input. recompute: "block", or "none", also where "norm" is in what was measured.
    """

    def __init__(
        self, blocks: Sequence[BlockCost], losses: Sequence[LossCost | None], image: int, recompute="none"
    ):
        self.blocks, self.losses, self.image, self.recompute = tuple(blocks), tuple(losses), image, recompute

    def __len__(self) -> int:
        return len(self.blocks)

    def cut_allowed(self, end: int) -> bool:
        return self.losses[end] is not None

    def saved(self, start: int, end: int, count_image: bool = False) -> int:
        """Return the most bytes kept by a module of the blocks ``start`` to ``end``, both included."""
        given = self._given(start) if start or count_image else 0
        blocks = self.blocks[start : end + 1]
        outputs = sum(block.output for block in blocks)
        if self.recompute == "none":
            return given + outputs + sum(block.inner for block in blocks) + self.losses[end].saved
        loss, before = self.losses[end].saved, 0
        found = given + outputs + loss - blocks[-1].output * (loss == 0)
        for block in blocks:  # while it is recomputed: the inputs up to it, and its own maps
            found = max(found, given + before + block.inner + block.output)
            before += block.output
        return found

    def peak(self, start: int, end: int) -> int:
        """Return the highest point of its step above parameters, optimizer state and the batch."""
        blocks, loss = self.blocks[start : end + 1], self.losses[end]
        given = self._given(start) if start else 0
        kept = [block.output + (block.inner if self.recompute == "none" else 0) for block in blocks]
        found, before = 0, given
        for block, own in zip(blocks, kept):
            found = max(found, before + block.forward)
            before += own
        found = max(found, before + loss.peak)
        gradients = loss.parameters + loss.left
        result = blocks[-1].output  # the module's output outlives its backward
        for i in range(len(blocks) - 1, -1, -1):
            block, last = blocks[i], i == len(blocks) - 1
            before -= kept[i]
            alive = before + gradients + block.output  # the gradient of its output
            again = 0 if self.recompute == "none" else alive + result + block.forward
            if last and self.recompute == "none":
                rise = block.inner + block.output + block.backward_last
            else:
                rise = block.inner + block.output + result + block.backward
            found = max(found, alive + rise, again)
            gradients += block.parameters
        return found

    def seconds(self, start: int, end: int) -> float:
        return sum(block.seconds for block in self.blocks[start : end + 1]) + self.losses[end].seconds

    def _given(self, start: int) -> int:
        return self.blocks[start - 1].output if start else self.image


def measure_chain(
    net: LocalNetwork, image: torch.Tensor, label: torch.Tensor, *, recompute="none", timed=False
) -> ChainCosts:
    """Measure every block and loss of ``net``, a `chains.Chain`; under a `FakeTensorMode` nothing runs.

    timed: also measure seconds of forward and backward, the best of 3; needs real tensors.
    """
    net.train()
    blocks: list[BlockCost] = []
    losses: list[LossCost | None] = []
    known: dict[object, typing.Any] = {}
    h, batch, tapped = image, (image, label), None
    for stage, local_loss in zip(net.stages, net.local_losses):
        key: tuple = (_signature(stage), h.shape, len(blocks) > 0)
        if key not in known:
            known[key] = _measure_block(stage, h, first=not blocks, timed=timed)
        cost, h = known[key]
        blocks.append(cost)
        tapped = next(((block, h) for block in stage if isinstance(block, Tap)), tapped)
        key = (_signature(local_loss), h.shape)
        if key not in known:
            cut = not isinstance(local_loss, NoCut)
            known[key] = _measure_loss(local_loss, h, *batch, tapped, timed) if cut else None
        losses.append(known[key])
    return ChainCosts(blocks, losses, nbytes([image]), "block" if recompute == "block" else "none")


def _signature(module: nn.Module) -> str:
    """Return a text that is equal for modules that compute alike: classes, settings and shapes of tensors."""
    simple = (int, float, str, tuple)  # as attributes: a window's size, a graph's code
    return repr([
        (name, type(m), [(k, v) for k, v in sorted(vars(m).items()) if isinstance(v, simple)],
         [(tuple(t.shape), t.dtype) for t in (*m.parameters(False), *m.buffers(False))])
        for name, m in module.named_modules()
    ])  # fmt: skip


class NoCut(LocalLoss):
    """Stands for a loss where no module can end."""


def _measure_block(stage: Stage, x: torch.Tensor, first: bool, timed: bool) -> tuple[BlockCost, torch.Tensor]:
    x = x.detach().requires_grad_(not first)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    kept, forward, backward, result = _block_bytes(stage, x, parameters, outlived=False)
    *_, backward_last, _ = _block_bytes(stage, x, parameters, outlived=True)
    output = result.untyped_storage().nbytes()
    seconds = _best_of_three(lambda: _run_block(stage, x, result, parameters)) if timed else 0.0
    size = nbytes(parameters)
    return BlockCost(kept - output, output, forward, backward, backward_last, size, seconds), result


def _block_bytes(
    stage: Stage, x: torch.Tensor, parameters: Sequence[torch.Tensor], outlived: bool
) -> tuple[int, int, int, torch.Tensor]:
    """Return bytes kept with the output, at forward's highest point, of backward's rise; a like output.

    outlived: the output stays alive until the end of backward.
    """
    live = LiveBytes([*stage.parameters(), *stage.buffers(), x])
    with live:
        out = stage(x)
        forward, result = live.peak.total, torch.empty_like(out, requires_grad=False)
        kept = live.now.total - result.untyped_storage().nbytes()
        live.hold("loaded", [result])
        grad = [torch.empty_like(result)]
        target = GradientOf.apply(out, grad)
        alive = out.detach() if outlived else None
        del out
        before = live.now.total
        live.reset()
        torch.autograd.grad(target, [*parameters, *([x] if x.requires_grad else [])])
        backward = max(0, live.peak.total - before)
        del alive
    return kept, forward, backward, result


def _run_block(stage, x, grad, parameters):
    torch.autograd.grad(GradientOf.apply(stage(x), [grad]), [*parameters, *([x] if x.requires_grad else [])])


def _measure_loss(
    local_loss: LocalLoss, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor,
    tapped: tuple[Tap, torch.Tensor] | None, timed: bool,
) -> LossCost:
    """Measure a step of a loss alone. tapped: the last tap before it, which a head may read, and its map."""
    h = h.detach().requires_grad_()
    parameters = local_loss.trained_parameters()
    no_optimizer = typing.cast(torch.optim.Optimizer, _NoOptimizer(parameters))

    def run() -> None:
        if tapped is not None:
            tap, at = tapped
            tap(at)
        local_step(nn.Identity(), local_loss, no_optimizer, h, image, label)
        h.grad = None

    loaded = [*local_loss.parameters(), *local_loss.buffers(), h, image, label, *(tapped or ())[1:]]
    live = LiveBytes(loaded)
    with live:
        run()
        left = live.now.total
    seconds = _best_of_three(run) if timed else 0.0
    return LossCost(live.most_saved, live.peak.total, nbytes(parameters), seconds, left)


class _NoOptimizer:
    """Frees gradients and changes no parameter."""

    def __init__(self, parameters):
        self._parameters = parameters

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None


def _best_of_three(call: Callable[[], object]) -> float:
    call()
    return min(seconds(call) for _ in range(3))
