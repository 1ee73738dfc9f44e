"""Stop a run at a good place, after a checkpoint, when a signal arrives."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infopro_fast.errors import Stopped

ASKING = (signal.SIGINT, signal.SIGTERM)  # the second one interrupts at once
WARNING = (signal.SIGHUP, signal.SIGUSR1)  # a lost connection, and schedulers: unless ignored, as nohup does
GRACE = 10.0  # seconds after a signal in which a step may end


class StopRequest:
    """Notes a signal (``signum``) of ASKING or WARNING for the loop.

    Outside the main thread, where Python allows no handlers, signals act as before.
    """

    def __init__(self, run: Path):
        self.run = run
        self.signum: int | None = None
        self._since = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (*ASKING, *WARNING):
                if signum in ASKING or signal.getsignal(signum) != signal.SIG_IGN:
                    self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if signum in ASKING and self.signum in ASKING:
            raise KeyboardInterrupt
        if self.signum is None:
            self._since = time.monotonic()
        if self.signum is None or signum in ASKING:
            self.signum = signum

    @property
    def overdue(self) -> bool:
        """Whether a signal came so long ago that whoever sent it may not wait for the step's end."""
        return self.signum is not None and time.monotonic() - self._since > GRACE

    def now(self, otherwise: int | None = None) -> None:
        """Stop training here, after the checkpoint. otherwise: the signal, where another process got it."""
        raise Stopped(self.signum or otherwise, f"continue with: infopro-fast train --resume {self.run}")

    def watch(self, batches: Iterable) -> Iterator:
        """Yield the batches until a signal arrives, then stop."""
        for batch in batches:
            if self.signum is not None:
                self.now()
            yield batch
