"""Triton kernels of `supcon_loss`: M rows x_i (M, D), labels y_i, one loss an anchor.

A program owns BLOCK_M rows and goes over all M rows in tiles of BLOCK_N, so that no M x M matrix is stored.
No
two programs add to one number: results have the same bits in every run. Logits are to the base 2:

    s_ij = log2(e) / T * x_i . x_j / (|x_i| |x_j|),   l_i = log2 sum_{j != i} 2^s_ij,   p_ij = 2^(s_ij - l_i)
    loss_i = ln 2 (l_i - sum_{j in P(i)} s_ij / |P(i)|)
    d loss / d z_i = 1/T sum_{j != i} c_ij z_j
    c_ij = a_i p_ij + a_j p_ji - [y_i = y_j] (a_i / |P(i)| + a_j / |P(j)|)

a_i is the upstream gradient of loss_i, 0 for an anchor without positives. If the logits are bounded
(normalised rows, T > 0.025), the bound serves as maximum, and backward takes one exponential a pair instead
of two.

Products run on tensor cores. Within a tile they sum in float32; tiles of float32 rows are added in float32.
16-bit rows are multiplied as they are and scaled afterwards, which is exact. A float32 row is scaled by a
power of two such that its largest element is about 2^14, and split into two float16 numbers, x = hi + lo,
which hold 22
bits: hi hi + hi lo + lo hi is as exact as a sum of float32 products, and faster on every GPU since 2020.
Where torch allows TF32 in matmuls, hi is enough: it has TF32's 11 bits. c is split likewise.

If M is too small for the GPU, several programs share a row block, each takes a part of the columns, and a
second kernel adds up.
"""

from __future__ import annotations

import math
import typing

import torch
import triton
import triton.language as tl

from .target import INTERPRETED, capability, dot_precision, launched, multiprocessors, rounded

NORM_EPS = tl.constexpr(1e-12)  # supcon_loss.NORM_EPS
SUMS_APART = tl.constexpr(INTERPRETED)  # whose reductions by a function take a call an element
LN_2 = tl.constexpr(math.log(2))
FIXED_MAXIMUM_RANGE = 115.0  # 2 log2(e) / T up to which the least exponential, 2^-this, is a normal float32


# Kernels


