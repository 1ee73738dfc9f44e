"""Bytes that autograd keeps for backward, and a call's peak in a new process, on the CPU.

Kernels may take scratch memory that no allocator of torch sees, so the peak is that of the resident set.
"""

from __future__ import annotations

import importlib

import torch

from infopro_fast.memory.resident import in_a_process, peak_above
from infopro_fast.planning.live import nbytes, saved_bytes

__all__ = ["PAGE", "measured", "peak_bytes", "saved_bytes"]

PAGE = 4096


def peak_bytes(target: str, threads: int = 2, timeout: float = 600, **arguments) -> dict[str, int]:
    """Measure a call in a new process: "peak", bytes above the resident set; "returned", of its results.

    target: "package.module:function". With ``arguments`` (plain data) it returns the call to measure and a
        small call of the same kind to warm up with, or None. Both return the tensors that stay, so the
        transient bytes are the difference.
    """
    case = dict(function=target, threads=threads, arguments=arguments)
    return in_a_process("benchmarks.memory:measured", timeout, **case)


def measured(function: str, threads: int, arguments: dict) -> dict[str, int]:
    """`peak_bytes` in this process."""
    torch.set_num_threads(threads)
    module, name = function.split(":")
    call, small = getattr(importlib.import_module(module), name)(**arguments)
    for warm_up in (small, small) if small is not None else ():
        warm_up()
    results: list[torch.Tensor] = []
    peak = peak_above(lambda: results.extend(call()))
    return {"peak": peak, "returned": nbytes(results)}
