"""`upsample_cross_entropy`: every option against F.cross_entropy(F.interpolate(...)); labels; messages."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infopro_fast.ops import upsample_cross_entropy
from tests import compare, golden, op_cases
from tests.op_cases import check, gradients, upsample_ce

FLOATS = (torch.float64, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ------------------------------------------------------------------------------------------------------------
# Values and gradients


def name(case: dict) -> str:
    return (
        f"{case['classes']} classes {case['h_size']} to {case['size']} align_corners {case['align_corners']}"
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", golden.cases("upsample_cross_entropy"), ids=name)
def test_golden(case, dtype, impl):
    (H, W), N, C = case["size"], case["batch"], case["classes"]
    logits = golden.wave((N, C, *case["h_size"]), 31, 3.0).to(dtype).requires_grad_()
    target = golden.labels(N * H * W, C)
    target[:: case["ignore_every"]] = 255
    for target_dtype in (torch.int64, torch.uint8):
        target_of_dtype = target.view(N, H, W).to(target_dtype)
        loss = upsample_cross_entropy(
            logits, target_of_dtype, align_corners=case["align_corners"], ignore_index=255, impl=impl
        )
        compare.assert_golden("loss", loss.detach(), case["loss"])
        (grad,) = torch.autograd.grad(loss, logits)
        compare.assert_golden("logits", grad, case["grad"])
        # The authors' DeepLab divides by all pixels.
        loss = upsample_cross_entropy(
            logits, target_of_dtype, align_corners=case["align_corners"], ignore_index=255,
            reduction="mean_all", impl=impl,
        )
        labelled = (target != 255).double().mean().item()
        compare.assert_golden("loss", loss.detach(), case["loss"] * labelled)
        (grad,) = torch.autograd.grad(loss, logits)
        compare.assert_golden("logits", grad, [part * labelled for part in case["grad"]])


OPTIONS = list(itertools.product((False, True), (0.0, 0.1, 1.0), (False, True), ("mean", "sum", "none")))


@pytest.mark.parametrize("align_corners, label_smoothing, class_weight, reduction", OPTIONS)
def test_options(align_corners, label_smoothing, class_weight, reduction, impl):
    options = dict(
        align_corners=align_corners, label_smoothing=label_smoothing, class_weight=class_weight,
        reduction=reduction,
    )
    for dtype, ignored in zip(FLOATS, (0.3, 0.0)):
        check(upsample_ce(N=2, C=7, h=4, w=5, H=17, W=37, ignored=ignored, **options), impl, dtype)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("label_smoothing, class_weight", itertools.product((0.0, 0.1), (False, True)))
def test_options_on_every_instruction_set(label_smoothing, class_weight, reduction, isa):
    for dtype in (*FLOATS, torch.bfloat16, torch.float16):
        check(
            upsample_ce(
                H=23, W=41, label_smoothing=label_smoothing, class_weight=class_weight, reduction=reduction
            ),
            "cpu",
            dtype,
        )


# (h, w, H, W): up by whole and by broken factors, the same size, down (source rows and columns that no pixel
# touches), one row or column.
SIZES = [
    (8, 16, 64, 128), (3, 5, 24, 40), (7, 3, 20, 33), (9, 9, 9, 9), (5, 40, 5, 40), (33, 70, 12, 17),
    (4, 200, 9, 7), (50, 2, 3, 31),
    (1, 1, 1, 1), (1, 1, 9, 17), (6, 1, 13, 1), (1, 6, 1, 13), (2, 2, 2, 65), (3, 4, 1, 1), (17, 16, 34, 31),
]


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("h, w, H, W", SIZES)
def test_sizes(h, w, H, W, align_corners, impl):
    for dtype, reduction in itertools.product(FLOATS, ("mean", "none")):
        check(upsample_ce(2, 5, h, w, H, W, align_corners=align_corners, reduction=reduction), impl, dtype)


@pytest.mark.parametrize(
    "h, w, H, W", [(3, 5, 24, 40), (33, 70, 12, 17), (9, 9, 9, 9), (4, 200, 9, 7), (2, 2, 2, 65)]
)
def test_sizes_on_every_instruction_set(h, w, H, W, isa):
    for dtype, align_corners in itertools.product(FLOATS, (False, True)):
        check(upsample_ce(2, 5, h, w, H, W, align_corners=align_corners), "cpu", dtype)


@pytest.mark.parametrize("C", (2, 3, 19, 150, 1031))
def test_classes(C, impl):
    for dtype, reduction in itertools.product(FLOATS, ("mean", "none")):
        check(upsample_ce(1, C, 3, 4, 11, 18, reduction=reduction), impl, dtype)


def test_one_class(impl):
    """There is no choice: loss and gradient are 0."""
    case = upsample_ce(C=1)
    for dtype in FLOATS:
        inputs = case.inputs(dtype)
        loss = case.function(impl)(inputs)
        compare.assert_close(
            loss, torch.zeros(loss.shape, dtype=torch.float64), scale=case.condition, what="loss"
        )
        grad = gradients(loss, inputs)["logits"]
        compare.assert_close(
            grad, torch.zeros(grad.shape, dtype=torch.float64), scale=case.condition, what="gradient"
        )


@pytest.mark.parametrize("size", (1e-3, 30.0, 1e4))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_size_of_the_logits(size, label_smoothing, impl):
    """Logits up to 1e4 and more: exponentials overflow unless the pixel's maximum is subtracted."""
    for dtype in FLOATS:
        check(upsample_ce(size=size, label_smoothing=label_smoothing), impl, dtype)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_gradcheck(reduction, impl):
    """Backward is the derivative of forward, by differences."""
    case = upsample_ce(N=1, C=3, h=2, w=3, H=5, W=7, reduction=reduction)
    inputs = case.inputs()
    f = case.function(impl)
    assert torch.autograd.gradcheck(lambda logits: f(inputs | {"logits": logits}), (inputs["logits"],))


