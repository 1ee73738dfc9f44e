"""A training step's time and memory as a table and a figure: ``python -m benchmarks.step_figure``.

Reads results/results.jsonl, which ``python -m benchmarks.report`` writes before it calls this, and writes
results/train_step.md and results/train_step.png. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Sequence

from benchmarks.table import Row
from infopro_fast.figure import new_figure, save
from infopro_fast.whole_files import replace_file

RESULTS = pathlib.Path(__file__).parent / "results"
LABELS = {
    "released": "released formulation, eager",
    "released channels_last": "released formulation, channels_last",
    "reference": "here, the losses in plain PyTorch", "ours": "here",
}
COLORS = {"released": "C7", "released channels_last": "C1", "reference": "C0", "ours": "C2"}


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a training step. Raises ValueError where the file has none."""
    lines = map(json.loads, path.read_text().splitlines())
    rows = [Row(**fields) for fields in lines if fields["op"] == "train_step"]
    if not rows:
        raise ValueError(f"{path}: expected rows of train_step, got none: run python -m benchmarks.report")
    return rows


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """{method: {K: row}}, both in the order of the rows; shapes end with " K<number>"."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row.method, {})[int(re.search(r" K(\d+)$", row.shape)[1])] = row
    return found


def where(rows: Sequence[Row]) -> str:
    """What was measured, and on what; all rows are of one run of the report."""
    row, (network, batch, _) = rows[0], rows[0].shape.split(" ")
    machine = f"{row.device}, {row.threads} threads, {row.isa}, torch {row.torch}, {row.commit}"
    return f"{network}, batch {batch[1:]}; {machine}"


def markdown(rows: Sequence[Row]) -> str:
    """Return milliseconds a step, in brackets over ours at the same K, and the rise of the resident set."""
    methods = by_method(rows)
    columns = list(methods["ours"])

    def grid(cell) -> str:
        lines = ["| |" + "".join(f" K = {K} |" for K in columns), "|---|" + "---|" * len(columns)]
        for m, of_method in methods.items():
            lines.append(f"| {LABELS[m]} |" + "".join(f" {cell(row)} |" for row in of_method.values()))
        return "\n".join(lines)

    def time(row: Row) -> str:
        ratio = row.seconds / next(r for r in methods["ours"].values() if r.shape == row.shape).seconds
        return f"{1e3 * row.seconds:.0f}" + ("" if row.method == "ours" else f" ({ratio:.1f})")

    parts = [
        f"A training step of {where(rows)}.",
        "Milliseconds, medians; every method in a process of its own, its Ks in turn. "
        "In brackets times of ours.",
        grid(time),
        "Peak: MiB by which a process' resident set rises in a step.",
        grid(lambda row: f"{row.peak_bytes / 2**20:.0f}"),
    ]
    return "\n\n".join(parts) + "\n"


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Bars of every method, grouped by K: milliseconds and MiB."""
    methods = by_method(rows)
    columns = list(methods["ours"])
    figure, panels = new_figure((12, 4.2), 2)
    measures = (
        (lambda row: 1e3 * row.seconds, "ms a step"),
        (lambda row: row.peak_bytes / 2**20, "peak of a step, MiB"),
    )
    for panel, (value, unit) in zip(panels, measures):
        for i, (method, of_method) in enumerate(methods.items()):
            x = [group + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for group in range(len(columns))]
            style = dict(color=COLORS[method], label=LABELS[method])
            bars = panel.bar(x, [value(of_method[K]) for K in columns], 0.8 / len(methods), **style)
            panel.bar_label(bars, fmt="%.0f", fontsize=7)
        panel.set_xticks(range(len(columns)), [f"K = {K}" for K in columns])
        panel.set_ylabel(unit)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(where(rows), fontsize=9)
    save(figure, path)


def write(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """train_step.md and train_step.png, each whole or not at all; returns their paths."""
    table, figure = folder / "train_step.md", folder / "train_step.png"
    replace_file(table, markdown(rows).encode())
    draw(rows, figure)
    return [table, figure]


def main() -> None:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_figure", description=about)
    where_to = "folder with results.jsonl; the table and the figure are written there too"
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help=where_to)
    folder = parser.parse_args().results
    print("written: " + ", ".join(map(str, write(read(folder / "results.jsonl"), folder))))


if __name__ == "__main__":
    main()
