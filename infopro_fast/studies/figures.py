"""Figures of a study: error against K and against memory, and test error over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infopro_fast.figure import new_figure, save

from .summary import Result
from .tables import NAMES, Study

COLORS = {
    "e2e": "black", "checkpoint": "C7", "greedy": "C3", "dgl": "C1", "softmax": "C0", "contrast": "C2", "async": "C8", "infopro_l": "C4",
    "auglocal": "C5", "plain": "C6",
}  # fmt: skip


def draw(study: Study, results: Sequence[Result]) -> list[Path]:
    """The figures that the table has; returns their paths."""
    if study.table == "lambdas" or not results:
        return []
    drawn = {"curves": _curves(results)}
    if study.table != "fused":
        drawn["modules"] = _against_modules(results)
    if any(r.cost for r in results) and study.table != "fused":
        drawn["memory"] = _against_memory(results)
    paths = {study.out / f"{study.table}_{name}.png": figure for name, figure in drawn.items()}
    for path, figure in paths.items():
        save(figure, path)
    return list(paths)


def _against_modules(results: Sequence[Result]):
    """Mean test error against K, bars of one standard error; end to end as a line across."""
    figure, panel = new_figure((6, 4.2))
    for method, of_method in _by_method(results).items():
        line = sorted(of_method, key=lambda r: r.cell.modules)
        if line[-1].cell.modules == 1:
            panel.axhline(line[0].mean, color=COLORS[method], linestyle="--", label=NAMES[method])
            continue
        x, y, bars = zip(*((r.cell.modules, r.mean, r.standard_error) for r in line))
        panel.errorbar(x, y, bars, color=COLORS[method], marker="o", capsize=3, label=NAMES[method])
    columns = sorted({r.cell.modules for r in results} - {1})
    panel.set_xscale("log", base=2)
    panel.set_xticks(columns, [str(K) for K in columns])
    panel.minorticks_off()
    panel.set(xlabel="number of modules K", ylabel="test error (%)")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    return figure


def _against_memory(results: Sequence[Result]):
    """Mean test error against the bytes at the highest point of a step; a number at each point is K."""
    figure, panel = new_figure((6, 4.2))
    for method, of_method in _by_method(r for r in results if r.cost).items():
        x, y, bars = zip(*((r.cost["peak"] / 2**20, r.mean, r.standard_error) for r in sorted(of_method, key=lambda r: r.cost["peak"])))
        panel.errorbar(x, y, bars, color=COLORS[method], marker="o", capsize=3, label=NAMES[method])
        for r in of_method:
            panel.annotate(str(r.cell.modules), (r.cost["peak"] / 2**20, r.mean), fontsize=7, xytext=(3, 3), textcoords="offset points")
    panel.set(xlabel="MiB at the highest point of a step, beyond model, optimizer and batch", ylabel="test error (%)", xscale="log")
    for set_formatter in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    return figure


def _curves(results: Sequence[Result]):
    """Test error over the epochs, a thin line a run and a thick one for the mean; a panel for every K."""
    columns = sorted({r.cell.modules for r in results if r.cell.modules > 1}) or [1]
    figure, panels = new_figure((4.2 * len(columns), 3.8), len(columns))
    for K, panel in zip(columns, [panels] if len(columns) == 1 else panels):
        for r in (r for r in results if r.cell.modules in (1, K)):
            epochs = range(1, 1 + len(r.curves[0]))
            for curve in r.curves:
                panel.plot(epochs, curve, color=COLORS[r.cell.method], linewidth=0.6, alpha=0.6)
            mean = [sum(at) / len(at) for at in zip(*r.curves)]
            panel.plot(epochs, mean, color=COLORS[r.cell.method], linewidth=2, label=NAMES[r.cell.method])
        panel.set(xlabel="epoch", ylabel="test error (%)", title=f"K = {K}", yscale="log")
        for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3, which="both")
    return figure


def _by_method(results) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(r.cell.method, []).append(r)
    return found
