"""Memory of training in local modules: measured, planned, compared.

- `measure_step`: bytes of every module in a step of a `LocalTrainer`, on any device; under `FakeTensorMode`
  nothing runs;
- `LiveBytes`: bytes alive at any point of any program, by purpose;
- `make_plan`, `largest_batch`, `largest_image`: where to cut a network, and what fits into a budget;
- `compare`: ways to train the same network side by side.
"""

from .fake import FakeTensorMode, build_fake, fake_batch
from .live import Bytes, LiveBytes
from .planner import best_cuts, largest_batch, largest_image, make_plan
from .step import ModuleMemory, StepMemory, measure_step

__all__ = [
    "Bytes",
    "FakeTensorMode",
    "LiveBytes",
    "ModuleMemory",
    "StepMemory",
    "best_cuts",
    "build_fake",
    "fake_batch",
    "largest_batch",
    "largest_image",
    "make_plan",
    "measure_step",
]
