"""Fair ratios: all methods are warmed up, then take turns round after round; the median of each counts."""

from __future__ import annotations

import gc
import statistics
import time
import typing

Call = typing.Callable[[], object]
Name = typing.TypeVar("Name")


def seconds(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleaved(calls: dict[Name, Call], rounds=15, warm_up=2, budget=60.0) -> dict[Name, float]:
    """Return the median seconds of each call. budget: seconds for all rounds, of which at least five run."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    once = sum(seconds(call) for call in calls.values())
    rounds = max(5, min(rounds, int(budget / once)))
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(seconds(call))
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in taken.items()}
