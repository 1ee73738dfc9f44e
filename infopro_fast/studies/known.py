"""Runs of an earlier study, on this machine or another, read from its table (JSON)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError, StudyError
from infopro_fast.trainer.settings import fields
from infopro_fast.trainer.settings.config import TrainConfig

from .tables import Cell, Study, cells, config, jobs, same_run


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


def settings_of_a_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the settings in which the cells of a study differ, with this cell's values, as JSON has them."""
    every = {other: _as_json(study, other) for other in cells(study)}
    return {
        name: value for name, value in every[cell].items() if any(c[name] != value for c in every.values())
    }


@functools.cache
def _as_json(study: Study, cell: Cell) -> dict[str, Any]:
    found = json.loads(config(study, cell, study.first_seed).resolved().to_json())
    return {name: value for name, value in found.items() if name != "out"}


def read(study: Study) -> Known:
    """The runs of ``study.known`` that are cells of ``study``; a cell and seed that two files have is the
    first one's.

    Raises StudyError for a file that is no table, and one whose runs were trained with other settings.
    """
    found = Known({}, {}, [])
    wanted = {(job.cell, job.seed) for job in jobs(study)}
    for path in study.known:
        content = _content(path)
        taken: list[tuple[Cell, int]] = []
        for row in content["cells"]:
            cell = _cell(row)
            ours = [
                (i, seed)
                for i, seed in enumerate(row["seeds"])
                if (cell, seed) in wanted and (cell, seed) not in found.runs
            ]
            if not ours:
                continue
            _check(path, study, cell, {**content["settings"], **row["settings"]})
            found.runs.update(
                {(cell, seed): Run(tuple(row["curves"][i]), row["cross_entropies"][i]) for i, seed in ours}
            )
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
    for place, taken_cells in by_place.items():
        rows = [{**dataclasses.asdict(cell), "seeds": seeds} for cell, seeds in taken_cells.items()]
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


def _check(path: Path, study: Study, cell: Cell, settings: dict[str, Any]) -> None:
    """Raise StudyError for runs of a cell that were trained with other settings than the study's.

    A setting that the table does not have is younger than it, so its runs had the default.
    """
    wanted = config(study, cell, study.first_seed)
    known = fields.of(TrainConfig)
    own = {
        name: value for name, value in settings.items() if name in known and known[name].mark is fields.RESULT
    }
    own |= {"seed": wanted.seed, "data_root": study.data_root, "device": wanted.device}
    try:
        theirs = TrainConfig(**own).resolved()
    except ConfigError as error:
        raise StudyError(f"known: {path}: {cell.name}: {error}") from error
    different = same_run(wanted, theirs)
    if different:
        ours = wanted.resolved()
        values = ", ".join(
            f"{name}: expected {getattr(ours, name)}, got {getattr(theirs, name)}" for name in different
        )
        raise StudyError(f"known: {path}: {cell.name}: runs with other settings ({values})")
