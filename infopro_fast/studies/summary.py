"""From runs to a table: errors by cell over seeds, beside the paper's; JSON, Markdown and the data of the figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopro_fast.trainer.settings.config import IMAGE_SIZES, RECIPES
from infopro_fast.whole_files import replace_file

from . import costs
from .known import Known, Run, settings_of_a_cell
from .provenance import provenance
from .runner import finished, tested_epochs
from .tables import NAMES, PAPERS, Cell, Job, Study, cells, config, jobs, papers_dataset, published, published_memory

INFOPRO = ("softmax", "contrast")
COSTS = "What a step costs: milliseconds; MiB kept for backward, and at the highest point beyond model, optimizer and batch."
MEMORY = "Memory of a step: MiB kept for backward, and at the highest point beyond model, optimizer and batch."
AGAINST_GREEDY = "Points of error below greedy SL with the same K (negative: above it), in brackets in standard errors of the difference."


@dataclass(frozen=True)
class Result:
    """A cell with its finished runs. errors: test error (%) after the last epoch, by seed; cost: of a step (`costs.measure`)."""

    cell: Cell
    seeds: tuple[int, ...]
    errors: tuple[float, ...]
    cross_entropies: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]  # test error (%) after every epoch, by seed
    cost: dict[str, float] | None
    paper: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def deviation(self) -> float:
        """Of the sample; nan for one run."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else math.nan

    @property
    def standard_error(self) -> float:
        return self.deviation / math.sqrt(len(self.errors))


def collect(study: Study, known: Known) -> list[Result]:
    """The cells that have a finished run, here or known, with what a step costs: measured here where the study asks for it and it is
    not measured yet, else known."""
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
    return Run(tuple(100 - 100 * epoch["test"]["accuracy"] for epoch in epochs), epochs[-1]["test"]["loss"])


class _Costs:
    """costs.json: measured once, kept."""

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
    """For every K: greedy SL against the better InfoPro, in points and in standard errors of the difference; the gap to end to end."""
    by = {(r.cell.method, r.cell.modules): r for r in results if r.cell.weights is None}
    end_to_end = by.get(("e2e", 1))
    found = []
    for K in sorted({K for method, K in by if method == "greedy"}):
        greedy, ours = by["greedy", K], [by[method, K] for method in INFOPRO if (method, K) in by]
        if not ours:
            continue
        best = min(ours, key=lambda r: r.mean)
        error = math.hypot(greedy.standard_error, best.standard_error)  # nan of single runs, which JSON does not have
        margin = greedy.mean - best.mean
        found.append({
            "modules": K, "greedy": greedy.mean, "infopro": best.mean, "which": best.cell.method, "margin": margin,
            "standard_error": None if math.isnan(error) else error, "in_standard_errors": margin / error if error > 0 else None,
            "gap_to_e2e": None if end_to_end is None else best.mean - end_to_end.mean,
        })  # fmt: skip
    return found


def below_greedy(results: Sequence[Result]) -> dict[Cell, tuple[float, float]]:
    """By how many points each local method is below greedy SL with its K, and the standard error of that (nan for single runs)."""
    greedy = {r.cell.modules: r for r in results if r.cell.method == "greedy"}
    return {
        r.cell: (greedy[r.cell.modules].mean - r.mean, math.hypot(greedy[r.cell.modules].standard_error, r.standard_error))
        for r in results
        if r.cell.method != "greedy" and r.cell.modules in greedy
    }


def pooled_deviation(results: Sequence[Result]) -> float:
    """Of a run about the mean of its cell, over all cells with several: less a matter of luck than that of three runs. nan for none."""
    freedom = sum(len(r.errors) - 1 for r in results)
    squares = sum((error - r.mean) ** 2 for r in results for error in r.errors)
    return math.sqrt(squares / freedom) if freedom else math.nan


def _pooled(results: Sequence[Result]) -> str:
    deviation, runs = pooled_deviation(results), max(len(r.errors) for r in results)
    return (
        f"A deviation of {runs} runs is itself uncertain. Pooled over all cells it is {deviation:.2f} points, and the difference of two "
        f"means of {runs} runs then has a standard error of {deviation * math.sqrt(2 / runs):.2f}."
    )


def _difference(margin: float, error: float) -> str:
    return f"{margin:.2f}" + (f" ({margin / error:.1f})" if error > 0 else "")


def markdown(study: Study, results: Sequence[Result]) -> str:
    """Errors, then costs, then what they say."""
    parts = [_title(study), _errors(results)]
    if any(r.paper for r in results):
        parts.append(_about_paper(study))
    if any(r.cost for r in results):
        parts += [_about_memory(study), _memory(study, results)] if study.table == "table3" else [COSTS, _costs(results)]
    differences = below_greedy(results)
    if differences:
        parts += [AGAINST_GREEDY, _grid([r for r in results if r.cell in differences], lambda r: _difference(*differences[r.cell]))]
        parts += [_pooled(results)] if any(len(r.errors) > 1 for r in results) else []
    for row in compare(results):
        gap = "" if row["gap_to_e2e"] is None else f"; {row['gap_to_e2e']:+.2f} points from end to end"
        errors = row["in_standard_errors"]
        of_errors = "" if errors is None else f", {abs(errors):.1f} standard errors of the difference"
        parts.append(
            f"K = {row['modules']}: greedy SL {row['greedy']:.2f} %, {NAMES[row['which']]} {row['infopro']:.2f} %: "
            f"{abs(row['margin']):.2f} points {'lower' if row['margin'] >= 0 else 'higher'}{of_errors}{gap}."
        )
    return "\n\n".join(parts) + "\n"


