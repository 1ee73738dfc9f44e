"""A process's share of a run: where its features come from, which modules it trains on them, where what these give goes.

    images, the process before, or trained modules  ->  inlet  ->  modules  ->  outlet  ->  nobody, or the process behind

Every batch on its way is a `Packet`. A run of one process has the whole network between the images and nobody; `Layout` says what
each of several has. `sequential.OneModule` is one module between what is trained and nobody.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast import data, modules

from .processes import state
from .processes.layout import Processes
from .processes.reduction import modules_of
from .processes.wire import REQUESTS, Packet, Receiver, Sender
from .settings import recipes
from .settings.config import TrainConfig

BUSY = "busy/"  # and the modules of a process: what it sends on beside the metrics


class Images:
    """Inlet of the first module: batches of the data set, or this process's part of each."""

    def __init__(self, config: TrainConfig, images: Any, part: tuple[int, int] = (0, 1)):
        self.config, self.images, self.part = config, images, part
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        """Batches ``first`` to ``last`` of an epoch."""
        c = self.config
        batches = self.images.train_epoch(
            c.batch_size, seed=c.seed, epoch=epoch, first=first, drop_last=c.drop_last, augmented=c.augment, dtype=self.dtype,
            device=self.device, part=self.part,
        )  # fmt: skip
        return (Packet(None, {}, label, image, image) for _, (image, label) in zip(range(first, last), batches))

    def test(self) -> Iterator[Packet]:
        batches = self.images.test_batches(self.config.batch_size, self.dtype, self.device)
        return (Packet(None, {}, label, image, image) for image, label in batches)


class Before:
    """Inlet of later modules: what the process before sends."""

    def __init__(self, receiver: Receiver, counts: Callable[[int], int], test_counts: list[int]):
        self.receiver, self.counts, self.test_counts = receiver, counts, test_counts

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        return self.receiver.receive([self.counts(i) for i in range(first, last)])

    def test(self) -> Iterator[Packet]:
        return self.receiver.receive(self.test_counts)


