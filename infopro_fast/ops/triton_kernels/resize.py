"""Where torch.nn.functional.interpolate takes its samples, as tables that Triton kernels read.

Modes: 0, bilinear with align_corners=True; 1, nearest; 2, bilinear with align_corners=False. A bilinear
position is an exact fraction, as on the CPU, which the tables count in 64 bits; F.interpolate rounds it in
float32. One launch makes the tables of a pass: kernels that computed positions would mostly divide integers,
and tables that are kept would have to outlive every CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .target import launched

BLOCK = 256


@triton.jit
def taps(p, IN, OUT, MODE):
    """Source positions below and above of output positions p in 0..OUT, and the weight of the second."""
    if MODE == 1:
        # rounded as F.interpolate's is, whatever the dtype
        scale = tl.div_rn(tl.cast(IN, tl.float32), tl.cast(OUT, tl.float32))
        low = tl.minimum((p.to(tl.float32) * scale).to(tl.int32), IN - 1)
        return low, low, low.to(tl.float32) * 0
    if MODE == 0:
        unit = tl.maximum(OUT - 1, 1)
        position = p * (IN - 1)
    else:
        unit = 2 * OUT
        position = tl.maximum((2 * p + 1) * IN - OUT, 0)
    low = tl.minimum(position // unit, IN - 1)
    weight = (position - low * unit).to(tl.float32) / tl.cast(unit, tl.float32)
    return low, tl.minimum(low + 1, IN - 1), weight


@triton.jit
def first_output(k, IN, OUT, MODE):
    """First output position whose source position below is k or more, else OUT. Bilinear, k > 0."""
    if MODE == 0:
        found = tl.cdiv(tl.maximum(k, 0) * (OUT - 1), tl.maximum(IN - 1, 1))
        found = tl.where((IN > 1) & (OUT > 1), found, OUT)
    else:
        found = tl.cdiv(tl.maximum((2 * k + 1) * OUT - IN, 0), 2 * IN)
    return tl.minimum(found, OUT)


@triton.jit
def _first_taker(k, IN, OUT, MODE):
    """An output position before which none samples source position k."""
    if MODE == 1:
        return tl.minimum(tl.maximum(k * OUT // IN - 1, 0), OUT)
    return tl.where(k <= 0, 0, first_output(k - 1, IN, OUT, MODE))


@triton.jit
def _axis_places(low, weights, total, offset, IN, OUT, MODE, BLOCK):
    IN, OUT = tl.cast(IN, tl.int64), tl.cast(OUT, tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = e - 1
    below, above, weight = taps(tl.minimum(tl.maximum(p, 0), OUT - 1), IN, OUT, MODE)
    inside = (p >= 0) & (p < OUT)
    at = offset + e
    tl.store(low + at, below, mask=e < OUT + 2)
    tl.store(weights + at, tl.where(inside, 1.0 - weight, 0.0), mask=e < OUT + 2)
    tl.store(weights + total + at, tl.where(inside, weight, 0.0), mask=e < OUT + 2)


@launched
def places_kernel(low, weights, h, w, H, W, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """`taps` of every row and column of the output, from -1 to one past the last, with weights 0 outside."""
    total = H + W + 4
    if tl.program_id(1) == 0:
        _axis_places(low, weights, total, 0, h, H, MODE, BLOCK)
    else:
        _axis_places(low, weights, total, H + 2, w, W, MODE, BLOCK)


@triton.jit
def _axis_takers(first, weights, IN, OUT, COUNT, MODE, BLOCK):
    IN, OUT = tl.cast(IN, tl.int64), tl.cast(OUT, tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = e % IN
    begin = _first_taker(k, IN, OUT, MODE)
    step = e // IN - 2
    p = begin + step
    below, above, weight = taps(tl.minimum(tl.maximum(p, 0), OUT - 1), IN, OUT, MODE)
    share = tl.where(below == k, 1.0 - weight, 0.0) + tl.where(above == k, weight, 0.0)
    kept = (step >= 0) & (step < COUNT) & (p < OUT)
    tl.store(weights + e, tl.where(kept, share, 0.0), mask=e < (COUNT + 4) * IN)
    tl.store(first + e, begin, mask=e < IN)


@launched
def takers_kernel(first, weights, h, w, H, W, COUNT_Y, COUNT_X, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """For every source row and column, the first output that takes it, and its weights from there on."""
    if tl.program_id(1) == 0:
        _axis_takers(first, weights, h, H, COUNT_Y, MODE, BLOCK)
    else:
        _axis_takers(first + h, weights + (COUNT_Y + 4) * h, w, W, COUNT_X, MODE, BLOCK)


def places(h: int, w: int, H: int, W: int, mode: int, device: torch.device) -> tuple[
    torch.Tensor, torch.Tensor
]:
    """(low, weights) of the resize from (h, w) to (H, W): rows, then columns, from -1 to one past the last.

    low (H + 2 + W + 2), int32: the source position below. weights (2, H + 2 + W + 2), float32: its weight and
    the next position's (at the edge, its own again); 0 for the two positions outside.
    """
    total = H + W + 4
    low = torch.empty(total, dtype=torch.int32, device=device)
    weights = torch.empty(2 * total, dtype=torch.float32, device=device)
    places_kernel[(triton.cdiv(max(H, W) + 2, BLOCK), 2)](low, weights, h, w, H, W, mode, BLOCK)
    return low, weights


def takers(h: int, w: int, H: int, W: int, mode: int, device: torch.device) -> tuple[
    torch.Tensor, torch.Tensor, int, int
]:
    """The transpose: (first, weights, most rows, most columns) of source rows, then of source columns.

    first (h + w), int32: the first output that samples each. weights, float32, (most + 4, h), then
    (most + 4, w): entry 2 + t is the weight in output first + t; the first and last two entries are 0.
    """
    most_y, most_x = most_takers(h, H, mode), most_takers(w, W, mode)
    first = torch.empty(h + w, dtype=torch.int32, device=device)
    numbers_y, numbers_x = (most_y + 4) * h, (most_x + 4) * w
    weights = torch.empty(numbers_y + numbers_x, dtype=torch.float32, device=device)
    grid = (triton.cdiv(max(numbers_y, numbers_x), BLOCK), 2)
    takers_kernel[grid](first, weights, h, w, H, W, most_y, most_x, mode, BLOCK)
    return first, weights, most_y, most_x


def most_takers(size: int, out: int, mode: int) -> int:
    """Bound on the outputs, from the first on, that sample a source position."""
    if mode == 1:
        return min(out, out // size + 4)
    across = -(-2 * (out - 1) // max(size - 1, 1)) if mode == 0 else -(-2 * out // size)
    return min(out, across + 1) if size > 1 else out
