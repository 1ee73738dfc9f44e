"""Functions of other code by their names, package.module:function. Importing this needs no torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any


def is_named(text: object) -> bool:
    """Whether a text has the form of such a name, as timm:NAME has too."""
    return isinstance(text, str) and re.fullmatch(r"[^\W\d][\w.]*:.+", text) is not None


def find(name: str) -> Callable[..., Any]:
    """Return the function of this name. Raises ImportError that says what is missing."""
    home, _, function = name.partition(":")
    found = getattr(importlib.import_module(home), function, None)
    if not callable(found):
        raise ImportError(f"{home} has no function {function!r}")
    return found
