"""Find which of a run's processes died or stands still, and why; report it once, and stop all.

Each process has a thread. Through torch.distributed's key-value store it tells the others that it is alive,
where it is and whether it waits for others; and it looks at theirs. A process that fails by an exception
reports it itself. Whoever knows of a failure first writes it into the store and prints it; the others end
without a word.

A process moves when it goes on to another place, reads an image, writes a piece of a checkpoint or gets a
message. One that has not moved for as long as its patience stands still. Single calls without steps inside
are given longer (`at`'s slow), such as opening a data set, or a GPU's first step with batches of a shape,
which compiles kernels.

Silence is counted in the watching thread's ticks, not in seconds: a machine that sleeps loses nobody. Time in
which a thread of the process wants a CPU and gets none does not count (Linux tells).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from infopro_fast import errors

from . import linux

TICK = 1.0  # seconds between two looks
SILENCE = 8  # ticks without a sign of life
SLOW = 30  # times the patience: the limit of calls without steps inside
PATIENCE = 20.0  # seconds; default
LEAVING = 30  # ticks in which a failed process must report and end
FAILURE, CLEAN = "failure", "clean"


class Unwatched:
    """Stands for `Watch` in a run that nobody watches."""

    waited, stops = 0.0, False

    def at(self, place: str, *, slow: bool = False, pulse: Callable[[], int] | None = None) -> None:
        """As `Watch.at`."""

    def moved(self) -> None:
        """As `Watch.moved`."""

    def waiting(self) -> contextlib.AbstractContextManager:
        """As `Watch.waiting`."""
        return contextlib.nullcontext()

    @property
    def stop_asked(self) -> bool:
        """As `Watch.stop_asked`."""
        return self.stops


class _Place(NamedTuple):
    """Where a process is. limit: ticks that it may be there without a move."""

    name: str
    limit: int
    pulse: Callable[[], int] | None = None


class Watch:
    """The watching thread, and the place that this process is at. A lone process watches itself.

    store: a connection to the run's store that nothing else uses. rank, size: this process, and how many
    there are.
    title: names this process in messages, e.g. "rank 1 (module 3 of 4)". hint: how to continue; ends each
    message.
    patience: seconds that a process may be without a move. keeps_store: whether the store ends with this
    process.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, title: str, hint: Callable[[], str], patience: float,
        *, keeps_store: bool = False,
    ):
        self.store, self.rank, self.size, self.title, self.hint = store, rank, size, title, hint
        self.patience = max(1, round(patience / TICK))
        self._place, self._moves = _Place("at the start", self.patience * SLOW), 0
        self._waits, self._here, self._seen, self._starved = False, 0, (0, 0), linux.Starved()
        self._looked_at = [other for other in range(size) if other != rank] or [rank]
        self.waited = 0.0  # seconds
        self.keeps_store = keeps_store
        self.stops = False  # this process was asked to stop by a signal
        self._closing = threading.Event()
        self._speaking = threading.Lock()  # held from a look at the store until its consequence is reported
        self._failure: str | None = None  # the main thread's, which reports it when it has left
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._beats: dict[int, dict[str, Any]] = {}
        self._silent = dict.fromkeys(range(size), 0)

    @property
    def stop_asked(self) -> bool:
        """Whether this process or another one was asked to stop."""
        return self.stops or any(beat["stops"] for beat in self._beats.values())

    @property
    def failed(self) -> bool:
        """Whether this process has a failure to report, and was the first."""
        return self._failure is not None

    def start(self) -> None:
        """Begin, and wait for each process's first sign of life: one that dies before its second is found."""
        self._tell(0)
        with contextlib.suppress(RuntimeError):  # a process that is not there in time counts as silent
            keys = [f"beat/{rank}" for rank in range(self.size)]
            self.store.wait(keys, datetime.timedelta(seconds=SILENCE * TICK))
            self._beats = {rank: json.loads(self.store.get(f"beat/{rank}")) for rank in self._looked_at}
        self._thread.start()

    def at(self, place: str, *, slow: bool = False, pulse: Callable[[], int] | None = None) -> None:
        """Go on to ``place``, where this process may stay for its patience without a move; ``slow``: longer.

        pulse: returns a number that changes when the work there moves, also in another process; the thread
        calls it.
        """
        self._moves += 1  # first: whoever sees this place knows that it is new
        self._place = _Place(place, self.patience * (SLOW if slow else 1), pulse)

    def moved(self) -> None:
        """Say that the work at this place moves."""
        self._moves += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside this context never counts as a stall: this process waits for others."""
        self._waits, start = True, time.monotonic()
        try:
            yield
        finally:
            self._moves += 1  # first: whoever sees that it does not wait knows that it moved
            self._waits = False
            self.waited += time.monotonic() - start

    def close(self) -> None:
        """Stop watching: the run ends well."""
        self._closing.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{CLEAN}/{self.rank}", "1")
        if self._thread.is_alive():
            self._thread.join(5 * TICK)

    def fail(self, cause: str) -> str | None:
        """Tell the others of a failure; return the message to print, or None if another one was first."""
        with self._speaking:  # if the thread knows of another failure, it ends this process before it lets go
            message = self._failure = self._claim(f"{self.title}, {self._place.name}: {cause}")
        if self.keeps_store:
            time.sleep(3 * TICK)  # for the others to read it
        return message

    def diagnose(self, error: BaseException, ticks: int = SILENCE + 4) -> str | None:
        """As `fail`, for an ``error`` in talking to others; gives the thread time to find who is to blame."""
        time.sleep(ticks * TICK)  # the thread ends this process when it has found it
        return self.fail(_first_line(error))

    # ----------------------------------------------------------------------------------------------------
    # The thread

    def _run(self) -> None:
        tick = 0
        while not self._closing.wait(TICK):
            tick += 1
            with self._speaking:
                if self._failure is not None:
                    break
                try:
                    message = self.look(tick)
                except RuntimeError as error:  # the store's keeper is gone: a process or the launcher
                    if self._closing.is_set():
                        return
                    message = self._without_store(error)
                if message is not None:
                    end_process(message)
        if not self._closing.wait(LEAVING * TICK):
            end_process(self._failure)

    def _without_store(self, error: RuntimeError) -> str:
        """Return what to report when the store is gone: usually its keeper, rank 0, was killed."""
        for _ in range(8):
            for rank, beat in self._beats.items():
                if rank != self.rank and self._cause(beat, 0) is not None:
                    cause = self._cause(beat, 0)
                    return f"{beat['title']}, {beat['place']}: {cause}; all processes stop; {self.hint()}"
            time.sleep(TICK / 4)
        return f"{self.title}: lost the other processes ({_first_line(error)}); {self.hint()}"

    def _tell(self, tick: int) -> None:
        place, waits = self._place, self._waits  # before the moves, which are counted before these change
        seen = self._moves, 0 if place.pulse is None else place.pulse()
        starved = self._starved()
        self._here = self._here + (not starved) if seen == self._seen else 0
        self._seen = seen
        beat = {
            "tick": tick, "title": self.title, "place": place.name, "here": self._here, "limit": place.limit,
            "waits": waits, "stops": self.stops, "pid": os.getpid(), "host": socket.gethostname(),
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def look(self, tick: int) -> str | None:
        """Tell of this process, look at the others; return what to print before ending, "", or None."""
        self._tell(tick)
        if self.store.check([FAILURE]):
            return ""
        for rank in self._looked_at:
            if not self.store.check([f"beat/{rank}"]) or self.store.check([f"{CLEAN}/{rank}"]):
                continue
            beat = json.loads(self.store.get(f"beat/{rank}"))
            before = self._beats.get(rank, {}).get("tick")
            self._silent[rank] = self._silent[rank] + 1 if beat["tick"] == before else 0
            self._beats[rank] = beat
            cause = self._cause(beat, self._silent[rank])
            if cause is not None and not self.store.check([f"{CLEAN}/{rank}"]):
                return self._claim(f"{beat['title']}, {beat['place']}: {cause}") or ""
        return None

    def _cause(self, beat: dict[str, Any], silent: int) -> str | None:
        state = linux.process_state(beat["pid"]) if beat["host"] == socket.gethostname() else None
        if state == "gone":
            return f"killed (process {beat['pid']} is gone)"
        if silent >= SILENCE:
            stopped = state == "stopped"
            if stopped:
                return f"stalled (process {beat['pid']} is stopped)"
            return f"no sign of life for {SILENCE} s: killed or stalled"
        if not beat["waits"] and beat["here"] >= beat["limit"]:
            return f"stalled (no progress for {beat['here'] * TICK:.0f} s)"
        return None

    def _claim(self, what: str) -> str | None:
        message = f"{what}; {'all processes stop' if self.size > 1 else 'it stops'}; {self.hint()}"
        try:
            first = self.store.add(f"{FAILURE}/claims", 1) == 1
            if first:
                self.store.set(FAILURE, message)
        except RuntimeError:
            return message  # nobody is left to tell
        return message if first else None


@contextlib.contextmanager
def alone(patience: float | None, run: Path) -> Iterator[Watch | Unwatched]:
    """Watch a run of one process, and end the interpreter where it stands still.

    patience: seconds without a move; None: do not watch.
    """
    if patience is None:
        yield Unwatched()
        return
    watch = Watch(dist.HashStore(), 0, 1, "this process", lambda: f"continue with --resume {run}", patience)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()


def end_process(message: str | None) -> None:
    """Leave at once, also from a collective that never ends in the main thread, and end the image readers."""
    if message:
        print(f"infopro-fast: error: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {line}"


def is_of_communication(error: BaseException) -> bool:
    """Whether an exception means that another process could not be reached, not that this one failed."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error).lower()
    known = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "socket")
    return isinstance(error, RuntimeError) and any(word in text for word in known)


def cause_of(error: BaseException) -> str:
    """Return an exception as one line; running out of memory is named so."""
    return errors.text(error) if errors.is_out_of_memory(error) else _first_line(error)
