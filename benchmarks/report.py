"""Measure what the README claims, and write it down: ``python -m benchmarks.report``.

The methods of a row take turns in one process, and medians count; each peak comes from a new process. Files
in benchmarks/results/: results.jsonl (every measurement and its machine), bars.md (claims, ratios and bars),
results.md (all methods), train_step.md and train_step.png, and with --plots time and memory over size for
each op.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import sys
import typing

import torch

from benchmarks import memory, shapes, step_figure, timing, train_step, workloads
from benchmarks.device import provenance
from benchmarks.table import Claim, Row, claims_table, markdown
from infopro_fast import figure
from infopro_fast.whole_files import replace_file

RESULTS = pathlib.Path(__file__).parent / "results"
KIB = 2**10


# ------------------------------------------------------------------------------------------------------------
# Measuring


def small_of(op: str, shape):
    """Return a cheap shape of the same kind, to warm up with."""
    if op == "linear_cross_entropy":
        return shapes.LinearShape(min(64, shape.N), shape.D, min(100, shape.C))
    if op == "upsample_cross_entropy":
        return shape._replace(N=1, h=8, w=16, H=64, W=128)
    return shape._replace(N=min(shape.N, 4 if op == "reconstruction_loss" else 96))


def measure(
    op: str, shape, methods: typing.Sequence[str], rounds: int, directions=("forward", "both")
) -> list[Row]:
    """Return a row for each direction and method; methods take turns."""
    make, _, _ = workloads.OPS[op]
    made = {method: make(method, shape) for method in methods}
    rows = []
    for direction in directions:
        calls = {method: w.both if direction == "both" else w.forward_only for method, w in made.items()}
        for method, seconds in timing.interleaved(calls, rounds).items():
            rows.append(row_of(op, shape, method, direction, made[method]))
            rows[-1].seconds = seconds
            print(f"  {op} {rows[-1].shape} {direction} {method}: {1e3 * seconds:.3g} ms", file=sys.stderr)
    for row in rows:
        add_peak(row, shape)
    return rows


def row_of(op: str, shape, method: str, direction: str, workload: workloads.Workload) -> Row:
    """Return a row without times and peaks."""
    row = Row(op, workloads.label(shape), method, direction, **provenance())
    if direction == "both":
        row.saved_bytes = memory.saved_bytes(workload.forward, workload.inputs)
        row.error = workloads.relative_errors(op, workload, shape)
    return row


def add_peak(row: Row, shape) -> None:
    small, threads = list(small_of(row.op, shape)), torch.get_num_threads()
    case = dict(op=row.op, method=row.method, shape=list(shape), small=small, direction=row.direction)
    found = memory.peak_bytes("benchmarks.workloads:for_peak", threads=threads, **case)
    row.peak_bytes, row.transient_bytes = found["peak"], found["peak"] - found["returned"]


def alone(call: typing.Callable, threads: int, *arguments):
    """Return ``call(*arguments)`` from a new process: no op's numbers may depend on which ones came before.

    A heap that others left behind keeps the allocator from giving memory back, which spares large maps their
    page faults: a fifth of a step at K = 1.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as process:
        return process.submit(call, *arguments).result()


def measure_steps(rounds: int, threads: int) -> list[Row]:
    """Measure a step at each K by each method: a method's Ks take turns, in a process without the others."""
    rows = []
    for method in train_step.METHODS:
        seconds = alone(_seconds_of_steps, threads, method, rounds)
        for K in shapes.TRAIN_STEP:
            peak = memory.peak_bytes("benchmarks.train_step:for_peak", threads, method=method, K=K)["peak"]
            shape = f"resnet32 N{shapes.TRAIN_BATCH} K{K}"
            rows.append(Row("train_step", shape, method, "step", seconds[K], peak_bytes=peak, **provenance()))
    return rows


def _seconds_of_steps(method: str, rounds: int) -> dict[int, float]:
    return timing.interleaved({K: train_step.step(method, K) for K in shapes.TRAIN_STEP}, rounds)


# ------------------------------------------------------------------------------------------------------------
# Claims


