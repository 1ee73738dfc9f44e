"""Triton kernels of `reconstruction_loss` with chain decoders: golden values, forms, chunks, processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infopro_fast.ops import reconstruction_loss
from tests import compare, op_cases, test_chain_decoder
from tests.op_cases import chain, check, gradients
from tests.test_chain_decoder import FORMS, GOLDEN

NO_WHOLE_SIZE = (
    "factors of no whole size", "factors of no whole size, nearest", "a factor that keeps the size"
)
# to these kernels, and the interpreter is slow
NOTHING_NEW = ("wide", "no Upsample, nearest", "SyncBatchNorm, eval")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
@pytest.mark.fast(1)
def test_released_values(case):
    test_chain_decoder.assert_released(case, "triton", torch.float32)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in (*NO_WHOLE_SIZE, *NOTHING_NEW)])
@pytest.mark.fast(3)
def test_forms(form):
    check(chain(**FORMS[form]), "triton", torch.float32)


@pytest.mark.parametrize("form", ("shrinks", "1x1 resized"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.fast(1)
def test_sixteen_bits(form, dtype):
    check(chain(**FORMS[form]), "triton", dtype)


@pytest.mark.parametrize("options", ({}, {"image_mean": (0.5,) * 3, "image_std": (0.25,) * 3}), ids=str)
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
@pytest.mark.fast(2)
def test_an_image_outside_the_unit_range_gives_nan(loss, options):
    """On a GPU a check would wait."""
    case = chain(loss=loss, **options)
    for inputs in op_cases.outside(case):
        assert case.function("triton")(inputs).isnan()


def test_features_of_16_bits_and_parameters_of_32():
    """As under autocast."""
    case = chain()
    inputs = case.inputs(torch.float32)
    inputs["features"] = inputs["features"].detach().bfloat16().requires_grad_()
    exact = op_cases.widened(inputs)
    found, wanted = gradients(case.function("triton")(inputs), inputs), gradients(case.plain(exact), exact)
    for name, g in found.items():
        assert g.dtype == inputs[name].dtype
        scale = wanted[case.zero.get(name, name)].abs().max().item()
        compare.assert_close(g, wanted[name], scale=scale, what=name)


def test_small_gradients_of_float16_keep_their_digits():
    """They are of a mean over a batch's pixels: smaller than float16 holds before they are summed up."""
    case = chain(stages=((None, 1, 6),))
    found = {}
    for dtype in (torch.float16, torch.float32):
        inputs = op_cases.copies(case.inputs(torch.float16), dtype)
        loss = case.function("triton")(inputs)
        found[dtype] = gradients(loss, inputs, torch.full_like(loss, 1e-4))
    for name in ("decoder.0.weight", "decoder.1.weight"):
        off = found[torch.float16][name].float() - found[torch.float32][name]
        assert off.abs().max() < 2**-24, name  # float16's smallest step


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "slice", "step"))
@pytest.mark.fast(1)
def test_layouts(layout):
    case = chain(stages=((None, 1, 6), (test_chain_decoder.doubled(), 3, 4)))
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs(torch.float32).items()}
    check(case, "triton", torch.float32, inputs)


@pytest.mark.parametrize("form", ("no bias", "shrinks"))
def test_in_chunks_of_samples(form, monkeypatch):
    from infopro_fast.ops.triton_kernels import upsample_conv3x3 as module

    spans, asked = module.spans, []
    monkeypatch.setattr(module, "MOST", 200)
    monkeypatch.setattr(
        module, "spans", lambda N, numbers: asked.append(found := list(spans(N, numbers))) or found
    )
    check(chain(N=3, **FORMS[form]), "triton", torch.float32)
    assert max(map(len, asked)) == 3


def test_what_is_made_for_a_chunk_is_no_larger_than_it_may_be(monkeypatch):
    """Normalised maps and their gradients, which may have more numbers than the taps between them."""
    from infopro_fast.ops.triton_kernels import chain_stage as stage
    from infopro_fast.ops.triton_kernels import upsample_conv3x3 as module

    made = []
    for kind in (stage.Activation, stage.NormalisedGradient):
        make = kind.__getitem__
        monkeypatch.setattr(
            kind, "__getitem__", lambda self, samples,
            make=make: made.append(found := make(self, samples)) or found,
        )
    monkeypatch.setattr(module, "MOST", 325)
    up = test_chain_decoder.resized(8, 8)
    check(chain(N=3, C=3, h=2, w=2, stages=((None, 1, 40), (up, 3, 2)), last=up), "triton", torch.float32)
    # of 160 numbers, between which and the next map the taps have 72
    assert max(t.shape[0] for t in made) == 2
    assert all(t.numel() <= 325 for t in made)


def test_several_blocks_of_a_map():
    check(chain(N=1, C=2, h=5, w=210, stages=((None, 1, 2),), size=(5, 210)), "triton", torch.float32)


@pytest.mark.slow
def test_same_bits_twice():
    case = chain()
    first, second = (gradients(case.function("triton")(t := case.inputs(torch.float32)), t) for _ in range(2))
    for name, t in first.items():
        compare.assert_same(second[name], t, name)


@pytest.mark.parametrize("N", (0, 1))
def test_few_samples(N):
    case = chain(N=N, training=False)
    inputs = case.inputs(torch.float32)
    found = gradients(case.function("triton")(inputs), inputs)
    assert all(torch.isfinite(t).all() for t in found.values()) and (
        N > 0 or not any(t.any() for t in found.values())
    )


def test_a_nan_is_not_hidden():
    layers = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid()
    decoder = nn.Sequential(*layers).eval()
    features = torch.full((2, 2, 3, 3), torch.nan)
    assert reconstruction_loss(features, torch.rand(2, 3, 3, 3), decoder, impl="triton").isnan()


@pytest.mark.parametrize("sizes", ((2, 3), (4, 0)), ids=str)
@pytest.mark.slow
def test_sync_batch_norm_takes_the_statistics_of_all_processes(sizes, tmp_path):
    test_chain_decoder.assert_synced(sizes, "triton", torch.float32, tmp_path)


@pytest.mark.parametrize("form", NO_WHOLE_SIZE)
def test_factors_of_no_whole_size_are_refused(form):
    case = chain(**FORMS[form])
    with pytest.raises(
        ValueError,
        match=r"impl='triton' cannot run this call: an Upsample by \(.*\) makes maps of .* no whole size",
    ):
        case.function("triton")(case.inputs(torch.float32))


def test_a_batch_norm_with_a_weight_alone():
    decoder = op_cases.make_chain(2, ((None, 1, 4),), nn.Upsample((4, 4))).float()
    features, image = torch.rand(2, 2, 3, 3), torch.rand(2, 3, 4, 4)
    decoder[1].bias = None
    loss = reconstruction_loss(features, image, decoder, impl="triton")
    compare.assert_close(
        loss, reconstruction_loss(features.double(), image.double(), decoder, impl="reference")
    )
