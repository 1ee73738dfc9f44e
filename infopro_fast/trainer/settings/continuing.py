"""What another run may differ in and still be the same training, and how a run may be continued.

A checkpoint holds the whole run, whoever wrote it. Processes train the same where their batch norms and
contrastive losses see the same images: one process and a pipeline see the whole batch (to the same bits), and
so do processes that share it with sync_batch_norm and global_contrast (to rounding). Processes without these
see parts of the batch, as many as there are. Switching between the two would change the training, so it is
refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError

from . import fields
from .config import TrainConfig
from .fields import MACHINE, NOTHING, RESULT

OF_PIPELINE = ("pipeline_modules", "in_flight")


def different(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Return the names of the settings that make two runs different trainings.

    These are the settings that change the result, and ``parallel`` where batch norms and losses see other
    images.
    """
    return fields.differing(a, b, RESULT) + ["parallel"] * (_sees_parts(a) != _sees_parts(b))


def kept(config: TrainConfig, parallel: str | None) -> dict[str, Any]:
    """Return the settings of a run that keep their meaning where ``parallel`` is given; None: it is not.

    Raises ConfigError for a run whose features are rounded on their way between processes, and would not be
    then.
    """
    settings = vars(config)
    if parallel is None:
        return dict(settings)
    if config.wire != "exact" and parallel != "pipeline":
        raise ConfigError(
            f"parallel {parallel}: wire {config.wire} rounds the features of this run between its processes: "
            "continue it with parallel pipeline"
        )
    gone = {"parallel", *(() if parallel == "pipeline" else OF_PIPELINE)}
    gone |= {"sync_batch_norm", "global_contrast"} if parallel == "none" else set()
    return {name: value for name, value in settings.items() if name not in gone}


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings with which a run continues. changes: settings by name.

    Raises ConfigError for settings that --resume may not change, and for ones that would change the training.
    """
    parallel = changes.get("parallel", config.parallel)
    fields.check_names(TrainConfig, changes)
    fixed = [name for name in changes if name != "epochs" and not _may_change(name)]
    if fixed:
        flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ConfigError(f"--resume continues a run with its own settings: leave out {flags}")
    if "data_root" in changes:
        changes = {**changes, "data_root": changes["data_root"] and Path(changes["data_root"]).absolute()}
    after = TrainConfig(**{**kept(config, parallel if parallel != config.parallel else None), **changes})
    _check_parts(config, after)
    _check_longer(config, after)
    return after


def continued(config: TrainConfig, anew: TrainConfig) -> TrainConfig:
    """Return a checkpoint's settings with what the run's own settings, ``anew``, may have changed since."""
    names = [name for name in fields.of(TrainConfig) if _may_change(name)]
    return dataclasses.replace(config, epochs=anew.epochs, **{name: getattr(anew, name) for name in names})


def _may_change(name: str) -> bool:
    return fields.of(TrainConfig)[name].mark in (NOTHING, MACHINE)


def _check_longer(before: TrainConfig, after: TrainConfig) -> None:
    if after.epochs == before.epochs:
        return
    if before.iterations is not None:
        raise ConfigError(f"epochs {after.epochs}: the run is counted in iterations ({before.iterations})")
    if before.order == "sequential":
        raise ConfigError(f"epochs {after.epochs}: the run has order sequential: some modules are trained")
    if after.epochs < before.epochs:
        raise ConfigError(f"epochs {after.epochs}: expected more than the {before.epochs} epochs of the run")


def _check_parts(before: TrainConfig, after: TrainConfig) -> None:
    if before.order == "sequential" and after.parallel != "none":
        raise ConfigError(f"parallel {after.parallel}: the run has order sequential: one process trains it")
    if before.parallel == after.parallel or _sees_parts(before) == _sees_parts(after):
        return
    if _sees_parts(after):
        missing = _missing(after)
        raise ConfigError(
            f"parallel {after.parallel}: the run's batch norms and losses are of whole batches: {missing}"
        )
    raise ConfigError(
        f"parallel {after.parallel}: in the run each process' batch norms and losses were of its own part of "
        f"a batch (parallel {before.parallel}, {_missing(before)}), which no process of this kind has: "
        f"continue it with parallel {before.parallel}"
    )


def _sees_parts(config: TrainConfig) -> bool:
    return bool(_missing(config))


def _missing(config: TrainConfig) -> str:
    """Return why the processes of ``config`` do not compute what one would; "" where they do.

    A recipe's run is that of one process, whoever takes part (`recipes.shared`). A pipeline sees whole
    batches unless pipeline_modules lets several pipelines share them.
    """
    alone = config.parallel == "none" or (config.parallel == "pipeline" and config.pipeline_modules is None)
    if alone or config.recipe is not None:
        return ""
    if config.accumulate > 1:
        return f"accumulate {config.accumulate} cuts a batch at other places where processes share it"
    missing = [] if config.sync_batch_norm else ["sync_batch_norm"]
    contrasts = config.loss == "contrast" and config.number_of_modules() > 1
    missing += ["global_contrast"] if contrasts and not config.global_contrast else []
    return f"it lacks {' and '.join(missing)}" if missing else ""
