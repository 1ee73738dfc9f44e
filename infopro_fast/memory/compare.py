"""Ways to train the same network, side by side: bytes by purpose, the system's peak, and time.

Each way is measured on the CPU or a GPU, in two new processes. In the one for bytes the heap keeps nothing
that is freed, so that the system sees the peak; in the one for times it keeps all. There steps alternate with
end-to-end ones, because a machine's speed drifts by more than the ways differ.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from infopro_fast import figure, info
from infopro_fast.errors import PlanError
from infopro_fast.modules import CIFAR10_MEAN, CIFAR10_STD, LocalNetwork, backbones
from infopro_fast.planning.building import build
from infopro_fast.planning.live import Bytes, nbytes, saved_bytes, seconds
from infopro_fast.planning.planner import plan
from infopro_fast.planning.released import with_released_losses
from infopro_fast.trainer.schedule import released_sgd
from infopro_fast.trainer.step import LocalTrainer
from infopro_fast.whole_files import replace_file

from . import figures
from .released_trainer import ReleasedTrainer
from .resident import KEEPING, in_a_process, peak_above
from .step import measure_step
from .ways import Measured, Way


def ways(modules: list[int], budgets: list[float]) -> list[Way]:
    """Return the ways: end to end, then for each K the authors' losses and ours, with recomputation too."""
    found = [Way(recompute=how) for how in ("none", "norm", "block", "sqrt")]
    found += [Way(budget=budget) for budget in budgets]
    for K in modules:
        found += [Way(K, losses="released", planned=False), Way(K), Way(K, "norm"), Way(K, "block")]
    return found


def check(
    arch: str, batch_size: int, image_size: int, modules: Sequence[int], budgets: Sequence[float], *,
    rounds: int, device: str, threads: int | None,
) -> None:
    """Check all arguments before anything is measured. Raises PlanError."""
    least = {"batch_size": 1, "image_size": 4, "rounds": 1, "threads": 1}
    for (name, smallest), value in zip(least.items(), (batch_size, image_size, rounds, threads)):
        if value is not None and value < smallest:
            raise PlanError(f"{name}: expected at least {smallest}, got {value}")
    blocks = len(backbones.units(arch))
    for K in modules:
        if not 2 <= K <= blocks:
            known = f"{arch} (stem and {blocks - 1} blocks)"
            raise PlanError(f"modules: expected 2 to {blocks} for {known}, got {K}")
    for budget in budgets:
        if not 0 <= budget <= 1:
            raise PlanError(f"budgets: expected numbers in [0, 1], got {budget}")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdecimal()):
        raise PlanError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device: {device}: torch sees {torch.cuda.device_count()} GPUs")


def measure(
    way: Way, arch: str, batch_size: int, image_size: int, *, rounds: int = 5, device: str = "cpu",
    threads: int | None = None,
) -> Measured:
    """Measure a way. rounds: timed steps of it, and as many end to end."""
    threads = threads or torch.get_num_threads()
    case: dict[str, Any] = dict(arch=arch, batch_size=batch_size, image_size=image_size, threads=threads)
    case |= dict(way=asdict(way), device=device)
    found = in_a_process("infopro_fast.memory.compare:_bytes_here", **case)
    times = in_a_process("infopro_fast.memory.compare:_seconds_here", malloc=KEEPING, rounds=rounds, **case)
    found["seconds"], found["end_to_end"] = times
    found["peak"] = Bytes(*found["peak"]) if found["peak"] else None
    return Measured(way, **found, device=device, threads=threads)


