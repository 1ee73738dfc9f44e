"""Decoders that are a chain of convolutions, as in the released ImageNet and Cityscapes code, for `reconstruction_loss`.

A stage takes the previous stage's map z as it is in front of its batch norm, and makes the next one:

    a = relu(batch_norm(z_prev))      (N, C, h, w), or the features
    z = conv(resize(a)) + bias        (N, K, H, W), with the mean and variance of each channel

and the last stage, to 3 channels, makes the loss. Layer by layer, torch keeps z, its normalised and its rectified map, the resized
map and the rest for backward; here autograd keeps the z and their statistics alone. Neither a nor resize(a) is ever whole, nor are
the logits: conv(resize(a)) is resize and shift of 1x1 convolutions of a, one product of matrices at the size of a.

On the CPU all of that happens within a stage's kernel (`csrc/cpu/chain_stage.h`). On a GPU stages of few channels, the last above all, have
CUDA C++ kernels, which do it tile by tile in shared memory (`csrc/cuda/chain_stage_block.cuh`). Others, and 1x1 convolutions, are products of matrices
above all else, best left to cuBLAS, chunk by chunk of samples (`triton_kernels.chain_stage`), whichever of "cuda" and "triton" is asked for. Where
the last stage is Triton's, too (`triton_kernels.chain_loss`), the logits exist while it runs.

Each stage is an opaque op, in both directions, so that the statistics of a SyncBatchNorm, and the sums its gradient needs, are
added up across processes between them.
"""

from __future__ import annotations

import math
import typing

import torch
from torch import nn

from . import dispatch
from .batch_norm import (
    affine,
    merged_statistics,
    summed_across,
    sync_group,
    update_running_statistics,
    uses_batch_statistics,
)
from .dispatch import compute_dtype, define_kernels, first_order

OP = "reconstruction_loss"
RESIZES = ("corners", "nearest", "centers")  # bilinear with align_corners=True; nearest; bilinear with align_corners=False
FORM = (
    "nn.Sequential of any number of (Conv2d 1x1 or 3x3, BatchNorm2d or SyncBatchNorm, ReLU, and an Upsample or none), "
    "then Conv2d 3x3 to 3 channels, Sigmoid"
)
CONVOLUTION = "a 1x1 or 3x3 convolution, stride 1, with the zero padding that keeps the size"
LAST_CONVOLUTION = "a 3x3 convolution to 3 channels, stride 1, zero padding 1"


class ChainStage(typing.NamedTuple):
    """Resize, convolution, batch norm and ReLU; the last stage has neither batch norm nor ReLU."""

    upsample: nn.Upsample | None
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None


class Resize(typing.NamedTuple):
    """Size (H, W) of a stage's output, `mode` an index into RESIZES, `factors` the scale factors (2 or none) that samples are placed by."""

    H: int
    W: int
    mode: int
    factors: tuple[float, ...]


# ---------------------------------------------------------------------------------------------------------------------
# The layers


def decoder_stages(decoder: nn.Sequential) -> tuple[ChainStage, ...]:
    """The stages of a decoder; ValueError names the layer that does not fit."""
    if not isinstance(decoder, nn.Sequential) or len(decoder) < 2:
        got = f"{type(decoder).__name__} of {len(decoder)}" if isinstance(decoder, nn.Sequential) else type(decoder).__name__
        raise ValueError(f"{OP}: decoder: expected {FORM}, got {got}")
    layers = list(decoder)  # not children(): a layer without parameters may stand in two places
    stages: list[ChainStage] = []
    at = 0

    def take(*kinds: type) -> nn.Module:
        nonlocal at
        layer = layers[at] if at < len(layers) else None
        kind = next((k for k in kinds if isinstance(layer, k)), None)
        if kind is None:
            names = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{OP}: decoder[{at}]: expected {names}, got {layer or 'the end'}; a decoder is {FORM}")
        if type(layer).forward is not kind.forward or layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(f"{OP}: decoder[{at}]: expected {kind.__name__}'s own forward without hooks, which would not run, got {layer}")
        at += 1
        return layer

    while True:
        upsample = _check_upsample(take(nn.Upsample), at - 1) if at < len(layers) and isinstance(layers[at], nn.Upsample) else None
        conv, place = take(nn.Conv2d), at - 1
        last = at == len(layers) - 1 and isinstance(layers[at], nn.Sigmoid)
        _check_convolution(conv, place, last, stages[-1].conv.out_channels if stages else conv.in_channels)
        if last:
            take(nn.Sigmoid)
            return (*stages, ChainStage(upsample, conv, None))
        norm = take(nn.BatchNorm2d, nn.SyncBatchNorm)
        if norm.num_features != conv.out_channels:
            raise ValueError(f"{OP}: decoder[{at - 1}]: expected {conv.out_channels} features, as decoder[{place}] gives, got {norm}")
        take(nn.ReLU)
        stages.append(ChainStage(upsample, conv, norm))


