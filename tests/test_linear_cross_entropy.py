"""`linear_cross_entropy`: every option against F.cross_entropy(F.linear(...)); edges; messages."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infopro_fast.ops import linear_cross_entropy
from tests import compare, op_cases
from tests.op_cases import check, gradients, linear_ce

FLOATS = (torch.float64, torch.float32)

OPTIONS = list(
    itertools.product((0.0, 0.1, 1.0), (False, True), (False, True), (0, 5), ("mean", "sum", "none"))
)


@pytest.mark.parametrize("label_smoothing, class_weight, bias, ignored, reduction", OPTIONS)
def test_options(label_smoothing, class_weight, bias, ignored, reduction, impl):
    options = dict(
        label_smoothing=label_smoothing, class_weight=class_weight, bias=bias, ignored=ignored,
        reduction=reduction,
    )
    for dtype in FLOATS:
        check(linear_ce(N=23, D=11, C=13, **options), impl, dtype)


@pytest.mark.parametrize(
    "label_smoothing, class_weight, bias", list(itertools.product((0.0, 0.1), (False, True), (False, True)))
)
def test_options_on_every_instruction_set(label_smoothing, class_weight, bias, isa):
    for dtype in FLOATS:
        check(
            linear_ce(
                N=67, D=70, C=35, label_smoothing=label_smoothing, class_weight=class_weight, bias=bias
            ),
            "cpu",
            dtype,
        )


SIZES = [(N, 9, 10) for N in (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 257, 1025)]
SIZES += [(33, D, 10) for D in (1, 2, 3, 7, 8, 15, 16, 17, 64, 127, 129, 513)]
SIZES += [(33, 9, C) for C in (2, 3, 15, 16, 17, 63, 65, 100, 127, 128, 129, 255, 257, 1000, 1031, 4099)]
SIZES += [(130, 65, 300), (300, 128, 10), (67, 257, 1031)]


@pytest.mark.parametrize("N, D, C", SIZES)
def test_sizes(N, D, C, impl):
    for dtype in FLOATS:
        check(linear_ce(N, D, C, ignored=N // 4), impl, dtype)


@pytest.mark.parametrize(
    "label_smoothing, class_weight, bias, reduction",
    list(itertools.product((0.0, 0.1), (False, True), (False, True), ("mean", "sum", "none"))),
)
def test_class_probabilities(label_smoothing, class_weight, bias, reduction, impl):
    options = dict(label_smoothing=label_smoothing, class_weight=class_weight, bias=bias, reduction=reduction)
    for dtype in FLOATS:
        check(linear_ce(N=23, D=11, C=13, soft=True, **options), impl, dtype)


@pytest.mark.parametrize("N, D, C", SIZES[::7] + SIZES[-3:])
def test_sizes_of_class_probabilities(N, D, C, impl):
    for dtype in FLOATS:
        check(linear_ce(N, D, C, soft=True), impl, dtype)


@pytest.mark.parametrize("class_weight", (False, True))
def test_class_probabilities_on_every_instruction_set(class_weight, isa):
    for dtype in FLOATS:
        check(linear_ce(N=67, D=70, C=1035, soft=True, class_weight=class_weight), "cpu", dtype)


def test_class_probabilities_are_torchs_to_the_last_digits(cpu):
    """In float64, and where they do not add up to 1."""
    case = linear_ce(N=70, D=33, C=900, soft=True, reduction="mean")
    case.tensors["target"][::3] *= 2
    inputs, exact = case.inputs(), case.inputs()
    loss, wanted = case.function(cpu)(inputs), case.plain(exact)
    assert abs(loss - wanted) <= 1e-12 * abs(wanted)
    expected = gradients(wanted, exact)
    for name, grad in gradients(loss, inputs).items():
        assert (grad - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


def test_one_hot_probabilities_are_labels(impl):
    """The most probable class is the label, of equals the first; the transpose's strides are read, too."""
    label = torch.tensor([0, 4, 2, 2, 1, 0, 3])
    one_hot = torch.zeros(5, 7).scatter_(0, label[None], 1.0).T
    x, w = torch.randn(7, 3), torch.randn(5, 3)
    for options in (dict(), dict(label_smoothing=0.2), dict(reduction="none")):
        got = linear_cross_entropy(x, w, one_hot, **options, return_correct=True, impl=impl)
        wanted = linear_cross_entropy(x, w, label, **options, return_correct=True, impl=impl)
        torch.testing.assert_close(got[0], wanted[0])
        assert got[1] == wanted[1]
    w[1:] = 0
    even = torch.full((7, 5), 0.2)
    _, correct = linear_cross_entropy(x, w, even, return_correct=True, impl=impl)
    assert correct == (x @ w[0] >= 0).sum()


