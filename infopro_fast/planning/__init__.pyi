from .building import build
from .fake import FakeTensorMode, build_fake, fake_batch
from .live import Bytes, LiveBytes
from .planner import best_cuts, largest_batch, largest_image, plan

__all__ = [
    "Bytes", "FakeTensorMode", "LiveBytes", "best_cuts", "build", "build_fake", "fake_batch", "largest_batch",
    "largest_image", "plan",
]  # fmt: skip
