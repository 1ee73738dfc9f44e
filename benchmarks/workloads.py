"""Every method of every op as a workload: the same inputs, a forward, and the leaves that get gradients.

A user could choose each of the methods: eager; eager in channels_last; torch.compile, which keeps what it
likes or, with a memory budget of 0, as little as it can; checkpoint; the nearest peer that exists; ours.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import types
import typing

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import baselines, shapes
from infopro_fast import ops
from infopro_fast.modules import ChainDecoder, Decoder
from infopro_fast.planning import released

OURS = "ours"
TRITON, CUDA = "ours triton", "ours cuda"  # one implementation by name, on a GPU
TUNED = "compile max-autotune"


@dataclasses.dataclass
class Workload:
    """forward: returns the loss. leaves: what gets a gradient. inputs: every tensor that is alive anyway."""

    forward: typing.Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    inputs: list[torch.Tensor]

    def both(self) -> tuple[torch.Tensor, ...]:
        """Return the loss and the gradients."""
        loss = self.forward()
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def forward_only(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (self.forward(),)


def compiled(function: typing.Callable, budget: float = 1.0, mode: str | None = None) -> typing.Callable:
    """``function`` through torch.compile. budget: share of the activations that it may keep.

    With mode "max-autotune" a GPU runs CUDA graphs: the next call writes over a call's results.
    """

    def forward(*args):
        return function(*args)

    # Each needs its own code object: the compiler caches by it, and would mix the budgets' graphs.
    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = types.FunctionType(code, globals(), code.co_name, None, forward.__closure__)
    fast = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)

    def call(*args):
        if mode == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return fast(*args)

    return call


_numbers = itertools.count()


def checkpointed(function: typing.Callable) -> typing.Callable:
    return lambda *args: checkpoint(function, *args, use_reentrant=False)


def draw(*shape: int, dtype=torch.float32, device: str = "cpu") -> torch.Tensor:
    """Draw the same numbers for every dtype, on ``device``, since copying large batches takes seconds."""
    numbers = torch.float64 if device == "cpu" else torch.float32  # float32 saves memory on a GPU
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=numbers, device=device).to(dtype)


def labels(N: int, classes: int, device: str) -> torch.Tensor:
    return torch.randint(classes, (N,), generator=torch.Generator(device).manual_seed(1), device=device)


def ours(op: typing.Callable, device: str, **options) -> dict[str, typing.Callable[[], typing.Callable]]:
    """Return makers of the op on this device, by each implementation's name, and of the reference."""
    own = "cpu" if device == "cpu" else "auto"
    fused = {OURS: own, TRITON: "triton", CUDA: "cuda", "reference": "reference"}
    made = {name: functools.partial(op, impl=impl, **options) for name, impl in fused.items()}
    return {name: lambda call=call: call for name, call in made.items()}


# Other packages with one of these losses for GPUs: module and attribute.
PEERS = {
    "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "memeff": ("memeff", "MemoryEfficientCLIPLoss"),
}
OTHER_LOSS = {"memeff": "another loss: two views, of which each row has one positive"}  # the nearest


def peer(name: str) -> typing.Callable:
    module, attribute = PEERS[name]
    return getattr(importlib.import_module(module), attribute)


def missing(name: str) -> str:
    """Why the peer cannot be used, "" if it can."""
    if importlib.util.find_spec(PEERS[name][0].partition(".")[0]) is None:
        return "not installed"
    try:
        peer(name)
    except Exception as error:  # a peer that is too old for this torch or Triton must not end a report
        return f"installed, and does not import: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def compile_methods(function: typing.Callable) -> dict[str, typing.Callable[[], typing.Callable]]:
    return {
        "compile": lambda: compiled(function),
        "compile channels_last": lambda: compiled(function),
        "compile budget 0": lambda: compiled(function, 0.0),
        TUNED: lambda: compiled(function, mode="max-autotune"),
        "checkpoint": lambda: checkpointed(function),
    }


def runner(method: str, formula: typing.Callable, op: typing.Callable, device: str, more=(), **options):
    """Return what ``method`` calls: the op, or the formula, as it is where the name asks for nothing else.

    more: makers of further methods by name. options: of the op.
    """
    calls = compile_methods(formula) | dict(more) | ours(op, device, **options)
    return calls.get(method, lambda: formula)()


def laid_out(method: str, x):
    """Return a tensor or a module in the memory format that the method's name asks for."""
    return x.to(memory_format=torch.channels_last) if method.endswith("channels_last") else x


# ------------------------------------------------------------------------------------------------------------

