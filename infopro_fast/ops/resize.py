"""Where a resize samples along an axis, as `torch.nn.functional.interpolate` does: the one place in Python.

`csrc/resize.h`, `csrc/cuda/resize.cuh` and `triton_kernels/resize.py` say the same in their languages;
`tests/test_resize.py` and `tests/interpreted/test_resize.py` compare them all.
"""

from __future__ import annotations

import struct

# A resize is an index into these: bilinear with align_corners=True, nearest, bilinear with
# align_corners=False.
RESIZES = ("corners", "nearest", "centers")
CORNERS, NEAREST, CENTERS = range(3)


def resize_of(mode: str, align_corners: bool | None) -> int:
    """Return the index into RESIZES for the arguments of `torch.nn.functional.interpolate`."""
    return NEAREST if mode == "nearest" else CORNERS if align_corners else CENTERS


def source(p: int, n_in: int, n_out: int, resize: int) -> tuple[int, int, float]:
    """Return the two inputs that output ``p`` mixes, of 0 <= p < n_out, and the weight of the second.

    A bilinear position is an exact fraction, as in the kernels; torch rounds it. torch places nearest samples
    with a float32 scale, whatever the dtype, and so does this.
    """
    if resize == NEAREST:
        low = min(int(_float32(p * _float32(n_in / n_out))), n_in - 1)
        return low, low, 0.0
    if resize == CORNERS:
        position, unit = p * (n_in - 1), max(n_out - 1, 1)
    else:
        position, unit = max((2 * p + 1) * n_in - n_out, 0), 2 * n_out
    low = min(position // unit, n_in - 1)
    return low, min(low + 1, n_in - 1), (position - low * unit) / unit


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def most_sources(outputs: int, n_in: int, n_out: int) -> int:
    """Upper bound on the span of inputs that neighbouring outputs mix, for CORNERS and NEAREST."""
    steps = min(outputs, n_out) - 1
    return min(n_in, steps * (n_in - 1) // max(n_out - 1, 1) + 3)


def fits(h: int, w: int, H: int, W: int) -> bool:
    """Whether Triton kernels can count the positions of a resize from (h, w) to (H, W) in 32 bits."""
    return max((2 * H + 1) * h, (2 * W + 1) * w) < 2**31
