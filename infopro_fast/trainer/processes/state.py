"""A run's state in parts: those of some modules, put together or taken out, and sent between processes."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from .. import checkpoint
from .wire import Waiting

STATE = 100  # tag


def renamed(state: dict[str, Any], first: int) -> dict[str, Any]:
    """Names of modules in the part to names in the whole."""
    return state | {key: {_moved(name, first): t for name, t in state[key].items()} for key in ("net", "ema") if key in state}


def _moved(name: str, by: int) -> str:
    parts = name.split(".")
    at = 1 + (parts[0] == "module")
    if len(parts) > at and parts[at - 1] in ("stages", "local_losses"):
        parts[at] = str(int(parts[at]) + by)
    return ".".join(parts)


def _module_of(name: str) -> int | None:
    parts = name.removeprefix("module.").split(".")
    return int(parts[1]) if parts[0] in ("stages", "local_losses") else None


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = dict(parts[-1])
    for key in ("net", "ema"):
        if key in whole:
            whole[key] = {name: t for part in parts for name, t in part[key].items()}
    whole["trainer"] = {key: [own for part in parts for own in part["trainer"][key]] for key in whole["trainer"]}
    return whole


def part_of(state: dict[str, Any], span: range) -> dict[str, Any]:
    part = dict(state)
    for key in ("net", "ema"):
        if key in state:
            part[key] = {_moved(n, -span.start): t for n, t in state[key].items() if _module_of(n) is None or _module_of(n) in span}
    part["trainer"] = {key: every[span.start : span.stop] for key, every in state["trainer"].items()}
    return part


def _pack(state: dict[str, Any]) -> list[torch.Tensor]:
    files = checkpoint._serialize(state)
    return [torch.frombuffer(bytearray(files[name]), dtype=torch.uint8) for name in ("tensors.safetensors", "state.json")]


def _unpack(tensors: torch.Tensor, tree: torch.Tensor) -> dict[str, Any]:
    import safetensors.torch

    return checkpoint._decode(json.loads(tree.numpy().tobytes()), safetensors.torch.load(tensors.numpy().tobytes()))


def send(state: dict[str, Any], to: int, waiting: Waiting) -> None:
    packed = _pack(state)
    with waiting():
        dist.send(torch.tensor([len(t) for t in packed]), to, tag=STATE)
        for t in packed:
            dist.send(t, to, tag=STATE)


def receive(source: int, waiting: Waiting) -> dict[str, Any]:
    sizes = torch.zeros(2, dtype=torch.int64)
    with waiting():
        dist.recv(sizes, source, tag=STATE)
        packed = [torch.empty(n, dtype=torch.uint8) for n in sizes.tolist()]
        for t in packed:
            dist.recv(t, source, tag=STATE)
    return _unpack(*packed)


def broadcast(state: dict[str, Any] | None, source: int, waiting: Waiting) -> dict[str, Any]:
    packed = None if state is None else _pack(state)
    sizes = torch.zeros(2, dtype=torch.int64) if packed is None else torch.tensor([len(t) for t in packed])
    with waiting():
        dist.broadcast(sizes, source)
        packed = packed or [torch.empty(n, dtype=torch.uint8) for n in sizes.tolist()]
        for t in packed:
            dist.broadcast(t, source)
    return _unpack(*packed) if state is None else state
