"""Triton kernels of `upsample_cross_entropy`: logits (N, C, h, w), labels (N, H, W).

Forward: a program owns BLOCK_P pixels of one row and goes over the classes in blocks of BLOCK_C with a
running maximum. It computes each logit from four source pixels, which neighbours share in the first cache,
keeps l, the log-sum-exp of every pixel, and writes two sums, which `finish_kernel` adds up.

Backward: a program owns BLOCK_W source pixels of one row y and BLOCK_C classes, and goes over the pixels that
sample them, BLOCK_P columns at a time. It sums the gradients of the logits down the rows, weighted by y, and
multiplies the sum by the weights of the columns, (BLOCK_P, BLOCK_W). No two programs add to one number:
results have the same bits in every run. Every exponential is taken twice, for both source rows; a second
buffer would save that and cost as much memory as the gradient.

A pixel's position is an exact fraction, as on the CPU; F.interpolate rounds it in float32. Labels out of
range are ignored.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .resize import first_output, taps
from .target import capability, dot_precision, launched, rounded

MEAN, SUM, NONE = range(3)  # linear_cross_entropy.REDUCTIONS
KEEP_LSE = 1  # in upsample_cross_entropy.KEEP

# Kernels


@triton.jit
def _first(k, IN, OUT, ALIGN_CORNERS):
    """First output position whose source position below is k or more; OUT if none is."""
    return tl.where(k <= 0, 0, first_output(k, IN, OUT, 0 if ALIGN_CORNERS else 2))


@triton.jit
def _resized(rows_low, rows_high, x_low, x_high, weight_x, weight_y, classes, inside, stride_c, stride_x):
    """Logits (BLOCK_C, BLOCK_P) of pixels of a row. rows_low, rows_high: pointers to class 0's."""
    at = classes.to(tl.int64)[:, None] * stride_c
    left = at + (x_low.to(tl.int64) * stride_x)[None, :]
    right = at + (x_high.to(tl.int64) * stride_x)[None, :]
    low_left = tl.load(rows_low + left, mask=inside, other=0.0).to(tl.float32)
    low_right = tl.load(rows_low + right, mask=inside, other=0.0).to(tl.float32)
    high_left = tl.load(rows_high + left, mask=inside, other=0.0).to(tl.float32)
    high_right = tl.load(rows_high + right, mask=inside, other=0.0).to(tl.float32)
    a, b = (1.0 - weight_x)[None, :], weight_x[None, :]
    return (low_left * a + low_right * b) * (1.0 - weight_y) + (high_left * a + high_right * b) * weight_y


@triton.jit
def _labels(target, X, W, C, stride_x, ignore_index):
    """(class, whether it counts) of pixels of one row; the class is 0 where it does not."""
    label = tl.load(target + X.to(tl.int64) * stride_x, mask=X < W, other=0).to(tl.int64)
    kept = (X < W) & (label != ignore_index) & (label >= 0) & (label < C)
    return tl.where(kept, label, 0).to(tl.int32), kept


@triton.jit
def _weights_of(class_weight, classes, inside, WEIGHTED):
    weight = tl.where(inside, 1.0, 0.0)
    if WEIGHTED:
        weight = tl.load(class_weight + classes, mask=inside, other=0.0).to(tl.float32)
    return weight


@launched
def forward_kernel(
    logits, target, class_weight, loss, lse, partial, confusion, C, h, w, H, W, ignore_index, smoothing,
    stride_n, stride_c, stride_y, stride_x, target_stride_n, target_stride_y, target_stride_x,
    ALIGN_CORNERS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, EACH: tl.constexpr,
    KEEP: tl.constexpr, CONFUSION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Losses and l of BLOCK_P pixels; sums of losses and targets' weights in partial (programs, 2)."""
    program, blocks = tl.program_id(0), tl.cdiv(W, BLOCK_P)
    X, row = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P), program // blocks
    Y, n = row % H, (row // H).to(tl.int64)
    target_row = target + n * target_stride_n + Y.to(tl.int64) * target_stride_y
    label, kept = _labels(target_row, X, W, C, target_stride_x, ignore_index)
    y_low, y_high, weight_y = taps(Y, h, H, 0 if ALIGN_CORNERS else 2)
    x_low, x_high, weight_x = taps(tl.minimum(X, W - 1), w, W, 0 if ALIGN_CORNERS else 2)
    rows_low = logits + n * stride_n + y_low.to(tl.int64) * stride_y
    rows_high = logits + n * stride_n + y_high.to(tl.int64) * stride_y
    top = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    at_target = tl.zeros((BLOCK_P,), tl.float32)
    deviation = tl.zeros((BLOCK_P,), tl.float32)  # sum over classes of w_c (x_c - top)
    weights = 0.0  # of the classes so far
    largest = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, C, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)
        inside = (classes < C)[:, None] & (X < W)[None, :]
        x = _resized(
            rows_low, rows_high, x_low, x_high, weight_x, weight_y, classes, inside, stride_c, stride_x
        )
        masked = tl.where((classes < C)[:, None], x, -float("inf"))
        block_top = tl.max(masked, 0)
        new_top = tl.maximum(top, block_top)
        taken = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - taken) + tl.sum(tl.exp(masked - taken[None, :]), 0)
        at_target += tl.sum(tl.where(classes[:, None] == label[None, :], x, 0.0), 0)
        if SMOOTH:
            class_weights = _weights_of(class_weight, classes, classes < C, WEIGHTED)
            fall = tl.where(top == -float("inf"), 0.0, top - taken)
            deviation += weights * fall + tl.sum(class_weights[:, None] * (x - taken[None, :]), 0)
            weights += tl.sum(class_weights, 0)
        if CONFUSION:
            first = tl.min(tl.where(masked == block_top[None, :], classes[:, None], C - 1), 0)
            largest = tl.where(block_top > top, first, largest)
        top = new_top
    log_sum = tl.log(total)
    weight = _weights_of(class_weight, label, kept, WEIGHTED)
    value = (1.0 - smoothing) * weight * (top - at_target + log_sum)
    if SMOOTH:
        value += smoothing / C * (weights * log_sum - deviation)
    value = tl.where(kept, value, 0.0)
    at = (n * H + Y) * W + X
    if EACH:
        tl.store(loss + at, value, mask=X < W)
    if KEEP:
        tl.store(lse + at, top + log_sum, mask=X < W)
    if CONFUSION:  # whole numbers: the same sum in any order
        counted = label.to(tl.int64) * C + largest
        tl.atomic_add(confusion + counted, tl.full((BLOCK_P,), 1, tl.int64), mask=kept, sem="relaxed")
    sums = partial + 2 * program.to(tl.int64)
    tl.store(sums, tl.sum(value, 0))
    tl.store(sums + 1, tl.sum(weight, 0))


