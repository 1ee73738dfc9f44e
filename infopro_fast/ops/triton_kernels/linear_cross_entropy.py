"""Triton kernels of `linear_cross_entropy`: input x (N, D), weight W (C, D).

Few classes (InfoPro's heads: 10 to 64): a program takes BLOCK_N rows and holds the logits of all classes in
one tile, which is never stored. Forward reads x once. Backward computes the tile again, and from it the
gradient of its rows and its share of that of W, which `_add_up_kernel` adds up in a fixed order.

Many classes: chunks of rows, at most 2^24 logits at a time. cuBLAS, which no Triton kernel beats there,
computes the three products; one sweep each finds the row statistics and the gradient of the logits, in place.

Arithmetic is float32. Products of 16-bit operands are exact and summed in float32; float32 products follow
torch's matmul precision. Like torch, the many classes round the gradient of the logits to the operands' 16
bits.

A label out of range other than ``ignore_index`` reads nothing: the row's loss and gradients become nan.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .target import capability, compilation, dot_precision, launched, multiprocessors, rounded, spread

MEAN, SUM, NONE = range(3)  # linear_cross_entropy.REDUCTIONS

# Kernels


@triton.jit
def _load_tile(x, rows, columns, N, D, stride_n, stride_d):
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED):
    """(label, class weight, whether the row counts); the weight: 0 if it does not, nan if out of range."""
    t = tl.load(target + rows, mask=rows < N, other=0).to(tl.int64)
    kept = (rows < N) & (t != ignore_index)
    known = (t >= 0) & (t < C)
    w = tl.full(rows.shape, 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(class_weight + t, mask=kept & known, other=0.0)
    return t, tl.where(kept, tl.where(known, w, float("nan")), 0.0), kept


@triton.jit
def _logits(
    x, weight, bias, rows, classes, N, D, C, stride_n, stride_d, weight_stride_c, weight_stride_d, BIAS,
    PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
):
    """All logits of a row block, -inf beyond the last class."""
    s = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        dimensions = d + tl.arange(0, BLOCK_D)
        tile = _load_tile(x, rows, dimensions, N, D, stride_n, stride_d)
        other = _load_tile(weight, classes, dimensions, C, D, weight_stride_c, weight_stride_d)
        s = tl.dot(tile, tl.trans(other), s, input_precision=PRECISION)
    if BIAS:
        s += tl.load(bias + classes, mask=classes < C, other=0.0).to(tl.float32)[None, :]
    return tl.where((classes < C)[None, :], s, -float("inf"))


@triton.jit
def _row_losses(l, s_target, smooth, w, kept, label_smoothing, C):
    """Loss of each row; smooth: sum of w_c (l - x_c), used where labels are smoothed."""
    loss = (1 - label_smoothing) * w * (l - s_target)
    loss += tl.where(label_smoothing > 0, smooth * (label_smoothing / C), 0.0)
    return tl.where(kept, tl.where(w == w, loss, w), 0.0)


@launched
def _few_forward_kernel(
    x, weight, bias, target, class_weight, loss, lse, right, N, D, C, stride_n, stride_d, weight_stride_c,
    weight_stride_d, ignore_index, label_smoothing, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, classes = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    s = _logits(
        x, weight, bias, rows, classes, N, D, C, stride_n, stride_d, weight_stride_c, weight_stride_d,
        BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
    )
    t, w, kept = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
    largest = tl.max(s, 1)
    l = largest + tl.log(tl.sum(tl.exp(s - largest[:, None]), 1))
    s_target = tl.sum(tl.where(classes[None, :] == t[:, None], s, 0.0), 1)
    first = tl.min(tl.where(s == largest[:, None], classes[None, :], BLOCK_C), 1)
    smooth = tl.zeros((BLOCK_N,), tl.float32)
    if SMOOTH:
        every = tl.where(classes < C, 1.0, 0.0)
        if WEIGHTED:
            every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
        smooth = tl.sum(tl.where((classes < C)[None, :], every[None, :] * (l[:, None] - s), 0.0), 1)
    tl.store(loss + rows, _row_losses(l, s_target, smooth, w, kept, label_smoothing, C), mask=rows < N)
    tl.store(lse + rows, l, mask=rows < N)
    tl.store(right + rows, tl.where(kept & (first == t), 1.0, 0.0), mask=rows < N)


@launched
def _few_backward_kernel(
    row_grad, x, weight, bias, target, class_weight, g_input, partial, N, D, C, row_grad_stride, stride_n,
    stride_d, weight_stride_c, weight_stride_d, ignore_index, label_smoothing, BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, NEEDS_INPUT: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Gradient of the rows of every num_programs-th block; their share of those of W and b in ``partial``.

    partial: (programs, C D + C).
    """
    classes = tl.arange(0, BLOCK_C)
    mine = partial + tl.program_id(0).to(tl.int64) * (C * D + C)
    g_bias = tl.zeros((BLOCK_C,), tl.float32)
    every = tl.where(classes < C, 1.0, 0.0)
    if WEIGHTED:
        every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        # what the block before stored may be loaded by another thread (at the end of the loop it costs sm_120
        # spills)
        tl.debug_barrier()
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        s = _logits(
            x, weight, bias, rows, classes, N, D, C, stride_n, stride_d, weight_stride_c, weight_stride_d,
            BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )
        t, w, kept = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
        e = tl.exp(s - tl.max(s, 1)[:, None])  # more exact than by l, which is rounded to an ulp of a logit
        p = e / tl.sum(e, 1)[:, None]
        r = tl.load(row_grad + rows.to(tl.int64) * row_grad_stride, mask=kept, other=0.0)
        is_target = classes[None, :] == t[:, None]
        g = _logit_gradient(p, r, w, every, tl.sum(every, 0), is_target, kept, label_smoothing, C)
        g_bias += tl.sum(g, 0)
        for d in range(0, D, BLOCK_D):
            dimensions = d + tl.arange(0, BLOCK_D)
            if NEEDS_INPUT:
                other = _load_tile(weight, classes, dimensions, C, D, weight_stride_c, weight_stride_d)
                inside = (rows < N)[:, None] & (dimensions < D)[None, :]
                at = rows.to(tl.int64)[:, None] * D + dimensions[None, :]
                tl.store(g_input + at, tl.dot(g, other, input_precision=PRECISION), mask=inside)
            if NEEDS_WEIGHT:
                # what an ignored row holds may be infinite
                counted = kept[:, None] & (dimensions < D)[None, :]
                at = x + rows.to(tl.int64)[:, None] * stride_n + dimensions[None, :] * stride_d
                tile = tl.load(at, mask=counted, other=0.0).to(tl.float32)
                share = tl.dot(tl.trans(g), tile, input_precision=PRECISION)
                inside = (classes < C)[:, None] & (dimensions < D)[None, :]
                at = mine + classes[:, None] * D + dimensions[None, :]
                share += tl.load(at, mask=inside & spread(block != tl.program_id(0), inside), other=0.0)
                tl.store(at, share, mask=inside)
    tl.store(mine + C * D + classes, g_bias, mask=classes < C)


