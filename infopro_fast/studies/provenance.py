"""Where a result was made, as the JSON of tables and analyses has it: no folder and no name of a machine, what it depends on alone."""

from __future__ import annotations

import os
from typing import Any

from infopro_fast import info


def provenance() -> dict[str, Any]:
    """{"cpu" (model), "cpus", "isa" (of the kernels), "gpu" (or None), "torch", "infopro_fast", "commit" (None outside a checkout)}."""
    facts = info.collect()
    return {
        "cpu": facts["cpu"]["model"], "cpus": os.cpu_count(), "isa": facts["cpu"]["isa"], "gpu": facts["cuda"]["device"],
        "torch": facts["versions"]["torch"], "infopro_fast": facts["versions"]["infopro_fast"], "commit": facts["versions"]["commit"],
    }  # fmt: skip
