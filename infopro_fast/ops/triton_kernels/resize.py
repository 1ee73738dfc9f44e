"""Where a resize takes its samples, as tables that Triton kernels look up: as torch.nn.functional.interpolate places them.

A mode is an index into `ops.resize.RESIZES`: 0, bilinear with align_corners=True; 1, nearest; 2, bilinear with align_corners=False. A
bilinear position is an exact fraction, as on the CPU (F.interpolate rounds it in float32); 32 bits hold it while `ops.resize.fits`.
Made anew by one launch for each pass: kernels that found positions themselves would divide integers more than they add, and a table that
is kept would have to outlive every CUDA graph.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from .target import Compilation, compilation, launched

BLOCK = 256


@triton.jit
def taps(p, IN, OUT, MODE: tl.constexpr):
    """Output positions p, inside 0..OUT: the source positions below and above, and the weight of the second."""
    if MODE == 1:
        scale = tl.div_rn(tl.cast(IN, tl.float32), tl.cast(OUT, tl.float32))  # rounded as F.interpolate's is, whatever the dtype
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
def _first(k, IN, OUT, MODE: tl.constexpr):
    """No output position before this one takes source position k; the first whose source position below is k - 1 or more."""
    if MODE == 1:
        return tl.minimum(tl.maximum(k * OUT // IN - 1, 0), OUT)
    if MODE == 0:
        found = tl.where((IN > 1) & (OUT > 1), tl.cdiv(tl.maximum(k - 1, 0) * (OUT - 1), tl.maximum(IN - 1, 1)), OUT)
    else:
        found = tl.cdiv(tl.maximum((2 * k - 1) * OUT - IN, 0), 2 * IN)
    return tl.where(k <= 0, 0, tl.minimum(found, OUT))


@triton.jit
def _axis_places(low, weights, total, offset, IN, OUT, MODE: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = e - 1
    below, above, weight = taps(tl.minimum(tl.maximum(p, 0), OUT - 1), IN, OUT, MODE)
    inside = (p >= 0) & (p < OUT)
    at = offset + e
    tl.store(low + at, below, mask=e < OUT + 2)
    tl.store(weights + at, tl.where(inside, 1.0 - weight, 0.0), mask=e < OUT + 2)
    tl.store(weights + total + at, tl.where(inside, weight, 0.0), mask=e < OUT + 2)


@launched
def _places_kernel(low, weights, h, w, H, W, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows and of columns, for each output position from -1 on to one past the last: `taps`, weights 0 outside."""
    total = H + W + 4
    if tl.program_id(1) == 0:
        _axis_places(low, weights, total, 0, h, H, MODE, BLOCK)
    else:
        _axis_places(low, weights, total, H + 2, w, W, MODE, BLOCK)


@triton.jit
def _axis_takers(first, weights, IN, OUT, COUNT, MODE: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = e % IN
    begin = _first(k, IN, OUT, MODE)
    step = e // IN - 2
    p = begin + step
    below, above, weight = taps(tl.minimum(tl.maximum(p, 0), OUT - 1), IN, OUT, MODE)
    share = tl.where(below == k, 1.0 - weight, 0.0) + tl.where(above == k, weight, 0.0)
    kept = (step >= 0) & (step < COUNT) & (p < OUT)
    tl.store(weights + e, tl.where(kept, share, 0.0), mask=e < (COUNT + 4) * IN)
    tl.store(first + e, begin, mask=e < IN)


@launched
def _takers_kernel(first, weights, h, w, H, W, COUNT_Y, COUNT_X, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows and of columns, for each source position: the first output that takes it, and the weights in it and those after."""
    if tl.program_id(1) == 0:
        _axis_takers(first, weights, h, H, COUNT_Y, MODE, BLOCK)
    else:
        _axis_takers(first + h, weights + (COUNT_Y + 4) * h, w, W, COUNT_X, MODE, BLOCK)


def places(h: int, w: int, H: int, W: int, mode: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, weights) of the resize from (h, w) to (H, W), for positions from -1 on to one past the last: rows, then columns.

    low (H + 2 + W + 2), int32: the source position below. weights (2, H + 2 + W + 2), float32: of that, and of the next (the last itself
    at the edge), 0 for the two positions outside.
    """
    total = H + W + 4
    low = torch.empty(total, dtype=torch.int32, device=device)
    weights = torch.empty(2 * total, dtype=torch.float32, device=device)
    _places_kernel[(triton.cdiv(max(H, W) + 2, BLOCK), 2)](low, weights, h, w, H, W, mode, BLOCK)
    return low, weights


def takers(h: int, w: int, H: int, W: int, mode: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """The transpose: (first, weights, most rows, most columns), for source rows, then for source columns.

    first (h + w), int32: the first output that takes each. weights, float32, (most + 4, h), then (most + 4, w): in entry 2 + t that of
    output first + t, in two before and two after 0.
    """
    most_y, most_x = most_takers(h, H, mode), most_takers(w, W, mode)
    first = torch.empty(h + w, dtype=torch.int32, device=device)
    numbers_y, numbers_x = (most_y + 4) * h, (most_x + 4) * w
    weights = torch.empty(numbers_y + numbers_x, dtype=torch.float32, device=device)
    _takers_kernel[(triton.cdiv(max(numbers_y, numbers_x), BLOCK), 2)](first, weights, h, w, H, W, most_y, most_x, mode, BLOCK)
    return first, weights, most_y, most_x


def most_takers(size: int, out: int, mode: int) -> int:
    """No source position is taken by outputs more than this many apart, from the first on."""
    if mode == 1:
        return min(out, out // size + 4)
    across = -(-2 * (out - 1) // max(size - 1, 1)) if mode == 0 else -(-2 * out // size)
    return min(out, across + 1) if size > 1 else out


def configurations(cc: int) -> typing.Iterator[Compilation]:
    """Both kernels in every mode."""
    for mode in range(3):
        for kernel, table in ((_places_kernel, "low"), (_takers_kernel, "first")):
            yield compilation(kernel, {table: "*i32"}, {"MODE": mode, "BLOCK": BLOCK}, ("COUNT_Y", "COUNT_X"))
