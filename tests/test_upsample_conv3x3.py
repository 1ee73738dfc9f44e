"""`upsample_conv3x3`: sizes, modes, layouts, messages."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infopro_fast.ops import upsample_conv3x3
from tests import compare, op_cases
from tests.op_cases import check, up_conv

MODES = {"corners": dict(align_corners=True), "centers": {}, "nearest": dict(mode="nearest")}
SIZES = {
    "doubled": dict(h=6, w=5, H=12, W=10), "odd": dict(h=5, w=7, H=17, W=12),
    "same size": dict(h=5, w=7, H=5, W=7), "smaller": dict(h=11, w=9, H=4, W=5),
    "mixed": dict(h=11, w=3, H=4, W=35), "one pixel": dict(h=1, w=1, H=5, W=3), "to one": dict(H=1, W=1),
    "wide": dict(h=3, w=37, H=6, W=74), "channels": dict(C=70, K=45, h=4, w=4, H=8, W=8),
    "one channel": dict(C=1, K=1),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, mode, impl, dtype):
    check(up_conv(**SIZES[size], **MODES[mode]), impl, dtype)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_on_every_instruction_set(size, isa):
    for dtype in (torch.float64, torch.float32):
        check(up_conv(**SIZES[size]), "cpu", dtype)


@st.composite
def any_case(draw):
    size = st.integers(1, 23)
    case = up_conv(
        N=draw(st.integers(1, 3)), C=draw(st.integers(1, 20)), K=draw(st.integers(1, 20)), h=draw(size),
        w=draw(size), H=draw(size), W=draw(size), bias=draw(st.booleans()),
        **MODES[draw(st.sampled_from(sorted(MODES)))],
    )
    return case, {k: draw(st.sampled_from(("contiguous", *op_cases.LAYOUTS))) for k in case.tensors}


@given(any_case(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_any_case(cpu, drawn, dtype):
    case, layouts = drawn
    check(case, cpu, dtype, {k: op_cases.relayout(t, layouts[k])[0] for k, t in case.inputs(dtype).items()})


def test_one_number_is_both_sides(impl):
    x, weight = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(5, 2, 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, (7, 7), mode="bilinear"), weight, padding=1)
    compare.assert_close(upsample_conv3x3(x, weight, None, 7, impl=impl), expected)


x, weight, bias = torch.zeros(2, 5, 4, 4), torch.zeros(7, 5, 3, 3), torch.zeros(7)
MESSAGES = [
    (dict(x=[1.0]), TypeError, "x: expected a floating-point tensor, got list"),
    (dict(weight=weight.long()), TypeError, "weight: expected a floating-point tensor, got torch.int64"),
    (dict(bias=bias.int()), TypeError, "bias: expected a floating-point tensor, got torch.int32"),
    (dict(x=x[0]), ValueError, "x: expected (N, C, h, w) with C, h and w at least 1, got (5, 4, 4)"),
    (dict(x=x[..., :0]), ValueError, "x: expected (N, C, h, w) with C, h and w at least 1, got (2, 5, 4, 0)"),
    (dict(weight=weight[:, :4]), ValueError, "weight: expected (K, 5, 3, 3), got (7, 4, 3, 3)"),
    (dict(weight=weight[..., :1]), ValueError, "weight: expected (K, 5, 3, 3), got (7, 5, 3, 1)"),
    (dict(bias=bias[:5]), ValueError, "bias: expected (7,), got (5,)"),
    (dict(size=(8,)), ValueError, "size: expected one or two positive integers, got (8,)"),
    (dict(size=(8, 0)), ValueError, "size: expected one or two positive integers, got (8, 0)"),
    (dict(size=8.0), ValueError, "size: expected one or two positive integers, got 8.0"),
    (dict(mode="bicubic"), ValueError, "mode: expected one of ('bilinear', 'nearest'), got 'bicubic'"),
    (
        dict(mode="nearest", align_corners=True),
        ValueError,
        "align_corners: expected False with mode 'nearest'",
    ),
    (
        dict(impl="triton"),
        ValueError,
        "impl='triton' cannot run this call: x is on cpu: runs on CUDA tensors; on CPU tensors in",
    ),
]


@pytest.mark.parametrize("wrong, kind, words", MESSAGES, ids=[words[:40] for _, _, words in MESSAGES])
def test_messages(wrong, kind, words):
    with pytest.raises(kind, match="^upsample_conv3x3: .*" + re.escape(words)):
        upsample_conv3x3(**(dict(x=x, weight=weight, bias=bias, size=(8, 8)) | wrong))
