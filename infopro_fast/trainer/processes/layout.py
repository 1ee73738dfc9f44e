"""The processes of a run that torchrun started, and what each of them does.

torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts the processes; torch.distributed
connects them: gloo for tensors on the CPU, NCCL for those on GPUs. With S processes a replica, rank r trains the modules of stage
r mod S in replica r // S: data parallelism is S = 1, a pipeline S = the number of processes, and what is between is both.
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

import torch
import torch.distributed as dist

from infopro_fast.errors import ConfigError, ProcessFailure

from ..settings.config import TrainConfig
from .watch import PATIENCE, Unwatched, Watch, cause_of, is_of_communication

PREFIX = "infopro_fast"


def launched() -> bool:
    """Whether torchrun started this process, or something that sets the same variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_alone(config: TrainConfig) -> None:
    """Raises ConfigError if torchrun started several processes of a run that is of one."""
    if launched() and int(os.environ["WORLD_SIZE"]) > 1:
        what, hint = "order sequential", ""
        if config.order == "simultaneous":
            what = "parallel none"
            hint = ": give parallel pipeline, or data (with sync_batch_norm and global_contrast it trains what one process does)"
        raise ConfigError(f"{what}: expected one process, torchrun started {os.environ['WORLD_SIZE']}{hint}")


def agent_keeps_store() -> bool:
    """Whether the key-value store of the run outlives its processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """How many times torchrun has started the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which modules this process trains (`modules`, from 0) on which part of every batch. spans: of every stage."""

    rank: int
    size: int
    spans: tuple[range, ...]

    @property
    def stages(self) -> int:
        return len(self.spans)

    @property
    def stage(self) -> int:
        return self.rank % self.stages

    @property
    def replica(self) -> int:
        return self.rank // self.stages

    @property
    def replicas(self) -> int:
        return self.size // self.stages

    @property
    def modules(self) -> range:
        return self.spans[self.stage]

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder: the last stage, which has the network's own loss, of the first replica."""
        return self.replica == 0 and self.stage == self.stages - 1

    @property
    def main(self) -> int:
        return self.stages - 1

    def ranks_of_stage(self, stage: int) -> list[int]:
        return [replica * self.stages + stage for replica in range(self.replicas)]

    @property
    def title(self) -> str:
        return f"rank {self.rank}" if self.stages == 1 else f"rank {self.rank} ({self.name} of {self.spans[-1].stop})"

    @property
    def name(self) -> str:
        first, last = self.modules.start + 1, self.modules.stop
        return f"module {last}" if first == last else f"modules {first}-{last}"


