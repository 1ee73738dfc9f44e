"""`supcon_loss`: the authors' values, sizes around every tile, edge cases, messages."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infopro_fast.ops import supcon_loss
from tests import compare, golden, op_cases
from tests.op_cases import Case, check, gradients, supcon

FLOATS = (torch.float64, torch.float32)


# ------------------------------------------------------------------------------------------------------------
# The authors' code


def assert_released(case, impl, dtype):
    features = golden.wave((case["batch"], case["views"], case["dim"]), 21).to(dtype).requires_grad_()
    labels = torch.tensor(case["labels"])
    # The authors' class multiplies by temperature / base_temperature, and its base_temperature is 0.07.
    loss = supcon_loss(features, labels, temperature=case["temperature"], impl=impl) * (
        case["temperature"] / 0.07
    )
    loss.backward()
    compare.assert_golden("loss", loss, case["loss"], dtype)
    compare.assert_golden("features", features.grad, case["grad"], dtype)
    if case["views"] == 1:
        both = (
            supcon_loss(x, labels, temperature=case["temperature"], impl=impl)
            for x in (features, features.squeeze(1))
        )
        compare.assert_same(*both, "(N, D) and (N, 1, D)")


GOLDEN = golden.cases("supcon")
GOLDEN_IDS = ["N{batch}-views{views}-D{dim}-T{temperature}".format(**case) for case in GOLDEN]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", GOLDEN, ids=GOLDEN_IDS)
def test_released_values(case, impl, dtype):
    assert_released(case, impl, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", GOLDEN, ids=GOLDEN_IDS)
def test_released_values_on_every_instruction_set(case, isa, dtype):
    assert_released(case, "cpu", dtype)


# ------------------------------------------------------------------------------------------------------------
# Sizes and options

SIZES = [
    (N, D, 10) for N in (2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 257) for D in (2, 8, 37)
]
SIZES += [(65, D, 4) for D in (3, 5, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 255, 300)] + [
    (500, 128, 10), (130, 128, 100)
]


@pytest.mark.parametrize("N, D, classes", SIZES)
def test_sizes(N, D, classes, impl):
    for dtype in FLOATS:
        check(supcon(N, D, None, classes, temperature=0.2), impl, dtype)


def test_one_dimension(impl):
    """A row is its sign: the gradient of its length is 0."""
    case = supcon(N=65, D=1, views=None, classes=4)
    for dtype in FLOATS:
        inputs = case.inputs(dtype)
        loss = case.function(impl)(inputs)
        compare.assert_close(loss, case.plain(case.inputs()), scale=case.condition, what="loss")
        grad = gradients(loss, inputs)["features"]
        size = 1 / inputs["features"].detach().abs().min().item()
        compare.assert_close(
            grad, torch.zeros_like(grad, dtype=torch.float64), scale=case.condition * size, what="gradient"
        )


@pytest.mark.parametrize("N, D", ((33, 128), (257, 37), (500, 128)))
def test_sizes_on_every_instruction_set(N, D, isa):
    for dtype in FLOATS:
        check(supcon(N, D, None, 10), "cpu", dtype)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("views", (None, 1, 2, 3))
def test_options(views, normalize, reduction, impl):
    for dtype in FLOATS:
        check(
            supcon(
                N=21, D=9, views=views, classes=5, normalize=normalize, reduction=reduction, temperature=0.3
            ),
            impl,
            dtype,
        )


@pytest.mark.parametrize("temperature", (0.005, 0.07, 1.0, 100.0))
def test_temperatures(temperature, impl):
    for dtype in FLOATS:
        check(supcon(N=40, D=16, views=None, classes=4, temperature=temperature), impl, dtype)


@pytest.mark.parametrize("size", (1e-4, 1e3))
def test_rows_of_any_length_are_normalised(size, impl):
    for dtype in FLOATS:
        check(supcon(N=40, D=16, views=None, classes=4, size=size), impl, dtype)


def test_large_logits(impl):
    """Logits up to 1e4: exponentials overflow unless the row's own maximum is subtracted."""
    case = supcon(N=40, D=16, views=None, classes=4, temperature=1.0, normalize=False, size=25.0)
    assert 1e4 < case.condition < 1e5
    for dtype in FLOATS:
        check(case, impl, dtype)


