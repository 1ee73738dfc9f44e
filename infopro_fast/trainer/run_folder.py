"""The run folder: settings, recipe, metrics, weights (by the authors' names), learning curve, checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError, RunError
from infopro_fast.whole_files import Moved, nobody, replace_file, sync_folder

from .settings import recipes
from .settings.config import TrainConfig

CONFIG, RECIPE, METRICS, CHECKPOINTS = "config.json", "recipe.json", "metrics.jsonl", "checkpoints"
WEIGHTS, CURVE, LOCK = "weights.safetensors", "learning_curve.png", ".lock"


def create(config: TrainConfig, shared: TrainConfig | None = None) -> Path:
    """Return a new run folder with its config.json and recipe.json.

    shared: the settings that `recipes.shared` gives, where several processes take part.
    Raises RunError if ``config.out`` exists and is not empty.
    """
    folder = config.out
    if folder is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"{config.dataset}-{config.arch}-k{config.modules}-{config.local_loss}-{now}"
        folder = Path("runs") / re.sub(r"[^\w.-]", ".", name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        advice = f"give another folder as out, or continue it with --resume {folder}"
        raise RunError(f"{folder} exists already: {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    replace_file(folder / CONFIG, config.to_json().encode())
    if config.recipe is not None:
        _write_recipe(folder, shared or config)
    return folder


def _write_recipe(folder: Path, config: TrainConfig) -> None:
    """Write recipe.json: the paper's row, its result, and {setting: [row's, run's]} where they differ."""
    found = recipes.row(config.recipe)
    content = {
        "recipe": config.recipe, "expected": found.expected, "note": found.note,
        "difference": {name: list(values) for name, values in recipes.difference(config).items()},
    }
    replace_file(folder / RECIPE, (json.dumps(content, indent=2, default=str) + "\n").encode())


def recipe_text(config: TrainConfig) -> str:
    """Return, as text, what the paper's row reports and how the run differs from it."""
    found = recipes.row(config.recipe)
    note = f" ({found.note})" if found.note else ""
    lines = [f"recipe {config.recipe}: the paper has {recipes.expected_text(found.expected)}{note}"]
    differences = recipes.difference(config).items()
    lines += [f"  {name}: {ours} here, {theirs} in the recipe" for name, (theirs, ours) in differences]
    return "\n".join(lines)


def read_config(folder: Path) -> TrainConfig:
    """Return a run's settings. Raises RunError if ``folder`` is not a run folder."""
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        return TrainConfig.from_json((folder / CONFIG).read_text())
    except (ConfigError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings that a run goes on with into its config.json."""
    if config != read_config(folder):
        replace_file(folder / CONFIG, config.to_json().encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against a second process. The system releases the lock however the process dies."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process") from error
        yield


class MetricsLog:
    """Writes metrics.jsonl, one JSON object a line. kept: bytes of an existing file to keep."""

    def __init__(self, folder: Path, kept: int = 0):
        self.path = folder / METRICS
        self._file = open(self.path, "ab")
        size = self._file.tell()
        if size < kept:
            self._file.close()
            expected = f"expected at least the {kept} bytes that the checkpoint has seen"
            raise RunError(f"{self.path}: {expected}, got {size}")
        self._file.truncate(kept)
        self._file.seek(kept)  # truncating does not move the position, which `sync` reports

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush to the disk; return the file's number of bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class NoLog:
    """Stands for `MetricsLog` in a process that does not write the run folder."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> int:
        return 0

    def close(self) -> None:
        pass


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind: "step" (every `log_every` steps) or "epoch".

    Text after the last newline is a line that is still being written, or was cut short; it is left out.
    Raises RunError naming a line that no run wrote.
    """
    path, found = folder / METRICS, []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found += [record] if record["kind"] == kind else []
        except (ValueError, KeyError, TypeError) as error:
            what = f"expected an object of JSON with its kind, got {line[:60]!r}"
            raise RunError(f"{path}, line {number}: {what}") from error
    return found


def write_weights(folder: Path, state: dict[str, Any], about: dict[str, Any], moved: Moved = nobody) -> None:
    """Write weights.safetensors. state: tensors by the authors' names; about: JSON for the file's header."""
    import safetensors.torch  # needs torch, which reading settings does not

    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    replace_file(folder / WEIGHTS, safetensors.torch.save(tensors, {"about": json.dumps(about)}), moved)


def about(folder: Path) -> dict[str, Any]:
    """Return what the header of a run's weights says: network, epoch, accuracy, and what its images are."""
    import safetensors

    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def read_weights(folder: Path) -> dict[str, Any]:
    """Return a run's weights by the authors' names. Raises RunError if they are missing or damaged."""
    import safetensors.torch  # as above

    path = folder / WEIGHTS
    if not path.is_file():
        advice = f"no epoch is finished; continue with: infopro-fast train --resume {folder}"
        raise RunError(f"{folder} has no {WEIGHTS}: {advice}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
