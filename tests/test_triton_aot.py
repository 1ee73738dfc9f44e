"""Every Triton kernel, at every configuration that is shipped, compiled for every architecture: nothing spills, shared memory fits, and
what is meant for the tensor cores uses them. Needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from infopro_fast.ops import triton_kernels
from tests import triton_aot

KERNELS = Path(triton_kernels.__file__).parent
MODULES = sorted(p.stem for p in KERNELS.glob("*.py") if "def configurations(" in p.read_text() and p.stem != "resize")


@pytest.fixture(scope="module")
def pool():
    with triton_aot.processes() as pool:
        yield pool


@pytest.mark.parametrize("cc", triton_aot.CAPABILITIES)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_fit_the_architecture(module, cc, pool):
    compiled = triton_aot.compile_all(module, cc, pool)
    assert compiled
    wrong = [k for k in compiled if k.spilled or k.shared > triton_aot.SHARED_MEMORY[cc] or k.uses_tensor_cores != k.meant_for_tensor_cores]
    assert not wrong, "\n".join(map(str, wrong))
