"""The Triton kernels of `reconstruction_loss` with CIFAR decoders: shapes, every option, and the edges."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import memory
from infopro_fast.ops import reconstruction_loss
from tests import compare, op_cases
from tests.op_cases import check, gradients, make_decoder, plain_reconstruction, reconstruction

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

SHAPES = {
    "first stage, no resize": dict(N=2, C=16, h=12, w=12, H=12, W=12, K=12),
    "no resize, odd": dict(N=5, C=5, h=7, w=9, H=7, W=9, K=7),
    "third stage": dict(N=2, C=64, h=8, w=8, H=32, W=32, K=12),
    "widen 2": dict(C=16, h=8, w=8, H=16, W=16, K=24),
    "100 channels": dict(N=2, C=100, h=4, w=4, H=9, W=9, K=12),
    "one channel, two hidden": dict(C=1, h=3, w=4, H=7, W=6, K=2),
    "one channel each": dict(C=1, h=5, w=4, H=5, W=4, K=1),
    "features 1x1": dict(h=1, w=1, H=6, W=5),
    "features one row": dict(h=1, w=4, H=6, W=8),
    "image one row": dict(h=4, w=3, H=1, W=9),
    "image 1x1": dict(N=5, h=4, w=3, H=1, W=1),
    "one axis kept": dict(h=7, w=3, H=7, W=12),
    "primes": dict(N=6, h=5, w=7, H=23, W=17),
    "downscaled": dict(h=13, w=17, H=5, W=6),
    "large ratio": dict(N=2, C=4, h=2, w=2, H=41, W=37, K=5),
    "tall": dict(N=1, C=4, h=17, w=4, H=39, W=7, K=5),
    "tall, no resize": dict(N=1, C=4, h=29, w=7, H=29, W=7, K=5),
    "tall, downscaled": dict(N=1, C=4, h=40, w=5, H=25, W=7, K=5),
}


@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.fast(3)
def test_shapes(shape, mode):
    check(reconstruction(**SHAPES[shape], interpolate_mode=mode), "triton", torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ("100 channels", "no resize, odd", "downscaled"))
@pytest.mark.fast(2)
def test_low_precision(shape, dtype):
    check(reconstruction(**SHAPES[shape]), "triton", dtype)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("restored", (False, True))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
@pytest.mark.fast(3)
def test_losses(loss, restored, training):
    restore = dict(image_mean=MEAN, image_std=STD) if restored else {}
    check(reconstruction(loss=loss, training=training, **restore), "triton", torch.float32)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    "norm", (dict(affine=False), dict(track_running_stats=False), dict(momentum=None, eps=0.1)), ids=str
)
@pytest.mark.fast(1)
def test_batch_norms(norm, bias):
    check(reconstruction(norm=norm, bias=bias), "triton", torch.float32)
    if "affine" in norm:
        check(reconstruction(norm=norm, bias=bias, training=False), "triton", torch.float32)


@pytest.mark.parametrize("offset", (30.0, 1000.0))
@pytest.mark.slow
def test_batch_statistics_of_a_shifted_channel(offset):
    case = reconstruction(N=4, C=16, h=8, w=8, H=16, W=16, K=12, magnified=1 + offset / 16)
    case.tensors["decoder.0.bias"].add_(offset)
    check(case, "triton", torch.float32)


def test_large_logits():
    """Cross entropy comes from the logits, exact where a sigmoid has rounded to 0 or 1."""
    case = reconstruction(N=4, C=16, h=8, w=8, H=16, W=16, K=12)
    tensors = case.inputs(torch.float32)
    with torch.no_grad():
        tensors["decoder.3.weight"] *= 1000
    exact = op_cases.widened(tensors)
    wanted = case.function("reference")(exact)
    assert wanted > 100
    compare.assert_close(case.function("triton")(tensors), wanted.double(), what="loss")


def test_running_statistics():
    ours = make_decoder(5, 7).float()
    exact, plain = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    case = reconstruction().inputs(torch.float32, grad=())
    features, image = case["features"], case["image"]
    with torch.no_grad():
        reconstruction_loss(features, image, ours, impl="triton")
        plain_reconstruction(features, image, plain)
        plain_reconstruction(features.double(), image.double(), exact)
    for (name, found), expected, theirs in zip(
        ours[1].named_buffers(), exact[1].buffers(), plain[1].buffers(), strict=True
    ):
        if found.is_floating_point():
            compare.assert_accurate(found, theirs, expected, what=name)
        else:
            assert found == expected == 1


@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
@pytest.mark.fast(1)
def test_layouts(layout):
    """Strided inputs are read in place, nothing beside them is; gradients have `empty_like`'s strides."""
    case = reconstruction()
    inputs = {name: op_cases.relayout(t, layout)[0] for name, t in case.inputs(torch.float32).items()}
    check(case, "triton", torch.float32, inputs)
    grad = gradients(case.function("triton")(inputs), inputs)["features"]
    assert grad.stride() == torch.empty_like(inputs["features"]).stride()


