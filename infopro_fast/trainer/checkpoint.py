"""Checkpoints: nested states of tensors and scalars, whole on the disk or not there, and never code.

A checkpoint is a folder of `tensors.safetensors`, `state.json` (everything else, with names in place of the
tensors) and `SHA256SUMS`, which `sha256sum -c` reads. It is written aside, flushed to the disk, then renamed:
what has a checkpoint's name is whole, whenever the process or the machine died. The last two are kept. In a
run of many processes the main one writes, so no folder has to be shared, and any number of them can continue.

torch.distributed.checkpoint can read the tensors (`HuggingFaceStorageReader`; a test does). It does not write
them: its own format holds pickles, and loading a pickle runs code. Its safetensors writer (torch 2.14) takes
no numbers, keeps no checksums, does not flush its index or rename, and needs a folder that all processes see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import whole_files
from infopro_fast.errors import CheckpointError
from infopro_fast.whole_files import ASIDE, Moved, nobody

KEPT = 2
NAME = re.compile(r"epoch(\d+)-batch(\d+)")  # of finished epochs, and finished batches of the next one
UNUSED = "unused-"  # begins the name of a checkpoint that was passed over by request
FILES = TENSORS, STATE = "tensors.safetensors", "state.json"
SUMS = "SHA256SUMS"


def name_of(epoch: int, batch: int) -> str:
    return f"epoch{epoch:04d}-batch{batch:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, whole or damaged, the oldest first."""
    named = [(NAME.fullmatch(path.name), path) for path in folder.glob("epoch*") if path.is_dir()]
    numbered = [(tuple(map(int, match.groups())), path) for match, path in named if match]
    return [path for _, path in sorted(numbered)]


def save(folder: Path, name: str, state: dict[str, Any], moved: Moved = nobody) -> Path:
    """Write ``state`` as the checkpoint ``name``, remove all but the last two, and return its path.

    state: dicts, lists, tensors on any device, str, int, float, bool and None, nested. A checkpoint of this
    name that exists is left as it is: the same place of the same run has the same state.
    Raises ValueError for other contents. A failed write leaves nothing behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / name, folder / (ASIDE + name)
    if not final.exists():
        whole_files.remove(aside)
        try:
            aside.mkdir()
            sums = ""
            for file, content in serialize(state).items():
                moved()
                whole_files.write_file(aside / file, content, moved)
                sums += f"{hashlib.sha256(content).hexdigest()}  {file}\n"
                moved()
            whole_files.write_file(aside / SUMS, sums.encode())
            whole_files.sync_folder(aside)
            os.rename(aside, final)
            whole_files.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                whole_files.remove(aside)
            raise
    for old in list_checkpoints(folder)[:-KEPT]:
        retire(old)
    return final


def load(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, tensors on the CPU. Raises CheckpointError naming a damaged file."""
    content = {}
    for file, expected in _sums(path).items():
        try:
            content[file] = (path / file).read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {file}: {error.strerror}") from error
        got = hashlib.sha256(content[file]).hexdigest()
        if got != expected:
            what = f"SHA-256 expected {expected}, got {got}"
            raise CheckpointError(f"checkpoint {path} is damaged: {file}: {what}")
    return deserialize(content)


def load_latest(folder: Path, previous: bool = False) -> tuple[Path, dict[str, Any]]:
    """Return path and state of the last checkpoint.

    previous: take the one before it, and rename the last to unused-*.
    Raises CheckpointError for a damaged one, saying which it is and how to use the one before it.
    """
    found = list_checkpoints(folder)
    if len(found) < (2 if previous else 1):
        wanted = "a checkpoint before the last one" if previous else "a checkpoint"
        raise CheckpointError(f"{folder}: expected {wanted}, found {len(found)}")
    path = found[-2 if previous else -1]
    try:
        state = load(path)
    except CheckpointError as error:
        hint = ""
        if len(found) > 1 and not previous:
            hint = f"; to continue from the one before it, {found[-2].name}, add --resume-previous"
        raise CheckpointError(f"{error}{hint}") from error
    if previous:
        unused = found[-1].with_name(UNUSED + found[-1].name)
        whole_files.remove(unused)
        os.rename(found[-1], unused)
        whole_files.sync_folder(folder)
    return path, state


def retire(path: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that half of one is never taken for a whole."""
    aside = path.with_name(ASIDE + path.name)
    whole_files.remove(aside)
    os.rename(path, aside)
    whole_files.remove(aside)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in folder.glob(ASIDE + "*"):
        whole_files.remove(path)


def _sums(path: Path) -> dict[str, str]:
    try:
        lines = (path / SUMS).read_text().splitlines()
        sums = {file: digest for digest, file in (line.split("  ") for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {SUMS}: {error}") from error
    if set(sums) != {TENSORS, STATE}:
        expected = f"expected {TENSORS} and {STATE}, got {sorted(sums)}"
        raise CheckpointError(f"checkpoint {path} is damaged: {SUMS}: {expected}")
    return sums


# --------------------------------------------------------------------------------------------------------
# Nested state to and from JSON and named tensors

TENSOR, LAYOUT, ITEMS = "$tensor", "$layout", "$items"


def serialize(state: dict[str, Any]) -> dict[str, bytes]:
    """Return a state as the contents of two files, by name."""
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    return {TENSORS: safetensors.torch.save(tensors), STATE: json.dumps(tree, indent=1).encode()}


def deserialize(files: dict[str, bytes]) -> dict[str, Any]:
    """Return the state that `serialize` gave as files; its tensors are on the CPU."""
    import safetensors.torch

    return _decode(json.loads(files[STATE]), safetensors.torch.load(files[TENSORS]))


def is_channels_last(t: torch.Tensor) -> bool:
    """Whether a tensor is channels_last, and not in C order as well."""
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if name in tensors:
            raise ValueError(f"checkpoint: {name}: two tensors of this name")
        value = value.detach()
        # A copy on the CPU in C order. The memory format is noted: optimizers want it equal to the
        # parameter's.
        tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {TENSOR: name, LAYOUT: "channels_last"} if is_channels_last(value) else {TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(v, f"{name}.{key}".lstrip("."), tensors) for key, v in value.items()}
        keys = [_encode(key, name, tensors) for key in value]
        values = [_encode(v, f"{name}.{key}", tensors) for key, v in value.items()]
        return {ITEMS: list(map(list, zip(keys, values)))}
    if isinstance(value, (list, tuple)):
        return [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"checkpoint: {name}: expected tensors and scalars, nested, got {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        tensor = tensors[value[TENSOR]]
        return tensor.contiguous(memory_format=torch.channels_last) if LAYOUT in value else tensor
    if ITEMS in value:
        return {_decode(key, tensors): _decode(v, tensors) for key, v in value[ITEMS]}
    return {key: _decode(v, tensors) for key, v in value.items()}


def not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Yield the names of floating-point tensors in a nested state that hold a nan or an infinity."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            yield name
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from not_finite(v, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from not_finite(v, f"{name}.{i}".lstrip("."))