class Share:
    """Of a run among the processes ``here``, of which there may be one."""

    prefix = ""  # of places and titles in messages
    tells_recipe = True

    def __init__(self, config: TrainConfig, images: Any, net: modules.LocalNetwork, here: Processes):
        self.here, self.layout, self.watch = here, here.layout, here.watch
        self.config = recipes.shared(config, self.layout.replicas)  # what this number of processes makes of the run's settings
        self.alone, self.writes = self.layout.size == 1, self.layout.is_main
        self._images, self._size = images.train_count, config.batch_size
        # To write the weights of all modules from, where this process has only some.
        self._whole = copy.deepcopy(net).to("cpu") if self.writes and self.layout.stages > 1 else None
        if self.config.sync_batch_norm and here.data_group is not None:
            modules.convert_sync_batch_norm(net, here.data_group)
        self.net = net if self.layout.stages == 1 else modules_of(net, self.layout.modules)
        device, rank, stage = torch.device(config.device), self.layout.rank, self.layout.stage
        waiting, last = self.watch.waiting, stage == self.layout.stages - 1
        part = (self.layout.replica, self.layout.replicas)
        self.inlet: Any = Images(config, images.to(device) if config.resident else images, part)
        if stage > 0:
            receiver = Receiver(rank - 1, config.in_flight, device, waiting)
            self.inlet = Before(receiver, self._own, test_counts(images, config.batch_size))
        wire = torch.bfloat16 if config.wire == "bfloat16" else None
        self.outlet = None if last else Sender(rank + 1, config.in_flight, wire, waiting)
        # The image goes as far as there is a module that may reconstruct it: all but the last.
        self._image_needed = not last and self.layout.spans[stage + 1].start < config.modules - 1
        self._busy: dict[str, torch.Tensor] = {}

    def total(self, batch: int) -> int:
        """Images of a batch, of which this process may have a part."""
        return min(self._size, self._images - batch * self._size)

    def _own(self, batch: int) -> int:
        part = data.part_of(0, self.total(batch), self.layout.replica, self.layout.replicas)
        return part.stop - part.start

    @property
    def trainer_options(self) -> dict[str, Any]:
        c, several = self.config, {}
        if self.layout.stages > 1 or self.here.data_group is not None:
            several = {"group": self.here.data_group, "global_contrast": c.global_contrast, "waiting": self.watch.waiting}
        return {"first": self.layout.modules.start, "modules": c.modules, "accumulate": c.accumulate, "cuda_graph": c.cuda_graph, **several}

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def new_epoch(self) -> None:
        self._began, self._waited = time.monotonic(), self.watch.waited
        if self.outlet is not None:
            self.outlet.begin()

    def decide(self, of_packet: str | None, own: str | None) -> str | None:
        """What all do after this step: what the first stage of the main process's replica says, and anybody's signals."""
        if self.layout.stage > 0:
            return of_packet
        if self.alone:
            return own
        own = "stop" if self.watch.stop_asked else own
        if self.layout.replicas == 1:
            return own
        flag = torch.tensor([REQUESTS.index(own)])
        with self.watch.waiting():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.here.data_group)
        return REQUESTS[flag.item()]

    def pass_on(self, request: str | None, metrics: dict, packet: Packet, features: torch.Tensor) -> dict | None:
        """Send a batch on; the metrics of all modules where it ends, None elsewhere."""
        if self.layout.stages > 1:
            passed = time.monotonic() - self._began
            busy = 1 - (self.watch.waited - self._waited) / passed if passed else 1.0
            metrics[BUSY + self.layout.name] = torch.tensor(busy, device=features.device)
        if self.outlet is not None:
            self.outlet.send(Packet(request, metrics, packet.label, packet.image if self._image_needed else None, features))
            return None
        self._busy = {name: metrics.pop(name) for name in list(metrics) if name.startswith(BUSY)}
        return metrics

    @property
    def combine(self) -> Callable | None:
        return self._combine if self.layout.replicas > 1 else None

    def _combine(self, names: list[str], rows: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Metrics of the whole batches, from those of every process' part."""
        own = torch.tensor(counts, dtype=torch.float64, device=rows.device)[:, None]
        sums = torch.tensor([name.endswith("correct") for name in names], device=rows.device)
        total = torch.cat([torch.where(sums, rows, rows * own), own], 1)
        with self.watch.waiting():
            dist.all_reduce(total, group=self.here.data_group)
        rows, count = total[:, :-1], total[:, -1:]
        return torch.where(sums, rows, rows / count), [int(n) for n in count.flatten().tolist()]

    # -----------------------------------------------------------------------------------------------------------------
    # An epoch

    @property
    def evaluates(self) -> bool:
        """By the first replica, whose running statistics count."""
        return self.layout.replica == 0

    def about_epoch(self) -> dict[str, Any]:
        """What else the epoch's line says."""
        return {"busy": {name.removeprefix(BUSY): value.item() for name, value in self._busy.items()}} if self._busy else {}

    def whole(self, own: dict[str, Any]) -> dict[str, Any] | None:
        """The whole run's state, at the main process, to which the others of its replica send their modules'; None elsewhere."""
        if self.layout.replica > 0:
            return None
        own = state.renamed(own, self.layout.modules.start)
        if not self.writes:
            state.send(own, self.layout.main, self.watch.waiting)
            return None
        return state.merged([*(state.receive(rank, self.watch.waiting) for rank in range(self.layout.main)), own])

    def own(self, whole: dict[str, Any]) -> dict[str, Any]:
        return state.part_of(whole, self.layout.modules)

    def weights(self, net: modules.LocalNetwork, saved: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """Of the whole network, by released names; None where another process, or nobody, writes them. saved: the last checkpoint."""
        if not self.writes:
            return None
        if self._whole is None:
            return net.released_state_dict()
        average = {name.removeprefix("module."): t for name, t in saved.get("ema", {}).items() if name != "n_averaged"}
        self._whole.load_state_dict(average or saved["net"])
        return self._whole.released_state_dict()


def test_counts(images: Any, batch_size: int) -> list[int]:
    """Images in every test batch."""
    size, total = min(batch_size, getattr(images, "test_batch", None) or batch_size), len(images.test)
    return [min(size, total - start) for start in range(0, total, size)]
