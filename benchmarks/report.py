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
            row = Row(op, workloads.label(shape), method, direction, seconds, **provenance())
            if direction == "both":
                row.saved_bytes = memory.saved_bytes(made[method].forward, made[method].inputs)
                row.error = workloads.relative_errors(op, made[method], shape)
            rows.append(row)
            print(f"  {op} {row.shape} {direction} {method}: {1e3 * seconds:.3g} ms", file=sys.stderr)
    for row in rows:
        add_peak(row, shape)
    return rows


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


def pick(rows: list[Row], op: str, shape: str, method: str, direction: str = "both") -> Row:
    return next(r for r in rows if (r.op, r.shape, r.method, r.direction) == (op, shape, method, direction))


def best(rows: list[Row], op: str, shape: str) -> Row:
    """Return the fastest method of a user who does not have ours."""
    same = (r for r in rows if (r.op, r.shape, r.direction) == (op, shape, "both"))
    others = [r for r in same if r.method != workloads.OURS]
    return min(others, key=lambda r: r.seconds)


def faster(what: str, ours: Row, other: Row, bar: float) -> Claim:
    ratio = other.seconds / ours.seconds
    return Claim(f"{what}, faster than the best other", ratio, bar, True, against=other.method)


def decoder_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "reconstruction_loss"
    for shape, bar in zip(shapes.DECODER, (2.5, 4.0, 8.0), strict=True):
        label = workloads.label(shape)
        ours = pick(rows, op, label, workloads.OURS)
        transient = ours.transient_bytes / shape.resized_bytes()
        bars += [
            faster(f"decoder {label}", ours, best(rows, op, label), bar),
            Claim(f"decoder {label}, kept beyond its inputs", ours.saved_bytes / KIB, 64, unit="KiB"),
            Claim(f"decoder {label}, transient peak over the resized map", transient, 0.25),
        ]
    return bars


def supcon_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "supcon_loss"
    for shape, bar in zip(shapes.SUPCON, (4.0, 3.5), strict=True):
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        ratio = eager.seconds / ours.seconds
        bars.append(Claim(f"supcon {label}, faster than the authors' formula", ratio, bar, True))
        if shape.N == 4096:
            transient = ours.transient_bytes / shape.pairs_bytes()
            bars.append(Claim(f"supcon {label}, transient peak over an N x N map", transient, 0.25))
    return bars


def linear_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "linear_cross_entropy"
    for shape, bar in zip(shapes.LINEAR, (1.05, 1.0), strict=True):
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        what = f"linear + cross entropy {label}"
        bars.append(Claim(f"{what}, time over plain torch", ours.seconds / eager.seconds, bar))
        if shape.C == 10000:
            extra = ours.transient_bytes / shape.logits_bytes()
            bars.append(Claim(f"{what}, extra memory over the logits", extra, 0.25))
    return bars


def dense_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "upsample_cross_entropy"
    for shape in shapes.DENSE:
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        what, extra = f"resize + cross entropy {label}", ours.transient_bytes / shape.pixel_bytes()
        bars += [
            Claim(f"{what}, faster than plain torch", eager.seconds / ours.seconds, 6.0, True),
            Claim(f"{what}, extra memory over a number a pixel", extra, 1.0),
        ]
    return bars


def chain_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "chain_decoder"
    for label in map(workloads.label, shapes.CHAIN):
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        transient = ours.transient_bytes / eager.transient_bytes
        bars += [
            faster(f"ImageNet decoder {label}", ours, best(rows, op, label), 2.5),
            Claim(f"ImageNet decoder {label}, transient peak over eager's", transient, 1 / 3),
        ]
    return bars


def upsample_conv_bars(rows: list[Row]) -> list[Claim]:
    return _fastest(rows, "upsample_conv3x3", "upsample_conv3x3", shapes.UPSAMPLE_CONV)


def head_bars(rows: list[Row]) -> list[Claim]:
    return _fastest(rows, "conv_norm_relu_pool", "convolution and pooling", shapes.HEAD)


def _fastest(rows: list[Row], op: str, what: str, over: typing.Sequence[typing.NamedTuple]) -> list[Claim]:
    labels = map(workloads.label, over)
    picked = ((label, pick(rows, op, label, workloads.OURS)) for label in labels)
    return [faster(f"{what} {label}", ours, best(rows, op, label), 1.0) for label, ours in picked]


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


def write(name: str, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    replace_file(RESULTS / name, text.encode())


CLAIMS = {
    "reconstruction_loss": (shapes.DECODER, decoder_bars), "supcon_loss": (shapes.SUPCON, supcon_bars),
    "linear_cross_entropy": (shapes.LINEAR, linear_bars), "chain_decoder": (shapes.CHAIN, chain_bars),
    "upsample_conv3x3": (shapes.UPSAMPLE_CONV, upsample_conv_bars),
    "conv_norm_relu_pool": (shapes.HEAD, head_bars), "upsample_cross_entropy": (shapes.DENSE, dense_bars),
}


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
        over, claims = CLAIMS[op]
        how = (workloads.OPS[op][2], options.rounds)
        own = [row for shape in over for row in alone(measure, options.threads, op, shape, *how)]
        rows, bars = rows + own, bars + claims(own)
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
        write("bars.md", f"{claims_table(bars)}\n\n{where}\n")
        write("results.md", markdown(rows) + "\n")
        write("results.jsonl", "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in [*rows, *sizes]))
        step_figure.write(steps, RESULTS)
    return 0 if all(bar.holds() for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
