"""The learning curve of a run, as learning_curve.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infopro_fast import figure

from .evaluation import headline
from .run_folder import CURVE, read_metrics


def draw_learning_curve(folder: Path, title: str) -> Path | None:
    """Draw the epochs in a run's metrics.jsonl and return the file's path, or None if no epoch has ended.

    One panel a local loss with a line a module, one for the network's cross entropy, one for its accuracy.
    """
    epochs = read_metrics(folder, "epoch")
    if not epochs:
        return None
    terms: dict[str, list[int]] = {}  # name of a loss: the modules that have it
    for name in dict.fromkeys(name for record in epochs for name in record["train"]):
        module, _, term = name.partition("/")
        if term and not term.endswith("_accuracy"):
            terms.setdefault(term, []).append(int(module.removeprefix("module")))
    modules = max((k for ks in terms.values() for k in ks), default=1)
    drawn, panels = figure.new_figure((4.6 * (len(terms) + 2), 3.8), len(terms) + 2)
    for panel, (term, ks) in zip(panels, terms.items()):
        for k in ks:
            name = f"module{k}/{term}"
            have = [record for record in epochs if name in record["train"]]
            x, values = [record["epoch"] for record in have], [record["train"][name] for record in have]
            panel.plot(x, values, color=_color(k, modules), marker=_marker(x), label=f"module {k}")
        panel.set_title(f"{term} loss, train")
    tested = [record for record in epochs if record["test"] is not None]  # sequential: the last module's
    if tested:
        _draw_network(panels[-2], panels[-1], tested)
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if panel.get_lines():
            panel.legend(fontsize=8, ncols=2 if len(panel.get_lines()) > 6 else 1)
    drawn.suptitle(title)
    figure.save(drawn, folder / CURVE)
    return folder / CURVE


def _draw_network(loss, accuracy, epochs: list[dict[str, Any]]) -> None:
    """Draw the network's cross entropy and accuracy, train and test."""
    x = [record["epoch"] for record in epochs]

    def draw(panel, values: list[float], color: str, label: str) -> None:
        panel.plot(x, values, color=color, marker=_marker(x), label=label)

    for part, color in (("train", "C0"), ("test", "C3")):
        draw(loss, [record[part]["loss"] for record in epochs], color, part)
        draw(accuracy, [100 * record[part]["accuracy"] for record in epochs], color, part)
    loss.set_title("cross entropy of the network")
    name = headline(epochs[0]["test"])[0]
    values = [100 * headline(record["test"])[1] for record in epochs]
    if name != "accuracy":
        draw(accuracy, values, "C2", f"test {name}")
    best = max(values)
    accuracy.set_title(f"accuracy (%), best test {name} {best:.2f} in epoch {x[values.index(best)]}")


def _color(module: int, modules: int):
    from matplotlib import colormaps  # heavy: imported where something is drawn

    return colormaps["viridis"](0.9 * (module - 1) / max(1, modules - 1))


def _marker(x: list[int]) -> str | None:
    return "o" if len(x) <= 12 else None
