"""What the README claims of a GPU, as ratios of measurements.

A claim to be ahead of the best of several methods needs all of them; where one is missing, it counts as not
measured.
"""

from __future__ import annotations

import typing

from benchmarks import shapes, train_step, workloads
from benchmarks.table import Claim, Row

DECODER = shapes.DecoderShape(1024, 64, 8, 32)
SUPCON, SUPCON_LARGE = shapes.SupConShape(8192), shapes.SupConShape(65536)
DECODER_BASELINES = ("channels_last", "compile", "compile channels_last")
RELEASED = ("released", "released channels_last")
END_TO_END = (*RELEASED, "ours", train_step.GRAPH, "compile")  # a step of K = 1


class Found:
    """Measurements by op, shape, method, direction and dtype."""

    def __init__(self, results: typing.Iterable[Row]):
        measured = [r for r in results if r.seconds]
        self.rows = {(r.op, r.shape, r.method, r.direction, r.dtype): r for r in reversed(measured)}

    def op(self, name: str, shape: typing.NamedTuple, method: str) -> Row | None:
        return self.rows.get((name, workloads.label(shape), method, "both", "float32"))

    def step(self, arch: str, K: int, N: int, method: str, balanced: bool = False) -> Row | None:
        return self.rows.get(("step", step_label(arch, K, N, balanced), method, "step", "float32"))


def step_label(arch: str, K: int, N: int, balanced: bool = False) -> str:
    return f"{arch} K{K} N{N}" + (" balanced" if balanced else "")


def fastest(needed: typing.Iterable[Row | None], *others: Row | None) -> Row | None:
    """Return the fastest of all, or None if a needed one is missing."""
    needed = list(needed)
    if None in needed:
        return None
    return min((r for r in (*needed, *others) if r), key=lambda r: r.seconds, default=None)


def ratio(a: Row | None, b: Row | None, of: str = "seconds") -> float | None:
    a, b = (getattr(r, of) if r else None for r in (a, b))
    return a / b if a and b else None


def claims(results: typing.Iterable[Row]) -> list[Claim]:
    found = Found(results)
    methods = (workloads.OURS, "eager", *DECODER_BASELINES, workloads.TUNED)
    decoder = {m: found.op("reconstruction_loss", DECODER, m) for m in methods}
    supcon = {m: found.op("supcon_loss", SUPCON, m) for m in (workloads.OURS, "eager")}
    large = found.op("supcon_loss", SUPCON_LARGE, workloads.OURS)
    # max-autotune counts where it is measured: it may take longer to make than there is time.
    ours = decoder[workloads.OURS]
    best = fastest((decoder[m] for m in DECODER_BASELINES), decoder[workloads.TUNED])
    end_to_end = fastest(found.step("resnet32", 1, 1024, m) for m in END_TO_END)
    graph, graph_of_one = (found.step("resnet32", K, 1024, train_step.GRAPH) for K in (16, 1))
    in_modules = fastest((), found.step("resnet32", 16, 1024, "ours"), graph)
    released = fastest(found.step("resnet32", 16, 128, m) for m in RELEASED)
    local = found.step("resnet110", 4, 1024, "ours", balanced=True)
    whole = found.step("resnet110", 1, 1024, "released")

    def against(r: Row | None) -> str:
        return r.method if r else ""

    decoder_best, step_best = ratio(best, ours), ratio(in_modules, end_to_end)
    small = ratio(released, found.step("resnet32", 16, 128, train_step.GRAPH))
    multiple, peak = ours.multiple if ours else None, ratio(local, whole, "peak_bytes")
    gigabytes = large.peak_bytes / 1e9 if large and large.peak_bytes else None
    of_step = "step of ResNet-32, N 1024"
    return [
        Claim("decoder C64 N1024 float32, faster than eager", ratio(decoder["eager"], ours), 10, True),
        Claim(
            "same, faster than the best of torch.compile and channels_last", decoder_best, 4, True,
            against=against(best),
        ),
        Claim("same, multiple of its floor", multiple, 3),
        Claim("supcon N8192, faster than eager", ratio(supcon["eager"], supcon[workloads.OURS]), 5, True),
        Claim("supcon N65536, peak", gigabytes, 2, unit="GB"),
        Claim(f"{of_step}, both in CUDA graphs: K 16 over K 1", ratio(graph, graph_of_one), 1.25),
        Claim(f"{of_step}: K 16 over the fastest end to end", step_best, 1.25, against=against(end_to_end)),
        Claim(
            "step of ResNet-32, K 16, N 128, CUDA graph, faster than the authors' code", small, 3, True,
            against=against(released),
        ),
        Claim("ResNet-110, K 4 balanced, N 1024, peak over end to end", peak, 0.30),
    ]
