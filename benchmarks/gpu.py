"""What the README claims of a GPU, measured on one: ``python -m benchmarks.gpu``; `benchmarks/gpu.sh` builds and tests first.

Every op and the whole step against what a user could run instead: time (CUDA events, methods in turn, medians), peak memory above the
inputs (torch's allocator), multiples of the counted floor, error against float64, and batch sizes up to running out of memory. A part
that the time left does not allow is left out, and says so. Into benchmarks/results/<gpu>/: results.jsonl, results.md, bars.md, PNGs.
With --device cpu --small everything runs on small shapes without a GPU: to see that it works, not to measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import re
import statistics
import sys
import time
import typing

import torch

from benchmarks import floors, shapes, timing, train_step, workloads
from benchmarks.device import provenance
from benchmarks.table import size

RESULTS = pathlib.Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = (workloads.OURS, workloads.TRITON)
METHODS = {
    "reconstruction_loss": ("eager", "channels_last", "compile", "compile channels_last", "compile max-autotune", "checkpoint",
                            *OURS, workloads.CUDA),
    "chain_decoder": ("eager", "channels_last", "compile", "compile channels_last", "checkpoint", *OURS, workloads.CUDA),
    "supcon_loss": ("eager", "eager short", "compile", "compile max-autotune", "checkpoint", *OURS),
    "linear_cross_entropy": ("eager", "compile", "compile max-autotune", "checkpoint", "Liger", "cut-cross-entropy", *OURS),
    "upsample_cross_entropy": ("eager", "channels_last", "compile", "checkpoint", *OURS),
    "upsample_conv3x3": ("eager", "channels_last", "compile", "compile channels_last", "checkpoint", *OURS),
    "norm_relu_pool": ("eager", "channels_last", "compile", "checkpoint", *OURS),
}
OPS = tuple(METHODS)


@dataclasses.dataclass
class Result:
    """One measurement, or why there is none. seconds: median; multiple: of the floor; peak_bytes: above the inputs."""

    part: str
    shape: str
    method: str
    direction: str = "both"
    dtype: str = "float32"
    seconds: float | None = None
    multiple: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Meter:
    """Time and memory of calls on one device."""

    def __init__(self, device: str):
        self.device = device
        self.gpu = device == "cuda"
        self.floor = floors.find(torch.cuda.get_device_name()) if self.gpu else None

    def seconds(self, call: typing.Callable) -> float:
        if not self.gpu:
            return timing.seconds(call)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, calls: dict[str, typing.Callable], budget: float) -> dict[str, float]:
        """All calls in turn, round after round. (They are warm: `attempt` ran them.)"""
        once = sum(self.seconds(call) for call in calls.values())
        taken = {name: [] for name in calls}
        for _ in range(max(5, min(50, int(budget / max(once, 1e-6))))):
            for name, call in calls.items():
                taken[name].append(self.seconds(call))
        return {name: statistics.median(values) for name, values in taken.items()}

    def peak(self, call: typing.Callable) -> int | None:
        if not self.gpu:
            call()
            return None
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def attempt(self, call: typing.Callable, times: int = 3) -> str:
        """"" if the call runs, else why it does not."""
        try:
            for _ in range(times):
                call()
            if self.gpu:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            self.free()
            return "out of memory"
        except Exception as error:  # a method that fails is a result, not the end of the report
            self.free()
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return ""

    def free(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def measure_op(meter: Meter, op: str, shape, dtype: str, methods: typing.Iterable[str], budget: Budget) -> list[Result]:
    """Forward and forward + backward of every method that runs."""
    make = workloads.OPS[op][0]
    results, made = [], {}
    for method in methods:
        if method in ("Liger", "cut-cross-entropy") and method not in workloads.peers():
            results.append(Result(op, workloads.label(shape), method, dtype=dtype, note="not installed"))
            continue
        if budget.left() < (45 if "autotune" in method else 20 if "compile" in method else 2):
            results.append(Result(op, workloads.label(shape), method, dtype=dtype, note="not measured: out of time"))
            continue
        try:
            workload = make(method, shape, DTYPES[dtype], meter.device)
        except torch.OutOfMemoryError:
            why = "out of memory"
        else:
            why = meter.attempt(workload.both)
        if why:
            results.append(Result(op, workloads.label(shape), method, dtype=dtype, note=why))
        else:
            made[method] = workload
    for direction in ("forward", "both"):
        calls = {method: w.both if direction == "both" else w.forward_only for method, w in made.items()}
        for method, seconds in meter.medians(calls, 1.0).items() if calls else ():
            results.append(_result(meter, op, shape, dtype, method, direction, seconds, made[method]))
    meter.free()
    return results


def _result(meter: Meter, op: str, shape, dtype: str, method: str, direction: str, seconds: float, workload) -> Result:
    found = Result(op, workloads.label(shape), method, direction, dtype, seconds)
    if meter.floor is not None:
        element = DTYPES[dtype].itemsize
        found.multiple = seconds / floors.floor(op, shape, direction, element).seconds(meter.floor, dtype)
    found.peak_bytes = meter.peak(workload.both if direction == "both" else workload.forward_only)
    if direction == "both" and getattr(shape, "N", 0) <= 8192 and dtype == "float32":
        try:
            found.error = workloads.relative_errors(op, workload, shape)
        except torch.OutOfMemoryError:
            meter.free()
    return found


def op_shapes(op: str, small: bool) -> list:
    if not small:
        return list(floors.KERNELS[op][2])
    return {
        "reconstruction_loss": [shapes.DecoderShape(2, 8, 8, 16)], "chain_decoder": [shapes.ChainShape(1, 8, 2)],
        "supcon_loss": [shapes.SupConShape(48)],
        "linear_cross_entropy": [shapes.LinearShape(32, 16, 10)], "upsample_cross_entropy": [shapes.DenseShape(1, 5, 4, 8, 16, 32)],
        "upsample_conv3x3": [shapes.UpsampleConvShape(2, 8, 4, 6)], "norm_relu_pool": [shapes.PoolShape(4, 8, 4)],
    }[op]  # fmt: skip


def measure_ops(meter: Meter, budget: Budget, small: bool, compiled: bool) -> list[Result]:
    """compiled: the methods of torch.compile, of which each takes longer to make than all others together, or those others.

    Of those, the shapes that a claim is about, an op's last, come first.
    """
    results, todo = [], [(op, shape) for op in OPS for shape in op_shapes(op, small)[:: -1 if compiled else 1]]
    for i, (op, shape) in enumerate(todo):
        if compiled and getattr(shape, "N", 0) > 8192:  # dense maps of 17 GB each
            continue
        methods = [m for m in METHODS[op] if ("compile" in m) == compiled]
        share = Budget(budget.left() if compiled else budget.left() / (len(todo) - i))
        results += measure_op(meter, op, shape, "float32", methods, share)
        if not compiled:
            results += measure_op(meter, op, shape, "bfloat16", [m for m in methods if m in ("eager", *OURS, workloads.CUDA)], share)
        _say(results, op, shape)
    return results


def _say(results: list[Result], op: str, shape) -> None:
    for r in results:
        if r.part == op and r.shape == workloads.label(shape) and r.direction == "both":
            print(f"  {op} {r.shape} {r.dtype} {r.method}: {line(r)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Batch sizes up to running out of memory


def measure_sizes(meter: Meter, budget: Budget, small: bool, limit: int) -> list[Result]:
    """Peak and time of the decoder over the batch size, each method until it passes ``limit`` bytes or fails."""
    results, op = [], "reconstruction_loss"
    first = shapes.DecoderShape(8 if small else 256, 64, 8, 32)
    for method in ("eager", "channels_last", "compile", "checkpoint", workloads.OURS):
        shape = first
        while budget.left() > 20:
            found = measure_op(meter, op, shape, "float32", [method], budget)[-1]
            found.part = "batch size"
            results.append(found)
            if found.note or shape.N >= (16 if small else 1 << 17) or (found.peak_bytes or 0) > limit / 2:
                break
            shape = shape._replace(N=2 * shape.N)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The whole step


def step_cases(small: bool) -> list[tuple[str, int, int, str, bool, tuple[str, ...]]]:
    """(arch, K, N, what, balanced, methods)."""
    if small:
        return [("resnet32", 1, 8, "step", False, ("ours",)), ("resnet32", 16, 8, "step", False, ("released", "ours"))]
    every = ("released", "released channels_last", "ours", train_step.GRAPH)
    return [
        *[("resnet32", 1, N, "step", False, (*every, "compile")) for N in (1024, 128)],
        *[("resnet32", K, N, "step", False, every) for N in (1024, 128) for K in (16, 4)],
        ("resnet110", 1, 1024, "step", False, ("released", "ours")),
        ("resnet110", 4, 1024, "step", True, ("released", "ours")),
    ]


def measure_steps(meter: Meter, budget: Budget, small: bool) -> list[Result]:
    results = []
    for arch, K, N, part, balanced, methods in step_cases(small):
        label = f"{arch} K{K} N{N}" + (" balanced" if balanced else "")
        for method in methods:
            if budget.left() < 15:
                results.append(Result(part, label, method, note="not measured: out of time"))
                continue
            results.append(_measure_step(meter, part, label, method, K, N, arch, balanced))
            print(f"  {label} {method}: {line(results[-1])}", file=sys.stderr, flush=True)
    return results


def _measure_step(meter: Meter, part: str, label: str, method: str, K: int, N: int, arch: str, balanced: bool) -> Result:
    """Peak: everything that training holds, network, batch, gradients and optimizer state too, over the first two steps."""
    meter.free()
    made = []

    def start() -> None:
        made.append(train_step.step(method, K, N, device=meter.device, arch=arch, balanced=balanced))
        made[0]()
        made[0]()

    peak = None

    def first() -> None:
        nonlocal peak
        peak = meter.peak(start)

    why = meter.attempt(first, 1) or meter.attempt(made[0], 5)
    if why:
        made.clear()
        return Result(part, label, method, "step", note=why, peak_bytes=peak)
    return Result(part, label, method, "step", seconds=meter.medians({method: made[0]}, 1.5)[method], peak_bytes=peak)


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def pick(results: list[Result], part: str, shape: str, method: str, direction: str = "both", dtype: str = "float32") -> Result | None:
    wanted = (part, shape, method, direction, dtype)
    return next((r for r in results if (r.part, r.shape, r.method, r.direction, r.dtype) == wanted and r.seconds), None)


def claims(results: list[Result]) -> list[tuple[str, float | None, str, float]]:
    """(what, measured, "at least" or "at most", bar)."""
    decoder = workloads.label(shapes.DecoderShape(1024, 64, 8, 32))
    supcon = workloads.label(shapes.SupConShape(8192))
    large = pick(results, "supcon_loss", workloads.label(shapes.SupConShape(65536)), workloads.OURS)

    def ratio(a: Result | None, b: Result | None, of: str = "seconds") -> float | None:
        a, b = (getattr(r, of) if r else None for r in (a, b))
        return a / b if a and b else None

    def op(name: str, shape: str, method: str) -> Result | None:
        return pick(results, name, shape, method)

    def step(shape: str, method: str) -> Result | None:
        return pick(results, "step", shape, method, "step")

    def fastest(found: typing.Iterable[Result | None]) -> Result | None:
        return min((r for r in found if r), key=lambda r: r.seconds, default=None)

    ours = op("reconstruction_loss", decoder, workloads.OURS)
    others = [op("reconstruction_loss", decoder, m) for m in METHODS["reconstruction_loss"] if "compile" in m or m == "channels_last"]
    released = fastest(step("resnet32 K16 N128", m) for m in ("released", "released channels_last"))
    end_to_end = fastest(step("resnet32 K1 N1024", m) for m in ("released", "released channels_last", "ours"))
    return [
        ("decoder C64 N1024 float32, faster than eager", ratio(op("reconstruction_loss", decoder, "eager"), ours), "at least", 10),
        ("same, faster than the best of torch.compile and channels_last", ratio(fastest(others), ours), "at least", 4),
        ("same, multiple of its floor", ours.multiple if ours else None, "at most", 3),
        (
            "supcon N8192, faster than eager",
            ratio(op("supcon_loss", supcon, "eager"), op("supcon_loss", supcon, workloads.OURS)), "at least", 5,
        ),
        ("supcon N65536, peak in GB", large.peak_bytes / 1e9 if large and large.peak_bytes else None, "at most", 2),
        (
            "step of ResNet-32, K 16, N 1024, over the fastest end to end",
            ratio(fastest(step("resnet32 K16 N1024", m) for m in ("ours", train_step.GRAPH)), end_to_end), "at most", 1.25,
        ),
        (
            "step of ResNet-32, K 16, N 128, CUDA graph, faster than the released code",
            ratio(released, step("resnet32 K16 N128", train_step.GRAPH)), "at least", 3,
        ),
        (
            "ResNet-110, K 4 balanced, N 1024, peak over end to end",
            ratio(step("resnet110 K4 N1024 balanced", "ours"), step("resnet110 K1 N1024", "released"), "peak_bytes"), "at most", 0.30,
        ),
    ]  # fmt: skip


def claims_table(results: list[Result]) -> str:
    lines = ["| what | measured | bar | holds |", "| --- | --- | --- | --- |"]
    for what, value, sense, bar in claims(results):
        holds = "not measured" if value is None else "yes" if (value >= bar if sense == "at least" else value <= bar) else "**no**"
        lines.append(f"| {what} | {'' if value is None else f'{value:.3g}'} | {sense} {bar:g} | {holds} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def line(r: Result) -> str:
    if r.note:
        return r.note
    multiple = "" if r.multiple is None else f", {r.multiple:.1f} x floor"
    return f"{1e3 * r.seconds:.3g} ms{multiple}" + (f", peak {size(r.peak_bytes)}" if r.peak_bytes is not None else "")


def table(results: list[Result]) -> str:
    head = ("part", "shape", "dtype", "direction", "method", "ms", "x floor", "peak", "error", "note")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        cells = (
            r.part, r.shape, r.dtype, r.direction, r.method, "" if r.seconds is None else f"{1e3 * r.seconds:.3g}",
            "" if r.multiple is None else f"{r.multiple:.2f}", size(r.peak_bytes), "" if r.error is None else f"{r.error:.1e}", r.note,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[Result], to: pathlib.Path) -> None:
    """Time and peak of the decoder over the batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), constrained_layout=True)
    FigureCanvasAgg(figure)
    for axes, of, unit in zip(figure.subplots(1, 2), ("seconds", "peak_bytes"), ("forward + backward, ms", "peak above inputs, MiB")):
        for method in dict.fromkeys(r.method for r in results if r.part == "batch size"):
            own = [r for r in results if r.part == "batch size" and r.method == method and getattr(r, of)]
            x = [int(re.match(r"N(\d+)", r.shape).group(1)) for r in own]
            y = [getattr(r, of) * (1e3 if of == "seconds" else 2**-20) for r in own]
            axes.plot(x, y, marker="o", linewidth=2.5 if method == workloads.OURS else 1.2, label=method)
        axes.set(xscale="log", yscale="log" if axes.lines and any(len(own.get_xdata()) for own in axes.lines) else "linear")
        axes.set(xlabel="batch size", ylabel=unit)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
    where = "{device}, torch {torch}, {commit}".format(**here())
    figure.suptitle(f"reconstruction_loss, 64 channels 8x8 to 32x32: {where}", fontsize=9)
    figure.savefig(to, dpi=130)


