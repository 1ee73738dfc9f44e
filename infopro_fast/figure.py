"""Figures as PNG files, and tables of text: what planner, trainer, studies and benchmarks draw with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first two to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def new_figure(size: tuple[float, float], columns: int = 1, ratios: Sequence[float] | None = None):
    """A figure of ``size`` inches and its panel; for ``columns`` above 1 an array of panels, ``ratios`` their widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, width_ratios=ratios)


def save(figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    aside = path.with_name(f".aside-{path.name}")
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, path)
