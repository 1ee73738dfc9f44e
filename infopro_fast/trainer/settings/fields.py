"""What an annotation says about a setting: the values that it may have, and what a change of it changes.

The mark is the one place that says how far two runs are the same. Everything that compares runs reads it.

| mark | a change of the setting changes |
|---|---|
| NOTHING | no bit of the weights: where files are, how often something is written, names |
| MACHINE | which threads and processes share the work; they train the same, but for rounding |
| BITS | the order of sums: another device, other kernels, recomputation |
| RESULT | the result |

- Only RESULT makes a run depart from its row of the paper, or from the seeds that `analyze` averages.
- `reproduce` takes a run for a cell of its table where nothing marked RESULT differs.
- `--resume` may change NOTHING and MACHINE; `continuing` refuses processes that see other images.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import tyro

from infopro_fast.errors import ConfigError
from infopro_fast.named_functions import is_named


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a change of a setting changes."""

    changes: str


NOTHING, MACHINE = Mark("nothing"), Mark("the machine's share")
BITS, RESULT = Mark("the bits"), Mark("the result")


@dataclasses.dataclass(frozen=True)
class Limit:
    """Which values of its type a setting may have. expected: in words, for "expected ..."."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    return Limit(f"an integer of at least {least}", lambda value: value >= least)


def one_of(names: Any, others: str) -> Limit:
    """A name of a Literal, or of other code. others: what that may be, in words."""
    known = typing.get_args(names)
    return Limit(f"one of {', '.join(known)}, or {others}", lambda name: name in known or is_named(name))


POSITIVE = Limit("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Limit("a number of at least 0", lambda value: value >= 0)
FRACTION = Limit("a number in [0, 1)", lambda value: 0 <= value < 1)


# The help text says what a setting is when it is None; another default, of a recipe for example, is shown.
SAID = tyro.conf.arg(help_behavior_hint=lambda default: "" if default == "None" else f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting, as its annotation says it."""

    name: str
    kinds: tuple[Any, ...]  # types; more than one where a setting may be None
    mark: Mark
    limit: Limit | None
    default: Any

    @property
    def expected(self) -> str:
        """Return the values that it may have, in words."""
        if self.limit is not None:
            return self.limit.expected
        kind = self.kinds[0]
        if typing.get_origin(kind) is Literal:
            return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
        words = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
        return words.get(kind, "numbers")

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value that it may not have."""
        if value is None and type(None) in self.kinds:
            return
        if not _is(self.kinds[0], value) or not (self.limit is None or self.limit.holds(value)):
            raise ConfigError(f"{self.name}: expected {self.expected}, got {value!r}")

    def convert(self, value: Any) -> Any:
        """Return a value of a file as the type that the setting has: lists as tuples, text as a path."""
        if Path in self.kinds and isinstance(value, str):
            return Path(value)
        return _tuples(value)


def _is(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, kinds, value))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def of(settings: type) -> dict[str, Field]:
    """Return the fields of a dataclass of settings by name. Each has exactly one mark."""
    if settings not in _FIELDS:
        _FIELDS[settings] = _fields(settings)
    return _FIELDS[settings]


_FIELDS: dict[type, dict[str, Field]] = {}


def _fields(settings: type) -> dict[str, Field]:
    hints = typing.get_type_hints(settings, include_extras=True)
    found = {}
    for field in dataclasses.fields(settings):
        kind, *notes = typing.get_args(hints[field.name])
        union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        kinds = typing.get_args(kind) if union else (kind,)
        (mark,) = [note for note in notes if isinstance(note, Mark)]
        limit = next((note for note in notes if isinstance(note, Limit)), None)
        found[field.name] = Field(field.name, kinds, mark, limit, field.default)
    return found


def keywords(words: Iterable[str] | None) -> dict[str, Any]:
    """Return words like name=value as arguments; a value that is no Python literal is text."""
    found: dict[str, Any] = {}
    for word in words or ():
        name, _, value = word.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def differing(a: Any, b: Any, *marks: Mark) -> list[str]:
    """Return the names of the settings with one of these marks that differ between two runs."""
    known = of(type(a)).values()
    return [f.name for f in known if f.mark in marks and getattr(a, f.name) != getattr(b, f.name)]


def check_names(settings: type, names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no setting."""
    for name in names:
        if name not in of(settings):
            raise ConfigError(f"{name}: no such setting{did_you_mean(name, of(settings))}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" where a known name is near to this one, else ""."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