@triton.jit
def _logit_gradient(p, r, w, every, every_sum, is_target, kept, label_smoothing, C):
    """d loss / d logits of a tile (rows, classes) from probabilities; 0 where nothing counts."""
    even = label_smoothing / C
    g = ((1 - label_smoothing) * w + even * every_sum)[:, None] * p
    g -= tl.where(is_target, (1 - label_smoothing) * w[:, None], 0.0) + even * every[None, :]
    return tl.where(kept[:, None], g * r[:, None], 0.0)


@launched
def _add_up_kernel(partial, g_weight, g_bias, PROGRAMS, size, C, BLOCK: tl.constexpr):
    """Sums over the programs of `_few_backward_kernel`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for program in range(PROGRAMS):
        mine = partial + tl.cast(program, tl.int64) * (size + C)
        total += tl.load(mine + at, mask=at < size + C, other=0.0)
    tl.store(g_weight + at, total, mask=at < size)
    tl.store(g_bias + at - size, total, mask=(at >= size) & (at < size + C))


@launched
def _many_forward_kernel(
    logits, bias, target, class_weight, every_sum, loss, lse, right, N, C, ignore_index, label_smoothing,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Row statistics of logits (N, C) without bias, in one sweep."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t, w, kept = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
    base = logits + rows.to(tl.int64)[:, None] * C
    largest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    smooth = tl.zeros((BLOCK_N,), tl.float32)
    s_target = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, C, BLOCK_C):
        classes = start + tl.arange(0, BLOCK_C)
        inside = (rows < N)[:, None] & (classes < C)[None, :]
        s = tl.load(base + classes[None, :], mask=inside, other=-float("inf"))
        if BIAS:
            s += tl.load(bias + classes, mask=classes < C, other=0.0).to(tl.float32)[None, :]
        s_target += tl.sum(tl.where(classes[None, :] == t[:, None], s, 0.0), 1)
        if SMOOTH:
            every = tl.where(classes < C, 1.0, 0.0)
            if WEIGHTED:
                every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
            smooth += tl.sum(tl.where(inside, every[None, :] * s, 0.0), 1)
        more = tl.max(s, 1)
        where = tl.min(tl.where(s == more[:, None], classes[None, :], C), 1)
        first = tl.where(more > largest, where, first)
        larger = tl.maximum(largest, more)
        taken = tl.where(larger == -float("inf"), 0.0, larger)  # all classes so far masked by a bias of -inf
        total = total * tl.exp(largest - taken) + tl.sum(tl.exp(s - taken[:, None]), 1)
        largest = larger
    l = largest + tl.log(total)
    if SMOOTH:
        smooth = l * (tl.load(every_sum) if WEIGHTED else tl.cast(C, tl.float32)) - smooth
    tl.store(loss + rows, _row_losses(l, s_target, smooth, w, kept, label_smoothing, C), mask=rows < N)
    tl.store(lse + rows, l, mask=rows < N)
    tl.store(right + rows, tl.where(kept & (first == t), 1.0, 0.0), mask=rows < N)


@launched
def _many_backward_kernel(
    row_grad, unit, logits, out, bias, target, class_weight, every_sum, lse, N, C, row_grad_stride,
    ignore_index, label_smoothing, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradient of the logits (N, C), without bias, times ``unit`` if UNIT; ``out`` may be ``logits``."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    classes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t, w, kept = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
    at = rows.to(tl.int64)[:, None] * C + classes[None, :]
    inside = (rows < N)[:, None] & (classes < C)[None, :]
    s = tl.load(logits + at, mask=inside, other=-float("inf"))
    if BIAS:
        s += tl.load(bias + classes, mask=classes < C, other=0.0).to(tl.float32)[None, :]
    every = tl.where(classes < C, 1.0, 0.0)
    total = tl.cast(C, tl.float32)
    if WEIGHTED:
        every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
        total = tl.load(every_sum)
    r = tl.load(row_grad + rows.to(tl.int64) * row_grad_stride, mask=kept, other=0.0)
    if UNIT:
        r *= tl.load(unit)
    l = tl.load(lse + rows, mask=rows < N, other=0.0)
    p, is_target = tl.exp(s - l[:, None]), classes[None, :] == t[:, None]
    g = _logit_gradient(p, r, w, every, total, is_target, kept, label_smoothing, C)
    tl.store(out + at, rounded(g, out.dtype.element_ty), mask=inside)


@launched
def _reduce_kernel(
    loss, right, target, class_weight, out, correct, N, C, ignore_index, REDUCE: tl.constexpr,
    MEAN_OF: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program: how many rows are right; REDUCE: the sum of losses; MEAN_OF: over the targets' weights."""
    total = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        count += tl.load(right + rows, mask=rows < N, other=0.0).to(tl.int32)
        if REDUCE:
            total += tl.load(loss + rows, mask=rows < N, other=0.0)
        if MEAN_OF:
            _, w, _ = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
            weights += w
    tl.store(correct, tl.sum(count, 0).to(tl.int64))
    if REDUCE:
        value = tl.sum(total, 0)
        if MEAN_OF:
            weight = tl.sum(weights, 0)
            value /= tl.where(weight == 0, 1.0, weight)
        tl.store(out, value)


