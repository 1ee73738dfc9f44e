"""Numbers of a study: each cell's errors over the seeds, the cost of a step, comparisons of methods."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopro_fast.whole_files import replace_file

from . import costs
from .known import Known, Run
from .runner import finished, tested_epochs
from .tables import Cell, Job, Study, cells, jobs, published

INFOPRO = ("softmax", "contrast")


@dataclass(frozen=True)
class Result:
    """A cell with its finished runs; tuples have a value for each seed."""

    cell: Cell
    seeds: tuple[int, ...]
    errors: tuple[float, ...]  # test error (%) after the last epoch
    cross_entropies: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]  # test error (%) after every epoch
    cost: dict[str, float] | None  # of a step (`costs.measure`)
    paper: tuple[float, float] | None  # mean and deviation there

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; nan for one run."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else math.nan

    @property
    def standard_error(self) -> float:
        return self.deviation / math.sqrt(len(self.errors))


def collect(study: Study, known: Known) -> list[Result]:
    """Return the cells that have a finished run, here or in a known table, each with the cost of a step.

    The cost comes from earlier measurements, from a measurement now if the study asks for one, or from a
    known table.
    """
    found = []
    by_cell: dict[Cell, list[tuple[Job, Run]]] = {cell: [] for cell in cells(study)}
    for job in jobs(study):
        run = known.runs.get((job.cell, job.seed)) or (_run(job) if finished(job) else None)
        if run is not None:
            by_cell[job.cell].append((job, run))
    measured = _Costs(study.out / "costs.json")
    for cell, done in by_cell.items():
        if not done:
            continue
        runs = [run for _, run in done]
        cost = measured.get(done[0][0], measure=study.measure) or known.costs.get(cell)
        ends, losses = tuple(run.curve[-1] for run in runs), tuple(run.cross_entropy for run in runs)
        seeds, curves = tuple(job.seed for job, _ in done), tuple(run.curve for run in runs)
        found.append(Result(cell, seeds, ends, losses, curves, cost, published(study, cell)))
    return found


def _run(job: Job) -> Run:
    epochs = tested_epochs(job)
    curve = tuple(100 - 100 * epoch["test"]["accuracy"] for epoch in epochs)
    return Run(curve, epochs[-1]["test"]["loss"])


class _Costs:
    """The measurements in costs.json."""

    def __init__(self, path: Path):
        self.path, self.content = path, json.loads(path.read_text()) if path.is_file() else {}

    def get(self, job: Job, measure: bool) -> dict[str, float] | None:
        key = costs.key(job.config)
        if key not in self.content and measure:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.content[key] = costs.measure(job.config)
            replace_file(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
        return self.content.get(key)


def compare(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Compare, for every K, greedy SL with the better InfoPro and InfoPro with end to end, in points."""
    by = {(r.cell.method, r.cell.modules): r for r in results if r.cell.weights is None}
    end_to_end = by.get(("e2e", 1))
    found = []
    for K in sorted({K for method, K in by if method == "greedy"}):
        greedy, ours = by["greedy", K], [by[method, K] for method in INFOPRO if (method, K) in by]
        if not ours:
            continue
        best = min(ours, key=lambda r: r.mean)
        error = math.hypot(greedy.standard_error, best.standard_error)  # nan for single runs, None in JSON
        margin = greedy.mean - best.mean
        found.append({
            "modules": K, "greedy": greedy.mean, "infopro": best.mean, "which": best.cell.method,
            "margin": margin, "standard_error": None if math.isnan(error) else error,
            "in_standard_errors": margin / error if error > 0 else None,
            "gap_to_e2e": None if end_to_end is None else best.mean - end_to_end.mean,
        })
    return found


def below_greedy(results: Sequence[Result]) -> dict[Cell, tuple[float, float]]:
    """Return how many points each method is below greedy SL with its K, and the standard error (or nan)."""
    greedy = {r.cell.modules: r for r in results if r.cell.method == "greedy"}
    pairs = [(r, greedy.get(r.cell.modules)) for r in results if r.cell.method != "greedy"]
    return {
        r.cell: (other.mean - r.mean, math.hypot(other.standard_error, r.standard_error))
        for r, other in pairs
        if other is not None
    }


def pooled_deviation(results: Sequence[Result]) -> float:
    """Return the standard deviation of runs about their cell's mean, over all cells, or nan."""
    freedom = sum(len(r.errors) - 1 for r in results)
    squares = sum((error - r.mean) ** 2 for r in results for error in r.errors)
    return math.sqrt(squares / freedom) if freedom else math.nan
