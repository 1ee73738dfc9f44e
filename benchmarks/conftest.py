"""What benchmarks measure beside time, and a table after the run; pytest-benchmark has no such columns."""

from __future__ import annotations

import pytest

from benchmarks import report, timing, workloads
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
    """measure(op, shape, method, direction): time, saved bytes, peak bytes and error."""

    def run(op: str, shape, method: str, direction: str) -> None:
        workload = workloads.OPS[op][0](method, shape)
        call = workload.both if direction == "both" else workload.forward_only
        row = report.row_of(op, shape, method, direction, workload)
        report.add_peak(row, shape)
        benchmark.group = f"{op} {row.shape} {direction}"
        benchmark.extra_info.update(vars(row))
        call()
        rounds = max(3, min(100, int(ROUNDS_FOR / timing.seconds(call))))
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in getattr(session, "benchmarks", ()) if b and b.extra_info]
    if done:
        terminalreporter.section("benchmarks: time, memory, error")
        rows = [Row(**b.extra_info | {"seconds": b.stats.median}) for b in done]
        terminalreporter.write_line(markdown(rows))
