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


def launched(function: typing.Callable | None = None, **options):
    """`triton.jit` of a kernel that is launched: with LAUNCH_OPTIONS, whatever Triton's defaults are."""
    if function is None:
        return functools.partial(launched, **options)
    jitted = triton.jit(function, **options)
    jitted.run = functools.partial(jitted.run, **LAUNCH_OPTIONS)
    return jitted


@triton.jit
def rounded(x, dtype):
    """float32 x in ``dtype``, to the nearest. The interpreter truncates, so x is rounded before."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def spread(condition, block):
    """A scalar condition as a mask like ``block``; Triton 3.9's interpreter broadcasts it to integers."""
    return tl.full(block.shape, condition.to(tl.int32), tl.int32) != 0


class Compilation(typing.NamedTuple):
    """A kernel as one of its launches compiles it."""

    kernel: typing.Any
    signature: dict[str, str]  # Triton type of every argument, "constexpr" for those in ``constexprs``
    constexprs: dict[str, typing.Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool  # whether a tl.dot of it is meant for them
    aligned: tuple[str, ...]  # arguments that are multiples of 16 (pointers: addresses), as in most calls


def compilation(
    kernel, types: dict[str, str], constexprs: dict, unaligned: typing.Container[str] = (), warps: int = 4,
    stages: int = 3, tensor_cores: bool = False,
) -> Compilation:
    """Describe a compilation: ``types`` and ``constexprs`` of those of its arguments that the kernel has.

    Other arguments: int32 where the name is that of a size or a stride, float32 pointers else.
    """
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constexprs]
    number = lambda name: name.isupper() or name in ("h", "w") or "stride" in name  # noqa: E731
    signature = {name: types.get(name, "i32" if number(name) else "*fp32") for name in names}
    aligned = tuple(name for name in names if name not in unaligned and signature[name] != "fp32")
    signature |= dict.fromkeys(constexprs, "constexpr")
    return Compilation(kernel, signature, constexprs, warps, stages, tensor_cores, aligned)


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
