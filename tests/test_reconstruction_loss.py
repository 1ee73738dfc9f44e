"""`reconstruction_loss`: the authors' values, every option against the plain layers, statistics, messages."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infopro_fast.ops import reconstruction_loss
from tests import compare, golden, op_cases
from tests.op_cases import check, make_decoder, plain_reconstruction, reconstruction

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


# ------------------------------------------------------------------------------------------------------------
# The authors' code


def released_decoder(case, dtype) -> nn.Sequential:
    decoder = make_decoder(case["channels"], int(12 * case["widen"]))
    golden.fill_parameters({f"decoder.{k}": t for k, t in decoder.state_dict().items()})
    return decoder.to(dtype)


def released_gradients(case, features, image) -> dict[str, torch.Tensor]:
    """Return the float32 gradients of the authors' layers."""
    decoder, features = released_decoder(case, torch.float32), features.detach().clone().requires_grad_()
    plain_reconstruction(features, image, decoder, case["mode"]).backward()
    return {"h": features.grad} | {name: p.grad for name, p in decoder.named_parameters(prefix="decoder")}


def assert_released(case, impl, dtype):
    decoder = released_decoder(case, dtype)
    features = (
        golden.features(case["batch"], case["channels"], case["h_size"], case["h_size"])
        .to(dtype)
        .requires_grad_()
    )
    image = golden.image(case["batch"], case["image_size"], case["image_size"]).to(dtype)
    loss = reconstruction_loss(features, image, decoder, interpolate_mode=case["mode"], impl=impl)
    loss.backward()
    compare.assert_golden("loss", loss, case["loss"], dtype)
    plain = released_gradients(case, features, image) if dtype == torch.float32 else {}
    compare.assert_golden("h", features.grad, case["grad_h"], dtype, plain=plain.get("h"))
    parameters, buffers = (
        dict(decoder.named_parameters(prefix="decoder")), dict(decoder.named_buffers(prefix="decoder"))
    )
    assert parameters.keys() == case["grads"].keys()
    for name, expected in case["grads"].items():
        compare.assert_golden(name, parameters[name].grad, expected, dtype, plain=plain.get(name))
    for name, expected in case["buffers"].items():
        compare.assert_golden(name, buffers[name], expected, dtype)
    assert buffers["decoder.1.num_batches_tracked"] == 1


GOLDEN = golden.cases("cifar_decoder")
GOLDEN_IDS = ["C{channels}-{h_size}to{image_size}-{mode}-widen{widen}".format(**case) for case in GOLDEN]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("case", GOLDEN, ids=GOLDEN_IDS)
def test_released_values(case, impl, dtype):
    assert_released(case, impl, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("case", GOLDEN, ids=GOLDEN_IDS)
def test_released_values_on_every_instruction_set(case, isa, dtype):
    assert_released(case, "cpu", dtype)


# ------------------------------------------------------------------------------------------------------------
# Shapes and options

SHAPES = {
    "first stage, no resize": dict(N=2, C=16, h=32, w=32, H=32, W=32, K=12),
    "second stage": dict(N=2, C=32, h=16, w=16, H=32, W=32, K=12),
    "third stage": dict(N=2, C=64, h=8, w=8, H=32, W=32, K=12),
    "STL-10": dict(N=1, C=64, h=24, w=24, H=96, W=96, K=12),
    "widen 0.5": dict(C=32, h=8, w=8, H=16, W=16, K=6),
    "widen 2": dict(C=16, h=8, w=8, H=16, W=16, K=24),
    "13 channels": dict(C=13, h=5, w=6, H=11, W=10, K=13),
    "100 channels": dict(N=2, C=100, h=4, w=4, H=9, W=9, K=12),
    "one channel each": dict(C=1, h=3, w=4, H=7, W=6, K=1),
    "three channels, two hidden": dict(C=3, h=3, w=4, H=7, W=6, K=2),
    "features 1x1": dict(h=1, w=1, H=6, W=5),
    "features one row": dict(h=1, w=4, H=6, W=8),
    "features one column": dict(h=4, w=1, H=8, W=6),
    "image one column": dict(h=4, w=3, H=9, W=1),
    "image one row": dict(h=4, w=3, H=1, W=9),
    "image 1x1": dict(N=5, h=4, w=3, H=1, W=1),
    "features and image 1x1": dict(N=5, h=1, w=1, H=1, W=1),
    "two columns": dict(h=2, w=2, H=2, W=2),
    "one axis kept": dict(h=7, w=3, H=7, W=12),
    "primes": dict(h=5, w=7, H=23, W=17),
    "downscaled": dict(h=13, w=17, H=5, W=6),
    "downscaled in one axis": dict(h=13, w=3, H=5, W=11),
    "much wider than high": dict(N=2, h=2, w=29, H=3, W=67),
    "batch of one": dict(N=1, C=8, h=4, w=4, H=8, W=8, K=12),
    "large ratio": dict(N=2, C=4, h=2, w=2, H=41, W=37, K=5),
}


@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, mode, impl):
    for dtype in (torch.float64, torch.float32):
        check(reconstruction(**SHAPES[shape], interpolate_mode=mode), impl, dtype)


