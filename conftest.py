"""Plain `pytest` runs tests/, `pytest --benchmark-only` runs benchmarks/; a path on the command line decides for itself."""

import pytest


def pytest_configure(config):
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.getoption("benchmark_only", False):
        config.args[:] = ["benchmarks"]
