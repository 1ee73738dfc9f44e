"""Measurements and claims of the reports of CPU and GPU, and their tables in Markdown."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence

from infopro_fast import figure
from infopro_fast.plan_file import for_people


@dataclasses.dataclass
class Row:
    """One measurement, or in ``note`` why there is none. None: not measured.

    seconds: median. host_seconds: until a call returns, whatever the device still does. multiple: of the
        floor.
    saved_bytes: kept by autograd. peak_bytes: above the inputs. transient_bytes: the peak without the
        results.
    """

    op: str
    shape: str
    method: str
    direction: str = "both"
    seconds: float | None = None
    dtype: str = "float32"
    host_seconds: float | None = None
    multiple: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    transient_bytes: int | None = None
    error: float | None = None
    note: str = ""
    device: str = ""
    threads: int = 0
    isa: str = ""
    torch: str = ""
    python: str = ""
    infopro_fast: str = ""
    commit: str = ""


class Claim(typing.NamedTuple):
    """``value`` is at least, or at most, ``bar``; None: not measured. against: the best other method."""

    what: str
    value: float | None
    bar: float
    at_least: bool = False
    unit: str = "x"
    against: str = ""

    def holds(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def claims_table(claims: Iterable[Claim]) -> str:
    lines = []
    for c in claims:
        value = "" if c.value is None else f"{c.value:.3g} {c.unit}"
        bar = f"{'at least' if c.at_least else 'at most'} {c.bar:.3g} {c.unit}"
        holds = {None: "not measured", True: "yes", False: "**no**"}[c.holds()]
        lines.append((c.what, value, c.against, bar, holds))
    return figure.markdown(("what", "measured", "against", "bar", "holds"), lines)


def markdown(rows: Sequence[Row]) -> str:
    """One line a row. time / ours: times longer than ours on the same op, shape and direction."""
    ours = {(r.op, r.shape, r.direction): r.seconds for r in rows if r.method == "ours"}
    numbers = ("ms", "time / ours", "kept", "peak", "transient", "error")
    head, lines = ("op", "shape", "direction", "method", *numbers, "where"), []
    for r in rows:
        reference = ours.get((r.op, r.shape, r.direction))
        ratio = f"{r.seconds / reference:.2f}" if reference else ""
        versions = f"torch {r.torch}, Python {r.python}, {r.infopro_fast} at {r.commit}"
        where = f"{r.device}, {r.threads} threads, {r.isa}, {versions}"
        error = "" if r.error is None else f"{r.error:.1e}"
        sizes = (size(r.saved_bytes), size(r.peak_bytes), size(r.transient_bytes))
        milliseconds = f"{1e3 * r.seconds:.3g}"
        lines.append((r.op, r.shape, r.direction, r.method, milliseconds, ratio, *sizes, error, where))
    return figure.markdown(head, lines)


def gpu_markdown(rows: Iterable[Row]) -> str:
    """One line a row, with the host's time, multiples of the floor, and why a method was not measured."""
    numbers, lines = ("ms", "host, us", "x floor", "peak", "error"), []
    head = ("op", "shape", "dtype", "direction", "method", *numbers, "note")
    for r in rows:
        numbers = ((r.seconds, 1e3, ".3g"), (r.host_seconds, 1e6, ".0f"), (r.multiple, 1, ".2f"))
        cells = ["" if value is None else format(unit * value, form) for value, unit, form in numbers]
        error = "" if r.error is None else f"{r.error:.1e}"
        note = r.note.replace("|", "/")
        lines.append((r.op, r.shape, r.dtype, r.direction, r.method, *cells, size(r.peak_bytes), error, note))
    return figure.markdown(head, lines)


def size(count: int | None) -> str:
    return "" if count is None else for_people(count)
