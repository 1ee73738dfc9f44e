"""Which implementation of an op runs: decided from device and dtype before anything is computed.

``impl="auto"`` takes the fastest implementation that can run the call; an implementation that is named runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import importlib.util
import os
import typing
import warnings
from collections.abc import Callable, Sequence

import torch

LIBRARY = torch.library.Library("infopro_fast", "DEF")
LIBRARY.define("_isa(int level) -> int")  # instruction set of the CPU kernels; a level >= 0 sets it, for tests

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

SUFFIX = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}  # of a torch op's name, for what implements it
_FASTEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what impl="auto" tries, for tensors of this device type

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16), "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES}

# Whether Triton interprets its kernels on the CPU: its own switch for debugging, which it reads when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def _load(kind: str) -> str | None:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(glob.glob(os.path.join(package, f"_{kind}*.so")))
    if not found:
        return (
            f"no compiled {kind.upper()} kernels (_{kind}*.so) in {package}; "
            "build them with `pip install .`, in a checkout with `pip install -e .`"
        )
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


# At import: a compiler that traces an op finds constants here, not file names and dlopen.
_CPU_KERNELS_MISSING = _load("cpu")
_CUDA_KERNELS_MISSING = _load("cuda") if torch.version.cuda else "torch was built without CUDA"
_TRITON_MISSING = None if _installed("triton") else "triton is not installed"


def load_cpu_kernels() -> str | None:
    """None if the compiled CPU kernels are loaded, else the reason why not."""
    return _CPU_KERNELS_MISSING


def cpu_isa() -> str | None:
    """Instruction set the CPU kernels run with ("avx512", "avx2", "baseline"), or None when they are not loaded."""
    if load_cpu_kernels() is not None:
        return None
    return ("baseline", "avx2", "avx512")[torch.ops.infopro_fast._isa(-1)]


# ---------------------------------------------------------------------------------------------------------------------
# One opaque torch op a direction and implementation


_CUDA_OPS: set[str] = set()
_TRITON_OPS: set[str] = set()


def define_kernels(
    schema: str, fake: Callable, *, cuda: bool = False, triton: bool = True, triton_fake: Callable | None = None
) -> dict[str, typing.Any]:
    """Define one direction of an op, once for each implementation of it, and return the torch ops by implementation.

    schema: "<op>_forward(...) -> ..." or "<op>_backward(...) -> ..."; all implementations share it, and ``fake`` too. The compiled
        ones register themselves; Triton's is the function ``forward`` or ``backward`` of ``triton_kernels/<op>.py``, imported when first called.
    cuda, triton: whether the op has CUDA C++ kernels, and Triton kernels (never without that file).
    triton_fake: the fake of the Triton kernels, where they give another dtype.
    """
    name, arguments = schema.split("(", 1)
    op, direction = name.rsplit("_", 1)
    if cuda:
        _CUDA_OPS.add(op)
    triton = triton and _installed(f"{__package__}.triton_kernels.{op}")
    if triton:
        _TRITON_OPS.add(op)
    defined = {}
    for impl in ("cpu", *(["triton"] if triton else []), *(["cuda"] if cuda else [])):
        full = name + SUFFIX[impl]
        LIBRARY.define(f"{full}({arguments}")
        torch.library.register_fake(f"infopro_fast::{full}", triton_fake or fake if impl == "triton" else fake, lib=LIBRARY)
        defined[impl] = getattr(torch.ops.infopro_fast, full).default
    for key in () if not triton else ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        LIBRARY.impl(name + SUFFIX["triton"], _imported_when_called(f"{__package__}.triton_kernels.{op}", direction), key)
    return defined


def _imported_when_called(module: str, function: str) -> Callable:
    """A launcher, which runs with the device of its first argument, a tensor in every schema, as the current one: Triton asks for that."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Which one runs


