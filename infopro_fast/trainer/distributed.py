"""Runs of several processes: `loop`'s, with the work shared as `processes.Layout` says.

All processes go through the same places of the run; one of them, the main one, writes the run folder. Checkpoints are those of a run
of one process, to the byte of every tensor, so that any number of processes continues from them. What is decided by a clock or a
signal is decided once, at the first stage, and goes on with the batch: everybody saves or stops after the same step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast import data, modules

from . import checkpoint, continuing, display, loop, processes, recipes, report
from .config import ConfigError, TrainConfig
from .parallel import ParallelTrainer, modules_of
from .pipeline import REQUESTS, EvaluationPart, Packet, Receiver, Sender, Waiting
from .processes import Processes, connected

STATE = 100  # tag
BUSY = "busy/"  # and the modules of a process: what it sends on beside the metrics


def fit(config: TrainConfig) -> Path | None:
    """`loop.fit` of a resolved config in the processes that torchrun started; the run folder in the main process, None in others.

    After a restart by torchrun (--max-restarts) the run in ``config.out`` continues from its last checkpoint.
    """
    if processes.launched() and processes.may_restart() and config.out is None:
        raise ConfigError("out: expected a run folder: torchrun with --max-restarts starts the same command again, which has to find it")
    config = dataclasses.replace(config, device=processes.local_device(config.device))
    with connected(config) as group:
        begun = processes.restarts() > 0 and group.share(_checkpoints(config.out), group.layout.main) > 0
        if begun:
            return _continue(group, config.out, None, previous=False)
        images = _load_data(config, group)
        config = config.in_epochs(images.batches(config.batch_size, config.drop_last))
        _check_batches(config, images, group)
        shared = recipes.shared(config, group.layout.replicas)
        with loop._machine(config), contextlib.ExitStack() as held:
            group.watch.at("building the network", slow=True)
            torch.manual_seed(config.seed)
            net = loop._build(config, images)
            if config.init is not None:
                loop.load_init(net, config.init)
            if group.layout.is_main:
                if processes.restarts() > 0:
                    _remove_unbegun(config.out)
                group.run = report.create(config, shared)
                held.enter_context(report.locked(group.run))
            group.run = group.share(group.run, group.layout.main)
            training = DistributedTraining(config, group.run, images, net, group)
            del net  # the modules of others
            training.run_to_end()
    return group.run if group.layout.is_main else None


def resume(run: Path, config: TrainConfig, *, previous: bool = False) -> Path | None:
    """`loop.resume` in the processes that torchrun started, as many as there are now. config: the run's, shared among them."""
    with connected(dataclasses.replace(config, device=processes.local_device(config.device))) as group:
        return _continue(group, run, config, previous)


def _continue(group: Processes, run: Path, anew: TrainConfig | None, previous: bool) -> Path | None:
    group.run, main = run, group.layout.main
    with contextlib.ExitStack() as held:
        path = state = None
        if group.layout.is_main:
            group.watch.at("reading a checkpoint", slow=True)
            held.enter_context(report.locked(run))
            checkpoint.clean(run / report.CHECKPOINTS)
            path, state = checkpoint.load_latest(run / report.CHECKPOINTS, previous)
            anew = anew or report.read_config(run)
            state["config"] = continuing.continued(TrainConfig.from_json(state["config"]), anew).to_json()
        path = group.share(path, main)
        state = _broadcast(state, main, group.watch.waiting)  # the others may have no such folder
        config = TrainConfig.from_json(state["config"])
        config = dataclasses.replace(config, device=processes.local_device(config.device))
        images = _load_data(config, group)
        _check_batches(config, images, group)
        if group.layout.is_main:
            report.keep_config(run, anew)
        group.watch.at("building the network", slow=True)
        with loop._machine(config):
            training = DistributedTraining(config, run, images, loop._build(config, images), group)
            training.load(path, state)
            training.run_to_end()
    return run if group.layout.is_main else None