def test_far_negative_logits(impl):
    """Every other pair is far below 0: the sum without the row itself must not come out as 0."""
    features = torch.tensor([[100.0, 0], [-100, 1], [0, 100], [1, -100]], requires_grad=True)
    exact = features.detach().double().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    found = supcon_loss(features, labels, normalize=False, temperature=1.0, reduction="none", impl=impl)
    s = exact @ exact.T
    s = s.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    expected = s.logsumexp(1) - s[torch.arange(4), torch.tensor([1, 0, 3, 2])]
    compare.assert_close(found, expected, scale=1e4, what="loss")
    found.sum().backward()
    expected.sum().backward()
    compare.assert_close(features.grad, exact.grad, what="gradient")


# ------------------------------------------------------------------------------------------------------------
# Edges: defined, and finite


def test_an_anchor_without_positives_counts_zero_and_counts(impl):
    """The mean is over all anchors, as in the authors' code."""
    x, labels = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 2, 3])
    rows = supcon_loss(x, labels, reduction="none", impl=impl)
    assert not rows[2:].detach().any() and (rows[:2] != 0).all()
    compare.assert_close(supcon_loss(x, labels, impl=impl), rows.detach().sum() / 5)
    compare.assert_close(supcon_loss(x, labels, reduction="sum", impl=impl), rows.detach().sum())
    grad = torch.autograd.grad(rows, x, torch.tensor([0.0, 0, 1, 1, 1], dtype=torch.float64))[0]
    assert not grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("labels", ([0], [0, 1, 2, 3, 4, 5, 6]), ids=("one anchor", "all different"))
def test_no_positives_at_all(labels, impl, dtype):
    x = torch.randn(len(labels), 8, dtype=dtype, requires_grad=True)
    loss = supcon_loss(x, torch.tensor(labels), impl=impl)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("shape", ((0, 8), (0, 2, 8), (3, 0, 8)))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_no_anchors(shape, reduction, impl):
    x = torch.zeros(shape, requires_grad=True)
    loss = supcon_loss(x, torch.zeros(shape[0], dtype=torch.long), reduction=reduction, impl=impl)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0 and x.grad.shape == shape


def test_all_the_same_label(impl):
    for dtype in FLOATS:
        check(supcon(N=37, D=8, views=2, classes=1), impl, dtype)


def test_equal_rows(impl):
    """Every logit is 1/T: each anchor's loss is log(N - 1), and the gradient is 0 up to rounding."""
    x = torch.ones(9, 4, dtype=torch.float64, requires_grad=True)
    loss = supcon_loss(x, torch.arange(9) % 2, reduction="none", impl=impl)
    compare.assert_close(loss, torch.full((9,), 8.0, dtype=torch.float64).log(), scale=1 / 0.07)
    loss.sum().backward()
    compare.assert_close(x.grad, torch.zeros(9, 4, dtype=torch.float64), scale=1 / 0.07)


@pytest.mark.parametrize("length", (0.0, 1e-13))
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_row_is_a_zero_and_gets_no_gradient(length, dtype, impl):
    case = supcon(N=11, D=8, views=None, classes=3)
    x, labels = case.tensors["features"].to(dtype).clone(), case.tensors["labels"]
    x[4] = length / 8**0.5
    x.requires_grad_()
    # By hand: row 4 has logit 0 with every other row.
    z = F.normalize(x.detach().double(), dim=1)
    z[4] = 0
    found = supcon_loss(x, labels, reduction="none", impl=impl)
    expected = op_cases.plain_supcon(z, labels, normalize=False, reduction="none")
    compare.assert_close(found, expected, scale=1 / 0.07, what="loss")
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and not x.grad[4].any() and x.grad[3].any()


