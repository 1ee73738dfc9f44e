from .fake import FakeTensorMode, build_fake, fake_batch
from .live import Bytes, LiveBytes
from .planner import best_cuts, largest_batch, largest_image, make_plan
from .step import ModuleMemory, StepMemory, measure_step

__all__ = [
    "Bytes", "FakeTensorMode", "LiveBytes", "ModuleMemory", "StepMemory", "best_cuts", "build_fake",
    "fake_batch", "largest_batch", "largest_image", "make_plan", "measure_step",
]  # fmt: skip
