"""The training loop, safe to kill: one process's `Share` of a run, epoch by epoch, with checkpoints that it continues from to the same bits.

The state of a run is the weights, the optimizers, torch's random generators, and the place (epoch, batch): the batches
themselves are a function of (seed, epoch) and the learning rate of the place. Metrics stay on the device and are read every
`log_every` steps and before each checkpoint, which is when a non-finite loss is found; none ever gets into a checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import modules
from infopro_fast.errors import NonFiniteError, Stopped

from . import checkpoint, display, evaluation, run_folder, schedule
from .meters import Clock, Meters
from .moving_average import MovingAverage
from .processes.reduction import ParallelTrainer
from .processes.wire import Packet
from .settings.config import TrainConfig
from .setup import amp_dtype
from .share import Share
from .stopping import StopRequest


class Training:
    """A run in progress; its place is ``epoch`` finished epochs and ``batch`` finished batches of the next one."""

    def __init__(self, config: TrainConfig, run: Path, images: Any, share: Share):
        self.config, self.run, self.share, self.net, self.watch = config, run, share, share.net, share.watch
        self.images, self.device = images, torch.device(config.device)
        self.checkpoints = run / run_folder.CHECKPOINTS
        self.batches = images.batches(config.batch_size, config.drop_last)
        self.steps = config.iterations or config.epochs * self.batches
        sgd = schedule.released_sgd(config.lr, config.momentum, config.weight_decay, config.nesterov)
        at = (lambda module, images: None) if share.alone else (lambda module, images: self.at(f"in {module}", images))
        self.trainer = ParallelTrainer(self.net, sgd, amp=amp_dtype(config), at=at, **share.trainer_options)
        self.ema = None if config.ema is None else MovingAverage(self.net, config.ema)
        self.meters = Meters(config.log_every)
        self.meters.combine = share.combine
        self.epoch = self.batch = 0
        self.best: float | None = None
        self.test: dict[str, float] | None = None
        self.seconds, self.metrics_bytes, self.came_from = 0.0, 0, ""
        self.saved: dict[str, Any] = {}  # the last checkpoint, where this process writes them
        self._shapes: tuple[torch.Size, ...] = ()  # of the batch at hand
        self._begun: set[tuple] = set()  # what this process has done before, and with which shapes

    def run_to_end(self) -> None:
        """Train what is left, then write the weights and the learning curve."""
        writes = self.share.writes
        self.clock = Clock(self.seconds, self.config.checkpoint_minutes, self.steps - self.epoch * self.batches - self.batch)
        try:
            with (
                display.choose() if writes else display.Silent() as self.screen,
                contextlib.closing(run_folder.MetricsLog(self.run, self.metrics_bytes) if writes else run_folder.NoLog()) as self.log,
                StopRequest(self.run) as self.stop,
            ):
                self.screen.message(self.came_from or f"{self.title}, {self.images.train_count} images, run folder {self.run}")
                if not self.came_from:
                    if self.config.recipe is not None and self.share.tells_recipe:
                        self.screen.message(run_folder.recipe_text(self.share.config))
                    self.save()
                while self.epoch < self.config.epochs:
                    self.train_epoch()
                    self.finish_epoch()
            self.write_weights()
        except Stopped:
            self.draw_learning_curve()
            raise
        except FloatingPointError as error:
            last = checkpoint.list_checkpoints(self.checkpoints)
            kept = f"the last checkpoint before it, {last[-1]}, is kept" if last else "there was no checkpoint yet"
            raise NonFiniteError(f"{error}; training stopped, {kept}") from error
        self.draw_learning_curve()

    def train_epoch(self) -> None:
        share, log_every = self.share, self.config.log_every
        self.clock.new_epoch()
        share.new_epoch()
        packets = share.inlet.train(self.epoch, self.batch, self.batches_here)
        for packet in self.told(packets, "reading images", "in a step"):
            lr = learning_rate(self.config, self.epoch, self.batch, self.batches)
            self.trainer.set_learning_rate(lr)
            images = share.total(self.batch)  # of all processes
            found = self.trainer.step(packet.image, packet.label, images, features=packet.features)
            request = share.decide(packet.request, self.request())
            metrics = share.pass_on(request, packet.metrics | found, packet, self.trainer.outgoing)
            if metrics is not None:
                self.meters.add(metrics, len(packet.label))
            self.watch.at(f"between two steps, {self.place}")
            if self.ema is not None:
                self.ema.update_parameters(self.net)
            self.batch += 1
            self.clock.step(images)

            if self.batch % log_every == 0 or self.batch == self.batches_here:
                self.meters.read(self.place)
                means = self.meters.finish_interval()
                where = {"epoch": self.epoch + 1, "batch": self.batch, "seconds": self.clock.seconds}
                self.log.write({"kind": "step", **where, "lr": lr, **means})
                self.screen.update(self.status(means, lr))
            if request == "stop":
                self.save()
                self.stop.now(signal.SIGTERM)
            elif request == "save" and self.batch < self.batches_here:  # the epoch's end has a checkpoint of its own
                self.save()

    def finish_epoch(self) -> None:
        try:
            self.test = self.evaluate()
        except Stopped:
            self.save()  # at the last batch: continuing evaluates again
            raise
        self.watch.at(f"between two epochs, {self.place}")
        if self.test is not None:
            self.best = max(evaluation.headline(self.test)[1], self.best or 0.0)
        train, lr = self.meters.finish_epoch(), learning_rate(self.config, self.epoch, self.batches_here - 1, self.batches)
        about = self.share.about_epoch()
        if "busy" in about:
            told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in about["busy"].items())
            self.screen.message(f"epoch {self.epoch + 1}/{self.config.epochs}  busy in training: {told}")
        self.log.write({
            "kind": "epoch", "epoch": self.epoch + 1, "train": train, "test": self.test, "best": self.best, "seconds": self.clock.seconds,
            "images_per_second": self.clock.images_per_second, "peak_memory_bytes": display.peak_memory(self.device), **about,
        })  # fmt: skip
        self.screen.epoch(self.status(train, lr))
        self.epoch, self.batch = self.epoch + 1, 0
        self.save()
        self.write_weights()
        if self.share.alone and self.stop.signum is not None and self.epoch < self.config.epochs:
            self.stop.now()  # several processes stop after the next step, all at once

    def evaluate(self) -> dict[str, float] | None:
        """What the test images say, in the process that has the network's end; the others send them on."""
        share = self.share
        if not share.evaluates:
            self.at("in evaluation")
            return None
        packets = self.told(share.inlet.test(), "reading test images", "in evaluation")
        if share.outlet is not None:
            evaluation.send_on(self.result, packets, share.outlet, self.trainer.autocast)
            return None
        packets = self.stop.watch(packets) if share.alone else packets
        return evaluation.evaluate(self.result, ((p.features, p.label) for p in packets), autocast=self.trainer.autocast)

    def request(self) -> str | None:
        """What this process wants done after a step: "stop" by a signal, "save" where a checkpoint is due."""
        self.watch.stops |= self.stop.signum is not None
        return "stop" if self.stop.signum is not None else "save" if self.clock.checkpoint_due else None

    # -----------------------------------------------------------------------------------------------------------------
    # What is written

    def save(self) -> None:
        """A checkpoint of this place. Raises FloatingPointError instead if a loss, a weight or an optimizer's tensor is not finite."""
        self.watch.at(f"writing a checkpoint, {self.place}")
        self.meters.read(self.place)
        content = {"net": self.net.state_dict(), "trainer": self.trainer.state_dict()}
        content = self.share.whole(content if self.ema is None else content | {"ema": self.ema.state_dict()})
        if content is not None:
            for name in checkpoint.not_finite(content):
                raise FloatingPointError(f"{self.place}: {name} is not finite, though every loss was")
            self.saved = content | {
                "config": self.config.to_json(), "epoch": self.epoch, "batch": self.batch, "best": self.best, "test": self.test,
                "meters": self.meters.state_dict(), "rng": _rng_state(self.device), "seconds": self.clock.seconds,
                "metrics_bytes": self.log.sync(), "torch": torch.__version__,
            }  # fmt: skip
            checkpoint.save(self.checkpoints, checkpoint.name_of(self.epoch, self.batch), self.saved, self.watch.moved)
        self.clock.saved()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take the state that `save` wrote to ``path``."""
        state = self.share.own(state)
        self.net.load_state_dict(state["net"])
        self.trainer.load_state_dict(state["trainer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.meters.load_state_dict(state["meters"])
        _set_rng_state(state["rng"], self.device)
        for name in ("epoch", "batch", "best", "test", "seconds", "metrics_bytes"):
            setattr(self, name, state[name])
        self.came_from = f"{self.title}: continuing {self.run} from {path.name}"
        if state["torch"] != torch.__version__:
            self.came_from += f" (written by torch {state['torch']}, this is {torch.__version__}: bits may differ)"

    def write_weights(self) -> None:
        self.watch.at(f"writing the weights, {self.place}")
        weights = self.share.weights(self.result, self.saved)
        if weights is not None:
            about = {"arch": self.config.arch, "epoch": self.epoch, "test_accuracy": (self.test or {}).get("accuracy")}
            run_folder.write_weights(self.run, weights, about, self.watch.moved)

    def draw_learning_curve(self) -> None:
        if self.share.writes:
            self.watch.at("drawing the learning curve", slow=True)
            run_folder.draw_learning_curve(self.run, self.title)

    # -----------------------------------------------------------------------------------------------------------------
    # Where the run is, for the watch and for people

    def told(self, packets: Iterator[Packet], reading: str, working: str) -> Iterator[Packet]:
        """The packets; the watch is told that they are read, and then that they are worked on."""
        packets = iter(packets)
        while True:
            self.watch.at(f"{reading}, {self.place}", pulse=self.images.images_read)
            packet = next(packets, None)
            if packet is None:
                return
            self._shapes = packet.features.shape, packet.label.shape
            self.at(working)
            yield packet

    def at(self, what: str, images: int | None = None) -> None:
        """Go on to a step, or to a module with a part of so many images of a batch, or to an evaluation.

        On a GPU the first one of a shape compiles and chooses kernels: the last, smaller batch of an epoch, too.
        """
        begun = what, self._shapes, images
        self.watch.at(f"{what}, {self.place}", slow=self.device.type == "cuda" and begun not in self._begun)
        self._begun.add(begun)

    @property
    def result(self) -> modules.LocalNetwork:
        """What is tested and written: the network, or its average."""
        return self.net if self.ema is None else self.ema.module

    @property
    def batches_here(self) -> int:
        """Of this epoch; the last one of a run that is counted in steps may be shorter."""
        return min(self.batches, self.steps - self.epoch * self.batches)

    def status(self, train: dict[str, float], lr: float) -> display.Status:
        return display.Status(
            self.title, self.epoch + 1, self.config.epochs, self.batch, self.batches_here, lr, train, self.test, self.best,
            self.clock.images_per_second, display.peak_memory(self.device), self.clock.seconds_left,
        )  # fmt: skip

    @property
    def place(self) -> str:
        return f"{self.share.prefix and self.share.prefix + ', '}epoch {self.epoch + 1}, step {self.batch} of {self.batches_here}"

    @property
    def title(self) -> str:
        c, prefix = self.config, self.share.prefix and self.share.prefix + " of "
        return f"{prefix}{c.arch}, {c.modules} module{'s' * (c.modules > 1)}, {c.local_loss}, on {c.dataset} ({self.device})"


def learning_rate(config: TrainConfig, epoch: int, batch: int, batches: int) -> float:
    """Of the step at this place: ``epoch`` epochs and ``batch`` of the next one's ``batches`` are finished before it."""
    if config.schedule == "one_cycle":
        steps, warmup = config.iterations or config.epochs * batches, config.warmup * batches
        return schedule.one_cycle(epoch * batches + batch, steps, config.lr, warmup_steps=warmup)
    if config.schedule == "poly":
        return schedule.poly(epoch * batches + batch, config.iterations or config.epochs * batches, config.lr)
    if config.schedule == "half_cosine":
        return schedule.half_cosine(epoch + 1, config.epochs, config.lr)
    if config.schedule == "step":  # 80 and 120 of the released 160 epochs
        first = max(2, config.epochs // 2)  # a run of few epochs begins with the full rate, too
        return schedule.step(epoch + 1, config.epochs, config.lr, milestones=(first, max(first + 1, 3 * config.epochs // 4)))
    return schedule.cosine(epoch + 1, config.epochs, config.lr, warmup_epochs=config.warmup, zero_last_epoch=config.zero_last_epoch)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