@pytest.mark.parametrize("shape", ("first stage, no resize", "third stage", "primes", "13 channels"))
def test_shapes_on_every_instruction_set(shape, isa):
    for dtype in (torch.float64, torch.float32):
        check(reconstruction(**SHAPES[shape]), "cpu", dtype)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("restored", (False, True))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
def test_losses(loss, restored, training, impl):
    restore = dict(image_mean=MEAN, image_std=STD) if restored else {}
    for size in (dict(), dict(C=16, h=8, w=8, H=8, W=8)):
        for dtype in (torch.float64, torch.float32):
            check(reconstruction(**size, loss=loss, training=training, **restore), impl, dtype)


NORMS = {
    "default": {},
    "not affine": dict(affine=False),
    "no running statistics": dict(track_running_stats=False),
    "cumulative average": dict(momentum=None),
    "momentum 0.3, eps 0.1": dict(momentum=0.3, eps=0.1),
    "no running statistics, not affine": dict(track_running_stats=False, affine=False),
}


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("norm", NORMS)
def test_batch_norms(norm, training, bias, impl):
    for dtype in (torch.float64, torch.float32):
        check(reconstruction(norm=NORMS[norm], training=training, bias=bias), impl, dtype)


@pytest.mark.parametrize("bias", ((True, False), (False, True)))
def test_one_bias_of_two(bias, impl):
    decoder = make_decoder(5, 7)
    decoder[0].bias, decoder[3].bias = (
        layer.bias if b else None for layer, b in zip((decoder[0], decoder[3]), bias, strict=True)
    )
    case = reconstruction()
    plain = copy.deepcopy(decoder)
    features, image = case.tensors["features"], case.tensors["image"]
    ours = reconstruction_loss(features, image, decoder, impl=impl)
    for found, d in ((ours, decoder), (plain_reconstruction(features, image, plain), plain)):
        found.backward()
        assert all(p.grad is not None for p in d.parameters())
    for (name, p), q in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        scale = plain[0].weight.grad.abs().max().item() if name == "0.bias" else None
        compare.assert_close(p.grad, q.grad, scale=scale, what=name)


def test_a_normalised_image_is_restored_and_clamped(impl):
    """Restored values outside [0, 1] come from rounding or noise and count as 0 and 1."""
    case = reconstruction()
    decoder, features = make_decoder(5, 7), case.tensors["features"]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    wild = 2 * case.tensors["image"] - 0.5
    loss = reconstruction_loss(
        features, (wild - mean) / std, decoder, image_mean=MEAN, image_std=STD, impl=impl
    )
    compare.assert_close(
        loss, reconstruction_loss(features, wild.clamp(0, 1), decoder, impl="reference"), what="loss"
    )


