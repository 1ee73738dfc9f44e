"""Many runs, some at a time, each in a process of its own; what is finished is not trained again, what was begun goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infopro_fast.errors import Stopped, StudyError
from infopro_fast.memory.resident import KEEPING
from infopro_fast.trainer import checkpoint, run_folder, sequential
from infopro_fast.trainer.settings.config import TrainConfig

from .tables import Job, same_run

POLL_SECONDS = 0.5


def flags(config: TrainConfig) -> list[str]:
    """What `infopro-fast train` has to be given for these settings: those that are not the defaults."""
    found: list[str] = []
    for field in dataclasses.fields(TrainConfig):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        default = field.default
        if value == default:
            continue
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, *_words(value)]
    return found


def _words(value: Any) -> list[str]:
    """Tuples word by word, those in them (cuts are pairs) too."""
    return [word for v in value for word in _words(v)] if isinstance(value, tuple) else [str(value)]


def finished(job: Job) -> bool:
    """Whether the job's folder holds this run, trained to its end. Raises StudyError if it holds another one."""
    if not (job.folder / run_folder.CONFIG).is_file():
        return False
    there = run_folder.read_config(job.folder)
    different = same_run(job.config, there)
    if different:
        values = ", ".join(f"{name} {getattr(there, name)}" for name in different)
        raise StudyError(f"{job.folder} holds a run with other settings ({values}): give another folder as out, or delete it")
    epochs = tested_epochs(job)
    return bool(epochs) and epochs[-1]["epoch"] == there.epochs and (job.folder / run_folder.WEIGHTS).is_file()


def tested_epochs(job: Job) -> list[dict[str, Any]]:
    """Records of the epochs after which the network was tested: all, or where modules are trained in turn those of the last."""
    return [epoch for epoch in run_folder.read_metrics(job.folder, "epoch") if epoch["test"] is not None]


def run_all(jobs: Sequence[Job], at_a_time: int) -> None:
    """Train what is not finished, in order. Raises StudyError naming the runs that failed, once the others are done.

    A signal stops all of them after a checkpoint each; the same call goes on from there.
    """
    waiting = [job for job in jobs if not finished(job)]
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    with _progress(len(jobs), len(jobs) - len(waiting)) as progress, _stopping(running):
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                running[_start(job)] = job
            time.sleep(POLL_SECONDS)
            for process, job in list(running.items()):
                if process.poll() is None:
                    progress.update(job)
                    continue
                del running[process]
                ended_well = process.returncode == 0 and finished(job)
                failed += [] if ended_well else [job]
                progress.end(job, ended_well)
    if failed:
        lines = "; ".join(f"{job.folder.name}: {_last_line(_log(job))}" for job in failed)
        raise StudyError(f"{len(failed)} of {len(jobs)} runs failed (their output is beside them, .log): {lines}")


def _start(job: Job) -> subprocess.Popen:
    """Begin or continue a run. Its output goes to a file beside its folder."""
    _remove_if_nothing_ran(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    begun = (job.folder / run_folder.CONFIG).is_file()
    command = [sys.executable, "-m", "infopro_fast", "train", *(["--resume", str(job.folder)] if begun else flags(job.config))]
    with open(_log(job), "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**KEEPING, **os.environ}, start_new_session=True
        )


def _remove_if_nothing_ran(folder: Path) -> None:
    """A run that was killed before its first checkpoint, and its first trained module, cannot be continued, and holds nothing."""
    checkpoints, trained = folder / run_folder.CHECKPOINTS, folder / sequential.TRAINED
    begun = any(checkpoint.list_checkpoints(place) for place in (checkpoints, *checkpoints.glob("module*")))
    if (folder / run_folder.CONFIG).is_file() and not begun and not any(trained.glob("module*")):  # what is half-written has other names
        shutil.rmtree(folder)


def _log(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".log")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


@contextlib.contextmanager
def _stopping(running: dict[subprocess.Popen, Job]) -> Iterator[None]:
    """However this ends, no run is left behind: each is asked to stop, which it does after a checkpoint, and waited for."""

    def stop(signum, frame):
        raise Stopped(signum, "the same command goes on from here")

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _status(job: Job) -> str:
    epochs = run_folder.read_metrics(job.folder, "epoch")
    if not epochs:
        return "begun"
    last = epochs[-1]
    of_module = f"module {last['module']}/{job.config.modules}, " if job.config.order == "sequential" else ""
    tested = "" if last["test"] is None else f", test accuracy {100 * last['test']['accuracy']:.2f} %"
    return f"{of_module}epoch {last['epoch']}/{job.config.epochs}{tested}"


class _Lines:
    """A line a finished run, where the output is no terminal."""

    def __init__(self, total: int, done: int):
        self.total, self.done = total, done
        if done:
            print(f"{done} of {total} runs are there already", flush=True)

    def update(self, job: Job) -> None:
        pass

    def end(self, job: Job, well: bool) -> None:
        self.done += 1
        print(f"{self.done}/{self.total}  {job.folder.name}: {_status(job) if well else 'failed: ' + _last_line(_log(job))}", flush=True)


class _Bars(_Lines):
    """In a terminal: a bar over all runs, and a line for each that is running."""

    def __init__(self, total: int, done: int, bars: Any):
        self.bars, self.total, self.done, self.lines = bars, total, done, {}
        self.all = bars.add_task("runs", total=total, completed=done, status="")

    def update(self, job: Job) -> None:
        if job not in self.lines:
            turns = job.config.modules if job.config.order == "sequential" else 1
            self.lines[job] = self.bars.add_task(job.folder.name, total=turns * job.config.resolved().epochs, status="")
        epochs = run_folder.read_metrics(job.folder, "epoch")
        self.bars.update(self.lines[job], completed=len(epochs), status=_status(job))

    def end(self, job: Job, well: bool) -> None:
        if job in self.lines:
            self.bars.remove_task(self.lines.pop(job))
        self.bars.advance(self.all)
        self.bars.console.print(f"{job.folder.name}: {_status(job) if well else 'failed'}", markup=False, highlight=False)


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[_Lines]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        yield _Lines(total, done)
        return
    status = TextColumn("{task.fields[status]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), status)
    with Progress(*columns, console=console) as bars:
        yield _Bars(total, done, bars)
