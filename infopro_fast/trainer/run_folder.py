"""The run folder: config.json, recipe.json, metrics.jsonl, weights.safetensors (released names), learning_curve.png, checkpoints/."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError, RunError
from infopro_fast.whole_files import ASIDE, Moved, nobody, replace_file, sync_folder

from .evaluation import headline
from .settings import recipes
from .settings.config import TrainConfig

CONFIG, METRICS, WEIGHTS, CURVE, CHECKPOINTS, RECIPE = (
    "config.json", "metrics.jsonl", "weights.safetensors", "learning_curve.png", "checkpoints", "recipe.json",
)  # fmt: skip


def create(config: TrainConfig, shared: TrainConfig | None = None) -> Path:
    """A new run folder with its config.json and recipe.json. Raises RunError if ``config.out`` exists and is not empty.

    shared: as `recipes.shared` says, where several processes take part.
    """
    folder = config.out
    if folder is None:
        name = f"{config.dataset}-{config.arch}-k{config.modules}-{config.local_loss}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path("runs") / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists already: give another folder as out, or continue it with --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    replace_file(folder / CONFIG, config.to_json().encode())
    if config.recipe is not None:
        _write_recipe(folder, shared or config)
    return folder


def _write_recipe(folder: Path, config: TrainConfig) -> None:
    """recipe.json: the name of the paper's row, what it reports, and {setting: [of the row, of this run]} where they differ."""
    found = recipes.row(config.recipe)
    differing = {name: list(values) for name, values in recipes.difference(config).items()}
    content = {"recipe": config.recipe, "expected": found.expected, "note": found.note, "difference": differing}
    replace_file(folder / RECIPE, (json.dumps(content, indent=2, default=str) + "\n").encode())


def recipe_text(config: TrainConfig) -> str:
    """What the paper's row reports, and how the run differs from it."""
    found = recipes.row(config.recipe)
    lines = [f"recipe {config.recipe}: the paper has {recipes.expected_text(found.expected)}" + f" ({found.note})" * bool(found.note)]
    lines += [f"  {name}: {ours} here, {theirs} in the recipe" for name, (theirs, ours) in recipes.difference(config).items()]
    return "\n".join(lines)


def read_config(folder: Path) -> TrainConfig:
    """The settings of a run. Raises RunError if ``folder`` is none."""
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        return TrainConfig.from_json((folder / CONFIG).read_text())
    except (ConfigError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Note what a run goes on with in its config.json, for those who continue it after this."""
    if config != read_config(folder):
        replace_file(folder / CONFIG, config.to_json().encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder against a second process. The system lets go of it when the process dies, however it dies."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process") from error
        yield


class MetricsLog:
    """metrics.jsonl: one JSON object a line. ``kept``: bytes to keep of what is there, those a checkpoint accounts for."""

    def __init__(self, folder: Path, kept: int = 0):
        self.path = folder / METRICS
        self._file = open(self.path, "ab")
        size = self._file.tell()
        if size < kept:
            self._file.close()
            raise RunError(f"{self.path}: expected at least the {kept} bytes that the checkpoint has seen, got {size}")
        self._file.truncate(kept)
        self._file.seek(kept)  # truncating leaves the position, which `sync` reports, where the file ended before

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush to the disk; returns the number of bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class NoLog:
    """Of a process that another one writes for."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> int:
        return 0

    def close(self) -> None:
        pass


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind ("step": every `log_every` steps, or "epoch") in order.

    What follows the last newline is a line that is being written, or whose writing was cut short: no line yet.
    Raises RunError naming a line that is none of a run.
    """
    path, found = folder / METRICS, []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found += [record] if record["kind"] == kind else []
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}, line {number}: expected an object of JSON with its kind, got {line[:60]!r}") from error
    return found


def write_weights(folder: Path, state: dict[str, Any], about: dict[str, Any], moved: Moved = nobody) -> None:
    """state: tensors by released names; about: what to note in the file's header, as JSON. moved: as in `checkpoint.save`."""
    import safetensors.torch

    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    replace_file(folder / WEIGHTS, safetensors.torch.save(tensors, {"about": json.dumps(about)}), moved)


def read_weights(folder: Path) -> dict[str, Any]:
    """Tensors by released names. Raises RunError if there are none, or if the file is damaged."""
    import safetensors
    import safetensors.torch

    path = folder / WEIGHTS
    if not path.is_file():
        raise RunError(f"{folder} has no {WEIGHTS}: no epoch is finished; continue with: infopro-fast train --resume {folder}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def draw_learning_curve(folder: Path, title: str) -> Path | None:
    """Write learning_curve.png from the epochs in metrics.jsonl: one panel a loss, a line a module, and accuracy. None: no epoch yet."""
    epochs = read_metrics(folder, "epoch")
    if not epochs:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms: dict[str, list[int]] = {}  # name of a loss: the modules that have it
    for name in dict.fromkeys(name for record in epochs for name in record["train"]):
        module, _, term = name.partition("/")
        if term and not term.endswith("_accuracy"):
            terms.setdefault(term, []).append(int(module.removeprefix("module")))
    modules = max((k for ks in terms.values() for k in ks), default=1)
    of_network = [record for record in epochs if record["test"] is not None]  # in sequential training, those of the last module
    figure = Figure(figsize=(4.6 * (len(terms) + 2), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(terms) + 2)
    for panel, (term, ks) in zip(panels, terms.items()):
        for k in ks:
            name = f"module{k}/{term}"
            x, values = zip(*((record["epoch"], record["train"][name]) for record in epochs if name in record["train"]))
            panel.plot(x, values, color=_color(k, modules), marker=_marker(x), label=f"module {k}")
        panel.set_title(f"{term} loss, train")
    if of_network:
        _draw_network(*panels[-2:], of_network)
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if panel.get_lines():
            panel.legend(fontsize=8, ncols=2 if len(panel.get_lines()) > 6 else 1)
    figure.suptitle(title)
    path = folder / CURVE
    aside = path.with_name(ASIDE + path.name)
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, path)
    return path


def _draw_network(last, accuracy, epochs: list[dict[str, Any]]) -> None:
    """Cross entropy and accuracy of the network, train and test."""
    x = [record["epoch"] for record in epochs]
    last.plot(x, [record["train"]["loss"] for record in epochs], color="C0", marker=_marker(x), label="train")
    last.plot(x, [record["test"]["loss"] for record in epochs], color="C3", marker=_marker(x), label="test")
    last.set_title("cross entropy of the network")
    name = headline(epochs[0]["test"])[0]
    best = max(epochs, key=lambda record: headline(record["test"])[1])
    accuracy.plot(x, [100 * record["train"]["accuracy"] for record in epochs], color="C0", marker=_marker(x), label="train")
    accuracy.plot(x, [100 * record["test"]["accuracy"] for record in epochs], color="C3", marker=_marker(x), label="test")
    if name != "accuracy":
        accuracy.plot(x, [100 * headline(record["test"])[1] for record in epochs], color="C2", marker=_marker(x), label=f"test {name}")
    accuracy.set_title(f"accuracy (%), best test {name} {100 * headline(best['test'])[1]:.2f} in epoch {best['epoch']}")


def _color(module: int, modules: int):
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * (module - 1) / max(1, modules - 1))


def _marker(x: list[int]) -> str | None:
    return "o" if len(x) <= 12 else None