def test_only_the_reference_gives_probabilities_a_gradient(cpu):
    x, w, target = torch.randn(4, 3), torch.randn(5, 3), torch.rand(4, 5, requires_grad=True)
    loss = linear_cross_entropy(x, w, target)
    (grad,) = torch.autograd.grad(loss, target)
    torch.testing.assert_close(grad, -(x @ w.T).log_softmax(1) / 4)
    with pytest.raises(ValueError, match="impl='cpu' cannot run this call: target requires grad"):
        linear_cross_entropy(x, w, target, impl=cpu)


def test_probabilities_that_do_not_fit(impl):
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    for shape in ((4,), (4, 3), (4, 5, 1)):
        expected = r"target: expected class probabilities \(4, 5\), or integers \(4,\), got "
        with pytest.raises(ValueError, match=expected + re.escape(f"{shape} of torch.float32")):
            linear_cross_entropy(x, w, torch.rand(shape), impl=impl)
    with pytest.raises(ValueError, match="ignore_index: expected negative with class .* got 3"):
        linear_cross_entropy(x, w, torch.rand(4, 5), ignore_index=3, impl=impl)


def test_one_class(impl):
    """There is no choice: loss and gradients are 0."""
    case = linear_ce(N=33, D=9, C=1)
    for dtype in FLOATS:
        inputs = case.inputs(dtype)
        loss = case.function(impl)(inputs)
        compare.assert_close(loss, torch.zeros(33, dtype=torch.float64), scale=case.condition, what="loss")
        for name, grad in gradients(loss, inputs).items():
            compare.assert_close(
                grad, torch.zeros_like(grad, dtype=torch.float64), scale=case.condition, what=name
            )


@pytest.mark.parametrize("size", (1e-3, 30.0, 1e4))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_size_of_the_logits(size, label_smoothing, impl):
    """Logits up to 1e4 and more: exponentials overflow unless the row's maximum is subtracted."""
    for dtype in FLOATS:
        check(linear_ce(N=40, D=16, C=37, size=size, label_smoothing=label_smoothing), impl, dtype)


