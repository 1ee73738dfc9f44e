"""`pytest` runs tests/, `pytest --benchmark-only` runs benchmarks/, and paths given run themselves.

`pytest -n N` runs N tests at a time, each with its share of the cores."""

import os

import pytest

# Before anything imports torch: waiting threads of one test would hold up the others. Threads beyond a test's
# share of the cores sleep while they wait. Processes that tests start inherit this.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config):
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.getoption("benchmark_only", False):
        config.args[:] = ["benchmarks"]
