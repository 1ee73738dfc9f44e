"""Decoders of any number of stages, an op a stage, for `reconstruction_loss`.

A stage takes z of the stage before, in front of its batch norm, and makes the next:

    a = relu(batch_norm(z_prev))      (N, C, h, w); the features at first
    z = conv(resize(a)) + bias        (N, K, H, W), with the mean and variance of each channel

The last stage, to 3 channels, makes the loss. Layer by layer, torch keeps z, its normalised and its rectified
map, the resized map and more for backward. Here autograd keeps only the z and their statistics. No a,
resize(a) or map of logits ever exists whole: conv(resize(a)) is resize and shift of 1x1 convolutions of a,
one product of matrices at the size of a.

On the CPU a stage is one kernel (`csrc/cpu/chain_stage.h`). On a GPU, stages of few channels, above all the
last, have CUDA C++ kernels that go tile by tile in shared memory (`csrc/cuda/chain_stage_block.cuh`). Other
stages, and 1x1 convolutions, are mostly products of matrices. cuBLAS does them best, on a chunk of samples at
a time (`triton_kernels.chain_stage`), whether "cuda" or "triton" is asked for. If Triton runs the last stage,
too (`triton_kernels.chain_loss`), the logits exist while it runs.

Each stage is an opaque op in each direction. Between them, processes add up the statistics of a SyncBatchNorm
and the sums that its gradient needs.
"""

from __future__ import annotations

import typing

import torch

from .batch_norm import affine, merged_statistics, summed_across, update_running_statistics
from .dispatch import compute_dtype, define_kernels, first_order
from .reconstruction_loss_layers import OP, Layers, Resize, implementations


def chain_loss(
    features: torch.Tensor, image: torch.Tensor, layers: Layers, loss: int, restore: list[float], impl: str
) -> torch.Tensor:
    """Return the loss by the kernels of ``impl``, and move the running statistics.

    loss: an index into `reconstruction_loss.LOSSES`. restore: the image's mean and deviation, or nothing.
    """
    norms, parameters = layers.norms, []
    for own, norm, of_batch in zip(layers.convolutions, norms, layers.batch_statistics, strict=False):
        running = (None, None) if of_batch else (norm.running_mean, norm.running_var)
        parameters += [*own, *affine(norm), *running]
    parameters += [*layers.convolutions[-1], None, None, None, None]
    eps, impls = tuple(norm.eps for norm in norms), implementations(layers, impl)
    plan = (layers.resizes, eps, layers.batch_statistics, layers.groups, tuple(restore), loss, impls)
    value, *moved = _ChainLoss.apply(plan, features, image, *parameters)
    statistics, synced = moved[: 2 * len(norms)], iter(moved[2 * len(norms) :])
    for i, (norm, resize, group) in enumerate(zip(norms, layers.resizes, layers.groups, strict=False)):
        count = features.shape[0] * resize.H * resize.W if group is None else next(synced)
        if layers.batch_statistics[i] and (features.shape[0] or group is not None):
            update_running_statistics(norm, statistics[2 * i], statistics[2 * i + 1], count)
    return value


# ------------------------------------------------------------------------------------------------------------
# The opaque ops


def _stage_forward_fake(x, mean, var, gamma, beta, eps, weight, bias, H, W, mode, factors, in_f64):
    K, dtype = weight.shape[0], torch.float64 if in_f64 else torch.float32
    return x.new_empty((x.shape[0], K, H, W), dtype=dtype), x.new_empty((2, K), dtype=dtype)


def _gradients_fake(x, mean, weight, dtype, needs_x, needs_weight):
    g_x = torch.empty_like(x) if mean is None else x.new_empty(x.shape, dtype=dtype)
    return (
        g_x if needs_x else x.new_empty((0,)), x.new_empty((2, x.shape[1]), dtype=dtype),
        x.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
    )


def _stage_backward_fake(
    dy, z, z_mean, z_var, z_gamma, z_eps, mean_dy, x, mean, var, gamma, beta, eps, weight, mode, factors,
    needs_x, needs_weight,
):
    return _gradients_fake(x, mean, weight, dy.dtype, needs_x, needs_weight)


def _loss_forward_fake(
    x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, in_f64
):
    return x.new_empty((), dtype=torch.float64 if in_f64 else torch.float32)


def _loss_backward_fake(
    grad, x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, needs_x,
    needs_weight,
):
    found = _gradients_fake(x, mean, weight, grad.dtype, needs_x, needs_weight)
    return *found, x.new_empty((3,), dtype=grad.dtype)


# With a mean, x is the z of the stage before, which kernels normalise by (mean, ..., eps) and rectify.
_NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps"
_STAGE_FORWARD = define_kernels(
    f"chain_stage_forward(Tensor x, {_NORM}, Tensor weight, Tensor? bias, int H, int W, int mode, "
    "float[] factors, bool in_f64) -> (Tensor z, Tensor statistics)",
    _stage_forward_fake,
    cuda=True,
)
_STAGE_BACKWARD = define_kernels(
    "chain_stage_backward(Tensor dy, Tensor z, Tensor z_mean, Tensor z_var, Tensor? z_gamma, float z_eps, "
    f"Tensor? mean_dy, Tensor x, {_NORM}, Tensor weight, int mode, float[] factors, bool needs_x, "
    "bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _stage_backward_fake,
    cuda=True,
)
_LOSS_FORWARD = define_kernels(
    f"chain_loss_forward(Tensor x, {_NORM}, Tensor weight, Tensor? bias, Tensor image, float[] restore, "
    "int mode, float[] factors, int loss, bool in_f64) -> Tensor",
    _loss_forward_fake,
    cuda=True,
)
_LOSS_BACKWARD = define_kernels(
    f"chain_loss_backward(Tensor grad, Tensor x, {_NORM}, Tensor weight, Tensor? bias, Tensor image, "
    "float[] restore, int mode, float[] factors, int loss, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _loss_backward_fake,
    cuda=True,
)


