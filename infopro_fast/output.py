"""Standard streams that never end a run: what cannot be shown is replaced, what nobody reads is dropped."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A text stream whose reader may go away, or whose disk may be full: writing never raises."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make stdout and stderr last, and show ? for what their encoding lacks, while the context lasts."""
    with contextlib.ExitStack() as restored:
        redirects = {"stdout": contextlib.redirect_stdout, "stderr": contextlib.redirect_stderr}
        for name, redirect in redirects.items():
            stream: Any = getattr(sys, name)
            if stream is None:  # closed: the next file that is opened would take its number
                stream = open(os.devnull, "w")
                setattr(sys, name, stream)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            restored.callback(_emptied, stream)
            restored.enter_context(redirect(Lasting(stream)))
        yield


def _emptied(stream: Any) -> None:
    """Flush a stream; what it cannot write goes nowhere, or the interpreter's end would complain of it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
