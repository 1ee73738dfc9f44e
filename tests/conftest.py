"""Fixtures shared by all tests.

Where the compiled kernels are missing, the run fails. ``pytest --reference-only`` tests the references alone.
"""

from __future__ import annotations

import collections

import hypothesis
import pytest
import torch

from infopro_fast.ops import dispatch

hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=30, print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("tests")

ISA_LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2}


def pytest_addoption(parser):
    text = "test the references alone: tests of compiled kernels are skipped"
    parser.addoption("--reference-only", action="store_true", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow all cases of a test marked fast(n) but n, evenly spaced."""
    tests = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("fast"):
            tests[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, n), cases in tests.items():
        fast = {i * len(cases) // n for i in range(n)}
        for i, item in enumerate(cases):
            if i not in fast:
                item.add_marker("slow")


def need_cpu_kernels(config) -> None:
    """Skip in a reference-only run; else fail where the kernels are missing."""
    if config.getoption("--reference-only"):
        pytest.skip("--reference-only")
    reason = dispatch.load_cpu_kernels()
    if reason is not None:
        message = f"the CPU kernels cannot run: {reason}; --reference-only tests the references alone"
        pytest.fail(message, pytrace=False)


@pytest.fixture(params=("reference", "cpu"))
def impl(request) -> str:
    """Name of every implementation that takes CPU tensors, in float64 too."""
    if request.param == "cpu":
        need_cpu_kernels(request.config)
    return request.param


@pytest.fixture
def cpu(request) -> str:
    """The compiled CPU kernels, for tests of what they alone promise."""
    need_cpu_kernels(request.config)
    return "cpu"


@pytest.fixture(params=ISA_LEVELS)
def isa(request) -> str:
    """Run the CPU kernels with each instruction set that this machine has."""
    need_cpu_kernels(request.config)
    before = torch.ops.infopro_fast._isa(-1)
    level = ISA_LEVELS[request.param]
    in_force = torch.ops.infopro_fast._isa(level)
    try:
        if in_force != level:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    finally:
        torch.ops.infopro_fast._isa(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def few_images(monkeypatch):
    """Give runs the few images of `tiny_run`."""
    from infopro_fast.data import fashion_mnist
    from tests import tiny_run

    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a tiny run that was left alone. Nothing may change it."""
    from infopro_fast.data import fashion_mnist
    from infopro_fast.trainer import fit
    from tests import tiny_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", tiny_run.load)
        return fit(tiny_run.config(tmp_path_factory.mktemp("runs") / "alone"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
