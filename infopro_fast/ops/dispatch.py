"""Choice of the implementation that runs an op, made from device and dtype before anything is computed.

``impl="auto"`` takes the fastest implementation that can run the call. A named implementation runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import importlib.util
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

LIBRARY = torch.library.Library("infopro_fast", "DEF")
LIBRARY.define("_isa(int level) -> int")  # the CPU kernels' instruction set; a level >= 0 sets it, for tests

OPS = (
    "reconstruction_loss", "supcon_loss", "linear_cross_entropy", "norm_relu_pool", "upsample_cross_entropy",
    "upsample_conv3x3",
)
IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

SUFFIX = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}  # of a torch op's name, by implementation
_FASTEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what impl="auto" tries, by type of device

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPES = {"cpu": _CPU_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES}

# Whether Triton interprets its kernels on the CPU, for debugging. It reads this when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def load_kernels(kind: str) -> str | None:
    """Load the compiled kernels of a kind; return None, or why they cannot be used."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(glob.glob(os.path.join(package, f"_{kind}*.so")))
    if not found:
        missing = f"no compiled {kind.upper()} kernels (_{kind}*.so) in {package}"
        others = (os.path.join(folder, "infopro_fast") for folder in sys.path)
        built = [folder for folder in others if glob.glob(os.path.join(folder, f"_{kind}*.so"))]
        if built:  # `python -m infopro_fast` in a checkout, after `pip install .`
            hidden = f"these sources hide the installed package in {built[0]}, which has them"
            return f"{missing}: {hidden}; run from another folder, or build here with `pip install -e .`"
        return f"{missing}; build them with `pip install .`, in a checkout with `pip install -e .`"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0]} does not load: {error}"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


# Why an implementation cannot run in this process, None if it can. Loaded at import: a compiler that traces
# an op finds constants here, not file names and dlopen.
UNAVAILABLE = {
    "cpu": load_kernels("cpu"),
    "cuda": load_kernels("cuda") if torch.version.cuda else "torch was built without CUDA",
    "triton": None if _installed("triton") else "triton is not installed",
}


def load_cpu_kernels() -> str | None:
    """Return why the CPU kernels cannot run, None if they can."""
    return UNAVAILABLE["cpu"]


def cpu_isa() -> str | None:
    """Return the CPU kernels' instruction set, "avx512", "avx2" or "baseline"; None if not loaded."""
    if load_cpu_kernels() is not None:
        return None
    return ("baseline", "avx2", "avx512")[torch.ops.infopro_fast._isa(-1)]


# ------------------------------------------------------------------------------------------------------------
# One opaque torch op a direction and implementation


_CUDA_OPS: set[str] = set()


def define_kernels(
    schema: str,
    fake: Callable,
    *,
    cuda: bool = False,
    triton: bool = True,
    triton_fake: Callable | None = None,
    cuda_arguments: str = "",
) -> dict[str, typing.Any]:
    """Define a torch op for each implementation of one direction of an op, and return them by implementation.

    Compiled kernels register themselves. Triton's are the function ``forward`` or ``backward`` in
    ``triton_kernels/<op>.py``, which is imported at the first call.

    Args:
        schema: "<op>_forward(...) -> ..." or "<op>_backward(...) -> ...", for all implementations.
        fake: the outputs' shapes and dtypes, for tracing.
        cuda, triton: whether there are CUDA C++ and Triton kernels.
        triton_fake: the fake of the Triton kernels, if they return another dtype.
        cuda_arguments: further arguments of the CUDA C++ kernels, as ", int name"; the fake takes them too.
    """
    name, arguments = schema.split("(", 1)
    op, direction = name.rsplit("_", 1)
    if cuda:
        _CUDA_OPS.add(op)
    defined = {}
    for impl in ("cpu", *(["triton"] if triton else []), *(["cuda"] if cuda else [])):
        full = name + SUFFIX[impl]
        further = f"{cuda_arguments}) ->" if impl == "cuda" else ") ->"
        LIBRARY.define(f"{full}({arguments.replace(') ->', further, 1)}")
        own_fake = triton_fake or fake if impl == "triton" else fake
        torch.library.register_fake(f"infopro_fast::{full}", own_fake, lib=LIBRARY)
        kernel = getattr(torch.ops.infopro_fast, full).default
        defined[impl] = _with_value_errors(kernel) if impl == "cpu" else kernel
    for key in () if not triton else ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        launcher = _imported_when_called(f"{__package__}.triton_kernels.{op}", direction)
        LIBRARY.impl(name + SUFFIX["triton"], launcher, key)
    return defined


def _with_value_errors(kernel: Callable) -> Callable:
    """Return the kernel. It refuses an argument by ValueError, of which torch 2.15 makes RuntimeError."""

    def call(*args):
        if torch.compiler.is_compiling():
            return kernel(*args)
        try:
            return kernel(*args)
        except RuntimeError as error:
            if str(error).partition(":")[0] not in OPS:
                raise
            raise ValueError(str(error)) from None

    return call


def _imported_when_called(module: str, function: str) -> Callable:
    """Return a launcher. It makes the device of its first argument the current one, as Triton needs."""
    found = None

    def call(*args):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(module), function)
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return found(*args)
        with torch.cuda.device(device):
            return found(*args)

    return call


# ------------------------------------------------------------------------------------------------------------
# The choice


