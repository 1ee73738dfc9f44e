"""Time, memory and the host's share of a call on one device, and the seconds that are left to measure them in."""

from __future__ import annotations

import gc
import statistics
import time
import typing

import torch

from benchmarks import floors, timing

Call = typing.Callable[[], object]


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, of_it: float) -> Budget:
        return Budget(of_it * self.left())


class Meter:
    """Time and memory of calls on one device, "cuda" or "cpu"."""

    def __init__(self, device: str):
        self.device = device
        self.gpu = device == "cuda"
        self.floor = floors.find(torch.cuda.get_device_name()) if self.gpu else None

    def seconds(self, call: Call) -> float:
        if not self.gpu:
            return timing.seconds(call)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, calls: dict[str, Call], budget: float) -> dict[str, float]:
        """All calls in turn, round after round. (They are warm: `attempt` ran them.)"""
        once = sum(self.seconds(call) for call in calls.values())
        taken = {name: [] for name in calls}
        for _ in range(max(5, min(50, int(budget / max(once, 1e-6))))):
            for name, call in calls.items():
                taken[name].append(self.seconds(call))
        return {name: statistics.median(values) for name, values in taken.items()}

    def host_seconds(self, call: Call, seconds: float) -> float | None:
        """Until a call returns, on average of several that wait for nothing; seconds: what the device takes. None where the host computes.

        At most 20 calls between two waits: the queue of launches has room for a thousand, and a call that finds it full would wait.
        """
        if not self.gpu:
            return None
        calls, found = max(1, min(20, int(0.05 / seconds))), []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return statistics.median(found)

    def held(self) -> int:
        """Bytes of all tensors that are alive."""
        if not self.gpu:
            return 0
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self, call: Call) -> int | None:
        """Bytes above those held before, at most, while the call runs. (A CUDA graph's are seen when it is captured, not when it runs.)"""
        if not self.gpu:
            call()
            return None
        before = self.held()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def attempt(self, call: Call, times: int = 3) -> str:
        """"" if the call runs, else why it does not."""
        try:
            for _ in range(times):
                call()
            if self.gpu:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # a method that fails is a result, not the end of the report
            return reason(error)
        return ""

    def free(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
