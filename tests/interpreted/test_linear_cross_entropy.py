"""Triton kernels of `linear_cross_entropy`: few and many classes, options, ignored rows, bad labels."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from infopro_fast.ops import linear_cross_entropy
from tests import compare, op_cases
from tests.op_cases import check, gradients, linear_ce

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLASSES = pytest.mark.parametrize("C", (13, 70), ids=("few classes", "many classes"))


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    """Tiles of up to 64 classes for those tests, so that 70 take two."""
    from infopro_fast.ops.triton_kernels import linear_cross_entropy as kernels

    if hasattr(request.node, "callspec") and request.node.callspec.params.get("C") == 70:
        monkeypatch.setattr(kernels, "MOST_CLASSES", 64)


@CLASSES
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(
    "label_smoothing, class_weight, bias", [
        *itertools.product((0.0, 0.1), (False, True), (False, True)), (1.0, True, True)
    ]
)
def test_options(label_smoothing, class_weight, bias, reduction, C):
    options = dict(label_smoothing=label_smoothing, class_weight=class_weight, bias=bias, reduction=reduction)
    check(linear_ce(N=23, D=11, C=C, ignored=5, **options), "triton", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N, D, C", ((1, 1, 2), (17, 65, 10), (33, 128, 64), (5000, 3, 2), (130, 40, 65), (9, 300, 2049))
)
@pytest.mark.fast(4)
def test_sizes(N, D, C, dtype):
    check(linear_ce(N, D, C, ignored=N // 4, reduction="mean"), "triton", dtype)


@CLASSES
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("class_weight", (False, True))
def test_class_probabilities(label_smoothing, class_weight, reduction, C):
    options = dict(label_smoothing=label_smoothing, class_weight=class_weight, reduction=reduction)
    check(linear_ce(N=23, D=11, C=C, soft=True, **options), "triton", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_probabilities_of_several_chunks_and_the_most_probable(dtype, monkeypatch):
    from infopro_fast.ops.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "MOST_LOGITS", 70 * 9)
    monkeypatch.setattr(kernels, "MOST_CLASSES", 64)
    case = linear_ce(N=23, D=11, C=70, soft=True)
    check(case, "triton", dtype)
    x, w, target = (case.inputs(torch.float32)[name].detach() for name in ("input", "weight", "target"))
    target = torch.where(target > 0.02, 0.5, 0.0)  # equals: the first counts
    _, correct = linear_cross_entropy(x, w, target, return_correct=True, impl="triton")
    _, wanted = linear_cross_entropy(x, w, target, return_correct=True, impl="reference")
    assert correct == wanted
    _, all_right = linear_cross_entropy(x, w, (x @ w.T).softmax(1), return_correct=True, impl="triton")
    assert all_right == 23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_several_chunks_of_rows(reduction, dtype, monkeypatch):
    from infopro_fast.ops.triton_kernels import linear_cross_entropy as kernels

    monkeypatch.setattr(kernels, "MOST_LOGITS", 70 * 9)
    check(linear_ce(N=23, D=11, C=70, ignored=5, reduction=reduction), "triton", dtype)


@CLASSES
@pytest.mark.parametrize("size", (1e-3, 30.0, 1e4))
def test_size_of_the_logits(size, C):
    """Many classes: an ulp of l moves the probabilities found from it; 8 ulps are allowed."""
    case = linear_ce(N=20, D=16, C=C, size=size)
    check(
        dataclasses.replace(case, magnified=max(1.0, case.condition / 8) if C > 64 else 1.0), "triton",
        torch.float32,
    )


@CLASSES
@pytest.mark.parametrize("needed", (("input",), ("weight",), ("bias",), ("weight", "bias")))
def test_gradients_of_some(needed, C):
    case = linear_ce(N=23, D=11, C=C)
    inputs, exact = case.inputs(torch.float32, grad=needed), case.inputs(grad=needed)
    wanted = gradients(case.plain(exact), exact)
    for name, g in gradients(case.function("triton")(inputs), inputs).items():
        compare.assert_close(g, wanted[name], what=name)


@CLASSES
def test_operands_of_two_dtypes(C):
    case = linear_ce(N=23, D=11, C=C)
    inputs = case.inputs(torch.float32)
    inputs["input"] = inputs["input"].detach().bfloat16().requires_grad_()
    check(case, "triton", torch.bfloat16, inputs)


@pytest.mark.parametrize("layout", ("transposed", "slice", "step"))
@CLASSES
def test_layouts(layout, C):
    case = linear_ce(N=23, D=11, C=C)
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(torch.float32).items()}
    check(case, "triton", torch.float32, inputs)


@pytest.mark.parametrize("C", (7, 3000))
def test_a_class_masked_by_its_bias(C):
    """The whole first tile of 3000 classes."""
    case = linear_ce(N=6, D=5, C=C, class_weight=False, label_smoothing=0.0)
    case.tensors["bias"][: 3 * C // 4] = -torch.inf
    case.tensors["target"].copy_(C - 1 - torch.arange(6) % (C // 7))
    inputs, exact = case.inputs(torch.float32), case.inputs()
    loss, wanted = case.function("triton")(inputs), case.plain(exact)
    compare.assert_close(loss, wanted, scale=10.0, what="loss")
    expected = gradients(wanted, exact)
    for name, g in gradients(loss, inputs).items():
        compare.assert_close(g, expected[name], what=name)


@CLASSES
@pytest.mark.parametrize("ignore_index", (-100, 3, 255))
@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int32, torch.uint8))
def test_targets(ignore_index, target_dtype, C):
    if target_dtype == torch.uint8 and ignore_index < 0:
        ignore_index += 256
    case = linear_ce(N=23, D=11, C=C, ignored=6, ignore_index=ignore_index)
    inputs, exact = case.inputs(torch.float32), case.inputs()
    wanted = case.plain(exact)
    inputs["target"] = inputs["target"].to(target_dtype)
    found = case.function("triton")(inputs)
    compare.assert_close(found, wanted, what="loss")
    expected = gradients(wanted, exact)
    for name, g in gradients(found, inputs).items():
        compare.assert_close(g, expected[name], what=name)


@CLASSES
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_ignored(dtype, reduction, C):
    inputs = (case := linear_ce(N=9, C=C, ignored=9, reduction=reduction)).inputs(dtype)
    loss = case.function("triton")(inputs)
    assert loss.shape == ((9,) if reduction == "none" else ()) and not loss.detach().any()
    for name, g in gradients(loss, inputs).items():
        assert g.shape == inputs[name].shape and not g.any(), name


@CLASSES
@pytest.mark.parametrize("padding", (1e30, torch.inf))
def test_an_ignored_row_may_be_huge(padding, C):
    case = linear_ce(N=9, C=C, ignored=3, reduction="mean")
    inputs, clean = case.inputs(torch.float32), case.inputs()
    ignored = inputs["target"] == -100
    with torch.no_grad():
        inputs["input"][ignored] = padding
        clean["input"][ignored] = 0
    found, wanted = case.function("triton")(inputs), case.plain(clean)
    compare.assert_close(found, wanted, scale=case.condition, what="loss")
    expected = gradients(wanted, clean)
    for name, g in gradients(found, inputs).items():
        compare.assert_close(g, expected[name], what=name)


@CLASSES
@pytest.mark.parametrize("bad", (200, 10**6, -1, -(2**40)))
@pytest.mark.parametrize("class_weight", (False, True))
def test_a_label_out_of_range_is_nan_and_reads_nothing(class_weight, bad, C):
    case = linear_ce(N=9, D=5, C=C, ignored=0, class_weight=class_weight)
    inputs = case.inputs(torch.float32)
    inputs["target"][4] = bad
    loss = case.function("triton")(inputs)
    others = torch.arange(9) != 4
    assert torch.isnan(loss[4]) and torch.isfinite(loss[others]).all()
    found = gradients(loss, inputs)
    assert torch.isnan(found["input"][4]).all() and torch.isfinite(found["input"][others]).all()
    assert torch.isnan(found["weight"]).all()


@pytest.mark.parametrize(
    "N, D, C, ignored", ((1, 3, 4, 0), (200, 20, 10, 40), (100, 8, 301, 7), (64, 16, 2, 64))
)
def test_correct(N, D, C, ignored):
    inputs = linear_ce(N, D, C, ignored=ignored).inputs(torch.float32)
    with torch.no_grad():  # so that many are right
        inputs["input"] += 3 * inputs["weight"][inputs["target"].clamp(min=0)]
    logits = F.linear(inputs["input"], inputs["weight"], inputs["bias"])
    arguments = (inputs["input"], inputs["weight"], inputs["target"])
    _, count = linear_cross_entropy(*arguments, bias=inputs["bias"], return_correct=True, impl="triton")
    assert count.dtype == torch.int64 and count == (logits.argmax(1) == inputs["target"]).sum()


@pytest.mark.parametrize("C", (3, 64, 700))
def test_the_first_of_equal_logits_counts(C):
    target = torch.arange(200) % C
    _, count = linear_cross_entropy(
        torch.ones(200, 4), torch.ones(C, 4), target, return_correct=True, impl="triton"
    )
    assert count == (target == 0).sum()


@CLASSES
def test_empty_batch(C):
    inputs = (case := linear_ce(N=0, C=C, ignored=0, reduction="mean")).inputs(torch.float32)
    loss = case.function("triton")(inputs)
    assert loss == 0
    for name, g in gradients(loss, inputs).items():
        assert g.shape == inputs[name].shape and not g.any(), name


@CLASSES
@pytest.mark.parametrize("upstream", (1e-12, 1e12))
def test_upstream_gradients_of_any_size_in_float16(upstream, C):
    case = linear_ce(N=23, D=11, C=C)
    inputs, exact = case.inputs(torch.float16), case.inputs()
    for name in case.differentiable:
        exact[name] = inputs[name].detach().double().requires_grad_()
    widened = {k: inputs[k].detach().float().requires_grad_() for k in case.differentiable}
    grad = upstream * op_cases.upstream(torch.zeros(23))
    mixed = inputs | {"bias": widened["bias"]}  # float16 holds no such gradient, float32 does
    found = gradients(case.function("triton")(mixed), mixed, grad)["bias"]
    compare.assert_close(
        found, gradients(case.plain(exact), exact, grad.double())["bias"], dtype=torch.float16, what="bias"
    )


@CLASSES
def test_same_bits_twice(C):
    case = linear_ce(N=130, D=11, C=C)
    first, second = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    for name in first:
        compare.assert_same(first[name], second[name], name)
