"""Many runs, some at a time, each in its own process. Finished runs are skipped, stopped runs continue."""

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
    """Return the arguments of `infopro-fast train` for these settings: those that are not the defaults."""
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
    """Return the words of a value; nested tuples (cuts are pairs) are flattened."""
    return [word for v in value for word in _words(v)] if isinstance(value, tuple) else [str(value)]


def finished(job: Job) -> bool:
    """Return whether the job's folder holds this run, trained to its end. Another run: StudyError."""
    if not (job.folder / run_folder.CONFIG).is_file():
        return False
    there = run_folder.read_config(job.folder)
    different = same_run(job.config, there)
    if different:
        values = ", ".join(f"{name} {getattr(there, name)}" for name in different)
        advice = "give another folder as out, or delete it"
        raise StudyError(f"{job.folder} holds a run with other settings ({values}): {advice}")
    epochs = tested_epochs(job)
    trained = bool(epochs) and epochs[-1]["epoch"] == there.epochs
    return trained and (job.folder / run_folder.WEIGHTS).is_file()


def tested_epochs(job: Job) -> list[dict[str, Any]]:
    """Return the records of the epochs with a test: all, in sequential training the last module's."""
    return [epoch for epoch in run_folder.read_metrics(job.folder, "epoch") if epoch["test"] is not None]


def run_all(jobs: Sequence[Job], at_a_time: int) -> None:
    """Train the unfinished jobs in order. Raises StudyError naming failed runs, after the others are done.

    A signal stops each running job after a checkpoint; the same call continues from there.
    """
    waiting = [job for job in jobs if not finished(job)]
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    with progress(len(jobs), len(jobs) - len(waiting)) as shown, _stopping(running):
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                running[_start(job)] = job
            time.sleep(POLL_SECONDS)
            for process, job in list(running.items()):
                if process.poll() is None:
                    shown.update(job)
                    continue
                del running[process]
                ended_well = process.returncode == 0 and finished(job)
                failed += [] if ended_well else [job]
                shown.end(job, ended_well)
    if failed:
        lines = "; ".join(f"{job.folder.name}: {_last_line(_log(job))}" for job in failed)
        count = f"{len(failed)} of {len(jobs)} runs failed"
        raise StudyError(f"{count} (their output is beside them, .log): {lines}")


def _start(job: Job) -> subprocess.Popen:
    """Begin or continue a run. Its output goes to a file beside its folder."""
    remove_unbegun(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    begun = (job.folder / run_folder.CONFIG).is_file()
    arguments = ["--resume", str(job.folder)] if begun else flags(job.config)
    command = [sys.executable, "-m", "infopro_fast", "train", *arguments]
    with open(_log(job), "ab") as log:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **streams, env={**KEEPING, **os.environ}, start_new_session=True)


def remove_unbegun(folder: Path) -> None:
    """Remove a run that was killed before its first checkpoint and its first trained module: it cannot
    continue.

    Half-written folders have other names, so they do not count.
    """
    checkpoints, trained = folder / run_folder.CHECKPOINTS, folder / sequential.TRAINED
    places = (checkpoints, *checkpoints.glob("module*"))
    begun = any(checkpoint.list_checkpoints(place) for place in places)
    if (folder / run_folder.CONFIG).is_file() and not begun and not any(trained.glob("module*")):
        shutil.rmtree(folder)


def _log(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".log")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


@contextlib.contextmanager
def _stopping(running: dict[subprocess.Popen, Job]) -> Iterator[None]:
    """At the end, ask each running job to stop after a checkpoint, and wait for it: no process is left."""

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


def status(job: Job) -> str:
    """Return how far a run is, in a line."""
    epochs = run_folder.read_metrics(job.folder, "epoch")
    if not epochs:
        return "begun"
    last = epochs[-1]
    of_module = f"module {last['module']}/{job.config.modules}, " if job.config.order == "sequential" else ""
    tested = "" if last["test"] is None else f", test accuracy {100 * last['test']['accuracy']:.2f} %"
    return f"{of_module}epoch {last['epoch']}/{job.config.epochs}{tested}"


class Lines:
    """Progress where the output is no terminal: a line for each finished run."""

    def __init__(self, total: int, done: int):
        self.total, self.done = total, done
        if done:
            print(f"{done} of {total} runs are there already", flush=True)

    def update(self, job: Job) -> None:
        pass

    def end(self, job: Job, well: bool) -> None:
        self.done += 1
        result = status(job) if well else "failed: " + _last_line(_log(job))
        print(f"{self.done}/{self.total}  {job.folder.name}: {result}", flush=True)


class Bars(Lines):
    """Progress in a terminal: a bar over all runs, and one for each running job."""

    def __init__(self, total: int, done: int, bars: Any):
        self.bars, self.total, self.done = bars, total, done
        self.lines: dict[Job, Any] = {}
        self.all = bars.add_task("runs", total=total, completed=done, status="")

    def update(self, job: Job) -> None:
        if job not in self.lines:
            turns = job.config.modules if job.config.order == "sequential" else 1
            total = turns * job.config.resolved().epochs
            self.lines[job] = self.bars.add_task(job.folder.name, total=total, status="")
        epochs = run_folder.read_metrics(job.folder, "epoch")
        self.bars.update(self.lines[job], completed=len(epochs), status=status(job))

    def end(self, job: Job, well: bool) -> None:
        if job in self.lines:
            self.bars.remove_task(self.lines.pop(job))
        self.bars.advance(self.all)
        text = f"{job.folder.name}: {status(job) if well else 'failed'}"
        self.bars.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def progress(total: int, done: int) -> Iterator[Lines]:
    """Show the progress of ``total`` runs, of which ``done`` are finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        yield Lines(total, done)
        return
    name, now = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), now)
    with Progress(*columns, console=console) as bars:
        yield Bars(total, done, bars)
