"""Figures of a study: error against K and against memory, and test error over the epochs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from infopro_fast.figure import new_figure, save
from infopro_fast.whole_files import replace_file

from .results import Result
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


# ---------------------------------------------------------------------------------------------------------------------
# An analysis


def draw_analysis(found: Sequence[dict], path: Path) -> None:
    """Write a PNG. found: as `analyze.summarize` gives it. Error bars: standard errors, where a method has more than one run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    image, label, linear = figure.subplots(1, 3)
    known, classes = found[0]["baseline"], found[0]["classes"]
    for i, method in enumerate(found):
        for panel, quantity, scale in ((image, "pixel_information", 1), (label, "label_information", 1), (linear, "linear_accuracy", 100)):
            _curve_over_depth(panel, method, quantity, scale, color=_color(i, len(found)))

    image.set(title="image: I(h, x), lower bound", ylabel="nats a pixel and channel")
    _limit(image, known["constant"] - known["floor"], "image itself")
    loss = image.secondary_yaxis("right", functions=(lambda v: known["constant"] - v, lambda v: known["constant"] - v))
    loss.set_ylabel("reconstruction loss, nats a pixel and channel")
    label.set(title="label: I(h, y), lower bound", ylabel="nats")
    _limit(label, known["label_entropy"], "H(y)")
    label.secondary_yaxis("right", functions=(lambda v: v / math.log(2), lambda v: v * math.log(2))).set_ylabel("bits")
    linear.set(title="linear separability", ylabel="test accuracy of a linear probe, %")
    _limit(linear, 100 / classes, "chance")
    for panel in (image, label, linear):
        blocks = found[0]["blocks"]
        panel.set_xticks([row["depth"] for row in blocks], [row["block"] for row in blocks], rotation=45, ha="right", fontsize=8)
        panel.grid(alpha=0.3)
    linear.legend(fontsize=8)
    size, runs = "x".join(map(str, found[0]["image_size"])), sorted({len(method["seeds"]) for method in found})
    said = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    title = f"{found[0]['network']}, {found[0]['dataset']}, {size} images; runs a method: {said}; mean ± standard error"
    figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    replace_file(path, file.getvalue())


def _curve_over_depth(panel, method: dict, quantity: str, scale: float, color) -> None:
    values = [row[quantity] for row in method["blocks"]]
    errors = None if values[0]["error"] is None else [scale * value["error"] for value in values]
    depths = [row["depth"] for row in method["blocks"]]
    means = [scale * value["mean"] for value in values]
    panel.errorbar(depths, means, errors, color=color, marker="o", markersize=4, capsize=3, label=method["method"])


def _limit(panel, value: float, name: str) -> None:
    panel.axhline(value, color="0.4", linestyle=":")
    panel.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.4")


def _color(i: int, methods: int):
    from matplotlib import colormaps

    return colormaps["tab10" if methods <= 10 else "tab20"](i)
