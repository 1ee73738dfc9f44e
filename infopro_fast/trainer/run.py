"""Begin a run, continue it, or evaluate it: who takes part, images, network, run folder; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast import data
from infopro_fast.errors import ConfigError

from . import checkpoint, evaluation, run_folder, schedule, sequential, setup
from .loop import Training
from .processes import connect, state, watch
from .processes.connect import Processes
from .settings import continuing, recipes
from .settings.config import TrainConfig
from .share import Share


def fit(config: TrainConfig) -> Path | None:
    """Train as ``config`` says and return the run folder; None in processes that do not write it.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop training after a checkpoint (`Stopped`), or within a step that
    takes longer than `stopping.GRACE`; a second SIGINT or SIGTERM stops it at once. After a restart by
    torchrun (--max-restarts) the run in ``config.out`` continues from its last checkpoint. Torch's generators
    and thread count are restored. Raises ConfigError, DataError, RunError, OutOfMemory or NonFiniteError.
    """
    config, several = config.resolved(), config.parallel != "none"
    if several and connect.launched() and connect.may_restart() and config.out is None:
        what = "torchrun with --max-restarts starts the same command again, which has to find it"
        raise ConfigError(f"out: expected a run folder: {what}")
    config = connect.on_local_device(config) if several else config
    with connect.joined(config, several) as here, contextlib.ExitStack() as held:
        restarted = several and connect.restarts() > 0
        if restarted and here.share(_checkpoints(config.out), here.layout.main) > 0:
            return _continue(here, held, config.out)
        opened = _Opened(config, here, held)  # finds what is wrong before there is a folder
        if here.layout.is_main:
            shared = recipes.shared(opened.config, here.layout.replicas)
            here.run = run_folder.create(opened.config, held, shared, again=restarted)
        here.run = here.share(here.run, here.layout.main)
        return opened.run_to_end()


def resume(
    run: str | Path,
    *,
    previous: bool = False,
    **changes: Any,
) -> Path | None:
    """Continue a run from its last checkpoint (``previous``: from the one before), or begin one without any.

    It ends with the bits of an uninterrupted run. On another machine, or on a GPU with kernels of torch that
    are not deterministic, bits may differ.
    changes: settings that the run has from now on, such as parallel="pipeline" under torchrun, threads,
    data_root or more epochs; `continuing.changed` says which may change.
    Raises CheckpointError for a damaged checkpoint, ConfigError for changes to the training, and what `fit`
    raises.
    """
    config = continuing.changed(run_folder.read_config(Path(run)), changes)
    several = config.parallel != "none" and bool(connect.launched() or "parallel" in changes)
    local = connect.on_local_device(config) if several else config
    with connect.joined(local, several) as here, contextlib.ExitStack() as held:
        return _continue(here, held, Path(run), config, previous)


def _continue(
    here: Processes, held: contextlib.ExitStack, run: Path, anew: TrainConfig | None = None,
    previous: bool = False,
) -> Path | None:
    """Continue a run. anew: its settings from now on, in the main process; None: as they are."""
    here.run, path, content, before = run, None, None, None
    if here.layout.is_main:
        here.watch.at("reading a checkpoint", slow=True)
        held.enter_context(run_folder.locked(run))
        checkpoint.clean(run / run_folder.CHECKPOINTS)
        anew = anew or run_folder.read_config(run)
        content = {"config": anew.to_json()}
        if anew.order == "simultaneous" and (previous or not run_folder.is_unbegun(run)):
            path, content = checkpoint.load_latest(run / run_folder.CHECKPOINTS, previous)
            before = TrainConfig.from_json(content["config"])
            content["config"] = continuing.continued(before, anew).to_json()
    if here.several:  # the other processes need not see the folder
        path = here.share(path, here.layout.main)
        content = state.broadcast(content, here.layout.main, here.watch.waiting)
    config = TrainConfig.from_json(content["config"])
    local = connect.on_local_device(config) if here.several else config
    opened = _Opened(local, here, held, fresh=path is None)  # killed before its first checkpoint
    longer = ""
    if before is not None and config.epochs > before.epochs:
        batches = opened.images.batches(config.batch_size, config.drop_last)
        longer = _longer(before, config, content, batches, run)
    if here.layout.is_main:
        run_folder.keep_config(run, anew)
    return opened.run_to_end(path, content, previous, longer)


def _longer(before: TrainConfig, after: TrainConfig, content: dict[str, Any], batches: int, run: Path) -> str:
    """Return what more epochs do to the learning rate, whose schedule then goes over all of them.

    content: the checkpoint's. Raises ConfigError for a finished run whose rate has come down and would go up
    again: that would be a second training, not a longer one.
    """
    epoch, batch = divmod(content["epoch"] * batches + content["batch"], batches)
    finished = epoch >= before.epochs
    last_epoch, last_batch = (before.epochs - 1, batches - 1) if finished else (epoch, batch)
    old = schedule.learning_rate(before, last_epoch, last_batch, batches)
    new = schedule.learning_rate(after, epoch, batch, batches)
    if finished and new > old:
        weights, more = run / run_folder.WEIGHTS, after.epochs - before.epochs
        raise ConfigError(
            f"epochs {after.epochs}: the run has finished its {before.epochs} epochs, and its "
            f"{before.schedule} schedule has brought the learning rate down to {old:.3g}; over "
            f"{after.epochs} epochs it would go up again, to {new:.3g}. Begin a new run with these weights: "
            f"infopro-fast train --config {run} --init {weights} --epochs {more}"
        )
    rate = f"stays {new:.4g}" if new == old else f"is {new:.4g} in place of {old:.4g}"
    return (
        f"; {after.epochs} epochs in place of {before.epochs}: the {after.schedule} schedule goes over all "
        f"of them, so the learning rate {rate} in the next step"
    )


class _Opened:
    """A run whose images, machine and network are there. fresh: with new weights, not a checkpoint's."""

    def __init__(self, config: TrainConfig, here: Processes, held: contextlib.ExitStack, fresh: bool = True):
        self.here, self.held = here, held
        self.images = _load_data(config, here)
        config = config.in_epochs(self.images.batches(config.batch_size, config.drop_last))
        if config.measures_colors:
            config = dataclasses.replace(config, mean=self.images.mean, std=self.images.std)
        self.config = config = setup.cut(config, self.images)
        _check_batches(config, self.images, here.layout.replicas)
        held.enter_context(setup.machine(config))
        here.watch.at("building the network", slow=True)
        if config.order == "sequential":
            self.share, self.sequence = None, sequential.Sequence(config, self.images, here)
            self.sequence.check_space()
        else:
            say = functools.partial(print, flush=True) if here.layout.is_main else None
            net = setup.first_network(config, self.images, say) if fresh else setup.build(config, self.images)
            self.share = Share(config, self.images, net, here)

    def run_to_end(
        self, path: Path | None = None, content: dict[str, Any] | None = None, previous: bool = False,
        longer: str = "",
    ) -> Path | None:
        """Train to the end and return the run folder, or None where this process does not write it.

        path, content: the checkpoint to continue from; sequential training finds its own, or with
        ``previous`` the one before the last. longer: what to say about more epochs.
        """
        here = self.here
        if not here.several:
            here.watch = self.held.enter_context(watch.alone(self.config.patience, here.run))
        if self.share is None:
            self.sequence.run_to_end(previous)
        else:
            training = Training(self.config, here.run, self.images, self.share)
            if path is not None:
                training.load(path, content)
                training.came_from += longer
            training.run_to_end()
        return here.run if here.layout.is_main else None