@pytest.mark.parametrize("form", (reconstruction, op_cases.chain))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_an_image_outside_the_unit_range(form, loss, dtype, impl):
    """Rounding is clamped, a wrong unit raises, nan gives nan."""
    case, normal = form(loss=loss), form(loss=loss, image_mean=MEAN, image_std=STD)

    def call(image, of=case):
        return of.function(impl)(of.inputs(dtype) | {"image": image.to(dtype)})

    image = case.tensors["image"]
    edges = torch.where(image < 0.1, 0.0, torch.where(image > 0.9, 1.0, image))
    over = torch.where(image < 0.1, -1 / 520, torch.where(image > 0.9, 1 + 1 / 520, image))
    if dtype != torch.bfloat16:  # it has no such numbers
        compare.assert_same(call(over).detach(), call(edges).detach(), "loss")
    hint = "pass image_mean and image_std for a normalised image"
    for wrong in (255 * image, (image - 0.5) / 0.25, torch.where(image < 0.1, -1 / 256, image)):
        low, high = wrong.to(dtype).min().item(), wrong.to(dtype).max().item()
        with pytest.raises(ValueError, match=f"^reconstruction_loss: image: .*{hint}$") as raised:
            call(wrong)
        found = [float(n) for n in re.search(r"got (\S+) to (\S+):", str(raised.value)).groups()]
        assert found == pytest.approx([low, high], rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match=r"reconstruction_loss: image \* image_std \+ image_mean: expected"):
        call(255 * image, normal)
    image = image.clone()
    image[0, 1, 2, 3] = torch.nan
    assert call(image).isnan() and call(image, normal).isnan()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_large_logits(impl, dtype):
    """The logits give an exact cross entropy where a sigmoid rounds to 0 or 1; nn.BCELoss stops at 100."""
    case = reconstruction(N=4, C=16, h=8, w=8, H=16, W=16, K=12)
    tensors = case.inputs(dtype)
    with torch.no_grad():
        tensors["decoder.3.weight"] *= 1000
    exact = op_cases.widened(tensors)
    wanted = reconstruction(N=4, C=16, h=8, w=8, H=16, W=16, K=12).function("reference")(exact)
    assert wanted > 100
    found = case.function(impl)(tensors)
    compare.assert_close(found, wanted.double(), what="loss")
    ours, expected = op_cases.gradients(found, tensors), op_cases.gradients(wanted, exact)
    for name in case.differentiable:
        scale = expected[case.zero.get(name, name)].abs().max().item()
        compare.assert_close(ours[name], expected[name], scale=scale, what=name)


@pytest.mark.parametrize("offset", (0.0, 30.0, 1000.0))
def test_batch_statistics_of_a_shifted_channel(offset, impl):
    """A mean far larger than the spread: sums of squares would lose it."""
    half_a_unit = offset / 16  # of z, in units of the floor, which is 8 of the last place
    case = reconstruction(N=8, C=16, h=8, w=8, H=32, W=32, K=12, magnified=1 + half_a_unit)
    case.tensors["decoder.0.bias"].add_(offset)
    check(case, impl, torch.float64)
    if impl != "reference":  # in float32 it takes the other side of some ReLU here, as plain torch does
        check(case, impl, torch.float32)


def test_a_channel_that_never_varies(impl):
    """Variance 0: backward divides by sqrt(eps); nothing is infinite."""
    case = reconstruction(K=7)
    case.tensors["decoder.0.weight"][2] = 0
    for dtype in (torch.float64, torch.float32):
        check(case, impl, dtype)


def test_dead_relu(impl):
    case = reconstruction(K=7)
    case.tensors["decoder.1.bias"][:] = -100
    check(case, impl, torch.float64)
    inputs = case.inputs(torch.float32)
    found = op_cases.gradients(case.function(impl)(inputs), inputs)
    assert (
        not found["features"].any() and not found["decoder.3.weight"].any() and found["decoder.3.bias"].any()
    )


