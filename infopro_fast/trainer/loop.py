"""The training loop, safe to kill: epochs, steps and checkpoints of one process's `Share` of a run.

A run's state is the weights, the optimizers, torch's random generators and the place (epoch, batch). Batches
are a function of (seed, epoch), the learning rate is one of the place: a run continues from a checkpoint to
the same bits. Metrics stay on the device and are read every `log_every` steps and before each checkpoint.
Losses that are not finite are found then, and never get into a checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from infopro_fast import errors, modules
from infopro_fast.errors import NonFiniteError, Stopped

from . import checkpoint, curve, display, evaluation, run_folder, schedule, setup
from .meters import Clock, Meters
from .moving_average import MovingAverage
from .processes.wire import Packet
from .settings.config import TrainConfig
from .share import Share
from .step import LocalTrainer
from .stopping import StopRequest


class Training:
    """A run in progress; its place: ``epoch`` finished epochs, ``batch`` finished batches of the next."""

    def __init__(self, config: TrainConfig, run: Path, images: Any, share: Share):
        self.config, self.run, self.images, self.share = config, run, images, share
        self.net, self.watch, self.device = share.net, share.here.watch, torch.device(config.device)
        self.checkpoints = run / share.checkpoints
        self.batches = images.batches(config.batch_size, config.drop_last)
        self.steps = config.iterations or config.epochs * self.batches
        this = weakref.proxy(self)  # no cycle: a network of this training alone is gone when it is
        options: dict[str, Any] = {"at": lambda *module: this.before_module(*module)}
        options |= {"amp": setup.amp_dtype(config), "clip_grad": config.clip_grad, **share.trainer_options}
        self.trainer = LocalTrainer(self.net, setup.optimizer(config), **options)
        self.ema = None if config.ema is None else MovingAverage(self.net, config.ema)
        self.meters = Meters(config.log_every, share.combine)
        self.epoch = self.batch = 0
        self.best: float | None = None
        self.test: dict[str, float] | None = None
        self.seconds, self.came_from = 0.0, ""
        self.means: dict[str, float] = {}  # what is shown of the last steps
        self.metrics: dict[str, Any] = {}  # what the last checkpoint counts on (`MetricsLog.sync`)
        self.saved: dict[str, Any] = {}  # the last checkpoint, in the process that writes them
        self._shapes: tuple[torch.Size, ...] = ()  # of the batch at hand
        self._begun: set[tuple] = set()  # what this process has done before, and with which shapes

    def run_to_end(self) -> None:
        """Train what is left, then write the weights and the learning curve."""
        writes, done = self.share.writes, self.epoch * self.batches + self.batch
        self.clock = Clock(self.seconds, self.config.checkpoint_minutes, self.steps - done)
        self.log = run_folder.MetricsLog(self.run, **self.metrics) if writes else run_folder.NoLog()
        try:
            with (
                display.choose() if writes else display.Silent() as self.screen,
                contextlib.closing(self.log),
                StopRequest(self.run) as self.stop,
            ):
                # A new run begins with a checkpoint: killed before its first epoch ends, it can still
                # continue.
                begins = f"{self.title}, {self.images.train_count} images, run folder {self.run}"
                self.screen.message(self.came_from or begins)
                for advice in setup.advice(self.config):
                    self.screen.message(advice)
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
            saved = checkpoint.list_checkpoints(self.checkpoints)
            last = "there was no checkpoint yet"
            if saved:
                last = f"the last checkpoint before it, {saved[-1]}, is kept"
            raise NonFiniteError(f"{error}; training stopped, {last}") from error
        except (MemoryError, RuntimeError) as error:
            if not errors.is_out_of_memory(error):
                raise
            where = self.place_of(min(self.batch + 1, self.batches_here))
            text = errors.text(error)  # among several processes the watch says where
            raise errors.OutOfMemory(f"{where}: {text}" if self.share.alone else text) from error
        self.draw_learning_curve()

    def train_epoch(self) -> None:
        """Train the batches that are left of this epoch."""
        share = self.share
        self.clock.new_epoch()
        share.new_epoch()
        packets = share.inlet.train(self.epoch, self.batch, self.batches_here)
        for packet in self.told(packets, "reading images", "in a step"):
            # Update each module that this process has, from the features that came in.
            lr = schedule.learning_rate(self.config, self.epoch, self.batch, self.batches)
            self.trainer.set_learning_rate(lr)
            images = share.total(self.batch)  # of all processes
            try:
                features, found = self.trainer.step_from(packet.features, packet.image, packet.label, images)
            except FloatingPointError as error:
                raise FloatingPointError(f"{self.place_of(self.batch + 1)}: {error}") from None

            # Agree with the other processes on what follows this step, and hand the batch on.
            request, metrics = share.decide(packet.request, self.request()), packet.metrics | found
            metrics = share.pass_on(packet._replace(features=features, metrics=metrics, request=request))
            del features  # which would stay alive through the next step
            if metrics is not None:
                self.meters.add(metrics, len(packet.label))

            # Move the average and the place.
            self.watch.at(f"between two steps, {self.place}")
            if self.ema is not None:
                self.ema.update_parameters(self.net)
            self.batch += 1
            self.clock.step(images)

            # Log and show the metrics; only this waits for the device.
            if self.batch % self.config.log_every == 0 or self.batch == self.batches_here:
                self.meters.read(self.place_before)
                self.means = means = self.meters.finish_interval()
                where = {"epoch": self.epoch + 1, "batch": self.batch, "seconds": self.clock.seconds}
                self.log.write({"kind": "step", **where, "lr": lr, **means})
            elif self.clock.steps == 1:
                self.means = self.meters.last()  # a sign of life, long before the first interval ends
            self.screen.update(self.status(self.means, lr))

            # Stop after a signal, or save where a checkpoint is due; the epoch's end has its own checkpoint.
            if request == "stop":
                self.save()
                self.stop.now(signal.SIGTERM)
            elif request == "save" and self.batch < self.batches_here:
                self.save()

    def finish_epoch(self) -> None:
        """Evaluate, log and save an epoch whose batches are done."""
        try:
            self.test = self.evaluate()
        except Stopped:
            self.save()  # at the last batch: the continued run evaluates again
            raise
        self.watch.at(f"between two epochs, {self.place}")
        if self.test is not None:
            self.best = max(evaluation.headline(self.test)[1], self.best or 0.0)

        # Log and show the epoch.
        train, about = self.meters.finish_epoch(), self.share.about_epoch()
        lr = schedule.learning_rate(self.config, self.epoch, self.batches_here - 1, self.batches)
        if "busy" in about:
            told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in about["busy"].items())
            self.screen.message(f"epoch {self.epoch + 1}/{self.config.epochs}  busy in training: {told}")
        self.log.write({
            "kind": "epoch", "epoch": self.epoch + 1, "train": train, "test": self.test, "best": self.best,
            "seconds": self.clock.seconds, "images_per_second": self.clock.images_per_second,
            "peak_memory_bytes": display.peak_memory(self.device), **about,
        })
        self.screen.epoch(self.status(train, lr))

        # Save at the beginning of the next epoch.
        self.epoch, self.batch = self.epoch + 1, 0
        self.save()
        self.write_weights()
        if self.share.alone and self.stop.signum is not None and self.epoch < self.config.epochs:
            self.stop.now()  # several processes stop after the next step, all at once

    def evaluate(self) -> dict[str, float] | None:
        """Evaluate on the test images; where the network does not end, hand features on and return None."""
        share, autocast = self.share, self.trainer.autocast
        if not share.evaluates:
            self.at("in evaluation")
            return None
        packets = self.told(share.inlet.test(), "reading test images", "in evaluation")
        if share.outlet is not None:
            evaluation.send_on(self.result, packets, share.outlet, autocast)
            return None
        packets = self.stop.watch(packets) if share.alone else packets
        return evaluation.evaluate(self.result, ((p.features, p.label) for p in packets), autocast=autocast)

    def request(self) -> str | None:
        """Return this process's wish after a step: "stop" after a signal, "save" if a checkpoint is due."""
        self.watch.stops |= self.stop.signum is not None
        return "stop" if self.stop.signum is not None else "save" if self.clock.checkpoint_due else None

    # ----------------------------------------------------------------------------------------------------
    # Checkpoints and results

    def save(self) -> None:
        """Write a checkpoint. Raises FloatingPointError if a loss or anything in it is not finite."""
        self.watch.at(f"writing a checkpoint, {self.place}")
        self.meters.read(self.place_before)
        content = {"net": self.net.state_dict(), "trainer": self.trainer.state_dict()}
        content = self.share.whole(content if self.ema is None else content | {"ema": self.ema.state_dict()})
        if content is not None:
            for name in checkpoint.not_finite(content):
                raise FloatingPointError(f"{self.place}: {name} is not finite, though every loss was")
            self.metrics = self.log.sync()
            self.saved = content | {
                "config": self.config.to_json(), "epoch": self.epoch, "batch": self.batch, "best": self.best,
                "test": self.test, "meters": self.meters.state_dict(), "rng": setup.rng_state(self.device),
                "seconds": self.clock.seconds, "torch": torch.__version__, **self.metrics,
            }
            name = checkpoint.name_of(self.epoch, self.batch)
            checkpoint.save(self.checkpoints, name, self.saved, self.watch.moved)
        self.clock.saved()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take the state that `save` wrote to ``path``."""
        state = self.share.own(state)
        self.net.load_state_dict(state["net"])
        self.trainer.load_state_dict(state["trainer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.meters.load_state_dict(state["meters"])
        setup.set_rng_state(state["rng"], self.device)
        for name in ("epoch", "batch", "best", "test", "seconds"):
            setattr(self, name, state[name])
        self.metrics = run_folder.counted_on(state)
        self.came_from = f"{self.title}: continuing {self.run} from {path.name}"
        if state["torch"] != torch.__version__:
            versions = f"written by torch {state['torch']}, this is {torch.__version__}"
            self.came_from += f" ({versions}: bits may differ)"

    def write_weights(self) -> None:
        """Write the network's weights, or their average, in the process that has the run folder."""
        self.watch.at(f"writing the weights, {self.place}")
        weights = self.share.weights(self.result, self.saved)
        if weights is not None:
            accuracy = (self.test or {}).get("accuracy")
            about = {"arch": self.config.arch, "epoch": self.epoch, "test_accuracy": accuracy}
            about |= self.images.about()
            run_folder.write_weights(self.run, weights, about, self.watch.moved)

    def draw_learning_curve(self) -> None:
        if self.share.writes:
            self.watch.at("drawing the learning curve", slow=True)
            curve.draw_learning_curve(self.run, self.title)

    # ----------------------------------------------------------------------------------------------------
    # Where the run is, for the watch and for the user

    def told(self, packets: Iterator[Packet], reading: str, working: str) -> Iterator[Packet]:
        """Yield the packets, and tell the watch when one is read and when it is worked on."""
        packets = iter(packets)
        while True:
            self.watch.at(f"{reading}, {self.place}", pulse=self.images.images_read)
            packet = next(packets, None)
            if packet is None:
                return
            self._shapes = packet.features.shape, packet.label.shape
            self.at(working)
            yield packet

    def before_module(self, module: str, images: int) -> None:
        """Tell the watch of a module, or stop before it where a signal cannot wait for the step's end.

        Half a step is never saved: the run continues from its last checkpoint, to the same bits.
        """
        if not self.share.alone:
            self.at(f"in {module}", images)
        elif self.stop.overdue:
            self.stop.now()

    def at(self, what: str, images: int | None = None) -> None:
        """Tell the watch of a step, an evaluation, or a module with a part of so many images of a batch.

        A GPU's first one with each shape compiles and chooses kernels, which takes longer.
        """
        begun = what, self._shapes, images
        self.watch.at(f"{what}, {self.place}", slow=self.device.type == "cuda" and begun not in self._begun)
        self._begun.add(begun)

    @property
    def result(self) -> modules.LocalNetwork:
        """What is tested and written: the network, or its moving average."""
        return self.net if self.ema is None else self.ema.module

    @property
    def batches_here(self) -> int:
        """Batches of this epoch; a run that is counted in steps may end inside its last one."""
        return min(self.batches, self.steps - self.epoch * self.batches)

    def status(self, train: dict[str, float], lr: float) -> display.Status:
        return display.Status(
            self.title, self.epoch + 1, self.config.epochs, self.batch, self.batches_here, lr, train,
            self.test, self.best, self.clock.images_per_second, display.peak_memory(self.device),
            self.clock.seconds_left,
        )

    @property
    def place(self) -> str:
        return self.place_of(self.batch)

    def place_before(self, steps: int) -> str:
        """Return the name of the step that is so many steps before the last one, in the same epoch."""
        return self.place_of(self.batch - steps)

    def place_of(self, step: int) -> str:
        prefix = self.share.prefix and f"{self.share.prefix}, "
        return f"{prefix}epoch {self.epoch + 1}, step {step} of {self.batches_here}"

    @property
    def title(self) -> str:
        c, prefix = self.config, self.share.prefix and f"{self.share.prefix} of "
        count = f"{c.modules} module{'s' * (c.modules > 1)}"
        return f"{prefix}{c.arch}, {count}, {c.local_loss}, on {c.dataset} ({self.device})"