def _check_convolution(conv: nn.Conv2d, place: int, last: bool, inputs: int) -> None:
    padding = {(3, 3): ((1, 1), "same"), (1, 1): ((0, 0), "same", "valid")}.get(conv.kernel_size, ())
    plain = conv.padding in padding and conv.padding_mode == "zeros" and conv.stride == (1, 1) and conv.groups == 1
    if not plain or conv.dilation != (1, 1) or (last and (conv.kernel_size != (3, 3) or conv.out_channels != 3)):
        raise ValueError(f"{OP}: decoder[{place}]: expected {LAST_CONVOLUTION if last else CONVOLUTION}, got {conv}")
    if conv.in_channels != inputs:
        raise ValueError(f"{OP}: decoder[{place}]: expected {inputs} input channels, as the convolution before gives, got {conv}")


def _check_upsample(upsample: nn.Upsample, place: int) -> nn.Upsample:
    if upsample.mode not in ("bilinear", "nearest"):
        raise ValueError(f"{OP}: decoder[{place}]: expected mode 'bilinear' or 'nearest', got {upsample}")
    return upsample


def resizes(stages: tuple[ChainStage, ...], features: torch.Tensor, image: torch.Tensor, interpolate_mode: str) -> tuple[Resize, ...]:
    """The size of each stage's output. A decoder without any Upsample takes features that are resized to the image's size first."""
    H, W = features.shape[2:]
    alone = all(stage.upsample is None for stage in stages)
    found = []
    for i, stage in enumerate(stages):
        mode, factors = 0, ()
        if alone and i == 0:
            H, W, mode = image.shape[2], image.shape[3], 0 if interpolate_mode == "bilinear" else 1
        elif stage.upsample is not None:
            H, W, mode, factors = _resized(stage.upsample, H, W)
        found.append(Resize(H, W, mode, factors))
    if (H, W) != tuple(image.shape[2:]):
        raise ValueError(
            f"{OP}: image: expected ({features.shape[0]}, 3, {H}, {W}), which the decoder makes of features {tuple(features.shape)}, "
            f"got {tuple(image.shape)}"
        )
    return tuple(found)


def _resized(upsample: nn.Upsample, h: int, w: int) -> Resize:
    mode = 1 if upsample.mode == "nearest" else 0 if upsample.align_corners else 2
    pair = lambda value: tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # noqa: E731
    if upsample.size is not None:
        return Resize(*(int(n) for n in pair(upsample.size)), mode, ())
    factors = tuple(float(f) for f in pair(upsample.scale_factor))
    H, W = math.floor(h * factors[0]), math.floor(w * factors[1])
    return Resize(H, W, mode, () if upsample.recompute_scale_factor else factors)


def fits(h: int, w: int, H: int, W: int) -> bool:
    """Whether the fractions of a resize from (h, w) to (H, W) stay below 2^31, which Triton kernels count in."""
    return max((2 * H + 1) * h, (2 * W + 1) * w) < 2**31


def triton_limitation(sizes: tuple[Resize, ...], h: int, w: int) -> str | None:
    """Why Triton kernels cannot take features of size (h, w) through these resizes, None if they can."""
    for H, W, mode, factors in sizes:
        if factors and mode != 0 and (H, W) != (h * factors[0], w * factors[1]):
            return f"an Upsample by {factors} makes maps of ({h}, {w}) no whole size, which kernels for the CPU alone take"
        if not fits(h, w, H, W) or H * W >= 2**31:
            return f"an Upsample of ({h}, {w}) to ({H}, {W}) needs more than 32 bits to count in"
        h, w = H, W
    return None


