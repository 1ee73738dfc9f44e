"""Errors for people: each is one line of message, and knows the exit code of a command that ends with it.

Anything else that a command raises is a bug and keeps its traceback. Importing this needs no torch.
"""

from __future__ import annotations

import signal


class ConfigError(ValueError):
    """Settings that are impossible or contradict each other; the message names them."""

    exit_code = 2


class PlanError(ValueError):
    """A plan that cannot be made, or a file that holds none; the message says why."""

    exit_code = 2


class DataError(ValueError):
    """Files of a data set that are missing or damaged; the message names the file and what to do."""

    exit_code = 2


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, missing or of another kind; the message names it and what to do."""

    exit_code = 2


class RunError(RuntimeError):
    """A folder that is not the run it should be; the message names it."""

    exit_code = 2


class NonFiniteError(RuntimeError):
    """Training met a nan or an infinity; the message names step, module, loss and the last good checkpoint."""

    exit_code = 1


class ProcessFailure(RuntimeError):
    """A process of the run failed; the message names its rank, its modules and the cause."""

    exit_code = 1


class StudyError(RuntimeError):
    """Runs of a study that failed, or a folder that holds another run; the message names them."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """A signal stopped the work after a checkpoint. signum: the signal; advice: how to continue."""

    def __init__(self, signum: int, advice: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {advice}")
        self.signum, self.exit_code = signum, 128 + signum


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error for people, or None for a bug, whose traceback is shown."""
    return 1 if isinstance(error, OSError) else getattr(error, "exit_code", None)