class Seen(typing.NamedTuple):
    """A shape of an op, its bar, and three of its rows. best: the fastest without ours."""

    shape: typing.Any
    bar: float
    ours: Row
    eager: Row
    best: Row

    @property
    def label(self) -> str:
        return workloads.label(self.shape)

    def faster(self, what: str) -> Claim:
        ratio = self.best.seconds / self.ours.seconds
        return Claim(f"{what}, faster than the best other", ratio, self.bar, True, against=self.best.method)

    def faster_than_eager(self, what: str) -> Claim:
        return Claim(what, self.eager.seconds / self.ours.seconds, self.bar, True)


def claims_of(op: str, rows: list[Row]) -> list[Claim]:
    found, (over, bars, claims) = [], CLAIMS[op]
    for shape, bar in zip(over, bars, strict=True):
        label = workloads.label(shape)
        by = {r.method: r for r in rows if (r.op, r.shape, r.direction) == (op, label, "both")}
        best = min((r for m, r in by.items() if m != workloads.OURS), key=lambda r: r.seconds)
        found += claims(Seen(shape, bar, by[workloads.OURS], by["eager"], best))
    return found


def decoder_claims(s: Seen) -> list[Claim]:
    transient = s.ours.transient_bytes / s.shape.resized_bytes()
    return [
        s.faster(f"decoder {s.label}"),
        Claim(f"decoder {s.label}, kept beyond its inputs", s.ours.saved_bytes / KIB, 64, unit="KiB"),
        Claim(f"decoder {s.label}, transient peak over the resized map", transient, 0.25),
    ]


def supcon_claims(s: Seen) -> list[Claim]:
    found = [s.faster_than_eager(f"supcon {s.label}, faster than the authors' formula")]
    if s.shape.N == 4096:
        transient = s.ours.transient_bytes / s.shape.pairs_bytes()
        found.append(Claim(f"supcon {s.label}, transient peak over an N x N map", transient, 0.25))
    return found


def linear_claims(s: Seen) -> list[Claim]:
    what = f"linear + cross entropy {s.label}"
    found = [Claim(f"{what}, time over plain torch", s.ours.seconds / s.eager.seconds, s.bar)]
    if s.shape.C == 10000:
        extra = s.ours.transient_bytes / s.shape.logits_bytes()
        found.append(Claim(f"{what}, extra memory over the logits", extra, 0.25))
    return found


def dense_claims(s: Seen) -> list[Claim]:
    what, extra = f"resize + cross entropy {s.label}", s.ours.transient_bytes / s.shape.pixel_bytes()
    faster = s.faster_than_eager(f"{what}, faster than plain torch")
    return [faster, Claim(f"{what}, extra memory over a number a pixel", extra, 1.0)]


def chain_claims(s: Seen) -> list[Claim]:
    what, transient = f"ImageNet decoder {s.label}", s.ours.transient_bytes / s.eager.transient_bytes
    return [s.faster(what), Claim(f"{what}, transient peak over eager's", transient, 1 / 3)]


CLAIMS = {
    "reconstruction_loss": (shapes.DECODER, (2.5, 4.0, 8.0), decoder_claims),
    "supcon_loss": (shapes.SUPCON, (4.0, 3.5), supcon_claims),
    "linear_cross_entropy": (shapes.LINEAR, (1.05, 1.0), linear_claims),
    "chain_decoder": (shapes.CHAIN, (2.5,), chain_claims),
    "upsample_conv3x3": (shapes.UPSAMPLE_CONV, (1.0,), lambda s: [s.faster(f"upsample_conv3x3 {s.label}")]),
    "conv_norm_relu_pool": (
        shapes.HEAD, (1.0,) * 3, lambda s: [s.faster(f"convolution and pooling {s.label}")]
    ),
    "upsample_cross_entropy": (shapes.DENSE, (6.0,), dense_claims),
}


def step_bars(rows: list[Row]) -> list[Claim]:
    def seconds(K: int, method: str) -> float:
        return next(r.seconds for r in rows if r.shape.endswith(f" K{K}") and r.method == method)

    released = min(seconds(16, m) for m in train_step.METHODS if m.startswith("released"))
    what = "a step of ResNet-32"
    return [
        Claim(f"{what}, K = 16 over K = 1", seconds(16, "ours") / seconds(1, "ours"), 1.6),
        Claim(f"{what}, K = 16, faster than the authors' code", released / seconds(16, "ours"), 1.0, True),
        Claim(f"{what}, K = 4, over K = 1", seconds(4, "ours") / seconds(1, "ours"), 1.6),
    ]


# ------------------------------------------------------------------------------------------------------------
# Over size