# As csrc/cuda/chain_stage_plan.cuh has them: channels of a stage's input and output, beyond which its products of matrices are most of the work (and
# done again where tiles meet, in float32 alone), and what any GPU's shared memory holds.
MOST_CHANNELS, MOST_OUTPUTS, MOST_ENLARGED = 64, 16, 16


def _cuda_stage_limitation(stage: ChainStage, size: Resize, N: int, h: int, w: int) -> str | None:
    """Why the CUDA C++ kernels cannot run a stage, on features of size (h, w), None if they can."""
    (H, W), conv = size[:2], stage.conv
    if conv.kernel_size != (3, 3):
        return "a 1x1 convolution is left to cuBLAS"
    if conv.in_channels > MOST_CHANNELS or conv.out_channels > MOST_OUTPUTS:
        most = f"{MOST_CHANNELS} and {MOST_OUTPUTS}"
        return f"a convolution has {conv.in_channels} input and {conv.out_channels} output channels, the CUDA C++ kernels take {most}"
    if not (h <= H <= MOST_ENLARGED * h and w <= W <= MOST_ENLARGED * w):
        return f"maps of ({h}, {w}) become ({H}, {W}); the CUDA C++ kernels enlarge 1 to {MOST_ENLARGED} times"
    return "maps have 2^31 pixels or more" if N * H * W >= 2**31 else None


def cuda_limitation(stages: tuple[ChainStage, ...], sizes: tuple[Resize, ...], features: torch.Tensor) -> str | None:
    """Why impl="cuda" cannot run these stages: Triton's kernels run those in front of the last that the CUDA C++ ones do not take."""
    N, _, h, w = features.shape
    for stage, size in zip(stages, sizes, strict=True):
        reason = _cuda_stage_limitation(stage, size, N, h, w)
        if reason is not None and stage is stages[-1]:
            return f"the last stage: {reason}"
        if reason is not None:
            missing = dispatch.missing(OP, "triton", features.device) or triton_limitation((size,), h, w)
            if missing is not None:
                return f"an earlier stage has Triton kernels alone ({reason}): {missing}"
        h, w = size[:2]
    return None


def _implementations(impl: str, stages: tuple[ChainStage, ...], sizes: tuple[Resize, ...], features: torch.Tensor) -> tuple[str, ...]:
    """What runs each stage."""
    if impl != "cuda":
        return (impl,) * len(stages)
    inputs = [features.shape[2:], *(size[:2] for size in sizes[:-1])]
    limits = [_cuda_stage_limitation(*of, features.shape[0], *own) for *of, own in zip(stages, sizes, inputs, strict=True)]
    return tuple("cuda" if limit is None else "triton" for limit in limits)


# ---------------------------------------------------------------------------------------------------------------------
# The opaque ops


def _stage_forward_fake(x, mean, var, gamma, beta, eps, weight, bias, H, W, mode, factors, in_f64):
    K, dtype = weight.shape[0], torch.float64 if in_f64 else torch.float32
    return x.new_empty((x.shape[0], K, H, W), dtype=dtype), x.new_empty((2, K), dtype=dtype)


def _gradients_fake(x, mean, weight, dtype, needs_x, needs_weight):
    g_x = torch.empty_like(x) if mean is None else x.new_empty(x.shape, dtype=dtype)
    return (
        g_x if needs_x else x.new_empty((0,)), x.new_empty((2, x.shape[1]), dtype=dtype),
        x.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
    )  # fmt: skip


def _stage_backward_fake(
    dy, z, z_mean, z_var, z_gamma, z_eps, mean_dy, x, mean, var, gamma, beta, eps, weight, mode, factors, needs_x, needs_weight
):
    return _gradients_fake(x, mean, weight, dy.dtype, needs_x, needs_weight)


def _loss_forward_fake(x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, in_f64):
    return x.new_empty((), dtype=torch.float64 if in_f64 else torch.float32)


def _loss_backward_fake(
    grad, x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, needs_x, needs_weight
):  # fmt: skip
    return *_gradients_fake(x, mean, weight, grad.dtype, needs_x, needs_weight), x.new_empty((3,), dtype=grad.dtype)


