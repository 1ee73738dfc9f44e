"""What the README claims of a GPU, measured on one: ``python -m benchmarks.gpu``.

`benchmarks/gpu.sh` builds and tests first. Every op and the whole step stand against what a user could run
instead: time (CUDA events, methods in turn, medians), the host's time of a call, peak memory above the inputs
    (torch's allocator), multiples of the counted floor, error against float64, and batch sizes up to running
    out of memory. What the claims need comes first (`parts`); what there is no time for is left out, and says
    so. After every shape the files in benchmarks/results/<gpu>/ are written: results.jsonl, results.md,
    bars.md, and a PNG. With --device cpu --small everything runs on small shapes without a GPU: to see that
    it works, not to measure.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import re
import sys
import typing

import torch

from benchmarks import floors, shapes, train_step, workloads
from benchmarks.device import provenance
from benchmarks.gpu import claims, files
from benchmarks.gpu.meter import Budget, Meter, reason
from benchmarks.table import Row, claims_table

RESULTS = pathlib.Path(__file__).parents[1] / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BY_NAME = (workloads.TRITON, workloads.CUDA)  # where "ours" is one of two
COMPILED = ("compile", "compile channels_last", workloads.TUNED)
MAPS, LAST = (workloads.OURS, "eager", "channels_last"), ("compile", workloads.TUNED)
METHODS = {  # ours first, then what the claims compare with
    "reconstruction_loss": (*MAPS, *BY_NAME, "checkpoint", *COMPILED),
    "chain_decoder": (*MAPS, *BY_NAME, "checkpoint", *COMPILED),
    "supcon_loss": (workloads.OURS, "eager", "eager short", "checkpoint", "memeff", *LAST),
    "linear_cross_entropy": (workloads.OURS, "eager", "checkpoint", "Liger", "cut-cross-entropy", *LAST),
    "upsample_cross_entropy": (*MAPS, "checkpoint", *LAST),
    "upsample_conv3x3": (*MAPS, "checkpoint", *COMPILED),
    "norm_relu_pool": (*MAPS, "checkpoint", *LAST),
}
OPS = tuple(METHODS)
IN_BFLOAT16 = (workloads.OURS, "eager", *BY_NAME, *workloads.PEERS)
IN_A_GRAPH = "in CUDA graphs, whose memory the allocator does not see"
Rows = typing.Iterator[list[Row]]
Todo = list[tuple[str, typing.NamedTuple]]


# ------------------------------------------------------------------------------------------------------------
# Ops


SECONDS_TO_START = {
    "released compile max-autotune": 150, "released compile": 90, "max-autotune": 45, "compile": 20,
}


def seconds_to_start(method: str) -> float:
    """Return the seconds that have to be left for a method to be tried: no compilation should be cut off."""
    return next((seconds for name, seconds in SECONDS_TO_START.items() if name in method), 1)


def why_not(method: str, left: float) -> str:
    """Return why a method cannot be tried, "" if it can."""
    if method in workloads.PEERS and (missing := workloads.missing(method)):
        return missing
    return "" if left >= seconds_to_start(method) else "not measured: out of time"


def measure_op(
    meter: Meter, op: str, shape, dtype: str, methods: typing.Sequence[str], budget: Budget,
    directions: typing.Sequence[str] = ("forward", "both"), with_error: bool = True,
) -> list[Row]:
    """Measure every method that runs. directions: torch.compile makes a program for each."""
    results, made = [], {}
    for method in methods:
        why = why_not(method, budget.left())
        if not why:
            try:
                workload = workloads.OPS[op][0](method, shape, DTYPES[dtype], meter.device)
                calls = {d: workload.both if d == "both" else workload.forward_only for d in directions}
            except torch.OutOfMemoryError:
                why = "out of memory"
            except Exception as error:  # a peer that cannot take the call
                why = reason(error)
            else:  # CUDA graphs are recorded at the third call
                times = 5 if "autotune" in method else 3
                why = next(filter(None, (meter.attempt(call, times) for call in calls.values())), "")
        if why:
            results.append(Row(op, workloads.label(shape), method, dtype=dtype, note=why))
            if why == "out of memory":
                meter.free()
        else:
            made[method] = workload, calls
    for direction in directions:
        calls = {method: calls[direction] for method, (_, calls) in made.items()}
        try:
            for method, seconds in meter.medians(calls, 0.5).items() if calls else ():
                case = (op, shape, dtype, method, direction, seconds, calls[method])
                results.append(_result(meter, *case, made[method][0] if with_error else None))
        except torch.OutOfMemoryError:  # where a method alone had room
            done = {r.method for r in results if r.direction == direction}
            how = dict(dtype=dtype, note="out of memory")
            left = [m for m in calls if m not in done]
            results += [Row(op, workloads.label(shape), m, direction, **how) for m in left]
    made.clear()
    if any("compile" in r.method and not r.note.startswith("not measured") for r in results):
        torch.compiler.reset()  # what was compiled keeps the memory of its CUDA graphs
    if any(r.seconds for r in results):
        meter.free()
    return results


def _result(
    meter: Meter, op: str, shape, dtype: str, method: str, direction: str, seconds: float, call, workload
) -> Row:
    """workload: measures the error; None: no error."""
    host = meter.host_seconds(call, seconds)
    found = Row(op, workloads.label(shape), method, direction, seconds, dtype, host)
    if method in workloads.OTHER_LOSS:
        found.note, workload = workloads.OTHER_LOSS[method], None
    elif meter.floor is not None:
        element = DTYPES[dtype].itemsize
        found.multiple = seconds / floors.floor(op, shape, direction, element).seconds(meter.floor, dtype)
    if meter.gpu and method == workloads.TUNED:
        found.note = IN_A_GRAPH
    else:
        found.peak_bytes = meter.peak(call)
    if workload is not None and direction == "both" and getattr(shape, "N", 0) <= 8192 and dtype == "float32":
        try:
            found.error = workloads.relative_errors(op, workload, shape)
        except torch.OutOfMemoryError:
            meter.free()
    return found


SMALL = {
    "reconstruction_loss": shapes.DecoderShape(2, 8, 8, 16), "chain_decoder": shapes.ChainShape(1, 8, 2),
    "supcon_loss": shapes.SupConShape(48), "linear_cross_entropy": shapes.LinearShape(32, 16, 10),
    "upsample_cross_entropy": shapes.DenseShape(1, 5, 4, 8, 16, 32),
    "upsample_conv3x3": shapes.UpsampleConvShape(2, 8, 4, 6),
    "norm_relu_pool": shapes.PoolShape(4, 8, 4),
}


def claimed_ops(small: bool) -> Todo:
    if small:
        return [(op, SMALL[op]) for op in ("reconstruction_loss", "supcon_loss")]
    supcon = [("supcon_loss", shape) for shape in (claims.SUPCON, claims.SUPCON_LARGE)]
    return [("reconstruction_loss", claims.DECODER), *supcon]


def other_ops(small: bool) -> Todo:
    every = [(op, shape) for op in OPS for shape in ([SMALL[op]] if small else floors.KERNELS[op][2])]
    return [pair for pair in every if pair not in claimed_ops(small)]


def measure_ops(meter: Meter, budget: Budget, todo: Todo, dtype: str) -> Rows:
    """Measure the methods that need no compiler; every shape has a share of the time."""
    for i, (op, shape) in enumerate(todo):
        methods = [m for m in METHODS[op] if "compile" not in m and (dtype == "float32" or m in IN_BFLOAT16)]
        yield measure_op(meter, op, shape, dtype, methods, budget.share(1 / (len(todo) - i)))


def measure_compiled(meter: Meter, budget: Budget, todo: Todo, tuned: bool) -> Rows:
    """Measure forward with backward of compiled methods, which take longest to make. tuned: max-autotune."""
    for op, shape in todo:
        if getattr(shape, "N", 0) > 8192:  # dense maps of 17 GB each
            continue
        methods = [m for m in METHODS[op] if "compile" in m and (m == workloads.TUNED) == tuned]
        yield measure_op(meter, op, shape, "float32", methods, budget, directions=("both",))


# ------------------------------------------------------------------------------------------------------------
# Batch sizes up to running out of memory


def measure_sizes(meter: Meter, budget: Budget, small: bool) -> Rows:
    """Measure the decoder: batches grow by 4 until one fails, then by 2 from the last that ran.

    They may take the device's whole memory, or (small) 16 images.
    """
    for method in (workloads.OURS, "eager", "channels_last", "checkpoint", "compile"):
        shape, ran, last = claims.DECODER._replace(N=4 if small else 256), 0, False
        while not (small and shape.N > 16):
            case = ("reconstruction_loss", shape, "float32", [method], budget, ("both",))
            found = measure_op(meter, *case, with_error=False)
            for r in found:
                r.op = "batch size"
            yield found
            failed = found[-1].seconds is None
            if last or (failed and not ran) or found[-1].note.startswith("not measured"):
                break
            ran, last = (ran, True) if failed else (shape.N, False)
            shape = shape._replace(N=2 * ran if failed else 4 * ran)


# ------------------------------------------------------------------------------------------------------------
# The whole step


class Step(typing.NamedTuple):
    """One update of a network in K modules, on N images."""

    arch: str
    K: int
    N: int
    methods: tuple[str, ...]
    balanced: bool = False

    @property
    def label(self) -> str:
        return claims.step_label(self.arch, self.K, self.N, self.balanced)


def claimed_steps(small: bool) -> list[Step]:
    released, own = claims.RELEASED, ("ours", train_step.GRAPH)
    if small:
        return [Step("resnet32", 16, 8, ("ours", "released")), Step("resnet32", 1, 8, ("ours",))]
    return [
        Step("resnet32", 16, 1024, own), Step("resnet32", 1, 1024, (*own, *released)),
        Step("resnet32", 16, 128, (train_step.GRAPH, *released)),
        Step("resnet110", 4, 1024, ("ours",), balanced=True), Step("resnet110", 1, 1024, ("released",)),
    ]


def claimed_compiled_steps(small: bool) -> list[Step]:
    return [] if small else [Step("resnet32", 1, 1024, ("compile",))]


def other_steps(small: bool) -> list[Step]:
    released, every = claims.RELEASED, ("ours", train_step.GRAPH, *claims.RELEASED)
    if small:
        return [Step("resnet32", 1, 8, ("checkpoint",)), Step("resnet32", 16, 8, ("released checkpoint",))]
    return [
        Step("resnet32", 16, 1024, released), Step("resnet32", 16, 128, ("ours",)),
        *[Step("resnet32", K, N, every) for K, N in ((4, 1024), (4, 128), (1, 128))],
        Step("resnet110", 4, 1024, ("released",), balanced=True), Step("resnet110", 1, 1024, ("ours",)),
        Step("resnet32", 1, 1024, ("checkpoint", "compile max-autotune")),
        Step("resnet32", 1, 128, ("compile",)),
        Step(
            "resnet32", 16, 1024,
            ("released checkpoint", "released compile", "released compile max-autotune"),
        ),
    ]


def measure_steps(meter: Meter, budget: Budget, todo: list[Step], needed: float) -> Rows:
    """needed: seconds that have to be left for a method that `seconds_to_start` does not know."""
    for case in todo:
        for method in case.methods:
            if budget.left() < max(needed, seconds_to_start(method)):
                yield [Row("step", case.label, method, "step", note="not measured: out of time")]
            else:
                yield [_measure_step(meter, case, method)]


FIRST_STEPS = 5  # momentum buffers are made in the first; the step is captured in the fourth


def _measure_step(meter: Meter, case: Step, method: str) -> Row:
    """Measure one step. Its peak covers all that training holds, with optimizer state, over the first steps.

    A compiled step's peak is of later steps: what tuning takes is not the step's.
    """
    compiled = "compile" in method
    if compiled:
        torch.compiler.reset()
    meter.free()
    made, peak, note, before = [], None, "", meter.held()

    def start() -> None:
        how = dict(device=meter.device, arch=case.arch, balanced=case.balanced)
        made.append(train_step.step(method, case.K, case.N, **how))
        for _ in range(FIRST_STEPS):
            made[0]()

    def first() -> None:
        nonlocal peak
        peak = meter.peak(start)

    def later() -> None:
        nonlocal peak
        held = meter.held() - before
        peak = meter.peak(made[0])
        peak = None if peak is None else peak + held

    why = (meter.attempt(start, 1) or meter.attempt(later, 1)) if compiled else meter.attempt(first, 1)
    if why:
        made.clear()
        return Row("step", case.label, method, "step", note=why)
    if meter.gpu and "autotune" in method:
        peak, note = None, IN_A_GRAPH
    seconds = meter.medians({method: made[0]}, 1.0)[method]
    host = meter.host_seconds(made[0], seconds)
    measured = dict(seconds=seconds, host_seconds=host, peak_bytes=peak, note=note)
    return Row("step", case.label, method, "step", **measured)


# ------------------------------------------------------------------------------------------------------------


class Part(typing.NamedTuple):
    what: str
    share: float  # of the time that is left when its turn comes
    measure: typing.Callable[[Budget], Rows]


def parts(meter: Meter, small: bool) -> list[Part]:
    """Return all parts, those that the claims need first; the time that one leaves goes to the next ones."""
    claimed, others = claimed_ops(small), other_ops(small)
    last_first = [*claimed, *reversed(others)]  # an op's last shape is its largest
    needed = 0.5 if small else 6  # seconds: Triton compiles the kernels of a step
    steps_compiled = claimed_compiled_steps(small)

    def compiled(budget: Budget, ops: list, tuned: bool) -> Rows:
        return measure_compiled(meter, budget, ops, tuned)

    return [
        Part("ops of the claims", 0.25, lambda b: measure_ops(meter, b, claimed, "float32")),
        Part("steps of the claims", 0.5, lambda b: measure_steps(meter, b, claimed_steps(small), needed)),
        Part("ops of the claims, compiled", 0.35, lambda b: compiled(b, claimed[:1], tuned=False)),
        Part("steps of the claims, compiled", 0.5, lambda b: measure_steps(meter, b, steps_compiled, needed)),
        Part("ops of the claims, tuned", 0.9, lambda b: compiled(b, claimed[:1], tuned=True)),
        Part("other ops", 0.4, lambda b: measure_ops(meter, b, others, "float32")),
        Part("ops in bfloat16", 0.4, lambda b: measure_ops(meter, b, [*claimed, *others], "bfloat16")),
        Part("batch sizes", 0.4, lambda b: measure_sizes(meter, b, small)),
        Part("ops, compiled", 0.4, lambda b: compiled(b, last_first[1:], tuned=False)),
        Part("ops, tuned", 0.5, lambda b: compiled(b, last_first[1:], tuned=True)),
        Part("other steps", 1.0, lambda b: measure_steps(meter, b, other_steps(small), needed)),
    ]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=300, help="time for all parts together")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: benchmarks/results/<gpu>")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    meter, budget = Meter(options.device), Budget(options.seconds)
    name = re.sub(r"[^a-z0-9]+", "-", provenance(options.device)["device"].lower()).strip("-")
    folder = options.out or RESULTS / name
    gc.collect()
    gc.freeze()  # or every peak would look through torch's own objects again, which takes long
    try:
        results = report(meter, budget, options.small, folder)
    finally:
        gc.unfreeze()
    print(claims_table(claims.claims(results)))
    print(f"written: {folder}")
    return 0


def report(meter: Meter, budget: Budget, small: bool, folder: pathlib.Path) -> list[Row]:
    """All parts, as far as time goes, and their files."""
    results: list[Row] = []
    for part in parts(meter, small):
        print(f"{part.what}, {budget.left():.0f} s left", file=sys.stderr)
        for found in part.measure(budget.share(part.share)):
            results += found
            files.write(folder, results)  # whatever comes, what was measured stays
            for r in found:
                what = f"{r.op} {r.shape} {r.dtype} {r.method} {r.direction}"
                print(f"  {what}: {files.line(r)}", file=sys.stderr, flush=True)
        if part.what == "batch sizes" and any(r.op == "batch size" and r.seconds for r in results):
            try:
                files.plot(folder, results)
            except ImportError as error:
                print(f"no plot: {error}", file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
