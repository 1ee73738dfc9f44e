"""Errors that users meet: one line of message each, and the exit code of a command that ends with it.

Any other exception is a bug and keeps its traceback. Importing this needs no torch.
"""

from __future__ import annotations

import signal


class UserError(Exception):
    """An error for the user; the message says what is wrong, where, and what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """Settings that are impossible or contradict each other; the message names them."""

    exit_code = 2


class PlanError(UserError, ValueError):
    """A plan that cannot be made, or a file that holds no plan."""

    exit_code = 2


class DataError(UserError, ValueError):
    """A data set's files are missing or damaged; the message names the file and what to do."""

    exit_code = 2


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is damaged, missing or of another kind; the message names it and what to do."""

    exit_code = 2


class RunError(UserError, RuntimeError):
    """A folder is not the run that was expected; the message names it."""

    exit_code = 2


class NonFiniteError(UserError, RuntimeError):
    """Training met a nan or an infinity; the message names step, module, loss and last good checkpoint."""


class ProcessFailure(UserError, RuntimeError):
    """A process of the run failed; the message names its rank, its modules and the cause."""


class StudyError(UserError, RuntimeError):
    """Runs of a study failed, or a folder holds another run; the message names them."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the work after a checkpoint. signum: the signal; advice: how to continue."""

    def __init__(self, signum: int, advice: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {advice}")
        self.signum, self.exit_code = signum, 128 + signum


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error for the user, or None for a bug."""
    return 1 if isinstance(error, OSError) else getattr(error, "exit_code", None)
