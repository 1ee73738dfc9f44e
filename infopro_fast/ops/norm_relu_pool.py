"""BatchNorm2d, ReLU and global average pooling of an auxiliary head, fused.

    y = batch_norm(x)        (N, C, h, w)
    pooled = mean over the map of relu(y)      (N, C)

The layers (released code: networks/util.py, class AuxClassifier) keep x, the rectified map and its expanded gradient. The kernels
keep x and 2 N C + 2 C numbers: with g the gradient of a pooled number over h w, the sums that batch norm's backward needs are
g times how many y are positive, and g times the sum of their normalised x.
"""

from __future__ import annotations

import torch
from torch import nn

from .batch_norm import affine, batch_norm_ref, update_running_statistics, uses_batch_statistics
from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve

OP = "norm_relu_pool"


def norm_relu_pool(x: torch.Tensor, bn: nn.BatchNorm2d, *, impl: str = "auto") -> torch.Tensor:
    """Mean over each map of relu(bn(x)); running statistics move as in the layer's own forward.

    x: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
    bn: BatchNorm2d(C), affine or not, in training or eval mode.
    impl: "auto", "reference", "cpu" or "triton"; one that is named runs or raises.

    Returns (N, C) in x's dtype; the arithmetic is float64 for float64, else float32.
    Kept for backward by the kernels: x, the layer's parameters, and 2 N C + 2 C numbers.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    _check(x, bn)
    chosen = resolve(OP, impl, {"x": x, "bn.weight": bn.weight, "bn.bias": bn.bias})
    if chosen == "reference":
        return norm_relu_pool_ref(x, bn)
    batch_statistics = uses_batch_statistics(bn)
    running = (None, None) if batch_statistics else (bn.running_mean, bn.running_var)
    pooled, mean, var = _NormReluPool.apply(x, *affine(bn), *running, bn.eps, chosen)
    if batch_statistics and x.shape[0]:
        update_running_statistics(bn, mean, var, x.numel() // x.shape[1])
    return pooled.to(x.dtype)


def norm_relu_pool_ref(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """The specification, in plain torch: arguments as in `norm_relu_pool`."""
    dtype = compute_dtype(x)
    with no_autocast(x.device):
        if x.shape[0] == 0:
            touched = sum(p.sum() for p in (bn.weight, bn.bias) if p is not None)
            return (x.to(dtype).sum((2, 3)) + touched * 0).to(x.dtype)
        return batch_norm_ref(x.to(dtype), bn).relu().mean((2, 3)).to(x.dtype)


def _check(x, bn):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{OP}: x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not isinstance(bn, nn.BatchNorm2d):
        raise TypeError(f"{OP}: bn: expected a BatchNorm2d, got {type(bn).__name__}")
    if x.dim() != 4 or x.shape[1] != bn.num_features or 0 in x.shape[2:]:
        raise ValueError(f"{OP}: x: expected (N, {bn.num_features}, h, w) with maps of at least 1x1, got {tuple(x.shape)}")
    if uses_batch_statistics(bn) and x.shape[0] * x.shape[2] * x.shape[3] == 1:
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
