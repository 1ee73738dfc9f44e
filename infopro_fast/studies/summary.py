"""A study's table in Markdown: errors of the cells beside the paper's, costs of a step, and comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

from infopro_fast.trainer.settings.config import IMAGE_SIZES, RECIPES

from .results import Result, below_greedy, compare, pooled_deviation
from .tables import NAMES, PAPERS, Cell, Study, jobs, papers_dataset, published_memory

BYTES = "MiB kept for backward, and at the highest point beyond model, optimizer and batch."
COSTS = f"What a step costs: milliseconds; {BYTES}"
MEMORY = f"Memory of a step: {BYTES}"
AGAINST_GREEDY = (
    "Points of error below greedy SL with the same K (negative: above it), "
    "in brackets in standard errors of the difference."
)


def _pooled(results: Sequence[Result]) -> str:
    deviation, runs = pooled_deviation(results), max(len(r.errors) for r in results)
    return (
        f"A deviation of {runs} runs is itself uncertain. Pooled over all cells it is {deviation:.2f} points,"
        f" and the difference of two means of {runs} runs then has a standard error of "
        f"{deviation * math.sqrt(2 / runs):.2f}."
    )


def _difference(margin: float, error: float) -> str:
    return f"{margin:.2f}" + (f" ({margin / error:.1f})" if error > 0 else "")


def markdown(study: Study, results: Sequence[Result]) -> str:
    """Return the table as Markdown: errors, costs, comparisons."""
    parts = [_title(study), _errors(results)]
    if any(r.paper for r in results):
        parts.append(_about_paper(study))
    if any(r.cost for r in results):
        memory = study.table == "table3"
        parts += [_about_memory(study), _memory(study, results)] if memory else [COSTS, _costs(results)]
    differences = below_greedy(results)
    if differences:
        some = [r for r in results if r.cell in differences]
        parts += [AGAINST_GREEDY, _grid(some, lambda r: _difference(*differences[r.cell]))]
        parts += [_pooled(results)] if any(len(r.errors) > 1 for r in results) else []
    for row in compare(results):
        gap = "" if row["gap_to_e2e"] is None else f"; {row['gap_to_e2e']:+.2f} points from end to end"
        errors = row["in_standard_errors"]
        of_errors = "" if errors is None else f", {abs(errors):.1f} standard errors of the difference"
        best = f"{NAMES[row['which']]} {row['infopro']:.2f} %"
        side = "lower" if row["margin"] >= 0 else "higher"
        parts.append(
            f"K = {row['modules']}: greedy SL {row['greedy']:.2f} %, {best}: "
            f"{abs(row['margin']):.2f} points {side}{of_errors}{gap}."
        )
    return "\n\n".join(parts) + "\n"


def _about_paper(study: Study) -> str:
    """Return what the numbers in brackets are, and how far they can be compared."""
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
    what = "In the last two columns the paper's: GB of all that its process had on a Titan Xp"
    return f"{MEMORY} {what}, images of {side}x{side}, batch {batch_size}."


def _title(study: Study) -> str:
    one = jobs(study)[0].config.resolved()
    side = one.image_size[0]
    images = f"{study.dataset}, {side}x{side}" + (" (averaged down)" if one.shrink > 1 else "")
    tested = f"the last {one.hold_out} training images held out" if one.hold_out else "the test images"
    seeds = f"{study.first_seed} to {study.first_seed + study.seeds - 1}"
    return (
        f"{one.arch} on {images}, {one.epochs} epochs, batch {one.batch_size}, lr {one.lr:g} ({one.schedule})."
        f" Error in % on {tested} after the last epoch: mean ± standard deviation over seeds {seeds}."
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
    """Return a cell's text. runs: of a complete cell; a cell with fewer runs says so."""
    deviation = f" ± {r.deviation:.2f}" if len(r.errors) > 1 else " (one run)"
    deviation += f" ({len(r.errors)} runs)" if 1 < len(r.errors) < runs else ""
    return f"{r.mean:.2f}{deviation}" + (f" [{r.paper[0]:.2f} ± {r.paper[1]:.2f}]" if r.paper else "")


def _costs(results: Sequence[Result]) -> str:
    def text(r: Result) -> str:
        saved, peak = r.cost["saved"] / 2**20, r.cost["peak"] / 2**20
        return f"{1e3 * r.cost['seconds']:.0f} ms, {saved:.1f}, {peak:.1f}"

    return _grid([r for r in results if r.cost], text)


def _memory(study: Study, results: Sequence[Result]) -> str:
    """Return a row for each cell, with its share of end-to-end training's bytes, here and in the paper."""
    e2e = next((r for r in results if r.cell.method == "e2e" and r.cost), None)
    whole = published_memory(study, Cell("e2e", 1))
    head = "| | K | kept, MiB | of E2E | highest point, MiB | of E2E | ms | paper, GB | of E2E |"
    lines = [head, "|---|" + "---|" * 8]
    for r in (r for r in results if r.cost):
        cells = [NAMES[r.cell.method], str(r.cell.modules)]
        for kind in ("saved", "peak"):
            share = f"{100 * r.cost[kind] / e2e.cost[kind]:.1f} %" if e2e else ""
            cells += [f"{r.cost[kind] / 2**20:.1f}", share]
        there = published_memory(study, r.cell)
        cells += [f"{1e3 * r.cost['seconds']:.0f}"]
        cells += [f"{there:.2f}", f"{100 * there / whole:.1f} %"] if there else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grid(results: Sequence[Result], text) -> str:
    """Return a table with a row a method and a column a K; methods without K fill the first column."""
    columns = sorted({r.cell.modules for r in results})
    methods = list(dict.fromkeys(r.cell.method for r in results))
    by = {(r.cell.method, r.cell.modules): text(r) for r in results}
    head = ["| |" + "".join(f" K = {K} |" for K in columns), "|---|" + "---|" * len(columns)]
    rows = (f"| {NAMES[m]} |" + "".join(f" {by.get((m, K), '')} |" for K in columns) for m in methods)
    return "\n".join([*head, *rows])