@launched
def finish_kernel(
    partial, loss, divisor, count, MEAN_OF: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss and what it was divided by, from the sums of ``count`` programs; one program, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + 2 * at, mask=at < count, other=0.0).to(tl.float64)
        weight += tl.load(partial + 2 * at + 1, mask=at < count, other=0.0).to(tl.float64)
    divide = tl.sum(weight, 0)
    if not MEAN_OF:
        divide = divide * 0 + 1
    divide = tl.where(divide == 0, 1.0, divide)
    tl.store(divisor, divide)
    if not EACH:
        tl.store(loss, (tl.sum(total, 0) / divide).to(tl.float32))


@launched
def backward_kernel(
    grad, logits, target, class_weight, lse, divisor, out, C, h, w, H, W, ignore_index, smoothing,
    grad_stride_n, grad_stride_y, grad_stride_x, stride_n, stride_c, stride_y, stride_x, target_stride_n,
    target_stride_y, target_stride_x, out_stride_n, out_stride_c, out_stride_y, out_stride_x,
    ALIGN_CORNERS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Gradient of BLOCK_C classes of BLOCK_W source pixels of one row y."""
    blocks_w, blocks_c = tl.cdiv(w, BLOCK_W), tl.cdiv(C, BLOCK_C)
    first_column, rest = tl.program_id(0) % blocks_w * BLOCK_W, tl.program_id(0) // blocks_w
    y, rest = rest % h, rest // h
    n, classes = (rest // blocks_c).to(tl.int64), rest % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = first_column + tl.arange(0, BLOCK_W)
    class_weights = _weights_of(class_weight, classes, classes < C, WEIGHTED)
    weights = tl.cast(C, tl.float32)
    if SMOOTH and WEIGHTED:
        weights = 0.0
        for start in range(0, C, BLOCK_C):
            each = start + tl.arange(0, BLOCK_C)
            weights += tl.sum(_weights_of(class_weight, each, each < C, WEIGHTED), 0)
    scale = 1.0
    if not EACH:
        scale = tl.load(grad) / tl.load(divisor).to(tl.float32)
    last_X = _first(first_column + BLOCK_W, w, W, ALIGN_CORNERS)
    first_Y, last_Y = _first(y - 1, h, H, ALIGN_CORNERS), _first(y + 1, h, H, ALIGN_CORNERS)
    gradient = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    for start in range(_first(first_column - 1, w, W, ALIGN_CORNERS), last_X, BLOCK_P):
        X = start + tl.arange(0, BLOCK_P)
        x_low, x_high, weight_x = taps(tl.minimum(X, W - 1), w, W, 0 if ALIGN_CORNERS else 2)
        inside = (classes < C)[:, None] & (X < last_X)[None, :]
        pixels = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for Y in range(first_Y, last_Y):
            y_low, y_high, weight_y = taps(Y, h, H, 0 if ALIGN_CORNERS else 2)
            row = tl.cast(Y, tl.int64)
            labels = target + n * target_stride_n + row * target_stride_y
            label, kept = _labels(labels, X, last_X, C, target_stride_x, ignore_index)
            rows = logits + n * stride_n
            x = _resized(
                rows + y_low.to(tl.int64) * stride_y, rows + y_high.to(tl.int64) * stride_y, x_low, x_high,
                weight_x, weight_y, classes, inside, stride_c, stride_x,
            )
            probability = tl.exp(x - tl.load(lse + (n * H + row) * W + X, mask=kept, other=0.0)[None, :])
            of_target = (1.0 - smoothing) * _weights_of(class_weight, label, kept, WEIGHTED)
            g = tl.where(classes[:, None] == label[None, :], -of_target[None, :], 0.0)
            if SMOOTH:
                even = (smoothing / C * class_weights)[:, None]
                g += (of_target + smoothing / C * weights)[None, :] * probability - even
            else:
                g += of_target[None, :] * probability
            if EACH:
                of_row = grad + n * grad_stride_n + row * grad_stride_y
                upstream = tl.load(of_row + X.to(tl.int64) * grad_stride_x, mask=kept, other=0.0)
                g *= upstream[None, :]
            weight = tl.where(y_low == y, 1.0 - weight_y, 0.0) + tl.where(y_high == y, weight_y, 0.0)
            pixels += tl.where(kept[None, :] & inside, g * weight, 0.0)
        collect = tl.where(x_low[:, None] == columns[None, :], (1.0 - weight_x)[:, None], 0.0)
        collect += tl.where(x_high[:, None] == columns[None, :], weight_x[:, None], 0.0)
        gradient = tl.dot(pixels, collect, gradient, input_precision=PRECISION)
    at = classes.to(tl.int64)[:, None] * out_stride_c + columns.to(tl.int64)[None, :] * out_stride_x
    target_row = out + n * out_stride_n + y.to(tl.int64) * out_stride_y
    found = rounded(gradient * scale, out.dtype.element_ty)
    tl.store(target_row + at, found, mask=(classes < C)[:, None] & (columns < w)[None, :])


# Launchers, with the arguments of the op's schema


def forward(
    logits, target, class_weight, align_corners, ignore_index, label_smoothing, reduction, keep,
    needs_confusion,
):
    """(loss, l of every pixel or empty, divisor of the sum, counts or empty). Only class_weight is copied."""
    N, C, h, w = logits.shape
    H, W = target.shape[1:]
    each = reduction == NONE
    numbers = dict(dtype=torch.float32, device=logits.device)
    loss = torch.empty(target.shape if each else (), **numbers)
    lse = torch.empty(target.shape if keep == KEEP_LSE else (0,), **numbers)
    divisor = torch.empty((), dtype=torch.float64, device=logits.device)
    confusion = torch.zeros((C, C) if needs_confusion else (0,), dtype=torch.int64, device=logits.device)
    tiles = choose_tiles(C)
    # programs, all of them in x: a grid has at most 65535 in y and in z
    count = N * H * triton.cdiv(W, tiles.forward_p)
    partial = torch.empty((count, 2), **numbers)
    weighted = class_weight is not None
    if count:
        forward_kernel[(count,)](
            logits, target, class_weight.contiguous() if weighted else partial, loss, lse, partial, confusion,
            C, h, w, H, W, ignore_index, label_smoothing, *logits.stride(), *target.stride(), align_corners,
            weighted, label_smoothing > 0, each, keep == KEEP_LSE, needs_confusion, tiles.block_c,
            tiles.forward_p, num_warps=4,
        )
    finish_kernel[(1,)](partial, loss, divisor, count, reduction == MEAN, each, 1024, num_warps=4)
    return loss, lse, divisor, confusion


def backward(
    grad, logits, target, class_weight, kept, divisor, align_corners, ignore_index, label_smoothing,
    reduction, keep,
):
    """Gradient of the logits, in their dtype and memory format."""
    if keep != KEEP_LSE:
        raise ValueError(
            f"upsample_cross_entropy: keep: the Triton kernels need the log-sum-exp ({KEEP_LSE}), got {keep}"
        )
    out = torch.empty_like(logits)
    if out.numel() == 0:
        return out
    N, C, h, w = logits.shape
    H, W = target.shape[1:]
    each, weighted = reduction == NONE, class_weight is not None
    tiles = choose_tiles(C)
    precision = dot_precision(torch.float32, capability(logits.device))
    backward_kernel[(N * triton.cdiv(C, tiles.block_c) * h * triton.cdiv(w, tiles.block_w),)](
        grad, logits, target, class_weight.contiguous() if weighted else kept, kept, divisor, out, C, h, w, H,
        W, ignore_index, label_smoothing, *(grad.stride() if each else (0, 0, 0)), *logits.stride(),
        *target.stride(), *out.stride(), align_corners, weighted, label_smoothing > 0, each, precision,
        tiles.block_c, tiles.backward_p, tiles.block_w, num_warps=BACKWARD_WARPS, num_stages=2,
    )
    return out


# Tile sizes

BACKWARD_WARPS = 8  # four would need every register they can have


class Tiles(typing.NamedTuple):
    block_c: int
    forward_p: int  # BLOCK_P of each pass
    backward_p: int
    block_w: int


def choose_tiles(C: int) -> Tiles:
    """Blocks for C classes, found by compiling ahead of time: the largest that spill on no architecture."""
    block_c = 16 if C <= 16 else 32
    return Tiles(block_c, 1024 // block_c, 1024 // block_c, 32)
