"""Triton kernels of `upsample_cross_entropy`: options, resizes up and down, labels of any dtype, counts."""

from __future__ import annotations

import pytest
import torch

from infopro_fast.ops import upsample_cross_entropy
from infopro_fast.ops.triton_kernels import upsample_cross_entropy as module
from tests import compare, golden, op_cases
from tests.op_cases import check, gradients, upsample_ce

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "case", golden.cases("upsample_cross_entropy"), ids=lambda c: f"align_corners {c['align_corners']}"
)
@pytest.mark.fast(1)
def test_golden(case):
    (H, W), N, C = case["size"], case["batch"], case["classes"]
    logits = golden.wave((N, C, *case["h_size"]), 31, 3.0).float().requires_grad_()
    target = golden.labels(N * H * W, C)
    target[:: case["ignore_every"]] = 255
    target = target.view(N, H, W).to(torch.uint8)
    loss = upsample_cross_entropy(
        logits, target, align_corners=case["align_corners"], ignore_index=255, impl="triton"
    )
    compare.assert_golden("loss", loss.detach(), case["loss"])
    compare.assert_golden("logits", torch.autograd.grad(loss, logits)[0], case["grad"])


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(
    "label_smoothing, class_weight", [(0.0, False), (0.0, True), (0.1, False), (0.1, True), (1.0, True)]
)
@pytest.mark.fast(5)
def test_options(label_smoothing, class_weight, reduction):
    options = dict(
        label_smoothing=label_smoothing, class_weight=class_weight, reduction=reduction,
        align_corners=class_weight,
    )
    check(upsample_ce(N=2, C=7, h=2, w=5, H=6, W=23, **options), "triton", torch.float32)


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize(
    "h, w, H, W", [
        (1, 1, 1, 1), (1, 1, 3, 9), (4, 1, 7, 1), (3, 3, 3, 3), (9, 50, 4, 13), (2, 40, 3, 160),
        (3, 35, 4, 40), (5, 4, 1, 1),
    ]
)
def test_sizes(h, w, H, W, align_corners):
    check(upsample_ce(1, 5, h, w, H, W, align_corners=align_corners), "triton", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (2, 16, 17, 70))
@pytest.mark.fast(4)
def test_classes(C, dtype):
    check(upsample_ce(2, C, 2, 3, 5, 11, reduction="mean"), "triton", dtype)


@pytest.mark.parametrize("size", (1e-3, 30.0))
def test_size_of_the_logits(size):
    check(upsample_ce(1, 19, 2, 3, 5, 11, size=size), "triton", torch.float32)


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "slice", "step"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    case = upsample_ce(H=5)
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(dtype).items()}
    check(case, "triton", dtype, inputs)


def test_channels_last_stays_so():
    logits = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    upsample_cross_entropy(logits, torch.zeros(2, 6, 8, dtype=torch.uint8), impl="triton").backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "target_dtype, ignore_index", [
        (torch.uint8, 255), (torch.uint8, 3), (torch.int8, -100), (torch.int16, 255), (torch.int32, -100)
    ]
)
def test_targets(target_dtype, ignore_index):
    case = upsample_ce(H=5, ignore_index=ignore_index)
    inputs = case.inputs(torch.float32)
    inputs["target"] = inputs["target"].to(target_dtype)
    check(case, "triton", torch.float32, inputs)


def test_a_label_out_of_range_counts_as_ignored():
    case = upsample_ce(H=5, reduction="mean")
    inputs, ignored = case.inputs(torch.float32), case.inputs(torch.float32)
    for position, bad in zip(((0, 1, 2), (1, 2, 18), (1, 4, 0)), (5, -1, 2**40), strict=True):
        inputs["target"][position] = bad
        ignored["target"][position] = -100
    found, wanted = case.function("triton")(inputs), case.function("triton")(ignored)
    compare.assert_same(found.detach(), wanted.detach())
    compare.assert_same(gradients(found, inputs)["logits"], gradients(wanted, ignored)["logits"])


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_all_pixels_ignored(reduction):
    case = upsample_ce(H=5, ignored=1, reduction=reduction)
    inputs = case.inputs(torch.float32)
    loss = case.function("triton")(inputs)
    assert not loss.detach().any() and not gradients(loss, inputs)["logits"].any()