def available(op: str, device: str | torch.device) -> dict[str, str | None]:
    """For each implementation of ``op`` on ``device``: None if it can run there, else the reason why it cannot.

    >>> available("supcon_loss", "cpu")["reference"] is None
    True
    """
    from infopro_fast import ops

    if op not in ops.OPS:
        raise ValueError(f"available: op: expected one of {sorted(ops.OPS)}, got {op!r}")
    device = torch.device(device)
    reasons = {impl: missing(op, impl, device) for impl in SUFFIX}
    if device.type == "cuda" and not torch.cuda.is_available():
        reasons |= {impl: "torch sees no CUDA device" for impl in ("triton", "cuda") if reasons[impl] is None}
    return {"reference": None} | reasons


def has_kernels(op: str, impl: str) -> bool:
    """Whether ``op`` is implemented by ``impl`` on any machine. Every op is in plain torch, for the CPU and in Triton; some in CUDA C++."""
    return op in {"triton": _TRITON_OPS, "cuda": _CUDA_OPS}.get(impl, (op,))


def missing(op: str, impl: str, device: torch.device) -> str | None:
    """Why the kernels of ``impl`` cannot run on ``device``, None if they can."""
    kind = device.type
    if impl == "cpu":
        return load_cpu_kernels() if kind == "cpu" else f"runs on CPU tensors, not on {kind}"
    if impl == "cuda":
        if not has_kernels(op, impl):
            return f"{op} has no CUDA C++ kernels"
        return (_CUDA_KERNELS_MISSING or _too_old(device)) if kind == "cuda" else f"runs on CUDA tensors, not on {kind}"
    if not has_kernels(op, impl):
        return f"{op} has no Triton kernels"
    if kind == "cpu" and not INTERPRETED:
        return "runs on CUDA tensors; on CPU tensors in Triton's interpreter alone, if TRITON_INTERPRET=1 was set at import"
    if kind not in ("cpu", "cuda"):
        return f"runs on CUDA tensors, not on {kind}"
    return _TRITON_MISSING or (_too_old(device) if kind == "cuda" else None)


_CAPABILITY: dict[int | None, tuple[int, int]] = {}  # by index of the device: asking the driver takes longer than a call may


def _too_old(device: torch.device) -> str | None:
    if torch.version.hip:
        return "the kernels are made for NVIDIA GPUs, this torch is for AMD's"
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # a compiler can trace no driver call
        return None
    if device.index not in _CAPABILITY:
        _CAPABILITY[device.index] = torch.cuda.get_device_capability(device)
    major, minor = _CAPABILITY[device.index]
    return None if major >= 8 else f"needs compute capability 8.0 or later, this device has {major}.{minor}"


def resolve(op: str, impl: str, tensors: dict[str, torch.Tensor | None], limitation: str | dict[str, str | None] | None = None) -> str:
    """The implementation that runs this call of ``op``.

    tensors: the tensor arguments by name; limitation: what in this call only the reference can do, or by implementation what each cannot,
        or None.
    Raises ValueError if ``impl`` is unknown or, being named, cannot run this call; TypeError for a dtype no
    implementation takes; ValueError for tensors on different devices.
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
        _warn_slow(op, reason)
    return "reference"


def _wrong_dtype(given: dict[str, torch.Tensor], impl: str) -> str | None:
    for name, t in given.items():
        if t.is_floating_point() and t.dtype not in _DTYPES[impl]:
            return f"{name} is {t.dtype}, the kernels take {_DTYPES[impl]}"
    return None


@functools.cache
def _warn_slow(op: str, reason: str) -> None:
    warnings.warn(f"{op}: impl='auto' takes the slow reference: {reason}", stacklevel=5)


class _FirstOrder(torch.autograd.Function):
    """Hands gradients through; differentiating them again raises."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(g.detach() for g in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: the kernels have no second derivative; impl='reference' has")


def first_order(op: str, inputs: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]) -> tuple:
    """The gradients that a kernel found in the backward of ``op``, such that differentiating them again raises.

    once_differentiable only marks them where the upstream gradient itself requires grad, and elsewhere drops second derivatives.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(grads)
    found = [g for g in grads if g is not None]
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    marked = iter(_FirstOrder.apply(op, len(found), *found, *leaves))
    return tuple(None if g is None else next(marked) for g in grads)


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what an op accumulates in and returns its loss in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast changes nothing; device types that know no autocast (meta) need none."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()
