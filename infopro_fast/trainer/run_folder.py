"""The run folder: settings, recipe, metrics, weights (by the authors' names), learning curve, checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError, RunError
from infopro_fast.whole_files import ASIDE, Moved, nobody, replace_file, sync_folder

from .settings import recipes
from .settings.config import TrainConfig

CONFIG, RECIPE, METRICS, CHECKPOINTS = "config.json", "recipe.json", "metrics.jsonl", "checkpoints"
WEIGHTS, CURVE, LOCK = "weights.safetensors", "learning_curve.png", ".lock"
SUM, NO_SUM = "sha256", "0" * 64  # in CONFIG, and in "about" in the header of WEIGHTS


def create(
    config: TrainConfig, held: contextlib.ExitStack, shared: TrainConfig | None = None, again: bool = False
) -> Path:
    """Return a new run folder with its config.json and recipe.json, locked for as long as ``held`` is.

    shared: the settings that `recipes.shared` gives, where several processes take part. again: the folder
    may be one that a killed process created and wrote no checkpoint into.
    Raises RunError if ``config.out`` exists and is not empty, or another process is at it.
    """
    folder = _new_folder(config) if config.out is None else config.out
    _check_free(folder, again)
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    held.enter_context(locked(folder))
    _check_free(folder, again)  # another process may have been at it until now
    _write_config(folder, config)
    if config.recipe is not None:
        _write_recipe(folder, shared or config)
    return folder


def _new_folder(config: TrainConfig) -> Path:
    """Make a folder whose name says what the run is, and which no other run has."""
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{config.dataset}-{config.arch}-k{config.modules}-{config.local_loss}-{now}"
    name = re.sub(r"[^\w.-]", ".", name)
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (Path("runs") / (name + suffix)).mkdir(parents=True)
            break
    return Path("runs") / (name + suffix)


def _check_free(folder: Path, again: bool) -> None:
    """Raise RunError unless a run can begin in ``folder``; what a killed process left there may stay."""
    left = {LOCK, *(ASIDE + name for name in (CONFIG, RECIPE))}
    free = not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= left)
    if not free and not (again and is_unbegun(folder)):
        advice = f"give another folder as out, or continue it with --resume {folder}"
        raise RunError(f"{folder} exists already: {advice}")


def is_unbegun(folder: Path) -> bool:
    """Whether a run was killed before its first checkpoint was whole, so that it can begin again."""
    first = {CONFIG, RECIPE, METRICS, LOCK, CHECKPOINTS}
    names = {path.name.removeprefix(ASIDE) for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    return names <= first and all(path.name.startswith(ASIDE) for path in (folder / CHECKPOINTS).glob("*"))


def _write_config(folder: Path, config: TrainConfig) -> None:
    content = json.loads(config.to_json())
    content[SUM] = _sum_of(content)
    replace_file(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    """Return a run's settings. Raises RunError if ``folder`` is not a run folder, or they were changed.

    Earlier versions wrote no hash.
    """
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        text = (folder / CONFIG).read_text()
        config = TrainConfig.from_json(text)
        content = json.loads(text)
        expected = content.pop(SUM, None)
        if expected not in (None, _sum_of(content)):
            advice = "put it back; a changed copy begins a new run with --config COPY"
            raise ConfigError(f"was changed or damaged since the run wrote it (SHA-256): {advice}")
        return config
    except (ConfigError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Write the settings that a run goes on with into its config.json."""
    if config != read_config(folder):
        _write_config(folder, config)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against a second process. The system releases the lock however the process dies."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process") from error
        yield


