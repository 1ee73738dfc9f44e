"""Figures: a study's errors against K, against memory and over epochs; an analysis over depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from infopro_fast.figure import new_figure, save

from .results import Result
from .tables import NAMES, Study

COLORS = {
    "e2e": "black", "checkpoint": "C7", "greedy": "C3", "dgl": "C1", "softmax": "C0", "contrast": "C2",
    "async": "C8", "infopro_l": "C4", "auglocal": "C5", "plain": "C6",
}


def draw(study: Study, results: Sequence[Result]) -> list[Path]:
    """Draw the figures that the table has and return their paths."""
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
    """Mean test error against K with bars of one standard error; end to end is a horizontal line."""
    figure, panel = new_figure((6, 4.2))
    for method, of_method in _by_method(results).items():
        line = sorted(of_method, key=lambda r: r.cell.modules)
        if line[-1].cell.modules == 1:
            panel.axhline(line[0].mean, color=COLORS[method], linestyle="--", label=NAMES[method])
            continue
        _points(panel, method, [r.cell.modules for r in line], line)
    columns = sorted({r.cell.modules for r in results} - {1})
    panel.set_xscale("log", base=2)
    panel.set_xticks(columns, [str(K) for K in columns])
    panel.minorticks_off()
    panel.set(xlabel="number of modules K", ylabel="test error (%)")
    _finish(panel)
    return figure


def _against_memory(results: Sequence[Result]):
    """Mean test error against the peak bytes of a step; a number at each point is K."""
    figure, panel = new_figure((6, 4.2))
    for method, of_method in _by_method(r for r in results if r.cost).items():
        line = sorted(of_method, key=lambda r: r.cost["peak"])
        x = [r.cost["peak"] / 2**20 for r in line]
        _points(panel, method, x, line)
        for at, r in zip(x, line):
            where = {"xytext": (3, 3), "textcoords": "offset points"}
            panel.annotate(str(r.cell.modules), (at, r.mean), fontsize=7, **where)
    xlabel = "MiB at the highest point of a step, beyond model, optimizer and batch"
    panel.set(xlabel=xlabel, ylabel="test error (%)", xscale="log")
    for set_formatter in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    _finish(panel)
    return figure


def _points(panel, method: str, x: Sequence[float], line: Sequence[Result]) -> None:
    y, bars = [r.mean for r in line], [r.standard_error for r in line]
    panel.errorbar(x, y, bars, color=COLORS[method], marker="o", capsize=3, label=NAMES[method])


def _finish(panel, fontsize: int = 8, which: str = "major") -> None:
    panel.legend(fontsize=fontsize)
    panel.grid(alpha=0.3, which=which)


def _curves(results: Sequence[Result]):
    """Test error over the epochs, a thin line a run and a thick one for the mean; a panel for every K."""
    columns = sorted({r.cell.modules for r in results if r.cell.modules > 1}) or [1]
    figure, panels = new_figure((4.2 * len(columns), 3.8), len(columns))
    for K, panel in zip(columns, [panels] if len(columns) == 1 else panels):
        for r in (r for r in results if r.cell.modules in (1, K)):
            epochs, color = range(1, 1 + len(r.curves[0])), COLORS[r.cell.method]
            for curve in r.curves:
                panel.plot(epochs, curve, color=color, linewidth=0.6, alpha=0.6)
            mean = [sum(at) / len(at) for at in zip(*r.curves)]
            panel.plot(epochs, mean, color=color, linewidth=2, label=NAMES[r.cell.method])
        panel.set(xlabel="epoch", ylabel="test error (%)", title=f"K = {K}", yscale="log")
        for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
        _finish(panel, 7, "both")
    return figure


def _by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(r.cell.method, []).append(r)
    return found


def draw_analysis(found: Sequence[dict], path: Path) -> None:
    """Write a PNG of information about image and label and of linear separability over depth.

    found: from `analyze.summarize`. Error bars are standard errors, for methods with more than one run.
    """
    figure, (image, label, linear) = new_figure((16, 4.8), 3)
    known, classes, blocks = found[0]["baseline"], found[0]["classes"], found[0]["blocks"]
    for i, method in enumerate(found):
        color = _color(i, len(found))
        _curve_over_depth(image, method, "pixel_information", 1, color)
        _curve_over_depth(label, method, "label_information", 1, color)
        _curve_over_depth(linear, method, "linear_accuracy", 100, color)

    image.set(title="image: I(h, x), lower bound", ylabel="nats a pixel and channel")
    _limit(image, known["constant"] - known["floor"], "image itself")
    loss = image.secondary_yaxis("right", functions=(lambda v: known["constant"] - v,) * 2)
    loss.set_ylabel("reconstruction loss, nats a pixel and channel")
    label.set(title="label: I(h, y), lower bound", ylabel="nats")
    _limit(label, known["label_entropy"], "H(y)")
    bits = label.secondary_yaxis("right", functions=(lambda v: v / math.log(2), lambda v: v * math.log(2)))
    bits.set_ylabel("bits")
    linear.set(title="linear separability", ylabel="test accuracy of a linear probe, %")
    _limit(linear, 100 / classes, "chance")
    for panel in (image, label, linear):
        depths, names = [row["depth"] for row in blocks], [row["block"] for row in blocks]
        panel.set_xticks(depths, names, rotation=45, ha="right", fontsize=8)
        panel.grid(alpha=0.3)
    linear.legend(fontsize=8)
    size, counts = "x".join(map(str, found[0]["image_size"])), [len(method["seeds"]) for method in found]
    runs = min(counts) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    title = f"{found[0]['network']}, {found[0]['dataset']}, {size} images; runs a method: {runs}"
    figure.suptitle(f"{title}; mean ± standard error", fontsize=10)
    save(figure, path)


def _curve_over_depth(panel, method: dict, quantity: str, scale: float, color) -> None:
    values = [row[quantity] for row in method["blocks"]]
    errors = None if values[0]["error"] is None else [scale * value["error"] for value in values]
    depths, means = [row["depth"] for row in method["blocks"]], [scale * value["mean"] for value in values]
    style = {"marker": "o", "markersize": 4, "capsize": 3}
    panel.errorbar(depths, means, errors, color=color, label=method["method"], **style)


def _limit(panel, value: float, name: str) -> None:
    panel.axhline(value, color="0.4", linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
    panel.annotate(name, (0.01, value), fontsize=8, color="0.4", **place)


def _color(i: int, methods: int):
    from matplotlib import colormaps

    return colormaps["tab10" if methods <= 10 else "tab20"](i)
