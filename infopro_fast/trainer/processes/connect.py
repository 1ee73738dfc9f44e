"""Join the processes of a run, and tell the others of a failure.

torchrun, or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, starts the
processes. torch.distributed connects them: gloo for tensors on the CPU, NCCL for tensors on GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infopro_fast.errors import ConfigError, ProcessFailure, Stopped, UserError

from ..settings.config import TrainConfig
from .layout import Layout, place_of
from .watch import PATIENCE, Unwatched, Watch, cause_of, is_of_communication

# The collective timeout is long, so that the watch, which can name the process at fault, reports first.
TIMEOUT = datetime.timedelta(minutes=30)


# --------------------------------------------------------------------------------------------------------
# What torchrun tells


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How many times torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def may_restart() -> bool:
    """Whether torchrun would restart the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def on_local_device(config: TrainConfig) -> TrainConfig:
    """Return the settings with this process's GPU as the device, where the run is on GPUs."""
    if torch.device(config.device).type != "cuda":
        return config
    return dataclasses.replace(config, device=f"cuda:{local_rank()}")


def _agent_keeps_store() -> bool:
    """Whether the run's key-value store outlives its processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# --------------------------------------------------------------------------------------------------------
# Joining


class Processes:
    """This process among the others. data_group: those that train the same modules, or None."""

    watch: Watch | Unwatched = Unwatched()

    def __init__(self, layout: Layout, data_group: dist.ProcessGroup | None = None):
        self.layout, self.data_group = layout, data_group
        self.run: Path | None = None

    @property
    def several(self) -> bool:
        """Whether torchrun started this run (one process of --parallel, too)."""
        return dist.is_initialized()

    def share(self, value: Any, source: int) -> Any:
        """Return the object that process ``source`` has; for small ones."""
        if self.layout.size == 1:
            return value
        box = [value]
        with self.watch.waiting():
            dist.broadcast_object_list(box, source, device=torch.device("cpu"))
        return box[0]

    def hint(self) -> str:
        return "no run was begun" if self.run is None else f"continue with --resume {self.run}"


def joined(config: TrainConfig, several: bool) -> contextlib.AbstractContextManager[Processes]:
    """Return the context of this process among torchrun's, or alone. Raises ConfigError if that cannot be."""
    if several:
        return connected(config)
    if launched() and int(os.environ["WORLD_SIZE"]) > 1:
        what, hint = "order sequential", ""
        if config.order == "simultaneous":
            what = "parallel none"
            same = "with sync_batch_norm and global_contrast it trains what one process does"
            hint = f": give parallel pipeline, or data ({same})"
        raise ConfigError(f"{what}: expected one process, torchrun started {os.environ['WORLD_SIZE']}{hint}")
    return contextlib.nullcontext(Processes(Layout.alone(config)))


@contextlib.contextmanager
def connected(config: TrainConfig) -> Iterator[Processes]:
    """Join the other processes for as long as the context lasts.

    An exception inside is told to the others, and leaves as a ProcessFailure that names this process and the
    cause. Where another process failed first, this one ends without a word (SystemExit).
    """
    if not launched():
        command = f"torchrun --nproc-per-node N -m infopro_fast train --parallel {config.parallel} ..."
        raise ConfigError(f"parallel {config.parallel}: start it with {command}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = place_of(config, rank, size)
    gpu = torch.device(config.device).type == "cuda"
    if gpu:
        torch.cuda.set_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=_store(rank), rank=rank, world_size=size, timeout=TIMEOUT)
    processes = Processes(place)
    if place.replicas > 1:  # every process makes every group
        groups: list[Any] = [dist.new_group(place.ranks_of_stage(stage)) for stage in range(place.stages)]
        processes.data_group = groups[place.stage]
    keeps, patience = rank == 0 and not _agent_keeps_store(), config.patience or PATIENCE
    watch = Watch(_store(), rank, size, place.title, processes.hint, patience, keeps_store=keeps)
    processes.watch = watch
    watch.start()
    with _sigterm_noted(watch), _told(processes, watch):
        yield processes
        with watch.waiting():
            dist.all_reduce(torch.zeros(1))  # no process leaves before all are done
    watch.close()
    dist.destroy_process_group()


@contextlib.contextmanager
def _sigterm_noted(watch: Watch) -> Iterator[None]:
    """Note SIGTERM instead of ending: torchrun sends it when a process died, whose cause must be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: object) -> None:
        watch.stops = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        if not watch.failed:  # a failure has still to be reported
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told(processes: Processes, watch: Watch) -> Iterator[None]:
    """Tell the other processes of an exception."""
    try:
        yield
    except Stopped:  # all processes stop at the same place
        watch.close()
        if not processes.layout.is_main:
            raise SystemExit(0) from None
        raise
    except KeyboardInterrupt:
        watch.fail("interrupted")
        raise
    except Exception as error:
        cause = str(error) if isinstance(error, UserError) else cause_of(error)
        message = watch.diagnose(error) if is_of_communication(error) else watch.fail(cause)
        if message is None:  # the process that failed first has reported it
            raise SystemExit(1) from error
        raise ProcessFailure(message) from error


def _store(rank: int | None = None) -> dist.Store:
    """Return a connection to the run's store, which torchrun's agent keeps, or else rank 0.

    Keys carry the number of restarts: an agent keeps its store over them, with the addresses of dead
    processes.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank == 0 and not _agent_keeps_store()
    timeout = datetime.timedelta(minutes=5)
    store = dist.TCPStore(address, port, is_master=keeps, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"infopro_fast/{restarts()}", store)
