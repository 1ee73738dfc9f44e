"""Rows of measurements as a Markdown table: ratios against ours, so that a row where we are slower shows as one below 1."""

from __future__ import annotations

import dataclasses

PROVENANCE = ("device", "threads", "isa", "torch", "python", "infopro_fast", "commit")


@dataclasses.dataclass
class Row:
    """One measurement; seconds: median. Bytes and error are None where they were not measured."""

    op: str
    shape: str
    method: str
    direction: str
    seconds: float
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    transient_bytes: int | None = None
    error: float | None = None
    device: str = ""
    threads: int = 0
    isa: str = ""
    torch: str = ""
    python: str = ""
    infopro_fast: str = ""
    commit: str = ""

    @classmethod
    def from_info(cls, info: dict, seconds: float) -> Row:
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(seconds=seconds, **{k: v for k, v in info.items() if k in names})


def size(count: int | None) -> str:
    """Bytes for people: 2**10 and up in KiB, 2**20 and up in MiB."""
    if count is None:
        return ""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def markdown(rows: list[Row]) -> str:
    """One table; time / ours is how many times longer a method takes than ours on the same op, shape and direction."""
    ours = {(r.op, r.shape, r.direction): r.seconds for r in rows if r.method == "ours"}
    head = ("op", "shape", "direction", "method", "ms", "time / ours", "kept", "peak", "transient", "error", "where")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        reference = ours.get((r.op, r.shape, r.direction))
        ratio = f"{r.seconds / reference:.2f}" if reference else ""
        where = f"{r.device}, {r.threads} threads, {r.isa}, torch {r.torch}, Python {r.python}, {r.infopro_fast} at {r.commit}"
        error = "" if r.error is None else f"{r.error:.1e}"
        cells = (r.op, r.shape, r.direction, r.method, f"{1e3 * r.seconds:.3g}", ratio, size(r.saved_bytes), size(r.peak_bytes),
                 size(r.transient_bytes), error, where)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
