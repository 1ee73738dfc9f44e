"""What Linux tells about processes and threads, in /proc."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import NamedTuple


class Thread(NamedTuple):
    """ran, waited: seconds on a CPU, and of finished waits for one. wants: it runs, or waits to run."""

    ran: float
    waited: float
    wants: bool


class Starved:
    """Tells, when called, whether another thread waited for a CPU most of the time since the last call."""

    def __init__(self):
        self._before, self._at = threads(), time.monotonic()

    def __call__(self) -> bool:
        found, now = threads(), time.monotonic()
        half = (now - self._at) / 2
        pairs = [(self._before[name], thread) for name, thread in found.items() if name in self._before]
        # The system counts a wait when it ends. In one that goes on, the thread wants to run and does not.
        starved = any(
            after.waited - before.waited > half
            or (before.wants and after.wants and after.ran - before.ran < half)
            for before, after in pairs
        )
        self._before, self._at = found, now
        return starved


def threads() -> dict[str, Thread]:
    """Return the threads of this process except the calling one; {} where the system does not tell."""
    found = {}
    with contextlib.suppress(OSError):
        for name in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
            with contextlib.suppress(OSError, ValueError), open(f"/proc/self/task/{name}/schedstat") as times:
                ran, waited, _ = map(int, times.read().split())
                found[name] = Thread(ran / 1e9, waited / 1e9, _state(f"self/task/{name}") == "R")
    return found


def process_state(pid: int) -> str | None:
    """Return "gone" (also: dead, not yet waited for), "stopped" or "there" for a process of this machine."""
    try:
        state = _state(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return None
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "there")


def _state(process: str) -> str:
    """Return the state's letter of a process or thread in /proc: R where it runs or wants to."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
