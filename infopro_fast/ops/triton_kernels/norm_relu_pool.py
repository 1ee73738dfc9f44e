"""Triton kernels of `norm_relu_pool`: x (N, C, h, w), its maps flattened to HW = h w pixels.

Forward reads x twice: torch finds the mean and variance of each channel (skipped if running statistics are
given); `pool_kernel` finds the pooled map, and for each map the number of positive y and the sum of their
normalised x. Backward finds two sums a channel from those 2 N C numbers (`sums_kernel`) and reads x once
more for the gradient (`gradient_kernel`).

Memory traffic: 3 reads and 1 write of x, and nothing else of that size. Sums are taken in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .target import launched, rounded

# Kernels


@triton.jit
def _load_norm(mean, var, gamma, beta, channels, C, eps, AFFINE):
    """(mean, 1 / standard deviation, gamma, beta) of these channels, float32."""
    inside = channels < C
    inverse = 1.0 / tl.sqrt_rn(tl.load(var + channels, mask=inside, other=1.0).to(tl.float32) + eps)
    scale = tl.full(channels.shape, 1.0, tl.float32)
    shift = tl.zeros(channels.shape, tl.float32)
    if AFFINE:
        scale = tl.load(gamma + channels, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(beta + channels, mask=inside, other=0.0).to(tl.float32)
    return tl.load(mean + channels, mask=inside, other=0.0).to(tl.float32), inverse, scale, shift


@launched
def pool_kernel(
    x, mean, var, gamma, beta, saved, pooled, N, C, stride_n, stride_c, stride_p, eps, HW: tl.constexpr,
    AFFINE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Pool BLOCK_C maps of one sample.

    ``saved`` gets mean and variance, which the first sample's programs write as float32, and for each map the
    number of positive y and the sum of their normalised x.
    """
    n, channels = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, inverse, scale, shift = _load_norm(mean, var, gamma, beta, channels, C, eps, AFFINE)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    positive = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    normalised = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    base = x + n.to(tl.int64) * stride_n + channels.to(tl.int64)[:, None] * stride_c
    for start in range(0, HW, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = (channels < C)[:, None] & (pixel < HW)[None, :]
        tile = tl.load(base + pixel.to(tl.int64)[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
        xhat = (tile - centre[:, None]) * inverse[:, None]
        y = xhat * scale[:, None] + shift[:, None]
        total += tl.where((y <= 0) | (pixel >= HW)[None, :], 0.0, y)  # nan stays
        counted = (y > 0) & inside
        positive += tl.where(counted, 1.0, 0.0)
        normalised += tl.where(counted, xhat, 0.0)
    at = n.to(tl.int64) * C + channels
    tl.store(pooled + at, tl.sum(total, 1) * (1.0 / HW), mask=channels < C)
    counts = saved + 2 * C
    tl.store(counts + at, tl.sum(positive, 1), mask=channels < C)
    tl.store(counts + tl.cast(N, tl.int64) * C + at, tl.sum(normalised, 1), mask=channels < C)
    if n == 0:
        tl.store(saved + channels, centre, mask=channels < C)
        variance = tl.load(var + channels, mask=channels < C).to(tl.float32)
        tl.store(saved + C + channels, variance, mask=channels < C)


@launched
def sums_kernel(
    grad, saved, g_gamma, g_beta, N, C, grad_stride_n, grad_stride_c, HW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of beta and gamma: sums over all pixels of dy, and of dy times normalised x."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dy = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_dy_xhat = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    counts = saved + 2 * C
    normalised = counts + tl.cast(N, tl.int64) * C
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None] & (channels < C)[None, :]
        at = n[:, None] * grad_stride_n + channels[None, :] * grad_stride_c
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / HW)
        at = n[:, None] * C + channels[None, :]
        sum_dy += g * tl.load(counts + at, mask=inside, other=0.0)
        sum_dy_xhat += g * tl.load(normalised + at, mask=inside, other=0.0)
    tl.store(g_beta + channels, tl.sum(sum_dy, 0), mask=channels < C)
    tl.store(g_gamma + channels, tl.sum(sum_dy_xhat, 0), mask=channels < C)


@launched
def gradient_kernel(
    grad, x, saved, gamma, beta, g_gamma, g_beta, out, N, C, grad_stride_n, grad_stride_c, stride_n, stride_c,
    stride_p, out_stride_n, out_stride_c, out_stride_p, eps, HW: tl.constexpr, AFFINE: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Gradient of BLOCK_C maps of one sample."""
    n, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, inverse, scale, shift = _load_norm(saved, saved + C, gamma, beta, channels, C, eps, AFFINE)
    at = n * grad_stride_n + channels * grad_stride_c
    g = tl.load(grad + at, mask=channels < C, other=0.0).to(tl.float32) * (1.0 / HW)
    mean_dy = tl.zeros((BLOCK_C,), tl.float32)
    mean_dy_xhat = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH_STATISTICS:
        share = 1.0 / (tl.cast(N, tl.float32) * HW)
        mean_dy = tl.load(g_beta + channels, mask=channels < C, other=0.0) * share
        mean_dy_xhat = tl.load(g_gamma + channels, mask=channels < C, other=0.0) * share
    base = x + n * stride_n + channels.to(tl.int64)[:, None] * stride_c
    out_base = out + n * out_stride_n + channels.to(tl.int64)[:, None] * out_stride_c
    for start in range(0, HW, BLOCK_P):
        pixel = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (channels < C)[:, None] & (pixel < HW)[None, :]
        tile = tl.load(base + pixel[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
        xhat = (tile - centre[:, None]) * inverse[:, None]
        dy = tl.where(xhat * scale[:, None] + shift[:, None] > 0, g[:, None], 0.0)
        dx = (dy - mean_dy[:, None] - xhat * mean_dy_xhat[:, None]) * (scale * inverse)[:, None]
        tl.store(out_base + pixel[None, :] * out_stride_p, rounded(dx, out.dtype.element_ty), mask=inside)


# Launchers, with the arguments of the op's schema


def forward(x, gamma, beta, running_mean, running_var, eps):
    """Pooled (N, C) float32 and (mean, var, positives, sums of normalised x): 2 C + 2 N C numbers.

    Maps whose rows are not evenly spaced (a slice of wider maps) are copied first.
    """
    x, strides = _flat_maps(x)
    N, C, HW = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    pooled = torch.empty((N, C), dtype=torch.float32, device=x.device)
    saved = torch.empty(2 * C + 2 * N * C, dtype=torch.float32, device=x.device)
    running = running_mean is not None
    if N == 0:
        saved[:C] = running_mean if running else 0
        saved[C:] = running_var if running else 1
        return pooled, saved
    mean, var = (running_mean.contiguous(), running_var.contiguous()) if running else _statistics(x)
    affine = gamma is not None
    gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (saved, saved)
    block_c, block_p = choose_tile(C, HW, strides[1] == 1)
    pool_kernel[(N, triton.cdiv(C, block_c))](
        x, mean, var, gamma, beta, saved, pooled, N, C, *strides, eps, HW, affine, block_c, block_p
    )
    return pooled, saved


def backward(grad, x, gamma, beta, saved, batch_statistics, eps):
    """Gradients of x (in its dtype and memory format), gamma and beta (C,) float32."""
    out = torch.empty_like(x)
    N, C, HW = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    g_gamma, g_beta = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(2))
    if N == 0:
        return out, g_gamma.zero_(), g_beta.zero_()
    x, strides = _flat_maps(x)
    flat, out_strides = _flat_maps(out)  # a copy where x was one: filled, then copied back
    block_c = min(32, triton.next_power_of_2(C))
    sums_kernel[(triton.cdiv(C, block_c),)](
        grad, saved, g_gamma, g_beta, N, C, *grad.stride(), HW, 64, block_c
    )
    affine = gamma is not None
    gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (saved, saved)
    block_c, block_p = choose_tile(C, HW, strides[1] == 1)
    gradient_kernel[(N, triton.cdiv(C, block_c))](
        grad, x, saved, gamma, beta, g_gamma, g_beta, flat, N, C, *grad.stride(), *strides, *out_strides, eps,
        HW, affine, batch_statistics, block_c, block_p, num_warps=GRADIENT_WARPS,
    )
    return out if flat is out else out.copy_(flat), g_gamma, g_beta


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, float32."""
    if x.device.type != "cuda":  # interpreted
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    else:  # float32 for 16-bit x too, where torch.var_mean rounds; eps = 0 would turn a variance of 0 to inf
        mean, inverse = torch.batch_norm_stats(x, 1e-30)
        var = inverse.pow(-2)
    return mean, var


def _flat_maps(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """x, copied if the pixels of a map are not evenly spaced, and its strides: sample, channel, pixel."""
    h, w = x.shape[2:]
    if w == 1:
        return x, (x.stride(0), x.stride(1), x.stride(2))
    if h > 1 and x.stride(2) != w * x.stride(3):
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(3))


# Tile sizes

GRADIENT_WARPS = 8  # four would spill on compute capability 10.0


def choose_tile(C: int, HW: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P) of the passes over one sample's maps: 2048 numbers, contiguous ones first."""
    if channels_last:
        block_c = min(64, triton.next_power_of_2(C))
        return block_c, min(triton.next_power_of_2(HW), 2048 // block_c)
    block_p = min(256, triton.next_power_of_2(HW))
    return min(triton.next_power_of_2(C), 2048 // block_p), block_p