# ------------------------------------------------------------------------------------------------------------
# Stage by stage

PER_STAGE = 6  # tensors of a stage: weight, bias, gamma, beta, running mean, running variance
NO_NORM = (None, None, None, None, 0.0)


class _Plan(typing.NamedTuple):
    """The arguments of a call that are not tensors."""

    resizes: tuple[Resize, ...]
    eps: tuple[float, ...]
    batch_statistics: tuple[bool, ...]
    groups: tuple
    restore: tuple[float, ...]
    loss: int
    impls: tuple[str, ...]


def _sampling(resize: Resize) -> tuple[int, list[float]]:
    return resize.mode, list(resize.factors)


def _split(tensors: typing.Sequence) -> list:
    return [tensors[i : i + PER_STAGE] for i in range(0, len(tensors), PER_STAGE)]


class _ChainLoss(torch.autograd.Function):
    """Return the loss, each hidden stage's mean and variance, and the counts summed over processes."""

    @staticmethod
    def forward(ctx, plan, features, image, *parameters):
        plan = _Plan(*plan)
        *stages, last = _split(parameters)
        in_f64 = compute_dtype(features, image, parameters[0]) == torch.float64
        x, norm, maps, statistics, counts = features, NO_NORM, [], [], []
        for stage, resize, eps, of_batch, group, impl in zip(stages, *plan[:4], plan.impls, strict=False):
            weight, bias, gamma, beta, *running = stage
            size = (resize.H, resize.W)
            x, found = _STAGE_FORWARD[impl](x, *norm, weight, bias, *size, *_sampling(resize), in_f64)
            count = x.shape[0] * x.shape[2] * x.shape[3]
            if not of_batch:
                found = torch.stack([t.to(x.dtype) for t in running])
            elif group is not None:
                found, count = merged_statistics(found, count, group)
            norm = (*found.unbind(0), gamma, beta, eps)
            maps.append(x)
            statistics.append(found)
            counts.append(count)
        value = _LOSS_FORWARD[plan.impls[-1]](
            x, *norm, *last[:2], image, list(plan.restore), *_sampling(plan.resizes[-1]), plan.loss, in_f64
        )
        ctx.save_for_backward(features, image, *parameters, *maps, *statistics)
        ctx.plan = plan
        ctx.counts = counts
        moved = [t.clone() for found in statistics for t in found.unbind(0)]
        moved += [count.clone() for count in counts if isinstance(count, torch.Tensor)]
        ctx.mark_non_differentiable(*moved)
        return value, *moved

    @staticmethod
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors  # read once: under a checkpoint a second time is an error
        features, _, *rest = saved
        parameters = rest[: len(ctx.plan.resizes) * PER_STAGE]
        with torch.no_grad():
            found = _gradients(ctx, saved, grad)
        return first_order(OP, (features, *parameters, grad), found)


def _gradients(ctx, saved, grad):
    """Return the gradient of each argument of `_ChainLoss.forward`."""
    plan = ctx.plan
    features, image, *rest = saved
    number = len(plan.resizes)
    *stages, last = _split(rest[: number * PER_STAGE])
    kept = rest[number * PER_STAGE :]
    maps, statistics = kept[: number - 1], kept[number - 1 :]
    needs = ctx.needs_input_grad
    needs_features, needed = needs[1], _split(needs[3:])
    inputs = [features, *maps]
    hidden = zip(statistics, stages, plan.eps, strict=True)
    norms = [NO_NORM, *((*found.unbind(0), *stage[2:4], eps) for found, stage, eps in hidden)]
    # Whether the input of stage i needs a gradient: for anything before it, or for the batch norm it passes.
    earlier = [needs_features]
    for need in needed[:-1]:
        earlier.append(earlier[-1] or any(need))
    grads: list[list[typing.Any]] = [[None] * PER_STAGE for _ in range(number)]

    dy, sums, grads[-1][0], grads[-1][1] = _LOSS_BACKWARD[plan.impls[-1]](
        grad, inputs[-1], *norms[-1], *last[:2], image, list(plan.restore), *_sampling(plan.resizes[-1]),
        plan.loss, earlier[-1], needed[-1][0],
    )
    for i in range(number - 2, -1, -1):
        if not earlier[i + 1]:
            break
        mean, var, gamma, _, eps = norms[i + 1]
        grads[i][2], grads[i][3] = sums[1], sums[0]
        if plan.batch_statistics[i]:
            grads[i][1] = torch.zeros_like(sums[0])  # batch norm takes the bias away again
            group = plan.groups[i]
            mean_dy = (sums if group is None else summed_across(sums, group)) / ctx.counts[i]
        else:
            mean_dy = None
            grads[i][1] = sums[0] * torch.rsqrt(var + eps) * (1 if gamma is None else gamma.to(var.dtype))
        if not earlier[i] and not needed[i][0]:
            break
        dy, sums, grads[i][0] = _STAGE_BACKWARD[plan.impls[i]](
            dy, maps[i], mean, var, gamma, eps, mean_dy, inputs[i], *norms[i], stages[i][0],
            *_sampling(plan.resizes[i]), earlier[i], needed[i][0],
        )
    given = [
        g.to(t.dtype) if need else None
        for stage, own, need_of in zip([*stages, last], grads, needed, strict=True)
        for t, g, need in zip(stage, own, need_of, strict=True)
    ]
    return None, dy if needs_features else None, None, *given
