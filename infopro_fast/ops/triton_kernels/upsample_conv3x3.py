"""Triton kernels of `upsample_conv3x3`: x (N, C, h, w), weight (K, C, 3, 3), z (N, K, H, W); R is the resize.

The convolution mixes channels and gathers nine neighbours. R gathers too, and gathering commutes with mixing:
so torch.bmm mixes channels where there are fewer pixels, for as many samples at a time as fit a GPU's second
cache, and a kernel here does the rest. If h w < H W, or they are equal and K < C:

    T[tap, k] = sum over c of W[k, c, tap] x[c]                                    bmm
    z[k](Y, X) = b[k] + sum over taps of R(T[tap, k])(Y + dy - 1, X + dx - 1)      _expand_kernel
    dT[tap, k] = R^T (dz[k], shifted by the tap)                                   _collect_kernel
    dx = W^T dT, dW = dT x^T                                                       bmm

otherwise:

    U[tap, c](Y, X) = R(x[c])(Y + dy - 1, X + dx - 1)                              _neighbours_kernel
    z = b + W U                                                                    bmm
    dU = W^T dz, dW = dz U^T                                                       bmm
    dx[c] = sum over taps of R^T (dU[tap, c], shifted by the tap)                  _from_neighbours_kernel

Multiply-adds a sample: 9 K C min(h w, H W) for a product, against 9 K C H W for a convolution of the resized
map. Programs of the expansion go down a strip of rows and keep rows of T, expanded in x, in registers: K H W
(6 + 18 h / H). Its bytes: T, written and read, 72 K h w, mostly in the cache, and z. Mixing inside a kernel
would save T but needs tiles gathered from registers, which Triton lacks, or a scratch of each program, as in
`reconstruction_loss`, where C and K are few. Here they are many, the product is most of the work, and
cuBLAS's is best.

Transient: T, dT or U, at most MOST numbers or one sample's; dW of each sample of a chunk. Kept: x and weight.
Operands of products are float32, or 16-bit if x and weight both have the same 16 bits (dT, U and dU are then
rounded once, as torch rounds its resized map and gradient); sums are float32. Deterministic: each number has
one program, which adds in a fixed order.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from ..resize import fits
from . import resize as resizing
from .resize import places, takers
from .target import Compilation, compilation, launched, rounded

MOST = 2**23  # 32 MiB of float32, which the second caches of an H100 and an A100 hold beside the output
MOST_SAMPLES = 2**15  # in one call of cuBLAS, whose batches are counted in 16 bits for some types
ROWS = 8  # of z, that a program of the expansion goes down

# Channels mixed before the resize


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
def _expand_kernel(
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
def _collect_kernel(
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


# Channels mixed after the resize


@launched
def _neighbours_kernel(
    x, out, low, weights, C, h, w, H, W, stride_n, stride_c, stride_y, stride_x, MODE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """U[tap, c] for one tap, of BLOCK_C channels of BLOCK_P pixels of z; out (n, 9 C, H W)."""
    blocks_p, blocks_c = tl.cdiv(H * W, BLOCK_P), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    pixel, block = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P), program // blocks_p
    tap, c = block % 9, block // 9 % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (block // (9 * blocks_c)).to(tl.int64)
    row, column = tl.minimum(pixel // W, H - 1) + tap // 3, H + 2 + pixel % W + tap % 3
    total = H + W + 4
    y_low, x_low = tl.load(low + row).to(tl.int64), tl.load(low + column).to(tl.int64)
    ya, yb = tl.load(weights + row)[None, :], tl.load(weights + total + row)[None, :]
    xa, xb = tl.load(weights + column)[None, :], tl.load(weights + total + column)[None, :]
    inside = (c < C)[:, None] & (pixel < H * W)[None, :] & (ya + yb > 0) & (xa + xb > 0)
    source = x + n * stride_n + c.to(tl.int64)[:, None] * stride_c
    above, left = source + (y_low * stride_y)[None, :], (x_low * stride_x)[None, :]
    value = tl.load(above + left, mask=inside, other=0.0).to(tl.float32)
    if MODE != 1:
        below = source + (tl.minimum(y_low + 1, h - 1) * stride_y)[None, :]
        right = (tl.minimum(x_low + 1, w - 1) * stride_x)[None, :]
        value = value * xa + tl.load(above + right, mask=inside, other=0.0).to(tl.float32) * xb
        second = tl.load(below + left, mask=inside, other=0.0).to(tl.float32) * xa
        second += tl.load(below + right, mask=inside, other=0.0).to(tl.float32) * xb
        value = value * ya + second * yb
    at = ((n * 9 * C + tap * C + c) * H * W)[:, None] + pixel[None, :]
    tl.store(out + at, rounded(value, out.dtype.element_ty), mask=(c < C)[:, None] & (pixel < H * W)[None, :])


@launched
def _from_neighbours_kernel(
    grad, out, first, weights, C, h, w, H, W, COUNT_Y, COUNT_X, stride_n, stride_c, stride_y, stride_x,
    MODE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """dx of BLOCK_C channels of BLOCK_P pixels, from grad = dU (n, 9 C, H W)."""
    blocks_p, blocks_c = tl.cdiv(h * w, BLOCK_P), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    pixel, block = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P), program // blocks_p
    n, c = (block // blocks_c).to(tl.int64), block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (pixel < h * w)[None, :]
    y, x = tl.minimum(pixel // w, h - 1), pixel % w
    of_rows, of_columns = weights + 2 * h + y, weights + (COUNT_Y + 4) * h + 2 * w + x
    first_row, first_column = tl.load(first + y), tl.load(first + h + x)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for row in range(0, COUNT_Y):
        for step in range(0, COUNT_X):
            weight = tl.load(of_rows + row * h) * tl.load(of_columns + step * w)
            for tap in range(0, 9):
                Y, X = first_row + row - tap // 3 + 1, first_column + step - tap % 3 + 1
                taken = (Y >= 0) & (Y < H) & (X >= 0) & (X < W) & (weight > 0)
                source = grad + ((n * 9 * C + tap * C + c) * H * W)[:, None]
                g = tl.load(source + (Y * W + X)[None, :], mask=inside & taken[None, :], other=0.0)
                total += g.to(tl.float32) * weight[None, :]
    at = c.to(tl.int64)[:, None] * stride_c + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]
    tl.store(out + n * stride_n + at, rounded(total, out.dtype.element_ty), mask=inside)


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
    if _mixed_first(h * w, K, H * W, C):
        matrix = _by_taps(weight, dtype)
        for start, stop, mixed in _chunks(N, max(9 * K, C) * h * w, torch.float32, x.device, 9 * K * h * w):
            mixed = mixed.view(-1, 9 * K, h * w)
            _multiply(_each(matrix, stop - start), x[start:stop].flatten(2).to(dtype), mixed)
            _expand(mixed, bias, out[start:stop], h, w, resize, table)
        return out
    matrix = _beside(weight, dtype)
    for start, stop, found in _chunks(
        N, max(9 * C * H * W, K * H * W, C * h * w), dtype, x.device, 9 * C * H * W
    ):
        neighbours = found.view(-1, 9 * C, H * W)
        _neighbours(x[start:stop], neighbours, H, W, resize, table)
        _multiply_and_add(_each(matrix, stop - start), neighbours, bias, out[start:stop].view(-1, K, H * W))
    return out


def write_gradients(grad, x, weight, resize, g_x, needs_weight):
    """Write the gradient of x into g_x, unless None; return the weight's, float32, or None. No empty maps."""
    (C, h, w), (K, H, W) = x.shape[1:], grad.shape[1:]
    by = _backward_by_taps if _mixed_first(h * w, K, H * W, C) else _backward_beside
    return by(grad, x, weight, resize, g_x, needs_weight)