def layout(config: TrainConfig, rank: int, size: int) -> Layout:
    """Who does what. Raises ConfigError where the processes do not fit the modules, or a batch."""
    K = config.number_of_modules()
    counts = config.pipeline_modules if config.parallel == "pipeline" else (K,)
    if counts is None:
        if size > K:
            raise ConfigError(
                f"parallel pipeline: {size} processes for {K} modules: start {K} at most, or say with pipeline_modules how many modules "
                "each process trains, and a multiple of these processes shares the batch"
            )
        counts = tuple(K * (i + 1) // size - K * i // size for i in range(size))
    if sum(counts) != K:
        raise ConfigError(f"pipeline_modules {counts}: expected {K} modules in all, got {sum(counts)}")
    if size % len(counts):
        raise ConfigError(f"pipeline_modules {counts}: expected a multiple of {len(counts)} processes, got {size}")
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return Layout(rank, size, tuple(range(end - count, end) for count, end in zip(counts, ends)))


class Processes:
    """This process among the others. data_group: those that train the same modules, None if there is no other."""

    watch: Watch | Unwatched = Unwatched()

    def __init__(self, layout: Layout, data_group: dist.ProcessGroup | None = None):
        self.layout, self.data_group = layout, data_group
        self.run: Path | None = None

    def share(self, value: object, source: int) -> object:
        """The object that the process ``source`` has; small ones only."""
        if self.layout.size == 1:
            return value
        box = [value]
        with self.watch.waiting():
            dist.broadcast_object_list(box, source, device=torch.device("cpu"))
        return box[0]

    def hint(self) -> str:
        return "no run was begun" if self.run is None else f"continue with --resume {self.run}"


def joined(config: TrainConfig, several: bool) -> contextlib.AbstractContextManager[Processes]:
    """This process among those that take part in the run: torchrun's, or itself alone. Raises ConfigError where these do not fit."""
    if several:
        return connected(config)
    check_alone(config)
    return contextlib.nullcontext(Processes(Layout(0, 1, (range(config.number_of_modules()),))))


@contextlib.contextmanager
def connected(config: TrainConfig) -> Iterator[Processes]:
    """Join the other processes for as long as the context lasts.

    An exception inside is told to the others, and leaves as a ProcessFailure that names this process and the cause; where another
    process has failed before, this one ends without a word (SystemExit). Raises ConfigError where torchrun did not start it.
    """
    if not launched():
        raise ConfigError(
            f"parallel {config.parallel}: start it with torchrun --nproc-per-node N -m infopro_fast train --parallel {config.parallel} ..."
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = layout(config, rank, size)
    gpu = torch.device(config.device).type == "cuda"
    if gpu:
        torch.cuda.set_device(config.device)
    # Everyone waits long enough for the watch, which knows more, to speak first.
    long = datetime.timedelta(minutes=30)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=_store(rank), rank=rank, world_size=size, timeout=long)
    groups = [dist.new_group(place.ranks_of_stage(stage)) for stage in range(place.stages)] if place.replicas > 1 else None
    processes = Processes(place, groups[place.stage] if groups else None)
    keeps = rank == 0 and not agent_keeps_store()
    processes.watch = Watch(_store(), rank, size, place.title, processes.hint, config.patience or PATIENCE, keeps_store=keeps)
    processes.watch.start()
    with _sigterm_noted(processes.watch), _told(processes):
        yield processes
        with processes.watch.waiting():
            dist.all_reduce(torch.zeros(1))  # nobody leaves before all are through
    processes.watch.close()
    dist.destroy_process_group()


@contextlib.contextmanager
def _sigterm_noted(watch: Watch) -> Iterator[None]:
    """torchrun sends SIGTERM to what is left of a run when one of its processes has died: there has to be time to say why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: object) -> None:
        watch.stops = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        if not watch.failed:  # then it has still to be said
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told(processes: Processes) -> Iterator[None]:
    from infopro_fast.errors import Stopped

    watch = processes.watch
    try:
        yield
    except Stopped:  # every process stops at the same place
        watch.close()
        if not processes.layout.is_main:
            raise SystemExit(0) from None
        raise
    except KeyboardInterrupt:
        watch.fail("interrupted")
        raise
    except Exception as error:
        expected = isinstance(error, _for_people())
        cause = str(error) if expected else cause_of(error)
        message = watch.diagnose(error) if is_of_communication(error) else watch.fail(cause)
        if message is None:  # it was said by the process that failed first
            raise SystemExit(1) from error
        raise ProcessFailure(message) from error


def _for_people() -> tuple[type[Exception], ...]:
    from infopro_fast.errors import CheckpointError, DataError, NonFiniteError, RunError

    return ConfigError, DataError, CheckpointError, NonFiniteError, RunError, ProcessFailure


def _store(rank: int | None = None) -> dist.Store:
    """The run's store, which torchrun's agent keeps or else rank 0; a connection of its own, of the keys of this life of the processes.

    (An agent keeps its store when it starts the processes again; without a name of their own they would find the addresses of the dead.)
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank == 0 and not agent_keeps_store()
    store = dist.TCPStore(address, port, is_master=keeps, wait_for_workers=False, timeout=datetime.timedelta(minutes=5))
    return dist.PrefixStore(f"{PREFIX}/{restarts()}", store)


def may_restart() -> bool:
    """Whether torchrun would start the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def local_rank() -> int:
    """Of the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_device(device: str) -> str:
    """The GPU of this process, where a run is on GPUs."""
    return f"cuda:{local_rank()}" if torch.device(device).type == "cuda" else device