def _checkpoints(run: Path) -> int:
    return len(checkpoint.list_checkpoints(run / report.CHECKPOINTS)) if (run / report.CHECKPOINTS).is_dir() else 0


def _remove_unbegun(run: Path) -> None:
    """A run folder that a killed process created and wrote no checkpoint into: its files are made anew."""
    first = {report.CONFIG, report.RECIPE}
    known = {*first, report.METRICS, ".lock", report.CHECKPOINTS, *(checkpoint.ASIDE + name for name in first)}
    if run.is_dir() and {path.name for path in run.iterdir()} <= known and _checkpoints(run) == 0:
        for path in run.iterdir():
            checkpoint._remove(path) if path.is_dir() else path.unlink()


def _load_data(config: TrainConfig, group: Processes) -> data.ImageSet | data.FolderSet:
    """Files that are fetched are fetched by one process of a machine, before the others look."""
    group.watch.at("opening the data set", slow=True)
    first = processes.local_rank() == 0
    if config.download and first:
        loop._load_data(config)
    if config.download:
        with group.watch.waiting():
            dist.all_reduce(torch.zeros(1))
    return loop._load_data(dataclasses.replace(config, download=False))


def _check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, group: Processes) -> None:
    smallest = config.batch_size if config.drop_last else images.train_count % config.batch_size or config.batch_size
    replicas = group.layout.replicas
    if smallest < replicas:
        raise ConfigError(f"batch_size {config.batch_size}: {replicas} processes cannot share a batch of {smallest} (drop_last?)")
    loop.check_batches(recipes.shared(config, replicas), images, replicas)


