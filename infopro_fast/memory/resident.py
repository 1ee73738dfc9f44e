"""The peak of a call as the operating system sees it, in a new process (Linux).

It is the high-water mark of the resident set, reset right before the call. It includes what no accounting
inside torch can see: the workspaces of convolution libraries and kernels.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Blocks of 64 KiB and more come from mmap and go back when freed, so no free memory in the heap hides a peak.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

# For times: without these a map's pages go back to the system after every use and are zeroed again, a third
# of a step.
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


def in_a_process(target: str, timeout: float = 1800, malloc: dict[str, str] = MALLOC, **kwargs: Any) -> Any:
    """Call the function ``target`` ("package.module:name") in a new process and return its result.

    kwargs and the result: JSON. malloc: settings of glibc: `MALLOC` for resident sets, `KEEPING` for times.
    Raises RuntimeError with the end of the process's error output if it fails.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, target, json.dumps(kwargs)]
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    environment = os.environ | malloc | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{target} {kwargs}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_above(call: Callable[[], object]) -> int:
    """Return the bytes by which the resident set rises during ``call``; for a process of `in_a_process`."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main(target: str, kwargs: str) -> None:
    module, function = target.split(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(kwargs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
