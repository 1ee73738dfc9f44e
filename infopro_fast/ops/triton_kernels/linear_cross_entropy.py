"""Triton kernels of `linear_cross_entropy`: input x (N, D), weight W (C, D).

Chunks of rows, at most 2^24 logits at a time. cuBLAS, which no Triton kernel beats there, computes the three
products; one sweep each finds the row statistics and the gradient of the logits, in place.

Arithmetic is float32. Products of 16-bit operands are exact and summed in float32; float32 products follow
torch's matmul precision. Like torch's, the gradient of the logits is rounded to the operands' 16 bits.

With class probabilities the sweeps read them beside the logits; `_part_sums` adds up each row's.

A label out of range other than ``ignore_index`` reads nothing: the row's loss and gradients become nan.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .target import launched, rounded

MEAN, SUM, NONE = range(3)  # linear_cross_entropy.REDUCTIONS

# Kernels


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
def _parts(target, at, inside, every, label_smoothing, C):
    """((1 - e) p + e / C) w of class probabilities p in a tile (rows, classes), and p, -inf outside."""
    p = tl.load(target + at, mask=inside, other=-float("inf")).to(tl.float32)
    parts = ((1 - label_smoothing) * p + label_smoothing / C) * every[None, :]
    return tl.where(inside, parts, 0.0), p


@triton.jit
def _row_losses(l, s_target, smooth, w, kept, label_smoothing, C):
    """Loss of each row; smooth: sum of w_c (l - x_c), used where labels are smoothed."""
    loss = (1 - label_smoothing) * w * (l - s_target)
    loss += tl.where(label_smoothing > 0, smooth * (label_smoothing / C), 0.0)
    return tl.where(kept, tl.where(w == w, loss, w), 0.0)


@triton.jit
def _logit_gradient(p, r, w, every, every_sum, is_target, kept, label_smoothing, C):
    """d loss / d logits of a tile (rows, classes) from probabilities; 0 where nothing counts."""
    even = label_smoothing / C
    g = ((1 - label_smoothing) * w + even * every_sum)[:, None] * p
    g -= tl.where(is_target, (1 - label_smoothing) * w[:, None], 0.0) + even * every[None, :]
    return tl.where(kept[:, None], g * r[:, None], 0.0)


@launched
def forward_kernel(
    logits, bias, target, class_weight, every_sum, loss, lse, right, N, C, ignore_index, label_smoothing,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Row statistics of logits (N, C) without bias, in one sweep. SOFT: ``every_sum`` is `_part_sums`."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SOFT:
        kept = rows < N
        t = tl.zeros((BLOCK_N,), tl.int32)
        probable = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    else:
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
        if SOFT or SMOOTH:
            every = tl.where(classes < C, 1.0, 0.0)
            if WEIGHTED:
                every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
        if SOFT:
            at = rows.to(tl.int64)[:, None] * C + classes[None, :]
            parts, p = _parts(target, at, inside, every, label_smoothing, C)
            s_target += tl.sum(tl.where(inside, parts * s, 0.0), 1)
            most = tl.max(p, 1)
            t = tl.where(most > probable, tl.min(tl.where(p == most[:, None], classes[None, :], C), 1), t)
            probable = tl.maximum(probable, most)
        else:
            s_target += tl.sum(tl.where(classes[None, :] == t[:, None], s, 0.0), 1)
        if SMOOTH:
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
    if SOFT:
        value = tl.load(every_sum + rows, mask=rows < N, other=0.0) * l - s_target
    else:
        value = _row_losses(l, s_target, smooth, w, kept, label_smoothing, C)
    tl.store(loss + rows, value, mask=rows < N)
    tl.store(lse + rows, l, mask=rows < N)
    tl.store(right + rows, tl.where(kept & (first == t), 1.0, 0.0), mask=rows < N)


@launched
def backward_kernel(
    row_grad, unit, logits, out, bias, target, class_weight, every_sum, lse, N, C, row_grad_stride,
    ignore_index, label_smoothing, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr, SOFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradient of the logits (N, C), without bias, times ``unit`` if UNIT; ``out`` may be ``logits``.

    SOFT: ``every_sum`` is `_part_sums`.
    WHOLE: a tile has all classes. By its own sum a probability is more exact than by l, which is rounded to
    an ulp of a logit.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    classes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if SOFT:
        kept = rows < N
    else:
        t, w, kept = _load_targets(target, class_weight, rows, N, C, ignore_index, WEIGHTED)
    at = rows.to(tl.int64)[:, None] * C + classes[None, :]
    inside = (rows < N)[:, None] & (classes < C)[None, :]
    s = tl.load(logits + at, mask=inside, other=-float("inf"))
    if BIAS:
        s += tl.load(bias + classes, mask=classes < C, other=0.0).to(tl.float32)[None, :]
    every = tl.where(classes < C, 1.0, 0.0)
    if WEIGHTED:
        every = tl.load(class_weight + classes, mask=classes < C, other=0.0)
    r = tl.load(row_grad + rows.to(tl.int64) * row_grad_stride, mask=kept, other=0.0)
    if UNIT:
        r *= tl.load(unit)
    if WHOLE:
        p = tl.exp(s - tl.max(s, 1)[:, None])
        p /= tl.sum(p, 1)[:, None]
    else:
        p = tl.exp(s - tl.load(lse + rows, mask=rows < N, other=0.0)[:, None])
    if SOFT:
        parts, _ = _parts(target, at, inside, every, label_smoothing, C)
        g = p * tl.load(every_sum + rows, mask=rows < N, other=0.0)[:, None] - parts
        g = tl.where(kept[:, None], g * r[:, None], 0.0)
    else:
        total = tl.load(every_sum) if WEIGHTED else tl.cast(C, tl.float32)
        is_target = classes[None, :] == t[:, None]
        g = _logit_gradient(p, r, w, every, total, is_target, kept, label_smoothing, C)
    tl.store(out + at, rounded(g, out.dtype.element_ty), mask=inside)


@launched
def reduce_kernel(
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
def row_gradient_kernel(
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
    N, C, device = input.shape[0], weight.shape[0], input.device
    target, bias, class_weight = _prepared(target, bias, class_weight)
    losses = torch.empty(N, dtype=torch.float32, device=device)
    lse = torch.empty(N, dtype=torch.float32, device=device)
    right = torch.empty(N, dtype=torch.float32, device=device)
    soft = target.dim() == 2
    smooth = label_smoothing > 0 and not soft
    flags = dict(BIAS=bias is not None, WEIGHTED=class_weight is not None, SMOOTH=smooth, SOFT=soft)
    b, w = losses if bias is None else bias, losses if class_weight is None else class_weight
    sums = _sums(target, class_weight, label_smoothing, losses)
    input, weight = _same_dtype(input, weight)
    block_n, block_c = row_tile(C)
    for start, stop, logits in _chunks(N, C, device):
        _multiply(input[start:stop], weight.t(), logits)
        forward_kernel[(triton.cdiv(stop - start, block_n),)](
            logits, b, target[start:stop], w, sums[start:stop] if soft else sums, losses[start:stop],
            lse[start:stop], right[start:stop], stop - start, C, ignore_index, label_smoothing, **flags,
            BLOCK_N=block_n, BLOCK_C=block_c,
        )
    loss = losses if reduction == NONE else torch.empty((), dtype=torch.float32, device=device)
    correct = torch.empty((), dtype=torch.int64, device=device)
    reduce_kernel[(1,)](
        losses, right, target, w, loss, correct, N, C, ignore_index,
        reduction != NONE, reduction == MEAN and not soft, class_weight is not None, ROWS_AT_ONCE,
        num_warps=8,
    )
    if soft and reduction == MEAN:
        loss.div_(max(1, N))
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
    row_grad, soft = grad, target.dim() == 2
    if reduction == MEAN and soft:
        row_grad = grad / N
    elif reduction == MEAN:
        row_grad = torch.empty((), dtype=torch.float32, device=device)
        w = lse if class_weight is None else class_weight
        row_gradient_kernel[(1,)](
            grad, target, w, row_grad, N, C, ignore_index, class_weight is not None, ROWS_AT_ONCE, num_warps=8
        )
    row_grad_stride = grad.stride(0) if reduction == NONE else 0
    b, w = lse if bias is None else bias, lse if class_weight is None else class_weight
    sums = _sums(target, class_weight, label_smoothing, lse)
    input, weight = _same_dtype(input, weight)
    unit = _float16_unit(row_grad, sums if soft else class_weight) if input.dtype == torch.float16 else None
    block_n, block_c = row_tile(C)
    for start, stop, logits in _chunks(N, C, device):
        rows = input[start:stop]
        _multiply(rows, weight.t(), logits)
        g = logits if input.dtype == torch.float32 else torch.empty_like(logits, dtype=input.dtype)
        backward_kernel[(triton.cdiv(stop - start, block_n), triton.cdiv(C, block_c))](
            row_grad[start:stop] if row_grad_stride else row_grad, lse if unit is None else unit, logits, g,
            b, target[start:stop], w, sums[start:stop] if soft else sums, lse[start:stop], stop - start, C,
            row_grad_stride, ignore_index, label_smoothing, BIAS=bias is not None,
            WEIGHTED=class_weight is not None, UNIT=unit is not None, WHOLE=block_c >= C, SOFT=soft,
            BLOCK_N=block_n, BLOCK_C=block_c,
        )
        if needs_input:
            _multiply(g, weight, g_input[start:stop])
        if needs_weight:
            kept = rows if soft else _kept_rows(rows, target[start:stop], ignore_index)
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
    return g_input, g_weight, g_bias


def _prepared(target, bias, class_weight):
    """As the kernels read them: contiguous, the weights float32."""
    bias = None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
    return target.contiguous(), bias, class_weight


def _sums(target, class_weight, label_smoothing, unused):
    """What the sweeps take as every_sum: sum of the class weights, or with probabilities `_part_sums`."""
    if target.dim() == 2:
        return _part_sums(target, class_weight, label_smoothing)
    return unused if class_weight is None else class_weight.sum()


def _part_sums(target, class_weight, label_smoothing):
    """sum_c ((1 - e) p_c + e / C) w_c of each row (N,), float32: the factor of its log-sum-exp."""
    weighted = target if class_weight is None else target * class_weight
    every = target.shape[1] if class_weight is None else class_weight.sum()
    sums = weighted.sum(1, dtype=torch.float32)
    return (1 - label_smoothing) * sums + label_smoothing / target.shape[1] * every


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
MOST_CLASSES = 2048  # of a tile
ROWS_AT_ONCE = 2048  # of a sweep over all rows by one program


def row_tile(C: int) -> tuple[int, int]:
    """(rows, classes) of a tile: 2048 numbers, or fewer with few classes: many rows would take registers."""
    block_c = min(MOST_CLASSES, triton.next_power_of_2(C))
    return max(1, min(8, 2048 // block_c)), block_c