@launched
def _row_gradient_kernel(
    grad, target, class_weight, out, N, C, ignore_index, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """By one program: the upstream gradient of a mean over the sum of the targets' weights."""
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        _, w, _ = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
        weights += w
    weight = tl.sum(weights, 0)
    tl.store(out, tl.load(grad) / tl.where(weight == 0, 1.0, weight))


# Launchers, with the arguments of the op's schema


def forward(input, weight, target, bias, class_weight, ignore_index, label_smoothing, reduction):
    """Loss, l (N,) float32 and how many rows are right, 0-d int64."""
    (N, D), C, device = input.shape, weight.shape[0], input.device
    target, bias, class_weight = _prepared(target, bias, class_weight)
    losses = torch.empty(N, dtype=torch.float32, device=device)
    lse = torch.empty(N, dtype=torch.float32, device=device)
    right = torch.empty(N, dtype=torch.float32, device=device)
    flags = dict(BIAS=bias is not None, WEIGHTED=class_weight is not None, SMOOTH=label_smoothing > 0)
    b, w = losses if bias is None else bias, losses if class_weight is None else class_weight
    if few(C, D):
        tiles, precision = choose_tiles(N, C), _precision(input, weight)
        _few_forward_kernel[(triton.cdiv(N, tiles.block_n),)](
            input, weight, b, target, w, losses, lse, right, N, D, C, *input.stride(), *weight.stride(),
            ignore_index, label_smoothing, PRECISION=precision, **flags, **tiles.constexprs(),
            num_warps=tiles.warps, num_stages=forward_stages(capability(device), precision),
        )
    else:
        every_sum = class_weight.sum() if class_weight is not None else losses
        input, weight = _same_dtype(input, weight)
        block_n, block_c = _row_tile(C)
        for start, stop, logits in _chunks(N, C, device):
            _multiply(input[start:stop], weight.t(), logits)
            _many_forward_kernel[(triton.cdiv(stop - start, block_n),)](
                logits, b, target[start:stop], w, every_sum, losses[start:stop], lse[start:stop],
                right[start:stop], stop - start, C, ignore_index, label_smoothing, **flags, BLOCK_N=block_n,
                BLOCK_C=block_c,
            )
    loss = losses if reduction == NONE else torch.empty((), dtype=torch.float32, device=device)
    correct = torch.empty((), dtype=torch.int64, device=device)
    _reduce_kernel[(1,)](
        losses, right, target, w, loss, correct, N, C, ignore_index,
        reduction != NONE, reduction == MEAN, class_weight is not None, ROWS_AT_ONCE, num_warps=8,
    )
    return loss, lse, correct


def backward(
    grad, input, weight, target, bias, class_weight, lse, ignore_index, label_smoothing, reduction,
    needs_input, needs_weight,
):
    """Gradients of input (N, D), weight (C, D), where needed, and bias (C,), float32."""
    (N, D), C, device = input.shape, weight.shape[0], input.device
    target, bias, class_weight = _prepared(target, bias, class_weight)
    g_input = torch.empty((N, D) if needs_input else (0,), dtype=torch.float32, device=device)
    g_weight = torch.empty((C, D) if needs_weight else (0,), dtype=torch.float32, device=device)
    g_bias = torch.empty(C, dtype=torch.float32, device=device)
    if N == 0:
        return g_input, g_weight.zero_(), g_bias.zero_()
    row_grad = grad
    if reduction == MEAN:
        row_grad = torch.empty((), dtype=torch.float32, device=device)
        w = lse if class_weight is None else class_weight
        _row_gradient_kernel[(1,)](
            grad, target, w, row_grad, N, C, ignore_index, class_weight is not None, ROWS_AT_ONCE, num_warps=8
        )
    row_grad_stride = grad.stride(0) if reduction == NONE else 0
    rest = (bias, target, class_weight, lse, ignore_index, label_smoothing, g_input, g_weight, g_bias)
    if few(C, D):
        _few_backward(row_grad, row_grad_stride, input, weight, *rest)
    else:
        _many_backward(row_grad, row_grad_stride, input, weight, *rest)
    return g_input, g_weight, g_bias


def _few_backward(
    row_grad, row_grad_stride, input, weight, bias, target, class_weight, lse, ignore_index, label_smoothing,
    g_input, g_weight, g_bias,
):
    (N, D), C = input.shape, weight.shape[0]
    b, w = lse if bias is None else bias, lse if class_weight is None else class_weight
    needs_weight = g_weight.numel() > 0
    tiles = choose_tiles(N, C, backward=True)
    most = max(1, MOST_PARTIAL // (C * D + C))
    programs = min(triton.cdiv(N, tiles.block_n), 2 * multiprocessors(input.device), most)
    partial = torch.empty((programs, C * D + C), dtype=torch.float32, device=input.device)
    _few_backward_kernel[(programs,)](
        row_grad, input, weight, b, target, w, g_input, partial, N, D, C, row_grad_stride, *input.stride(),
        *weight.stride(), ignore_index, label_smoothing, BIAS=bias is not None,
        WEIGHTED=class_weight is not None, NEEDS_INPUT=g_input.numel() > 0, NEEDS_WEIGHT=needs_weight,
        PRECISION=_precision(input, weight), **tiles.constexprs(), num_warps=tiles.warps, num_stages=1,
    )
    if needs_weight:
        _add_up_kernel[(triton.cdiv(C * D + C, 256),)](partial, g_weight, g_bias, programs, C * D, C, 256)
    else:  # the bias's numbers lie behind the weight's, which nobody has written
        torch.sum(partial[:, C * D :], 0, out=g_bias)


def _many_backward(
    row_grad, row_grad_stride, input, weight, bias, target, class_weight, lse, ignore_index, label_smoothing,
    g_input, g_weight, g_bias,
):
    N, C = input.shape[0], weight.shape[0]
    b, w = lse if bias is None else bias, lse if class_weight is None else class_weight
    every_sum = class_weight.sum() if class_weight is not None else lse
    input, weight = _same_dtype(input, weight)
    unit = _float16_unit(row_grad, class_weight) if input.dtype == torch.float16 else None
    block_n, block_c = _row_tile(C)
    for start, stop, logits in _chunks(N, C, input.device):
        rows = input[start:stop]
        _multiply(rows, weight.t(), logits)
        g = logits if input.dtype == torch.float32 else torch.empty_like(logits, dtype=input.dtype)
        _many_backward_kernel[(triton.cdiv(stop - start, block_n), triton.cdiv(C, block_c))](
            row_grad[start:stop] if row_grad_stride else row_grad, lse if unit is None else unit, logits, g,
            b, target[start:stop], w, every_sum, lse[start:stop], stop - start, C, row_grad_stride,
            ignore_index, label_smoothing, BIAS=bias is not None, WEIGHTED=class_weight is not None,
            UNIT=unit is not None, BLOCK_N=block_n, BLOCK_C=block_c,
        )
        if g_input.numel():
            _multiply(g, weight, g_input[start:stop])
        if g_weight.numel():
            kept = _kept_rows(rows, target[start:stop], ignore_index)
            share = g_weight if start == 0 else torch.empty_like(g_weight)
            _multiply(g.t(), kept, share)
            if start:
                g_weight.add_(share)
        if bias is not None:
            share = torch.sum(g, 0, dtype=torch.float32)
            g_bias.copy_(share) if start == 0 else g_bias.add_(share)
        else:
            g_bias.zero_()
    if unit is not None:
        for out in (g_input, g_weight, g_bias):
            out.div_(unit)


def _prepared(target, bias, class_weight):
    """As the kernels read them: contiguous, the weights float32."""
    bias = None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
    return target.contiguous(), bias, class_weight


def _precision(input: torch.Tensor, weight: torch.Tensor) -> str:
    """One TF32 product for 16-bit operands, which TF32 holds; three for float32, unless torch allows one."""
    if input.dtype != torch.float32 and weight.dtype != torch.float32:
        return "tf32"
    return "tf32" if dot_precision(torch.float32, capability(input.device)) == "tf32" else "tf32x3"


def _same_dtype(input: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (input, weight) if input.dtype == weight.dtype else (input.float(), weight.float())


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b in float32, whatever their dtype; with ``out``, which autocast lets alone."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # interpreted
        torch.mm(a.float(), b.float(), out=out)


def _kept_rows(rows: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """What an ignored row holds may be infinite, and infinity times a gradient of 0 is nan."""
    return rows.masked_fill((target == ignore_index)[:, None], 0)


def _float16_unit(row_grad: torch.Tensor, class_weight: torch.Tensor | None) -> torch.Tensor:
    """A factor that brings gradients of logits into the range of float16."""
    most = row_grad.abs().amax()
    if class_weight is not None:
        most = most * class_weight.amax()
    return torch.where((most > 0) & (most < torch.inf), 8192 / most, 1.0)


def _chunks(N: int, C: int, device: torch.device) -> typing.Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, buffer for the logits) of the rows that are taken at once."""
    size = max(1, min(N, MOST_LOGITS // C))
    buffer = torch.empty((size, C), dtype=torch.float32, device=device)
    for start in range(0, N, size):
        stop = min(start + size, N)
        yield start, stop, buffer[: stop - start]


# Tile sizes

MOST_LOGITS = 2**24  # held at once, 64 MiB
MOST_PARTIAL = 2**22  # numbers of partial gradients of the weight, 16 MiB
ROWS_AT_ONCE = 2048  # of a sweep over all rows by one program


class Tiles(typing.NamedTuple):
    block_n: int
    block_c: int
    block_d: int
    warps: int

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_C": self.block_c, "BLOCK_D": self.block_d}


def few(C: int, D: int) -> bool:
    """All classes in one tile, and partial gradients of the weight that 128 programs may each have."""
    return C <= 64 and C * D <= MOST_PARTIAL // 128


def choose_tiles(N: int, C: int, backward: bool = False) -> Tiles:
    """For few classes: fewer rows a program where there are not enough for every multiprocessor."""
    block_c = max(16, triton.next_power_of_2(C))
    if N <= 4096 or (backward and block_c == 64):
        return Tiles(16, block_c, 16 if backward else 32, 4)
    return Tiles(64 if block_c == 16 else 32, block_c, 16 if backward else 32, 4)


def forward_stages(cc: int, precision: str) -> int:
    """Stages of `_few_forward_kernel`: two; three where two spill with Triton 3.9."""
    return 3 if cc >= 100 and precision == "tf32" else 2


def _row_tile(C: int) -> tuple[int, int]:
    block_c = min(2048, triton.next_power_of_2(C))
    return max(1, 2048 // block_c), block_c


# For tests that compile ahead of time


def configurations(cc: int) -> typing.Iterator[tuple]:
    """Every kernel for InfoPro's heads (D = 128, 10 and 64 classes, few and many rows), and 1000 classes."""
    few = {"BIAS": True, "WEIGHTED": True, "SMOOTH": True, "NEEDS_INPUT": True, "NEEDS_WEIGHT": True}
    cases = ("fp32", "tf32x3", 1024, 10), ("fp32", "tf32x3", 8192, 64), ("bf16", "tf32", 8192, 64)
    for dtype, precision, N, C in cases:
        pointers = {"x": f"*{dtype}", "weight": f"*{dtype}"}
        for kernel, backward in ((_few_forward_kernel, False), (_few_backward_kernel, True)):
            tiles = choose_tiles(N, C, backward)
            ones = {"stride_d": 1, "weight_stride_d": 1}
            constexprs = few | tiles.constexprs() | {"PRECISION": precision} | ones
            stages = 1 if backward else forward_stages(cc, precision)
            yield _compilation(kernel, pointers, constexprs, tiles.warps, stages, tensor_cores=True)
    block_n, block_c = _row_tile(1000)
    many = few | {"UNIT": True, "BLOCK_N": block_n, "BLOCK_C": block_c}
    yield _compilation(_many_forward_kernel, {}, many)
    yield _compilation(_many_backward_kernel, {"out": "*bf16"}, many)
    one = few | {"N": 1, "C": 1, "WEIGHTED": False, "BIAS": False}  # integers that are 1 are compiled in
    tiles = choose_tiles(1, 1)
    for kernel in (_few_forward_kernel, _few_backward_kernel):
        constexprs = one | tiles.constexprs() | {
            "D": 1, "PRECISION": "tf32x3", "stride_d": 1, "stride_n": 1, "row_grad_stride": 1
        }
        yield _compilation(kernel, {}, constexprs, tensor_cores=True)
    for kernel in (_many_forward_kernel, _many_backward_kernel):
        yield _compilation(kernel, {}, one | {"UNIT": False, "BLOCK_N": 1, "BLOCK_C": 2048})
    rows = {"REDUCE": True, "MEAN_OF": True, "WEIGHTED": True, "BLOCK": ROWS_AT_ONCE}
    yield _compilation(_reduce_kernel, {"correct": "*i64"}, rows, warps=8)
    yield _compilation(_row_gradient_kernel, {}, rows, warps=8)
    yield _compilation(_reduce_kernel, {"correct": "*i64"}, rows | {"N": 1}, warps=8)
    yield _compilation(_add_up_kernel, {}, {"BLOCK": 256})


def _compilation(kernel, pointers, constexprs, *args, **kwargs):
    types = {
        "PROGRAMS": "i32", "size": "i32", "ignore_index": "i32", "label_smoothing": "fp32", "target": "*i64"
    }
    unaligned = ("N", "C", "PROGRAMS", "size", "ignore_index")
    return compilation(kernel, types | pointers, constexprs, unaligned, *args, **kwargs)
