"""The Triton kernels of `upsample_conv3x3`: sizes up and down, every mode, dtypes and layouts."""

from __future__ import annotations

import pytest
import torch

from infopro_fast.ops import upsample_conv3x3
from tests import compare, op_cases
from tests.op_cases import check, gradients, up_conv

MODES = {"corners": dict(align_corners=True), "centers": {}, "nearest": dict(mode="nearest")}
SIZES = {
    "doubled": dict(h=3, w=5, H=6, W=10), "odd": dict(h=4, w=3, H=9, W=7),
    "same size": dict(h=3, w=5, H=3, W=5), "smaller": dict(h=7, w=5, H=3, W=4),
    "mixed": dict(h=7, w=2, H=3, W=11), "mixed to less": dict(h=2, w=11, H=5, W=3),
    "one pixel": dict(h=1, w=1, H=4, W=3), "to one": dict(h=4, w=3, H=1, W=1),
    "several tiles": dict(h=1, w=70, H=2, W=140), "several strips": dict(h=9, w=1, H=19, W=2),
    "channels": dict(C=19, K=35, h=2, w=2, H=4, W=4), "one channel": dict(C=1, K=1),
}


@pytest.mark.parametrize("size, mode", [(size, tuple(MODES)[i % 3]) for i, size in enumerate(SIZES)])
def test_sizes(size, mode):
    check(up_conv(**(dict(N=1, C=2, K=3) | SIZES[size]), **MODES[mode]), "triton", torch.float32)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, size):
    check(up_conv(N=2, **SIZES[size], **MODES[mode]), "triton", torch.float32)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits(dtype, size):
    check(up_conv(N=1, **SIZES[size]), "triton", dtype)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_without_bias(size):
    check(up_conv(N=1, bias=False, **SIZES[size]), "triton", torch.float32)


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "slice", "step"))
@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_layouts(size, layout):
    case = up_conv(N=1, C=3, K=4, **SIZES[size])
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(torch.float32).items()}
    check(case, "triton", torch.float32, inputs)


@pytest.mark.parametrize("size", (6, 3))
def test_channels_last_stays_so(size):
    x = torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    out = upsample_conv3x3(x, torch.randn(3, 5, 3, 3), None, size, impl="triton")
    out.square().sum().backward()
    assert out.is_contiguous() and x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_parameters_in_float32_and_x_in_16_bits(size):
    """As under autocast: products of float32 numbers, and gradients in each one's dtype."""
    case = up_conv(N=1, C=3, K=4, **SIZES[size])
    inputs = case.inputs(torch.bfloat16)
    for name in ("weight", "bias"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    exact = op_cases.widened(inputs)
    found, wanted = case.function("triton")(inputs), case.plain(exact)
    upstream = op_cases.upstream(found)
    compare.assert_close(found, wanted)
    expected = gradients(wanted, exact, upstream.double())
    for name, g in gradients(found, inputs, upstream).items():
        assert g.dtype == inputs[name].dtype
        compare.assert_close(g, expected[name], what=name)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_in_chunks_of_samples(size, monkeypatch):
    from infopro_fast.ops.triton_kernels import upsample_conv3x3 as module

    monkeypatch.setattr(module, "MOST", 9 * 4 * 15)  # a sample of T at a time
    check(up_conv(N=3, C=3, K=4, **SIZES[size]), "triton", torch.float32)


@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_a_non_finite_number_stays_where_it_belongs(size):
    """Neither hidden, nor spread by weights of 0 at the border."""
    case = up_conv(N=1, C=1, K=1, **SIZES[size], mode="nearest")
    inputs, exact = case.inputs(torch.float32), case.inputs()
    for t in (inputs, exact):
        with torch.no_grad():
            t["x"][0, 0, 0, 0] = torch.inf
    found, wanted = case.function("triton")(inputs), case.plain(exact)
    assert torch.equal(torch.isfinite(found), torch.isfinite(wanted)) and not torch.isfinite(found).all()
    upstream = torch.zeros_like(found)
    upstream[0, 0, -1, -1] = torch.inf
    found, wanted = (gradients(z, t, upstream.to(z))["x"] for z, t in ((found, inputs), (wanted, exact)))
    assert torch.equal(torch.isfinite(found), torch.isfinite(wanted)) and not torch.isfinite(found).all()


@pytest.mark.parametrize("size", ("doubled", "smaller"))
def test_same_bits_twice(size):
    case = up_conv(N=1, C=3, K=4, **SIZES[size])
    first, second = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    for name, t in first.items():
        compare.assert_same(second[name], t, name)


def test_empty_batch():
    case = up_conv(N=0)
    inputs = case.inputs(torch.float32)
    found = gradients(case.function("triton")(inputs), inputs)
    assert found["x"].shape == inputs["x"].shape and not any(found[name].any() for name in ("weight", "bias"))


def test_sizes_beyond_its_counters_are_refused():
    x, weight = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15), torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match="takes h w and H W below 2\\^31, got maps of \\(65536, 32768\\)"):
        upsample_conv3x3(x, weight, None, (1, 1), impl="triton")


@pytest.mark.slow
def test_positions_of_a_resize_may_be_beyond_32_bits():
    x, weight = torch.randn(1, 1, 1, 40000), torch.randn(1, 1, 3, 3)
    found, wanted = (
        upsample_conv3x3(x.to(dtype), weight.to(dtype), None, (1, 40001), impl=impl)
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    compare.assert_close(found, wanted)
