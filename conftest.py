"""Plain `pytest` runs tests/, `pytest --benchmark-only` runs benchmarks/; paths on the command line win.

`pytest -n N` runs N tests at a time, each with its share of the cores.
"""

import os

import pytest

# Set before torch is imported, here and in the processes that tests start: the waiting threads of one test
# would otherwise hold up another. Tests that ask for more than their share have threads that sleep while they
# wait.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config):
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.getoption("benchmark_only", False):
        config.args[:] = ["benchmarks"]
