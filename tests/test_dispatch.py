"""Which implementation runs, on fake CUDA tensors and on the CPU; when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import infopro_fast
from infopro_fast import ops
from infopro_fast.ops import dispatch
from tests.op_cases import SMALL

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def on_cuda(monkeypatch):
    """Fake CUDA tensors; dispatch as on a machine with an H100 and without compiled CUDA kernels."""
    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", "none were built")
    monkeypatch.setattr(dispatch, "too_old", lambda device: None)
    with FakeTensorMode():
        yield torch.device("cuda")


class _Calls(TorchDispatchMode):
    """Record the opaque ops that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "infopro_fast":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def tensors(device, dtype=torch.float32):
    return {
        "features": torch.empty(6, 4, device=device, dtype=dtype),
        "labels": torch.zeros(6, dtype=torch.long, device=device),
    }


def test_triton_is_imported_when_a_kernel_runs():
    script = """
        import sys
        import torch
        before = set(sys.modules)
        from infopro_fast import ops
        for op in ops.OPS:
            ops.available(op, "cpu"), ops.available(op, "cuda")
        ops.supcon_loss(torch.randn(4, 3, requires_grad=True), torch.arange(4) % 2).backward()
        assert not any(name.partition(".")[0] == "triton" for name in set(sys.modules) - before)
        assert not any(name.startswith("infopro_fast.ops.triton_kernels.") for name in sys.modules)
        """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr


def test_auto_on_cuda_takes_the_compiled_kernels_then_triton(on_cuda, monkeypatch):
    case = "reconstruction_loss", "auto", tensors(on_cuda)
    assert dispatch.resolve(*case) == "triton"
    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", None)
    assert dispatch.resolve(*case) == "cuda"
    assert dispatch.resolve("supcon_loss", "auto", tensors(on_cuda)) == "triton"  # it has no compiled ones


def chain_call(impl: str, up: torch.nn.Upsample):
    """Call the op with a chain decoder of fake CUDA tensors; return the opaque ops that ran."""
    nn = torch.nn
    with torch.device("cuda"):
        decoder = nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), up, nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid()
        )
    image = torch.empty(2, 3, *(int(4 * f) for f in up.scale_factor), device="cuda")
    with _Calls() as calls:
        ops.reconstruction_loss(torch.empty(2, 2, 4, 4, device="cuda"), image, decoder, impl=impl)
    return calls.names


def test_auto_on_cuda_takes_the_compiled_kernels_for_the_stages_of_a_chain_that_have_some(
    on_cuda, monkeypatch
):
    doubled, odd = (torch.nn.Upsample(scale_factor=(f, f)) for f in (2, 1.6))
    triton, cuda = (
        ["chain_stage_forward_triton", f"chain_loss_forward_{impl}"] for impl in ("triton", "cuda")
    )
    assert chain_call("auto", doubled) == triton
    dispatch.warn_slow.cache_clear()
    with pytest.warns(
        UserWarning, match="impl='auto' takes the slow reference: an Upsample by .* no whole size"
    ):
        assert chain_call("auto", odd) == ["outside_unit_range"]  # the reference
    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", None)
    for up in (doubled, odd):  # whose factor the CUDA C++ kernels take
        assert chain_call("auto", up) == chain_call("cuda", up) == cuda
    assert chain_call("triton", doubled) == triton
    wide = torch.nn.Upsample(scale_factor=(17, 1))
    assert chain_call("auto", wide) == triton
    with pytest.raises(
        ValueError,
        match=r"impl='cuda' cannot run this call: the last stage: maps of \(4, 4\) become \(68, 4\)",
    ):
        chain_call("cuda", wide)
    monkeypatch.setitem(dispatch.UNAVAILABLE, "triton", "triton is not installed")
    with pytest.raises(
        ValueError,
        match=r"an earlier stage has Triton kernels alone \(a 1x1 convolution .*\): triton is not installed",
    ):
        chain_call("cuda", doubled)


def test_auto_on_cuda_takes_triton_for_more_hidden_channels_than_shared_memory_holds(on_cuda, monkeypatch):
    def call(impl, K, H):
        nn = torch.nn
        with torch.device("cuda"):
            layers = (
                nn.Conv2d(2, K, 3, padding=1), nn.BatchNorm2d(K), nn.ReLU(), nn.Conv2d(K, 3, 3, padding=1),
                nn.Sigmoid(),
            )
        with _Calls() as calls:
            features, image = torch.empty(2, 2, 8, 8, device="cuda"), torch.empty(2, 3, H, H, device="cuda")
            ops.reconstruction_loss(features, image, nn.Sequential(*layers), impl=impl)
        return calls.names

    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", None)
    cuda = ["reconstruction_loss_forward_cuda"]
    triton = ["chain_stage_forward_triton", "chain_loss_forward_triton"]
    assert call("auto", 140, 32) == call("cuda", 140, 32) == cuda
    assert call("auto", 141, 32) == call("triton", 141, 32) == triton
    assert call("auto", 12, 2**15) == triton  # 2^31 pixels
    with pytest.raises(
        ValueError, match=r"impl='cuda' cannot run this call: 141 hidden channels of maps of \(8, 8\) resized"
    ):
        call("cuda", 141, 32)