def _about_paper(study: Study) -> str:
    """What the numbers in brackets are, and how far they can be compared."""
    theirs = papers_dataset(study)
    epochs = RECIPES[theirs].epochs
    text = f"In brackets: what the paper has in this cell, on {PAPERS[theirs]} after {epochs} epochs."
    if study.dataset == theirs and study.scale == "paper" and study.epochs in (None, epochs):
        return text
    other = "Another schedule" if study.dataset == theirs else "Other images"
    return f"{text} {other}, other numbers: what can be compared is the order of the methods."


def _about_memory(study: Study) -> str:
    theirs = papers_dataset(study)
    if published_memory(study, Cell("e2e", 1)) is None:
        return MEMORY
    side, batch_size = IMAGE_SIZES[theirs], RECIPES[theirs].batch_size
    return (
        f"{MEMORY} In the last two columns the paper's: GB of all that its process had on a Titan Xp, images of {side}x{side}, "
        f"batch {batch_size}."
    )


def _title(study: Study) -> str:
    one = jobs(study)[0].config.resolved()
    side = one.image_size[0]
    images = f"{study.dataset}, {side}x{side}" + (" (averaged down)" if one.shrink > 1 else "")
    tested = f"the last {one.hold_out} training images held out" if one.hold_out else "the test images"
    return (
        f"{one.arch} on {images}, {one.epochs} epochs, batch {one.batch_size}, lr {one.lr:g} ({one.schedule}). Error in % on {tested} "
        f"after the last epoch: mean ± standard deviation over seeds {study.first_seed} to {study.first_seed + study.seeds - 1}."
    )


def _errors(results: Sequence[Result]) -> str:
    if any(r.cell.weights is not None for r in results):
        lines = ["| | K | weights (reconstruction, task: first, last) | error |", "|---|---|---|---|"]
        for r in sorted(results, key=lambda r: (r.cell.method, r.cell.modules, r.mean)):
            weights = ", ".join(f"{w:g}" for w in r.cell.weights)
            lines.append(f"| {NAMES[r.cell.method]} | {r.cell.modules} | {weights} | {_error(r)} |")
        return "\n".join(lines)
    most = max(len(r.errors) for r in results)
    return _grid(results, lambda r: _error(r, most))


def _error(r: Result, runs: int = 1) -> str:
    """runs: of a whole cell; one that has fewer says so."""
    deviation = f" ± {r.deviation:.2f}" if len(r.errors) > 1 else " (one run)"
    deviation += f" ({len(r.errors)} runs)" if 1 < len(r.errors) < runs else ""
    return f"{r.mean:.2f}{deviation}" + (f" [{r.paper[0]:.2f} ± {r.paper[1]:.2f}]" if r.paper else "")


def _costs(results: Sequence[Result]) -> str:
    def text(r: Result) -> str:
        return f"{1e3 * r.cost['seconds']:.0f} ms, {r.cost['saved'] / 2**20:.1f}, {r.cost['peak'] / 2**20:.1f}"

    return _grid([r for r in results if r.cost], text)


def _memory(study: Study, results: Sequence[Result]) -> str:
    """A row a cell, with what it has of end-to-end training's bytes, here and in the paper."""
    e2e = next((r for r in results if r.cell.method == "e2e" and r.cost), None)
    whole = published_memory(study, Cell("e2e", 1))
    lines = ["| | K | kept, MiB | of E2E | highest point, MiB | of E2E | ms | paper, GB | of E2E |", "|---|" + "---|" * 8]
    for r in (r for r in results if r.cost):
        cells = [NAMES[r.cell.method], str(r.cell.modules)]
        for kind in ("saved", "peak"):
            cells += [f"{r.cost[kind] / 2**20:.1f}", f"{100 * r.cost[kind] / e2e.cost[kind]:.1f} %" if e2e else ""]
        there = published_memory(study, r.cell)
        cells += [f"{1e3 * r.cost['seconds']:.0f}", *([f"{there:.2f}", f"{100 * there / whole:.1f} %"] if there else ["", ""])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grid(results: Sequence[Result], text) -> str:
    """Rows of methods, columns of K; what has no K stands in the first column."""
    columns = sorted({r.cell.modules for r in results})
    methods = list(dict.fromkeys(r.cell.method for r in results))
    by = {(r.cell.method, r.cell.modules): text(r) for r in results}
    head = ["| |" + "".join(f" K = {K} |" for K in columns), "|---|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {NAMES[m]} |" + "".join(f" {by.get((m, K), '')} |" for K in columns) for m in methods)])


def write(study: Study, results: Sequence[Result], known: Known) -> list[Path]:
    """The table as Markdown and JSON, each whole or not at all, and the figures; returns the paths."""
    from . import figures

    study.out.mkdir(parents=True, exist_ok=True)
    paths = [study.out / f"{study.table}.{kind}" for kind in ("md", "json")]
    where = {**provenance(), "jobs": study.jobs, "threads": study.threads}
    rows = [
        {"method": r.cell.method, "modules": r.cell.modules, "weights": r.cell.weights,
         "settings": settings_of_a_cell(study, r.cell), "seeds": r.seeds, "errors": r.errors,
         "cross_entropies": r.cross_entropies, "curves": r.curves, "cost": r.cost, "paper": r.paper,
         "paper_memory_gb": published_memory(study, r.cell)}
        for r in results
    ]  # fmt: skip
    settings = json.loads(jobs(study)[0].config.resolved().to_json())
    for name in ("out", "data_root", "seed"):  # not of the study: folders of a machine, what a run is told apart by
        del settings[name]
    about = {"table": study.table, "scale": study.scale, "settings": settings, "where": where}
    content = {**about, "known": known.sources, "cells": rows, "compared": compare(results)}
    replace_file(paths[0], markdown(study, results).encode())
    replace_file(paths[1], (json.dumps(content, indent=1) + "\n").encode())
    return paths + figures.draw(study, results)