# x is normalised by (mean, var, gamma, beta, eps) and rectified where there is a mean; it is then a stage's own map.
_NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps"
_STAGE_FORWARD = define_kernels(
    f"chain_stage_forward(Tensor x, {_NORM}, Tensor weight, Tensor? bias, int H, int W, int mode, float[] factors, bool in_f64) "
    "-> (Tensor z, Tensor statistics)",
    _stage_forward_fake,
    cuda=True,
)
_STAGE_BACKWARD = define_kernels(
    "chain_stage_backward(Tensor dy, Tensor z, Tensor z_mean, Tensor z_var, Tensor? z_gamma, float z_eps, Tensor? mean_dy, "
    f"Tensor x, {_NORM}, Tensor weight, int mode, float[] factors, bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _stage_backward_fake,
    cuda=True,
)
_LOSS_FORWARD = define_kernels(
    f"chain_loss_forward(Tensor x, {_NORM}, Tensor weight, Tensor? bias, Tensor image, float[] restore, int mode, float[] factors, "
    "int loss, bool in_f64) -> Tensor",
    _loss_forward_fake,
    cuda=True,
)
_LOSS_BACKWARD = define_kernels(
    f"chain_loss_backward(Tensor grad, Tensor x, {_NORM}, Tensor weight, Tensor? bias, Tensor image, float[] restore, int mode, "
    "float[] factors, int loss, bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_backward_fake,
    cuda=True,
)


# ---------------------------------------------------------------------------------------------------------------------
# Stage by stage

PER_STAGE = 6  # tensors of a stage: weight, bias, gamma, beta, running mean, running variance


class _Plan(typing.NamedTuple):
    """What is not a tensor: each stage's resize and eps, whether it takes the batch's statistics, its process group; the loss; what
    runs each stage."""

    resizes: tuple[Resize, ...]
    eps: tuple[float, ...]
    batch_statistics: tuple[bool, ...]
    groups: tuple
    restore: tuple[float, ...]
    loss: int
    impls: tuple[str, ...]


def _arguments(resize: Resize) -> tuple:
    H, W, mode, factors = resize
    return H, W, mode, list(factors)


def _split(tensors: typing.Sequence) -> list:
    return [tensors[i : i + PER_STAGE] for i in range(0, len(tensors), PER_STAGE)]


NO_NORM = (None, None, None, None, 0.0)


class _ChainLoss(torch.autograd.Function):
    """Gives the loss; the mean and the variance of each normalised stage; the counts of those whose statistics are of several processes."""

    @staticmethod
    def forward(ctx, plan, features, image, *parameters):
        plan = _Plan(*plan)
        *stages, last = _split(parameters)
        in_f64 = compute_dtype(features, image, parameters[0]) == torch.float64
        x, norm, maps, statistics, counts = features, NO_NORM, [], [], []
        for (weight, bias, gamma, beta, *running), resize, eps, of_batch, group, impl in zip(stages, *plan[:4], plan.impls, strict=False):
            x, found = _STAGE_FORWARD[impl](x, *norm, weight, bias, *_arguments(resize), in_f64)
            count = x.shape[0] * x.shape[2] * x.shape[3]
            if not of_batch:
                found = torch.stack([t.to(x.dtype) for t in running])
            elif group is not None:
                found, count = merged_statistics(found, count, group)
            norm = (*found.unbind(0), gamma, beta, eps)
            maps.append(x)
            statistics.append(found)
            counts.append(count)
        restore, loss = list(plan.restore), plan.loss
        value = _LOSS_FORWARD[plan.impls[-1]](x, *norm, *last[:2], image, restore, *_arguments(plan.resizes[-1])[2:], loss, in_f64)
        ctx.save_for_backward(features, image, *parameters, *maps, *statistics)
        ctx.plan = plan
        ctx.counts = counts
        moved = [t.clone() for found in statistics for t in found.unbind(0)] + [c.clone() for c in counts if isinstance(c, torch.Tensor)]
        ctx.mark_non_differentiable(*moved)
        return value, *moved

    @staticmethod
    def backward(ctx, grad, *_):
        features, _, *rest = ctx.saved_tensors
        parameters = rest[: len(ctx.plan.resizes) * PER_STAGE]
        with torch.no_grad():
            found = _gradients(ctx, grad)
        return first_order(OP, (features, *parameters, grad), found)