def test_second_derivatives_raise(cpu):
    for reduction in ("mean", "none"):
        case = upsample_ce(reduction=reduction)
        inputs = case.inputs()
        (grad,) = torch.autograd.grad(case.function(cpu)(inputs).sum(), inputs["logits"], create_graph=True)
        with pytest.raises(
            RuntimeError, match="upsample_cross_entropy: the kernels have no second derivative"
        ):
            grad.sum().backward()


# ------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("ignore_index", (-100, -1, 3, 255))
@pytest.mark.parametrize("target_dtype", INTEGERS)
def test_targets(ignore_index, target_dtype, impl):
    """The ignored index may be a class; the labels' dtype does not matter."""
    least, most = torch.iinfo(target_dtype).min, torch.iinfo(target_dtype).max
    if not least <= ignore_index <= most:
        pytest.skip("no such label")
    case = upsample_ce(N=2, C=7, H=21, W=40, ignore_index=ignore_index)
    inputs, exact = case.inputs(), case.inputs()
    wanted = case.plain(exact)
    for layout in ("contiguous", "transposed", "step"):
        narrow = inputs | {
            "target": op_cases.relayout(inputs["target"], layout)[0].to(
                target_dtype, memory_format=torch.preserve_format
            )
        }
        found = case.function(impl)(narrow)
        compare.assert_close(found, wanted, what="loss")
        compare.assert_close(
            gradients(found, narrow)["logits"], gradients(wanted, exact, retain_graph=True)["logits"],
            what=layout,
        )


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_no_label_is_mistaken_for_a_negative_ignore_index(reduction, impl):
    """In uint8 -100 would be class 156."""
    case = upsample_ce(N=1, C=200, ignored=0, reduction=reduction)
    case.tensors["target"].view(-1)[::5] = 156
    inputs, exact = case.inputs(), case.inputs()
    inputs["target"] = inputs["target"].to(torch.uint8)
    compare.assert_close(case.function(impl)(inputs), case.plain(exact), what="loss")


@pytest.mark.parametrize("bad", (13, 2**33, -1, -101))
@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int32))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_label_out_of_range_raises(bad, target_dtype, reduction, impl):
    if bad > torch.iinfo(target_dtype).max:
        pytest.skip("no such label")
    case = upsample_ce(C=13, reduction=reduction)
    inputs = case.inputs()
    inputs["target"][1, 4, 18] = bad
    inputs["target"] = inputs["target"].to(target_dtype)
    words = r"\(1, 4, 18\)" if impl == "cpu" else "out of bounds"
    with pytest.raises((IndexError, ValueError), match=f"(?i)target.*{words}"):
        case.function(impl)(inputs)