def counted_on(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about metrics.jsonl, for `MetricsLog`; older ones have no hash."""
    return {name: state.get(name) for name in ("metrics_bytes", "metrics_sha256")}


class MetricsLog:
    """Writes metrics.jsonl, one JSON object a line.

    metrics_bytes, metrics_sha256: of the beginning of an existing file, which is kept; the rest is cut off.
    Raises RunError where the file does not begin so.
    """

    def __init__(self, folder: Path, metrics_bytes: int = 0, metrics_sha256: str | None = None):
        self.path, kept = folder / METRICS, metrics_bytes
        self._file = open(self.path, "ab+")
        self._file.seek(0)
        content = self._file.read(kept)
        self._sum = hashlib.sha256(content)
        wrong = ""
        if len(content) < kept:
            wrong = f"expected at least the {kept} bytes that the checkpoint has seen, got {len(content)}"
        elif metrics_sha256 not in (None, self._sum.hexdigest()):
            seen = f"of the {kept} bytes that the checkpoint has seen"
            wrong = f"expected SHA-256 {metrics_sha256} {seen}, got {self._sum.hexdigest()}"
        if wrong:
            self._file.close()
            advice = "put the file back, or continue from the checkpoint before with --resume-previous"
            raise RunError(f"{self.path} is damaged: {wrong}: {advice}")
        self._file.truncate(kept)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        line = json.dumps(record).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._sum.update(line)

    def sync(self) -> dict[str, Any]:
        """Flush to the disk; return the arguments with which this log goes on.

        Raises RunError where the run folder is no longer there.
        """
        os.fsync(self._file.fileno())
        own = os.fstat(self._file.fileno())
        if not self.path.exists() or not os.path.samestat(own, self.path.stat()):
            what = f"{METRICS} is not there any more, or another file"
            raise RunError(f"{self.path.parent} was removed or moved while the run trained: {what}")
        return {"metrics_bytes": own.st_size, "metrics_sha256": self._sum.hexdigest()}

    def close(self) -> None:
        self._file.close()


class NoLog:
    """Stands for `MetricsLog` in a process that does not write the run folder."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> dict[str, Any]:
        return {}

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
    """Write weights.safetensors. state: tensors by the authors' names; about: JSON for the file's header.

    The header's "about" has a "sha256", of the whole file with zeros in place of that hash. Two entries of a
    header would come in any order, so that the same weights would give other files.
    """
    import safetensors.torch  # needs torch, which reading settings does not

    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors, {"about": json.dumps(about | {SUM: NO_SUM})})
    content = content.replace(NO_SUM.encode(), hashlib.sha256(content).hexdigest().encode(), 1)
    replace_file(folder / WEIGHTS, content, moved)


def about(folder: Path) -> dict[str, Any]:
    """Return what the header of a run's weights says: network, epoch, accuracy, and what its images are."""
    import safetensors

    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        found = json.loads((file.metadata() or {}).get("about", "{}"))
    return {name: fact for name, fact in found.items() if name != SUM}


def read_weights(folder: Path) -> dict[str, Any]:
    """Return a run's weights by the authors' names. Raises RunError if they are missing or damaged.

    A file without a hash, as earlier versions wrote it, is taken with a word on stderr.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        advice = f"no epoch is finished; continue with: infopro-fast train --resume {folder}"
        raise RunError(f"{folder} has no {WEIGHTS}: {advice}")
    try:
        tensors, is_checked = read_tensors(path)
    except Exception as error:  # whatever a damaged header leads to
        raise error if isinstance(error, RunError) else RunError(f"{path} is damaged: {error}") from error
    if not is_checked:
        print(f"{path} has no checksum, as earlier versions wrote it: it is not checked", file=sys.stderr)
    return tensors


def read_tensors(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the tensors of a safetensors file by name, and whether it has a hash, which is then right.

    Raises RunError where the hash is another; OSError, SafetensorError or ValueError for another file.
    """
    import safetensors.torch  # as above

    content = path.read_bytes()
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    expected = json.loads(header.get("__metadata__", {}).get("about", "{}")).get(SUM)
    if expected is None:
        return tensors, False
    got = hashlib.sha256(content.replace(expected.encode(), NO_SUM.encode(), 1)).hexdigest()
    if got != expected:
        raise RunError(f"{path} is damaged: SHA-256 expected {expected}, got {got}")
    return tensors, True
