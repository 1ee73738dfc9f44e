"""The files of a report, in benchmarks/results/<gpu>/."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing

import torch

from benchmarks import workloads
from benchmarks.device import provenance
from benchmarks.gpu.claims import claims
from benchmarks.table import Row, claims_table, gpu_markdown, size
from infopro_fast import figure
from infopro_fast.whole_files import replace_file


def line(r: Row) -> str:
    if r.seconds is None:
        return r.note
    host = "" if r.host_seconds is None else f", host {1e6 * r.host_seconds:.0f} us"
    multiple = "" if r.multiple is None else f", {r.multiple:.1f} x floor"
    peak = "" if r.peak_bytes is None else f", peak {size(r.peak_bytes)}"
    return f"{1e3 * r.seconds:.3g} ms{host}{multiple}{peak}" + (f" ({r.note})" if r.note else "")


def here() -> dict[str, str | int]:
    return provenance("cuda" if torch.cuda.is_available() else "cpu")


def write(folder: pathlib.Path, results: list[Row]) -> None:
    """Write results.jsonl, results.md and bars.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    where = here()
    foot = "\n\n" + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n"
    texts = {
        "results.jsonl": "".join(json.dumps(dataclasses.asdict(r) | where) + "\n" for r in results),
        "results.md": gpu_markdown(results) + foot, "bars.md": claims_table(claims(results)) + foot,
    }
    for name, text in texts.items():
        replace_file(folder / name, text.encode())


def plot(folder: pathlib.Path, results: typing.Iterable[Row]) -> None:
    """Draw batch_size.png: time and peak of the decoder over the batch size."""
    rows = [r for r in results if r.op == "batch size"]
    drawing, panels = figure.new_figure((11, 4.2), 2)
    measures = (("seconds", "forward + backward, ms"), ("peak_bytes", "peak above inputs, MiB"))
    for axes, (of, unit) in zip(panels, measures):
        for method in dict.fromkeys(r.method for r in rows):
            same = [r for r in rows if r.method == method and getattr(r, of)]
            own = [(int(re.match(r"N(\d+)", r.shape).group(1)), r) for r in same]
            own.sort(key=lambda pair: pair[0])
            y = [getattr(r, of) * (1e3 if of == "seconds" else 2**-20) for _, r in own]
            width = 2.5 if method == workloads.OURS else 1.2
            axes.plot([N for N, _ in own], y, marker="o", linewidth=width, label=method)
        axes.set(xscale="log", yscale="log" if any(len(own.get_xdata()) for own in axes.lines) else "linear")
        axes.set(xlabel="batch size", ylabel=unit)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
    where = "{device}, torch {torch}, {commit}".format(**here())
    drawing.suptitle(f"reconstruction_loss, 64 channels 8x8 to 32x32: {where}", fontsize=9)
    figure.save(drawing, folder / "batch_size.png")
