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
    monkeypatch.setattr(module, "multiprocessors", lambda device: H100)
    with _Allocated() as found:
        call()
    return found.bytes


@pytest.mark.parametrize("N", (512, 1024, 4096))
@pytest.mark.parametrize("C, h", ((16, 32), (32, 16), (64, 8)))
def test_reconstruction_loss(N, C, h, monkeypatch):
    """To the byte what the plan says, which tests/test_cuda.py holds the peak on a GPU against."""
    from infopro_fast.ops.triton_kernels import reconstruction_loss as module
    from infopro_fast.ops.triton_kernels import reconstruction_loss_plan as plans

    K, H = 12, 32
    monkeypatch.setattr(module, "capability", lambda device: 90)
    features, image = torch.empty(N, C, h, h, device="meta"), torch.empty(N, 3, H, H, device="meta")
    w1, w2, of_k, of_3 = (
        torch.empty(size, device="meta") for size in ((K, C, 3, 3), (3, K, 3, 3), (K,), (3,))
    )
    shape = plans.Shape(N, C, h, h, H, H, K, False)
    parameters = (w1, of_k, of_k, of_k, w2, of_3)
    own = {sweep: plans.workspace(shape, sweep, 2 * H100) for sweep in ("statistics", "loss", "backward")}
    forward = allocated(
        module, monkeypatch, lambda: module.forward(
            features, image, *parameters, None, None, [], 1e-5, 0, 0, True
        )
    )
    assert forward == own["statistics"] + own["loss"] + 4 * (1 + 31 * K + 3)
    saved, grad = torch.empty(31 * K + 3, device="meta"), torch.empty((), device="meta")
    backward = allocated(
        module, monkeypatch, lambda: module.backward(
            grad, features, image, *parameters, saved, [], True, 1e-5, 0, 0, True, True
        )
    )
    assert backward == own["backward"] + 4 * (features.numel() + w1.numel())


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
