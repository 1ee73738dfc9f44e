"""A plan: where to cut a network into local modules, and the memory that this was measured to take.

Its file is JSON. Importing this needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from infopro_fast.errors import PlanError
from infopro_fast.whole_files import replace_file

VERSION = 1


@dataclass(frozen=True)
class PlannedModule:
    """One module: its last block and number of blocks, bytes and seconds.

    saved: the most that autograd keeps, and the output; peak: at its step's highest point; parameters: of
    its parameters.
    """

    last: str
    blocks: int
    saved: int
    peak: int
    parameters: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Where to cut a network, and what a training step then takes.

    cuts: last (stage, block) of every module but the last. resident: bytes that are there all the time;
    ``peak`` counts beyond these. end_to_end: peak and saved bytes for K = 1, without auxiliary networks and
    recompute.
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
        """Write the file whole, or leave what was there before."""
        content = {"infopro_fast plan": VERSION, **dataclasses.asdict(self)}
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())

    @staticmethod
    def read(path: Path) -> Plan:
        """Return the plan in a file. Raises PlanError for a file that `write` did not write."""
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
        except PlanError:
            raise
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{path}: not a plan: {type(error).__name__}: {error}") from error


def parse_bytes(text: str) -> int:
    """Return the bytes that a text like 4GiB, 500 MiB, 3.5GB or a plain number says. Raises PlanError."""
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
    """Return a number of bytes as 1.50 GiB, 12.3 MiB or 4.0 KiB."""
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{int(count)} B"
