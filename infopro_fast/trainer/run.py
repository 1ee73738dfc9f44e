"""A run from its beginning, from a checkpoint, or looked at: who takes part, its folder, what it is made of; then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast import data, errors, whole_files
from infopro_fast.errors import ConfigError

from . import checkpoint, evaluation, run_folder, schedule, setup
from .loop import Training, learning_rate
from .processes import layout, state
from .processes.layout import Processes
from .processes.watch import alone
from .sequential import Sequence as ModuleByModule
from .settings import continuing, recipes
from .settings.config import TrainConfig
from .share import Share
from .step import LocalTrainer


def fit(config: TrainConfig) -> Path | None:
    """Train as ``config`` says and return the run folder; None in a process that another one writes it for.

    SIGINT and SIGTERM stop it after a checkpoint (`Stopped`), a second one at once. Raises ConfigError, DataError, RunError
    or NonFiniteError, whose messages are for people. Torch's generators and thread count are left as they were.
    After a restart by torchrun (--max-restarts) the run in ``config.out`` continues from its last checkpoint.
    """
    config, several = config.resolved(), config.parallel != "none"
    if several and layout.launched() and layout.may_restart() and config.out is None:
        raise ConfigError("out: expected a run folder: torchrun with --max-restarts starts the same command again, which has to find it")
    config = _here(config, several)
    with layout.joined(config, several) as here, contextlib.ExitStack() as held:
        restarted = several and layout.restarts() > 0
        if restarted and here.share(_checkpoints(config.out), here.layout.main) > 0:
            return _continue(here, held, config.out, None, previous=False)
        images = _load_data(config, here)
        config = config.in_epochs(images.batches(config.batch_size, config.drop_last))
        _check_batches(config, images, here)
        held.enter_context(setup.machine(config))
        here.watch.at("building the network", slow=True)
        training = _begin(config, images, here)  # raises what is wrong before there is a folder
        if here.layout.is_main:
            if restarted:
                _remove_unbegun(config.out)
            here.run = run_folder.create(config, recipes.shared(config, here.layout.replicas))
            held.enter_context(run_folder.locked(here.run))
        here.run = here.share(here.run, here.layout.main)
        return _to_end(config, images, here, held, training)


def resume(run: str | Path, *, previous: bool = False, **changes: Any) -> Path | None:
    """Continue a run from its last checkpoint, or with ``previous`` from the one before it; on the same machine, to the same bits.

    (On a GPU as far as torch's kernels are deterministic.) changes: settings that the run has from now on, those that `continuing`
    lets change: parallel="pipeline" in what torchrun started, threads, data_root, or more epochs, for example.
    Raises CheckpointError for a damaged checkpoint, ConfigError for changes that would change the training, and what `fit` raises.
    """
    config = run_folder.read_config(Path(run))
    config.check_installed()
    config = continuing.changed(config, changes)
    several = config.parallel != "none" and bool(layout.launched() or "parallel" in changes)
    with layout.joined(_here(config, several), several) as here, contextlib.ExitStack() as held:
        return _continue(here, held, Path(run), config, previous)


def _continue(here: Processes, held: contextlib.ExitStack, run: Path, anew: TrainConfig | None, previous: bool) -> Path | None:
    """anew: the run's settings from now on; None: as they are."""
    here.run, several, path, content = run, here.layout.size > 1 or dist.is_initialized(), None, None
    before = None  # the settings until now
    if here.layout.is_main:
        here.watch.at("reading a checkpoint", slow=True)
        held.enter_context(run_folder.locked(run))
        checkpoint.clean(run / run_folder.CHECKPOINTS)
        anew = anew or run_folder.read_config(run)
        content = {"config": anew.to_json()}
        if anew.order == "simultaneous":
            path, content = checkpoint.load_latest(run / run_folder.CHECKPOINTS, previous)
            before = TrainConfig.from_json(content["config"])
            content["config"] = continuing.continued(before, anew).to_json()
    path = here.share(path, here.layout.main)
    if several:  # the others may have no such folder
        content = state.broadcast(content, here.layout.main, here.watch.waiting)
    config = _here(TrainConfig.from_json(content["config"]), several)
    images = _load_data(config, here)
    _check_batches(config, images, here)
    longer = ""
    if before is not None and config.epochs > before.epochs:
        longer = _longer(before, config, content, images.batches(config.batch_size, config.drop_last), run)
    if here.layout.is_main:
        run_folder.keep_config(run, anew)
    held.enter_context(setup.machine(config))
    here.watch.at("building the network", slow=True)
    return _to_end(config, images, here, held, _begin(config, images, here, fresh=False), path, content, previous, longer)


def _longer(before: TrainConfig, after: TrainConfig, content: dict[str, Any], batches: int, run: Path) -> str:
    """Return what more epochs do to the learning rate, as the schedule now goes over all of them.

    content: of the checkpoint. Raises ConfigError for a finished run whose rate has come down and would go up again: that
    would be a second training, not a longer one.
    """
    epoch, batch = divmod(content["epoch"] * batches + content["batch"], batches)
    finished = epoch >= before.epochs
    last = (before.epochs - 1, batches - 1) if finished else (epoch, batch)
    old, new = learning_rate(before, *last, batches), learning_rate(after, epoch, batch, batches)
    if finished and new > old:
        raise ConfigError(
            f"epochs {after.epochs}: the run has finished its {before.epochs} epochs, and its {before.schedule} schedule has brought the "
            f"learning rate down to {old:.3g}; over {after.epochs} epochs it would go up again, to {new:.3g}. Begin a new run with these "
            f"weights instead: infopro-fast train --config {run} --init {run / run_folder.WEIGHTS} --epochs "
            f"{after.epochs - before.epochs}"
        )
    rate = f"stays {new:.4g}" if new == old else f"is {new:.4g} in place of {old:.4g}"
    return (
        f"; {after.epochs} epochs in place of {before.epochs}: the {after.schedule} schedule goes over all of them, so the learning "
        f"rate {rate} in the next step"
    )


def _begin(config: TrainConfig, images: Any, here: Processes, fresh: bool = True) -> Share | ModuleByModule:
    if config.order == "sequential":
        sequence = ModuleByModule(config, images, here)
        sequence.check_space()
        return sequence
    return Share(config, images, setup.first_network(config, images) if fresh else setup.build(config, images), here)


def _to_end(config, images, here, held, begun, path=None, content=None, previous=False, longer="") -> Path | None:
    if here.layout.size == 1 and not dist.is_initialized():
        here.watch = held.enter_context(alone(config.patience, here.run))
    if isinstance(begun, ModuleByModule):
        begun.run_to_end(previous)
    else:
        begun.watch = here.watch
        training = Training(config, here.run, images, begun)
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
    """What `evaluation.evaluate` finds of a run's weights.safetensors on its test images.

    data_root, device: if not those of the run (`TrainConfig.to_look_at`). scales, flip: as there.
    Raises RunError, DataError or ConfigError.
    """
    run = Path(run)
    config, weights = run_folder.read_config(run), run_folder.read_weights(run)
    config = config.to_look_at(device=device, data_root=data_root)
    images = setup.load_data(config)
    if not images.dense and (flip or tuple(scales) != (1.0,)):
        raise ConfigError(f"{run}: scales and flip are for segmentation, and {config.dataset} is not")
    with setup.machine(config):
        net = setup.build(config, images)
        try:
            net.load_released_state_dict(weights)
        except ValueError as error:
            raise errors.RunError(f"{run / run_folder.WEIGHTS} does not fit {run_folder.CONFIG}: {error}") from error
        batches = images.to(config.device).test_batches(config.batch_size, getattr(torch, config.dtype), config.device)
        trainer = LocalTrainer(net, schedule.released_sgd(config.lr), amp=setup.amp_dtype(config))
        return evaluation.evaluate(net, batches, autocast=trainer.autocast, scales=scales, flip=flip)


def _here(config: TrainConfig, several: bool) -> TrainConfig:
    return dataclasses.replace(config, device=layout.local_device(config.device)) if several else config


def _load_data(config: TrainConfig, here: Processes) -> data.ImageSet | data.FolderSet:
    """Files that are fetched are fetched by one process of a machine, before the others look."""
    here.watch.at("opening the data set", slow=True)
    if config.download and layout.local_rank() == 0:
        setup.load_data(config)
    if config.download and dist.is_initialized():
        with here.watch.waiting():
            dist.all_reduce(torch.zeros(1))
    return setup.load_data(dataclasses.replace(config, download=False))


def _check_batches(config: TrainConfig, images: data.ImageSet | data.FolderSet, here: Processes) -> None:
    smallest = config.batch_size if config.drop_last else images.train_count % config.batch_size or config.batch_size
    replicas = here.layout.replicas
    if smallest < replicas:
        raise ConfigError(f"batch_size {config.batch_size}: {replicas} processes cannot share a batch of {smallest} (drop_last?)")
    setup.check_batches(recipes.shared(config, replicas), images, replicas)


def _checkpoints(run: Path) -> int:
    return len(checkpoint.list_checkpoints(run / run_folder.CHECKPOINTS)) if (run / run_folder.CHECKPOINTS).is_dir() else 0


def _remove_unbegun(run: Path) -> None:
    """A run folder that a killed process created and wrote no checkpoint into: its files are made anew."""
    first = {run_folder.CONFIG, run_folder.RECIPE}
    known = {*first, run_folder.METRICS, ".lock", run_folder.CHECKPOINTS, *(whole_files.ASIDE + name for name in first)}
    if run.is_dir() and {path.name for path in run.iterdir()} <= known and _checkpoints(run) == 0:
        for path in run.iterdir():
            checkpoint._remove(path) if path.is_dir() else path.unlink()