def test_a_zero_row_unnormalised_is_like_any_other(impl):
    case = supcon(N=11, D=8, views=None, classes=3, normalize=False, temperature=1.0)
    case.tensors["features"][4] = 0
    for dtype in FLOATS:
        check(case, impl, dtype)


@pytest.mark.parametrize("kind", (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
def test_label_dtypes(kind, impl):
    case = supcon(N=21, D=9, views=None, classes=5)
    x, labels = case.tensors["features"], case.tensors["labels"]
    compare.assert_same(supcon_loss(x, labels.to(kind), impl=impl), supcon_loss(x, labels, impl=impl))


def test_labels_are_names_not_indices(impl):
    """Any integers: negative ones, and ones that differ only beyond 32 bits."""
    case = supcon(N=21, D=9, views=None, classes=3)
    x, labels = case.tensors["features"], case.tensors["labels"]
    names = torch.tensor([-5, 2**40 - 5, 2**62])
    compare.assert_same(supcon_loss(x, names[labels], impl=impl), supcon_loss(x, labels, impl=impl))


def test_strided_labels(impl):
    case = supcon(N=21, D=9, views=2, classes=3)
    x, labels = case.tensors["features"], case.tensors["labels"]
    strided = torch.stack([labels, labels + 7], 1)[:, 0]
    assert not strided.is_contiguous()
    compare.assert_same(supcon_loss(x, strided, impl=impl), supcon_loss(x, labels, impl=impl))
    same = torch.zeros((), dtype=torch.long).expand(21)
    compare.assert_same(supcon_loss(x, same, impl=impl), supcon_loss(x, same.contiguous(), impl=impl))


# ------------------------------------------------------------------------------------------------------------
# Properties, over any shape, layout and dtype


@st.composite
def any_case(draw) -> tuple[Case, str, torch.dtype]:
    N, D, views = draw(st.integers(2, 70)), draw(st.integers(2, 40)), draw(st.sampled_from((None, 1, 2, 3)))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    options = dict(temperature=draw(st.floats(0.05, 2)), normalize=draw(st.booleans()), reduction=reduction)
    case = supcon(N, D, views, draw(st.integers(1, 12)), **options)
    return (
        case, draw(st.sampled_from(("contiguous", "transposed", "slice", "step"))),
        draw(st.sampled_from(FLOATS)),
    )


@given(any_case())
def test_any_case(impl, drawn):
    """Tiny unnormalised cases are left out: their loss is smaller than the rounding of a logit."""
    case, layout, dtype = drawn
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(dtype).items()}
    loss = case.function(impl)(inputs)
    exact_inputs = op_cases.widened(inputs)
    exact = case.plain(exact_inputs)
    rows = max(1, case.tensors["features"][..., 0].numel()) if exact.dim() == 0 else 1
    compare.assert_close(loss, exact, scale=max(exact.abs().max().item(), case.condition * rows), what="loss")
    size = gradients(exact, exact_inputs)["features"]
    scale = max(size.abs().max().item(), 1 / case.condition) * case.condition
    compare.assert_close(gradients(loss, inputs)["features"], size, scale=scale, what="gradient")


@given(st.integers(2, 90), st.integers(1, 30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(impl, N, D, classes, random):
    case = supcon(N, D, None, classes)
    x, labels = case.tensors["features"], case.tensors["labels"]
    order = torch.tensor(random.sample(range(N), N))
    rows = supcon_loss(x, labels, reduction="none", impl=impl)
    compare.assert_close(
        supcon_loss(x[order], labels[order], reduction="none", impl=impl), rows[order], scale=1 / 0.07
    )


@given(st.integers(2, 40), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_lengths_do_not_matter_and_the_gradient_is_tangential(impl, N, D, size):
    case = supcon(N, D, None, 3)
    x, labels = case.inputs()["features"], case.tensors["labels"]
    loss = supcon_loss(x, labels, impl=impl)
    compare.assert_close(supcon_loss(x * size, labels, impl=impl), loss, scale=1 / 0.07)
    grad = torch.autograd.grad(loss, x)[0]
    compare.assert_close((grad * x).sum(1), torch.zeros(N, dtype=torch.float64), scale=1 / 0.07)


# ------------------------------------------------------------------------------------------------------------
# Messages

x, y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
MESSAGES = [
    (dict(features=[1.0]), TypeError, "features: expected a floating-point tensor, got list"),
    (dict(features=x.long()), TypeError, "features: expected a floating-point tensor, got torch.int64"),
    (dict(features=x[0]), ValueError, "features: expected (N, D) or (N, views, D), D > 0, got (8,)"),
    (
        dict(features=x[:, :, None, None]),
        ValueError,
        "features: expected (N, D) or (N, views, D), D > 0, got (4, 8, 1, 1)",
    ),
    (dict(features=x[:, :0]), ValueError, "features: expected (N, D) or (N, views, D), D > 0, got (4, 0)"),
    (dict(labels=[0, 1, 2, 3]), TypeError, "labels: expected an integer tensor, got list"),
    (dict(labels=y.float()), TypeError, "labels: expected an integer tensor, got torch.float32"),
    (dict(labels=y[:3]), ValueError, "labels: expected (4,), got (3,)"),
    (dict(labels=y[:, None]), ValueError, "labels: expected (4,), got (4, 1)"),
    (dict(temperature=0.0), ValueError, "temperature: expected a positive finite number, got 0.0"),
    (dict(temperature=-1.0), ValueError, "temperature: expected a positive finite number, got -1.0"),
    (dict(temperature=float("nan")), ValueError, "temperature: expected a positive finite number, got nan"),
    (
        dict(reduction="average"),
        ValueError,
        "reduction: expected one of ('mean', 'sum', 'none'), got 'average'",
    ),
    (
        dict(impl="liger"),
        ValueError,
        "impl: expected one of ('auto', 'reference', 'cpu', 'triton', 'cuda'), got 'liger'",
    ),
]


@pytest.mark.parametrize("wrong, kind, words", MESSAGES, ids=[words[:40] for _, _, words in MESSAGES])
def test_messages(wrong, kind, words):
    with pytest.raises(kind, match="^supcon_loss: " + re.escape(words)):
        supcon_loss(**(dict(features=x, labels=y) | wrong))


def test_a_positive_infinitely_far_away_is_a_loss_of_infinity(impl):
    """It is not taken for the pair of a row with itself, which does not count."""
    features = torch.tensor([[1e200, 0.0], [-1e200, 0.0], [0.0, 1.0]], dtype=torch.float64)
    loss = supcon_loss(
        features, torch.tensor([0, 0, 1]), normalize=False, temperature=1.0, reduction="none", impl=impl
    )
    assert loss[0] == torch.inf and loss[1] == torch.inf and loss[2] == 0


@pytest.mark.parametrize("bad", (0, -1, float("inf"), float("nan"), "a"))
@pytest.mark.parametrize("name", ("temperature", "base_temperature"))
def test_a_temperature_that_is_none(name, bad, impl):
    with pytest.raises(ValueError, match=f"supcon_loss: {name}: expected a positive finite number, got"):
        supcon_loss(torch.ones(2, 3), torch.tensor([0, 1]), **{name: bad}, impl=impl)


def test_too_large_for_a_gradient_a_thread(cpu):
    """Beyond 2^24 numbers, threads share one gradient and meet each pair from both sides."""
    check(supcon(N=300, D=60000, views=None, reduction="none"), cpu, torch.float64)
