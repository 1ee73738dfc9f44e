"""The modes of a resize, as `torch.nn.functional.interpolate` has them.

`csrc/resize.h`, `csrc/cuda/resize.cuh` and `triton_kernels/resize.py` say where each samples;
`tests/test_resize.py` and `tests/interpreted/test_resize.py` compare them with torch.
"""

from __future__ import annotations

# A resize is an index into these: bilinear with align_corners=True, nearest, bilinear with
# align_corners=False.
RESIZES = ("corners", "nearest", "centers")
CORNERS, NEAREST, CENTERS = range(3)


def resize_of(mode: str, align_corners: bool | None) -> int:
    """Return the index into RESIZES for the arguments of `torch.nn.functional.interpolate`."""
    return NEAREST if mode == "nearest" else CORNERS if align_corners else CENTERS


def most_sources(outputs: int, n_in: int, n_out: int) -> int:
    """Upper bound on the span of inputs that neighbouring outputs mix, for CORNERS and NEAREST."""
    steps = min(outputs, n_out) - 1
    return min(n_in, steps * (n_in - 1) // max(n_out - 1, 1) + 3)