class DistributedTraining(loop._Training):
    """A run in progress, of which this process does a part.

    ``config`` is that of the run, which other numbers of processes may continue; ``shared`` is what this number makes of it.
    """

    def __init__(self, config: TrainConfig, run: Path, images: Any, net: modules.LocalNetwork, group: Processes):
        self.group, self.layout, self.part = group, group.layout, (group.layout.replica, group.layout.replicas)
        self.watch = group.watch
        # To write the weights of all modules from, where this process has only some.
        self.whole = copy.deepcopy(net).to("cpu") if self.layout.is_main and self.layout.stages > 1 else None
        self.counts = Counts(images.train_count, config.batch_size)
        self.shared = recipes.shared(config, group.layout.replicas)
        if self.shared.sync_batch_norm and group.data_group is not None:
            modules.convert_sync_batch_norm(net, group.data_group)
        here = net if self.layout.stages == 1 else modules_of(net, self.layout.modules)
        super().__init__(config, run, images, here)
        self.meters.combine = self._combine if self.layout.replicas > 1 else None
        neighbours = self.layout.rank - 1, self.layout.rank + 1
        wire = torch.bfloat16 if config.wire == "bfloat16" else None
        last = self.layout.stage == self.layout.stages - 1
        self.receiver = None if self.layout.stage == 0 else Receiver(neighbours[0], config.in_flight, self.device, self.watch.waiting)
        self.sender = None if last else Sender(neighbours[1], config.in_flight, wire, self.watch.waiting)
        # The image goes as far as there is a module that may reconstruct it: all but the last.
        self.image_needed = not last and self.layout.spans[self.layout.stage + 1].start < config.modules - 1
        self._flag: str | None = None
        self._upstream: dict[str, torch.Tensor] = {}
        self._epoch_began = self._waited_before = 0.0
        self._shares: dict[str, torch.Tensor] = {}

    def make_trainer(self, make_optimizer) -> ParallelTrainer:
        config = self.config
        return ParallelTrainer(
            self.net, make_optimizer, group=self.group.data_group, first=self.layout.modules.start, modules=config.modules,
            global_contrast=self.shared.global_contrast, at=lambda module, images: self.at(f"in {module}", images),
            waiting=self.watch.waiting, amp=loop.amp_dtype(config), accumulate=self.shared.accumulate,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def train_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._epoch_began, self._waited_before = time.monotonic(), self.watch.waited
        if self.sender is not None:
            self.sender.begin()
        if self.receiver is None:
            yield from super().train_batches()
            return
        counts = [self._own_count(i) for i in range(self.batch, self.batches_here)]
        for packet in self.receiver.receive(counts):
            self._flag, self._upstream, self.trainer.incoming = packet.request, packet.metrics, packet.features
            yield packet.features if packet.image is None else packet.image, packet.label

    def _own_count(self, batch: int) -> int:
        own = data.part_of(0, self.counts[batch], *self.part)
        return own.stop - own.start

    def train_step(self, image: torch.Tensor, label: torch.Tensor) -> None:
        self.watch.stops |= self.stop.signum is not None
        if self.receiver is None:
            self._flag = self._decide()
        metrics = self._upstream | self.trainer.step(image, label, self.counts[self.batch])
        if self.layout.stages > 1:
            metrics[BUSY + self.layout.name] = torch.tensor(self.busy, device=self.device)
        if self.sender is not None:
            self.sender.send(Packet(self._flag, metrics, label, image if self.image_needed else None, self.trainer.outgoing))
        else:
            self._shares = {name: metrics.pop(name) for name in list(metrics) if name.startswith(BUSY)}
            self.meters.add(metrics, len(label))

    @property
    def busy(self) -> float:
        """Share of this epoch's time that this process did not wait for others in."""
        passed = time.monotonic() - self._epoch_began
        return 1 - (self.watch.waited - self._waited_before) / passed if passed else 1.0

    def more_of_epoch(self) -> dict[str, Any]:
        shares = {name.removeprefix(BUSY): value.item() for name, value in self._shares.items()}
        if shares:
            told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            self.screen.message(f"epoch {self.epoch + 1}/{self.config.epochs}  busy in training: {told}")
        return {"busy": shares} if shares else {}

    def _decide(self) -> str | None:
        """What all do after this step: by the clock of the main process' replica, and anybody's signals.

        Replicas meet here, so that inside a step, where batch norms may wait for each other, nobody waits for long.
        """
        own = "stop" if self.watch.stop_asked else super().request()
        if self.layout.replicas == 1:
            return own
        flag = torch.tensor([REQUESTS.index(own)])
        with self.watch.waiting():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group.data_group)
        return REQUESTS[flag.item()]

    def images_of_step(self, label: torch.Tensor) -> int:
        return self.counts[self.batch - 1]  # of all processes

    def request(self) -> str | None:
        if self._flag == "stop" and self.stop.signum is None:
            self.stop.signum = signal.SIGTERM  # that another process got
        return self._flag

    def _combine(self, names: list[str], rows: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Metrics of the whole batches, from those of every process' part."""
        own = torch.tensor(counts, dtype=torch.float64, device=rows.device)[:, None]
        sums = torch.tensor([name.endswith("correct") for name in names], device=rows.device)
        total = torch.cat([torch.where(sums, rows, rows * own), own], 1)
        with self.watch.waiting():
            dist.all_reduce(total, group=self.group.data_group)
        rows, count = total[:, :-1], total[:, -1:]
        return torch.where(sums, rows, rows / count), [int(n) for n in count.flatten().tolist()]

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation: by the first replica, whose running statistics count

    def evaluate(self) -> dict[str, float] | None:
        self.at("in evaluation")
        if self.layout.replica > 0:
            return None
        batches = self.test_batches()  # of which a process that is sent features takes none
        part = EvaluationPart(self.result, self.receiver, self.sender, self._test_counts())
        if self.sender is None:
            return loop.evaluation.evaluate(part, part.batches(batches), autocast=self.trainer.autocast)
        part.forward_all(batches, self.trainer.autocast)
        return None

    def _test_counts(self) -> list[int]:
        size, total = self.config.batch_size, len(self.images.test)
        size = min(size, getattr(self.images, "test_batch", None) or size)
        return [min(size, total - start) for start in range(0, total, size)]

    def stop_between_epochs(self) -> None:
        pass  # after the next step, like everybody

    def finish_epoch(self) -> None:
        if self.layout.is_main:
            super().finish_epoch()
            return
        self.evaluate()
        self.meters.finish_epoch()
        self.epoch, self.batch = self.epoch + 1, 0
        self.save()

    # -----------------------------------------------------------------------------------------------------------------
    # What the main process writes

    def tell_recipe(self) -> None:
        self.screen.message(report.recipe_text(self.shared))

    def open_display(self):
        return super().open_display() if self.layout.is_main else _Silent()

    def open_log(self):
        return super().open_log() if self.layout.is_main else _NoLog()

    def draw_learning_curve(self) -> None:
        if self.layout.is_main:
            super().draw_learning_curve()

    def state(self) -> dict[str, Any] | None:
        """The whole run's, at the main process, to which the others of its replica send their modules'."""
        if self.layout.replica > 0:
            return None
        own = _renamed(super().state(), self.layout.modules.start)
        if self.layout.stages == 1:
            return own
        if not self.layout.is_main:
            _send(own, self.layout.main, self.watch.waiting)
            return None
        parts = [_receive(rank, self.watch.waiting) for rank in range(self.layout.main)]
        return _merged([*parts, own])

    def write_checkpoint(self, content: dict[str, Any]) -> None:
        self.saved = content
        super().write_checkpoint(content)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        super().load(path, _part_of_state(state, self.layout.modules))

    def write_weights(self) -> None:
        if not self.layout.is_main:
            return
        if self.layout.stages == 1:
            super().write_weights()
            return
        about = {"arch": self.config.arch, "epoch": self.epoch, "test_accuracy": (self.test or {}).get("accuracy")}
        net = self.saved["net"]
        if self.ema is not None:
            net = {name.removeprefix("module."): t for name, t in self.saved["ema"].items() if name != "n_averaged"}
        self.watch.at(f"writing the weights, {self.place}")
        self.whole.load_state_dict(net)
        report.write_weights(self.run, self.whole.released_state_dict(), about, self.watch.moved)


class Counts:
    """Images of every batch of an epoch."""

    def __init__(self, images: int, batch_size: int):
        self._images, self._size = images, batch_size

    def __getitem__(self, batch: int) -> int:
        return min(self._size, self._images - batch * self._size)


class _Silent(display.PlainDisplay):
    def message(self, text: str) -> None:
        pass


class _NoLog:
    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> int:
        return 0

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# States of a part of the modules, and of all


def _renamed(state: dict[str, Any], first: int) -> dict[str, Any]:
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


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = dict(parts[-1])
    for key in ("net", "ema"):
        if key in whole:
            whole[key] = {name: t for part in parts for name, t in part[key].items()}
    whole["trainer"] = {key: [own for part in parts for own in part["trainer"][key]] for key in whole["trainer"]}
    return whole


def _part_of_state(state: dict[str, Any], span: range) -> dict[str, Any]:
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


def _send(state: dict[str, Any], to: int, waiting: Waiting) -> None:
    packed = _pack(state)
    with waiting():
        dist.send(torch.tensor([len(t) for t in packed]), to, tag=STATE)
        for t in packed:
            dist.send(t, to, tag=STATE)


def _receive(source: int, waiting: Waiting) -> dict[str, Any]:
    sizes = torch.zeros(2, dtype=torch.int64)
    with waiting():
        dist.recv(sizes, source, tag=STATE)
        packed = [torch.empty(n, dtype=torch.uint8) for n in sizes.tolist()]
        for t in packed:
            dist.recv(t, source, tag=STATE)
    return _unpack(*packed)


def _broadcast(state: dict[str, Any] | None, source: int, waiting: Waiting) -> dict[str, Any]:
    packed = None if state is None else _pack(state)
    sizes = torch.zeros(2, dtype=torch.int64) if packed is None else torch.tensor([len(t) for t in packed])
    with waiting():
        dist.broadcast(sizes, source)
        packed = packed or [torch.empty(n, dtype=torch.uint8) for n in sizes.tolist()]
        for t in packed:
            dist.broadcast(t, source)
    return _unpack(*packed) if state is None else state