def _gradients(ctx, grad):
    """What `_ChainLoss.backward` returns, one for each argument of its forward."""
    plan = ctx.plan
    features, image, *rest = ctx.saved_tensors
    number = len(plan.resizes)
    *stages, last = _split(rest[: number * PER_STAGE])
    kept = rest[number * PER_STAGE :]
    maps, statistics = kept[: number - 1], kept[number - 1 :]
    needs = ctx.needs_input_grad
    needs_features, needed = needs[1], _split(needs[3:])
    inputs = [features, *maps]
    norms = [NO_NORM, *((*found.unbind(0), *stage[2:4], eps) for found, stage, eps in zip(statistics, stages, plan.eps, strict=True))]
    earlier = [needs_features]  # whether anything in front of stage i gets a gradient, or the batch norm and ReLU on its way in
    for need in needed[:-1]:
        earlier.append(earlier[-1] or any(need))
    grads = [[None] * PER_STAGE for _ in range(number)]

    _, _, mode, factors = _arguments(plan.resizes[-1])
    dy, sums, grads[-1][0], grads[-1][1] = _LOSS_BACKWARD[plan.impls[-1]](
        grad, inputs[-1], *norms[-1], *last[:2], image, list(plan.restore), mode, factors, plan.loss, earlier[-1], needed[-1][0]
    )
    for i in range(number - 2, -1, -1):
        if not earlier[i + 1]:
            break
        mean, var, gamma, _, eps = norms[i + 1]
        grads[i][2], grads[i][3] = sums[1], sums[0]
        if plan.batch_statistics[i]:  # a constant added to z changes nothing: the gradient of the bias is exactly 0
            grads[i][1] = torch.zeros_like(sums[0])
            mean_dy = (sums if plan.groups[i] is None else summed_across(sums, plan.groups[i])) / ctx.counts[i]
        else:
            mean_dy = None
            grads[i][1] = sums[0] * torch.rsqrt(var + eps) * (1 if gamma is None else gamma.to(var.dtype))
        if not earlier[i] and not needed[i][0]:
            break
        _, _, mode, factors = _arguments(plan.resizes[i])
        dy, sums, grads[i][0] = _STAGE_BACKWARD[plan.impls[i]](
            dy, maps[i], mean, var, gamma, eps, mean_dy, inputs[i], *norms[i], stages[i][0], mode, factors, earlier[i], needed[i][0]
        )
    given = [
        g.to(t.dtype) if need else None
        for stage, own, need_of in zip([*stages, last], grads, needed, strict=True)
        for t, g, need in zip(stage, own, need_of, strict=True)
    ]
    return None, dy if needs_features else None, None, *given


def chain_loss(features, image, stages, interpolate_mode, loss, restore, impl) -> torch.Tensor:
    """The loss by kernels; running statistics move. loss: an index; restore: the image's mean and deviation, 6 numbers or none."""
    sizes = resizes(stages, features, image, interpolate_mode)
    hidden = [stage.norm for stage in stages[:-1]]
    groups = [sync_group(norm) for norm in hidden]
    parameters = []
    for _, conv, norm in stages:
        running = [] if norm is None or uses_batch_statistics(norm) else [norm.running_mean, norm.running_var]
        own = [conv.weight, conv.bias, *([] if norm is None else affine(norm)), *running]
        parameters += own + [None] * (PER_STAGE - len(own))
    impls = _implementations(impl, stages, sizes, features)
    plan = (sizes, tuple(n.eps for n in hidden), tuple(map(uses_batch_statistics, hidden)), tuple(groups), tuple(restore), loss, impls)
    value, *moved = _ChainLoss.apply(plan, features, image, *parameters)
    statistics, synced = moved[: 2 * len(hidden)], iter(moved[2 * len(hidden) :])
    for i, norm in enumerate(hidden):
        count = features.shape[0] * sizes[i].H * sizes[i].W if groups[i] is None else next(synced)
        if uses_batch_statistics(norm) and (features.shape[0] or groups[i] is not None):
            update_running_statistics(norm, *statistics[2 * i : 2 * i + 2], count)
    return value


def check_counts(stages: tuple[ChainStage, ...], sizes: tuple[Resize, ...], N: int) -> None:
    """ValueError where a batch norm in training would see one value a channel, as the layer itself raises."""
    for stage, size in zip(stages, sizes, strict=True):
        if stage.norm is None or not uses_batch_statistics(stage.norm) or sync_group(stage.norm) is not None:
            continue
        if N * size.H * size.W == 1:
            shape = (N, stage.conv.out_channels, size.H, size.W)
            raise ValueError(f"{OP}: image: expected more than 1 value per channel when training, got {shape} in front of {stage.norm}")