def _backward_by_taps(grad, x, weight, resize, g_x, needs_weight):
    (N, C, h, w), (K, H, W), dtype = x.shape, grad.shape[1:], _operand(x, weight)
    matrix = _by_taps(weight, dtype)
    g_matrix, table = _Sum((9 * K, C), x.device), takers(h, w, H, W, resize, x.device)
    # the taps or what they add to the weight's gradient; dz; x
    numbers = max(9 * K * max(h * w, C), K * H * W, C * h * w)
    for start, stop, collected in _chunks(N, numbers, dtype, x.device, 9 * K * h * w):
        collected, count = collected.view(-1, 9 * K, h * w), stop - start
        _collect(grad[start:stop], collected, h, w, resize, table)
        if needs_weight:
            g_matrix.add(collected, x[start:stop].flatten(2).to(dtype).transpose(1, 2))
        if g_x is not None:
            _multiply_into_maps(_each(matrix.t(), count), collected, g_x[start:stop])
    return g_matrix.total.view(3, 3, K, C).permute(2, 3, 0, 1).contiguous() if needs_weight else None


def _backward_beside(grad, x, weight, resize, g_x, needs_weight):
    (N, C, h, w), (K, H, W), dtype = x.shape, grad.shape[1:], _operand(x, weight)
    matrix = _beside(weight, dtype)
    g_matrix = _Sum((K, 9 * C), x.device)
    places_of = places(h, w, H, W, resize, x.device) if needs_weight else None
    takers_of = takers(h, w, H, W, resize, x.device) if g_x is not None else None
    numbers = max(9 * C * max(H * W, K), K * H * W, C * h * w)
    for start, stop, buffer in _chunks(N, numbers, dtype, x.device, 9 * C * H * W):
        buffer, given = buffer.view(-1, 9 * C, H * W), grad[start:stop].view(-1, K, H * W).to(dtype)
        if needs_weight:
            _neighbours(x[start:stop], buffer, H, W, resize, places_of)
            g_matrix.add(given, buffer.transpose(1, 2))
        if g_x is not None:
            _multiply(_each(matrix.t(), stop - start), given, buffer)
            _from_neighbours(buffer, g_x[start:stop], H, W, resize, takers_of)
    return g_matrix.total.view(K, 3, 3, C).permute(0, 3, 1, 2).contiguous() if needs_weight else None