@triton.jit
def _load_rows(x, rows, columns, M, stride, D, WIDEN):
    """x[rows, columns], 0 outside (M, D)."""
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    tile = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@launched
def split_kernel(
    x, hi, lo, factor, inverse, M, stride, D: tl.constexpr, NORMALIZE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """float32 rows times 2^k as hi + lo; factors that turn products into logits; NORMALIZE: 1 / |x_i|."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    largest = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        tile = _load_rows(x, rows, d + tl.arange(0, BLOCK_D), M, stride, D, True)
        largest = tl.maximum(largest, tl.abs(tile))
    # By their exponents, exactly. A row below 2^-112 is scaled as if it were there, a row of zeros too.
    exponent = tl.maximum((tl.max(largest, 1).to(tl.int32, bitcast=True) >> 23) & 255, 15)
    power = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)
        scaled = _load_rows(x, rows, columns, M, stride, D, True) * power[:, None]
        squares += scaled * scaled
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        high = scaled.to(tl.float16)
        tl.store(hi + at, high, mask=inside)
        if PARTS == 2:
            tl.store(lo + at, (scaled - high.to(tl.float32)).to(tl.float16), mask=inside)
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(squares, 1))
        alive = tl.where(norm <= power * NORM_EPS, 0.0, 1.0 / norm)
        tl.store(factor + rows, alive, mask=rows < M)
        tl.store(inverse + rows, alive * power, mask=rows < M)
    else:
        tl.store(factor + rows, 1.0 / power, mask=rows < M)


@triton.jit
def _dot(left, left_lo, right, right_lo, total, PARTS):
    """total + left @ right, of numbers in PARTS parts."""
    if PARTS == 2:
        total = tl.dot(left_lo, right, total)
        total = tl.dot(left, right_lo, total)
    return tl.dot(left, right, total)


@triton.jit
def _products(
    hi, lo, own, own_lo, rows, columns, M, stride, D, PARTS, WIDEN, SYMMETRIC, BLOCK_M, BLOCK_N, BLOCK_D,
    BLOCK_K,
):
    """x_i . x_j (BLOCK_M, BLOCK_N), and the tile x_j (in its parts) where that is all of D.

    SYMMETRIC: the same bits for (i, j) and (j, i), by sums of their own for hi lo and lo hi. Logits of
    thousands need it: an ulp of one is as large as what a probability's exponent may be off by.
    """
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mixed_too = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if D <= BLOCK_D:
        other = _load_rows(hi, columns, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
        other_lo = other
        if PARTS == 2:
            other_lo = _load_rows(lo, columns, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
        if SYMMETRIC and PARTS == 2:
            mixed = tl.dot(own_lo, tl.trans(other), mixed)
            mixed_too = tl.dot(own, tl.trans(other_lo), mixed_too)
            products = tl.dot(own, tl.trans(other), products) + (mixed + mixed_too)
        else:
            products = _dot(own, own_lo, tl.trans(other), tl.trans(other_lo), products, PARTS)
        return products, other, other_lo
    else:
        for d in range(0, D, BLOCK_K):
            dimensions = d + tl.arange(0, BLOCK_K)
            left = _load_rows(hi, rows, dimensions, M, stride, D, WIDEN)
            right = tl.trans(_load_rows(hi, columns, dimensions, M, stride, D, WIDEN))
            if PARTS == 2:
                mixed = tl.dot(_load_rows(lo, rows, dimensions, M, stride, D, WIDEN), right, mixed)
                right_lo = tl.trans(_load_rows(lo, columns, dimensions, M, stride, D, WIDEN))
                mixed_too = tl.dot(left, right_lo, mixed_too)
            products = tl.dot(left, right, products)
        if PARTS == 2:
            products += mixed + mixed_too
        return products, own, own_lo


@triton.jit
def _store_loss(loss, lse, counts, rows, M, maximum, total, positive, count):
    l = maximum + tl.log2(total)
    value = tl.where(count > 0, (l - positive / tl.maximum(count, 1.0)) * LN_2, 0.0)
    tl.store(loss + rows, value, mask=rows < M)
    tl.store(lse + rows, l, mask=rows < M)
    tl.store(counts + rows, count, mask=rows < M)


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _row_sums(a, b, c):
    if SUMS_APART:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    # in one reduction: apart, Triton would lay the one without logits out anew, and compare the labels twice
    else:
        return tl.reduce((a, b, c), 1, _add_three)


@launched
def forward_kernel(
    hi, lo, labels, factor, loss, lse, counts, partial, M, stride, scale, D: tl.constexpr,
    SCALED: tl.constexpr, FIXED_MAXIMUM: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss, l and |P| of a row block; SPLITS > 1: four sums over a split, in partial (4, SPLITS, M)."""
    rows, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    own = _load_rows(hi, rows, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
    own_lo = own
    if PARTS == 2:
        own_lo = _load_rows(lo, rows, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
    label = tl.load(labels + rows, mask=rows < M, other=0)
    root = tl.sqrt(scale)
    own_factor = tl.zeros((BLOCK_M,), tl.float32) + root
    if SCALED:
        own_factor *= tl.load(factor + rows, mask=rows < M, other=0.0)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if FIXED_MAXIMUM:
        maximum = tl.zeros((BLOCK_M,), tl.float32) + scale
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    share = tl.cdiv(tl.cdiv(M, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(split * share, tl.minimum((split + 1) * share, M), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        s, _, _ = _products(
            hi, lo, own, own_lo, rows, columns, M, stride, D, PARTS, WIDEN, not FIXED_MAXIMUM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
        )
        if SCALED:
            other_factor = root * tl.load(factor + columns, mask=columns < M, other=0.0)
            s *= own_factor[:, None] * other_factor[None, :]  # the same bits for (i, j) and (j, i)
        else:
            s *= scale
        counted = (rows[:, None] != columns[None, :]) & (columns < M)[None, :]
        same = counted & (label[:, None] == tl.load(labels + columns, mask=columns < M, other=0)[None, :])
        masked = tl.where(counted, s, -float("inf"))
        taken = maximum
        if not FIXED_MAXIMUM:
            larger = tl.maximum(maximum, tl.max(masked, 1))
            taken = tl.where(larger == -float("inf"), 0.0, larger)  # of a row that has met no other yet
            total *= tl.exp2(maximum - taken)
            maximum = larger
        more, more_positive, more_count = _row_sums(
            tl.exp2(masked - taken[:, None]), tl.where(same, s, 0.0), tl.where(same, 1.0, 0.0)
        )
        total += more
        positive += more_positive
        count += more_count
    if SPLITS == 1:
        _store_loss(loss, lse, counts, rows, M, maximum, total, positive, count)
    else:
        at, step = partial + split * M + rows, SPLITS * M
        tl.store(at, maximum, mask=rows < M)
        tl.store(at + step, total, mask=rows < M)
        tl.store(at + 2 * step, positive, mask=rows < M)
        tl.store(at + 3 * step, count, mask=rows < M)


@launched
def join_kernel(partial, loss, lse, counts, M, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """What the splits of `forward_kernel` found, as one."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = SPLITS * M
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(SPLITS):
        at = partial + split * M + rows
        theirs = tl.load(at, mask=rows < M, other=-float("inf"))
        larger = tl.maximum(maximum, theirs)
        taken = tl.where(larger == -float("inf"), 0.0, larger)
        more = tl.load(at + step, mask=rows < M, other=0.0)
        total = total * tl.exp2(maximum - taken) + more * tl.exp2(theirs - taken)
        maximum = larger
        positive += tl.load(at + 2 * step, mask=rows < M, other=0.0)
        count += tl.load(at + 3 * step, mask=rows < M, other=0.0)
    _store_loss(loss, lse, counts, rows, M, maximum, total, positive, count)


@launched
def coefficients_kernel(
    grad, lse, counts, factor, out, largest, M, grad_stride, scale, SCALED: tl.constexpr,
    FIXED_MAXIMUM: tl.constexpr, BLOCK: tl.constexpr,
):
    """What an anchor adds to every c of its row and column, out (3, M): w = a 2^(bound - l), or a where there
    is no bound; a / |P|; l.

    largest[0] = max |a| times max factor: a quarter of what no c_ij z_j / x_j exceeds. One program, since
    that is over all rows.
    """
    largest_a = tl.zeros((BLOCK,), tl.float32)
    largest_factor = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        count = tl.load(counts + rows, mask=rows < M, other=0.0)
        l = tl.load(lse + rows, mask=rows < M, other=0.0)
        a = tl.load(grad + rows.to(tl.int64) * grad_stride, mask=(rows < M) & (count > 0), other=0.0)
        w = a
        if FIXED_MAXIMUM:
            # l is -inf for a lone anchor, which has no positives
            w = tl.where(count > 0, a * tl.exp2(scale - l), 0.0)
        tl.store(out + rows, w, mask=rows < M)
        tl.store(out + M + rows, a / tl.maximum(count, 1.0), mask=rows < M)
        tl.store(out + 2 * M + rows, l, mask=rows < M)
        largest_a = tl.maximum(largest_a, tl.abs(a))
        if SCALED:
            largest_factor = tl.maximum(largest_factor, tl.load(factor + rows, mask=rows < M, other=0.0))
    most = tl.max(largest_a, 0)
    if SCALED:
        most *= tl.max(largest_factor, 0)
    tl.store(largest, most)


@triton.jit
def _load_coefficients(coefficients, rows, M, FIXED_MAXIMUM):
    """(w, a / |P|, l) as `coefficients_kernel` left them; l only where it is needed."""
    w = tl.load(coefficients + rows, mask=rows < M, other=0.0)
    b = tl.load(coefficients + M + rows, mask=rows < M, other=0.0)
    l = w
    if not FIXED_MAXIMUM:
        l = tl.load(coefficients + 2 * M + rows, mask=rows < M, other=0.0)
    return w, b, l


@triton.jit
def _tangential(gradient, row, inverse):
    """The gradient of x from that of z = x / |x|: what is left of it across x, over |x|."""
    z = row * inverse[:, None]
    return inverse[:, None] * (gradient - z * tl.sum(z * gradient, 1)[:, None])


@launched
def backward_kernel(
    coefficients, largest, hi, lo, labels, factor, out, M, stride, scale, D: tl.constexpr,
    SCALED: tl.constexpr, FIXED_MAXIMUM: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of z of a row block, BLOCK_D columns of it, from one split's rows: out (SPLITS, M, D)."""
    rows, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    dimensions = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = _load_rows(hi, rows, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
    own_lo = own
    if PARTS == 2:
        own_lo = _load_rows(lo, rows, tl.arange(0, BLOCK_D), M, stride, D, WIDEN)
    label = tl.load(labels + rows, mask=rows < M, other=0)
    w, b, l = _load_coefficients(coefficients, rows, M, FIXED_MAXIMUM)
    root = tl.sqrt(scale)
    own_factor = tl.zeros((BLOCK_M,), tl.float32) + root
    if SCALED:
        own_factor *= tl.load(factor + rows, mask=rows < M, other=0.0)
    unit = 1.0  # brings c into the range of float16; bfloat16 has that of float32
    if hi.dtype.element_ty == tl.float16:
        most = tl.load(largest)
        unit = tl.where((most > 0) & (most < float("inf")), 8192.0 / most, 1.0)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    share = tl.cdiv(tl.cdiv(M, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(split * share, tl.minimum((split + 1) * share, M), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        s, other, other_lo = _products(
            hi, lo, own, own_lo, rows, columns, M, stride, D, PARTS, WIDEN, not FIXED_MAXIMUM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
        )
        if D > BLOCK_D:
            other = _load_rows(hi, columns, dimensions, M, stride, D, WIDEN)
            other_lo = other
            if PARTS == 2:
                other_lo = _load_rows(lo, columns, dimensions, M, stride, D, WIDEN)
        to_z = unit
        if SCALED:
            other_factor = tl.load(factor + columns, mask=columns < M, other=0.0)
            s *= own_factor[:, None] * (root * other_factor)[None, :]
            to_z = (unit * other_factor)[None, :]
        else:
            s *= scale
        w_j, b_j, l_j = _load_coefficients(coefficients, columns, M, FIXED_MAXIMUM)
        if FIXED_MAXIMUM:
            c = tl.exp2(s - scale) * (w[:, None] + w_j[None, :])
        else:
            c = w[:, None] * tl.exp2(s - l[:, None]) + w_j[None, :] * tl.exp2(s - l_j[None, :])
        same = label[:, None] == tl.load(labels + columns, mask=columns < M, other=0)[None, :]
        c -= tl.where(same, b[:, None] + b_j[None, :], 0.0)
        c = tl.where((rows[:, None] != columns[None, :]) & (columns < M)[None, :], c * to_z, 0.0)
        c_hi = c.to(other.dtype)
        c_lo = c_hi
        if PARTS == 2:
            c_lo = (c - c_hi.to(tl.float32)).to(other.dtype)
        # Not summed on in the tensor cores: they cut off what a float32 add rounds, by 2e-5 of the sum over
        # 4096 columns. (One part is summed there: Triton makes one instruction of a product and a sum. It
        # holds 11 bits at the most.)
        gradient += _dot(c_hi, c_lo, other, other_lo, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PARTS)
    gradient *= (scale / unit) * LN_2  # log2(e) / T back to 1 / T
    inside = (rows < M)[:, None] & (dimensions < D)[None, :]
    at = split.to(tl.int64) * M * D + rows.to(tl.int64)[:, None] * D + dimensions[None, :]
    tl.store(out + at, rounded(gradient, out.dtype.element_ty), mask=inside)


@launched
def finish_kernel(
    partial, x, inverse, out, M, stride, D: tl.constexpr, NORMALIZE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The splits of `backward_kernel` added up, and the gradient of x from that of z."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(SPLITS):
        gradient += tl.load(partial + tl.cast(split, tl.int64) * M * D + at, mask=inside, other=0.0)
    if NORMALIZE:
        row = _load_rows(x, rows, columns, M, stride, D, True)
        gradient = _tangential(gradient, row, tl.load(inverse + rows, mask=rows < M, other=0.0))
    tl.store(out + at, rounded(gradient, out.dtype.element_ty), mask=inside)


# Launchers, with the arguments of the op's schema


class _Rows(typing.NamedTuple):
    """Rows as the kernels multiply them: one or two parts, and the factors that turn products into logits."""

    hi: torch.Tensor
    lo: torch.Tensor
    factor: torch.Tensor
    scaled: bool
    parts: int


def forward(features, labels, temperature, normalize):
    """Loss (M,) float32 and (1 / |x|, l, |P|) (3, M). Copies features unless rows are contiguous."""
    x, labels = _contiguous_rows(features), _integers(labels)
    M, D = x.shape
    loss = torch.empty(M, dtype=torch.float32, device=x.device)
    saved = torch.empty((3, M), dtype=torch.float32, device=x.device)
    if M == 0:
        return loss, saved
    inverse, lse, counts = saved.unbind(0)
    if not normalize:
        inverse.fill_(1)
    elif x.dtype != torch.float32:
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        inverse.copy_(torch.where(norms <= NORM_EPS.value, 0.0, 1 / norms))
    rows = _split(x, inverse, normalize)
    scale = math.log2(math.e) / temperature
    bounded = _bounded(scale, normalize)
    tiles = choose_tiles(capability(x.device), rows.parts, D, bounded)
    splits = _splits(M, tiles, 1, x.device)
    partial = torch.empty((4, splits, M), dtype=torch.float32, device=x.device) if splits > 1 else loss
    forward_kernel[(triton.cdiv(M, tiles.blocks[0]), splits)](
        rows.hi, rows.lo, labels, rows.factor, loss, lse, counts, partial, M, rows.hi.stride(0), scale,
        D, rows.scaled, bounded, splits, rows.parts, _widen(rows.hi),
        *tiles.blocks, num_warps=tiles.warps, num_stages=tiles.stages,
    )
    if splits > 1:
        join_kernel[(triton.cdiv(M, 128),)](partial, loss, lse, counts, M, splits, 128)
    return loss, saved


def backward(grad, features, labels, saved, temperature, normalize):
    """Gradient (M, D) in the dtype of the features."""
    x, labels = _contiguous_rows(features), _integers(labels)
    M, D = x.shape
    out = torch.empty((M, D), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    inverse, lse, counts = saved.unbind(0)
    rows = _split(x, torch.empty_like(inverse) if x.dtype == torch.float32 else inverse, normalize)
    scale = math.log2(math.e) / temperature
    bounded = _bounded(scale, normalize)
    scratch = torch.empty(3 * M + 1, dtype=torch.float32, device=x.device)
    coefficients, largest = scratch[:-1], scratch[-1:]
    coefficients_kernel[(1,)](
        grad, lse, counts, rows.factor, coefficients, largest, M, grad.stride(0), scale, rows.scaled, bounded,
        4096, num_warps=8,
    )
    tiles = choose_tiles(capability(x.device), rows.parts, D, bounded, backward=True)
    chunks = triton.cdiv(D, tiles.blocks[2])
    splits = _splits(M, tiles, chunks, x.device)
    whole = splits == 1 and not normalize
    gradient = out if whole else torch.empty((splits, M, D), dtype=torch.float32, device=x.device)
    backward_kernel[(triton.cdiv(M, tiles.blocks[0]), splits, chunks)](
        coefficients, largest, rows.hi, rows.lo, labels, rows.factor, gradient, M, rows.hi.stride(0), scale,
        D, rows.scaled, bounded, splits, rows.parts, _widen(rows.hi),
        *tiles.blocks, num_warps=tiles.warps, num_stages=tiles.stages,
    )
    if not whole:
        block_m, block_d = row_block(D, D)
        finish_kernel[(triton.cdiv(M, block_m),)](
            gradient, x, inverse, out, M, x.stride(0), D, normalize, splits, block_m, block_d
        )
    return out


def _split(x: torch.Tensor, inverse: torch.Tensor, normalize: bool) -> _Rows:
    """x as the kernels multiply it; ``inverse``, 1 / |x|: written for float32 if ``normalize``, else read."""
    if x.dtype != torch.float32:
        return _Rows(x, x, inverse, normalize, 1)
    M, D = x.shape
    parts = 1 if dot_precision(x.dtype, capability(x.device)) == "tf32" else 2
    pieces = torch.empty((parts, M, D), dtype=torch.float16, device=x.device)
    factor = torch.empty(M, dtype=torch.float32, device=x.device)
    block_m, block_d = row_block(D, 1024)
    split_kernel[(triton.cdiv(M, block_m),)](
        x, pieces[0], pieces[-1], factor, inverse, M, x.stride(0), D, normalize, parts, block_m, block_d
    )
    return _Rows(pieces[0], pieces[-1], factor, True, parts)


def row_block(D: int, most: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_D) of a kernel that goes over rows, at most ``most`` columns at a time."""
    block_d = triton.next_power_of_2(min(D, most))
    return max(1, 2048 // block_d), block_d


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _integers(labels: torch.Tensor) -> torch.Tensor:
    labels = labels.contiguous()
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def _widen(x: torch.Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def _bounded(scale: float, normalize: bool) -> bool:
    return normalize and 2 * scale < FIXED_MAXIMUM_RANGE


def _splits(M: int, tiles: Tiles, chunks: int, device: torch.device) -> int:
    """Programs that share a row block: two for each multiprocessor, if each gets at least two tiles."""
    blocks = triton.cdiv(M, tiles.blocks[0]) * chunks
    wanted = triton.next_power_of_2(triton.cdiv(2 * multiprocessors(device), blocks))
    return max(1, min(wanted, MOST_SPLITS, triton.cdiv(M, 2 * tiles.blocks[1])))


# Tile sizes

MOST_SPLITS = 16


class Tiles(typing.NamedTuple):
    blocks: tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_D and, for D > BLOCK_D, BLOCK_K
    warps: int
    stages: int


def choose_tiles(cc: int, parts: int, D: int, bounded: bool, backward: bool = False) -> Tiles:
    """Tiles for rows (M, D) in ``parts`` parts. All of D is one tile up to 128; beyond, backward takes the
    logits once for every 128.

    Found by compiling ahead of time: the largest that spill no register and leave room for two blocks a
    multiprocessor where a row block has 64 rows.
    """
    block_d = min(128, max(16, triton.next_power_of_2(D)))
    # wgmma takes both operands from shared memory; the older mma from registers, which eight warps have twice
    # as many of.
    if cc in (90, 100, 103):
        block_n = 64 if D <= block_d and (bounded or (cc != 90 and not backward)) else 32
        # the logits' sums and two of the gradient's share the registers
        if backward and parts == 2 and D > block_d:
            block_n = 16
        return Tiles((64, block_n, block_d, 64), 4, 2)
    if backward and parts == 2:
        return Tiles((128, 32 if cc == 80 and bounded and D <= block_d else 16, block_d, 32), 8, 2)
    return Tiles((64, 64 if bounded and D <= block_d else 32, block_d, 32), 4, 2)
