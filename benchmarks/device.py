"""Where a number comes from: device, versions and commit, which stand beside every number."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform

import torch

import infopro_fast
from infopro_fast import info, ops


@functools.cache
def provenance(device: str = "cpu") -> dict[str, str | int]:
    """Return what a row needs to be compared with another. device: "cpu" or "cuda"."""
    where = {"device": processor(), "threads": torch.get_num_threads(), "isa": ops.cpu_isa() or "no kernels"}
    if device == "cuda":
        isa = f"CUDA {torch.version.cuda}, Triton {_triton()}"
        where = {"device": torch.cuda.get_device_name(), "threads": 0, "isa": isa}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    own = {"infopro_fast": infopro_fast.__version__, "commit": info.commit() or "unknown"}
    return where | versions | own


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"
