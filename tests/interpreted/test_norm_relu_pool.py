"""Triton kernels of `norm_relu_pool`: sizes and layouts of maps, forms of the layer, running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infopro_fast.ops import norm_relu_pool
from tests import compare, op_cases
from tests.op_cases import check, gradients, norm_pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N, C, h, w", ((2, 1, 1, 1), (3, 5, 4, 3), (1, 3, 17, 19), (5, 33, 7, 7), (40, 9, 8, 8))
)
def test_sizes(N, C, h, w, dtype):
    check(norm_pool(N, C, h, w), "triton", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("norm", ({}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.3}))
def test_layers(norm, training, dtype):
    check(norm_pool(training=training, **norm), "triton", dtype)


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "slice", "step"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    case = norm_pool(N=5, C=6, h=4, w=3)
    inputs = case.inputs(dtype)
    for name, t in inputs.items():
        if layout != "channels_last" or t.dim() == 4:
            inputs[name] = op_cases.relayout(t, layout)[0]
    check(case, "triton", dtype, inputs)


def test_channels_last_stays_so():
    x = torch.randn(3, 5, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    norm_relu_pool(x, nn.BatchNorm2d(5), impl="triton").square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("momentum", (0.1, None))
def test_running_statistics_move_as_the_layer_s_own(momentum):
    ours, theirs = (nn.BatchNorm2d(5, momentum=momentum) for _ in range(2))
    for _ in range(2):
        x = torch.randn(7, 5, 3, 4) * 2 + 3
        norm_relu_pool(x, ours, impl="triton")
        theirs(x)
    assert ours.num_batches_tracked == theirs.num_batches_tracked
    for name in ("running_mean", "running_var"):
        compare.assert_close(getattr(ours, name), getattr(theirs, name).double(), what=name)


@pytest.mark.parametrize("offset", (1e3, -1e4))
def test_a_mean_far_from_zero(offset):
    """Squares of the values would leave no digit of the variance."""
    x = torch.randn(40, 3, 8, 8)
    x = x + offset
    bn, exact = nn.BatchNorm2d(3), nn.BatchNorm2d(3).double()
    found = norm_relu_pool(x, bn, impl="triton")
    wanted = exact(x.double()).relu().mean((2, 3))
    assert compare.relative_error(bn.running_var, exact.running_var) < compare.CLOSE[torch.float32]
    compare.assert_close(found, wanted, scale=abs(offset), what="pooled")


def test_empty_batch():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    bn = nn.BatchNorm2d(3)
    out = norm_relu_pool(x, bn, impl="triton")
    out.sum().backward()
    assert out.shape == (0, 3) and x.grad.shape == x.shape
    assert not bn.weight.grad.any() and not bn.bias.grad.any()
    assert bn.num_batches_tracked == 0


def test_expanded_upstream_gradient():
    """That of a sum has strides of 0."""
    case = norm_pool()
    inputs, exact = case.inputs(torch.float32), case.inputs()
    found, wanted = case.function("triton")(inputs), case.plain(exact)
    ours = gradients(found, inputs, torch.ones(()).expand(found.shape))
    for name, g in gradients(wanted, exact, torch.ones(()).double().expand(found.shape)).items():
        compare.assert_close(ours[name], g, what=name)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("training", (True, False))
def test_a_non_finite_input_is_not_hidden(training, bad):
    case = norm_pool(training=training)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs["x"][0, 1, 0, 0] = bad
        inputs["weight"].abs_()
    assert not torch.isfinite(case.function("triton")(inputs)).all()


def test_same_bits_twice():
    case = norm_pool(N=40, C=9, h=8, w=8)
    first, second = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    for name in first:
        compare.assert_same(first[name], second[name], name)
