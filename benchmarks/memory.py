"""Two measures of memory on the CPU: bytes that autograd keeps for backward, and the peak of a call in a process of its own.

Kernels may take scratch memory that no allocator of torch's sees, so the peak is what the kernel of the operating system saw:
the high-water mark of the resident set, put back to the present value right before the call.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import typing

import torch

PAGE = 4096


def saved_bytes(call: typing.Callable[[], object], beside: typing.Iterable[torch.Tensor] = ()) -> int:
    """Bytes that the graph of ``call`` keeps, each storage once, without those of ``beside`` (inputs that are alive anyway)."""
    alive = {t.untyped_storage().data_ptr() for t in beside}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # held until the sum is taken, so that no address is used twice
    total = sum(kept.values())
    del result
    return total


def peak_bytes(target: str, threads: int = 2, timeout: float = 600, **kwargs) -> dict[str, int]:
    """Peak of ``target`` in a process of its own: {"peak": bytes above the resident set before, "returned": bytes of its results}.

    target: "package.module:function"; called with ``kwargs`` (plain data) it gives the call to measure and, to warm up with, a
    small call of the same kind (or None); both return the tensors that stay. The difference of the two numbers is transient.
    """
    command = [sys.executable, "-m", "benchmarks.memory", target, json.dumps(kwargs), str(threads)]
    # Blocks of 64 KiB and more come from mmap and go back when freed: nothing freed earlier hides in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"peak_bytes: {target} {kwargs}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _measure(call: typing.Callable[[], typing.Sequence[torch.Tensor]]) -> dict[str, int]:
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    results = call()
    peak = _status("VmHWM") - before
    returned = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}.values())
    return {"peak": max(0, peak), "returned": returned}


def main(target: str, kwargs: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    module, function = target.split(":")
    call, small = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    for warm_up in (small, small) if small is not None else ():
        warm_up()
    print(json.dumps(_measure(call)))


if __name__ == "__main__":
    main(*sys.argv[1:])
