"""Who of a run's processes has died or stands still, and why: found within seconds, said once, and then all of them stop.

Every process has a thread that tells the others, through torch.distributed's key-value store, that it is alive, where it is and
whether it waits for others; and that looks at theirs. A process that fails by an exception says so itself. Whoever is first to know
of a failure writes it into the store and prints it; the others end without a word of their own.

A process that is alive may stand still all the same. It moves when it goes to another place, and at some places by less: an image
that is read, a piece of a checkpoint that is on the disk, a message that has come. So slow work moves, and what has not moved for as
long as the patience is stands still. Only what is one call without an inside is given longer (`at`'s slow): opening a data set,
building a network, reading a checkpoint, a GPU's first step with batches of a shape, which compiles kernels, and drawing the learning
curve.

Silence is counted in the ticks of one's own thread, not in seconds of a clock: a machine that sleeps loses nobody. Nor does one that is
busy with others: while a thread of the process could run and is not let, its time without a move stands still (Linux says so).
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

import torch
import torch.distributed as dist

TICK = 1.0  # seconds between two looks
SILENCE = 8  # ticks without a sign of life
SLOW = 30  # times the patience that calls without an inside are given
PATIENCE = 20.0  # seconds, where none is given
LEAVING = 30  # ticks that a process that failed has to say so and end
FAILURE, CLEAN = "failure", "clean"


class Unwatched:
    """In the place of a `Watch`, in a run that nobody looks at."""

    waited, stops = 0.0, False

    def at(self, place: str, *, slow: bool = False, pulse: Callable[[], int] | None = None) -> None:
        """As `Watch.at`."""

    def moved(self) -> None:
        """As `Watch.moved`."""

    def waiting(self) -> contextlib.AbstractContextManager:
        """As `Watch.waiting`."""
        return contextlib.nullcontext()


class _Place(NamedTuple):
    """Where a process is; limit: ticks without a move that it may have there."""

    name: str
    limit: int
    pulse: Callable[[], int] | None = None


class Watch:
    """The thread, and the place that this process is at.

    store: a connection of its own to the run's store. rank, size: of this process. title: what this process is, in a message, e.g.
    "rank 1 (module 3 of 4)"; hint: how to continue, said at the end of every message.
    patience: seconds that a process may be without a move. keeps_store: whether the store goes with this process.
    A process that is alone looks at itself.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, title: str, hint: Callable[[], str], patience: float, *, keeps_store: bool = False
    ):
        self.store, self.rank, self.size, self.title, self.hint = store, rank, size, title, hint
        self.patience = max(1, round(patience / TICK))
        self._place, self._moves = _Place("at the start", self.patience * SLOW), 0
        self._waits, self._here, self._seen, self._starved = False, 0, (0, 0), _Starved()
        self._looked_at = [other for other in range(size) if other != rank] or [rank]
        self.waited = 0.0  # seconds
        self.keeps_store = keeps_store
        self.stops = False  # this process was asked to stop by a signal
        self._closing = threading.Event()
        self._speaking = threading.Lock()  # held from a look at the store until what it means for this process is said
        self._failure: str | None = None  # of the main thread, which says it when it has left everything behind
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._beats: dict[int, dict[str, Any]] = {}
        self._silent = dict.fromkeys(range(size), 0)

    @property
    def stop_asked(self) -> bool:
        """Whether this process or another one was asked to stop."""
        return self.stops or any(beat["stops"] for beat in self._beats.values())

    @property
    def failed(self) -> bool:
        """Whether this process has a failure of its own to say, which no other process had before it."""
        return self._failure is not None

    def start(self) -> None:
        """Begin, with a first sign of life of every process at hand: one that dies before the second is known all the same."""
        self._tell(0)
        with contextlib.suppress(RuntimeError):  # whoever is not there within this time is found silent
            self.store.wait([f"beat/{rank}" for rank in range(self.size)], datetime.timedelta(seconds=SILENCE * TICK))
            self._beats = {rank: json.loads(self.store.get(f"beat/{rank}")) for rank in self._looked_at}
        self._thread.start()

    def at(self, place: str, *, slow: bool = False, pulse: Callable[[], int] | None = None) -> None:
        """This process goes on to ``place``, where it may be without a move as long as its patience is, or if ``slow`` much longer.

        pulse: a number that changes when the work there goes on, in another process too; the thread asks for it.
        """
        self._moves += 1  # first: who sees this place knows that it is a new one
        self._place = _Place(place, self.patience * (SLOW if slow else 1), pulse)

    def moved(self) -> None:
        """The work at this place goes on."""
        self._moves += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for others, and is not the one that stands still."""
        self._waits, start = True, time.monotonic()
        try:
            yield
        finally:
            self._moves += 1  # first: who sees that it does not wait knows that it has moved
            self._waits = False
            self.waited += time.monotonic() - start

    def close(self) -> None:
        """Stop looking; the run ends well."""
        self._closing.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{CLEAN}/{self.rank}", "1")
        if self._thread.is_alive():
            self._thread.join(5 * TICK)

    def fail(self, cause: str) -> str | None:
        """Make a failure known. Returns the message for people, or None if another failure was known before."""
        with self._speaking:  # where the thread knows of another failure, it ends this process before it lets go
            message = self._failure = self._claim(f"{self.title}, {self._place.name}: {cause}")
        if self.keeps_store:
            time.sleep(3 * TICK)  # the others read it there
        return message

    def diagnose(self, error: BaseException, ticks: int = SILENCE + 4) -> str | None:
        """As `fail`, of an ``error`` in talking to others: the thread is given time to find out which of them is to blame."""
        time.sleep(ticks * TICK)  # it ends this process when it has found it
        return self.fail(_first_line(error))

    # -----------------------------------------------------------------------------------------------------------------
    # The thread

    def _run(self) -> None:
        tick = 0
        while not self._closing.wait(TICK):
            tick += 1
            with self._speaking:
                if self._failure is not None:
                    break
                try:
                    self._tell(tick)
                    message = self._look(tick)
                except RuntimeError as error:  # whoever keeps the store is gone, and with it a process or the launcher
                    if self._closing.is_set():
                        return
                    message = self._without_store(error)
                if message is not None:
                    _end(message)
        if not self._closing.wait(LEAVING * TICK):
            _end(self._failure)

    def _without_store(self, error: RuntimeError) -> str:
        """What to say when it is gone: as a rule the process that kept it, rank 0, was killed."""
        for _ in range(8):
            for rank, beat in self._beats.items():
                if rank != self.rank and self._cause(beat, 0) is not None:
                    return f"{beat['title']}, {beat['place']}: {self._cause(beat, 0)}; all processes stop; {self.hint()}"
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
        }  # fmt: skip
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _look(self, tick: int) -> str | None:
        """What to print before ending, "" for nothing; None: all is well."""
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
        state = _process_state(beat["pid"]) if beat["host"] == socket.gethostname() else None
        if state == "gone":
            return f"killed (process {beat['pid']} is gone)"
        if silent >= SILENCE:
            stopped = state == "stopped"
            return f"stalled (process {beat['pid']} is stopped)" if stopped else f"no sign of life for {SILENCE} s: killed or stalled"
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
            return message  # nobody left to tell
        return message if first else None


class _Starved:
    """Called: whether another thread of this process has waited for a CPU for most of the time since the last call."""

    def __init__(self):
        self._before, self._at = _threads(), time.monotonic()

    def __call__(self) -> bool:
        threads, now = _threads(), time.monotonic()
        half = (now - self._at) / 2
        pairs = [(self._before[name], thread) for name, thread in threads.items() if name in self._before]
        # The system adds a wait up when it is over; one that goes on is that of a thread which wants to run and does not.
        starved = any(
            after.waited - before.waited > half or (before.wants and after.wants and after.ran - before.ran < half)
            for before, after in pairs
        )
        self._before, self._at = threads, now
        return starved


class _Thread(NamedTuple):
    """ran, waited: seconds on a CPU, and of waiting for one that are over. wants: it runs or waits to."""

    ran: float
    waited: float
    wants: bool


def _threads() -> dict[str, _Thread]:
    """The threads of this process but the one that asks; {} where the system does not tell of them."""
    found = {}
    with contextlib.suppress(OSError):
        for name in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
            with contextlib.suppress(OSError, ValueError), open(f"/proc/self/task/{name}/schedstat") as times:
                ran, waited, _ = map(int, times.read().split())
                found[name] = _Thread(ran / 1e9, waited / 1e9, _state(f"self/task/{name}") == "R")
    return found


@contextlib.contextmanager
def alone(patience: float | None, run: Path) -> Iterator[Watch | Unwatched]:
    """The watch of a run of one process, which looks at itself: where it stands still it is ended, and the interpreter with it.

    patience: seconds without a move; None: nobody looks.
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


def _process_state(pid: int) -> str | None:
    """Of a process of this machine: "gone" (also dead and not yet waited for), "stopped" or "there"."""
    try:
        state = _state(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return None
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "there")


def _state(process: str) -> str:
    """The letter of a process or thread in /proc: R where it runs or wants to."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _end(message: str | None) -> None:
    """Leave at once, even if the main thread waits in a collective for one that will not come, and take the readers of images along."""
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
    """Whether an exception says that another process could not be reached, rather than that this one failed."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error).lower()
    known = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "socket")
    return isinstance(error, RuntimeError) and any(word in text for word in known)


def cause_of(error: BaseException) -> str:
    """An exception in one line; running out of memory by that name."""
    text = str(error).lower()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text or "not enough memory" in text:
        return f"out of memory ({_first_line(error)})"
    return _first_line(error)
