"""BatchNorm2d, ReLU and global average pooling of an auxiliary head, fused.

    y = batch_norm(x)                          (N, C, h, w)
    pooled = mean over the map of relu(y)      (N, C)

The layers (the authors' networks/auxiliary_nets.py, class AuxClassifier) keep x, the rectified map and its
expanded gradient. The kernels keep x and 2 N C + 2 C numbers. With g the gradient of a pooled number divided
by the map's size, batch norm's backward needs two sums: g times the number of positive y, and g times the sum
of their normalised x.

The CPU kernels can take a convolution in front, as an auxiliary head has it. They go sample by sample, write
its output and statistics once, and use up the output's gradient in a core's cache. With stride 1 it is
Winograd's convolution, which adds up four x: an infinite x gives nan where the layer might give a number.
"""

from __future__ import annotations

import torch
from torch import nn

from .batch_norm import affine, batch_norm_ref, update_running_statistics, uses_batch_statistics
from .dispatch import check_floating, compute_dtype, define_kernels, first_order, no_autocast, resolve
from .plain import not_plain

OP = "norm_relu_pool"


def norm_relu_pool(
    x: torch.Tensor, bn: nn.BatchNorm2d, *, conv: nn.Conv2d | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Return the mean over each map of relu(bn(x)), or of relu(bn(conv(x))).

    Running statistics move as in the layer's own forward.

    Args:
        x: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
        bn: a BatchNorm2d of C, or conv's output, channels; affine or not, in training or eval mode. A layer
            whose call does more (`plain.not_plain`: hooks, subclasses) is refused.
        conv: a Conv2d that x goes through first, or None. The CPU kernels take a 3x3 convolution (stride 1 or
            2, padding 1, no bias) of few channels; they never write its output's gradient (`fuses`).
            Otherwise the layer itself runs.
        impl: "auto", "reference", "cpu" or "triton". A named implementation runs or raises.

    Returns:
        (N, C), C of bn, in x's dtype. The arithmetic is float64 for float64, else float32.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.

    The kernels keep for backward x, the layers' parameters, 2 N C + 2 C numbers and, with conv, its output.
    """
    _check(x, bn, conv)
    layers = {"bn": bn} | ({} if conv is None else {"conv": conv})
    # Not bn.weight, since reading a parametrised weight computes it
    own = {f"{name}.{k}": p for name, layer in layers.items() for k, p in layer.named_parameters()}
    chosen = resolve(OP, impl, {"x": x} | own)
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
            expected = "more than 1 value per channel behind conv when training"
            raise ValueError(f"{OP}: x: expected {expected}, got {tuple(x.shape)}")
        pooled, mean, var = _ConvNormReluPool.apply(x, conv.weight, stride, *affine(bn), *running, bn.eps)
    if batch_statistics and x.shape[0]:
        update_running_statistics(bn, mean, var, values)
    return pooled.to(x.dtype)


def fuses(x: torch.Tensor, conv: nn.Conv2d) -> bool:
    """Whether the CPU kernels take the convolution, too.

    A call of the layer must do nothing else (`plain.not_plain`), and its weight be a parameter. A sample must
    fit a core's cache (`pays`). Under autocast and in half precision the layer runs: oneDNN is faster there.
    """
    form = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.bias, conv.padding_mode)
    return (
        type(conv) is nn.Conv2d  # a parametrised layer is of a class of its own
        and not_plain(conv, nn.Conv2d) is None
        and form == ((3, 3), (1, 1), (1, 1), 1, None, "zeros")
        and conv.stride in ((1, 1), (2, 2))
        and x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and pays(x.shape, conv)
    )


MOST_NUMBERS = 2**18  # of a sample with its intermediate maps, and of the weights: 1 MiB, a second cache


def pays(shape: torch.Size, conv: nn.Conv2d) -> bool:
    """Whether the kernels are faster than oneDNN's convolution: sample and weights fit a core's second cache.

    Fewer than 16 outputs leave lanes of the vectors empty. Measured at the three heads of the authors' CIFAR
    code, 2 cores with AVX-512, batch 128, forward and backward: 6.8, 5.5 and 6.5 ms; oneDNN takes 10.3, 6.1
    and 9.2.
    """
    C, K, stride = conv.in_channels, conv.out_channels, conv.stride[0]
    h, w = shape[-2:]
    H, W = (h - 1) // stride + 1, (w - 1) // stride + 1
    cells = 16 if stride == 1 else 0  # Winograd's, for each 2x2 of the output
    sample = (h + 3) * (w + 3) * C * stride + (H + 2) * (W + 2) * K
    sample += cells * ((H + 1) // 2) * ((W + 1) // 2) * (C + K)
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
    check_floating(OP, {"x": x})
    if not isinstance(bn, nn.BatchNorm2d):
        raise TypeError(f"{OP}: bn: expected a BatchNorm2d, got {type(bn).__name__}")
    reason = not_plain(bn, nn.BatchNorm2d)
    if reason is not None:
        expected = "a BatchNorm2d whose call runs nothing else, as the kernels run nothing else"
        raise ValueError(f"{OP}: bn: expected {expected}, got {bn}: {reason}")
    if conv is not None and not isinstance(conv, nn.Conv2d):
        raise TypeError(f"{OP}: conv: expected a Conv2d or None, got {type(conv).__name__}")
    if conv is not None and conv.out_channels != bn.num_features:
        expected = f"{bn.num_features} output channels, those of bn"
        raise ValueError(f"{OP}: conv: expected {expected}, got {conv.out_channels}")
    C = bn.num_features if conv is None else conv.in_channels
    if x.dim() != 4 or x.shape[1] != C or 0 in x.shape[2:]:
        raise ValueError(f"{OP}: x: expected (N, {C}, h, w) with maps of at least 1x1, got {tuple(x.shape)}")
    if conv is None and uses_batch_statistics(bn) and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        expected = "more than 1 value per channel when training"
        raise ValueError(f"{OP}: x: expected {expected}, got {tuple(x.shape)}")


def _forward_fake(x, gamma, beta, running_mean, running_var, eps):
    (N, C), dtype = x.shape[:2], compute_dtype(x)
    return x.new_empty((N, C), dtype=dtype), x.new_empty((2 * C + 2 * N * C,), dtype=dtype)


def _backward_fake(grad, x, gamma, beta, saved, batch_statistics, eps):
    C, dtype = x.shape[1], compute_dtype(x)
    return torch.empty_like(x), x.new_empty((C,), dtype=dtype), x.new_empty((C,), dtype=dtype)


_FORWARD = define_kernels(
    "norm_relu_pool_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, "
    "Tensor? running_var, float eps) -> (Tensor pooled, Tensor saved)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "norm_relu_pool_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, Tensor saved, "
    "bool batch_statistics, float eps) -> (Tensor, Tensor, Tensor)",
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
                g_x if needs[0] else None, g_gamma.to(gamma.dtype) if needs[1] else None,
                g_beta.to(beta.dtype) if needs[2] else None, None, None, None, None,
            )
        return first_order(OP, (x, gamma, beta, grad), found)


def _conv_forward_fake(x, weight, stride, gamma, beta, running_mean, running_var, eps):
    N, K = x.shape[0], weight.shape[0]
    z = x.new_empty((N, (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1, K))  # channels last
    return x.new_empty((N, K)), z, x.new_empty((2 * K + 2 * N * K,))


def _conv_backward_fake(
    grad, x, weight, stride, z, gamma, beta, saved, batch_statistics, eps, needs_x, needs_weight
):
    K = weight.shape[0]
    g_x = torch.empty_like(x) if needs_x else x.new_empty((0,))
    g_weight = torch.empty_like(weight) if needs_weight else x.new_empty((0,))
    return g_x, g_weight, x.new_empty((K,)), x.new_empty((K,))


_CONV_FORWARD = define_kernels(
    "conv_norm_relu_pool_forward(Tensor x, Tensor weight, int stride, Tensor? gamma, Tensor? beta, "
    "Tensor? running_mean, Tensor? running_var, float eps) -> (Tensor pooled, Tensor z, Tensor saved)",
    _conv_forward_fake,
    triton=False,
)["cpu"]
_CONV_BACKWARD = define_kernels(
    "conv_norm_relu_pool_backward(Tensor grad, Tensor x, Tensor weight, int stride, Tensor z, Tensor? gamma, "
    "Tensor? beta, Tensor saved, bool batch_statistics, float eps, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
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
                grad, x, weight, ctx.stride, z.contiguous(), gamma, beta, saved, *ctx.options, *needs[:2]
            )
            found = (
                g_x if needs[0] else None, g_weight if needs[1] else None, None,
                g_gamma.to(gamma.dtype) if needs[3] else None, g_beta.to(beta.dtype) if needs[4] else None,
                None, None, None,
            )
        return first_order(OP, (x, weight, gamma, beta, grad), found)