@pytest.mark.parametrize("C", (7, 300, 1600))
def test_a_class_masked_by_its_bias(C, impl):
    """A bias of -inf removes a class; of 1600, the whole first chunk, which then has no maximum."""
    case = linear_ce(N=20, D=5, C=C, class_weight=False, label_smoothing=0.0)
    case.tensors["bias"][: 2 * C // 3] = -torch.inf
    case.tensors["target"].copy_(C - 1 - torch.arange(20) % (C // 3))
    inputs, exact = case.inputs(), case.inputs()
    loss, wanted = case.function(impl)(inputs), case.plain(exact)
    compare.assert_close(loss, wanted, scale=case.condition if case.condition < 100 else 10.0, what="loss")
    ours, expected = gradients(loss, inputs), gradients(wanted, exact)
    for name in case.differentiable:
        compare.assert_close(ours[name], expected[name], what=name)


@pytest.mark.parametrize("ignore_index", (-100, -1, 3, 255))
@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int32, torch.int16, torch.uint8))
def test_targets(ignore_index, target_dtype, impl):
    """The ignored index may be a class; the target's dtype does not matter."""
    if target_dtype == torch.uint8 and ignore_index < 0:
        ignore_index += 256
    case = linear_ce(N=23, D=11, C=13, ignored=6, ignore_index=ignore_index)
    inputs, exact = case.inputs(), case.inputs()
    wanted = case.plain(exact)
    inputs["target"] = inputs["target"].to(target_dtype)
    found = case.function(impl)(inputs)
    compare.assert_close(found, wanted, what="loss")
    expected = gradients(wanted, exact)
    for name, grad in gradients(found, inputs).items():
        compare.assert_close(grad, expected[name], what=name)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_no_label_is_mistaken_for_a_negative_ignore_index(reduction, impl):
    """In uint8 -100 would be class 156."""
    case = linear_ce(N=40, D=5, C=200, ignored=0, reduction=reduction)
    case.tensors["target"][::5] = 156
    inputs, exact = case.inputs(), case.inputs()
    inputs["target"] = inputs["target"].to(torch.uint8)
    compare.assert_close(case.function(impl)(inputs), case.plain(exact), what="loss")
    _, correct = linear_cross_entropy(
        inputs["input"], inputs["weight"], inputs["target"], return_correct=True, impl=impl
    )
    assert correct == ((inputs["input"] @ inputs["weight"].T).argmax(1) == case.tensors["target"]).sum()


def test_class_weight_gets_no_gradient(impl):
    case = linear_ce()
    inputs = case.inputs(grad=("input", "class_weight"))
    with pytest.raises(
        ValueError, match="linear_cross_entropy: class_weight: expected a tensor that does not require grad"
    ):
        case.function(impl)(inputs)


@pytest.mark.parametrize("bad", (13, 10**6, -1, -101))
@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int32))
def test_a_label_out_of_range_raises(bad, target_dtype, impl):
    inputs = linear_ce(N=23, D=11, C=13).inputs()
    inputs["target"][5] = bad
    inputs["target"] = inputs["target"].to(target_dtype)
    with pytest.raises((IndexError, ValueError, RuntimeError), match="(?i)target.*(out of bounds|expected)"):
        linear_cross_entropy(inputs["input"], inputs["weight"], inputs["target"], impl=impl)


# ------------------------------------------------------------------------------------------------------------
# Rows that do not count


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
@pytest.mark.parametrize("class_weight", (False, True))
@pytest.mark.parametrize("dtype", (*FLOATS, torch.bfloat16))
def test_all_rows_ignored(class_weight, label_smoothing, reduction, dtype, impl):
    """0 with zero gradients; torch's mean is nan with nan gradients."""
    case = linear_ce(
        N=9, ignored=9, class_weight=class_weight, label_smoothing=label_smoothing, reduction=reduction
    )
    inputs = case.inputs(dtype)
    loss = case.function(impl)(inputs)
    assert loss.shape == ((9,) if reduction == "none" else ()) and not loss.detach().any()
    for name, grad in gradients(loss, inputs).items():
        assert grad.shape == inputs[name].shape and not grad.any(), name


def test_class_weights_that_are_all_zero(impl):
    case = linear_ce(reduction="mean", label_smoothing=0.0)
    case.tensors["class_weight"].zero_()
    inputs = case.inputs()
    loss = case.function(impl)(inputs)
    assert loss.item() == 0 and not any(g.any() for g in gradients(loss, inputs).values())


