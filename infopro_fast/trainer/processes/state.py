"""A run's state in parts, one for the modules of each process: taken out, put together, and sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import checkpoint
from .wire import Waiting

STATE = 100  # tag
NETWORKS = ("net", "ema")  # entries of a state that are tensors by name


def renamed(state: dict[str, Any], first: int) -> dict[str, Any]:
    """Return a part's state with the names that its modules, from ``first`` on, have in the whole network."""
    networks = [key for key in NETWORKS if key in state]
    return state | {key: {_moved(name, first): t for name, t in state[key].items()} for key in networks}


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole state from renamed parts in the modules' order; what all have is the last one's."""
    whole = dict(parts[-1])
    for key in NETWORKS:
        if key in whole:
            whole[key] = {name: t for part in parts for name, t in part[key].items()}
    trainers = [part["trainer"] for part in parts]
    whole["trainer"] = {key: [own for each in trainers for own in each[key]] for key in whole["trainer"]}
    return whole


def part_of(state: dict[str, Any], span: range) -> dict[str, Any]:
    """Return the part of a whole state that belongs to the modules ``span``."""
    part = dict(state)
    for key in NETWORKS:
        if key in state:
            own = {name: t for name, t in state[key].items() if _module_of(name) in (None, *span)}
            part[key] = {_moved(name, -span.start): t for name, t in own.items()}
    part["trainer"] = {key: every[span.start : span.stop] for key, every in state["trainer"].items()}
    return part


def _moved(name: str, by: int) -> str:
    """Return a tensor's name after the number of its module has changed."""
    parts = name.split(".")
    at = 1 + (parts[0] == "module")
    if len(parts) > at and parts[at - 1] in ("stages", "local_losses"):
        parts[at] = str(int(parts[at]) + by)
    return ".".join(parts)


def _module_of(name: str) -> int | None:
    parts = name.removeprefix("module.").split(".")
    return int(parts[1]) if parts[0] in ("stages", "local_losses") else None


def send(state: dict[str, Any], to: int, waiting: Waiting) -> None:
    """Send a state to the process ``to``."""
    packed = _pack(state)
    with waiting():
        dist.send(torch.tensor([len(packed)]), to, tag=STATE)
        dist.send(packed, to, tag=STATE)


def receive(source: int, waiting: Waiting) -> dict[str, Any]:
    """Return the state that the process ``source`` sends."""
    size = torch.zeros(1, dtype=torch.int64)
    with waiting():
        dist.recv(size, source, tag=STATE)
        packed = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(packed, source, tag=STATE)
    return _unpack(packed)


def broadcast(state: dict[str, Any] | None, source: int, waiting: Waiting) -> dict[str, Any]:
    """Return the state that the process ``source`` has, in all processes; the others give None."""
    packed = None if state is None else _pack(state)
    size = torch.tensor([0 if packed is None else len(packed)])
    with waiting():
        dist.broadcast(size, source)
        packed = torch.empty(int(size), dtype=torch.uint8) if packed is None else packed
        dist.broadcast(packed, source)
    return _unpack(packed) if state is None else state


def _pack(state: dict[str, Any]) -> torch.Tensor:
    """Return a state as bytes: the length of the first file, then both files."""
    tensors, tree = checkpoint.serialize(state).values()
    return torch.frombuffer(bytearray(len(tensors).to_bytes(8, "little") + tensors + tree), dtype=torch.uint8)


def _unpack(packed: torch.Tensor) -> dict[str, Any]:
    content = packed.numpy().tobytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return checkpoint.deserialize(dict(zip(checkpoint.FILES, (content[8:end], content[end:]))))