def test_labels_are_read_as_they_are(cpu):
    """The kernels allocate under a tenth of an int64 copy; the reference makes that copy."""

    def allocated(impl: str, dtype: torch.dtype) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            upsample_cross_entropy(torch.zeros(1, 3, 4, 4), torch.zeros(1, 512, 512, dtype=dtype), impl=impl)
        created = 512 * 512 * dtype.itemsize
        return sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) - created

    for dtype in INTEGERS:
        assert allocated(cpu, dtype) < 8 * 512 * 512 / 10
    assert allocated("reference", torch.uint8) > 8 * 512 * 512


def test_class_weight_gets_no_gradient(impl):
    case = upsample_ce()
    with pytest.raises(
        ValueError, match="upsample_cross_entropy: class_weight: expected a tensor that does not require grad"
    ):
        case.function(impl)(case.inputs(grad=("logits", "class_weight")))


# ------------------------------------------------------------------------------------------------------------
# Pixels that do not count


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("label_smoothing, class_weight", itertools.product((0.0, 0.1), (False, True)))
@pytest.mark.parametrize("dtype", (*FLOATS, torch.bfloat16))
def test_all_pixels_ignored(class_weight, label_smoothing, reduction, dtype, impl):
    """0 with zero gradients; torch's mean is nan with nan gradients."""
    case = upsample_ce(
        ignored=1, class_weight=class_weight, label_smoothing=label_smoothing, reduction=reduction
    )
    inputs = case.inputs(dtype)
    loss = case.function(impl)(inputs)
    assert loss.shape == ((2, 10, 19) if reduction == "none" else ()) and not loss.detach().any()
    grad = gradients(loss, inputs)["logits"]
    assert grad.shape == inputs["logits"].shape and not grad.any()


def test_class_weights_that_are_all_zero(impl):
    case = upsample_ce(reduction="mean", label_smoothing=0.0)
    case.tensors["class_weight"].zero_()
    inputs = case.inputs()
    loss = case.function(impl)(inputs)
    assert loss.item() == 0 and not gradients(loss, inputs)["logits"].any()


def test_some_class_weights_zero(impl):
    for label_smoothing, reduction in itertools.product((0.0, 0.1), ("mean", "none")):
        case = upsample_ce(reduction=reduction, label_smoothing=label_smoothing)
        case.tensors["class_weight"][::2] = 0
        for dtype in FLOATS:
            check(case, impl, dtype)


@pytest.mark.parametrize("fill", (1e30, torch.inf, torch.nan))
def test_what_is_ignored_may_be_anything(fill, cpu):
    """No pixel that counts sees the source's columns right of 8, so padding reaches no result."""
    case = upsample_ce(N=1, C=4, h=4, w=16, H=32, W=128, ignored=0, reduction="mean")
    inputs, clean = case.inputs(), case.inputs()
    for t in (inputs, clean):
        t["target"][:, :, 64:] = -100
    with torch.no_grad():
        inputs["logits"][..., 9:] = fill
        clean["logits"][..., 9:] = 0
    loss, wanted = case.function(cpu)(inputs), case.plain(clean)
    compare.assert_close(loss, wanted, what="loss")
    compare.assert_close(
        gradients(loss, inputs)["logits"], gradients(wanted, clean)["logits"], what="gradient"
    )


# ------------------------------------------------------------------------------------------------------------
# The confusion matrix


def confusion(inputs, impl, **options) -> torch.Tensor:
    loss, counts = upsample_cross_entropy(
        inputs["logits"], inputs["target"], return_confusion=True, impl=impl, **options
    )
    C = inputs["logits"].shape[1]
    assert (
        counts.dtype == torch.int64
        and counts.shape == (C, C)
        and not counts.requires_grad
        and loss.requires_grad
    )
    return counts


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("N, C, ignored", ((2, 2, 0.0), (3, 19, 0.3), (1, 300, 0.1), (2, 5, 1.0)))
def test_confusion(N, C, ignored, align_corners, threads, impl):
    inputs = upsample_ce(N, C, 5, 9, 37, 50, ignored=ignored).inputs()
    resized = F.interpolate(inputs["logits"], (37, 50), mode="bilinear", align_corners=align_corners)
    expected = torch.zeros(C, C, dtype=torch.int64)
    kept = inputs["target"] >= 0
    for t, p in zip(inputs["target"][kept].tolist(), resized.argmax(1)[kept].tolist(), strict=True):
        expected[t, p] += 1
    for n in (1, 3):
        threads(n)
        for reduction in ("mean", "none"):
            found = confusion(
                inputs, impl, align_corners=align_corners, label_smoothing=0.1, reduction=reduction
            )
            compare.assert_same(found, expected)


