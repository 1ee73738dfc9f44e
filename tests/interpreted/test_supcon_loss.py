"""The Triton kernels of `supcon_loss`: sizes around a tile, every option, and the edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from infopro_fast.ops import supcon_loss
from tests import compare, op_cases
from tests.op_cases import check, gradients, supcon

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, D", ((2, 2), (63, 16), (65, 37), (150, 128), (33, 200)))
def test_sizes(N, D, dtype):
    """One tile and more, columns shared by several programs, more dimensions than a tile has."""
    check(supcon(N, D, None, 5), "triton", dtype)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("normalize, temperature", ((True, 0.3), (True, 0.02), (False, 0.3), (False, 1.0)))
@pytest.mark.parametrize("views", (None, 2))
def test_options(views, normalize, temperature, reduction):
    """With and without a bound on the logits."""
    case = supcon(
        N=21, D=9, views=views, classes=5, normalize=normalize, reduction=reduction, temperature=temperature
    )
    for dtype in DTYPES:
        check(case, "triton", dtype)


@pytest.mark.parametrize("size", (1e-9, 1e-4, 1e3, 1e15))
def test_rows_of_any_length(size):
    check(supcon(N=40, D=16, views=None, classes=4, size=size), "triton", torch.float32)


@pytest.mark.parametrize("upstream", (1e-20, 1.0, 1e20))
def test_upstream_gradients_of_any_size(upstream):
    """They are split into float16 numbers."""
    case = supcon(N=40, D=16, views=None, classes=4)
    inputs, exact = case.inputs(torch.float32), case.inputs()
    grad = upstream * op_cases.upstream(torch.zeros(40))
    found = gradients(case.function("triton")(inputs), inputs, grad)["features"]
    compare.assert_close(
        found, gradients(case.plain(exact), exact, grad.double())["features"], what="gradient"
    )


def test_large_logits():
    """Logits of 1e4: an ulp is 1e-3, and numpy's products, the interpreter's, are not symmetric."""
    case = supcon(N=40, D=16, views=None, classes=4, temperature=1.0, normalize=False, size=25.0)
    for dtype in DTYPES:
        check(dataclasses.replace(case, magnified=case.condition), "triton", dtype)


def test_tf32():
    """Products have TF32's 11 bits where torch allows it; else the kernel's error is float32's."""
    case = supcon(N=70, D=64, views=None, classes=4)
    exact = case.plain(case.inputs())
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        off = compare.relative_error(case.function("triton")(case.inputs(torch.float32)), exact)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert compare.CLOSE[torch.float32] < off < compare.CLOSE[torch.float16]
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("labels", ([0], [0, 1, 2, 3, 4, 5, 6]), ids=("one anchor", "all different"))
def test_no_positives(labels):
    x = torch.randn(len(labels), 8, requires_grad=True)
    loss = supcon_loss(x, torch.tensor(labels), impl="triton")
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("shape", ((0, 8), (3, 0, 8)))
def test_no_anchors(shape):
    x = torch.zeros(shape, requires_grad=True)
    loss = supcon_loss(x, torch.zeros(shape[0], dtype=torch.long), impl="triton")
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == shape


@pytest.mark.parametrize("length", (0.0, 1e-13))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_zero_row_is_a_zero_and_gets_no_gradient(length, dtype):
    case = supcon(N=11, D=8, views=None, classes=3)
    x, labels = case.tensors["features"].to(dtype).clone(), case.tensors["labels"]
    x[4] = length / 8**0.5
    z = F.normalize(x.double(), dim=1)
    z[4] = 0
    x.requires_grad_()
    found = supcon_loss(x, labels, reduction="none", impl="triton")
    compare.assert_close(
        found, op_cases.plain_supcon(z, labels, normalize=False, reduction="none"), scale=1 / 0.07,
        what="loss",
    )
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and not x.grad[4].any() and x.grad[3].any()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_feature_is_not_hidden(dtype, normalize, bad):
    x = torch.randn(6, 4).to(dtype)
    x[0, 1] = bad
    assert not torch.isfinite(supcon_loss(x, torch.arange(6) % 2, normalize=normalize, impl="triton"))


@pytest.mark.parametrize("layout", ("transposed", "slice", "step"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    case = supcon(N=21, D=9, views=None, classes=3)
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(dtype).items()}
    check(case, "triton", dtype, inputs)


@pytest.mark.parametrize("names", ([-5, 2**40 - 5, 2**62], [0, 1, 2]))
@pytest.mark.parametrize("kind", (torch.int64, torch.int32, torch.uint8, torch.bool))
def test_labels_are_names(names, kind):
    case = supcon(N=21, D=9, views=None, classes=2 if kind == torch.bool else 3)
    x, labels = case.tensors["features"].float(), case.tensors["labels"]
    if kind == torch.int64:
        named = torch.tensor(names)[labels]
    else:
        named = labels.to(kind)
    compare.assert_same(supcon_loss(x, named, impl="triton"), supcon_loss(x, labels, impl="triton"))


def test_same_bits_twice():
    case = supcon(N=150, D=16, views=None, classes=5)
    calls = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    first, second = (found["features"] for found in calls)
    compare.assert_same(first, second)


def test_float64_is_for_the_reference():
    case = supcon()
    with pytest.raises(
        ValueError, match="supcon_loss: impl='triton' cannot run this call: features is torch.float64"
    ):
        case.function("triton")(case.inputs())
