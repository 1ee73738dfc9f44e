"""How the Triton kernels of `reconstruction_loss` split a sweep over the batch into items, and a program's
scratch.

An item is a sample, or a strip of its rows with the rows around that it needs. A program takes one item at a
time and keeps its maps in its scratch. All of this follows from the shape and the number of programs that run
at a time.
"""

from __future__ import annotations

import functools
import typing

from ..resize import source


class Plan(typing.NamedTuple):
    """How a sweep is split. Rows are of the image; in the backward sweep `rows` are of the features."""

    rows: int  # an item's own
    strips: int  # items of a sample
    activation_rows: int  # of z and a that an item computes at most: its own and those around
    gradient_rows: int
    tap_rows: int  # of the features
    # rows of the image that one of the features goes to at most, from the first on; 0 without resize
    row_outputs: int
    column_outputs: int
    scratch: int  # float32 numbers a program
    programs: int


class Shape(typing.NamedTuple):
    N: int
    C: int
    h: int
    w: int
    H: int
    W: int
    K: int
    nearest: bool

    @property
    def resize(self) -> bool:
        return (self.h, self.w) != (self.H, self.W)

    @property
    def row_outputs(self) -> int:
        return outputs_of_one(self.h, self.H, self.nearest) if self.resize else 0

    @property
    def column_outputs(self) -> int:
        return outputs_of_one(self.w, self.W, self.nearest) if self.resize else 0


MIN_SCRATCH = 32 * 2**20  # bytes: below, a batch is small whatever it takes


def scratch_budget(shape: Shape) -> int:
    """Bytes of all programs' scratch: a quarter of the resized map in float32, at least 32 MiB."""
    return max(MIN_SCRATCH, shape.N * shape.C * shape.H * shape.W)


def first_output(i: int, n_in: int, n_out: int, nearest: bool) -> int:
    """`_first_output` in Python."""
    if nearest:
        return max(i * n_out // n_in - 1, 0)
    return (i - 1) * (n_out - 1) // (n_in - 1) + 1 if i > 0 and n_in > 1 else 0


@functools.cache
def outputs_of_one(n_in: int, n_out: int, nearest: bool) -> int:
    """The most outputs, from first_output(i) on, that it takes to see all that take input i."""
    last = {}
    for p in range(n_out):
        low, high, weighs = source(p, n_in, n_out, nearest)
        last[low] = p
        if weighs:
            last[high] = p
    return max(p - first_output(i, n_in, n_out, nearest) + 1 for i, p in last.items())


def _windows(shape: Shape, sweep: str, rows: int) -> tuple[int, int, int]:
    """Rows of z, g and features that an item of ``rows`` rows needs at most: the kernels' bounds."""
    N, C, h, w, H, W, K, nearest = shape
    activation = gradient = taps = 0
    for first in range(0, h if sweep == "backward" else H, rows):
        if sweep == "backward":
            last = min(first + rows, h)
            y0, y1, halo = first, last, 3
            if shape.resize:
                y0 = first_output(first, h, H, nearest)
                y1 = min(first_output(last - 1, h, H, nearest) + shape.row_outputs, H)
        else:
            y0, y1, halo = first, min(first + rows, H), 2 if sweep == "loss" else 0
        a0, a1 = max(y0 - halo, 0), min(y1 + halo, H)
        g0, g1 = max(y0 - halo + 1, 0), min(y1 + halo - 1, H)
        t0, t1 = source(max(a0 - 1, 0), h, H, nearest)[0], source(min(a1, H - 1), h, H, nearest)[1] + 1
        activation, gradient, taps = max(activation, a1 - a0), max(gradient, g1 - g0), max(taps, t1 - t0)
    return activation, gradient, taps


def _scratch(shape: Shape, sweep: str, rows: int) -> int:
    N, C, h, w, H, W, K, nearest = shape
    activation, gradient, taps = _windows(shape, sweep, rows)
    low = 9 * K * taps * w + 3 * K * taps * W if shape.resize else 0  # T and E
    total = K * activation * W
    if sweep != "statistics":
        low = max(low, K * (activation + 2) * (W + 2))  # a, when T and E are no longer needed
        total += 3 * (gradient + 2) * (W + 2) + 4 * K
    if sweep == "backward" and shape.resize:
        low = max(low, 3 * K * rows * W + 9 * K * rows * w)  # dE and dT, when a is no longer needed
        total += h * shape.row_outputs + w * shape.column_outputs
    return -(-(total + low) // 32) * 32


def _item_cost(shape: Shape, sweep: str, windows: tuple[int, int, int]) -> int:
    """Multiply-adds of an item and of the rows around it, roughly: only the ratio between plans counts."""
    activation, gradient, taps = windows
    K, W, C = shape.K, shape.W, shape.C
    z = 9 * K * C * activation * W
    if shape.resize:
        z = 9 * K * C * taps * shape.w + K * W * (18 * taps + 6 * activation)
    once = z + (0 if sweep == "statistics" else 81 * K * W * gradient)
    return once + (2 * z if sweep == "backward" else 0)


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape, sweep: str, places: int) -> Plan:
    """Strips and programs of a sweep, "statistics", "loss" or "backward". places: programs that the device
    runs at a time.

    Of the halvings of a sample, that which takes least: rounds of all programs times what an item costs.
    """
    best = None
    rows = shape.h if sweep == "backward" else shape.H
    while True:
        windows = _windows(shape, sweep, rows)
        size = _scratch(shape, sweep, rows)
        strips = -(-(shape.h if sweep == "backward" else shape.H) // rows)
        programs = max(1, min(shape.N * strips, places, scratch_budget(shape) // (4 * size)))
        cost = -(-shape.N * strips // programs) * _item_cost(shape, sweep, windows)
        if best is None or cost < best[0]:
            best = cost, Plan(rows, strips, *windows, shape.row_outputs, shape.column_outputs, size, programs)
        if rows <= (1 if sweep == "backward" else 4):
            return best[1]
        rows = -(-rows // 2)


def workspace(shape: Shape, sweep: str, places: int) -> int:
    """Bytes that a launch of the sweep allocates for itself: scratch and partial sums of its programs.

    Of "statistics" the sums are of every item, mean and squares in float64: all that grows with N where the
    programs do not.
    """
    cut, K = plan(shape, sweep, places), shape.K
    sums = {
        "statistics": 4 * K * shape.N * cut.strips, "loss": cut.programs * (29 * K + 4),
        "backward": cut.programs * 9 * K * shape.C,
    }[sweep]
    return 4 * (cut.programs * cut.scratch + sums)