def test_an_ignored_row_may_be_huge(impl):
    """Padding does not reach the loss or the gradients of other rows."""
    case = linear_ce(N=9, ignored=3, reduction="mean")
    inputs, clean = case.inputs(), case.inputs()
    padding = inputs["target"] == -100
    with torch.no_grad():
        inputs["input"][padding] = 1e30
        clean["input"][padding] = 0
    found, wanted = case.function(impl)(inputs), case.function("reference")(clean)
    compare.assert_close(found, wanted, scale=case.condition, what="loss")
    expected = gradients(wanted, clean)
    for name, grad in gradients(found, inputs).items():
        compare.assert_close(grad, expected[name], what=name)


# ------------------------------------------------------------------------------------------------------------
# How many are right


def correct(inputs, impl, **options) -> torch.Tensor:
    options = dict(bias=inputs.get("bias"), return_correct=True, impl=impl) | options
    loss, count = linear_cross_entropy(inputs["input"], inputs["weight"], inputs["target"], **options)
    assert count.dtype == torch.int64 and count.shape == () and not count.requires_grad and loss.requires_grad
    return count


@pytest.mark.parametrize(
    "N, D, C, ignored", ((1, 3, 4, 0), (500, 20, 10, 100), (300, 8, 1031, 7), (64, 16, 2, 64))
)
def test_correct(N, D, C, ignored, impl):
    inputs = linear_ce(N, D, C, ignored=ignored).inputs()
    with torch.no_grad():  # so that many are right
        inputs["input"] += 3 * inputs["weight"][inputs["target"].clamp(min=0)]
    logits = F.linear(inputs["input"], inputs["weight"], inputs["bias"])
    expected = (logits.argmax(1) == inputs["target"]).sum()
    assert correct(inputs, impl) == expected and (expected > 0 or N in (1, ignored))
    assert correct(inputs, impl, label_smoothing=0.3, reduction="none") == expected


@pytest.mark.parametrize("C", (3, 40, 700))
def test_the_first_of_equal_logits_counts(C, impl):
    """Whole-number logits tie in any order of summation."""
    generator = torch.Generator().manual_seed(C)
    weight = torch.zeros(C, 4)
    weight[:, 0] = torch.randint(3, (C,), generator=generator).float()
    target = torch.randint(C, (200,), generator=generator)
    first = int(weight[:, 0].argmax())
    target[::3] = first
    inputs = {
        "input": torch.ones(200, 4, requires_grad=True), "weight": weight.requires_grad_(), "target": target
    }
    assert correct(inputs, impl) == (target == first).sum() > 60
    equal = inputs | {"weight": torch.ones(C, 4, requires_grad=True), "target": torch.arange(200) % C}
    assert correct(equal, impl) == (torch.arange(200) % C == 0).sum()


def test_asking_for_correct_changes_nothing(impl):
    inputs = linear_ce().inputs()
    with_count, _ = linear_cross_entropy(
        inputs["input"], inputs["weight"], inputs["target"], return_correct=True, impl=impl
    )
    compare.assert_same(
        with_count, linear_cross_entropy(inputs["input"], inputs["weight"], inputs["target"], impl=impl)
    )


def test_correct_without_grad_and_without_rows(impl):
    inputs = linear_ce(N=0, ignored=0).inputs(grad=())
    loss, count = linear_cross_entropy(
        inputs["input"], inputs["weight"], inputs["target"], return_correct=True, impl=impl
    )
    assert loss == 0 and count == 0 and count.dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------
# Any shape, any layout, any dtype


