"""Compiles Triton kernels for GPUs that need not be there, and reads what the assembler made of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile

CAPABILITIES = (80, 90, 100, 120)

# Shared memory that one block may have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Instructions of the tensor cores in PTX and in SASS, on whatever architecture.
PTX_TENSOR_CORES = re.compile(r"\b(wmma|mma|wgmma|tcgen05)\.")
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of a kernel: registers a thread, bytes of spills and of stack, bytes of shared memory a block."""

    name: str
    registers: int
    spilled: int
    shared: int
    uses_tensor_cores: bool
    meant_for_tensor_cores: bool


def processes() -> concurrent.futures.ProcessPoolExecutor:
    """Processes to compile in: fresh ones, since Triton does not compile where it interprets. With `pytest -n N` one of them each."""
    count = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    return concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def compile_all(module: str, cc: int, pool: concurrent.futures.Executor) -> list[Statistics]:
    """Every kernel at every configuration that ``infopro_fast.ops.triton_kernels.<module>`` ships for compute capability ``cc``.

    The module has `configurations(cc)`, which yields `target.Compilation`s. pool: `processes`, each takes one at a time.
    """
    count = len(_configurations(module, cc))
    return list(pool.map(_compile_one, [module] * count, [cc] * count, range(count)))


def _configurations(module: str, cc: int) -> list:
    return list(importlib.import_module(f"infopro_fast.ops.triton_kernels.{module}").configurations(cc))


def _compile_one(module: str, cc: int, index: int) -> Statistics:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c = _configurations(module, cc)[index]
    attributes = {(c.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in c.aligned}
    source = ASTSource(fn=c.kernel, signature=c.signature, constexprs=c.constexprs, attrs=attributes)
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages, **c.kernel.run.keywords}
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
        compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    types = " ".join(t for t in c.signature.values() if t != "constexpr")
    values = ", ".join(f"{k}={v}" for k, v in c.constexprs.items())
    name = f"sm_{cc} {c.kernel.__name__}[{types}]({values}, num_warps={c.num_warps}, num_stages={c.num_stages})"
    return _statistics(name, compiled, log.getvalue(), c.tensor_cores)


def _statistics(name: str, compiled, log: str, meant: bool) -> Statistics:
    """log: what ptxas said; the object alone does not tell spills from other local memory."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)  # of each function
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    # What PTX does not ask for is not in SASS either, and to disassemble takes as long as to compile.
    uses = bool(PTX_TENSOR_CORES.search(compiled.asm["ptx"])) and bool(TENSOR_CORES.search(_disassembled(compiled.asm["cubin"])))
    return Statistics(name, registers, sum(int(n) for function in spills for n in function), compiled.metadata.shared, uses, meant)


def _disassembled(cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
