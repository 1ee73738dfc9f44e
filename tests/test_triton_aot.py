"""Compile every Triton kernel, at every configuration that is shipped, for every architecture. Needs no GPU.

With any version of Triton, shared memory fits, and what is meant for the tensor cores uses them. Registers
and spills depend on the version: they do not exceed its rows in ``triton_statistics.json``. Without a row, a
warning compares with the newest version there, and a kernel fails only if it spills more than SPILL_BOUND.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from infopro_fast.ops import triton_kernels
from tests import triton_aot

SPILL_BOUND = 64  # bytes that a kernel may spill with a version of Triton that nobody has measured


@pytest.fixture(scope="module")
def pool():
    with triton_aot.processes() as pool:
        yield pool


@pytest.mark.parametrize("cc", triton_aot.CAPABILITIES)
@pytest.mark.parametrize("module", triton_aot.MODULES)
@pytest.mark.fast(4)
def test_kernels_fit_the_architecture(module, cc, pool):
    compiled = triton_aot.compile_all(module, cc, pool)
    assert compiled
    shared = triton_aot.SHARED_MEMORY[cc]
    wrong = [k for k in compiled if k.shared > shared or k.uses_tensor_cores != k.meant_for_tensor_cores]
    assert not wrong, "\n".join(map(str, wrong))
    found = triton_aot.most(module, compiled)
    told, failures = compare(found, cc, triton_aot.triton_version(), triton_aot.table())
    if told:
        warnings.warn("\n".join(told), stacklevel=1)
    assert not failures, "\n".join(failures)


def compare(found, cc: int, version: str, table) -> tuple[list[str], list[str]]:
    """What to tell about registers and spills, and what fails. found: {kernel: (registers, spilled)}."""
    at = triton_aot.CAPABILITIES.index(cc)
    none = [0] * len(triton_aot.CAPABILITIES)
    told, failures = [], []
    for name, numbers in found.items():
        known = name in table.get(version, {})
        newest_first = sorted(table, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
        reference = version if known else next((v for v in newest_first if name in table[v]), None)
        row = table[reference][name] if reference else None
        for kind, number in zip(("registers", "spilled"), numbers):
            before = None if row is None else row.get(kind, none)[at]
            line = f"sm_{cc} {name}: {kind}: {number} with Triton {version}, {before} as of {reference}"
            if known and number > before:
                failures.append(f"{line}; python -m tests.triton_aot writes it anew")
            elif not known and kind == "spilled" and number > SPILL_BOUND:
                failures.append(f"{line}; more than {SPILL_BOUND} bytes")
            elif not known and number != before:
                told.append(line)
    return told, failures


ROWS = {"a._k": {"registers": [10, 20, 30, 40], "spilled": [0, 8, 0, 0]}, "a._l": {"registers": [1, 2, 3, 4]}}


@pytest.mark.parametrize(
    ("version", "found", "told", "failures"),
    [
        ("3.8", {"a._k": (20, 8), "a._l": (2, 0)}, [], []),
        ("3.8", {"a._k": (19, 0)}, [], []),
        ("3.8", {"a._k": (21, 8)}, [], ["registers: 21"]),
        ("3.8", {"a._l": (2, 4)}, [], ["spilled: 4"]),
        ("3.8", {"a._new": (2, 65)}, ["registers: 2"], ["spilled: 65"]),
        ("3.9", {"a._k": (20, 8), "a._l": (2, 0)}, [], []),
        ("3.9", {"a._k": (25, 0), "a._l": (2, 64)}, ["registers: 25", "spilled: 0", "spilled: 64"], []),
        ("3.9", {"a._l": (2, 65)}, [], ["spilled: 65"]),
    ],
)
def test_a_version_is_compared_with_its_own_row_or_told(version, found, told, failures):
    for lines, expected in zip(compare(found, 90, version, {"3.8": ROWS}), (told, failures)):
        assert len(lines) == len(expected) and all(part in line for line, part in zip(lines, expected))


def test_kernels_are_launched_with_the_options_that_they_are_compiled_with(pool):
    """They ask for fused multiply-adds: Triton 3.10 changes the default, which would change results."""
    for module in triton_aot.MODULES:
        assert set(pool.submit(options_of, module).result()) == {("enable_fp_fusion", True)}, module


def options_of(module: str) -> list[tuple[str, object]]:
    return [item for c in triton_aot.configurations(module, 90) for item in c.kernel.run.keywords.items()]


def test_every_kernel_is_compiled(pool):
    folder = Path(triton_kernels.__file__).parent
    launched = {
        name for file in folder.glob("*.py") for name in re.findall(r"@launched\ndef (\w+)", file.read_text())
    }
    assert launched == set().union(*(pool.submit(kernels_of, m).result() for m in triton_aot.MODULES))


def kernels_of(module: str) -> set[str]:
    return {c.kernel.__name__ for c in triton_aot.configurations(module, 90)}