def available(op: str, device: str | torch.device) -> dict[str, str | None]:
    """Return for each implementation of ``op`` why it cannot run on ``device``, or None if it can.

    Raises ValueError if there is no such op.

    >>> available("supcon_loss", "cpu")["reference"] is None
    True
    """
    if op not in OPS:
        raise ValueError(f"available: op: expected one of {sorted(OPS)}, got {op!r}")
    device = torch.device(device)
    reasons = {impl: missing(op, impl, device) for impl in SUFFIX}
    if device.type == "cuda" and not torch.cuda.is_available():
        reasons |= {impl: "torch sees no CUDA device" for impl in ("triton", "cuda") if reasons[impl] is None}
    return {"reference": None} | reasons


def has_kernels(op: str, impl: str) -> bool:
    """Whether ``impl`` implements ``op`` on some machine: "cuda" implements some ops, the others all."""
    return impl != "cuda" or op in _CUDA_OPS


def missing(op: str, impl: str, device: torch.device) -> str | None:
    """Return why the kernels of ``impl`` cannot run on ``device``, None if they can."""
    kind = device.type
    if impl == "cpu":
        return load_cpu_kernels() if kind == "cpu" else f"runs on CPU tensors, not on {kind}"
    if not has_kernels(op, impl):
        return f"{op} has no CUDA C++ kernels"
    if impl == "triton" and kind == "cpu" and INTERPRETED:
        return UNAVAILABLE["triton"]
    if impl == "triton" and kind == "cpu":
        interpreter = "on CPU tensors in Triton's interpreter alone, if TRITON_INTERPRET=1 was set at import"
        return f"runs on CUDA tensors; {interpreter}"
    if kind != "cuda":
        return f"runs on CUDA tensors, not on {kind}"
    return UNAVAILABLE[impl] or too_old(device)


capabilities: dict[int | None, tuple[int, int]] = {}  # by device index: asking the driver is slow


def too_old(device: torch.device) -> str | None:
    """Return why the GPU kernels are not made for a CUDA device, None if they are."""
    if torch.version.hip:
        return "the kernels are made for NVIDIA GPUs, this torch is for AMD's"
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # a compiler can trace no driver call
        return None
    if device.index not in capabilities:
        capabilities[device.index] = torch.cuda.get_device_capability(device)
    major, minor = capabilities[device.index]
    return None if major >= 8 else f"needs compute capability 8.0 or later, this device has {major}.{minor}"


def check_floating(op: str, tensors: Mapping[str, typing.Any]) -> None:
    """Raise TypeError that names the first argument which is no floating-point tensor."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            got = getattr(t, "dtype", type(t).__name__)
            raise TypeError(f"{op}: {name}: expected a floating-point tensor, got {got}")


def resolve(
    op: str,
    impl: str,
    tensors: Mapping[str, torch.Tensor | None],
    limitation: str | dict[str, str | None] | None = None,
) -> str:
    """Return the implementation that runs this call of ``op``.

    Args:
        impl: "auto", or the implementation that must run.
        tensors: the tensor arguments by name.
        limitation: why only the reference can run the call, or why each implementation cannot, or None.

    Raises:
        ValueError: ``impl`` is unknown, a named ``impl`` cannot run this call (its dtypes included), tensors
            are on different devices, or a transform of torch.func needs the reference.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        if t.device != first.device:
            raise ValueError(f"{op}: {name}: expected on {first.device} like {first_name}, got {t.device}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{op}: impl: expected one of {('auto', *IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "reference":
        return "reference"
    if _is_transformed(given.values()):
        raise ValueError(f"{op}: impl={impl!r} cannot run under torch.func transforms; impl='reference' can")
    reason = None
    for candidate in _FASTEST_FIRST.get(first.device.type, ()) if impl == "auto" else (impl,):
        reason = missing(op, candidate, first.device)
        if reason is not None and impl != "auto":
            reason = f"{first_name} is on {first.device}: {reason}"
        reason = reason or _wrong_dtype(given, candidate)
        reason = reason or (limitation.get(candidate) if isinstance(limitation, dict) else limitation)
        if reason is None:
            return candidate
    if impl != "auto":
        raise ValueError(f"{op}: impl={impl!r} cannot run this call: {reason}")
    if reason is not None:
        warn_slow(op, reason)
    return "reference"


def _is_transformed(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether vmap, grad or jvp of torch.func, or forward differentiation, transform the call."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    forward = torch.autograd.forward_ad
    return forward._current_level >= 0 and any(forward.unpack_dual(t).tangent is not None for t in tensors)


def _wrong_dtype(given: dict[str, torch.Tensor], impl: str) -> str | None:
    for name, t in given.items():
        if t.is_floating_point() and t.dtype not in _DTYPES[impl]:
            return f"{name} is {t.dtype}, the kernels take {_DTYPES[impl]}"
    return None


@functools.cache
def warn_slow(op: str, reason: str) -> None:
    """Warn, once for each reason, that "auto" takes the reference on a GPU."""
    warnings.warn(f"{op}: impl='auto' takes the slow reference: {reason}", stacklevel=5)


class _FirstOrder(torch.autograd.Function):
    """Hand gradients through; raise if they are differentiated again."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(g.detach() for g in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: the kernels have no second derivative; impl='reference' has")


def first_order(
    op: str, inputs: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients that a kernel found in the backward of ``op``; differentiating them again raises.

    once_differentiable marks them only if the upstream gradient requires grad; otherwise it silently drops
    second derivatives.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(grads)
    found = [g for g in grads if g is not None]
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    marked = iter(_FirstOrder.apply(op, len(found), *found, *leaves))
    return tuple(None if g is None else next(marked) for g in grads)


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return the dtype of an op's arithmetic and loss: float64 if any tensor is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which autocast changes nothing; device types without autocast (meta) need none."""
    if torch.compiler.is_compiling():  # the compiler of torch 2.10 cannot trace the question
        known = device.type != "meta"
    else:
        known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()
