"""Decoder-reconstruction loss of InfoPro (paper, eq. 6: the lower bound of I(h, x)), fused.

The decoder of the released CIFAR code has kernels here; decoders that are longer chains have theirs in `reconstruction_loss_chain`.

    u = resize(h)              (N, C, H, W), bilinear with align_corners=True, or nearest
    z = conv3x3(u) + b1        (N, K, H, W)
    a = relu(batch_norm(z))
    s = conv3x3(a) + b2        (N, 3, H, W)
    loss = mean BCE(sigmoid(s), image)

The released code (networks/util.py, class Decoder) runs it layer by layer and keeps u, z, the normalised map, a, s,
sigmoid(s) and the image for backward. The kernels keep h, the image and a few numbers per channel, and recompute:
conv3x3(resize(h)) = sum over taps of shift(resize(W_tap h)), nine 1x1 convolutions at the size of h, so that u never exists
and the first convolution costs scale^2 times less; where that does not pay (no resize) they convolve directly.
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import nn

from .batch_norm import affine, batch_norm_ref, sync_group, update_running_statistics, uses_batch_statistics
from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve
from .reconstruction_loss_chain import (
    ChainStage,
    chain_loss,
    check_counts,
    cuda_limitation,
    decoder_stages,
    resizes,
    triton_limitation,
)

OP = "reconstruction_loss"
MODES = ("bilinear", "nearest")
LOSSES = ("bce", "mse", "l1")


class Stage(typing.NamedTuple):
    """The layers of a decoder of the released CIFAR form."""

    conv1: nn.Conv2d
    norm: nn.BatchNorm2d
    conv2: nn.Conv2d


def reconstruction_loss(
    features: torch.Tensor,
    image: torch.Tensor,
    decoder: nn.Sequential,
    *,
    interpolate_mode: str = "bilinear",
    loss: str = "bce",
    image_mean: typing.Sequence[float] | None = None,
    image_std: typing.Sequence[float] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean reconstruction loss of ``image`` decoded from ``features``; running statistics move as in the layers' own forward.

    features: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
    image: (N, 3, H, W), floating, same N; in [0, 1], or normalised with ``image_mean`` and ``image_std`` (three numbers
        each, both or neither), and then restored and clamped to [0, 1] inside. It gets a gradient from the reference only.
    decoder: nn.Sequential of any number of (Conv2d 1x1 or 3x3, BatchNorm2d or SyncBatchNorm, ReLU, and Upsample or none), then
        Conv2d 3x3 to 3 channels and Sigmoid, such as the released CIFAR, ImageNet and Cityscapes decoders; in training or eval mode,
        its own parameters (with or without conv bias, affine or not). Upsample: bilinear or nearest, to a size or by a factor. In a
        process group a SyncBatchNorm in training takes the statistics of all its processes, as the layer does.
    interpolate_mode: "bilinear" (align_corners=True, as released) or "nearest": how features are resized to (H, W) for a decoder
        that has no Upsample of its own.
    loss: "bce", "mse" or "l1", the mean over all N*3*H*W elements.
    impl: "auto", "reference", "cpu", "triton" or "cuda"; one that is named runs or raises. Of the CIFAR decoder "cuda" takes as many
        hidden channels as fit the shared memory of every GPU, 140 at the usual sizes; "auto" runs more in Triton. Of other decoders it
        runs 3x3 convolutions of at most 64 to at most 16 channels, enlarged at most 16 times, in CUDA C++ kernels; the last has to be one.
        Others run in Triton's, of which there are none for an Upsample whose factor makes no whole size: "auto" then takes the reference,
        and says so.

    Returns a 0-d tensor, float64 if any input is float64, else float32 (arithmetic too). An empty batch gives 0.
    Kept for backward by the kernels: the inputs and, of the CIFAR decoder (one hidden convolution of K channels, 3x3, no Upsample),
    4 K + 27 K + 3 numbers; of other decoders, for each hidden convolution its output (N K H W numbers) and 2 K numbers.
    Raises ValueError or TypeError naming the argument or the layer, what was expected and what came.
    """
    stages = decoder_stages(decoder)
    _check(features, image, stages, interpolate_mode, loss, image_mean, image_std)
    stage = single_stage(stages)
    tensors = {"features": features, "image": image} | {f"decoder.{n}": p for n, p in decoder.named_parameters()}
    limitation = "image requires grad, which the reference alone supports" if image.requires_grad else None
    if limitation is None and (impl in ("triton", "cuda") or features.device.type == "cuda"):
        if stage is None:
            sizes = resizes(stages, features, image, interpolate_mode)
            limitation = {"cuda": cuda_limitation(stages, sizes, features), "triton": triton_limitation(sizes, *features.shape[2:])}
        else:
            limitation = {"cuda": _single_stage_limitation(stage, features, image)}
    chosen = resolve(OP, impl, tensors, limitation)
    if chosen == "reference":
        return reconstruction_loss_ref(features, image, decoder, interpolate_mode, loss, image_mean, image_std)
    if stage is None:
        return chain_loss(features, image, stages, interpolate_mode, LOSSES.index(loss), _restore(image_mean, image_std), chosen)
    return _fused(features, image, stage, interpolate_mode, loss, image_mean, image_std, chosen)