MAP_METHODS = (
    "eager", "channels_last", "compile", "compile channels_last", "compile budget 0", "checkpoint", OURS,
)
DECODER_METHODS = (*MAP_METHODS[:-2], "compile reordered", *MAP_METHODS[-2:])


def decoder(method: str, shape: shapes.DecoderShape, dtype=torch.float32, device="cpu") -> Workload:
    torch.manual_seed(0)
    kind = baselines.ReorderedDecoder if method == "compile reordered" else released.ReleasedDecoder
    net = kind(Decoder(shape.C, shape.H, widen=shape.K / 12).decoder, shape.H).to(device, dtype)
    return _reconstruction(method, net, shape, shape.H, dtype, device)


CHAIN_METHODS = MAP_METHODS


def chain_decoder(method: str, shape: shapes.ChainShape, dtype=torch.float32, device="cpu") -> Workload:
    torch.manual_seed(0)
    layers = ChainDecoder(shape.C, (shape.h, shape.h), (8 * shape.h, 8 * shape.h)).decoder
    net = released.ReleasedDecoder(layers).to(device, dtype)
    return _reconstruction(method, net, shape, 8 * shape.h, dtype, device)


def _reconstruction(method: str, net: released.ReleasedDecoder, shape, H: int, dtype, device) -> Workload:
    """``net`` from features of ``shape`` to images of side ``H``."""
    features = draw(shape.N, shape.C, shape.h, shape.h, dtype=dtype, device=device)
    image = torch.sigmoid(draw(shape.N, 3, H, H, dtype=dtype, device=device))
    net, features = laid_out(method, net), laid_out(method, features).requires_grad_()
    reordered = {"compile reordered": lambda: compiled(net)}
    call = runner(method, net, ops.reconstruction_loss, device, reordered, decoder=net.decoder)
    leaves = [features, *net.parameters()]
    return Workload(lambda: call(features, image), leaves, [*leaves, image, *net.buffers()])


UPSAMPLE_CONV_METHODS = ("eager", "channels_last", "compile", "compile channels_last", "checkpoint", OURS)


def upsample_conv(
    method: str, shape: shapes.UpsampleConvShape, dtype=torch.float32, device="cpu"
) -> Workload:
    x = draw(shape.N, shape.C, shape.h, shape.h, dtype=dtype, device=device)
    weight = draw(shape.K, shape.C, 3, 3, dtype=dtype, device=device) / (9 * shape.C) ** 0.5
    bias = draw(shape.K, dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in (laid_out(method, x), laid_out(method, weight), bias)]
    call = runner(method, baselines.upsample_conv, ops.upsample_conv3x3, device, size=2 * shape.h)
    # The mean of squares stands for what follows.
    return Workload(lambda: call(*leaves).square().mean(), leaves, leaves)


# ------------------------------------------------------------------------------------------------------------

SUPCON_METHODS = ("eager", "eager short", "compile", "compile short", "compile budget 0", "checkpoint", OURS)


def supcon(method: str, shape: shapes.SupConShape, dtype=torch.float32, device="cpu") -> Workload:
    features = draw(shape.N, shape.D, dtype=dtype, device=device).requires_grad_()
    label = labels(shape.N, shape.classes, device)
    if method == "memeff":
        loss = peer(method)(temperature=0.07, stable=False)
        other = features.detach().roll(1, 0).requires_grad_()
        return Workload(lambda: loss(features, other), [features, other], [features, other])
    formula = baselines.short_supcon if method.endswith("short") else released.released_supcon
    short = {"compile short": lambda: compiled(formula)}
    call = runner(method, formula, ops.supcon_loss, device, short)
    return Workload(lambda: call(features, label), [features], [features, label])


# ------------------------------------------------------------------------------------------------------------

CHUNKED = "torch chunked"
_CHUNKED = (CHUNKED,) if hasattr(F, "linear_cross_entropy") else ()
LINEAR_METHODS = ("eager", "compile", "compile budget 0", "checkpoint", *_CHUNKED, OURS)


def linear(method: str, shape: shapes.LinearShape, dtype=torch.float32, device="cpu") -> Workload:
    input = draw(shape.N, shape.D, dtype=dtype, device=device).requires_grad_()
    weight = (draw(shape.C, shape.D, dtype=dtype, device=device) / shape.D**0.5).requires_grad_()
    target = labels(shape.N, shape.C, device)

    def chunked() -> typing.Callable:
        return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())

    others = {name: functools.partial(peer, name) for name in ("Liger", "cut-cross-entropy")}
    others[CHUNKED] = chunked
    call = runner(method, baselines.cross_entropy, ops.linear_cross_entropy, device, others)
    return Workload(lambda: call(input, weight, target), [input, weight], [input, weight, target])


