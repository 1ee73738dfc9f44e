"""The files that measurements on a GPU are written to, into benchmarks/results/<gpu>/."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing

import torch

from benchmarks import workloads
from benchmarks.device import provenance
from benchmarks.gpu.claims import claims_table
from benchmarks.gpu.meter import Result
from benchmarks.table import size


def line(r: Result) -> str:
    if r.seconds is None:
        return r.note
    host = "" if r.host_seconds is None else f", host {1e6 * r.host_seconds:.0f} us"
    multiple = "" if r.multiple is None else f", {r.multiple:.1f} x floor"
    peak = "" if r.peak_bytes is None else f", peak {size(r.peak_bytes)}"
    return f"{1e3 * r.seconds:.3g} ms{host}{multiple}{peak}" + (f" ({r.note})" if r.note else "")


def table(results: typing.Iterable[Result]) -> str:
    head = ("part", "shape", "dtype", "direction", "method", "ms", "host, us", "x floor", "peak", "error", "note")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        cells = (
            r.part, r.shape, r.dtype, r.direction, r.method, "" if r.seconds is None else f"{1e3 * r.seconds:.3g}",
            "" if r.host_seconds is None else f"{1e6 * r.host_seconds:.0f}", "" if r.multiple is None else f"{r.multiple:.2f}",
            size(r.peak_bytes), "" if r.error is None else f"{r.error:.1e}", r.note.replace("|", "/"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def here() -> dict[str, str | int]:
    return provenance("cuda" if torch.cuda.is_available() else "cpu")


def write(folder: pathlib.Path, results: list[Result]) -> None:
    """results.jsonl, results.md and bars.md, each whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    where = here()
    foot = "\n\n" + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n"
    texts = {
        "results.jsonl": "".join(json.dumps(dataclasses.asdict(r) | where) + "\n" for r in results),
        "results.md": table(results) + foot, "bars.md": claims_table(results) + foot,
    }  # fmt: skip
    for name, text in texts.items():
        aside = folder / (name + ".part")
        aside.write_text(text)
        aside.replace(folder / name)


def plot(folder: pathlib.Path, results: typing.Iterable[Result]) -> None:
    """batch_size.png: time and peak of the decoder over the batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in results if r.part == "batch size"]
    figure = Figure(figsize=(11, 4.2), constrained_layout=True)
    FigureCanvasAgg(figure)
    for axes, of, unit in zip(figure.subplots(1, 2), ("seconds", "peak_bytes"), ("forward + backward, ms", "peak above inputs, MiB")):
        for method in dict.fromkeys(r.method for r in rows):
            own = [(int(re.match(r"N(\d+)", r.shape).group(1)), r) for r in rows if r.method == method and getattr(r, of)]
            own.sort(key=lambda pair: pair[0])
            y = [getattr(r, of) * (1e3 if of == "seconds" else 2**-20) for _, r in own]
            axes.plot([N for N, _ in own], y, marker="o", linewidth=2.5 if method == workloads.OURS else 1.2, label=method)
        axes.set(xscale="log", yscale="log" if any(len(own.get_xdata()) for own in axes.lines) else "linear")
        axes.set(xlabel="batch size", ylabel=unit)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
    where = "{device}, torch {torch}, {commit}".format(**here())
    figure.suptitle(f"reconstruction_loss, 64 channels 8x8 to 32x32: {where}", fontsize=9)
    aside = folder / "batch_size.png.part"
    figure.savefig(aside, dpi=130, format="png")
    aside.replace(folder / "batch_size.png")
