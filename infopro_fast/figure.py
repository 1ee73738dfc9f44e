"""Figures as PNG files, and tables of text, for planner, trainer, studies and benchmarks."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from infopro_fast.whole_files import replace_file


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table: columns of equal width, the first two aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def new_figure(size: tuple[float, float], columns: int = 1, ratios: Sequence[float] | None = None):
    """Return a figure of ``size`` inches and its panel; with several ``columns`` an array of panels.

    ratios: relative widths of the columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy: imported where something is drawn
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, width_ratios=ratios)


def save(figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace_file(path, content.getvalue())