# ------------------------------------------------------------------------------------------------------------

DENSE_METHODS = MAP_METHODS


def dense(method: str, shape: shapes.DenseShape, dtype=torch.float32, device="cpu") -> Workload:
    logits = draw(shape.N, shape.C, shape.h, shape.w, dtype=dtype, device=device)
    logits = laid_out(method, logits).requires_grad_()
    target = labels(shape.N * shape.H * shape.W, shape.C, device).view(shape.N, shape.H, shape.W)
    target[:, ::8] = 255
    options = dict(align_corners=True, ignore_index=255)
    call = runner(method, released.resized_cross_entropy, ops.upsample_cross_entropy, device, **options)
    return Workload(lambda: call(logits, target), [logits], [logits, target])


# ------------------------------------------------------------------------------------------------------------

POOL_METHODS = MAP_METHODS


def pool(method: str, shape: shapes.PoolShape, dtype=torch.float32, device="cpu") -> Workload:
    bn = torch.nn.BatchNorm2d(shape.C).to(device, dtype)
    x = draw(shape.N, shape.C, shape.h, shape.h, dtype=dtype, device=device)
    x = laid_out(method, x).requires_grad_()
    call = runner(method, baselines.norm_relu_pool, ops.norm_relu_pool, device)
    leaves = [x, *bn.parameters()]
    return Workload(lambda: call(x, bn).square().mean(), leaves, [*leaves, *bn.buffers()])


def head(method: str, shape: shapes.HeadShape, dtype=torch.float32, device="cpu") -> Workload:
    """`pool` behind the convolution of an auxiliary head."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(shape.C, shape.K, 3, stride=shape.stride, padding=1, bias=False).to(device, dtype)
    bn = torch.nn.BatchNorm2d(shape.K).to(device, dtype)
    x = draw(shape.N, shape.C, shape.h, shape.h, dtype=dtype, device=device)
    x, conv = laid_out(method, x).requires_grad_(), laid_out(method, conv)

    def fused(x, conv, bn, impl):
        return ops.norm_relu_pool(x, bn, conv=conv, impl=impl)

    call = runner(method, baselines.conv_norm_relu_pool, fused, device)
    leaves = [x, conv.weight, *bn.parameters()]
    return Workload(lambda: call(x, conv, bn).square().mean(), leaves, [*leaves, *bn.buffers()])


# ------------------------------------------------------------------------------------------------------------

OPS = {
    "reconstruction_loss": (decoder, shapes.DecoderShape, DECODER_METHODS),
    "chain_decoder": (chain_decoder, shapes.ChainShape, CHAIN_METHODS),
    "upsample_conv3x3": (upsample_conv, shapes.UpsampleConvShape, UPSAMPLE_CONV_METHODS),
    "supcon_loss": (supcon, shapes.SupConShape, SUPCON_METHODS),
    "linear_cross_entropy": (linear, shapes.LinearShape, LINEAR_METHODS),
    "upsample_cross_entropy": (dense, shapes.DenseShape, DENSE_METHODS),
    "norm_relu_pool": (pool, shapes.PoolShape, POOL_METHODS),
    "conv_norm_relu_pool": (head, shapes.HeadShape, POOL_METHODS),
}


def label(shape: typing.NamedTuple) -> str:
    return " ".join(f"{name}{value}" for name, value in shape._asdict().items())


def for_peak(op: str, method: str, shape: list[int], small: list[int], direction: str = "both"):
    """Target of `memory.peak_bytes`: return the call to measure and a small one to warm up with.

    Compiled methods run once at full size first, so that compiling is not part of the peak.
    """
    make, kind, _ = OPS[op]
    workload, warm_up = make(method, kind(*shape)), make(method, kind(*small))
    call = workload.both if direction == "both" else workload.forward_only
    if method.startswith("compile"):
        call()
        return call, None
    return call, warm_up.both


@functools.lru_cache(maxsize=1)
def exact(op: str, shape: typing.NamedTuple, device: str) -> tuple[torch.Tensor, ...]:
    """Return loss and gradients in float64; the last shape's are kept."""
    return OPS[op][0]("reference", shape, torch.float64, device).both()


def relative_errors(op: str, workload: Workload, shape: typing.NamedTuple) -> float:
    """Return the largest |float32 - float64| / |float64| over loss and gradients that are not exactly 0."""
    pairs = zip(workload.both(), exact(op, shape, workload.inputs[0].device.type), strict=True)
    return max(((found.double() - e).norm() / e.norm()).item() for found, e in pairs if e.norm() > 1e-12)
