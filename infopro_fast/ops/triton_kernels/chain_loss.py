"""Triton kernels of a chain decoder's last stage: the convolution to 3 channels and the loss of its logits.

    s = conv3x3(resize(a)) + bias          (N, 3, H, W), float32, transient       `chain_stage`
    loss = mean of the loss of a pixel     loss_kernel, a partial sum a program, added up in float64
    ds                                     gradient_kernel, in place of s

Forward and backward each compute s, the only tensor of the image's size. Bytes a sample, beside a stage's:
24 H W forward, 60 H W backward (the sums of ds and the convolution's gradients read it again), and the image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import chain_stage as stage
from .target import launched

BLOCK = 1024  # pixels of a plane that a program takes


@triton.jit
def _pixel_loss(s, t, LOSS):
    """Loss of a pixel from its logit s and target t, and the derivative in s; nothing overflows or cancels.

    LOSS: index into the losses of `reconstruction_loss`: 0, bce; 1, mse; 2, l1.
    """
    e = tl.exp(-tl.abs(s))
    inverse = 1 / (1 + e)
    small = e * inverse  # sigmoid(-|s|)
    if LOSS == 0:
        log1p = tl.where(e < 0.01, e * (1 - e * (0.5 - e * (1.0 / 3 - e * 0.25))), tl.log(1 + e))
        loss = tl.where(s > 0, s * (1 - t), -s * t) + log1p
        return loss, tl.where(s > 0, (1 - t) - small, small - t)
    off = tl.where(s > 0, (1 - t) - small, small - t)
    slope = small * inverse
    if LOSS == 1:
        return off * off, 2 * off * slope
    return tl.abs(off), tl.where(off > 0, slope, tl.where(off < 0, -slope, 0.0))


@triton.jit
def _pixels(s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK):
    """This program's block of one of the 3 N planes: logits, targets, offsets, and a mask."""
    blocks = tl.cdiv(HW, BLOCK)
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, o = (plane // 3).to(tl.int64), plane % 3
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HW
    row, column = (pixel // W).to(tl.int64), (pixel % W).to(tl.int64)
    at = n * stride_n + o.to(tl.int64) * stride_o + row * stride_y + column * stride_x
    target = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
    if RESTORE:  # the image from its normalised form
        mean = tl.where(o == 0, m0, tl.where(o == 1, m1, m2))
        deviation = tl.where(o == 0, d0, tl.where(o == 1, d1, d2))
        target = target * deviation + mean
        slack = 1.0
    else:
        slack = 1.0 / 512
    clamped = tl.minimum(tl.maximum(target, 0.0), 1.0)  # or nan: `image_target`
    target = tl.where(tl.abs(target - clamped) <= slack, clamped, float("nan"))
    place = plane.to(tl.int64) * HW + pixel
    return tl.load(s + place, mask=inside, other=0.0), target, place, inside


@launched
def loss_kernel(
    s, image, partial, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2,
    RESTORE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):
    logit, target, place, inside = _pixels(
        s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK
    )
    loss, slope = _pixel_loss(logit, target, LOSS)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))


@launched
def gradient_kernel(
    s, image, grad, weight, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2,
    RESTORE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Replace s by grad * weight * d loss / d s."""
    logit, target, place, inside = _pixels(
        s, image, W, HW, stride_n, stride_o, stride_y, stride_x, m0, m1, m2, d0, d1, d2, RESTORE, BLOCK
    )
    loss, slope = _pixel_loss(logit, target, LOSS)
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
    loss_kernel[grid](s, image, partial, *sizes, *compiled)
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
        gradient_kernel[grid](s, image, grad, 1.0 / s.numel(), *sizes, *compiled)
    return *stage.through(s, x, norm, weight, mode, needs_x, needs_weight), s.sum((0, 2, 3))
