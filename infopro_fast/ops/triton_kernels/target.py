"""What launchers of Triton kernels share: the GPU, float32 precision, descriptions of compilations."""

from __future__ import annotations

import functools
import typing

import torch
import triton
import triton.language as tl

# Whether kernels are interpreted, on the CPU: there bfloat16 is widened right after a load.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)

# Fused multiply-adds: the default until Triton 3.9, which warns that 3.10 will not fuse them unless asked.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

# Capabilities on which three TF32 products, as exact as a float32 product, are faster than float32 units.
_SPLIT_FLOAT32 = (80, 90, 100, 103)


def launched(function: typing.Callable):
    """`triton.jit` of a kernel that is launched: with LAUNCH_OPTIONS, whatever Triton's defaults are."""
    jitted = triton.jit(function)
    jitted.run = functools.partial(jitted.run, **LAUNCH_OPTIONS)
    return jitted


@triton.jit
def rounded(x, dtype):
    """float32 x in ``dtype``, to the nearest. The interpreter truncates, so x is rounded before."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability, 10 * major + minor; an H100's for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; four for the CPU, so that small tests in the interpreter split work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dot_precision(dtype: torch.dtype, cc: int) -> str:
    """``input_precision`` of a tl.dot on ``dtype``: TF32 where torch allows it for matmuls."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if cc in _SPLIT_FLOAT32 else "ieee"