def write(found: list[Measured], arch: str, batch_size: int, image_size: int, folder: Path) -> list[Path]:
    """Write memory.md, memory.json and memory.png into ``folder``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = info.collect()
    device = facts["cuda"]["device"] if found[0].device != "cpu" else facts["cpu"]["model"]
    versions, threads = facts["versions"], found[0].threads
    commit = "" if versions["commit"] is None else f" ({versions['commit']})"
    version = f"torch {versions['torch']}, infopro_fast {versions['infopro_fast']}{commit}"
    where = f"{device}, {threads} threads, {version}"
    title = f"{arch}, images {image_size}x{image_size}, batch {batch_size}, float32: {where}"
    note = (
        "Saved: the most autograd keeps at any time of a step. "
        "Gradients and transient: beside it, at the step's highest point."
    )
    rows = [{**asdict(m), "name": m.way.name, "peak": m.peak and m.peak._asdict()} for m in found]
    content = {"where": where, "arch": arch, "batch_size": batch_size, "rows": rows}
    table = figure.markdown(figures.COLUMNS, figures.comparison_rows(found))
    paths = [folder / f"memory.{kind}" for kind in ("md", "json", "png")]
    replace_file(paths[0], f"{title}\n\n{table}\n\n{note}\n".encode())
    replace_file(paths[1], (json.dumps(content, indent=1) + "\n").encode())
    figures.draw_comparison(found, title, paths[2])
    return paths


def trainer_of(way: Way, arch: str, batch_size: int, image_size: int, device: str = "cpu") -> LocalTrainer:
    """Return a trainer of the way's network, planned, or in an equal or published split."""
    options: dict[str, Any] = dict(image_size=image_size, recompute=way.recompute)
    if way.modules == 1:
        options |= dict(local_loss="none")
    elif way.planned:
        how: dict[str, Any] = dict(batch_size=batch_size, local_loss="contrast", **options)
        options |= dict(cuts=plan(arch, modules=way.modules, **how).cuts)
    net, make_optimizer = build(arch, way.modules, **options).to(device), released_sgd(lr=0.01)
    if way.losses == "released":
        return ReleasedTrainer(with_released_losses(net), make_optimizer)
    if way.budget is not None:
        _compile(net, way.budget)
    return LocalTrainer(net, make_optimizer)


def _compile(net: LocalNetwork, budget: float) -> None:
    import torch._functorch.config as partitioner  # has to be imported, and holds the budget

    partitioner.activation_memory_budget = budget
    for stage in net.stages:
        stage.compile(dynamic=False)


def batch(batch_size: int, image_size: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images, normalised as CIFAR-10's, and labels."""
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    image = (torch.rand(batch_size, 3, image_size, image_size, generator=generator) - mean) / std
    return image.to(device), torch.randint(10, (batch_size,), generator=generator).to(device)


def _start(way: dict, arch: str, batch_size: int, image_size: int, device: str, threads: int) -> tuple:
    """Return a trainer, a batch, and its step, which has run once."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trainer = trainer_of(Way(**way), arch, batch_size, image_size, device)
    image, label = batch(batch_size, image_size, device)

    def step() -> None:
        trainer.step(image, label)

    step()
    return trainer, image, label, step


def _seconds_here(way: dict, rounds: int, device: str, **case) -> list[float]:
    """Return the seconds of a step this way and of one end to end, medians."""
    steps = [_start(each, device=device, **case)[-1] for each in (way, asdict(Way()))]
    taken = [[seconds(step, device) for step in steps] for _ in range(1 + rounds)]
    taken = taken[1:]  # the first, in which the heap grows, does not count
    return [statistics.median(times) for times in zip(*taken)]


def _bytes_here(way: dict, device: str, **case) -> dict[str, Any]:
    trainer, image, label, step = _start(way, device=device, **case)
    resident = _peak(step, torch.device(device))
    if way["budget"] is None:
        memory = measure_step(trainer, image, label)
        found = {"parameters": memory.parameters, "optimizer": memory.optimizer, "saved": memory.saved}
        return found | {"peak": memory.largest.peak, "resident": resident}
    entries = [entry for optimizer in trainer.optimizers for entry in optimizer.state.values()]
    state = [t for entry in entries for t in entry.values() if isinstance(t, torch.Tensor)]
    loaded = [*trainer.net.parameters(), *trainer.net.buffers()]
    saved = saved_bytes(step, [*loaded, image, label])
    found = {"parameters": nbytes(loaded), "optimizer": nbytes(state), "saved": saved}
    return found | {"peak": None, "resident": resident}


def _peak(step: Callable[[], None], device: torch.device) -> int:
    if device.type != "cuda":
        return peak_above(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before