def reconstruction_loss_ref(features, image, decoder, interpolate_mode="bilinear", loss="bce", image_mean=None, image_std=None):
    """The specification, in plain torch: arguments as in `reconstruction_loss`."""
    stages = decoder_stages(decoder)
    dtype = compute_dtype(features, image, stages[0].conv.weight)
    with no_autocast(features.device):
        target = restore_image(image.to(dtype), image_mean, image_std)
        if features.shape[0] == 0 and all(sync_group(stage.norm) is None for stage in stages):
            touched = features.sum() + image.sum() + sum(p.sum() for p in decoder.parameters())
            return touched.to(dtype) * 0
        x = features.to(dtype)
        if all(stage.upsample is None for stage in stages):
            corners = True if interpolate_mode == "bilinear" else None
            x = F.interpolate(x, image.shape[-2:], mode=interpolate_mode, align_corners=corners)
        for upsample, conv, norm in stages:
            x = x if upsample is None else upsample(x)
            x = F.conv2d(x, conv.weight.to(dtype), _cast(conv.bias, dtype), padding=conv.kernel_size[0] // 2)
            x = x if norm is None else F.relu(batch_norm_ref(x, norm))
        if x.shape[0] == 0:  # in step with the other processes of a SyncBatchNorm
            return x.sum()
        if loss == "bce":
            return F.binary_cross_entropy_with_logits(x, target)
        return F.mse_loss(x.sigmoid(), target) if loss == "mse" else F.l1_loss(x.sigmoid(), target)


def restore_image(image: torch.Tensor, mean, std) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] from an image normalised per channel; the image itself when mean is None."""
    if mean is None:
        return image
    shape = (1, -1, 1, 1)
    return (image * image.new_tensor(std).view(shape) + image.new_tensor(mean).view(shape)).clamp(0, 1)


def single_stage(stages: tuple[ChainStage, ...]) -> Stage | None:
    """The layers where they are of the released CIFAR form, on their own; None for other chains."""
    if len(stages) != 2 or any(stage.upsample is not None for stage in stages) or stages[0].conv.kernel_size != (3, 3):
        return None
    norm = stages[0].norm
    return Stage(stages[0].conv, norm, stages[1].conv) if sync_group(norm) is None else None


SHARED_MEMORY = 99 * 1024  # bytes that a block has on every GPU of compute capability 8.0 or later; many have more


def _single_stage_limitation(stage: Stage, features: torch.Tensor, image: torch.Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot take these shapes on every GPU, None if they can."""
    (N, C, h, w), (H, W), K = features.shape, image.shape[2:], stage.conv1.out_channels
    if max(N * H * W, 12 * C * (K + 6), C * h * w) >= 2**31:
        return "2^31 or more pixels, weights, or features of a sample"
    if least_shared_memory(h, w, H, W, K) > SHARED_MEMORY:
        return f"{K} hidden channels of maps of ({h}, {w}) resized to ({H}, {W}) do not fit the shared memory of every GPU"
    return None


