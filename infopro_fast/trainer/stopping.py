"""Stop a run at a good place, after a checkpoint, when SIGINT or SIGTERM arrives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infopro_fast.errors import Stopped


class StopRequest:
    """Notes SIGINT and SIGTERM (``signum``) for the loop; a second signal interrupts at once.

    Outside the main thread, where Python allows no handlers, signals act as before.
    """

    def __init__(self, run: Path):
        self.run = run
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def now(self, otherwise: int | None = None) -> None:
        """Stop training here, after the checkpoint. otherwise: the signal, where another process got it."""
        raise Stopped(self.signum or otherwise, f"continue with: infopro-fast train --resume {self.run}")

    def watch(self, batches: Iterable) -> Iterator:
        """Yield the batches until a signal arrives, then stop."""
        for batch in batches:
            if self.signum is not None:
                self.now()
            yield batch
