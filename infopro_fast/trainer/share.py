"""A process's share of a run: where its features come from, which modules it trains, where their output goes.

    images | the process before | trained modules -> inlet -> modules -> outlet -> nobody | the next process

Each batch on its way is a `Packet`. A run of one process has the whole network between the images and nobody.
`Layout` says what each of several processes has. `sequential.OneModule` is one module between the trained
ones and nobody.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast import data, modules
from infopro_fast.data.image_set import epoch_seed
from infopro_fast.errors import ConfigError

from .processes import state
from .processes.connect import Processes
from .processes.wire import REQUESTS, Packet, Receiver, Sender
from .run_folder import CHECKPOINTS
from .settings import recipes
from .settings.config import TrainConfig

BUSY = "busy/"  # begins the names under which processes send on, beside the metrics, how busy they are


class Images:
    """Inlet of the first module: batches of the data set, or this process's part of each."""

    def __init__(self, config: TrainConfig, images: Any, part: tuple[int, int] = (0, 1)):
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.config, self.part = config, part
        self.images = images.to(self.device) if config.resident else images
        mixes = config.mixup is not None or config.cutmix is not None
        self.mix = data.mixing(config.mixup, config.cutmix, images.num_classes) if mixes else None

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        """Yield the batches from ``first`` to before ``last`` of an epoch."""
        c = self.config
        batches = self.images.train_epoch(
            c.batch_size, seed=c.seed, epoch=epoch, first=first, drop_last=c.drop_last, augmented=c.augment,
            dtype=self.dtype, device=self.device, part=self.part,
        )
        for batch, (image, label) in zip(range(first, last), batches):
            if self.mix is not None:
                own = batch * self.part[1] + self.part[0]  # of this process's part of the batch
                image, label = self.mix(image, label, epoch_seed(epoch_seed(c.seed, epoch), own))
            yield Packet(image, image, label)

    def test(self) -> Iterator[Packet]:
        batches = self.images.test_batches(self.config.batch_size, self.dtype, self.device)
        return (Packet(image, image, label) for image, label in batches)


class Before:
    """Inlet of later modules: what the process before sends. counts: images of a training batch."""

    def __init__(self, receiver: Receiver, counts: Callable[[int], int], test_counts: list[int]):
        self.receiver, self.counts, self.test_counts = receiver, counts, test_counts

    def train(self, epoch: int, first: int, last: int) -> Iterator[Packet]:
        return self.receiver.receive([self.counts(i) for i in range(first, last)])

    def test(self) -> Iterator[Packet]:
        return self.receiver.receive(self.test_counts)


