"""The decoder of the authors' CIFAR code as one op on the CPU and in CUDA C++, for `reconstruction_loss`.

    u = resize(h)              (N, C, H, W)
    z = conv3x3(u) + b1        (N, K, H, W)
    a = relu(batch_norm(z))
    s = conv3x3(a) + b2        (N, 3, H, W)

The authors' code (networks/auxiliary_nets.py, class Decoder) runs it layer by layer. It keeps u, z, the
normalised map, a, s, sigmoid(s) and the image for backward. The kernels keep h, the image and a few numbers a
channel, and recompute. They use conv3x3(resize(h)) = sum over taps of shift(resize(W_tap h)): nine 1x1
convolutions at the size of h, so that u never exists and the first convolution costs scale^2 times less. If
there is no resize, they convolve directly.
"""

from __future__ import annotations

import typing

import torch

from .batch_norm import affine, update_running_statistics
from .dispatch import compute_dtype, define_kernels, first_order
from .reconstruction_loss_layers import OP, Layers


def single_loss(
    features: torch.Tensor, image: torch.Tensor, layers: Layers, loss: int, restore: list[float], impl: str
) -> torch.Tensor:
    """Return the loss by the kernels of ``impl``, and move the running statistics.

    loss: an index into `reconstruction_loss.LOSSES`. restore: the image's mean and deviation, or nothing.
    """
    first, last = layers.convolutions
    (norm,), (of_batch,), (resize, _) = layers.norms, layers.batch_statistics, layers.resizes
    running = (None, None) if of_batch else (norm.running_mean, norm.running_var)
    given = (features, image, *first, *affine(norm), *last)
    # Inside, ctx.needs_input_grad tells of requires_grad alone, under no_grad too.
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given if t is not None)
    options = (restore, norm.eps, resize.mode, loss)
    precision = (operand_precision(features),) if impl == "cuda" else ()
    value, mean, var = _SingleLoss.apply(*given, *running, options, impl, needs_grad, precision)
    if of_batch and features.shape[0]:
        update_running_statistics(norm, mean, var, features.shape[0] * resize.H * resize.W)
    return value


PRECISIONS = ("exact", "tf32", "bf16", "f16")  # of products' operands, as csrc/cuda counts them
MOST_HIDDEN = {2: 192, 4: 96}  # by the bytes of an operand, as in reconstruction_loss_same_maps.cuh


def operand_precision(features: torch.Tensor) -> int:
    """Return which of `PRECISIONS` plain torch would give the convolutions of ``features`` on a GPU.

    Autocast's dtype, or else that of the features; for float32, torch's setting for convolutions.
    """
    kind, dtype = features.device.type, features.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float32:
        return int(typing.cast(typing.Any, torch.backends.cudnn).conv.fp32_precision == "tf32")
    return PRECISIONS.index("bf16" if dtype == torch.bfloat16 else "f16")


def saved_numbers(
    features: torch.Tensor, image: torch.Tensor, K: int, needs_grad: bool, precision: int | None
) -> int:
    """Return how many numbers forward saves: mean, variance, d gamma, d beta, dW2, db2.

    The CUDA C++ kernels (precision is not None) without a resize also keep the gradient in the three
    logits of each pixel, and a zero, in the operands' type.
    """
    if precision is None or not needs_grad or not len(features) or features.shape[2:] != image.shape[2:]:
        return 31 * K + 3
    size = 4 if precision < 2 else 2  # bytes of an operand
    return -(-(31 * K + 3) // 4) * 4 + image[:, 0].numel() * size if K <= MOST_HIDDEN[size] else 31 * K + 3


def _forward_fake(
    features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss,
    needs_grad, precision=None,
):
    dtype = compute_dtype(features, image, w1)
    size = saved_numbers(features, image, w1.shape[0], needs_grad, precision)
    return features.new_empty((), dtype=dtype), features.new_empty((size,), dtype=dtype)


def _backward_fake(
    grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics, eps, mode, loss,
    needs_features, needs_w1, precision=None,
):
    dtype = compute_dtype(features, image, w1)
    g_features = torch.empty_like(features) if needs_features else features.new_empty((0,))
    g_w1 = torch.empty(w1.shape if needs_w1 else (0,), dtype=dtype, device=features.device)
    return g_features, g_w1, features.new_empty((w1.shape[0],), dtype=dtype)


_TENSORS = (
    "Tensor features, Tensor image, Tensor w1, Tensor? b1, Tensor? gamma, Tensor? beta, Tensor w2, Tensor? b2"
)
_FORWARD = define_kernels(
    f"reconstruction_loss_forward({_TENSORS}, Tensor? running_mean, Tensor? running_var, float[] restore, "
    "float eps, int mode, int loss, bool needs_grad) -> (Tensor loss, Tensor saved)",
    _forward_fake,
    cuda=True,
    triton=False,
    cuda_arguments=", int precision",
)
_BACKWARD = define_kernels(
    f"reconstruction_loss_backward(Tensor grad, {_TENSORS}, Tensor saved, float[] restore, "
    "bool batch_statistics, float eps, int mode, int loss, bool needs_features, bool needs_w1) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
    cuda=True,
    triton=False,
    cuda_arguments=", int precision",
)


class _SingleLoss(torch.autograd.Function):
    """Forward finds d loss / d (gamma, beta, W2, b2), since the loss is one number; backward scales them."""

    @staticmethod
    def forward(
        ctx, features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, options, impl,
        needs_grad, precision,
    ):
        value, saved = _FORWARD[impl](
            features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, *options, needs_grad,
            *precision,
        )
        ctx.save_for_backward(features, image, w1, b1, gamma, beta, w2, b2, saved)
        ctx.options = options
        ctx.impl, ctx.precision = impl, precision
        ctx.batch_statistics = running_mean is None
        K = w1.shape[0]
        mean, var = saved[:K].clone(), saved[K : 2 * K].clone()
        ctx.mark_non_differentiable(mean, var)
        return value, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        saved = ctx.saved_tensors  # read once: under a checkpoint a second time is an error
        features, _, w1, b1, gamma, beta, w2, b2, _ = saved
        with torch.no_grad():
            found = _gradients(ctx, saved, grad)
        return first_order(OP, (features, w1, b1, gamma, beta, w2, b2, grad), found)


def _gradients(ctx, tensors, grad):
    """Return the gradient of each argument of `_SingleLoss.forward`."""
    features, image, w1, b1, gamma, beta, w2, b2, saved = tensors
    restore, *others = ctx.options
    needs = ctx.needs_input_grad
    K = w1.shape[0]
    _, _, g_gamma, g_beta, g_w2, g_b2 = saved[: 31 * K + 3].split([K, K, K, K, 27 * K, 3])
    g_features = g_w1 = g_b1 = None
    if needs[0] or needs[2] or needs[3]:
        g_features, g_w1, g_b1 = _BACKWARD[ctx.impl](
            grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, ctx.batch_statistics, *others,
            needs[0], needs[2], *ctx.precision,
        )

    def give(index, value, like):
        return value.view(like.shape).to(like.dtype) if needs[index] else None

    return (
        g_features if needs[0] else None, None, give(2, g_w1, w1), give(3, g_b1, b1),
        give(4, g_gamma * grad, gamma), give(5, g_beta * grad, beta), give(6, g_w2 * grad, w2),
        give(7, g_b2 * grad, b2), None, None, None, None, None, None,
    )
