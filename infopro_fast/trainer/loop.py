"""The training loop, and what makes it safe to kill: `fit` starts a run, `resume` continues one to the same bits.

The state of a run is the weights, the optimizers, torch's random generators, and the place (epoch, batch): the batches
themselves are a function of (seed, epoch) and the learning rate of the place. Metrics stay on the device and are read every
`log_every` steps and before each checkpoint, which is when a non-finite loss is found; none ever gets into a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data, modules, ops

from . import checkpoint, continuing, display, evaluation, processes, report, schedule
from .config import ConfigError, TrainConfig
from .meters import Clock, Meters
from .moving_average import MovingAverage
from .step import LocalTrainer
from .watch import Unwatched, Watch, alone

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class NonFiniteError(RuntimeError):
    """Training met a nan or an infinity; the message names step, module and loss, and the last checkpoint, which is good."""


class Stopped(KeyboardInterrupt):
    """Training stopped by a signal, after a checkpoint. run: the run folder; signum: which signal."""

    def __init__(self, run: Path, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; continue with: infopro-fast train --resume {run}")
        self.run, self.signum = run, signum


def fit(config: TrainConfig) -> Path:
    """Train as ``config`` says and return the run folder.

    SIGINT and SIGTERM stop it after a checkpoint (`Stopped`), a second one at once. Raises ConfigError, DataError, RunError
    or NonFiniteError, whose messages are for people. Torch's generators and thread count are left as they were.
    """
    config = config.resolved()
    if config.parallel != "none":
        from . import distributed

        return distributed.fit(config)
    processes.check_alone(config)
    if config.order == "sequential":
        from . import sequential

        return sequential.fit(config)
    images = _load_data(config)
    config = config.in_epochs(images.batches(config.batch_size, config.drop_last))
    check_batches(config, images)
    with _machine(config):
        torch.manual_seed(config.seed)
        net = _build(config, images)
        if config.init is not None:
            load_init(net, config.init)
        run = report.create(config)
        with report.locked(run), alone(config.patience, run) as looking:
            training = _Training(config, run, images, net)
            training.watch = looking
            training.run_to_end()
    return run


def resume(
    run: str | Path, *, previous: bool = False, sharing: dict[str, Any] | None = None, data_root: str | Path | None = None
) -> Path:
    """Continue a run from its last checkpoint, or with ``previous`` from the one before it; on the same machine, to the same bits.

    (On a GPU as far as torch's kernels are deterministic.) sharing: settings of `continuing.SHARING`, for other processes than those
    that the run is of: {"parallel": "pipeline"} in what torchrun started, say; from then on it is of these. data_root: where the data
    set's files are from now on, if not where the run found them.
    Raises CheckpointError for a damaged checkpoint, ConfigError for processes that would not do the same training, and what `fit` raises.
    """
    run = Path(run)
    config = report.read_config(run)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=Path(data_root).absolute())
    config.check_installed()
    if sharing:
        config = continuing.shared_anew(config, sharing)
    if config.parallel != "none" and (processes.launched() or sharing):
        from . import distributed

        return distributed.resume(run, config, previous=previous)
    processes.check_alone(config)
    if config.order == "sequential":
        from . import sequential

        return sequential.resume(run, config, previous=previous)
    with report.locked(run):
        checkpoint.clean(run / report.CHECKPOINTS)
        path, state = checkpoint.load_latest(run / report.CHECKPOINTS, previous)
        config, anew = continuing.continued(TrainConfig.from_json(state["config"]), config), config
        images = _load_data(config)
        report.keep_config(run, anew)
        with _machine(config), alone(config.patience, run) as looking:
            training = _Training(config, run, images, _build(config, images))
            training.watch = looking
            training.load(path, state)
            training.run_to_end()
    return run


def evaluate_run(
    run: str | Path,
    *,
    data_root: str | Path | None = None,
    device: str | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> dict[str, float]:
    """What `evaluation.evaluate` finds of a run's weights.safetensors on its test images.

    data_root, device: if not those of the run (`TrainConfig.to_look_at`). scales, flip: as there.
    Raises RunError, DataError or ConfigError.
    """
    run = Path(run)
    config, weights = report.read_config(run), report.read_weights(run)
    config = config.to_look_at(device=device, data_root=data_root)
    images = _load_data(config)
    if not images.dense and (flip or tuple(scales) != (1.0,)):
        raise ConfigError(f"{run}: scales and flip are for segmentation, and {config.dataset} is not")
    with _machine(config):
        net = _build(config, images)
        try:
            net.load_released_state_dict(weights)
        except ValueError as error:
            raise report.RunError(f"{run / report.WEIGHTS} does not fit {report.CONFIG}: {error}") from error
        batches = images.to(config.device).test_batches(config.batch_size, getattr(torch, config.dtype), config.device)
        trainer = LocalTrainer(net, schedule.released_sgd(config.lr), amp=amp_dtype(config))
        return evaluation.evaluate(net, batches, autocast=trainer.autocast, scales=scales, flip=flip)


class _Training:
    """A run in progress; its place is ``epoch`` finished epochs and ``batch`` finished batches of the next one."""

    def __init__(self, config: TrainConfig, run: Path, images: data.ImageSet | data.FolderSet, net: modules.LocalNetwork):
        self.config, self.run, self.net = config, run, net
        self.checkpoints = run / report.CHECKPOINTS
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.images = images.to(self.device) if config.resident else images
        self.batches = images.batches(config.batch_size, config.drop_last)
        self.steps = config.iterations or config.epochs * self.batches
        make_optimizer = schedule.released_sgd(
            config.lr, config.momentum, config.weight_decay, config.optimizer_state, config.nesterov
        )
        self.trainer = self.make_trainer(make_optimizer)
        self.ema = None
        if config.ema is not None:
            self.ema = MovingAverage(net, config.ema)
        self.meters = Meters(config.log_every)
        self.epoch = self.batch = 0
        self._shapes: tuple[torch.Size, ...] = ()  # of the batch at hand
        self._begun: set[tuple] = set()  # what this process has done before, and with which shapes
        self.best: float | None = None
        self.test: dict[str, float] | None = None
        self.seconds, self.metrics_bytes, self.came_from = 0.0, 0, ""

    # Runs of several processes (`distributed`) do these differently.
    part = (0, 1)  # which of how many parts of every batch is trained here
    watch: Watch | Unwatched = Unwatched()

    def make_trainer(self, make_optimizer) -> LocalTrainer:
        config = self.config
        return LocalTrainer(self.net, make_optimizer, amp=amp_dtype(config), cuda_graph=config.cuda_graph, accumulate=config.accumulate)

    def open_display(self) -> display.PlainDisplay | display.LiveDisplay:
        return display.choose()

    def open_log(self) -> report.MetricsLog:
        return report.MetricsLog(self.run, self.metrics_bytes)

    def train_batches(self) -> Batches:
        """What is left of this epoch's batches."""
        config = self.config
        return self.images.train_epoch(
            config.batch_size, seed=config.seed, epoch=self.epoch, first=self.batch, drop_last=config.drop_last,
            augmented=config.augment, dtype=self.dtype, device=self.device, part=self.part,
        )  # fmt: skip

    def told(self, batches: Batches, reading: str, working: str) -> Batches:
        """The batches; the watch is told that they are read, and then that they are worked on."""
        batches = iter(batches)
        while True:
            self.watch.at(f"{reading}, {self.place}", pulse=self.images.images_read)
            batch = next(batches, None)
            if batch is None:
                return
            self._shapes = tuple(t.shape for t in batch)
            self.at(working)
            yield batch

    def at(self, what: str, images: int | None = None) -> None:
        """Go on to a step, or to a module with a part of so many images of a batch, or to an evaluation.

        On a GPU the first one of a shape compiles and chooses kernels: the last, smaller batch of an epoch, too.
        """
        begun = what, self._shapes, images
        self.watch.at(f"{what}, {self.place}", slow=self.device.type == "cuda" and begun not in self._begun)
        self._begun.add(begun)

    def train_step(self, image: torch.Tensor, label: torch.Tensor) -> None:
        self.meters.add(self.trainer.step(image, label), len(label))

    def images_of_step(self, label: torch.Tensor) -> int:
        return len(label)

    def request(self) -> str | None:
        """What to do after a step: "stop" by a signal, "save" where a checkpoint is due."""
        return "stop" if self.stop.signum is not None else "save" if self.clock.checkpoint_due else None

    def test_batches(self) -> Batches:
        batches = self.images.test_batches(self.config.batch_size, self.dtype, self.device)
        return self.told(batches, "reading test images", "in evaluation")

    def evaluate(self) -> dict[str, float] | None:
        return evaluation.evaluate(self.result, self.stop.watch(self.test_batches()), autocast=self.trainer.autocast)

    def more_of_epoch(self) -> dict[str, Any]:
        """What else the epoch's line says."""
        return {}

    def tell_recipe(self) -> None:
        self.screen.message(report.recipe_text(self.config))

    def draw_learning_curve(self) -> None:
        self.watch.at("drawing the learning curve", slow=True)
        report.draw_learning_curve(self.run, self.title)

    def run_to_end(self) -> None:
        """Train what is left, then write the weights and the learning curve."""
        self.clock = Clock(self.seconds, self.config.checkpoint_minutes, self.steps - self.epoch * self.batches - self.batch)
        try:
            with (
                self.open_display() as self.screen,
                contextlib.closing(self.open_log()) as self.log,
                _StopRequest(self.run) as self.stop,
            ):
                self.screen.message(self.came_from or f"{self.title}, {self.images.train_count} images, run folder {self.run}")
                if not self.came_from:
                    if self.config.recipe is not None:
                        self.tell_recipe()
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
        config = self.config
        self.clock.new_epoch()
        for image, label in self.told(self.train_batches(), "reading images", "in a step"):
            if self.batch >= self.batches_here:  # the last one of a run that is counted in steps
                break
            lr = learning_rate(config, self.epoch, self.batch, self.batches)
            self.trainer.set_learning_rate(lr)
            self.train_step(image, label)
            self.watch.at(f"between two steps, {self.place}")
            if self.ema is not None:
                self.ema.update_parameters(self.net)
            self.batch += 1
            self.clock.step(self.images_of_step(label))

            if self.batch % config.log_every == 0 or self.batch == self.batches_here:
                self.meters.read(self.place)
                means = self.meters.finish_interval()
                where = {"epoch": self.epoch + 1, "batch": self.batch, "seconds": self.clock.seconds}
                self.log.write({"kind": "step", **where, "lr": lr, **means})
                self.screen.update(self.status(means, lr))
            request = self.request()
            if request == "stop":
                self.save()
                self.stop.now()
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
        self.log.write({
            "kind": "epoch", "epoch": self.epoch + 1, "train": train, "test": self.test, "best": self.best, "seconds": self.clock.seconds,
            "images_per_second": self.clock.images_per_second, "peak_memory_bytes": display.peak_memory(self.device),
            **self.more_of_epoch(),
        })  # fmt: skip
        self.screen.epoch(self.status(train, lr))
        self.epoch, self.batch = self.epoch + 1, 0
        self.save()
        self.write_weights()
        self.stop_between_epochs()

    def stop_between_epochs(self) -> None:
        if self.stop.signum is not None and self.epoch < self.config.epochs:
            self.stop.now()

    def state(self) -> dict[str, Any] | None:
        """Weights, optimizers and averages; None in a process that writes no checkpoints."""
        content = {"net": self.net.state_dict(), "trainer": self.trainer.state_dict()}
        return content if self.ema is None else content | {"ema": self.ema.state_dict()}

    def save(self) -> None:
        """A checkpoint of this place. Raises FloatingPointError instead if a loss, a weight or an optimizer's tensor is not finite."""
        self.watch.at(f"writing a checkpoint, {self.place}")
        self.meters.read(self.place)
        content = self.state()
        if content is not None:
            self.write_checkpoint(content)
        self.clock.saved()

    def write_checkpoint(self, content: dict[str, Any]) -> None:
        for name in checkpoint.not_finite(content):
            raise FloatingPointError(f"{self.place}: {name} is not finite, though every loss was")
        content |= {
            "config": self.config.to_json(), "epoch": self.epoch, "batch": self.batch, "best": self.best, "test": self.test,
            "meters": self.meters.state_dict(), "rng": _rng_state(self.device), "seconds": self.clock.seconds,
            "metrics_bytes": self.log.sync(), "torch": torch.__version__,
        }  # fmt: skip
        checkpoint.save(self.checkpoints, checkpoint.name_of(self.epoch, self.batch), content, self.watch.moved)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take the state that `save` wrote to ``path``."""
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
        about = {"arch": self.config.arch, "epoch": self.epoch, "test_accuracy": (self.test or {}).get("accuracy")}
        self.watch.at(f"writing the weights, {self.place}")
        report.write_weights(self.run, self.result.released_state_dict(), about, self.watch.moved)

    @property
    def result(self) -> modules.LocalNetwork:
        """What is tested and written: the network, or its average."""
        return self.net if self.ema is None else self.ema.module

    @property
    def batches_here(self) -> int:
        """Of this epoch."""
        return min(self.batches, self.steps - self.epoch * self.batches)

    def status(self, train: dict[str, float], lr: float) -> display.Status:
        return display.Status(
            self.title, self.epoch + 1, self.config.epochs, self.batch, self.batches_here, lr, train, self.test, self.best,
            self.clock.images_per_second, display.peak_memory(self.device), self.clock.seconds_left,
        )  # fmt: skip

    @property
    def place(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.batch} of {self.batches_here}"

    @property
    def title(self) -> str:
        c = self.config
        return f"{c.arch}, {c.modules} module{'s' * (c.modules > 1)}, {c.local_loss}, on {c.dataset} ({self.device})"


def amp_dtype(config: TrainConfig) -> torch.dtype | None:
    """What autocast rounds to, or None."""
    return None if config.amp == "none" else getattr(torch, config.amp)


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


def load_init(net: modules.LocalNetwork, path: Path) -> None:
    """Copy the weights in ``path`` that the network has at the same names and shapes. Raises ConfigError if none of them fits."""
    own, state, copied = net.released_state_dict(), _read_init(path), 0
    with torch.no_grad():
        for name, tensor in state.items():
            for known in (name, name.removeprefix("module."), f"backbone.{name.removeprefix('module.')}"):
                if known in own and isinstance(tensor, torch.Tensor) and own[known].shape == tensor.shape:
                    own[known].copy_(tensor)
                    copied += 1
                    break
    if not copied:
        raise ConfigError(f"init {path}: none of its {len(state)} entries has the name and shape of a weight of this network")


def _read_init(path: Path) -> dict[str, Any]:
    """What is in a file of weights, by name. Raises ConfigError naming a file that is none."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of weights can fail in any way: as a pickle, a zip archive, a header of JSON
        why = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"init {path}: not a file of weights: {type(error).__name__}: {why}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConfigError(f"init {path}: not a file of weights: expected tensors by name, got {type(state).__name__}")
    return state


def check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, replicas: int = 1) -> None:
    """Raises ConfigError where a head of DGL, whose batch norms are over the images alone, would be given a single one.

    replicas: processes that share a batch, of which each goes through its own part in ``accumulate`` parts.
    """
    if config.loss != "dgl" or config.modules == 1 or (config.sync_batch_norm and replicas > 1):
        return
    size, count = config.batch_size, images.train_count
    for batch in {min(size, count), 0 if config.drop_last else count % size} - {0}:
        for own in {batch // replicas, -(-batch // replicas)} - {0}:
            part = -(-own // config.accumulate)  # as `Tensor.chunk` cuts
            if 1 in (part, own % part):
                raise ConfigError(
                    f"local_loss dgl: the batch norms of its heads need 2 images, and {count} in batches of {size} leave 1 alone "
                    "(other batch_size, accumulate or number of processes? drop_last?)"
                )


def _load_data(config: TrainConfig) -> data.ImageSet | data.FolderSet:
    images = data.load(config.dataset, config.data_root, config.download, crop=config.crop, workers=config.workers or 0)
    if config.shrink > 1:
        images = images.shrunk(config.shrink)
    if config.hold_out > 0:
        images = images.held_out(config.hold_out)
    if images.batches(config.batch_size, config.drop_last) == 0:
        raise ConfigError(f"batch_size {config.batch_size} and drop_last: there are only {images.train_count} training images")
    return images


def _build(config: TrainConfig, images: data.ImageSet | data.FolderSet) -> modules.LocalNetwork:
    if config.impl != "auto":
        # Of what has no CUDA C++ kernels, cuda asks for none (`modules.build`); Triton's are there for every op.
        for op in (op for op in ops.OPS if config.impl != "cuda" or ops.has_kernels(op, "cuda")):
            reason = ops.available(op, config.device)[config.impl]
            if reason is not None:
                raise ConfigError(f"impl {config.impl}: {op}: {reason}")
    try:
        net = modules.build(
            config.arch, config.modules, config.local_loss, config.lambdas, config.balanced, images.num_classes, images.image_size,
            images.mean, images.std, cuts=config.cuts, net_config=config.net_config, widen=config.widen, feature_dim=config.feature_dim,
            aux_depth=config.aux_depth, label_smoothing=config.label_smoothing, recompute=config.recompute, impl=config.impl,
        )  # fmt: skip
    except ImportError as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("build: ")) from error
    return net.to(config.device, getattr(torch, config.dtype))


@contextlib.contextmanager
def _machine(config: TrainConfig) -> Iterator[None]:
    """The run's thread count and kernels that repeat to the bit, and generators of its own, for as long as it lasts."""
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise ConfigError(f"device {config.device}: {str(error).splitlines()[0]}") from error
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=config.tf32),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class _StopRequest:
    """Notes SIGINT and SIGTERM (``signum``) for the loop to stop at a good place; a second signal interrupts at once.

    Outside the main thread, where Python allows no handlers, signals do what they did before.
    """

    def __init__(self, run: Path):
        self.run = run
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._old = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def now(self) -> None:
        """Stop training here; the checkpoint is written."""
        raise Stopped(self.run, self.signum)

    def watch(self, batches: Iterable) -> Iterator:
        """The batches, until a signal comes."""
        for batch in batches:
            if self.signum is not None:
                self.now()
            yield batch