def test_image_in_another_dtype(impl):
    """A bfloat16 image is exact in 8 bits or not; either way its values are the target."""
    case = reconstruction()
    inputs = case.inputs(torch.float32)
    inputs["image"] = inputs["image"].bfloat16()
    widened = case.inputs(torch.float32) | {"image": inputs["image"].float()}
    compare.assert_same(case.function(impl)(inputs).detach(), case.function(impl)(widened).detach(), "loss")


def test_gradient_of_the_image_comes_from_the_reference_alone(impl):
    case = reconstruction()
    inputs = case.inputs(grad=("image", "features"))
    if impl == "cpu":
        with pytest.raises(
            ValueError, match="reconstruction_loss: impl='cpu' cannot run this call: image requires grad"
        ):
            case.function(impl)(inputs)
        impl = "auto"
    exact = case.inputs(grad=("image", "features"))
    expected = op_cases.gradients(case.plain(exact), exact)
    for name, grad in op_cases.gradients(case.function(impl)(inputs), inputs).items():
        compare.assert_close(grad, expected[name], what=name)


# ------------------------------------------------------------------------------------------------------------
# Running statistics


def statistics(decoder) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in decoder[1].named_buffers()}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_move_as_in_the_layers_own_forward(norm, dtype, impl):
    ours = make_decoder(5, 7, **NORMS[norm]).to(dtype)
    exact, plain = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    for step in range(3):
        case = reconstruction(N=2 + step, H=9 + step).inputs(dtype, grad=())
        features, image = case["features"], case["image"]
        reconstruction_loss(features.requires_grad_(), image, ours, impl=impl).backward()
        plain_reconstruction(features, image, plain)
        plain_reconstruction(features.double(), image.double(), exact)
        found, expected = statistics(ours), statistics(exact)
        assert found.keys() == expected.keys()
        for name, t in found.items():
            if name == "num_batches_tracked":
                assert t == expected[name] == step + 1
            else:
                compare.assert_accurate(t, statistics(plain)[name], expected[name], what=name)


def test_running_statistics_move_once_and_without_grad(impl):
    decoder, case = make_decoder(5, 7), reconstruction()
    features, image = case.tensors["features"], case.tensors["image"]
    expected = copy.deepcopy(decoder)
    plain_reconstruction(features, image, expected)
    with torch.no_grad():
        reconstruction_loss(features, image, decoder, impl=impl)
    for name, t in statistics(decoder).items():
        compare.assert_close(t.double(), statistics(expected)[name].double(), what=name)


@pytest.mark.parametrize("why", ("eval", "empty batch", "refused"))
def test_running_statistics_stay(why, impl):
    decoder, case = make_decoder(5, 7), reconstruction()
    before = statistics(decoder)
    features, image = case.tensors["features"], case.tensors["image"]
    if why == "eval":
        reconstruction_loss(features.clone().requires_grad_(), image, decoder.eval(), impl=impl).backward()
    elif why == "empty batch":
        reconstruction_loss(features[:0], image[:0], decoder, impl=impl)
    else:
        with pytest.raises(ValueError):
            reconstruction_loss(features, image[:, :2], decoder, impl=impl)
    for name, t in statistics(decoder).items():
        compare.assert_same(t, before[name], name)


def test_statistics_kept_in_float32_beside_low_precision_weights(impl):
    case = reconstruction().inputs(torch.bfloat16, grad=())
    decoder = make_decoder(5, 7).bfloat16()
    decoder[1].float()
    exact = copy.deepcopy(decoder).double()
    loss = reconstruction_loss(case["features"].requires_grad_(), case["image"], decoder, impl=impl)
    loss.backward()
    expected = plain_reconstruction(case["features"].double(), case["image"].double(), exact)
    compare.assert_close(loss, expected.double(), what="loss")
    for name in ("running_mean", "running_var"):
        compare.assert_close(statistics(decoder)[name], statistics(exact)[name], what=name)


# ------------------------------------------------------------------------------------------------------------
# Any shape, any layout, any dtype


