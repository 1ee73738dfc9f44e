"""Tables and figures of a plan and of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infopro_fast.figure import aligned, new_figure, save
from infopro_fast.plan_file import Plan, for_people

from .ways import Measured

KINDS = (("parameters", "C7"), ("optimizer", "C4"), ("gradients", "C3"), ("saved", "C0"), ("transient", "C1"))


# ------------------------------------------------------------------------------------------------------------
# A plan


def plan_table(plan: Plan) -> str:
    """Return one line a module, then what is always there, the total, and the comparison with end to end."""
    size = "x".join(str(n) for n in plan.image_size)
    how = {"ours": "our losses", "released": "the authors' losses"}[plan.losses]
    what = f"{plan.arch}, images {size}, batch {plan.batch_size}"
    head = f"{what}, {how}, recompute {plan.recompute}; by {plan.objective}"
    timed = ["time"] * (plan.objective == "time")
    columns = ["module", "ends with", "blocks", "saved", "peak", "peak / E2E", "parameters", *timed]
    rows = []
    for k, module in enumerate(plan.modules, 1):
        ratio = f"{100 * module.peak / plan.end_to_end['peak']:.1f} %"
        peak, time = for_people(module.peak), [f"{1e3 * module.seconds:.1f} ms"] if timed else []
        row = [str(k), module.last, str(module.blocks), for_people(module.saved), peak, ratio]
        rows.append([*row, for_people(module.parameters), *time])
    resident, total = for_people(plan.resident), for_people(plan.total)
    there = f"parameters, optimizer state, batch: {resident}; with the peak {total}"
    ratios = []
    for name, value in (("peak", plan.peak), ("saved", plan.saved)):
        whole = plan.end_to_end[name]
        ratios.append(f"{name}: {for_people(whole)} end to end, {100 * value / whole:.1f} % of it here")
    cuts = " ".join(f"{stage} {block}" for stage, block in plan.cuts)
    return "\n".join([head, aligned([columns, *rows]), there, *ratios, f"cuts: {cuts or 'none'}"])


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw a bar a module: saved bytes, and the rest of its peak."""
    figure, axes = new_figure((1.8 + 0.55 * max(6, len(plan.modules)), 3.8))
    x = range(1, len(plan.modules) + 1)
    saved = [min(module.saved, module.peak) / 2**20 for module in plan.modules]
    rest = [module.peak / 2**20 - kept for module, kept in zip(plan.modules, saved)]
    axes.bar(x, saved, color="C0", label="saved for backward")
    axes.bar(x, rest, bottom=saved, color="C1", label="gradients and transient, at the peak")
    whole = plan.end_to_end["peak"] / 2**20
    label = f"end to end ({whole:.0f} MiB) / {len(plan.modules)}"
    axes.axhline(whole / len(plan.modules), color="C7", linestyle=":", label=label)
    axes.set_xticks(x, [module.last for module in plan.modules], rotation=45 if len(plan.modules) > 8 else 0)
    axes.set(xlabel="last block (stage.block) of the module", ylabel="MiB")
    ratio = 100 * plan.peak / plan.end_to_end["peak"]
    axes.set_title(f"{plan.arch}, K = {len(plan.modules)}, batch {plan.batch_size}: {ratio:.1f} % of E2E")
    axes.legend(fontsize=8)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------
# A comparison

INSIDE = ("saved", "/ E2E", "gradients", "transient", "optimizer", "parameters")
COLUMNS = ("method", *INSIDE, "peak beyond the model", "/ E2E", "time", "/ E2E")


def comparison_rows(found: Sequence[Measured]) -> list[list[str]]:
    """Return the cells of COLUMNS; ratios of bytes are to the first row, of seconds to end-to-end steps.

    For compiled code only what the system sees is known.
    """
    base, rows = found[0], []
    for m in found:
        inside = ["?", "?"]
        if m.peak is not None:
            inside = [for_people(m.peak.gradients), for_people(m.peak.transient)]
        saved = [for_people(m.saved), f"{100 * m.saved / base.saved:.1f} %"]
        there = [for_people(m.optimizer), for_people(m.parameters)]
        resident = [for_people(m.resident), f"{100 * m.resident / base.resident:.1f} %"]
        time = [f"{1e3 * m.seconds:.0f} ms", f"{m.seconds / m.end_to_end:.2f}"]
        rows.append([m.way.name, *saved, *inside, *there, *resident, *time])
    return rows


def draw_comparison(found: Sequence[Measured], title: str, path: Path) -> None:
    """Draw stacked bytes at the step's highest point, a mark at the peak that the system saw, and time."""
    figure, (memory, time) = new_figure((12, 1.2 + 0.42 * len(found)), columns=2, ratios=(3, 1))
    y, names = range(len(found)), [m.way.name for m in found]
    left = [0.0] * len(found)
    for kind, color in KINDS:
        widths = [_part(m, kind) / 2**20 for m in found]
        memory.barh(y, widths, left=left, color=color, label=kind)
        left = [a + b for a, b in zip(left, widths)]
    seen = [(m.parameters + m.optimizer + m.resident) / 2**20 for m in found]
    memory.plot(seen, y, "k|", markersize=14, label="parameters, optimizer and the measured peak")
    memory.set_yticks(y, names)
    memory.invert_yaxis()
    memory.set(xlabel="MiB at the highest point of a step")
    memory.legend(fontsize=8)
    time.barh(y, [m.seconds for m in found], color="C2")
    time.set_yticks(y, [f"{m.seconds / m.end_to_end:.2f}" for m in found])
    time.invert_yaxis()
    time.set(xlabel="seconds a step (labels: times E2E)")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _part(m: Measured, kind: str) -> int:
    if kind in ("parameters", "optimizer"):
        return getattr(m, kind)
    if m.peak is None:  # all the rest counts as transient
        return {"saved": m.saved, "transient": max(0, m.resident - m.saved), "gradients": 0}[kind]
    return getattr(m.peak, kind)
