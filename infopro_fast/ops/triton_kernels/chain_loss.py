"""Triton kernels of a chain decoder's last stage: the convolution to 3 channels and the loss of its logits.

    s = conv3x3(resize(a)) + bias          (N, 3, H, W), float32, transient       `chain_stage`
    loss = mean of the loss of a pixel     _loss_kernel, a partial sum a program, added up in float64
    ds                                     _gradient_kernel, in place of s

Forward and backward each compute s, the only tensor of the image's size. Bytes a sample, beside a stage's:
24 H W forward, 60 H W backward (the sums of ds and the convolution's gradients read it again), and the image.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from . import chain_stage as stage
from .pixel import load_target, pixel_loss
from .target import Compilation, compilation, launched

BLOCK = 1024  # pixels of a plane that a program takes


@triton.jit
def _pixels(s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK):
    """This program's block of one of the 3 N planes: logits, targets, offsets, and a mask."""
    blocks = tl.cdiv(HW, BLOCK)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, o = (plane // 3).to(tl.int64), plane % 3
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HW
    mean = tl.where(o == 0, m0, tl.where(o == 1, m1, m2))
    deviation = tl.where(o == 0, d0, tl.where(o == 1, d1, d2))
    row, column = (pixel // W).to(tl.int64), (pixel % W).to(tl.int64)
    at = n * stride_n + o.to(tl.int64) * stride_o + row * stride_y + column * stride_x
    target = load_target(image, at, inside, mean, deviation, RESTORE)
    place = plane.to(tl.int64) * HW + pixel
    return tl.load(s + place, mask=inside, other=0.0), target, place, inside


@launched
def _loss_kernel(
    s, image, partial, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2,
    RESTORE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):
    logit, target, place, inside = _pixels(
        s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK
    )
    loss, slope = pixel_loss(logit, target, LOSS)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))


@launched
def _gradient_kernel(
    s, image, grad, weight, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2,
    RESTORE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Replace s by grad * weight * d loss / d s."""
    logit, target, place, inside = _pixels(
        s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK
    )
    loss, slope = pixel_loss(logit, target, LOSS)
    tl.store(s + place, slope * (tl.load(grad).to(tl.float32) * weight), mask=inside)


# Launchers: the arguments of the ops' schemas


def _logits(x, norm, weight, bias, image, mode) -> torch.Tensor:
    a = x if norm is None else stage.Activation(x, norm)
    return stage.convolve(a, weight, bias, *image.shape[2:], mode)


def _common(s: torch.Tensor, image: torch.Tensor, restore: list[float], loss: int) -> tuple[
    tuple[int], tuple, tuple
]:
    """Grid, sizes and strides, and what is compiled in."""
    N, _, H, W = s.shape
    sizes = (W, H * W, *image.stride(), *(restore or [0.0] * 6))
    return (3 * N * triton.cdiv(H * W, BLOCK),), sizes, (bool(restore), loss, BLOCK)


def forward(x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, in_f64):
    """`chain_loss_forward`: mean loss, 0-d float32; 0 for an empty batch."""
    if x.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float32)
    s = _logits(x, stage.norm_of(mean, var, gamma, beta, eps), weight, bias, image, mode)
    grid, sizes, compiled = _common(s, image, restore, loss)
    partial = torch.empty(grid, dtype=torch.float32, device=s.device)
    _loss_kernel[grid](s, image, partial, *sizes, *compiled)
    return (partial.sum(dtype=torch.float64) / s.numel()).float()


def backward(
    grad, x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, needs_x,
    needs_weight,
):
    """`chain_loss_backward`: the results of `chain_stage_backward`, and the bias's gradient (3,)."""
    norm = stage.norm_of(mean, var, gamma, beta, eps)
    if x.shape[0] == 0:
        s = x.new_empty((0, 3, *image.shape[2:]), dtype=torch.float32)
    else:
        s = _logits(x, norm, weight, bias, image, mode)
        grid, sizes, compiled = _common(s, image, restore, loss)
        _gradient_kernel[grid](s, image, grad, 1.0 / s.numel(), *sizes, *compiled)
    return *stage.through(s, x, norm, weight, mode, needs_x, needs_weight), s.sum((0, 2, 3))


# For tests that compile ahead of time


def configurations(cc: int) -> typing.Iterator[Compilation]:
    """Both kernels with each loss, dtype and layout of the image, and for one pixel."""
    cases = [
        ("fp32", 0, True, {"stride_x": 1}), ("bf16", 1, True, {"stride_o": 1}),
        ("fp16", 2, False, {"W": 1, "HW": 1, "stride_x": 1}),
    ]
    for dtype, loss, restore, fixed in cases:
        for kernel in (_loss_kernel, _gradient_kernel):
            floats = dict.fromkeys(("weight", "m0", "m1", "m2", "d0", "d1", "d2"), "fp32")
            fixed |= {"RESTORE": restore, "LOSS": loss, "BLOCK": BLOCK}
            yield compilation(kernel, floats | {"image": f"*{dtype}"}, fixed)
