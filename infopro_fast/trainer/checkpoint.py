"""Checkpoints: a nested state of tensors and scalars, whole on disk or not there at all, and never code.

A checkpoint is a folder of three files: `tensors.safetensors`, `state.json` (everything else, with the tensors' names in
their places) and `SHA256SUMS`, which `sha256sum -c` reads. It is written aside, flushed to the disk, and renamed: whenever
the process or the machine dies, what has the name of a checkpoint is a whole one. The last two are kept.

A run of many processes writes the same: the last process of a pipeline is sent the modules of the others. So it needs no folder that
all machines share, and any number of processes reads it.

torch.distributed.checkpoint can read the tensors, all or some, in any number of processes (`HuggingFaceStorageReader` of this folder; a
test does). It does not write them. Its own format has a pickle for what is not a tensor and for the names of what is, and to load a pickle
is to run code. Its writer of safetensors (looked at in torch 2.14) has none, but holds tensors alone: with a number in the state it writes
torch.save's bytes in front of the header, and the file cannot be read again. Nor does it flush its index to the disk, give the folder
its name in the end, keep checksums, or say that it is getting on; and processes write together only into a folder that all of them see,
each file twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import whole_files
from infopro_fast.errors import CheckpointError
from infopro_fast.whole_files import ASIDE, Moved, nobody

KEPT = 2
NAME = re.compile(r"epoch(\d+)-batch(\d+)")  # epoch0003-batch000120: 3 epochs and 120 batches of the next one are done
UNUSED = "unused-"  # a checkpoint that was passed over by request

def name_of(epoch: int, batch: int) -> str:
    return f"epoch{epoch:04d}-batch{batch:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole or damaged, the oldest first: in the order of their numbers, of which large ones have more digits."""
    named = [(NAME.fullmatch(path.name), path) for path in folder.glob("epoch*") if path.is_dir()]
    return [path for _, path in sorted((tuple(map(int, match.groups())), path) for match, path in named if match)]


def save(folder: Path, name: str, state: dict[str, Any], moved: Moved = nobody) -> Path:
    """Write ``state`` as the checkpoint ``name`` in ``folder`` and remove all but the last two.

    state: dicts, lists, tensors of any device, str, int, float, bool and None, nested. A name that exists is left as it is:
    the same place of the same run holds the same state. Raises ValueError for what it cannot hold; nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / name, folder / (ASIDE + name)
    if not final.exists():
        _remove(aside)
        try:
            aside.mkdir()
            sums = ""
            for file, content in _serialize(state).items():
                moved()
                whole_files.write_file(aside / file, content, moved)
                sums += f"{hashlib.sha256(content).hexdigest()}  {file}\n"
                moved()
            whole_files.write_file(aside / "SHA256SUMS", sums.encode())
            whole_files.sync_folder(aside)
            os.rename(aside, final)
            whole_files.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(aside)
            raise
    for old in list_checkpoints(folder)[:-KEPT]:
        retire(old)
    return final


def load(path: Path) -> dict[str, Any]:
    """The state of the checkpoint at ``path``, its tensors on the CPU. Raises CheckpointError naming the file that is damaged."""
    content = {}
    for file, expected in _sums(path).items():
        try:
            content[file] = (path / file).read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {file}: {error.strerror}") from error
        got = hashlib.sha256(content[file]).hexdigest()
        if got != expected:
            raise CheckpointError(f"checkpoint {path} is damaged: {file}: SHA-256 expected {expected}, got {got}")
    import safetensors.torch

    return _decode(json.loads(content["state.json"]), safetensors.torch.load(content["tensors.safetensors"]))


def load_latest(folder: Path, previous: bool = False) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint in ``folder``, or with ``previous`` the one before it; the last is then renamed to unused-*.

    A damaged one is refused: CheckpointError says which, and how to use the one before it.
    """
    found = list_checkpoints(folder)
    if len(found) < (2 if previous else 1):
        wanted = "a checkpoint before the last one" if previous else "a checkpoint"
        raise CheckpointError(f"{folder}: expected {wanted}, found {len(found)}")
    path = found[-2 if previous else -1]
    try:
        state = load(path)
    except CheckpointError as error:
        hint = f"; to continue from the one before it, {found[-2].name}, add --resume-previous" if len(found) > 1 and not previous else ""
        raise CheckpointError(f"{error}{hint}") from error
    if previous:
        unused = found[-1].with_name(UNUSED + found[-1].name)
        _remove(unused)
        os.rename(found[-1], unused)
        whole_files.sync_folder(folder)
    return path, state


def retire(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that no half of one is ever taken for a whole."""
    aside = path.with_name(ASIDE + path.name)
    _remove(aside)
    os.rename(path, aside)
    _remove(aside)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in folder.glob(ASIDE + "*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _sums(path: Path) -> dict[str, str]:
    try:
        lines = (path / "SHA256SUMS").read_text().splitlines()
        sums = {file: digest for digest, file in (line.split("  ") for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: SHA256SUMS: {error}") from error
    if set(sums) != {"tensors.safetensors", "state.json"}:
        raise CheckpointError(f"checkpoint {path} is damaged: SHA256SUMS: expected tensors.safetensors and state.json, got {sorted(sums)}")
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# Files that are on the disk when the call returns


# ---------------------------------------------------------------------------------------------------------------------
# Nested state to and from (JSON, named tensors)

TENSOR, LAYOUT, ITEMS = "$tensor", "$layout", "$items"


def _serialize(state: dict[str, Any]) -> dict[str, bytes]:
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    return {"tensors.safetensors": safetensors.torch.save(tensors), "state.json": json.dumps(tree, indent=1).encode()}


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if name in tensors:
            raise ValueError(f"checkpoint: {name}: two tensors of this name")
        value = value.detach()
        # A copy on the CPU in C order; the memory format is noted, since optimizers want it equal to the parameter's.
        channels_last = value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
        tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {TENSOR: name, LAYOUT: "channels_last"} if channels_last else {TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(v, f"{name}.{key}".lstrip("."), tensors) for key, v in value.items()}
        return {ITEMS: [[_encode(key, name, tensors), _encode(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
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
    """Names of the floating-point tensors in a nested state that hold a nan or an infinity."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            yield name
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from not_finite(v, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from not_finite(v, f"{name}.{i}".lstrip("."))
