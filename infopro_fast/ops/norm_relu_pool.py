"""BatchNorm2d, ReLU and global average pooling of an auxiliary head, fused.

    y = batch_norm(x)        (N, C, h, w)
    pooled = mean over the map of relu(y)      (N, C)

The layers (released code: networks/util.py, class AuxClassifier) keep x, the rectified map and its expanded gradient. The kernels
keep x and 2 N C + 2 C numbers: with g the gradient of a pooled number over h w, the sums that batch norm's backward needs are
g times how many y are positive, and g times the sum of their normalised x.

A convolution in front, as an auxiliary head has one, can be part of it: sample by sample, its output is written once, with its
statistics, and the gradient of that is made and used up in a core's cache. With stride 1 it is Winograd's, which takes sums of four x:
an infinite x makes nan of what the layer might still have as a number.
"""

from __future__ import annotations

import torch
from torch import nn

from .batch_norm import affine, batch_norm_ref, update_running_statistics, uses_batch_statistics
from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve

OP = "norm_relu_pool"


def norm_relu_pool(x: torch.Tensor, bn: nn.BatchNorm2d, *, conv: nn.Conv2d | None = None, impl: str = "auto") -> torch.Tensor:
    """Mean over each map of relu(bn(x)), or of relu(bn(conv(x))); running statistics move as in the layer's own forward.

    x: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
    bn: BatchNorm2d of C channels, or of those of conv, affine or not, in training or eval mode.
    conv: a Conv2d that x goes through first. On the CPU a 3x3 one (stride 1 or 2, padding 1, no bias) with few channels is part of the
        kernels, which write its output once and the gradient of that never (`fuses`); any other is the layer's own call.
    impl: "auto", "reference", "cpu" or "triton"; one that is named runs or raises.

    Returns (N, channels) in x's dtype; the arithmetic is float64 for float64, else float32.
    Kept for backward by the kernels: x, the layers' parameters, 2 N C + 2 C numbers (C of the norm), and with conv its output.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    _check(x, bn, conv)
    tensors = {"x": x, "bn.weight": bn.weight, "bn.bias": bn.bias}
    chosen = resolve(OP, impl, tensors if conv is None else tensors | {"conv.weight": conv.weight})
    if conv is not None and not (chosen == "cpu" and fuses(x, conv)):
        return norm_relu_pool(conv(x), bn, impl=chosen)
    if chosen == "reference":
        return norm_relu_pool_ref(x, bn)
    batch_statistics = uses_batch_statistics(bn)
    running = (None, None) if batch_statistics else (bn.running_mean, bn.running_var)
    if conv is None:
        pooled, mean, var = _NormReluPool.apply(x, *affine(bn), *running, bn.eps, chosen)
        values = x.numel() // x.shape[1]
    else:
        N, stride = x.shape[0], conv.stride[0]
        values = N * ((x.shape[2] - 1) // stride + 1) * ((x.shape[3] - 1) // stride + 1)
        if batch_statistics and values == 1:
            raise ValueError(f"{OP}: x: expected more than 1 value per channel behind conv when training, got {tuple(x.shape)}")
        pooled, mean, var = _ConvNormReluPool.apply(x, conv.weight, stride, *affine(bn), *running, bn.eps)
    if batch_statistics and x.shape[0]:
        update_running_statistics(bn, mean, var, values)
    return pooled.to(x.dtype)


def fuses(x: torch.Tensor, conv: nn.Conv2d) -> bool:
    """Whether the CPU kernels take the convolution, too: where they can, nothing else happens at a call of the layer (hooks, which pruning
    and torch.nn.utils.weight_norm are, a parametrisation, a subclass), and a sample stays in a core's cache.

    Under autocast, and in half precision, the layer runs: oneDNN has faster instructions for it there.
    """
    form = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.bias, conv.padding_mode)
    return (
        type(conv) is nn.Conv2d
        and form == ((3, 3), (1, 1), (1, 1), 1, None, "zeros")
        and conv.stride in ((1, 1), (2, 2))
        and x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not _has_hooks(conv)
        and not torch.is_autocast_enabled("cpu")
        and _pays(x.shape, conv)
    )


def _has_hooks(layer: nn.Module) -> bool:
    own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(own) or nn.modules.module._has_any_global_hook()


MOST_NUMBERS = 2**18  # of a sample with what is made of it, and of the weights: 1 MiB of float32, a core's second cache


def _pays(shape: torch.Size, conv: nn.Conv2d) -> bool:
    """Whether that is faster than oneDNN's convolution: measured so at all of the released CIFAR heads (2 cores with AVX-512, batch 128,
    forward + backward: 6.8, 5.5 and 6.5 ms against 10.3, 6.1 and 9.2), and taken to be where sample and weights fit the cache; not for
    few outputs, which leave lanes of the vectors empty."""
    C, K, stride = conv.in_channels, conv.out_channels, conv.stride[0]
    h, w = shape[-2:]
    H, W = (h - 1) // stride + 1, (w - 1) // stride + 1
    cells = 16 if stride == 1 else 0  # of Winograd's, for each 2x2 of the output
    sample = (h + 3) * (w + 3) * C * stride + (H + 2) * (W + 2) * K + cells * ((H + 1) // 2) * ((W + 1) // 2) * (C + K)
    return K >= 16 and sample <= MOST_NUMBERS and (cells or 9) * C * K <= MOST_NUMBERS


def norm_relu_pool_ref(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """The specification, in plain torch: arguments as in `norm_relu_pool`."""
    dtype = compute_dtype(x)
    with no_autocast(x.device):
        if x.shape[0] == 0:
            touched = sum(p.sum() for p in (bn.weight, bn.bias) if p is not None)
            return (x.to(dtype).sum((2, 3)) + touched * 0).to(x.dtype)
        return batch_norm_ref(x.to(dtype), bn).relu().mean((2, 3)).to(x.dtype)


def _check(x, bn, conv):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{OP}: x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not isinstance(bn, nn.BatchNorm2d):
        raise TypeError(f"{OP}: bn: expected a BatchNorm2d, got {type(bn).__name__}")
    if conv is not None and not isinstance(conv, nn.Conv2d):
        raise TypeError(f"{OP}: conv: expected a Conv2d or None, got {type(conv).__name__}")
    if conv is not None and conv.out_channels != bn.num_features:
        raise ValueError(f"{OP}: conv: expected {bn.num_features} output channels, those of bn, got {conv.out_channels}")
    C = bn.num_features if conv is None else conv.in_channels
    if x.dim() != 4 or x.shape[1] != C or 0 in x.shape[2:]:
        raise ValueError(f"{OP}: x: expected (N, {C}, h, w) with maps of at least 1x1, got {tuple(x.shape)}")
    if conv is None and uses_batch_statistics(bn) and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"{OP}: x: expected more than 1 value per channel when training, got {tuple(x.shape)}")


def _forward_fake(x, gamma, beta, running_mean, running_var, eps):
    (N, C), dtype = x.shape[:2], compute_dtype(x)
    return x.new_empty((N, C), dtype=dtype), x.new_empty((2 * C + 2 * N * C,), dtype=dtype)


def _backward_fake(grad, x, gamma, beta, saved, batch_statistics, eps):
    C, dtype = x.shape[1], compute_dtype(x)
    return torch.empty_like(x), x.new_empty((C,), dtype=dtype), x.new_empty((C,), dtype=dtype)


_FORWARD = define_kernels(
    "norm_relu_pool_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, float eps) "
    "-> (Tensor pooled, Tensor saved)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "norm_relu_pool_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, Tensor saved, bool batch_statistics, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, running_mean, running_var, eps, impl):
        pooled, saved = _FORWARD[impl](x, gamma, beta, running_mean, running_var, eps)
        ctx.save_for_backward(x, gamma, beta, saved)
        ctx.options = (running_mean is None, eps)
        ctx.impl = impl
        C = x.shape[1]
        mean, var = saved[:C].clone(), saved[C : 2 * C].clone()
        ctx.mark_non_differentiable(mean, var)
        return pooled, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, gamma, beta, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.no_grad():
            g_x, g_gamma, g_beta = _BACKWARD[ctx.impl](grad, x, gamma, beta, saved, *ctx.options)
            found = (
                g_x if needs[0] else None, g_gamma.to(gamma.dtype) if needs[1] else None, g_beta.to(beta.dtype) if needs[2] else None,
                None, None, None, None,
            )  # fmt: skip
        return first_order(OP, (x, gamma, beta, grad), found)


def _conv_forward_fake(x, weight, stride, gamma, beta, running_mean, running_var, eps):
    N, K = x.shape[0], weight.shape[0]
    z = x.new_empty((N, (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1, K))  # pixel after pixel
    return x.new_empty((N, K)), z, x.new_empty((2 * K + 2 * N * K,))


def _conv_backward_fake(grad, x, weight, stride, z, gamma, beta, saved, batch_statistics, eps, needs_x, needs_weight):
    K = weight.shape[0]
    g_x = torch.empty_like(x) if needs_x else x.new_empty((0,))
    return g_x, torch.empty_like(weight) if needs_weight else x.new_empty((0,)), x.new_empty((K,)), x.new_empty((K,))


_CONV_FORWARD = define_kernels(
    "conv_norm_relu_pool_forward(Tensor x, Tensor weight, int stride, Tensor? gamma, Tensor? beta, Tensor? running_mean, "
    "Tensor? running_var, float eps) -> (Tensor pooled, Tensor z, Tensor saved)",
    _conv_forward_fake,
    triton=False,
)["cpu"]
_CONV_BACKWARD = define_kernels(
    "conv_norm_relu_pool_backward(Tensor grad, Tensor x, Tensor weight, int stride, Tensor z, Tensor? gamma, Tensor? beta, Tensor saved, "
    "bool batch_statistics, float eps, bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_backward_fake,
    triton=False,
)["cpu"]


class _ConvNormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, gamma, beta, running_mean, running_var, eps):
        pooled, z, saved = _CONV_FORWARD(x, weight, stride, gamma, beta, running_mean, running_var, eps)
        ctx.save_for_backward(x, weight, gamma, beta, z, saved)
        ctx.stride, ctx.options = stride, (running_mean is None, eps)
        K = weight.shape[0]
        mean, var = saved[:K].clone(), saved[K : 2 * K].clone()
        ctx.mark_non_differentiable(mean, var)
        return pooled, mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, weight, gamma, beta, z, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.no_grad():
            g_x, g_weight, g_gamma, g_beta = _CONV_BACKWARD(
                grad, x, weight, ctx.stride, z.contiguous(), gamma, beta, saved, *ctx.options, needs[0], needs[1]
            )
            found = (
                g_x if needs[0] else None, g_weight if needs[1] else None, None, g_gamma.to(gamma.dtype) if needs[3] else None,
                g_beta.to(beta.dtype) if needs[4] else None, None, None, None,
            )  # fmt: skip
        return first_order(OP, (x, weight, gamma, beta, grad), found)