def pointwise(x, weight, bias):
    """z (N, K, h, w), float32, of a 1x1 convolution without resize; x and weight as in `convolve`."""
    (N, C, h, w), K, dtype = x.shape, weight.shape[0], _operand(x, weight)
    out = torch.empty((N, K, h, w), dtype=torch.float32, device=x.device)
    matrix = weight.to(dtype).flatten(1)
    for start, stop in spans(N, max(K, C) * h * w):
        _multiply_and_add(
            _each(matrix, stop - start), x[start:stop].flatten(2).to(dtype), bias,
            out[start:stop].view(-1, K, h * w),
        )
    return out


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
    if not fits(h, w, H, W) or max(h * w, H * W) >= 2**31:
        raise ValueError(
            "upsample_conv3x3: impl='triton' takes 2 H h, 2 W w, h w and H W below 2^31, "
            f"got maps of ({h}, {w}) and size ({H}, {W})"
        )


def _mixed_first(pixels_x: int, K: int, pixels_z: int, C: int) -> bool:
    """Whether channels are mixed at the size of x: fewer pixels than z's, or as many and fewer channels."""
    return (pixels_x, K) < (pixels_z, C)


# Products of matrices


def _operand(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What products take."""
    return x.dtype if x.dtype == weight.dtype else torch.float32


def _by_taps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(9 K, C), in row tap * K + k."""
    return weight.to(dtype).permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _beside(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(K, 9 C), in column tap * C + c."""
    return weight.to(dtype).permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _each(matrix: torch.Tensor, count: int) -> torch.Tensor:
    return matrix.expand(count, *matrix.shape)


def _chunks(N: int, numbers: int, dtype: torch.dtype, device: torch.device, held: int | None = None):
    """(start, stop, buffer) of each chunk of samples: ``numbers`` a sample, ``held`` in the buffer."""
    buffer = None
    held = numbers if held is None else held
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


def _multiply_and_add(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out (n, K, pixels) = a @ b + bias, rounded once."""
    z = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    _multiply(a, b, z)
    if bias is not None:
        torch.add(z, bias[:, None], out=out)
    elif z is not out:
        out.copy_(z)


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
    _expand_kernel[grid](
        mixed, bias.contiguous() if given else mixed, out, *table, K, h, w, H, W,
        given, mode, ROWS, block_k, block_x, num_warps=EXPAND_WARPS,
    )


def _collect(grad: torch.Tensor, out: torch.Tensor, h: int, w: int, mode: int, table) -> None:
    n, K, H, W = grad.shape
    first, weights, *most = table
    block_k, block_p = choose_tile(K, h * w)
    grid = (triton.cdiv(h * w, block_p) * 3 * n * triton.cdiv(K, block_k),)
    _collect_kernel[grid](
        grad, out, first, weights, K, h, w, H, W, *most, mode, block_k, block_p, num_warps=WARPS
    )


def _neighbours(x: torch.Tensor, out: torch.Tensor, H: int, W: int, mode: int, table) -> None:
    n, C, h, w = x.shape
    block_c, block_p = choose_tile(C, H * W)
    grid = (triton.cdiv(H * W, block_p) * 9 * n * triton.cdiv(C, block_c),)
    _neighbours_kernel[grid](
        x, out, *table, C, h, w, H, W, *x.stride(), mode, block_c, block_p, num_warps=WARPS
    )


def _from_neighbours(grad: torch.Tensor, out: torch.Tensor, H: int, W: int, mode: int, table) -> None:
    n, C, h, w = out.shape
    first, weights, *most = table
    block_c, block_p = choose_tile(C, h * w, MOST_PIXELS)
    grid = (triton.cdiv(h * w, block_p) * n * triton.cdiv(C, block_c),)
    _from_neighbours_kernel[grid](
        grad, out, first, weights, C, h, w, H, W, *most, *out.stride(), mode, block_c, block_p,
        num_warps=WARPS,
    )


# Tile sizes

WARPS = 4
EXPAND_WARPS = 8  # its rows and pointers would take 188 registers of each thread of four
MOST_PIXELS = 128  # of `_from_neighbours_kernel`: one a thread, since several spill with Triton 3.9


def choose_tile(channels: int, width: int, most: int = 64) -> tuple[int, int]:
    """(channels, columns) of a program: 512 numbers, at most ``most`` columns (neighbours in memory)."""
    block_x = min(most, triton.next_power_of_2(width))
    return min(triton.next_power_of_2(channels), 512 // block_x), block_x


# For tests that compile ahead of time


def configurations(cc: int) -> typing.Iterator[Compilation]:
    """Every kernel for maps of 64 channels or more and for one channel (nearest); the tables' kernels."""
    yield from resizing.configurations(cc)
    for dtype, mode, channels in (("fp32", 2, 64), ("bf16", 0, 64), ("fp16", 1, 1)):
        ones = {"C": 1, "K": 1, "stride_x": 1} if channels == 1 else {}
        types = dict.fromkeys(("x", "grad", "out", "bias"), f"*{dtype}") | {"low": "*i32", "first": "*i32"}
        for kernel in (_expand_kernel, _collect_kernel, _neighbours_kernel, _from_neighbours_kernel):
            most = MOST_PIXELS if kernel is _from_neighbours_kernel else 64
            block, block_x = choose_tile(channels, 128, most)
            fixed = ones | {"MODE": mode, "BIAS": True, "ROWS": ROWS, "BLOCK_K": block, "BLOCK_C": block}
            fixed |= {"BLOCK_X": block_x, "BLOCK_P": block_x}
            warps = EXPAND_WARPS if kernel is _expand_kernel else WARPS
            yield compilation(kernel, types, fixed, ("COUNT_Y", "COUNT_X"), warps)