@st.composite
def any_case(draw):
    N, D, C = draw(st.integers(1, 80)), draw(st.integers(1, 40)), draw(st.integers(1, 90))
    options = dict(
        bias=draw(st.booleans()), class_weight=draw(st.booleans()), ignored=draw(st.integers(0, N - 1)),
        size=draw(st.floats(0.01, 20)), label_smoothing=draw(st.sampled_from((0.0, 0.1, 0.5))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
    )
    case = linear_ce(N, D, C, **options)
    layouts = {k: draw(st.sampled_from(("contiguous", "transposed", "slice", "step"))) for k in case.tensors}
    return case, layouts, draw(st.sampled_from(FLOATS))


@given(any_case())
def test_any_case(impl, drawn):
    case, layouts, dtype = drawn
    inputs = {k: op_cases.relayout(t, layouts[k])[0] for k, t in case.inputs(dtype).items()}
    loss, exact_inputs = case.function(impl)(inputs), op_cases.widened(inputs)
    exact = case.plain(exact_inputs)
    compare.assert_close(loss, exact, scale=max(exact.abs().max().item(), case.condition), what="loss")
    ours, expected = gradients(loss, inputs), gradients(exact, exact_inputs)
    for name, grad in ours.items():
        # A probability that rounds to 1 leaves a gradient of rounding alone: relative to what one row can
        # give.
        scale = max(expected[name].abs().max().item(), 1e-3) * case.condition
        compare.assert_close(grad, expected[name], scale=scale, what=name)


# ------------------------------------------------------------------------------------------------------------
# Messages

x, w, t = torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4, dtype=torch.long)
MESSAGES = [
    (dict(input=[1.0]), TypeError, "input: expected a floating-point tensor, got list"),
    (dict(input=x.long()), TypeError, "input: expected a floating-point tensor, got torch.int64"),
    (dict(weight=w.int()), TypeError, "weight: expected a floating-point tensor, got torch.int32"),
    (dict(weight=None), TypeError, "weight: expected a floating-point tensor, got NoneType"),
    (
        dict(bias=torch.zeros(5, dtype=torch.long)),
        TypeError,
        "bias: expected a floating-point tensor, got torch.int64",
    ),
    (dict(class_weight=[1.0] * 5), TypeError, "class_weight: expected a floating-point tensor, got list"),
    (
        dict(target=t.float()), ValueError,
        "target: expected class probabilities (4, 5), or integers (4,), got (4,) of torch.float32",
    ),
    *(
        (
            dict(target=target), TypeError,
            f"target: expected an integer tensor (N,), or class probabilities (N, C), got {got}",
        )
        for target, got in ((t.bool(), "torch.bool"), ([0, 1, 2, 3], "list"))
    ),
    (dict(input=x[0]), ValueError, "input: expected (N, D), D > 0, got (8,)"),
    (dict(input=x[None]), ValueError, "input: expected (N, D), D > 0, got (1, 4, 8)"),
    (dict(input=x[:, :0], weight=w[:, :0]), ValueError, "input: expected (N, D), D > 0, got (4, 0)"),
    (dict(weight=w[:, :7]), ValueError, "weight: expected (C, 8) with C > 0, got (5, 7)"),
    (dict(weight=w[:0]), ValueError, "weight: expected (C, 8) with C > 0, got (0, 8)"),
    (dict(target=t[:3]), ValueError, "target: expected (4,), got (3,)"),
    (dict(target=t[:, None]), ValueError, "target: expected (4,), got (4, 1)"),
    (dict(bias=x[0]), ValueError, "bias: expected (5,), got (8,)"),
    (dict(class_weight=x[0]), ValueError, "class_weight: expected (5,), got (8,)"),
    (
        dict(reduction="batchmean"),
        ValueError,
        "reduction: expected one of ('mean', 'sum', 'none'), got 'batchmean'",
    ),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected in [0, 1], got 1.5"),
    (dict(label_smoothing=-0.1), ValueError, "label_smoothing: expected in [0, 1], got -0.1"),
    (
        dict(impl="liger"),
        ValueError,
        "impl: expected one of ('auto', 'reference', 'cpu', 'triton', 'cuda'), got 'liger'",
    ),
]


@pytest.mark.parametrize("wrong, kind, words", MESSAGES, ids=[words[:40] for _, _, words in MESSAGES])
def test_messages(wrong, kind, words):
    with pytest.raises(kind, match="^linear_cross_entropy: " + re.escape(words)):
        linear_cross_entropy(**(dict(input=x, weight=w, target=t) | wrong))
