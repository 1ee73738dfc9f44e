"""A plan: where to cut a network into local modules, and what that was measured to take. A file of JSON; needs no torch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from infopro_fast.errors import PlanError

VERSION = 1


@dataclass(frozen=True)
class PlannedModule:
    """Bytes of one module: kept by autograd at most, at the highest point of its step, and of its parameters. last: its last block."""

    last: str
    blocks: int
    saved: int
    peak: int
    parameters: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """cuts: last (stage, block) of every module but the last. peak: of the step, beyond what is there all the time (resident).

    end_to_end: peak and saved bytes of K = 1 with neither auxiliary nets nor recompute.
    """

    arch: str
    image_size: tuple[int, int]
    batch_size: int
    cuts: tuple[tuple[int, int], ...]
    recompute: str
    losses: str
    objective: str
    modules: tuple[PlannedModule, ...]
    resident: int
    end_to_end: dict[str, int]

    @property
    def peak(self) -> int:
        return max(module.peak for module in self.modules)

    @property
    def saved(self) -> int:
        return max(module.saved for module in self.modules)

    @property
    def total(self) -> int:
        return self.resident + self.peak

    def write(self, path: Path) -> None:
        """The whole file or, if that fails, what was there before."""
        content = json.dumps({"infopro_fast plan": VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"
        aside = path.with_name(f".aside-{path.name}")
        try:
            with open(aside, "w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    @staticmethod
    def read(path: Path) -> Plan:
        """Raises PlanError if this is not what `write` wrote."""
        try:
            content = json.loads(path.read_text())
            if content.pop("infopro_fast plan") != VERSION:
                raise PlanError(f"{path}: expected a plan of version {VERSION}")
            content["modules"] = tuple(PlannedModule(**module) for module in content["modules"])
            content["cuts"] = tuple((int(stage), int(block)) for stage, block in content["cuts"])
            content["image_size"] = tuple(content["image_size"])
            return Plan(**content)
        except FileNotFoundError as error:
            raise PlanError(f"{path}: no such plan; `infopro-fast plan` makes one") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{path}: not a plan: {type(error).__name__}: {error}") from error


def parse_bytes(text: str) -> int:
    """ "4GiB", "500 MiB", "3.5GB" or a plain number of bytes. Raises PlanError."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units |= {letter + "ib": 1024**power, letter + "b": 1000**power}
    number = text.strip().lower()
    unit = number.lstrip("0123456789.").strip()
    try:
        value = float(number.removesuffix(unit).strip()) * units[unit]
    except (KeyError, ValueError) as error:
        raise PlanError(f"expected bytes like 4GiB, 500MiB or 3.5GB, got {text!r}") from error
    if not value >= 1:
        raise PlanError(f"expected at least one byte, got {text!r}")
    return int(value)


def for_people(count: float) -> str:
    """1.50 GiB, 12.3 MiB, 4.0 KiB."""
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{int(count)} B"
