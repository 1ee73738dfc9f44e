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


class OutOfMemory(UserError, RuntimeError):
    """A step needs more memory than there is; the message says where, and which settings need less."""


class ProcessFailure(UserError, RuntimeError):
    """A process of the run failed; the message names its rank, its modules and the cause."""


class CheckError(UserError, RuntimeError):
    """An op gave a wrong result on this machine; the message says how many did."""


class StudyError(UserError, RuntimeError):
    """Runs of a study failed, or a folder holds another run; the message names them."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the work after a checkpoint. signum: the signal; advice: how to continue."""

    def __init__(self, signum: int, advice: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {advice}")
        self.signum, self.exit_code = signum, 128 + signum


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error for the user, or None for a bug."""
    if isinstance(error, OSError) or is_out_of_memory(error):
        return 1
    return getattr(error, "exit_code", None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out, on the CPU or a GPU."""
    text = str(error).lower()
    known = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
    ran_out = isinstance(error, MemoryError) or any(words in text for words in known)
    return ran_out and not isinstance(error, UserError)


def text(error: BaseException) -> str:
    """Return what to tell the user of an error, as one line."""
    if not is_out_of_memory(error):
        return str(error)
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"out of memory ({first}): take a smaller batch size, accumulate (parts of a batch), more modules, "
        "or recompute block"
    )
