"""Triton kernels of `upsample_conv3x3`: x (N, C, h, w), weight (K, C, 3, 3), z (N, K, H, W); R is the resize.

The convolution mixes channels and gathers nine neighbours. R gathers too, and gathering commutes with mixing:
so torch.bmm mixes channels at the size of x, for as many samples at a time as fit a GPU's second cache, and a
kernel here does the rest:

    T[tap, k] = sum over c of W[k, c, tap] x[c]                                    bmm
    z[k](Y, X) = b[k] + sum over taps of R(T[tap, k])(Y + dy - 1, X + dx - 1)      expand_kernel
    dT[tap, k] = R^T (dz[k], shifted by the tap)                                   collect_kernel
    dx = W^T dT, dW = dT x^T                                                       bmm

Multiply-adds a sample: 9 K C h w for a product, against 9 K C H W for a convolution of the resized map.
Programs of the expansion go down a strip of rows and keep rows of T, expanded in x, in registers: K H W (6 +
18 h / H). Its bytes: T, written and read, 72 K h w, mostly in the cache, and z. Mixing inside a kernel would
save T but needs tiles gathered from registers, which Triton lacks, or a scratch of each program. With many C
and K the product is most of the work, and cuBLAS's is best.

Transient: T or dT, at most MOST numbers or one sample's; dW of each sample of a chunk. Kept: x and weight.
Operands of products are float32, or 16-bit if x and weight both have the same 16 bits (dT is then rounded
once, as torch rounds the gradient of its resized map); sums are float32. Deterministic: each number has one
program, which adds in a fixed order.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .resize import places, takers
from .target import launched, rounded

MOST = 2**23  # 32 MiB of float32, which the second caches of an H100 and an A100 hold beside the output
MOST_SAMPLES = 2**15  # in one call of cuBLAS, whose batches are counted in 16 bits for some types
ROWS = 8  # of z, that a program of the expansion goes down


@triton.jit
def _column(low, weights, total, e, w, MODE):
    """Entries e of a table of places: source columns below and above, and their weights, 0 outside."""
    below = tl.load(low + e)
    above = tl.minimum(below + 1, w - 1) if MODE != 1 else below
    return below, above, tl.load(weights + e), tl.load(weights + total + e)


@triton.jit
def _expanded(row, next_tap, columns, inside, MODE):
    """Sum over dx of a row of T[dy, dx], resized in x and shifted. row: pointers to T[dy, 0, k]."""
    low0, high0, a0, b0 = columns[0]
    low1, high1, a1, b1 = columns[1]
    low2, high2, a2, b2 = columns[2]
    in0, in1 = inside & (a0 + b0 > 0)[None, :], inside & (a1 + b1 > 0)[None, :]
    in2 = inside & (a2 + b2 > 0)[None, :]
    total = tl.load(row + low0[None, :], mask=in0, other=0.0) * a0[None, :]
    total += tl.load(row + next_tap + low1[None, :], mask=in1, other=0.0) * a1[None, :]
    total += tl.load(row + 2 * next_tap + low2[None, :], mask=in2, other=0.0) * a2[None, :]
    if MODE != 1:
        total += tl.load(row + high0[None, :], mask=in0, other=0.0) * b0[None, :]
        total += tl.load(row + next_tap + high1[None, :], mask=in1, other=0.0) * b1[None, :]
        total += tl.load(row + 2 * next_tap + high2[None, :], mask=in2, other=0.0) * b2[None, :]
    return total


@triton.jit
def _row_of(e, held, below, above, low, weights, total, source, next_tap, columns, inside, h, w, MODE):
    """(source row held, its expansion, the next row's, row e - 1 of the resized sum over dx or 0)."""
    y = tl.load(low + e)
    a, b = tl.load(weights + e), tl.load(weights + total + e)
    if y != held:
        if y == held + 1 and MODE != 1:
            below = above
        else:
            below = _expanded(source + y * w, next_tap, columns, inside, MODE)
        if MODE != 1:
            next_row = source + tl.minimum(y + 1, h - 1) * w
            above = _expanded(next_row, next_tap, columns, inside, MODE)
    row = below * a
    if MODE != 1:
        row += above * b
    return y, below, above, tl.where(a + b > 0, row, 0.0)


@launched
def expand_kernel(
    mixed, bias, out, low, weights, K, h, w, H, W, BIAS: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):
    """z of BLOCK_K channels in BLOCK_X columns of ROWS rows, from mixed (n, 9 K, h w)."""
    blocks_x, blocks_y = tl.cdiv(W, BLOCK_X), tl.cdiv(H, ROWS)
    program = tl.program_id(0)
    X, Y0 = program % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X), program // blocks_x % blocks_y * ROWS
    block = program // (blocks_x * blocks_y)
    blocks_k = tl.cdiv(K, BLOCK_K)
    n, k = (block // blocks_k).to(tl.int64), block % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k < K)[:, None]
    next_tap = tl.cast(K, tl.int64) * h * w
    source = mixed + 9 * n * next_tap + (k.to(tl.int64) * h * w)[:, None]
    total = H + W + 4
    first = H + 2 + tl.minimum(X, W - 1)
    columns = (
        _column(low, weights, total, first, w, MODE), _column(low, weights, total, first + 1, w, MODE),
        _column(low, weights, total, first + 2, w, MODE),
    )
    source1, source2 = source + 3 * next_tap, source + 6 * next_tap
    shift = tl.zeros((BLOCK_K,), tl.float32)
    if BIAS:
        shift = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    held0 = tl.full((), -2, tl.int32)  # none
    held1 = tl.full((), -2, tl.int32)
    held2 = tl.full((), -2, tl.int32)
    below0 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    below1 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    below2 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    above0 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    above1 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    above2 = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    for Y in range(Y0, tl.minimum(Y0 + ROWS, H)):
        held0, below0, above0, row0 = _row_of(
            Y, held0, below0, above0, low, weights, total, source, next_tap, columns, inside, h, w, MODE
        )
        held1, below1, above1, row1 = _row_of(
            Y + 1, held1, below1, above1, low, weights, total, source1, next_tap, columns, inside, h, w, MODE
        )
        held2, below2, above2, row2 = _row_of(
            Y + 2, held2, below2, above2, low, weights, total, source2, next_tap, columns, inside, h, w, MODE
        )
        at = ((n * K + k) * H + Y)[:, None] * W + X[None, :]
        z = rounded(row0 + row1 + row2 + shift[:, None], out.dtype.element_ty)
        tl.store(out + at, z, mask=inside & (X < W)[None, :])


@launched
def collect_kernel(
    grad, out, first, weights, K, h, w, H, W, COUNT_Y, COUNT_X, MODE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dT[dy, dx, k] of one dy, BLOCK_K channels and BLOCK_P pixels; grad (n, K, H, W), out (n, 9 K, h w)."""
    blocks_p, blocks_k = tl.cdiv(h * w, BLOCK_P), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    pixel, block = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P), program // blocks_p
    dy, k = block % 3, block // 3 % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (block // (3 * blocks_k)).to(tl.int64)
    inside = (k < K)[:, None] & (pixel < h * w)[None, :]
    y, x = tl.minimum(pixel // w, h - 1), pixel % w
    source = grad + ((n * K + k) * H * W)[:, None]
    of_rows, of_columns = weights + 2 * h + y, weights + (COUNT_Y + 4) * h + x
    first_row, first_column = tl.load(first + y), tl.load(first + h + x)
    total0 = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    total1 = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    total2 = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for step in range(0, COUNT_X + 2):  # a column of z meets three of the resized map
        X = first_column - 1 + step
        weight0, weight1 = tl.load(of_columns + step * w), tl.load(of_columns + (step + 1) * w)
        weight2 = tl.load(of_columns + (step + 2) * w)
        here = (X >= 0) & (X < W) & (weight0 + weight1 + weight2 > 0)
        rows = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        for row in range(0, COUNT_Y):
            Y, weight = first_row + row - dy + 1, tl.load(of_rows + row * h)
            taken = here & (Y >= 0) & (Y < H) & (weight > 0)
            g = tl.load(source + (Y * W + X)[None, :], mask=inside & taken[None, :], other=0.0).to(tl.float32)
            rows += g * weight[None, :]
        total0 += rows * weight0[None, :]
        total1 += rows * weight1[None, :]
        total2 += rows * weight2[None, :]
    at = out + ((n * 9 * K + dy * 3 * K + k) * h * w)[:, None] + pixel[None, :]
    next_tap = tl.cast(K, tl.int64) * h * w
    tl.store(at, rounded(total0, out.dtype.element_ty), mask=inside)
    tl.store(at + next_tap, rounded(total1, out.dtype.element_ty), mask=inside)
    tl.store(at + 2 * next_tap, rounded(total2, out.dtype.element_ty), mask=inside)


# Launchers, with the arguments of the op's schema


def forward(x, weight, bias, H, W, resize):
    """z (N, K, H, W), contiguous, in x's dtype. Copies the weight, and x if rows are not evenly spaced."""
    return convolve(x, weight, bias, H, W, resize, x.dtype)


def backward(grad, x, weight, resize, needs_x, needs_weight):
    """Gradients of x (like x) and weight (K, C, 3, 3), float32; (0,) where not needed."""
    g_x = torch.empty_like(x) if needs_x else x.new_empty((0,))
    if grad.numel() == 0 or not (needs_x or needs_weight):
        return g_x, torch.zeros(weight.shape if needs_weight else (0,), dtype=torch.float32, device=x.device)
    g_weight = write_gradients(grad.contiguous(), x, weight, resize, g_x if needs_x else None, needs_weight)
    return g_x, g_weight if needs_weight else g_x.new_empty((0,), dtype=torch.float32)


# The convolution. x, and in backward the gradient of z, may be made as they are asked for: they have a shape,
# a dtype and a device, and give the samples of a slice.


def convolve(x, weight, bias, H, W, resize, out_dtype):
    """z (N, K, H, W), contiguous."""
    (N, C, h, w), K = x.shape, weight.shape[0]
    _check_size(h, w, H, W)
    out = torch.empty((N, K, H, W), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    dtype, table = _operand(x, weight), places(h, w, H, W, resize, x.device)
    matrix = _by_taps(weight, dtype)
    for start, stop, mixed in _chunks(N, max(9 * K, C) * h * w, 9 * K * h * w, torch.float32, x.device):
        mixed = mixed.view(-1, 9 * K, h * w)
        _multiply(_each(matrix, stop - start), x[start:stop].flatten(2).to(dtype), mixed)
        _expand(mixed, bias, out[start:stop], h, w, resize, table)
    return out


def write_gradients(grad, x, weight, resize, g_x, needs_weight):
    """Write the gradient of x into g_x, unless None; return the weight's, float32, or None. No empty maps."""
    (N, C, h, w), (K, H, W), dtype = x.shape, grad.shape[1:], _operand(x, weight)
    matrix = _by_taps(weight, dtype)
    g_matrix, table = _Sum((9 * K, C), x.device), takers(h, w, H, W, resize, x.device)
    # the taps or what they add to the weight's gradient; dz; x
    numbers = max(9 * K * max(h * w, C), K * H * W, C * h * w)
    for start, stop, collected in _chunks(N, numbers, 9 * K * h * w, dtype, x.device):
        collected, count = collected.view(-1, 9 * K, h * w), stop - start
        _collect(grad[start:stop], collected, h, w, resize, table)
        if needs_weight:
            g_matrix.add(collected, x[start:stop].flatten(2).to(dtype).transpose(1, 2))
        if g_x is not None:
            _multiply_into_maps(_each(matrix.t(), count), collected, g_x[start:stop])
    return g_matrix.total.view(3, 3, K, C).permute(2, 3, 0, 1).contiguous() if needs_weight else None


def pointwise(x, weight, bias):
    """z (N, K, h, w), float32, of a 1x1 convolution without resize; x and weight as in `convolve`."""
    (N, C, h, w), K, dtype = x.shape, weight.shape[0], _operand(x, weight)
    out = torch.empty((N, K, h, w), dtype=torch.float32, device=x.device)
    matrix = weight.to(dtype).flatten(1)
    for start, stop in spans(N, max(K, C) * h * w):
        _multiply(_each(matrix, stop - start), x[start:stop].flatten(2).to(dtype), out[start:stop].flatten(2))
    return out if bias is None else out.add_(bias[:, None, None])


def pointwise_gradients(grad, x, weight, g_x, needs_weight):
    """As `write_gradients`."""
    (N, C, h, w), K, dtype = x.shape, weight.shape[0], _operand(x, weight)
    matrix, g_matrix = weight.to(dtype).flatten(1), _Sum((K, C), x.device)
    for start, stop in spans(N, max(K, C) * max(h * w, C)):
        given = grad[start:stop].flatten(2).to(dtype)
        if needs_weight:
            g_matrix.add(given, x[start:stop].flatten(2).to(dtype).transpose(1, 2))
        if g_x is not None:
            _multiply_into_maps(_each(matrix.t(), stop - start), given, g_x[start:stop])
    return g_matrix.total.view(weight.shape) if needs_weight else None


def _check_size(h: int, w: int, H: int, W: int) -> None:
    if max(h * w, H * W) >= 2**31:
        got = f"maps of ({h}, {w}) and size ({H}, {W})"
        raise ValueError(f"upsample_conv3x3: impl='triton' takes h w and H W below 2^31, got {got}")


# Products of matrices


def _operand(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What products take."""
    return x.dtype if x.dtype == weight.dtype else torch.float32


def _by_taps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(9 K, C), in row tap * K + k."""
    return weight.to(dtype).permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _each(matrix: torch.Tensor, count: int) -> torch.Tensor:
    return matrix.expand(count, *matrix.shape)


def _chunks(N: int, numbers: int, held: int, dtype: torch.dtype, device: torch.device):
    """(start, stop, buffer) of each chunk of samples: ``numbers`` a sample, ``held`` in the buffer."""
    buffer = None
    for start, stop in spans(N, numbers):
        if buffer is None:  # of the first, which are the most
            buffer = torch.empty((stop - start) * held, dtype=dtype, device=device)
        yield start, stop, buffer[: (stop - start) * held]


def spans(N: int, numbers: int) -> typing.Iterator[tuple[int, int]]:
    """The samples that are taken at once, at ``numbers`` a sample."""
    count = max(1, min(N, MOST // numbers, MOST_SAMPLES))
    for start in range(0, N, count):
        yield start, min(start + count, N)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b for batches of one dtype, summed in float32; autocast ignores calls with ``out``."""
    if a.device.type != "cuda":  # interpreted
        found = torch.empty(out.shape, dtype=torch.float32)
        torch.bmm(a.float(), b.float(), out=found)
        out.copy_(found)
    elif out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    elif out.dtype == torch.float32:
        torch.bmm(a, b, out_dtype=torch.float32, out=out)
    else:
        found = torch.empty(out.shape, dtype=a.dtype, device=a.device)
        torch.bmm(a, b, out=found)
        out.copy_(found)


def _multiply_into_maps(a: torch.Tensor, b: torch.Tensor, maps: torch.Tensor) -> None:
    """maps (n, C, h, w) = a @ b (n, C, h w), whatever their strides are."""
    h, w = maps.shape[2:]
    if h == 1 or w == 1 or maps.stride(2) == w * maps.stride(3):
        _multiply(a, b, maps.flatten(2))
        return
    found = torch.empty((*maps.shape[:2], h * w), dtype=maps.dtype, device=maps.device)
    _multiply(a, b, found)
    maps.copy_(found.view(maps.shape))


class _Sum:
    """The sum of products over samples, float32: chunk by chunk, in their order."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        self.shape, self.device = shape, device
        self.total: torch.Tensor | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        each = torch.empty((a.shape[0], *self.shape), dtype=torch.float32, device=self.device)
        _multiply(a, b, each)
        share = each.sum(0)
        self.total = share if self.total is None else self.total.add_(share)


# Launches


def _expand(
    mixed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, h: int, w: int, mode: int, table
) -> None:
    n, K, H, W = out.shape
    block_k, block_x = choose_tile(K, W)
    grid = (triton.cdiv(W, block_x) * triton.cdiv(H, ROWS) * n * triton.cdiv(K, block_k),)
    given = bias is not None
    expand_kernel[grid](
        mixed, bias.contiguous() if given else mixed, out, *table, K, h, w, H, W,
        given, mode, ROWS, block_k, block_x, num_warps=EXPAND_WARPS,
    )


def _collect(grad: torch.Tensor, out: torch.Tensor, h: int, w: int, mode: int, table) -> None:
    n, K, H, W = grad.shape
    first, weights, *most = table
    block_k, block_p = choose_tile(K, h * w)
    grid = (triton.cdiv(h * w, block_p) * 3 * n * triton.cdiv(K, block_k),)
    collect_kernel[grid](
        grad, out, first, weights, K, h, w, H, W, *most, mode, block_k, block_p
    )


# Tile sizes

EXPAND_WARPS = 8  # its rows and pointers would take 188 registers of each thread of four


def choose_tile(channels: int, width: int) -> tuple[int, int]:
    """(channels, columns) of a program: 512 numbers, at most 64 columns (neighbours in memory)."""
    block_x = min(64, triton.next_power_of_2(width))
    return min(triton.next_power_of_2(channels), 512 // block_x), block_x