def evaluate_run(
    run: str | Path,
    *,
    data_root: str | Path | None = None,
    device: str | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> dict[str, float]:
    """Return the metrics of a run's weights on its test images.

    data_root, device: where they differ from the run's (`TrainConfig.to_look_at`). scales, flip:
    `evaluation.evaluate`'s.
    Raises RunError, DataError or ConfigError.
    """
    run = Path(run)
    config, weights = run_folder.read_config(run), run_folder.read_weights(run)
    config = config.to_look_at(device=device, data_root=data_root)
    images = setup.load_data(config)
    if not images.dense and (flip or tuple(scales) != (1.0,)):
        raise ConfigError(f"{run}: scales and flip are for segmentation, and {config.dataset} is not")
    with setup.machine(config):
        net = setup.build_trained(config, images, run, weights)
        dtype, autocast = getattr(torch, config.dtype), functools.partial(setup.autocast, config)
        batches = images.to(config.device).test_batches(config.batch_size, dtype, config.device)
        return evaluation.evaluate(net, batches, autocast=autocast, scales=scales, flip=flip)


def _load_data(config: TrainConfig, here: Processes) -> data.ImageSet | data.FolderSet:
    """Return the images. One process of each machine downloads them, before the others look."""
    here.watch.at("opening the data set", slow=True)
    if config.download and connect.local_rank() == 0:
        setup.load_data(config)
    if config.download and here.several:
        with here.watch.waiting():
            dist.all_reduce(torch.zeros(1))
    images = setup.load_data(dataclasses.replace(config, download=False))
    if config.batch_size > images.train_count:
        count = f"there are only {images.train_count} training images"
        raise ConfigError(f"batch_size {config.batch_size}: {count}")
    return images


def _check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, replicas: int) -> None:
    size = config.batch_size
    smallest = size if config.drop_last else images.train_count % size or size
    if smallest < replicas:
        what = f"{replicas} processes cannot share a batch of {smallest} (drop_last?)"
        raise ConfigError(f"batch_size {size}: {what}")
    setup.check_batches(recipes.shared(config, replicas), images, replicas)


def _checkpoints(run: Path) -> int:
    """Return how many checkpoints a run folder has; it need not exist."""
    return len(checkpoint.list_checkpoints(run / run_folder.CHECKPOINTS))
