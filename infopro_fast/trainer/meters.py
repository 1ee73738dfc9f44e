"""Metrics of many steps, read at once; and a run's times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from .step import Metrics, check_finite


class Meters:
    """Sums the metrics of `LocalTrainer.step` over an interval of steps, and over the epoch.

    Up to ``capacity`` steps stay on their device until `read`, so that nothing else waits for the device.
    Losses become means over images; counts of right answers ("..._correct", "correct") become "..._accuracy",
    "accuracy".
    combine: from names, rows and counts of this process to rows and counts of all, where several share the
    batches.
    """

    def __init__(self, capacity: int, combine: Callable | None = None):
        self._capacity, self._combine = capacity, combine
        self._names: list[str] = []
        self._rows: torch.Tensor | None = None  # (capacity, metrics) float64, filled to len(_counts)
        self._counts: list[int] = []
        self._interval: dict[str, float] = {}
        self._epoch: dict[str, float] = {}

    def add(self, metrics: Metrics, count: int) -> None:
        """Add one step's metrics, 0-d tensors, of ``count`` images."""
        values = torch.stack([value.double() for value in metrics.values()])
        if self._rows is None:
            self._names, self._rows = list(metrics), values.new_empty(self._capacity, len(values))
        self._rows[len(self._counts)] = values
        self._counts.append(count)

    def read(self, place: Callable[[int], str] = str) -> None:
        """Take in the steps since the last reading; waits for the device.

        place: the name of the step that is so many steps before the last one.
        Raises FloatingPointError naming module and loss of the first step with a metric that is not finite.
        """
        if self._rows is None:
            return
        values, counts = self._rows[: len(self._counts)], self._counts
        if self._combine is not None:
            values, counts = self._combine(self._names, values, counts)
        rows = values.tolist()
        for i, (row, count) in enumerate(zip(rows, counts)):
            if not all(map(math.isfinite, row)):
                self._fail(values[i], place(len(rows) - 1 - i))
            for sums in (self._interval, self._epoch):
                for name, total in _totals(self._names, row, count).items():
                    sums[name] = sums.get(name, 0) + total
        self._counts = []

    def last(self) -> dict[str, float]:
        """Return the means of the last step that was added, in this process alone; waits for the device."""
        if self._rows is None or not self._counts:
            return {}
        count = len(self._counts)
        return _means(_totals(self._names, self._rows[count - 1].tolist(), self._counts[-1]))

    def _fail(self, row: torch.Tensor, where: str) -> None:
        try:
            check_finite(dict(zip(self._names, row)))
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}: {error}") from None

    def finish_interval(self) -> dict[str, float]:
        """Return means over the steps read since the last call."""
        means, self._interval = _means(self._interval), {}
        return means

    def finish_epoch(self) -> dict[str, float]:
        """Return means over the steps read since the last call."""
        means, self._epoch = _means(self._epoch), {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of what was read; call `read` first."""
        return {"interval": dict(self._interval), "epoch": dict(self._epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._interval, self._epoch = dict(state["interval"]), dict(state["epoch"])


def _totals(names: list[str], row: list[float], count: int) -> dict[str, float]:
    found = {n: value if n.endswith("correct") else value * count for n, value in zip(names, row)}
    return found | {"images": count}


def _means(sums: dict[str, float]) -> dict[str, float]:
    images = sums.get("images", 0)
    found = {name: value / images for name, value in sums.items() if name != "images"}
    return {name.replace("correct", "accuracy"): value for name, value in found.items()}


class Clock:
    """Times of a run: seconds, speed, time left, checkpoints due. seconds: those before this process."""

    def __init__(self, seconds: float, checkpoint_minutes: float, steps_left: int):
        self._before, self._start = seconds, time.monotonic()
        self._every, self._saved_at = 60 * checkpoint_minutes, self._start
        self.steps, self._steps_left = 0, steps_left  # steps: of this process
        self.new_epoch()

    def new_epoch(self) -> None:
        self._images, self._busy, self._mark = 0, 0.0, time.monotonic()

    def step(self, images: int) -> None:
        """Note that a step of ``images`` images has ended."""
        now = time.monotonic()
        self._busy, self._mark = self._busy + now - self._mark, now
        self._images += images
        self.steps, self._steps_left = self.steps + 1, self._steps_left - 1

    def saved(self) -> None:
        """Note that a checkpoint was written; its time is not part of the next step's."""
        self._saved_at = self._mark = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    @property
    def checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._every

    @property
    def images_per_second(self) -> float:
        """Speed of this epoch's training steps."""
        return self._images / self._busy if self._busy else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at this process's pace, evaluation included; None before the first step."""
        return (time.monotonic() - self._start) / self.steps * self._steps_left if self.steps else None
