"""Resize and 3x3 convolution without the resized map, as at each doubling in decoders of U-Nets, GANs and
VAEs.

    z = conv3x3(resize(x)) + bias      (N, K, H, W), zero padding 1

Both are linear, so conv3x3(resize(x)) = sum over taps of shift(resize(W_tap x)): nine 1x1 convolutions at the
size of x, and a sparse expansion. The nine are one product of matrices, of 9 K h w C multiply-adds in place
of 9 K H W C. Backward is the transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import check_floating, compute_dtype, define_kernels, first_order, no_autocast, resolve
from .resize import resize_of

OP = "upsample_conv3x3"
MODES = ("bilinear", "nearest")


def upsample_conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: int | tuple[int, int],
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Return conv2d(interpolate(x, size, mode=mode, align_corners=align_corners), weight, bias, padding=1).

    Args:
        x: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
        weight, bias: (K, C, 3, 3), and (K,) or None.
        size: (H, W), or one number for both; larger or smaller than (h, w).
        mode: "bilinear" or "nearest".
        align_corners: for bilinear, whether the corner pixels of the two maps coincide.
        impl: "auto", "reference", "cpu" or "triton". A named implementation runs or raises.

    Returns:
        (N, K, H, W), contiguous, in x's dtype. The arithmetic is float64 if x or weight is, else float32.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.

    The kernels keep x and weight for backward. They copy an upstream gradient that is not contiguous.
    """
    H, W = _check(x, weight, bias, size, mode, align_corners)
    chosen = resolve(OP, impl, {"x": x, "weight": weight, "bias": bias})
    if chosen == "reference":
        return upsample_conv3x3_ref(x, weight, bias, (H, W), mode, align_corners)
    resize = resize_of(mode, align_corners)
    return _UpsampleConv3x3.apply(x, weight, bias, H, W, resize, chosen).to(x.dtype)


def upsample_conv3x3_ref(x, weight, bias, size, mode="bilinear", align_corners=False):
    """The specification, in plain torch: arguments as in `upsample_conv3x3`, size as a pair."""
    dtype = compute_dtype(x, weight)
    with no_autocast(x.device):
        if x.shape[0] == 0:
            touched = x.sum() + weight.sum() + (0 if bias is None else bias.sum())
            return x.new_zeros((0, weight.shape[0], *size)) + touched.to(x.dtype) * 0
        corners = align_corners if mode == "bilinear" else None
        resized = F.interpolate(x.to(dtype), size, mode=mode, align_corners=corners)
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(resized, weight.to(dtype), bias, padding=1).to(x.dtype)


def _check(x, weight, bias, size, mode, align_corners) -> tuple[int, int]:
    check_floating(OP, {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias}))
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{OP}: x: expected (N, C, h, w) with C, h and w at least 1, got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight: expected (K, {x.shape[1]}, 3, 3), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or any(isinstance(n, float) or n < 1 for n in pair):
        raise ValueError(f"{OP}: size: expected one or two positive integers, got {size}")
    if mode not in MODES:
        raise ValueError(f"{OP}: mode: expected one of {MODES}, got {mode!r}")
    if mode == "nearest" and align_corners:
        expected = "False with mode 'nearest', which has no corners to align"
        raise ValueError(f"{OP}: align_corners: expected {expected}, got {align_corners}")
    return pair


def _forward_fake(x, weight, bias, H, W, resize):
    return x.new_empty((x.shape[0], weight.shape[0], H, W), dtype=compute_dtype(x, weight))


def _forward_fake_triton(x, weight, bias, H, W, resize):
    return x.new_empty((x.shape[0], weight.shape[0], H, W))  # the kernel rounds what it writes


def _backward_fake(grad, x, weight, resize, needs_x, needs_weight):
    g_weight = x.new_empty(weight.shape if needs_weight else (0,), dtype=compute_dtype(x, weight))
    return torch.empty_like(x) if needs_x else x.new_empty((0,)), g_weight


_FORWARD = define_kernels(
    "upsample_conv3x3_forward(Tensor x, Tensor weight, Tensor? bias, int H, int W, int resize) -> Tensor",
    _forward_fake,
    triton_fake=_forward_fake_triton,
)
_BACKWARD = define_kernels(
    "upsample_conv3x3_backward(Tensor grad, Tensor x, Tensor weight, int resize, bool needs_x, "
    "bool needs_weight) -> (Tensor, Tensor)",
    _backward_fake,
)


class _UpsampleConv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, H, W, resize, impl):
        ctx.save_for_backward(x, weight, bias)
        ctx.resize = resize
        ctx.impl = impl
        return _FORWARD[impl](x, weight, bias, H, W, resize)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.no_grad():
            grad = grad.contiguous()
            g_x, g_weight = _BACKWARD[ctx.impl](grad, x, weight, ctx.resize, needs[0], needs[1])
            g_bias = grad.sum((0, 2, 3), dtype=compute_dtype(x, weight)).to(bias.dtype) if needs[2] else None
            g_weight = g_weight.to(weight.dtype) if needs[1] else None
        found = (g_x if needs[0] else None, g_weight, g_bias, None, None, None, None)
        return first_order(OP, (x, weight, bias, grad), found)
