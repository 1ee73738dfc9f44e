"""What a run says to people when it cannot go on. Importing this needs no torch."""

from __future__ import annotations

import signal
from pathlib import Path


class NonFiniteError(RuntimeError):
    """Training met a nan or an infinity; the message names step, module and loss, and the last checkpoint, which is good."""


class Stopped(KeyboardInterrupt):
    """Training stopped by a signal, after a checkpoint. run: the run folder; signum: which signal."""

    def __init__(self, run: Path, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; continue with: infopro-fast train --resume {run}")
        self.run, self.signum = run, signum