def least_shared_memory(h: int, w: int, H: int, W: int, K: int) -> int:
    """Bytes of the smallest plan of csrc/cuda/reconstruction_loss_plan.cuh, tiles of one pixel and hidden channels one by one, or a few more."""
    low_h, low_w = _under_five(h, H), _under_five(w, W)
    pixels = 4 * (-(-low_h * low_w // 4) | 1)
    z, logits = 20 * K, 3 * 56 + 4 * 27 * K  # with their borders
    fixed = 34 * K + 20 + 2 * (low_h + low_w) + 8 * (2 * K + 4) + 3 * 4 + 8 * 3  # the last two: rounding to whole float4
    taps, late = 9 * pixels, 4 * pixels
    scratch = max(9 * low_h, 36, pixels + 12, logits - taps) + 3
    return 4 * (z + fixed + taps + late + scratch)


def _under_five(n_in: int, n_out: int) -> int:
    """At least as many inputs as lie under five outputs side by side, by either resize."""
    steps = min(4, n_out - 1)
    return min(n_in, steps * (n_in - 1) // max(n_out - 1, 1) + 3)


def _check(features, image, stages, interpolate_mode, loss, image_mean, image_std):
    for name, t in (("features", features), ("image", image)):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            raise TypeError(f"{OP}: {name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    C = stages[0].conv.in_channels
    if features.dim() != 4 or features.shape[1] != C:
        raise ValueError(f"{OP}: features: expected (N, {C}, h, w), got {tuple(features.shape)}")
    if image.dim() != 4 or image.shape[1] != 3 or image.shape[0] != features.shape[0]:
        raise ValueError(f"{OP}: image: expected ({features.shape[0]}, 3, H, W), got {tuple(image.shape)}")
    if 0 in features.shape[2:] or 0 in image.shape[2:]:
        raise ValueError(f"{OP}: expected maps of at least 1x1, got features {tuple(features.shape)}, image {tuple(image.shape)}")
    if interpolate_mode not in MODES:
        raise ValueError(f"{OP}: interpolate_mode: expected one of {MODES}, got {interpolate_mode!r}")
    if loss not in LOSSES:
        raise ValueError(f"{OP}: loss: expected one of {LOSSES}, got {loss!r}")
    if (image_mean is None) != (image_std is None):
        raise ValueError(f"{OP}: image_mean, image_std: expected both or neither, got {image_mean}, {image_std}")
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if value is not None and (not hasattr(value, "__len__") or len(value) != 3):
            raise ValueError(f"{OP}: {name}: expected 3 numbers, got {value}")
    check_counts(stages, resizes(stages, features, image, interpolate_mode), features.shape[0])


def _cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if t is None else t.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The fused path: two opaque ops a direction, one autograd.Function.


def saved_numbers(K: int) -> int:
    """Numbers the fused op keeps beside its inputs: mean, var, d gamma, d beta, dW2, db2 (K, K, K, K, 27 K, 3)."""
    return 4 * K + 27 * K + 3


def _forward_fake(features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss, needs_grad):
    dtype = compute_dtype(features, image, w1)
    return features.new_empty((), dtype=dtype), features.new_empty((saved_numbers(w1.shape[0]),), dtype=dtype)


def _backward_fake(
    grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics, eps, mode, loss, needs_features, needs_w1
):
    dtype = compute_dtype(features, image, w1)
    K = w1.shape[0]
    g_features = torch.empty_like(features) if needs_features else features.new_empty((0,))
    g_w1 = torch.empty(w1.shape if needs_w1 else (0,), dtype=dtype, device=features.device)
    return g_features, g_w1, features.new_empty((K,), dtype=dtype)


_FORWARD = define_kernels(
    "reconstruction_loss_forward(Tensor features, Tensor image, Tensor w1, Tensor? b1, Tensor? gamma, Tensor? beta, "
    "Tensor w2, Tensor? b2, Tensor? running_mean, Tensor? running_var, float[] restore, float eps, int mode, int loss, "
    "bool needs_grad) -> (Tensor loss, Tensor saved)",
    _forward_fake,
    cuda=True,
)
_BACKWARD = define_kernels(
    "reconstruction_loss_backward(Tensor grad, Tensor features, Tensor image, Tensor w1, Tensor? b1, Tensor? gamma, "
    "Tensor? beta, Tensor w2, Tensor? b2, Tensor saved, float[] restore, bool batch_statistics, float eps, int mode, int loss, "
    "bool needs_features, bool needs_w1) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    cuda=True,
)


class _ReconstructionLoss(torch.autograd.Function):
    """d loss / d (gamma, beta, W2, b2) are found in the forward sweep (the loss is a scalar) and scaled in backward."""

    @staticmethod
    def forward(ctx, features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, options, impl, needs_grad):
        restore, eps, mode, loss = options
        value, saved = _FORWARD[impl](
            features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss, needs_grad
        )
        ctx.save_for_backward(features, image, w1, b1, gamma, beta, w2, b2, saved)
        ctx.options = options
        ctx.impl = impl
        ctx.batch_statistics = running_mean is None
        K = w1.shape[0]
        mean, var = saved[:K].clone(), saved[K : 2 * K].clone()
        ctx.mark_non_differentiable(mean, var)
        return value, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        features, _, w1, b1, gamma, beta, w2, b2, _ = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx, grad)
        return first_order(OP, (features, w1, b1, gamma, beta, w2, b2, grad), found)


def _gradients(ctx, grad):
    """What `_ReconstructionLoss.backward` returns, one for each argument of its forward."""
    features, image, w1, b1, gamma, beta, w2, b2, saved = ctx.saved_tensors
    restore, eps, mode, loss = ctx.options
    needs = ctx.needs_input_grad
    K = w1.shape[0]
    _, _, g_gamma, g_beta, g_w2, g_b2 = saved.split([K, K, K, K, 27 * K, 3])
    g_features = g_w1 = g_b1 = None
    if needs[0] or needs[2] or needs[3]:
        g_features, g_w1, g_b1 = _BACKWARD[ctx.impl](
            grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, ctx.batch_statistics, eps, mode, loss, needs[0], needs[2]
        )

    def give(index, value, like):
        return value.view(like.shape).to(like.dtype) if needs[index] else None

    return (
        g_features if needs[0] else None, None, give(2, g_w1, w1), give(3, g_b1, b1), give(4, g_gamma * grad, gamma),
        give(5, g_beta * grad, beta), give(6, g_w2 * grad, w2), give(7, g_b2 * grad, b2), None, None, None, None, None,
    )  # fmt: skip


def _restore(image_mean, image_std) -> list[float]:
    return [] if image_mean is None else [float(v) for v in (*image_mean, *image_std)]


def _fused(features, image, stage, interpolate_mode, loss, image_mean, image_std, impl):
    conv1, norm, conv2 = stage
    batch_statistics = uses_batch_statistics(norm)
    running = (None, None) if batch_statistics else (norm.running_mean, norm.running_var)
    options = (_restore(image_mean, image_std), norm.eps, MODES.index(interpolate_mode), LOSSES.index(loss))
    given = (features, image, conv1.weight, conv1.bias, *affine(norm), conv2.weight, conv2.bias)
    # Inside, ctx.needs_input_grad tells of requires_grad alone, under no_grad too.
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given if t is not None)
    value, mean, var = _ReconstructionLoss.apply(*given, *running, options, impl, needs_grad)
    if batch_statistics and features.shape[0]:
        update_running_statistics(norm, mean, var, image.shape[0] * image.shape[2] * image.shape[3])
    return value
