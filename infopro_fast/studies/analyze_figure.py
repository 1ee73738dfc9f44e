"""The figure of an analysis: reconstruction, information about the label and linear separability over depth, a colour a method."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from infopro_fast.whole_files import replace_file


def draw(found: Sequence[dict], path: Path) -> None:
    """Write a PNG. found: as `analyze.summarize` gives it. Error bars: standard errors, where a method has more than one run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    image, label, linear = figure.subplots(1, 3)
    known, classes = found[0]["baseline"], found[0]["classes"]
    for i, method in enumerate(found):
        for panel, quantity, scale in ((image, "pixel_information", 1), (label, "label_information", 1), (linear, "linear_accuracy", 100)):
            _curve(panel, method, quantity, scale, color=_color(i, len(found)))

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


def _curve(panel, method: dict, quantity: str, scale: float, color) -> None:
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