@pytest.mark.parametrize("fill", (1e30, torch.inf, torch.nan))
def test_what_is_ignored_may_be_anything(fill):
    case = upsample_ce(N=1, C=4, h=2, w=16, H=5, W=128, ignored=0, reduction="mean")
    inputs, clean = case.inputs(torch.float32), case.inputs()
    for t in (inputs, clean):
        t["target"][:, :, 64:] = -100
    with torch.no_grad():
        inputs["logits"][..., 9:] = fill
        clean["logits"][..., 9:] = 0
    loss, wanted = case.function("triton")(inputs), case.plain(clean)
    compare.assert_close(loss, wanted, what="loss")
    compare.assert_close(
        gradients(loss, inputs)["logits"], gradients(wanted, clean)["logits"], what="gradient"
    )


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_non_finite_input_is_not_hidden(bad):
    case = upsample_ce(H=5)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs["logits"][0, 0, 0, 0] = bad
    assert not torch.isfinite(case.function("triton")(inputs)).all()


@pytest.mark.parametrize("C, align_corners", [(2, False), (19, True), (40, False)])
def test_confusion(C, align_corners):
    inputs = upsample_ce(2, C, 3, 4, 6, 21).inputs(torch.float32)
    _, found = upsample_cross_entropy(
        inputs["logits"], inputs["target"], align_corners=align_corners, return_confusion=True, impl="triton"
    )
    exact = inputs["logits"].detach().double()
    _, expected = upsample_cross_entropy(
        exact, inputs["target"], align_corners=align_corners, return_confusion=True, impl="reference"
    )
    compare.assert_same(found, expected)


def test_the_first_of_equal_logits_counts():
    logits = torch.ones(1, 40, 2, 2)
    logits[:, 34::2] = 3
    target = torch.zeros(1, 4, 8, dtype=torch.uint8)
    for first, t in ((0, torch.ones_like(logits)), (34, logits)):
        _, found = upsample_cross_entropy(t, target, return_confusion=True, impl="triton")
        assert found[0, first] == 32 and found.sum() == 32


def test_empty_batch():
    for reduction in ("mean", "none"):
        logits = torch.zeros(0, 5, 3, 4, requires_grad=True)
        loss = upsample_cross_entropy(
            logits, torch.zeros(0, 6, 8, dtype=torch.long), reduction=reduction, impl="triton"
        )
        loss.sum().backward()
        assert loss.shape == (
            (0, 6, 8) if reduction == "none" else ()
        ) and not loss.detach().any() and logits.grad.shape == logits.shape


def test_expanded_upstream_gradient():
    """That of a sum has strides of 0."""
    case = upsample_ce(H=5)
    inputs, exact = case.inputs(torch.float32), case.inputs()
    found, wanted = case.function("triton")(inputs), case.plain(exact)
    ours = gradients(found, inputs, torch.ones(()).expand(found.shape))["logits"]
    compare.assert_close(
        ours, gradients(wanted, exact, torch.ones(()).double().expand(found.shape))["logits"]
    )


def test_same_bits_twice():
    case = upsample_ce(H=5)
    first, second = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    compare.assert_same(first["logits"], second["logits"])


class Launches:
    """In the place of a kernel: notes the grids that it would be launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append(grid)


@pytest.mark.parametrize(
    "N, C, h, H", [(1, 2, 1, 70000), (1, 2, 70000, 1), (70000, 2, 1, 1), (3, 70000, 1, 1), (2, 40, 300, 400)]
)
def test_programs_are_counted_in_the_one_dimension_that_takes_so_many(N, C, h, H, monkeypatch):
    """Others hold 65535. A program: BLOCK_P pixels of a row; BLOCK_C classes of BLOCK_W pixels."""
    kernels = {name: Launches() for name in ("forward_kernel", "finish_kernel", "backward_kernel")}
    for name, launches in kernels.items():
        monkeypatch.setattr(module, name, launches)
    logits = torch.zeros(1, 1, 1, 1).expand(N, C, h, 40).requires_grad_()
    target = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(N, H, 100)
    upsample_cross_entropy(logits, target, impl="triton").backward()
    tiles = module.choose_tiles(C)
    assert kernels["forward_kernel"].grids == [(N * H * -(-100 // tiles.forward_p),)]
    assert kernels["backward_kernel"].grids == [(N * -(-C // tiles.block_c) * h * -(-40 // tiles.block_w),)]


def test_sizes_beyond_its_counters_are_refused():
    logits, target = torch.zeros(1, 2, 40000, 1), torch.zeros(1, 40000, 1, dtype=torch.uint8)
    with pytest.raises(
        ValueError,
        match="upsample_cross_entropy: impl='triton' cannot run this call: logits .* need more than 32 bits",
    ):
        upsample_cross_entropy(logits, target, impl="triton")
