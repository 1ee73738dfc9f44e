"""Which processes may continue a run: any among which it stays the same training.

A checkpoint holds the whole run, whoever wrote it. What may differ is what a batch norm and a contrast see: one process and a pipeline
have the whole batch (to the same bits), and so have processes that share it, with SyncBatchNorm and the contrast over all (to rounding).
Processes that share it without these have parts, as many as there are. From parts to the whole, or back, a run would go on as another one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from infopro_fast.errors import ConfigError

from .config import TrainConfig

# The settings that say how processes share a run, which --resume may change.
SHARING = ("parallel", "pipeline_modules", "wire", "in_flight", "sync_batch_norm", "global_contrast", "patience")
CHANGEABLE = (*SHARING, "data_root")  # all that --resume may change: the files may have been moved, too
OF_PIPELINE = ("pipeline_modules", "wire", "in_flight")


def kept(config: TrainConfig, parallel: str | None) -> dict[str, Any]:
    """The settings of a run that stay where ``parallel`` is given (None: is not): all but those that would have no meaning then."""
    settings = dataclasses.asdict(config)
    if parallel is None:
        return settings
    gone = {"parallel", *(() if parallel == "pipeline" else OF_PIPELINE)}
    gone |= {"sync_batch_norm", "global_contrast"} if parallel == "none" else set()
    return {name: value for name, value in settings.items() if name not in gone}


def shared_anew(config: TrainConfig, sharing: dict[str, Any]) -> TrainConfig:
    """The run of ``config`` among other processes. sharing: of SHARING, all or some.

    Raises ConfigError if these cannot be, or if it would not be the same training.
    """
    parallel = sharing.get("parallel", config.parallel)
    anew = TrainConfig(**{**kept(config, parallel if parallel != config.parallel else None), **sharing})
    _check(config, anew)
    return anew


def continued(config: TrainConfig, anew: TrainConfig) -> TrainConfig:
    """``config``, a checkpoint's, with what the run's own settings, ``anew``, may have in another way by now."""
    return dataclasses.replace(config, **{name: getattr(anew, name) for name in CHANGEABLE})


def _check(before: TrainConfig, after: TrainConfig) -> None:
    if before.order == "sequential" and after.parallel != "none":
        raise ConfigError(f"parallel {after.parallel}: the run has order sequential, which is of one process")
    if before.parallel == after.parallel or _sees_parts(before) == _sees_parts(after):
        return
    if _sees_parts(after):
        raise ConfigError(f"parallel {after.parallel}: the run's batch norms and losses are of whole batches: {_missing(after)}")
    raise ConfigError(
        f"parallel {after.parallel}: in the run each process' batch norms and losses were of its own part of a batch "
        f"(parallel {before.parallel}, {_missing(before)}), which no process of this kind has: continue it with parallel {before.parallel}"
    )


def _sees_parts(config: TrainConfig) -> bool:
    return bool(_missing(config))


def _missing(config: TrainConfig) -> str:
    """What keeps the processes of ``config`` from computing what one would; "" where nothing does.

    A recipe's run is that of one process whoever takes part (`recipes.shared`). A pipeline has no part of a batch unless
    pipeline_modules lets several share it.
    """
    alone = config.parallel == "none" or (config.parallel == "pipeline" and config.pipeline_modules is None)
    if alone or config.recipe is not None:
        return ""
    if config.accumulate > 1:
        return f"accumulate {config.accumulate} cuts a batch at other places where processes share it"
    missing = [] if config.sync_batch_norm else ["sync_batch_norm"]
    missing += ["global_contrast"] if config.loss == "contrast" and not config.global_contrast and config.number_of_modules() > 1 else []
    return f"it lacks {' and '.join(missing)}" if missing else ""
