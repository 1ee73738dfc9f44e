"""What launchers of Triton kernels allocate, counted on meta tensors. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

H100 = 132  # multiprocessors


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class _Allocated(TorchDispatchMode):
    """Bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.bytes += out.numel() * out.element_size()
        return out


def allocated(module, monkeypatch, call):
    for name in list(vars(module)):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, _NoKernel())
    monkeypatch.setattr(module, "multiprocessors", lambda device: H100, raising=False)
    with _Allocated() as found:
        call()
    return found.bytes


@pytest.mark.parametrize("M, splits", ((8192, 4), (65536, 1)))
@pytest.mark.parametrize("dtype, parts", ((torch.float32, 2), (torch.bfloat16, 0)))
def test_supcon_loss(M, splits, dtype, parts, monkeypatch):
    """O(M), not M x M. Forward: loss, 3 numbers a row, parts; backward: those, gradient, one a split."""
    from infopro_fast.ops.triton_kernels import supcon_loss as module

    D = 128
    x, labels = torch.empty(M, D, dtype=dtype, device="meta"), torch.empty(M, dtype=torch.long, device="meta")
    loss, saved = torch.empty(M, device="meta"), torch.empty(3, M, device="meta")
    pieces = parts * 2 * M * D
    forward = allocated(module, monkeypatch, lambda: module.forward(x, labels, 0.07, True))
    assert forward <= pieces + 4 * M * (1 + 3 + 1 + 4 * splits)
    backward = allocated(module, monkeypatch, lambda: module.backward(loss, x, labels, saved, 0.07, True))
    assert backward <= pieces + 4 * M * D * splits + x.numel() * x.element_size() + 4 * M * (3 + 1 + 1) + 4
    assert M < 65536 or forward + backward < 2**28


def test_linear_cross_entropy_of_many_classes(monkeypatch):
    """A chunk of the logits at once, not all 2^31 of them."""
    from infopro_fast.ops.triton_kernels import linear_cross_entropy as module

    N, D, C = 65536, 64, 32768
    x, weight = torch.empty(N, D, device="meta"), torch.empty(C, D, device="meta")
    target = torch.empty(N, dtype=torch.long, device="meta")
    call = (x, weight, target, None, None, -100, 0.0, module.MEAN)
    forward = allocated(module, monkeypatch, lambda: module.forward(*call))
    assert forward <= 4 * (module.MOST_LOGITS + 3 * N) + 16
