"""Which implementation of an op runs: decided from device and dtype before anything is computed.

``impl="auto"`` takes the fastest implementation that can run the call; an implementation that is named runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import warnings
from collections.abc import Sequence

import torch

LIBRARY = torch.library.Library("infopro_fast", "DEF")
LIBRARY.define("_isa(int level) -> int")  # instruction set of the CPU kernels; a level >= 0 sets it, for tests

IMPLEMENTATIONS = ("reference", "cpu")

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> str | None:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(glob.glob(os.path.join(package, "_cpu*.so")))
    if not found:
        return f"no compiled CPU kernels (_cpu*.so) in {package}; build them with `pip install .`, in a checkout with `pip install -e .`"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0]} does not load: {error}"
    return None


_CPU_KERNELS_MISSING = _load()  # at import: a compiler that traces an op finds a constant here, not file names and dlopen


def load_cpu_kernels() -> str | None:
    """None if the compiled CPU kernels are loaded, else the reason why not."""
    return _CPU_KERNELS_MISSING


def cpu_isa() -> str | None:
    """Instruction set the CPU kernels run with ("avx512", "avx2", "baseline"), or None when they are not loaded."""
    if load_cpu_kernels() is not None:
        return None
    return ("baseline", "avx2", "avx512")[torch.ops.infopro_fast._isa(-1)]


def available(op: str, device: str | torch.device) -> dict[str, str | None]:
    """For each implementation of ``op`` on ``device``: None if it can run there, else the reason why it cannot.

    >>> available("supcon_loss", "cpu")["reference"] is None
    True
    """
    from infopro_fast import ops

    if op not in ops.OPS:
        raise ValueError(f"available: op: expected one of {sorted(ops.OPS)}, got {op!r}")
    kind = torch.device(device).type
    cpu = load_cpu_kernels() if kind == "cpu" else f"runs on CPU tensors, not on {kind}"
    return {"reference": None, "cpu": cpu}


def resolve(op: str, impl: str, tensors: dict[str, torch.Tensor | None], limitation: str | None = None) -> str:
    """The implementation that runs this call of ``op``.

    tensors: the tensor arguments by name; limitation: what in this call only the reference can do, or None.
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
    reason = load_cpu_kernels() if first.device.type == "cpu" else f"{first_name} is on {first.device}, not on the CPU"
    if reason is None:
        for name, t in given.items():
            if t.is_floating_point() and t.dtype not in _CPU_DTYPES:
                reason = f"{name} is {t.dtype}, the kernels take {_CPU_DTYPES}"
    if (reason or limitation) is None:
        return "cpu"
    if impl == "cpu":
        raise ValueError(f"{op}: impl='cpu' cannot run this call: {reason or limitation}")
    if first.device.type == "cpu":
        _warn_slow(op, reason or limitation)
    return "reference"


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
