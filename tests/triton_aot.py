"""Compile Triton kernels for GPUs that need not be there, and read what the assembler made of them.

    python -m tests.triton_aot [--processes N] [MODULE ...]

writes what the installed version of Triton makes of every kernel, or of those of the modules named, into
``triton_statistics.json``, beside this file: registers a thread, and bytes of spills where there are any, the
most over a kernel's configurations, for each of CAPABILITIES in order. It takes minutes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

CAPABILITIES = (80, 90, 100, 120)
MODULES = (
    "chain_loss", "chain_stage", "linear_cross_entropy", "norm_relu_pool", "supcon_loss", "upsample_conv3x3",
    "upsample_cross_entropy",
)
TABLE = Path(__file__).with_name("triton_statistics.json")

# Shared memory that one block may have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Instructions of the tensor cores in PTX and in SASS, on whatever architecture.
PTX_TENSOR_CORES = re.compile(r"\b(wmma|mma|wgmma|tcgen05)\.")
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of a kernel: registers a thread; bytes of spills and stack, and of shared memory."""

    kernel: str
    name: str  # with its configuration
    registers: int
    spilled: int
    shared: int
    uses_tensor_cores: bool
    meant_for_tensor_cores: bool


def configurations(module: str, cc: int) -> list:
    """What `tests.triton_configurations` lists, which imports Triton."""
    return list(getattr(importlib.import_module("tests.triton_configurations"), module)(cc))


def processes(count: int = 2) -> concurrent.futures.ProcessPoolExecutor:
    """Processes to compile in: new ones, since Triton does not compile where it interprets."""
    count = 1 if "PYTEST_XDIST_WORKER" in os.environ else count
    return concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def compile_all(module: str, cc: int, pool: concurrent.futures.Executor) -> list[Statistics]:
    """Compile every configuration of a module's kernels for compute capability ``cc``.

    pool: `processes`, each takes one at a time.
    """
    count = len(configurations(module, cc))
    return list(pool.map(_compile_one, [module] * count, [cc] * count, range(count)))


def triton_version() -> str:
    """Major and minor version of the installed Triton: the key in TABLE."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """TABLE by version and ``module.kernel``: "registers" and "spilled" (unless all 0) by CAPABILITIES."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def most(module: str, compiled: list[Statistics]) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) of each ``module.kernel``, the most over its configurations."""
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for k in compiled:
        name = f"{module}.{k.kernel}"
        found[name] = max(found[name][0], k.registers), max(found[name][1], k.spilled)
    return dict(found)


def _compile_one(module: str, cc: int, index: int) -> Statistics:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c = configurations(module, cc)[index]
    attributes = {(c.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in c.aligned}
    source = ASTSource(fn=c.kernel, signature=c.signature, constexprs=c.constexprs, attrs=attributes)
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages, **c.kernel.run.keywords}
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
        compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    types = " ".join(t for t in c.signature.values() if t != "constexpr")
    values = ", ".join(f"{k}={v}" for k, v in c.constexprs.items())
    kernel = c.kernel.__name__
    name = f"sm_{cc} {kernel}[{types}]({values}, num_warps={c.num_warps}, num_stages={c.num_stages})"
    return _statistics(kernel, name, compiled, log.getvalue(), c.tensor_cores)


def _statistics(kernel: str, name: str, compiled, log: str, meant: bool) -> Statistics:
    """log: what ptxas said; the object alone does not tell spills from other local memory."""
    # a function each
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    # An instruction missing from PTX is missing from SASS too, and disassembling takes as long as compiling.
    in_ptx = PTX_TENSOR_CORES.search(compiled.asm["ptx"])
    uses = bool(in_ptx) and bool(TENSOR_CORES.search(_disassembled(compiled.asm["cubin"])))
    spilled = sum(int(n) for function in spills for n in function)
    return Statistics(kernel, name, registers, spilled, compiled.metadata.shared, uses, meant)


def _disassembled(cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _write_table(names: list[str], count: int) -> None:
    with processes(count) as pool:
        for module in names:
            found: dict[str, dict[str, list[int]]] = {}
            for cc in CAPABILITIES:
                for name, numbers in most(module, compile_all(module, cc, pool)).items():
                    row = found.setdefault(name, {"registers": [], "spilled": []})
                    for column, number in zip(row.values(), numbers):
                        column.append(number)
            for row in found.values():
                if not any(row["spilled"]):
                    del row["spilled"]
            _write_rows(module, found)
            print(module, flush=True)


def _write_rows(module: str, found: dict[str, dict[str, list[int]]]) -> None:
    """Replace the module's rows of the installed version."""
    version, versions = triton_version(), table()
    others = {k: row for k, row in versions.get(version, {}).items() if k.partition(".")[0] != module}
    versions[version] = dict(sorted((others | found).items()))
    blocks = []
    for version, rows in sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")]):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        blocks.append(f'  "{version}": {{\n{lines}\n  }}')
    TABLE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("modules", nargs="*", metavar="MODULE", default=MODULES)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    _write_table(arguments.modules, arguments.processes)
