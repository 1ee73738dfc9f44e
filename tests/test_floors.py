"""The counted floors, against counts of the formulas' own arithmetic, and the document that shows them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floors, shapes


def _macs(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def test_direct_decoder_is_what_torch_counts():
    """Without a resize: two first convolutions forward, torch does one; the sums are torch's backward."""
    s = shapes.DecoderShape(2, 16, 8, 8)
    h, w1, w2 = (
        torch.randn(2, 16, 8, 8, requires_grad=True),
        torch.randn(12, 16, 3, 3, requires_grad=True),
        torch.randn(3, 12, 3, 3),
    )
    w2.requires_grad_()
    z = lambda: F.conv2d(h, w1, padding=1)  # noqa: E731
    forward, logits = _macs(z), _macs(lambda: F.conv2d(z(), w2, padding=1))
    second = logits - forward
    whole = _macs(lambda: F.conv2d(z(), w2, padding=1).sum().backward())
    assert floors.decoder_forward(s).macs == 2 * forward + 3 * second
    assert floors.decoder_backward(s).macs == 3 * forward + 2 * second
    assert whole == 3 * forward + 3 * second


def test_low_resolution_is_chosen_where_it_is_cheaper():
    mix, expand = floors.decoder_z(shapes.DecoderShape(1, 64, 8, 32))
    assert (mix, expand) == (9 * 12 * 64 * 64, 12 * 1024 * (6 + 4.5))
    assert floors.decoder_z(shapes.DecoderShape(1, 1, 31, 32)) == (9 * 12 * 1024, 0)


def test_products_are_what_torch_counts():
    N, D, C = 24, 8, 5
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    s = shapes.LinearShape(N, D, C)
    assert floors.linear_forward(s).macs == _macs(lambda: F.linear(x, w))
    whole = _macs(lambda: F.linear(x, w).sum().backward())
    assert (
        floors.linear_backward(s).macs == whole
    )  # recomputing makes up for the forward that torch counts here
    pairs = _macs(lambda: x @ x.T)
    forward = floors.supcon_forward(shapes.SupConShape(N, D)).macs
    assert pairs / 2 < forward < pairs / 2 + N * D
    assert floors.supcon_backward(shapes.SupConShape(N, D)).macs == forward + pairs


def test_chain_decoder_is_what_torch_counts():
    """Every 3x3 convolution behind a doubling counts as a 1x1 one to nine times the channels before it."""
    s = shapes.ChainShape(2, 7, 3)
    layers = [(7, 128, 3), (128, 9 * 32, 3), (32, 9 * 12, 6), (12, 9 * 3, 12)]
    calls = [
        (torch.randn(2, C, side, side, requires_grad=True), torch.randn(K, C, 1, 1, requires_grad=True))
        for C, K, side in layers
    ]
    forward = [_macs(lambda x=x, w=w: F.conv2d(x, w)) for x, w in calls]
    whole = [_macs(lambda x=x, w=w: F.conv2d(x, w).sum().backward()) for x, w in calls]
    assert floors.chain_forward(s).macs == sum(forward)
    assert floors.chain_backward(s).macs == sum(whole) - sum(forward) + forward[-1]


@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize("last", (True, False))
def test_stages_of_a_chain_are_preferred_in_cuda_because_they_count_less(last, direction):
    """impl="auto" takes the CUDA C++ kernels where it can: fewer bytes, and no more time on any device."""
    for h, w in ((112, 112), (256, 512)):
        floor, cuda, triton = (
            count(h, w, direction, last)
            for count in (floors.stage_floor, floors.stage_cuda, floors.stage_triton)
        )
        assert floor.bytes <= cuda.bytes < triton.bytes and floor.macs <= cuda.macs
        for device in floors.DEVICES.values():
            assert floor.seconds(device) <= cuda.seconds(device) < triton.seconds(device)