MAPS = ("eager", "channels_last", "compile", "checkpoint", workloads.OURS)
LOGITS = ("eager", "checkpoint", workloads.CHUNKED, workloads.OURS)
PAIRS = ("eager", "eager short", "compile short", "checkpoint", workloads.OURS)
PLOTS = {
    "reconstruction_loss": (shapes.DECODER_PLOT, "N", MAPS), "supcon_loss": (shapes.SUPCON_PLOT, "N", PAIRS),
    "linear_cross_entropy": (shapes.LINEAR_PLOT, "C", LOGITS),
    "upsample_cross_entropy": (shapes.DENSE_PLOT, "C", MAPS),
}


def over_size(op: str, limit: int, rounds: int) -> list[Row]:
    """Measure time and peak over size, each method until its peak is expected to pass ``limit`` bytes."""
    over, axis, methods = PLOTS[op]
    power = 2 if op == "supcon_loss" else 1  # by which memory grows
    rows: list[Row] = []
    last: dict[str, tuple[int, int]] = {}
    for shape in over:
        value = getattr(shape, axis)
        known = [m for m in methods if m in workloads.OPS[op][2]]
        fits = [m for m in known if m not in last or last[m][1] * (value / last[m][0]) ** power < limit]
        for row in measure(op, shape, fits, rounds, ("both",)):
            rows.append(row)
            last[row.method] = (value, row.peak_bytes)
    return rows


def plot(op: str, rows: list[Row]) -> None:
    over, axis, _ = PLOTS[op]
    sizes = {workloads.label(shape): getattr(shape, axis) for shape in over}
    drawing, (time_axes, memory_axes) = figure.new_figure((11, 4.2), 2)
    for method in dict.fromkeys(r.method for r in rows):
        own = [r for r in rows if r.method == method]
        style = dict(marker="o", linewidth=2.5 if method == workloads.OURS else 1.2, label=method)
        x = [sizes[r.shape] for r in own]
        time_axes.plot(x, [1e3 * r.seconds for r in own], **style)
        memory_axes.plot(x, [max(r.peak_bytes, memory.PAGE) / 2**20 for r in own], **style)
    for axes, unit in ((time_axes, "forward + backward, ms"), (memory_axes, "peak above inputs, MiB")):
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
        axes.grid(True, which="both", alpha=0.25)
    time_axes.legend()
    constant = " ".join(f"{k}{v}" for k, v in over[0]._asdict().items() if k != axis)
    where = "{device}, {threads} threads, torch {torch}, {commit}".format(**provenance())
    drawing.suptitle(f"{op}, {constant}: {where}", fontsize=9)
    RESULTS.mkdir(exist_ok=True)
    figure.save(drawing, RESULTS / f"{op}.png")


# ------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each interleaved timing")
    one = "one op, or the training step; prints and writes no table"
    parser.add_argument("--only", choices=[*CLAIMS, "train_step"], help=one)
    parser.add_argument("--plots", action="store_true", help="time and memory over size too")
    parser.add_argument("--limit", type=float, default=6.0, help="GiB a method may take in the plots")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    bars: list[Claim] = []
    sizes: list[Row] = []
    for op in [op for op in CLAIMS if options.only in (None, op)]:
        how = (workloads.OPS[op][2], options.rounds)
        own = [row for shape in CLAIMS[op][0] for row in alone(measure, options.threads, op, shape, *how)]
        rows, bars = rows + own, bars + claims_of(op, own)
        if options.plots and op in PLOTS:
            curve = alone(over_size, options.threads, op, int(options.limit * 2**30), 7)
            plot(op, curve)
            sizes += curve
    if options.only in (None, "train_step"):
        steps = measure_steps(options.rounds, options.threads)
        rows, bars = rows + steps, bars + step_bars(steps)
    print(markdown(rows), claims_table(bars), sep="\n\n")
    if options.only is None:
        where = ", ".join(f"{k} {v}" for k, v in provenance().items())
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in [*rows, *sizes])
        bars_text, results = f"{claims_table(bars)}\n\n{where}\n", markdown(rows) + "\n"
        RESULTS.mkdir(exist_ok=True)
        for name, text in (("bars.md", bars_text), ("results.md", results), ("results.jsonl", lines)):
            replace_file(RESULTS / name, text.encode())
        step_figure.write(steps, RESULTS)
    return 0 if all(bar.holds() for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
