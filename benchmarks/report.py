"""Measure what the README claims, and write it down: ``python -m benchmarks.report``.

Times of all methods of a row are interleaved in one process, medians; peaks come from a process each. Writes into
benchmarks/results/: results.jsonl (every measurement, with where it was made), bars.md (each claim, its ratio and its bar),
results.md (all methods), train_step.md and train_step.png, and with --plots a plot an op of time and memory over size.
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
    """A shape of the same kind that is cheap: to warm up with."""
    if op == "linear_cross_entropy":
        return shapes.LinearShape(min(64, shape.N), shape.D, min(100, shape.C))
    if op == "upsample_cross_entropy":
        return shape._replace(N=1, h=8, w=16, H=64, W=128)
    return shape._replace(N=min(shape.N, 4 if op == "reconstruction_loss" else 96))


def measure(op: str, shape, methods: typing.Sequence[str], rounds: int, directions=("forward", "both")) -> list[Row]:
    """A row for each direction and method, times interleaved."""
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
    arguments = dict(op=row.op, method=row.method, shape=list(shape), small=list(small_of(row.op, shape)), direction=row.direction)
    found = memory.peak_bytes("benchmarks.workloads:for_peak", threads=torch.get_num_threads(), **arguments)
    row.peak_bytes, row.transient_bytes = found["peak"], found["peak"] - found["returned"]


def alone(call: typing.Callable, threads: int, *arguments):
    """``call(*arguments)`` in a process of its own.

    What a process has run decides what the next call costs: where a heap that others left behind keeps the allocator from giving memory
    back, large maps are spared their page faults, a fifth of a step at K = 1. So no op's numbers hang on which ones came before.
    """
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as process:
        return process.submit(call, *arguments).result()


def measure_steps(rounds: int, threads: int) -> list[Row]:
    """A training step at each K with each method: the Ks of a method in the same rounds, each method alone, as a training is."""
    rows = []
    for method in train_step.METHODS:
        seconds = alone(_seconds_of_steps, threads, method, rounds)
        for K in shapes.TRAIN_STEP:
            peak = memory.peak_bytes("benchmarks.train_step:for_peak", threads=threads, method=method, K=K)["peak"]
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
    """The fastest method of a user who does not have ours."""
    others = [r for r in rows if (r.op, r.shape, r.direction) == (op, shape, "both") and r.method != workloads.OURS]
    return min(others, key=lambda r: r.seconds)


def decoder_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "reconstruction_loss"
    for shape, bar in zip(shapes.DECODER, (2.5, 4.0, 8.0), strict=True):
        label = workloads.label(shape)
        ours, other = pick(rows, op, label, workloads.OURS), best(rows, op, label)
        bars += [
            Claim(f"decoder {label}, faster than the best other ({other.method})", other.seconds / ours.seconds, bar, True),
            Claim(f"decoder {label}, kept beyond its inputs", ours.saved_bytes / KIB, 64, unit="KiB"),
            Claim(f"decoder {label}, transient peak over the resized map", ours.transient_bytes / shape.resized_bytes(), 0.25),
        ]
    return bars


def supcon_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "supcon_loss"
    for shape, bar in zip(shapes.SUPCON, (4.0, 3.5), strict=True):
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        bars.append(Claim(f"supcon {label}, faster than the released formula", eager.seconds / ours.seconds, bar, True))
        if shape.N == 4096:
            bars.append(Claim(f"supcon {label}, transient peak over an N x N map", ours.transient_bytes / shape.pairs_bytes(), 0.25))
    return bars


def linear_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "linear_cross_entropy"
    for shape, bar in zip(shapes.LINEAR, (1.05, 1.0), strict=True):
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        bars.append(Claim(f"linear + cross entropy {label}, time over plain torch", ours.seconds / eager.seconds, bar))
        if shape.C == 10000:
            extra = ours.transient_bytes / shape.logits_bytes()
            bars.append(Claim(f"linear + cross entropy {label}, extra memory over the logits", extra, 0.25))
    return bars


def dense_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "upsample_cross_entropy"
    for shape in shapes.DENSE:
        label = workloads.label(shape)
        ours, eager = pick(rows, op, label, workloads.OURS), pick(rows, op, label, "eager")
        bars += [
            Claim(f"resize + cross entropy {label}, faster than plain torch", eager.seconds / ours.seconds, 6.0, True),
            Claim(f"resize + cross entropy {label}, extra memory over a number a pixel", ours.transient_bytes / shape.pixel_bytes(), 1.0),
        ]
    return bars


def step_bars(rows: list[Row]) -> list[Claim]:
    def seconds(K: int, method: str) -> float:
        return next(r.seconds for r in rows if r.shape.endswith(f" K{K}") and r.method == method)

    released = min(seconds(16, m) for m in train_step.METHODS if m.startswith("released"))
    return [
        Claim("a step of ResNet-32, K = 16 over K = 1", seconds(16, "ours") / seconds(1, "ours"), 1.6),
        Claim("a step of ResNet-32, K = 16, faster than the released formulation", released / seconds(16, "ours"), 1.0, True),
        Claim("a step of ResNet-32, K = 4, over K = 1", seconds(4, "ours") / seconds(1, "ours"), 1.6),
    ]


# ------------------------------------------------------------------------------------------------------------
# Over size

def chain_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "chain_decoder"
    for label in map(workloads.label, shapes.CHAIN):
        ours, other, eager = pick(rows, op, label, workloads.OURS), best(rows, op, label), pick(rows, op, label, "eager")
        bars += [
            Claim(f"ImageNet decoder {label}, faster than the best other ({other.method})", other.seconds / ours.seconds, 2.5, True),
            Claim(f"ImageNet decoder {label}, transient peak over eager's", ours.transient_bytes / eager.transient_bytes, 1 / 3),
        ]
    return bars


def upsample_conv_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "upsample_conv3x3"
    for label in map(workloads.label, shapes.UPSAMPLE_CONV):
        ours, other = pick(rows, op, label, workloads.OURS), best(rows, op, label)
        bars.append(Claim(f"upsample_conv3x3 {label}, faster than the best other ({other.method})", other.seconds / ours.seconds, 1.0, True))
    return bars


def head_bars(rows: list[Row]) -> list[Claim]:
    bars, op = [], "conv_norm_relu_pool"
    for label in map(workloads.label, shapes.HEAD):
        ours, other = pick(rows, op, label, workloads.OURS), best(rows, op, label)
        what = f"convolution and pooling {label}, faster than the best other ({other.method})"
        bars.append(Claim(what, other.seconds / ours.seconds, 1.0, True))
    return bars


PLOTS = {
    "reconstruction_loss": (shapes.DECODER_PLOT, "N", ("eager", "channels_last", "compile", "checkpoint", workloads.OURS)),
    "supcon_loss": (shapes.SUPCON_PLOT, "N", ("eager", "eager short", "compile short", "checkpoint", workloads.OURS)),
    "linear_cross_entropy": (shapes.LINEAR_PLOT, "C", ("eager", "checkpoint", workloads.CHUNKED, workloads.OURS)),
    "upsample_cross_entropy": (shapes.DENSE_PLOT, "C", ("eager", "channels_last", "compile", "checkpoint", workloads.OURS)),
}


def over_size(op: str, limit: int, rounds: int) -> list[Row]:
    """Time and peak over size. A method is left out from where its peak, going by the size before, would pass ``limit`` bytes."""
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
    "upsample_conv3x3": (shapes.UPSAMPLE_CONV, upsample_conv_bars), "conv_norm_relu_pool": (shapes.HEAD, head_bars),
    "upsample_cross_entropy": (shapes.DENSE, dense_bars),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each interleaved timing")
    parser.add_argument("--only", choices=[*CLAIMS, "train_step"], help="one op, or the training step; prints and writes no table")
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
        own = [row for shape in over for row in alone(measure, options.threads, op, shape, workloads.OPS[op][2], options.rounds)]
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
