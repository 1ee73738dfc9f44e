"""The display of a run in training: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .evaluation import headline

PLAIN_SECONDS = 30.0  # between two plain lines inside an epoch


@dataclass
class Status:
    """Where a run stands. train: mean metrics of the last steps read; test: of the last evaluation."""

    title: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    lr: float = 0.0
    train: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] | None = None
    best: float | None = None
    images_per_second: float = 0.0
    peak_bytes: int = 0
    seconds_left: float | None = None


def peak_memory(device: torch.device) -> int:
    """Return peak bytes: the process's resident memory on the CPU, torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def losses_by_module(train: dict[str, float]) -> tuple[list[str], dict[int, dict[str, float]]]:
    """Return the names of the local losses, and each local module's values."""
    names: list[str] = []
    modules: dict[int, dict[str, float]] = {}
    for key, value in train.items():
        module, _, name = key.partition("/")
        if name:
            modules.setdefault(int(module.removeprefix("module")), {})[name] = value
            if name not in names:
                names.append(name)
    return names, modules


class PlainDisplay:
    """Prints a line of the first step, one an epoch, one every 30 seconds inside one, and messages."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stdout
        self._last = -PLAIN_SECONDS  # so that the first step has a line

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def update(self, status: Status) -> None:
        if time.monotonic() - self._last > PLAIN_SECONDS:
            self._line(status, f"epoch {status.epoch}/{status.epochs} batch {status.batch}/{status.batches}")

    def epoch(self, status: Status) -> None:
        self._line(status, f"epoch {status.epoch}/{status.epochs}")

    def _line(self, status: Status, where: str) -> None:
        self._last = time.monotonic()
        local = {name.replace("module", "m"): value for name, value in status.train.items() if "/" in name}
        losses = "  ".join(f"{name} {value:.4f}" for name, value in local.items())
        name, value = headline(status.test) if status.test else ("", 0.0)
        test = f"  test {name} {100 * value:.2f}%" if name else ""
        train = ""
        if "loss" in status.train:
            train = f"  loss {status.train['loss']:.4f}  train accuracy {100 * status.train['accuracy']:.2f}%"
        self.message(
            f"{where}{train}{test}  {losses}  {status.images_per_second:.0f} images/s  "
            f"peak {status.peak_bytes / 2**20:.0f} MiB  left {duration(status.seconds_left)}"
        )


class Silent(PlainDisplay):
    """Stands for `PlainDisplay` in a process that prints nothing."""

    def message(self, text: str) -> None:
        pass


class LiveDisplay:
    """A table, redrawn in place: each module's losses, accuracy, speed, memory and time left."""

    def __init__(self, console: Console):
        self._status: Status | None = None
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def update(self, status: Status) -> None:
        self._status = status  # which the next redrawing shows

    epoch = update

    def _render(self) -> Group | str:
        return render(self._status) if self._status else ""


def render(status: Status) -> Group:
    """Return the live table as a rich renderable."""
    names, modules = losses_by_module(status.train)
    table = Table(title=status.title, title_justify="left")
    table.add_column("module")
    for name in [*names, "cross entropy", "accuracy"]:
        table.add_column(name.replace("_", " "), justify="right")
    for k, values in modules.items():
        table.add_row(f"{k}", *(_number(name, values.get(name)) for name in names), "", "")
    accuracy = f"{100 * status.train.get('accuracy', 0):.2f} %"
    loss = _number("", status.train.get("loss"))
    table.add_row("last" if modules else "whole", *("" for _ in names), loss, accuracy)
    if status.test:
        loss, test = _number("", status.test["loss"]), f"{100 * headline(status.test)[1]:.2f} %"
        table.add_row("test", *("" for _ in names), loss, test, style="bold green")
    done = (status.epoch - 1) * status.batches + status.batch
    facts = [
        f"epoch {status.epoch}/{status.epochs}, batch {status.batch}/{status.batches}",
        f"{status.images_per_second:.0f} images/s",
        f"peak {status.peak_bytes / 2**20:.0f} MiB",
        f"rate {status.lr:.4g}",
        f"left {duration(status.seconds_left)}",
    ]
    if status.best is not None:
        facts.append(f"best test {100 * status.best:.2f} %")
    bar = ProgressBar(total=status.epochs * status.batches, completed=done, width=60)
    return Group(table, Padding(bar, 0), Text("  ".join(facts)))  # the padding ends the bar's line


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4f}"


def choose() -> PlainDisplay | LiveDisplay:
    """Return the live display in a terminal, the plain one elsewhere."""
    console = Console()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()
