"""The peak of a call as the operating system sees it, in a process of its own (Linux).

The high-water mark of the resident set, put back to the present value right before the call: it counts what no accounting inside
torch can, the workspaces of convolution libraries and of kernels.
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

# Blocks of 64 KiB and more come from mmap and go back when freed, so that nothing freed earlier hides in the heap.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

# For times instead: without these, a map's pages go back to the system after every use and are zeroed anew, a third of a step's time.
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


def in_a_process(target: str, timeout: float = 1800, malloc: dict[str, str] = MALLOC, **kwargs: Any) -> Any:
    """What the function ``target`` ("package.module:name") returns for ``kwargs``, all of it JSON, in a new process.

    malloc: settings of glibc's: `MALLOC` for resident sets, `KEEPING` for times.
    Raises RuntimeError with the end of its error output if it fails.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, target, json.dumps(kwargs)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | malloc | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{target} {kwargs}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_above(call: Callable[[], object]) -> int:
    """Bytes the resident set rises above its present size during ``call``. In a process that `in_a_process` started."""
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