def test_the_first_of_equal_logits_counts(isa):
    inputs = {
        "logits": torch.ones(1, 6, 4, 4, requires_grad=True),
        "target": torch.arange(6 * 18).view(1, 6, 18) % 6,
    }
    for impl in ("cpu", "reference"):
        assert (confusion(inputs, impl)[:, 0] == 18).all()
    raised = torch.ones(1, 6, 4, 4)
    raised[:, 2::2] = 3  # of classes 2 and 4 the first
    for impl in ("cpu", "reference"):
        assert (confusion(inputs | {"logits": raised.requires_grad_()}, impl)[:, 2] == 18).all()


def test_asking_for_confusion_changes_nothing(impl):
    inputs = upsample_ce().inputs()
    with_counts, _ = upsample_cross_entropy(
        inputs["logits"], inputs["target"], return_confusion=True, impl=impl
    )
    compare.assert_same(with_counts, upsample_cross_entropy(inputs["logits"], inputs["target"], impl=impl))


def test_confusion_without_pixels(impl):
    inputs = upsample_ce(N=0).inputs()
    assert not confusion(inputs, impl).any()


# ------------------------------------------------------------------------------------------------------------
# Two ways to the gradient: kept by forward, or found in backward

ONE_LOSS = pytest.mark.parametrize("reduction", ("mean", "sum"))
SOURCES = pytest.mark.parametrize(
    "h, w", ((3, 4), (6, 8)), ids=("kept", "found")
)  # C h w is below, or above H W


@ONE_LOSS
@SOURCES
@pytest.mark.parametrize("dtype", (*FLOATS, torch.bfloat16, torch.float16))
def test_both_ways(h, w, reduction, dtype, cpu):
    check(upsample_ce(h=h, w=w, reduction=reduction), cpu, dtype)


@SOURCES
def test_backward_twice_and_gradients_of_the_user_s_own(h, w, cpu):
    case = upsample_ce(h=h, w=w, reduction="mean")
    inputs = case.inputs(torch.float32)
    loss = case.function(cpu)(inputs)
    first = gradients(loss, inputs, retain_graph=True)["logits"]
    kept = first.clone()
    first.fill_(torch.nan)
    compare.assert_same(gradients(loss, inputs)["logits"], kept)


@SOURCES
@pytest.mark.parametrize("layout", ("channels_last", "transposed", "slice", "step"))
def test_layouts_both_ways(h, w, layout, cpu):
    case = upsample_ce(h=h, w=w, reduction="mean")
    inputs = case.inputs(torch.float32)
    inputs["logits"] = op_cases.relayout(inputs["logits"], layout)[0]
    check(case, cpu, torch.float32, inputs)


@SOURCES
def test_opcheck_both_ways(h, w, cpu):
    from tests.test_contract import raw_calls

    op_cases_small = op_cases.SMALL["upsample_cross_entropy"]
    op_cases.SMALL["upsample_cross_entropy"] = lambda: upsample_ce(h=h, w=w, reduction="mean")
    try:
        calls = raw_calls("upsample_cross_entropy", torch.float32)
    finally:
        op_cases.SMALL["upsample_cross_entropy"] = op_cases_small
    assert len(calls) == 2
    for overload, args in calls:
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("h, w, H, W", ((9, 14, 71, 109), (40, 9, 50, 20), (3, 3, 40, 40)))
def test_the_same_bits_whatever_the_number_of_threads(h, w, H, W, reduction, threads, cpu):
    case = upsample_ce(2, 5, h, w, H, W, reduction=reduction)
    found = []
    for n in (1, 2, 3, 7):
        threads(n)
        inputs = case.inputs(torch.float32)
        loss = case.function(cpu)(inputs)
        found.append({"loss": loss.detach()} | gradients(loss, inputs))
    for other in found[1:]:
        for key, t in other.items():
            compare.assert_same(t, found[0][key], key)


# ------------------------------------------------------------------------------------------------------------
# Any shape, any layout, any dtype