def test_stages_of_a_chain_are_what_torch_counts():
    x, w = torch.randn(1, 12, 4, 5, requires_grad=True), torch.randn(27, 12, 1, 1, requires_grad=True)
    forward, whole = _macs(lambda: F.conv2d(x, w)), _macs(lambda: F.conv2d(x, w).sum().backward())
    assert floors.stage_floor(4, 5, "forward", True).macs == forward
    assert (
        floors.stage_floor(4, 5, "backward", True).macs == whole
    )  # the logits again, and the gradients of both operands
    x, w = torch.randn(1, 32, 4, 5, requires_grad=True), torch.randn(108, 32, 1, 1, requires_grad=True)
    forward, whole = _macs(lambda: F.conv2d(x, w)), _macs(lambda: F.conv2d(x, w).sum().backward())
    assert (
        floors.stage_floor(4, 5, "forward", False).macs == forward
        and floors.stage_floor(4, 5, "backward", False).macs == whole - forward
    )


def test_upsample_conv_is_what_torch_counts():
    """A 1x1 convolution to nine times the channels, in place of a 3x3 one at four times the pixels."""
    s = shapes.UpsampleConvShape(2, 5, 4, 3)
    x, w = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(27, 5, 1, 1, requires_grad=True)
    forward, whole = _macs(lambda: F.conv2d(x, w)), _macs(lambda: F.conv2d(x, w).sum().backward())
    assert floors.upsample_conv_forward(s).macs == forward
    assert floors.upsample_conv_backward(s).macs == whole - forward
    assert (
        floors.upsample_conv_forward(s).elementwise
        == floors.decoder_z(shapes.DecoderShape(2, 50, 4, 8, 3))[1] * 2
    )


def test_tensor_cores_do_products_alone():
    device = floors.Device("", bandwidth=100.0, float32=10.0, tf32=1000.0, bfloat16=1000.0)
    found = floors.Floor(bytes=0.0, macs=30.0, elementwise=5.0)
    assert found.seconds(device) == 7.0 and found.seconds(device, "tf32") == 1.0


def test_float32_products_are_the_cheaper_of_two_ways():
    """Three products of parts on tensor cores, or one on float32 units, which also do elementwise work."""
    whole, of_parts = (
        floors.Floor(bytes=0.0, macs=30.0, elementwise=5.0, parts=parts) for parts in ("", "float16")
    )
    fast, slow = (
        floors.Device("", bandwidth=100.0, float32=10.0, tf32=rate, bfloat16=2 * rate)
        for rate in (20.0, 10.0)
    )
    assert whole.seconds(fast) == whole.seconds(slow) == 7.0
    assert of_parts.seconds(fast) == 180 / 40 and of_parts.seconds(slow) == 7.0
    assert dataclasses.replace(of_parts, parts="tf32").seconds(fast) == 7.0
    assert (of_parts + whole).parts == "float16"


def test_products_in_parts_have_a_floor_below_them():
    """On an H100 three products of parts are faster, so a floor of float32 units would be too high."""
    device, shape = floors.DEVICES["H100"], shapes.SupConShape(8192)
    for direction in ("forward", "backward", "both"):
        found = floors.floor("supcon_loss", shape, direction)
        in_parts = floors.PRODUCTS * 2 * found.macs / device.rate("float16")
        assert found.seconds(device) == max(in_parts, found.bytes / device.bandwidth)
        assert in_parts < 2 * found.macs / device.float32


def test_seconds_are_those_of_the_slower():
    device = floors.Device("", bandwidth=100.0, float32=10.0, tf32=1000.0, bfloat16=1000.0)
    found = floors.Floor(bytes=200.0, macs=30.0)
    assert found.seconds(device) == 6.0 and found.bound(device) == "arithmetic"
    assert found.seconds(device, "tf32") == 2.0 and found.bound(device, "tf32") == "memory"


@pytest.mark.parametrize("op", floors.KERNELS)
def test_both_is_the_sum(op):
    shape = floors.KERNELS[op][2][0]
    both, parts = floors.floor(op, shape), [floors.floor(op, shape, d) for d in ("forward", "backward")]
    assert both == parts[0] + parts[1] and both.bytes > 0


def test_names_of_devices():
    assert floors.find("NVIDIA H100 80GB HBM3") is floors.DEVICES["H100"]
    assert floors.find("NVIDIA GeForce RTX 4090") is floors.DEVICES["RTX 4090"]
    assert floors.find("Tesla T4") is None


def test_the_document_is_up_to_date():
    assert floors.DOCUMENT.read_text() == floors.document(), "run python -m benchmarks.floors --write"
