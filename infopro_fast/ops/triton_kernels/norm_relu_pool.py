"""Triton kernels of `norm_relu_pool`: x (N, C, h, w), its maps flattened to HW = h w pixels.

Forward reads x twice: `_statistics_kernel` finds the mean and variance of each channel (skipped if running
statistics are given); `_pool_kernel` finds the pooled map, and for each map the number of positive y and the
sum of their normalised x. Backward finds two sums a channel from those 2 N C numbers (`_sums_kernel`) and
reads x once more for the gradient (`_gradient_kernel`).

Memory traffic: 3 reads and 1 write of x, and nothing else of that size. Sums are taken in a fixed order.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .target import Compilation, compilation, launched, multiprocessors, rounded

# Kernels


@triton.jit
def _merge(count, mean, m2, more, more_mean, more_m2):
    """(count, mean, sum of squared deviations) of two samples as of one (Chan et al. 1979)."""
    total = count + more
    delta = more_mean - mean
    part = more / tl.maximum(total, 1.0)
    return total, mean + delta * part, m2 + more_m2 + delta * delta * (count * part)


@launched
def _statistics_kernel(
    x, partial, N, C, stride_n, stride_c, stride_p, HW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Mean and sum of squared deviations of BLOCK_C channels over this program's share of the N HW pixels:
    partial (SPLITS, 2, C).

    With SPLITS = 1 the second is the variance already.
    """
    channels, split = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    pixels = tl.cast(N, tl.int64) * HW
    share = tl.cdiv(tl.cdiv(pixels, BLOCK_P), SPLITS) * BLOCK_P
    last = tl.minimum((split + 1) * share, pixels)
    for start in range(split * share, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        at = (pixel // HW) * stride_n + (pixel % HW) * stride_p
        inside = (channels < C)[:, None] & (pixel < last)[None, :]
        at = channels.to(tl.int64)[:, None] * stride_c + at[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        more = tl.minimum(last - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(tile, 1) / more
        deviation = tl.where(inside, tile - tile_mean[:, None], 0.0)
        count, mean, m2 = _merge(count, mean, m2, more, tile_mean, tl.sum(deviation * deviation, 1))
    if SPLITS == 1:
        m2 /= count
    tl.store(partial + split * 2 * C + channels, mean, mask=channels < C)
    tl.store(partial + split * 2 * C + C + channels, m2, mask=channels < C)


@launched
def _join_kernel(
    partial, saved, N, C, HW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Mean and biased variance from what the splits of `_statistics_kernel` found."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    pixels = tl.cast(N, tl.int64) * HW
    share = tl.cdiv(tl.cdiv(pixels, BLOCK_P), SPLITS) * BLOCK_P
    for split in range(SPLITS):
        more = tl.maximum(tl.minimum((split + 1) * share, pixels) - split * share, 0).to(tl.float32)
        theirs = tl.load(partial + split * 2 * C + channels, mask=channels < C, other=0.0)
        their_m2 = tl.load(partial + split * 2 * C + C + channels, mask=channels < C, other=0.0)
        count, mean, m2 = _merge(count, mean, m2, more, theirs, their_m2)
    tl.store(saved + channels, mean, mask=channels < C)
    tl.store(saved + C + channels, m2 / count, mask=channels < C)


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
def _pool_kernel(
    x, mean, var, gamma, beta, saved, pooled, N, C, stride_n, stride_c, stride_p, eps, HW: tl.constexpr,
    AFFINE: tl.constexpr, RUNNING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Pool BLOCK_C maps of one sample.

    ``saved`` gets, for each map, the number of positive y and the sum of their normalised x. RUNNING: mean
    and variance are the layer's, and the first sample's programs write them into ``saved`` as float32.
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
    if RUNNING:
        if n == 0:
            tl.store(saved + channels, centre, mask=channels < C)
            variance = tl.load(var + channels, mask=channels < C).to(tl.float32)
            tl.store(saved + C + channels, variance, mask=channels < C)


@launched
def _sums_kernel(
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
def _gradient_kernel(
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
    if running:
        mean, var = running_mean.contiguous(), running_var.contiguous()
    else:
        mean, var = saved[:C], saved[C:]
        _statistics(x, strides, saved)
    affine = gamma is not None
    gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (saved, saved)
    block_c, block_p = choose_tile(C, HW, strides[1] == 1)
    _pool_kernel[(N, triton.cdiv(C, block_c))](
        x, mean, var, gamma, beta, saved, pooled, N, C, *strides, eps, HW, affine, running, block_c, block_p
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
    _sums_kernel[(triton.cdiv(C, block_c),)](
        grad, saved, g_gamma, g_beta, N, C, *grad.stride(), HW, 64, block_c
    )
    affine = gamma is not None
    gamma, beta = (gamma.contiguous(), beta.contiguous()) if affine else (saved, saved)
    block_c, block_p = choose_tile(C, HW, strides[1] == 1)
    _gradient_kernel[(N, triton.cdiv(C, block_c))](
        grad, x, saved, gamma, beta, g_gamma, g_beta, flat, N, C, *grad.stride(), *strides, *out_strides, eps,
        HW, affine, batch_statistics, block_c, block_p, num_warps=GRADIENT_WARPS,
    )
    return out if flat is out else out.copy_(flat), g_gamma, g_beta


def _statistics(x: torch.Tensor, strides: tuple[int, int, int], saved: torch.Tensor) -> None:
    """Mean and biased variance of each channel, into saved[: 2 C]."""
    N, C, HW = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    block_c, block_p = choose_statistics_tile(C, strides[1] == 1)
    blocks, tiles = triton.cdiv(C, block_c), triton.cdiv(N * HW, block_p)
    splits = triton.next_power_of_2(triton.cdiv(4 * multiprocessors(x.device), blocks))
    # four tiles a program at least
    splits = max(1, min(splits, MOST_SPLITS, triton.next_power_of_2(tiles) // 4))
    partial = torch.empty((splits, 2, C), dtype=torch.float32, device=x.device) if splits > 1 else saved
    _statistics_kernel[(blocks, splits)](x, partial, N, C, *strides, HW, splits, block_c, block_p)
    if splits > 1:
        _join_kernel[(triton.cdiv(C, 32),)](partial, saved, N, C, HW, splits, 32, block_p, num_warps=1)


def _flat_maps(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """x, copied if the pixels of a map are not evenly spaced, and its strides: sample, channel, pixel."""
    h, w = x.shape[2:]
    if w == 1:
        return x, (x.stride(0), x.stride(1), x.stride(2))
    if h > 1 and x.stride(2) != w * x.stride(3):
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(3))


# Tile sizes

MOST_SPLITS = 256
GRADIENT_WARPS = 8  # four would spill on compute capability 10.0


def choose_tile(C: int, HW: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P) of the passes over one sample's maps: 2048 numbers, contiguous ones first."""
    if channels_last:
        block_c = min(64, triton.next_power_of_2(C))
        return block_c, min(triton.next_power_of_2(HW), 2048 // block_c)
    block_p = min(256, triton.next_power_of_2(HW))
    return min(triton.next_power_of_2(C), 2048 // block_p), block_p


def choose_statistics_tile(C: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P) of the statistics, whose pixels go on through all samples."""
    block_c, block_p = (32, 128) if channels_last else (8, 512)
    return min(block_c, triton.next_power_of_2(C)), block_p


# For tests that compile ahead of time


def configurations(cc: int) -> typing.Iterator[Compilation]:
    """Every kernel for the paper's maps: 64 channels of 8x8, contiguous and channels_last; 2048 of 7x7."""
    types = {"eps": "fp32"}
    cases = ("fp32", 64, 64, False), ("fp32", 64, 64, True), ("bf16", 64, 64, True), ("fp32", 2048, 49, False)
    for dtype, C, HW, channels_last in cases:
        x = types | {"x": f"*{dtype}", "out": f"*{dtype}"}
        fixed = {"stride_c": 1, "out_stride_c": 1} if channels_last else {"stride_p": 1, "out_stride_p": 1}
        block_c, block_p = choose_statistics_tile(C, channels_last)
        tile = {"HW": HW, "SPLITS": 64, "BLOCK_C": block_c, "BLOCK_P": block_p}
        yield compilation(_statistics_kernel, x, fixed | tile)
        block_c, block_p = choose_tile(C, HW, channels_last)
        tile = {"HW": HW, "AFFINE": True, "BLOCK_C": block_c, "BLOCK_P": block_p}
        yield compilation(_pool_kernel, x, fixed | tile | {"RUNNING": False})
        yield compilation(
            _gradient_kernel, x, fixed | tile | {"BATCH_STATISTICS": True}, warps=GRADIENT_WARPS
        )
    one = {"N": 1, "C": 1, "stride_p": 1, "out_stride_p": 1}  # integers that are 1 are compiled in
    tile = {"HW": 9, "AFFINE": False, "BLOCK_C": 1, "BLOCK_P": 16}
    yield compilation(_statistics_kernel, types, one | tile | {"SPLITS": 1})
    yield compilation(_pool_kernel, types, one | tile | {"RUNNING": True})
    yield compilation(_gradient_kernel, types, one | tile | {"BATCH_STATISTICS": True}, warps=GRADIENT_WARPS)
    yield compilation(_sums_kernel, types, one | {"HW": 9, "BLOCK_N": 64, "BLOCK_C": 1})
    yield compilation(_join_kernel, types, {"HW": 64, "SPLITS": 64, "BLOCK_C": 32, "BLOCK_P": 512}, warps=1)
    yield compilation(_sums_kernel, types, {"HW": 64, "BLOCK_N": 64, "BLOCK_C": 32})