@st.composite
def any_case(draw):
    N, C, sizes = (
        draw(st.integers(1, 3)), draw(st.integers(1, 24)), [draw(st.integers(1, m)) for m in (9, 12, 30, 45)]
    )
    options = dict(
        align_corners=draw(st.booleans()), class_weight=draw(st.booleans()),
        ignored=draw(st.sampled_from((0.0, 0.2, 0.9))),
        size=draw(st.floats(0.01, 20)), label_smoothing=draw(st.sampled_from((0.0, 0.1, 0.5))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
    )
    case = upsample_ce(N, C, *sizes, **options)
    layouts = {
        k: draw(st.sampled_from(("contiguous", "transposed", "slice", "step", "channels_last")))
        for k in case.tensors
    }
    return case, layouts, draw(st.sampled_from(FLOATS))


@given(any_case())
def test_any_case(impl, drawn):
    case, layouts, dtype = drawn
    inputs = {k: op_cases.relayout(t, layouts[k])[0] for k, t in case.inputs(dtype).items()}
    loss, exact_inputs = case.function(impl)(inputs), op_cases.widened(inputs)
    exact = case.plain(exact_inputs)
    compare.assert_close(loss, exact, scale=max(exact.abs().max().item(), case.condition), what="loss")
    found, expected = gradients(loss, inputs)["logits"], gradients(exact, exact_inputs)["logits"]
    # A probability that rounds to 1 leaves a gradient of rounding alone: relative to what one pixel can give.
    compare.assert_close(
        found, expected, scale=max(expected.abs().max().item(), 1e-3) * case.condition, what="gradient"
    )


# ------------------------------------------------------------------------------------------------------------
# Messages

x, t, w = torch.zeros(2, 5, 3, 4), torch.zeros(2, 6, 8, dtype=torch.long), torch.ones(5)
MESSAGES = [
    (dict(logits=[1.0]), TypeError, "logits: expected a floating-point tensor, got list"),
    (dict(logits=x.long()), TypeError, "logits: expected a floating-point tensor, got torch.int64"),
    (dict(class_weight=[1.0] * 5), TypeError, "class_weight: expected a floating-point tensor, got list"),
    (
        dict(target=t.float()),
        TypeError,
        "target: expected a tensor of uint8, int8, int16, int32, int64, got torch.float32",
    ),
    (
        dict(target=t.bool()),
        TypeError,
        "target: expected a tensor of uint8, int8, int16, int32, int64, got torch.bool",
    ),
    (dict(target=[0]), TypeError, "target: expected a tensor of uint8, int8, int16, int32, int64, got list"),
    (dict(logits=x[0]), ValueError, "logits: expected (N, C, h, w), C, h, w > 0, got (5, 3, 4)"),
    (dict(logits=x[:, :0]), ValueError, "logits: expected (N, C, h, w), C, h, w > 0, got (2, 0, 3, 4)"),
    (dict(logits=x[..., :0]), ValueError, "logits: expected (N, C, h, w), C, h, w > 0, got (2, 5, 3, 0)"),
    (dict(target=t[:1]), ValueError, "target: expected (2, H, W), H, W > 0, got (1, 6, 8)"),
    (dict(target=t[:, None]), ValueError, "target: expected (2, H, W), H, W > 0, got (2, 1, 6, 8)"),
    (dict(target=t[..., :0]), ValueError, "target: expected (2, H, W), H, W > 0, got (2, 6, 0)"),
    (dict(class_weight=w[:4]), ValueError, "class_weight: expected (5,), got (4,)"),
    (
        dict(reduction="batchmean"),
        ValueError,
        "reduction: expected one of ('mean', 'sum', 'none', 'mean_all'), got 'batchmean'",
    ),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected in [0, 1], got 1.5"),
    (
        dict(impl="liger"),
        ValueError,
        "impl: expected one of ('auto', 'reference', 'cpu', 'triton', 'cuda'), got 'liger'",
    ),
]


@pytest.mark.parametrize("wrong, kind, words", MESSAGES, ids=[words[:40] for _, _, words in MESSAGES])
def test_messages(wrong, kind, words):
    with pytest.raises(kind, match="^upsample_cross_entropy: " + re.escape(words)):
        upsample_cross_entropy(**(dict(logits=x, target=t) | wrong))