@st.composite
def any_case(draw):
    size = st.integers(1, 9)
    N, C, K = draw(st.integers(1, 4)), draw(st.integers(1, 18)), draw(st.integers(1, 18))
    h, w, H, W = draw(size), draw(size), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    training = draw(st.booleans()) and N * H * W > 1
    options = dict(
        interpolate_mode=draw(st.sampled_from(("bilinear", "nearest"))),
        loss=draw(st.sampled_from(("bce", "mse", "l1"))),
    )
    restore = dict(image_mean=MEAN, image_std=STD) if draw(st.booleans()) else {}
    case = reconstruction(
        N, C, h, w, H, W, K, bias=draw(st.booleans()), training=training, **options, **restore
    )
    layouts = {k: draw(st.sampled_from(("contiguous", *op_cases.LAYOUTS))) for k in case.tensors}
    return case, layouts, draw(st.sampled_from((torch.float64, torch.float32)))


@given(any_case())
def test_any_case(impl, drawn):
    case, layouts, dtype = drawn
    check(case, impl, dtype, {k: op_cases.relayout(t, layouts[k])[0] for k, t in case.inputs(dtype).items()})


# ------------------------------------------------------------------------------------------------------------
# Messages


def sequential(**swap) -> nn.Sequential:
    """Return Conv2d 5 to 7, BatchNorm2d, ReLU, Conv2d 7 to 3, Sigmoid, with layers replaced by ``swap``."""
    conv1, conv2 = nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)
    return nn.Sequential(
        *(
            dict(conv1=conv1, norm=nn.BatchNorm2d(7), relu=nn.ReLU(), conv2=conv2, out=nn.Sigmoid()) | swap
        ).values()
    )


features, image = torch.zeros(2, 5, 4, 4), torch.zeros(2, 3, 8, 8)
KEEPS = "expected a 1x1 or 3x3 convolution, stride 1, with the zero padding that keeps the size"
CONV1 = f"decoder[0]: {KEEPS}, got Conv2d(5, "
CONV2 = "decoder[3]: expected a 3x3 convolution to 3 channels, stride 1, zero padding 1, got Conv2d(7, 3"
grouped = dict(
    conv1=nn.Conv2d(5, 5, 3, padding=1, groups=5), norm=nn.BatchNorm2d(5), conv2=nn.Conv2d(5, 3, 3, padding=1)
)
MESSAGES = [
    (dict(features=[1.0]), TypeError, "features: expected a floating-point tensor, got list"),
    (dict(features=features.long()), TypeError,
     "features: expected a floating-point tensor, got torch.int64"),
    (dict(image=image.byte()), TypeError, "image: expected a floating-point tensor, got torch.uint8"),
    (dict(features=features[:, :4]), ValueError, "features: expected (N, 5, h, w), got (2, 4, 4, 4)"),
    (dict(features=features[0]), ValueError, "features: expected (N, 5, h, w), got (5, 4, 4)"),
    (dict(image=image[:, :1]), ValueError, "image: expected (2, 3, H, W), got (2, 1, 8, 8)"),
    (dict(image=image[:1]), ValueError, "image: expected (2, 3, H, W), got (1, 3, 8, 8)"),
    (dict(features=features[..., :0]), ValueError,
     "expected maps of at least 1x1, got features (2, 5, 4, 0), image (2, 3, 8, 8)"),
    (dict(interpolate_mode="bicubic"), ValueError,
     "interpolate_mode: expected one of ('bilinear', 'nearest'), got 'bicubic'"),
    (dict(loss="huber"), ValueError, "loss: expected one of ('bce', 'mse', 'l1'), got 'huber'"),
    (dict(image_mean=MEAN), ValueError, f"image_mean, image_std: expected both or neither, got {MEAN}, None"),
    (dict(image_mean=MEAN, image_std=STD[:2]), ValueError, "image_std: expected 3 numbers, got (0.25, 0.24)"),
    (dict(decoder=nn.Conv2d(5, 3, 3)), ValueError,
     "decoder: expected nn.Sequential of any number of (Conv2d 1x1 or 3x3, BatchNorm2d or SyncBatchNorm, "
     "ReLU, and an Upsample or none), then Conv2d 3x3 to 3 channels, Sigmoid, got Conv2d"),
    (dict(decoder=sequential(relu=nn.GELU())), ValueError, "decoder[2]: expected ReLU, got GELU("),
    (dict(decoder=sequential(conv1=nn.Conv2d(5, 7, 3, 2, 1))), ValueError, CONV1),
    (dict(decoder=sequential(conv1=nn.Conv2d(5, 7, 3, padding=1, dilation=2))), ValueError, CONV1),
    (dict(decoder=sequential(**grouped)), ValueError, CONV1),
    (dict(decoder=sequential(conv2=nn.Conv2d(7, 3, 3))), ValueError, CONV2),
    (dict(decoder=sequential(conv2=nn.Conv2d(7, 3, 3, padding=1, padding_mode="reflect"))), ValueError,
     CONV2),
    (dict(decoder=sequential(norm=nn.BatchNorm2d(6))), ValueError,
     "decoder[1]: expected 7 features, as decoder[0] gives, got BatchNorm2d(6"),
    (dict(features=features[:1], image=image[:1, :, :1, :1]), ValueError,
     "image: expected more than 1 value per channel when training, got (1, 7, 1, 1) in front of "
     "BatchNorm2d(7"),
    (dict(impl="liger"), ValueError,
     "impl: expected one of ('auto', 'reference', 'cpu', 'triton', 'cuda'), got 'liger'"),
]


