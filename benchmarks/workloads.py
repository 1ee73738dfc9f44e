"""Every method of every op as a workload: the same inputs, a forward, and the leaves its gradients are asked for.

Methods are what a user could choose from: eager; eager with the memory format that suits convolutions; torch.compile, keeping
what it likes or (memory budget 0) as little as it can; checkpoint; the nearest peer that exists; ours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import typing

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import baselines, shapes
from infopro_fast import ops

OURS = "ours"


@dataclasses.dataclass
class Workload:
    """forward() gives the loss; leaves: what gets a gradient; inputs: every tensor that is alive anyway."""

    forward: typing.Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    inputs: list[torch.Tensor]

    def both(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward: the loss and the gradients."""
        loss = self.forward()
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def forward_only(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (self.forward(),)


def compiled(function: typing.Callable, budget: float = 1.0) -> typing.Callable:
    """torch.compile; budget: share of the activations it may keep (0: recompute all it can)."""

    def forward(*args):
        return function(*args)

    # A code object of its own: the compiler's cache hangs on it, and would hand one budget's graph to the other.
    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = types.FunctionType(code, globals(), code.co_name, None, forward.__closure__)
    fast = torch.compile(own, fullgraph=True, dynamic=False)

    def call(*args):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return fast(*args)

    return call


_numbers = itertools.count()


def checkpointed(function: typing.Callable) -> typing.Callable:
    return lambda *args: checkpoint(function, *args, use_reentrant=False)


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------

DECODER_METHODS = (
    "eager", "channels_last", "compile", "compile channels_last", "compile budget 0", "compile reordered", "checkpoint", OURS,
)  # fmt: skip


def decoder(method: str, shape: shapes.DecoderShape, dtype: torch.dtype = torch.float32) -> Workload:
    torch.manual_seed(0)
    net = (baselines.ReorderedDecoder if method == "compile reordered" else baselines.ReleasedDecoder)(shape.C, shape.H, shape.K).to(dtype)
    features = draw(shape.N, shape.C, shape.h, shape.h, dtype=dtype)
    image = torch.sigmoid(draw(shape.N, 3, shape.H, shape.H, dtype=dtype))
    if method.endswith("channels_last"):
        net = net.to(memory_format=torch.channels_last)
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    calls = {
        "compile": lambda: compiled(net), "compile channels_last": lambda: compiled(net), "compile budget 0": lambda: compiled(net, 0.0),
        "compile reordered": lambda: compiled(net), "checkpoint": lambda: checkpointed(net),
        OURS: lambda: functools.partial(ops.reconstruction_loss, decoder=net.decoder, impl="cpu"),
        "reference": lambda: functools.partial(ops.reconstruction_loss, decoder=net.decoder, impl="reference"),
    }  # fmt: skip
    call = calls.get(method, lambda: net)()
    parameters = list(net.parameters())
    return Workload(lambda: call(features, image), [features, *parameters], [features, image, *parameters, *net.buffers()])


# ---------------------------------------------------------------------------------------------------------------------

SUPCON_METHODS = ("eager", "eager short", "compile", "compile short", "compile budget 0", "checkpoint", OURS)


def supcon(method: str, shape: shapes.SupConShape, dtype: torch.dtype = torch.float32) -> Workload:
    features = draw(shape.N, shape.D, dtype=dtype).requires_grad_()
    labels = torch.randint(shape.classes, (shape.N,), generator=torch.Generator().manual_seed(1))
    formula = baselines.short_supcon if method.endswith("short") else baselines.released_supcon
    calls = {
        "compile": lambda: compiled(formula), "compile short": lambda: compiled(formula), "checkpoint": lambda: checkpointed(formula),
        "compile budget 0": lambda: compiled(formula, 0.0),
        OURS: lambda: functools.partial(ops.supcon_loss, impl="cpu"),
        "reference": lambda: functools.partial(ops.supcon_loss, impl="reference"),
    }  # fmt: skip
    call = calls.get(method, lambda: formula)()
    return Workload(lambda: call(features, labels), [features], [features, labels])


# ---------------------------------------------------------------------------------------------------------------------

CHUNKED = "torch chunked"
LINEAR_METHODS = ("eager", "compile", "compile budget 0", "checkpoint", *([CHUNKED] if hasattr(F, "linear_cross_entropy") else []), OURS)


def linear(method: str, shape: shapes.LinearShape, dtype: torch.dtype = torch.float32) -> Workload:
    input = draw(shape.N, shape.D, dtype=dtype).requires_grad_()
    weight = (draw(shape.C, shape.D, dtype=dtype) / shape.D**0.5).requires_grad_()
    target = torch.randint(shape.C, (shape.N,), generator=torch.Generator().manual_seed(1))
    formula = baselines.cross_entropy
    calls = {
        "compile": lambda: compiled(formula), "compile budget 0": lambda: compiled(formula, 0.0),
        "checkpoint": lambda: checkpointed(formula),
        CHUNKED: lambda: functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()),
        OURS: lambda: functools.partial(ops.linear_cross_entropy, impl="cpu"),
        "reference": lambda: functools.partial(ops.linear_cross_entropy, impl="reference"),
    }  # fmt: skip
    call = calls.get(method, lambda: formula)()
    return Workload(lambda: call(input, weight, target), [input, weight], [input, weight, target])


# ---------------------------------------------------------------------------------------------------------------------

OPS = {
    "reconstruction_loss": (decoder, shapes.DecoderShape, DECODER_METHODS),
    "supcon_loss": (supcon, shapes.SupConShape, SUPCON_METHODS),
    "linear_cross_entropy": (linear, shapes.LinearShape, LINEAR_METHODS),
}


def label(shape: typing.NamedTuple) -> str:
    return " ".join(f"{name}{value}" for name, value in shape._asdict().items())


def for_peak(op: str, method: str, shape: list[int], small: list[int], direction: str = "both"):
    """Target of `memory.peak_bytes`: the call to measure and a small one to warm up with.

    Compiled methods run once at full size first: compiling is not part of the peak. (Their buffers are freed by then.)
    """
    make, kind, _ = OPS[op]
    workload, warm_up = make(method, kind(*shape)), make(method, kind(*small))
    call = workload.both if direction == "both" else workload.forward_only
    if method.startswith("compile"):
        call()
        return call, None
    return call, warm_up.both


@functools.lru_cache(maxsize=1)
def exact(op: str, shape: typing.NamedTuple) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in float64, of the last shape asked for."""
    return OPS[op][0]("reference", shape, torch.float64).both()


def relative_errors(op: str, workload: Workload, shape: typing.NamedTuple) -> float:
    """Largest over loss and gradients of |float32 - float64| / |float64|; a gradient that is exactly 0 is left out."""
    pairs = zip(workload.both(), exact(op, shape), strict=True)
    return max(((found.double() - e).norm() / e.norm()).item() for found, e in pairs if e.norm() > 1e-12)
