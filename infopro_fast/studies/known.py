"""Runs of an earlier study, on this machine or another, read from its table (JSON)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopro_fast.errors import StudyError
from infopro_fast.trainer.settings.config import TrainConfig

from .tables import FREE, Cell, Study, config, jobs

OF_A_CELL = ("modules", "local_loss", "lambdas", "balanced", "cuts", "recompute", "order", "impl", "hold_out", "aux_depth")


@dataclass(frozen=True)
class Run:
    """A run in a table."""

    curve: tuple[float, ...]  # test error (%) after every epoch
    cross_entropy: float  # on the test images, after the last epoch


@dataclass(frozen=True)
class Known:
    """The known runs of a study."""

    runs: dict[tuple[Cell, int], Run]  # by cell and seed
    costs: dict[Cell, dict[str, float]]  # of a step
    sources: list[dict[str, Any]]  # where the runs were made, for a table's JSON


def settings_of_a_cell(found: TrainConfig) -> dict[str, Any]:
    """In what one cell of a table differs from another, as JSON has it."""
    content = json.loads(found.resolved().to_json())
    return {name: content[name] for name in OF_A_CELL}


def read(study: Study) -> Known:
    """The runs of ``study.known`` that are cells of ``study``; a cell and seed that two files have is the
    first one's.

    Raises StudyError for a file that is no table, and one whose runs were trained with other settings.
    """
    found = Known({}, {}, [])
    wanted = {(job.cell, job.seed) for job in jobs(study)}
    for path in study.known:
        content = _content(path)
        _check_same(path, study, content["settings"])
        taken: list[tuple[Cell, int]] = []
        for row in content["cells"]:
            cell = _cell(row)
            ours = [(i, seed) for i, seed in enumerate(row["seeds"]) if (cell, seed) in wanted and (cell, seed) not in found.runs]
            if not ours:
                continue
            _check_cell(path, study, cell, row["settings"])
            found.runs.update({(cell, seed): Run(tuple(row["curves"][i]), row["cross_entropies"][i]) for i, seed in ours})
            if row["cost"] is not None:
                found.costs.setdefault(cell, row["cost"])
            taken += [(cell, seed) for _, seed in ours]
        found.sources.extend(_sources(content, taken))
    return found


def _sources(content: dict[str, Any], taken: Sequence[tuple[Cell, int]]) -> list[dict[str, Any]]:
    """Return where the runs taken from this table were made: by its own study, or by one that it knew."""
    made = {
        (_cell(row), seed): source["where"]
        for source in content.get("known", [])
        for row in source["cells"]
        for seed in row["seeds"]
    }
    by_place: dict[str, dict[Cell, list[int]]] = {}
    for cell, seed in taken:
        place = json.dumps(made.get((cell, seed), content["where"]))
        by_place.setdefault(place, {}).setdefault(cell, []).append(seed)
    found = []
    for place, cells in by_place.items():
        rows = [{**dataclasses.asdict(cell), "seeds": seeds} for cell, seeds in cells.items()]
        found.append({"where": json.loads(place), "cells": rows})
    return found


def _cell(row: dict[str, Any]) -> Cell:
    weights = row.get("weights")  # absent from the sources in the oldest tables, which compare no weights
    return Cell(row["method"], row["modules"], None if weights is None else tuple(weights))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        missing = {"settings", "where", "cells"} - content.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise StudyError(f"known: {path}: not the JSON of a table ({error})") from error
    if missing:
        raise StudyError(f"known: {path}: not the JSON of a table, which has {', '.join(sorted(missing))}")
    return content


def _check_same(path: Path, study: Study, theirs: dict[str, Any]) -> None:
    """What all cells have in common: images, network, epochs, optimizer."""
    ours = json.loads(jobs(study)[0].config.resolved().to_json())
    common = (field.name for field in dataclasses.fields(TrainConfig) if field.name not in (*FREE, *OF_A_CELL, "seed"))
    _refuse(path, "", {name: ours[name] for name in common}, theirs)


def _check_cell(path: Path, study: Study, cell: Cell, theirs: dict[str, Any]) -> None:
    ours = settings_of_a_cell(config(study, cell, study.first_seed))
    earlier = {"aux_depth": ours["aux_depth"]}  # tables from before it was noted have the default, as every cell has
    _refuse(path, f"{cell.name}: ", ours, earlier | theirs)


def _refuse(path: Path, of: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        values = ", ".join(f"{name}: expected {ours[name]}, got {theirs.get(name)}" for name in different)
        raise StudyError(f"known: {path}: {of}runs with other settings ({values})")