@pytest.mark.parametrize("wrong, kind, words", MESSAGES, ids=[words[:40] for _, _, words in MESSAGES])
def test_messages(wrong, kind, words):
    with pytest.raises(kind, match="^reconstruction_loss: .*" + re.escape(words)):
        reconstruction_loss(**(dict(features=features, image=image, decoder=sequential()) | wrong))


def test_a_named_impl_runs_or_raises(impl):
    decoder, features, image = (
        sequential().to("meta"), torch.zeros(2, 5, 4, 4, device="meta"),
        torch.zeros(2, 3, 8, 8, device="meta"),
    )
    if impl == "cpu":
        with pytest.raises(
            ValueError, match="reconstruction_loss: impl='cpu' cannot run this call: features is on meta"
        ):
            reconstruction_loss(features, image, decoder, impl="cpu")
    assert reconstruction_loss(features, image, decoder, impl="reference").shape == ()
    with pytest.raises(
        ValueError, match="reconstruction_loss: image: expected on meta like features, got cpu"
    ):
        reconstruction_loss(features, image.new_zeros(image.shape, device="cpu"), decoder, impl=impl)
    with pytest.raises(
        ValueError, match="reconstruction_loss: decoder.0.weight: expected on meta like features, got cpu"
    ):
        reconstruction_loss(features, image, sequential(), impl=impl)


def test_same_padding_is_taken(impl):
    decoder = sequential(conv1=nn.Conv2d(5, 7, 3, padding="same"), relu=nn.ReLU(inplace=True))
    x = torch.randn(2, 5, 4, 4)
    plain = plain_reconstruction(x, image, copy.deepcopy(decoder))
    exact = plain_reconstruction(x.double(), image.double(), copy.deepcopy(decoder).double())
    compare.assert_accurate(reconstruction_loss(x, image, decoder, impl=impl), plain, exact, what="loss")


def test_layers_that_would_not_run_are_refused(impl):
    """The op runs its own arithmetic, so a user's forward or hook would not run."""

    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    h, image = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 8, 8)
    decoder = make_decoder(4, 5).float()
    decoder[1].register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError,
        match=r"reconstruction_loss: decoder\[1\]: expected a BatchNorm2d whose call runs nothing.*hooks",
    ):
        reconstruction_loss(h, image, decoder, impl=impl)
    decoder = make_decoder(4, 5).float()
    decoder[0] = Doubled(4, 5, 3, padding=1)
    with pytest.raises(
        ValueError, match=r"decoder\[0\]: expected a Conv2d whose call runs nothing .*Doubled is not Conv2d"
    ):
        reconstruction_loss(h, image, decoder, impl=impl)
