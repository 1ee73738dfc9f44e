"""What every benchmark measures beside time, and a table after the run: pytest-benchmark's own has no such columns."""

from __future__ import annotations

import pytest

from benchmarks import memory, timing, workloads
from benchmarks.device import provenance
from benchmarks.table import Row, markdown

ROUNDS_FOR = 3.0  # seconds of measuring, by which the number of rounds is chosen


def pytest_addoption(parser):
    parser.addoption("--larger", action="store_true", help="benchmarks: the larger shapes too")


def pytest_configure(config):
    config.addinivalue_line("markers", "larger: a benchmark that runs with --larger alone")


def pytest_collection_modifyitems(config, items):
    """Leave the larger shapes out unless they are asked for."""
    if not config.getoption("--larger"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("larger")])
        items[:] = [item for item in items if not item.get_closest_marker("larger")]


@pytest.fixture
def measure(benchmark):
    """measure(op, shape, method, direction, small): time; saved bytes, peak bytes and error in further columns."""

    def run(op: str, shape, method: str, direction: str, small) -> None:
        workload = workloads.OPS[op][0](method, shape)
        call = workload.both if direction == "both" else workload.forward_only
        benchmark.group = f"{op} {workloads.label(shape)} {direction}"
        row = dict(op=op, shape=workloads.label(shape), method=method, direction=direction, **provenance())
        if direction == "both":
            row["saved_bytes"] = memory.saved_bytes(workload.forward, workload.inputs)
            row["error"] = workloads.relative_errors(op, workload, shape)
        case = dict(op=op, method=method, shape=list(shape), small=list(small), direction=direction)
        found = memory.peak_bytes("benchmarks.workloads:for_peak", **case)
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
        rows = [Row(seconds=b.stats.median, **b.extra_info) for b in done]
        terminalreporter.write_line(markdown(rows))
