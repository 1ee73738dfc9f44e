"""What every benchmark measures beside time, and the table that shows it after a run (pytest-benchmark's own has no such columns)."""

from __future__ import annotations

import pytest

from benchmarks import memory, timing, workloads
from benchmarks.device import provenance
from benchmarks.table import Row, markdown

ROUNDS_FOR = 3.0  # seconds of measuring, by which the number of rounds is chosen


def pytest_addoption(parser):
    parser.addoption("--larger", action="store_true", help="benchmarks: the larger shapes too")


def pytest_collection_modifyitems(config, items):
    """bench_* functions are benchmarks wherever pytest looks; the larger shapes are left out unless asked for."""
    if config.getoption("--larger"):
        return
    chosen = [item for item in items if not _is_larger(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _is_larger(item) -> bool:
    from benchmarks import shapes

    shape = getattr(item, "callspec", None) and item.callspec.params.get("shape")
    return shape in (*shapes.DECODER_LARGER, *shapes.SUPCON_LARGER, *shapes.LINEAR_LARGER, *shapes.DENSE_LARGER)


@pytest.fixture
def measure(benchmark):
    """measure(op, shape, method, direction, small): time, and as extra columns saved bytes, peak bytes and error."""

    def run(op: str, shape, method: str, direction: str, small) -> None:
        make, _, _ = workloads.OPS[op]
        workload = make(method, shape)
        call = workload.both if direction == "both" else workload.forward_only
        benchmark.group = f"{op} {workloads.label(shape)} {direction}"
        row = dict(op=op, shape=workloads.label(shape), method=method, direction=direction, **provenance())
        if direction == "both":
            row["saved_bytes"] = memory.saved_bytes(workload.forward, workload.inputs)
            row["error"] = workloads.relative_errors(op, workload, shape)
        target = "benchmarks.workloads:for_peak"
        found = memory.peak_bytes(target, op=op, method=method, shape=list(shape), small=list(small), direction=direction)
        row["peak_bytes"], row["transient_bytes"] = found["peak"], found["peak"] - found["returned"]
        benchmark.extra_info.update(row)
        call()
        rounds = max(3, min(100, int(ROUNDS_FOR / timing.seconds(call))))
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in getattr(session, "benchmarks", ()) if b and b.extra_info]
    if done:
        terminalreporter.section("benchmarks: time, memory, error")
        terminalreporter.write_line(markdown([Row.from_info(b.extra_info, b.stats.median) for b in done]))