def here() -> dict[str, str | int]:
    return provenance("cuda" if torch.cuda.is_available() else "cpu")


def write(folder: pathlib.Path, results: list[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    where = here()
    texts = {
        "results.jsonl": "".join(json.dumps(dataclasses.asdict(r) | where) + "\n" for r in results),
        "results.md": table(results) + "\n\n" + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n",
        "bars.md": claims_table(results) + "\n\n" + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n",
    }
    for name, text in texts.items():
        aside = folder / (name + ".part")
        aside.write_text(text)
        aside.replace(folder / name)
    if any(r.part == "batch size" and r.seconds for r in results):
        try:
            plot(results, folder / "batch_size.png")
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=300, help="time for all parts together")
    parser.add_argument("--limit", type=float, default=32, help="GiB a method may take in the batch sizes")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: benchmarks/results/<gpu>")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    meter, budget = Meter(options.device), Budget(options.seconds)
    name = re.sub(r"[^a-z0-9]+", "-", provenance(options.device)["device"].lower()).strip("-")
    folder = options.out or RESULTS / name
    results: list[Result] = []
    for part in (
        lambda: measure_ops(meter, Budget(budget.left() * 0.3), options.small, compiled=False),
        lambda: measure_steps(meter, Budget(budget.left() * 0.5), options.small),
        lambda: measure_ops(meter, Budget(budget.left() * 0.75), options.small, compiled=True),
        lambda: measure_sizes(meter, budget, options.small, int(options.limit * 2**30)),
    ):
        results += part()
        write(folder, results)  # after every part: what was measured stays, whatever comes
    print(claims_table(results))
    print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
