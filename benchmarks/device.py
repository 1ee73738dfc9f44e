"""Where a number comes from: device, versions and commit, which stand beside every number."""

from __future__ import annotations

import functools
import os

import torch

from infopro_fast import info


@functools.cache
def provenance(device: str = "cpu") -> dict[str, str | int]:
    """Return what a row needs to be compared with another. device: "cpu" or "cuda"."""
    facts = info.collect()
    versions, cpu = facts["versions"], facts["cpu"]
    where = {
        "device": f"{cpu['model']}, {os.cpu_count()} CPUs", "threads": torch.get_num_threads(),
        "isa": cpu["isa"] or "no kernels",
    }
    if device == "cuda":
        isa = f"CUDA {torch.version.cuda}, Triton {versions['triton'] or 'none'}"
        where = {"device": facts["cuda"]["device"], "threads": 0, "isa": isa}
    own = {name: versions[name] for name in ("torch", "python", "infopro_fast")}
    return where | own | {"commit": versions["commit"] or "unknown"}