SUBSETS = (("features",), ("decoder.0.weight",), ("decoder.0.bias",), ("decoder.1.weight", "decoder.3.bias"))


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@pytest.mark.fast(1)
def test_subsets_that_require_grad(names):
    for training in (True, False):
        case = reconstruction(training=training)
        inputs, exact = case.inputs(torch.float32, grad=names), case.inputs(grad=names)
        expected = gradients(case.plain(exact), exact)
        for name, grad in gradients(case.function("triton")(inputs), inputs).items():
            scale = 1.0 if training and name in case.zero else None
            compare.assert_close(grad, expected[name], scale=scale, what=name)


def test_kept_for_backward_is_z():
    """And its statistics; not the logits, nor a resized map."""
    N, H, W, K = 3, 9, 7, 6
    decoder = make_decoder(5, K).float()
    features, image = torch.randn(N, 5, 4, 3, requires_grad=True), torch.rand(N, 3, H, W)
    beside = [features, image, *decoder.parameters(), *decoder.buffers()]
    found = memory.saved_bytes(lambda: reconstruction_loss(features, image, decoder, impl="triton"), beside)
    assert found == 4 * (N * K * H * W + 2 * K)


def test_without_grad():
    case = reconstruction()
    loss = case.function("triton")(case.inputs(torch.float32, grad=()))
    compare.assert_close(loss, case.plain(case.inputs(grad=())).double(), what="loss")


def test_upstream_gradient_of_an_expanded_loss():
    case = reconstruction()
    inputs, exact = case.inputs(torch.float32), case.inputs()
    found = gradients(case.function("triton")(inputs), inputs, torch.full((1,), -3e4).expand(1)[0])
    expected = gradients(case.plain(exact), exact, torch.tensor(-3e4, dtype=torch.float64))
    for name, grad in found.items():
        compare.assert_close(
            grad, expected[name], scale=expected[case.zero.get(name, name)].abs().max().item(), what=name
        )


def test_empty_batch():
    decoder, features = make_decoder(5, 7).float(), torch.zeros(0, 5, 4, 3, requires_grad=True)
    loss = reconstruction_loss(features, torch.zeros(0, 3, 9, 7), decoder, impl="triton")
    loss.backward()
    assert loss == 0 and features.grad.shape == features.shape
    assert not any(p.grad.any() for p in decoder.parameters())


def test_same_bits_every_time():
    case = reconstruction(**SHAPES["tall"])
    runs = []
    for _ in range(2):
        inputs = case.inputs(torch.float32)
        loss = case.function("triton")(inputs)
        runs.append(gradients(loss, inputs) | {"loss": loss.detach()})
    for name, first in runs[0].items():
        compare.assert_same(first, runs[1][name], name)


def test_an_image_in_another_dtype():
    case = reconstruction()
    inputs = case.inputs(torch.float32)
    inputs["image"] = inputs["image"].bfloat16()
    widened = case.inputs(torch.float32) | {"image": inputs["image"].float()}
    compare.assert_same(
        case.function("triton")(inputs).detach(), case.function("triton")(widened).detach(), "loss"
    )
