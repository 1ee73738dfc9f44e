"""What the launchers of Triton kernels share: the GPU they launch on, torch's float32 precision, and how a kernel is described to be
compiled ahead of time."""

from __future__ import annotations

import functools
import typing

import torch
import triton
import triton.language as tl

# Whether kernels are interpreted on the CPU. There bfloat16 is not computed with: it is widened right after a load.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)

LAUNCH_OPTIONS = {"enable_fp_fusion": True}

# Where three TF32 products a float32 one (as exact as a float32 product is) are faster than the GPU's float32 units.
_SPLIT_FLOAT32 = (80, 90, 100, 103)


def launched(function: typing.Callable | None = None, **options):
    """`triton.jit` for what is launched: a product and a sum are one instruction, whatever Triton's default is (3.10 changes it)."""
    if function is None:
        return functools.partial(launched, **options)
    jitted = triton.jit(function, **options)
    jitted.run = functools.partial(jitted.run, **LAUNCH_OPTIONS)
    return jitted


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in ``dtype``, to the nearest. (The interpreter cuts off what bfloat16 has no room for, so there it is rounded before.)"""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def spread(condition, block):
    """A scalar condition as a mask of the shape of ``block``. (Broadcast as it is, Triton 3.9's interpreter makes integers of it.)"""
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
) -> Compilation:  # fmt: skip
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
    """Compute capability as 10 * major + minor; that of an H100 for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; few for the CPU, so that the interpreter sees a split as soon as a GPU would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dot_precision(dtype: torch.dtype, cc: int) -> str:
    """``input_precision`` of a tl.dot on ``dtype``: TF32 where torch allows it for matmuls, else float32's own precision."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if cc in _SPLIT_FLOAT32 else "ieee"