class Share:
    """The share of one process in a run, alone or among others (``here``). inlet: if not the usual one."""

    prefix = ""  # begins places and titles in messages
    checkpoints = CHECKPOINTS  # folder inside the run folder
    tells_recipe = True

    def __init__(
        self, config: TrainConfig, images: Any, net: modules.LocalNetwork, here: Processes, inlet: Any = None
    ):
        self.here, self.layout = here, here.layout
        self.config = recipes.shared(config, self.layout.replicas)  # the settings of so many processes
        self.alone, self.writes = self.layout.size == 1, self.layout.is_main
        self._images, self._batch_size = images.train_count, config.batch_size
        # The whole network, to write all weights from, where this process trains only a part of it.
        self._whole = copy.deepcopy(net).to("cpu") if self.writes and self.layout.stages > 1 else None
        if self.config.sync_batch_norm and here.data_group is not None:
            try:
                modules.convert_sync_batch_norm(net, here.data_group)
            except ValueError as error:
                raise ConfigError(f"sync_batch_norm: {error}") from error
        self.net = net if self.layout.stages == 1 else net.part(self.layout.modules)
        self.inlet = self._inlet(config, images) if inlet is None else inlet
        self.outlet = self._outlet(config)
        self._busy: dict[str, torch.Tensor] = {}

    def _inlet(self, config: TrainConfig, images: Any) -> Images | Before:
        if self.layout.stage == 0:
            return Images(config, images, (self.layout.replica, self.layout.replicas))
        device, waiting = torch.device(config.device), self.here.watch.waiting
        receiver = Receiver(self.layout.rank - 1, config.in_flight, device, waiting)
        return Before(receiver, self._part, test_counts(images, config.batch_size))

    def _outlet(self, config: TrainConfig) -> Sender | None:
        if self.layout.stage == self.layout.stages - 1:
            return None
        # Every module but the network's last may reconstruct the image.
        self._image_needed = self.layout.spans[self.layout.stage + 1].start < config.modules - 1
        wire = torch.bfloat16 if config.wire == "bfloat16" else None
        return Sender(self.layout.rank + 1, config.in_flight, wire, self.here.watch.waiting)

    def total(self, batch: int) -> int:
        """Return the number of images of a batch, in all processes together."""
        return min(self._batch_size, self._images - batch * self._batch_size)

    def _part(self, batch: int) -> int:
        """Return the number of images of a batch that this process has."""
        part = data.part_of(0, self.total(batch), self.layout.replica, self.layout.replicas)
        return part.stop - part.start

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Arguments of `LocalTrainer`."""
        c = self.config
        return {
            "first": self.layout.modules.start, "modules": c.modules, "accumulate": c.accumulate,
            "cuda_graph": c.cuda_graph, "group": self.here.data_group, "global_contrast": c.global_contrast,
            "waiting": self.here.watch.waiting,
        }

    # ----------------------------------------------------------------------------------------------------
    # A step

    def new_epoch(self) -> None:
        self._began, self._waited = time.monotonic(), self.here.watch.waited
        if self.outlet is not None:
            self.outlet.begin()

    def decide(self, of_packet: str | None, own: str | None) -> str | None:
        """Return what all processes do after this step: first stages decide, a signal to one stops all."""
        if self.layout.stage > 0:
            return of_packet
        if self.alone:
            return own
        own = "stop" if self.here.watch.stop_asked else own
        if self.layout.replicas == 1:
            return own
        flag = torch.tensor([REQUESTS.index(own)])
        with self.here.watch.waiting():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.here.data_group)
        return REQUESTS[int(flag)]

    def pass_on(self, packet: Packet) -> dict[str, torch.Tensor] | None:
        """Send a batch on and return None; where the network ends, return the metrics of all modules."""
        metrics = packet.metrics
        if self.layout.stages > 1:
            passed, waited = time.monotonic() - self._began, self.here.watch.waited - self._waited
            busy = 1 - waited / passed if passed else 1.0
            metrics[BUSY + self.layout.name] = torch.tensor(busy, device=packet.label.device)
        if self.outlet is not None:
            self.outlet.send(packet if self._image_needed else packet._replace(image=None))
            return None
        self._busy = {name: metrics.pop(name) for name in list(metrics) if name.startswith(BUSY)}
        return metrics

    @property
    def combine(self) -> Callable | None:
        """`Meters`' combine: None where no other process has a part of the batch."""
        return self._combine if self.layout.replicas > 1 else None

    def _combine(
        self, names: list[str], rows: torch.Tensor, counts: list[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Return metrics and counts of the whole batches, from those of this process's parts."""
        own = torch.tensor(counts, dtype=torch.float64, device=rows.device)[:, None]
        sums = torch.tensor([name.endswith("correct") for name in names], device=rows.device)
        total = torch.cat([torch.where(sums, rows, rows * own), own], 1)
        with self.here.watch.waiting():
            dist.all_reduce(total, group=self.here.data_group)
        rows, count = total[:, :-1], total[:, -1:]
        return torch.where(sums, rows, rows / count), [int(n) for n in count.flatten().tolist()]

    # ----------------------------------------------------------------------------------------------------
    # An epoch

    @property
    def evaluates(self) -> bool:
        """Whether this process evaluates: the first replica does, with its running statistics."""
        return self.layout.replica == 0

    def about_epoch(self) -> dict[str, Any]:
        """Return what else the epoch's record holds: how busy each process was."""
        busy = {name.removeprefix(BUSY): value.item() for name, value in self._busy.items()}
        return {"busy": busy} if busy else {}

    def whole(self, own: dict[str, Any]) -> dict[str, Any] | None:
        """Return the run's whole state in the main process, to which others send parts; None elsewhere."""
        if self.layout.replica > 0:
            return None
        own = state.renamed(own, self.layout.modules.start)
        if not self.writes:
            state.send(own, self.layout.main, self.here.watch.waiting)
            return None
        others = [state.receive(rank, self.here.watch.waiting) for rank in range(self.layout.main)]
        return state.merged([*others, own])

    def own(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Return this process's part of a whole run's state."""
        return state.part_of(whole, self.layout.modules)

    def weights(self, net: modules.LocalNetwork, saved: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """Return the network's weights by the authors' names, or None where this process does not write them.

        net: the modules here. saved: the last checkpoint.
        """
        if not self.writes:
            return None
        if self._whole is None:
            return net.released_state_dict()
        average = saved.get("ema", {})
        average = {name.removeprefix("module."): t for name, t in average.items() if name != "n_averaged"}
        self._whole.load_state_dict(average or saved["net"])
        return self._whole.released_state_dict()


def test_counts(images: Any, batch_size: int) -> list[int]:
    """Return the number of images in each test batch."""
    size, total = min(batch_size, getattr(images, "test_batch", None) or batch_size), len(images.test)
    return [min(size, total - start) for start in range(0, total, size)]