def test_auto_on_cuda_resizes_and_classifies_with_triton_what_its_counters_hold(on_cuda):
    def call(C, h, H):
        with _Calls() as calls:
            logits, target = (
                torch.empty(70, C, h, 1, device="cuda"),
                torch.zeros(70, H, 1, dtype=torch.uint8, device="cuda"),
            )
            ops.upsample_cross_entropy(logits, target)
        return calls.names

    assert call(1000, 2, 70000) == ["upsample_cross_entropy_forward_triton"]
    dispatch.warn_slow.cache_clear()
    with pytest.warns(
        UserWarning,
        match="impl='auto' takes the slow reference: logits .* need more than 32 bits to count in",
    ):
        assert call(2, 40000, 40000) == []


def test_a_network_by_cuda_has_the_compiled_kernels_where_there_are_some(on_cuda, monkeypatch):
    assert [op for op in ops.OPS if ops.has_kernels(op, "cuda")] == ["reconstruction_loss"]
    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", None)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *args, **options: self
    )  # into another format: fake parameters cannot be
    with torch.device("cuda"):
        net = infopro_fast.build("resnet20", 2, "contrast", lambdas=(1, 1, 1, 1), impl="cuda")
        image, label = torch.empty(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    with _Calls() as calls:
        h = image
        for stage, local_loss in zip(net.stages, net.local_losses, strict=True):
            h = stage(h)
            assert list(local_loss.terms(h, image, label))
    expected = {f"{op}_forward_triton" for op in ("norm_relu_pool", "supcon_loss", "linear_cross_entropy")}
    assert set(calls.names) == expected | {"reconstruction_loss_forward_cuda"}


def test_auto_on_cuda_runs_the_triton_op(on_cuda):
    with _Calls() as calls:
        loss = ops.supcon_loss(
            torch.empty(6, 4, device="cuda", requires_grad=True),
            torch.zeros(6, dtype=torch.long, device="cuda"),
        )
    assert loss.device.type == "cuda" and loss.requires_grad
    assert calls.names == ["supcon_loss_forward_triton"]


def test_auto_on_cuda_tells_of_the_slow_reference(on_cuda):
    dispatch.warn_slow.cache_clear()
    with pytest.warns(
        UserWarning, match="supcon_loss: impl='auto' takes the slow reference: features is torch.float64"
    ):
        assert dispatch.resolve("supcon_loss", "auto", tensors(on_cuda, torch.float64)) == "reference"


@pytest.mark.parametrize(
    "impl, words",
    [
        ("cpu", "features is on cuda:0: runs on CPU tensors, not on cuda"),
        ("cuda", "features is on cuda:0: supcon_loss has no CUDA C\\+\\+ kernels"),
    ],
)
def test_a_named_implementation_that_cannot_run_on_cuda(impl, words, on_cuda):
    with pytest.raises(ValueError, match=f"supcon_loss: impl='{impl}' cannot run this call: {words}"):
        dispatch.resolve("supcon_loss", impl, tensors(on_cuda))


@pytest.mark.skipif(dispatch.INTERPRETED, reason="Triton interprets its kernels on CPU tensors here")
@pytest.mark.parametrize("op", SMALL)
def test_triton_on_cpu_tensors_says_what_it_takes(op):
    inputs = SMALL[op]().inputs(torch.float32)
    interpreter = "on CPU tensors in Triton's interpreter alone, if TRITON_INTERPRET=1"
    words = rf"\S+ is on cpu: runs on CUDA tensors; {interpreter}"
    with pytest.raises(ValueError, match=f"{op}: impl='triton' cannot run this call: {words}"):
        SMALL[op]().function("triton")(inputs)


def test_old_gpus_have_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(dispatch, "capabilities", {})
    assert (
        ops.available("supcon_loss", "cuda")["triton"]
        == "needs compute capability 8.0 or later, this device has 7.5"
    )


def test_without_triton_there_is_a_reason(on_cuda, monkeypatch):
    monkeypatch.setitem(dispatch.UNAVAILABLE, "triton", "triton is not installed")
    with pytest.raises(
        ValueError,
        match="^supcon_loss: impl='triton' cannot run this call: features is on cuda:0: triton is not inst",
    ):
        dispatch.resolve("supcon_loss", "triton", tensors(on_cuda))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_available_on_cuda_without_a_gpu():
    assert ops.available("supcon_loss", "cuda")["triton"] == "torch sees no CUDA device"


def test_sources_that_hide_the_installed_package_are_named(tmp_path, monkeypatch):
    assert "build them with `pip install .`" in dispatch.load_kernels("other")
    folder = tmp_path / "infopro_fast"
    folder.mkdir()
    (folder / "_other.abi3.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    message = f"these sources hide the installed package in {folder}, which has them; run from another folder"
    assert message in dispatch.load_kernels("other")
