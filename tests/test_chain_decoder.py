"""`reconstruction_loss` with chain decoders: the authors' values, every form, statistics, messages."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infopro_fast.ops import reconstruction_loss
from tests import compare, golden, op_cases
from tests.op_cases import chain, check, doubled, make_chain, plain_reconstruction

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def resized(*size: int, mode: str = "bilinear", align_corners: bool = True) -> nn.Upsample:
    return nn.Upsample(size, mode=mode, align_corners=align_corners if mode == "bilinear" else None)


def scaled(
    *factor: float, mode: str = "bilinear", align_corners: bool = True, recompute: bool | None = None
) -> nn.Upsample:
    align_corners = align_corners if mode == "bilinear" else None
    return nn.Upsample(
        scale_factor=factor, mode=mode, align_corners=align_corners, recompute_scale_factor=recompute
    )


# ------------------------------------------------------------------------------------------------------------
# The authors' code


def released_decoder(case, dtype) -> nn.Sequential:
    ups = (
        [doubled() for _ in range(3)]
        if isinstance(case["sizes"], str)
        else [resized(*size) for size in case["sizes"]]
    )
    decoder = make_chain(case["channels"], ((None, 1, 128), (ups[0], 3, 32), (ups[1], 3, 12)), ups[2])
    golden.fill_parameters(decoder.state_dict())
    return decoder.to(dtype)


def assert_released(case, impl, dtype):
    decoder = released_decoder(case, dtype)
    features = golden.features(case["batch"], case["channels"], *case["h_size"]).to(dtype).requires_grad_()
    image = golden.image(case["batch"], *(8 * n for n in case["h_size"])).to(dtype)
    loss = reconstruction_loss(features, image, decoder, impl=impl)
    loss.backward()
    compare.assert_golden("loss", loss, case["loss"], dtype)
    compare.assert_golden("h", features.grad, case["grad_h"], dtype)
    parameters, buffers = dict(decoder.named_parameters()), dict(decoder.named_buffers())
    assert parameters.keys() == case["grads"].keys()
    for name, expected in case["grads"].items():
        compare.assert_golden(name, parameters[name].grad, expected, dtype)
    for name, expected in case["buffers"].items():
        compare.assert_golden(name, buffers[name], expected, dtype)


GOLDEN = golden.cases("chain_decoder")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
def test_released_values(case, impl, dtype):
    assert_released(case, impl, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
def test_released_values_on_every_instruction_set(case, isa, dtype):
    assert_released(case, "cpu", dtype)


# ------------------------------------------------------------------------------------------------------------
# Forms

FORMS = {
    "the last convolution alone": dict(stages=(), last=doubled()),
    "no Upsample, features resized first": dict(stages=((None, 1, 6), (None, 3, 4)), size=(9, 11)),
    "no Upsample, 1x1 first, same size": dict(stages=((None, 1, 6),), size=(4, 3)),
    "no Upsample, nearest": dict(
        stages=((None, 3, 6), (None, 1, 4)), size=(9, 11), interpolate_mode="nearest"
    ),
    "Upsample first": dict(stages=((doubled(), 3, 6), (None, 3, 4)), last=resized(9, 7)),
    "1x1 resized": dict(stages=((doubled(), 1, 6), (resized(13, 5), 1, 4))),
    "nearest": dict(stages=((None, 1, 6), (doubled("nearest"), 3, 4)), last=resized(11, 19, mode="nearest")),
    "corners not aligned": dict(
        stages=((None, 1, 6), (doubled(align_corners=False), 3, 4)), last=resized(11, 19, align_corners=False)
    ),
    "factors of no whole size": dict(
        stages=((scaled(1.7, 2.4, align_corners=False), 3, 6),), last=scaled(2.3, 1.6, align_corners=False)
    ),
    "factors of no whole size, nearest": dict(
        stages=((scaled(1.7, 2.4, mode="nearest"), 3, 6),), last=scaled(2.3, 1.6, mode="nearest")
    ),
    "factor recomputed": dict(stages=((scaled(1.7, 2.4, align_corners=False, recompute=True), 3, 6),)),
    "a factor that keeps the size": dict(h=3, w=3, stages=((scaled(1.3, 1.3, align_corners=False), 3, 6),)),
    "shrinks": dict(
        h=9, w=8, stages=((resized(4, 3), 3, 6), (resized(2, 7, mode="nearest"), 1, 4)), last=resized(5, 5)
    ),
    "one row, one column": dict(h=1, w=1, stages=((None, 1, 6), (resized(1, 5), 3, 4)), last=resized(3, 1)),
    "wide": dict(C=3, h=2, w=41, stages=((None, 3, 2), (doubled(), 3, 5))),
    "four stages": dict(stages=((None, 1, 9), (doubled(), 3, 7), (None, 3, 5), (doubled(), 3, 4))),
    "many channels": dict(N=2, C=130, h=5, w=6, stages=((None, 1, 67), (doubled(), 3, 33))),
    "no bias": dict(bias=False),
    "eval": dict(training=False),
    "eval without running statistics": dict(training=False, norm=dict(track_running_stats=False)),
    "not affine": dict(norm=dict(affine=False)),
    "SyncBatchNorm, alone": dict(norm=dict(norm=nn.SyncBatchNorm)),
    "SyncBatchNorm, eval": dict(norm=dict(norm=nn.SyncBatchNorm), training=False),
    "mse": dict(loss="mse"),
    "l1, restored": dict(loss="l1", image_mean=MEAN, image_std=STD),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, impl, dtype):
    check(chain(**FORMS[form]), impl, dtype)


@pytest.mark.parametrize("form", ("four stages", "shrinks", "wide", "corners not aligned"))
def test_forms_on_every_instruction_set(form, isa):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(chain(**FORMS[form]), "cpu", dtype)


@st.composite
def any_case(draw):
    size, channels = st.integers(1, 9), st.integers(1, 20)
    mode, larger = st.sampled_from(("bilinear", "nearest")), st.integers(1, 19)
    upsample = st.one_of(
        st.none(),
        st.builds(resized, larger, larger, mode=mode, align_corners=st.booleans()),
        st.builds(doubled, mode, st.booleans()),
    )
    stages = draw(st.lists(st.tuples(upsample, st.sampled_from((1, 3)), channels), max_size=3))
    N, C, h, w = draw(st.integers(2, 4)), draw(channels), draw(size), draw(size)
    options = dict(loss=draw(st.sampled_from(("bce", "mse", "l1")))) | (
        dict(image_mean=MEAN, image_std=STD) if draw(st.booleans()) else {}
    )
    last = draw(upsample)
    alone = last is None and all(stage[0] is None for stage in stages)
    options |= dict(size=(draw(size), draw(size))) if alone else dict(last=last or scaled(1.0, 1.0))
    return chain(N, C, h, w, stages, bias=draw(st.booleans()), training=draw(st.booleans()), **options)


@settings(max_examples=60)
@given(any_case(), st.sampled_from(("contiguous", *op_cases.LAYOUTS)))
def test_any_case(cpu, case, layout):
    """Gradients in float64: in float32, tiny maps and several batch norms make plain torch's error random."""
    inputs = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs().items()}
    exact = op_cases.widened(inputs)
    loss, wanted = case.function(cpu)(inputs), case.plain(exact)
    compare.assert_close(loss, wanted, what="loss")
    expected = op_cases.gradients(wanted, exact)
    # With batch norms one behind the other, a value that never varies is divided by sqrt(eps): what reaches
    # its inputs is rounding.
    largest = max(g.abs().max().item() for g in expected.values())
    for name, grad in op_cases.gradients(loss, inputs).items():
        compare.assert_close(grad, expected[name], scale=largest, what=name)


@pytest.mark.parametrize("N", (1, 2, 3))
@pytest.mark.fast(1)
def test_few_samples_are_shared_out_by_rows(N, cpu, threads):
    """Any number of bands of rows meet without a seam; a large map has several anyway."""
    for h, w, stages in (
        (67, 5, ((None, 1, 6), (doubled(), 3, 4))), (40, 300, ((None, 3, 4), (doubled(), 3, 16)))
    ):
        case = chain(N=N, C=4, h=h, w=w, stages=stages)
        exact = case.inputs()
        wanted = case.plain(exact)
        expected = op_cases.gradients(wanted, exact)
        for n in (1, 3, 5):
            threads(n)
            inputs = case.inputs()
            loss = case.function(cpu)(inputs)
            compare.assert_close(loss, wanted, what="loss")
            for name, grad in op_cases.gradients(loss, inputs).items():
                scale = expected[case.zero.get(name, name)].abs().max().item()
                compare.assert_close(grad, expected[name], scale=scale, what=f"{name}, {n} threads")


def test_a_layer_in_two_places(impl):
    """One ReLU and one Upsample object serve all stages, as in users' code."""
    relu, up = nn.ReLU(inplace=True), doubled()
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), relu, up,
        nn.Conv2d(6, 4, 3, padding="same"), nn.BatchNorm2d(4), relu, up,
        nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid(),
    ).double()
    features, image = (
        torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.rand(2, 3, 12, 16, dtype=torch.float64)
    )
    wanted = plain_reconstruction(features, image, copy.deepcopy(decoder))
    compare.assert_close(reconstruction_loss(features, image, decoder, impl=impl), wanted, what="loss")


def test_large_logits(impl):
    case = chain()
    case.tensors["decoder.8.weight"] *= 1000
    exact = case.inputs()
    wanted = case.function("reference")(exact)
    assert wanted > 30
    for dtype in (torch.float64, torch.float32):
        compare.assert_close(case.function(impl)(case.inputs(dtype)), wanted, dtype=dtype, what="loss")


def test_a_shifted_channel(impl):
    """A mean far larger than the spread needs stable statistics."""
    case = chain(N=4, h=8, w=8, magnified=64.0)
    case.tensors["decoder.0.bias"].add_(1000.0)
    check(case, impl, torch.float64)
    if impl == "cpu":
        check(case, impl, torch.float32)


# ------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("momentum", (0.1, None))
def test_running_statistics_move_as_in_the_layers_own_forward(momentum, impl):
    ours = make_chain(5, ((None, 1, 7), (doubled(), 3, 4)), doubled(), momentum=momentum)
    plain = copy.deepcopy(ours)
    for step in range(3):
        features = torch.randn(2 + step, 5, 3, 4, dtype=torch.float64, requires_grad=True)
        image = torch.rand(2 + step, 3, 12, 16, dtype=torch.float64)
        reconstruction_loss(features, image, ours, impl=impl).backward()
        plain_reconstruction(features.detach(), image, plain)
        for (name, found), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
            compare.assert_close(found.double(), expected.double(), what=name)
    before = {k: t.clone() for k, t in ours.named_buffers()}
    reconstruction_loss(features, image, ours.eval(), impl=impl).backward()
    reconstruction_loss(features[:0], image[:0], ours.train(), impl=impl)
    for name, t in ours.named_buffers():
        compare.assert_same(t, before[name], name)


def synced_step(
    rank: int, sizes: tuple[int, ...], impl: str, dtype: torch.dtype, store: str, folder: str
) -> None:
    """Run one process of a data-parallel step; write its loss, gradients and statistics to ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    torch.set_num_threads(1)
    if impl == "triton":
        from tests.interpreted import interpreter

        interpreter.quicken()
    decoder, features, image = (t.to(dtype) for t in synced_inputs(sum(sizes)))
    first = sum(sizes[:rank])
    own = features[first : first + sizes[rank]].clone().requires_grad_()
    loss = reconstruction_loss(own, image[first : first + sizes[rank]], decoder, impl=impl)
    loss.backward()
    found = {"loss": loss.detach(), "features": own.grad} | {k: p.grad for k, p in decoder.named_parameters()}
    torch.save(found | {f"buffer {k}": b for k, b in decoder.named_buffers()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def synced_inputs(N: int):
    """Return decoder, features and image in float64, with values that float32 holds."""
    decoder = make_chain(5, ((None, 1, 7), (doubled(), 3, 4)), doubled(), norm=nn.SyncBatchNorm)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(N, 5, 3, 4, generator=generator)
    return decoder.float().double(), features.double(), torch.rand(N, 3, 12, 16, generator=generator).double()


@pytest.mark.parametrize("sizes", ((2, 3), (4, 0)), ids=str)
@pytest.mark.fast(1)
def test_sync_batch_norm_takes_the_statistics_of_all_processes(sizes, impl, tmp_path):
    """As one process with the whole batch would, for the sum of the losses. A batch may be empty."""
    assert_synced(sizes, impl, torch.float64, tmp_path)


def assert_synced(sizes: tuple[int, ...], impl: str, dtype: torch.dtype, folder) -> None:
    arguments = (sizes, impl, dtype, str(folder / "store"), str(folder))
    processes.start_processes(synced_step, arguments, nprocs=len(sizes), start_method="spawn")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(len(sizes))]
    decoder, features, image = synced_inputs(sum(sizes))
    features.requires_grad_()
    decoded = decoder(features)
    parts = list(zip(decoded.split(sizes), image.split(sizes), strict=True))
    losses = [nn.functional.binary_cross_entropy(x, y) if len(x) else x.sum() for x, y in parts]
    sum(losses).backward()
    for rank, part in enumerate(features.grad.split(sizes)):
        compare.assert_close(found[rank]["loss"], losses[rank], what="loss")
        compare.assert_close(
            found[rank]["features"], part, scale=features.grad.abs().max().item(), what="features"
        )
        for name, b in decoder.named_buffers():
            compare.assert_close(found[rank][f"buffer {name}"], b.double(), dtype=dtype, what=name)
    for name, p in decoder.named_parameters():
        total = sum(f[name] for f in found)
        compare.assert_close(
            total, p.grad, scale=max(p.grad.abs().max().item(), decoder[0].weight.grad.abs().max().item()),
            what=name,
        )


# ------------------------------------------------------------------------------------------------------------
# Messages


def layers(**swap) -> nn.Sequential:
    """Return conv1x1 5 to 7, BatchNorm2d, ReLU, Upsample, conv3x3 to 3, Sigmoid, with ``swap`` by place."""
    plain = [
        nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), doubled(), nn.Conv2d(7, 3, 3, padding=1),
        nn.Sigmoid(),
    ]
    return nn.Sequential(*(swap.get(f"at{i}", layer) for i, layer in enumerate(plain)))


features, image = torch.zeros(2, 5, 4, 4), torch.zeros(2, 3, 8, 8)
ONE_BY_ONE = (
    "expected a 1x1 or 3x3 convolution, stride 1, with the zero padding that keeps the size, got Conv2d("
)
MESSAGES = [
    (dict(decoder=nn.Sequential()), "decoder: expected nn.Sequential of any number of (Conv2d 1x1 or 3x3"),
    (dict(decoder=layers(at0=nn.Conv2d(5, 7, 1, padding=1))), "decoder[0]: " + ONE_BY_ONE),
    (dict(decoder=layers(at0=nn.Conv2d(5, 7, 5, padding=2))), "decoder[0]: " + ONE_BY_ONE),
    (dict(decoder=layers(at0=nn.ConvTranspose2d(5, 7, 1))),
     "decoder[0]: expected Conv2d, got ConvTranspose2d("),
    (dict(decoder=layers(at1=nn.GroupNorm(1, 7))),
     "decoder[1]: expected BatchNorm2d or SyncBatchNorm, got GroupNorm("),
    (dict(decoder=layers(at1=nn.BatchNorm2d(8))),
     "decoder[1]: expected 7 features, as decoder[0] gives, got BatchNorm2d(8"),
    (dict(decoder=layers(at2=nn.Dropout2d())), "decoder[2]: expected ReLU, got Dropout2d("),
    (dict(decoder=layers(at3=doubled("bicubic"))),
     "decoder[3]: expected mode 'bilinear' or 'nearest', got Upsample("),
    (dict(decoder=layers(at3=nn.PixelShuffle(2))), "decoder[3]: expected Conv2d, got PixelShuffle("),
    (dict(decoder=layers(at4=nn.Conv2d(6, 3, 3, padding=1))),
     "decoder[4]: expected 7 input channels, as the convolution before gives"),
    (dict(decoder=layers(at4=nn.Conv2d(7, 3, 1))),
     "decoder[4]: expected a 3x3 convolution to 3 channels, stride 1, zero padding 1, got"),
    (dict(decoder=layers(at4=nn.Conv2d(7, 4, 3, padding=1))),
     "decoder[4]: expected a 3x3 convolution to 3 channels, stride 1, zero pad"),
    (dict(decoder=layers(at5=nn.Tanh())), "decoder[5]: expected BatchNorm2d or SyncBatchNorm, got Tanh("),
    (dict(decoder=layers()[:3]), "decoder[3]: expected Conv2d, got the end"),
    (dict(image=image[..., :7]),
     "image: expected (2, 3, 8, 8), which the decoder makes of features (2, 5, 4, 4), got (2, 3, 8, 7)"),
    (dict(impl="triton"), "impl='triton' cannot run this call: "),
    (dict(features=features[:1, :, :1, :1], image=image[:1, :, :2, :2]),
     "image: expected more than 1 value per channel when training, got (1, 7, 1, 1) in front of "
     "BatchNorm2d(7"),
]


@pytest.mark.parametrize("wrong, words", MESSAGES, ids=[words[:50] for _, words in MESSAGES])
def test_messages(wrong, words):
    with pytest.raises(ValueError, match="^reconstruction_loss: .*" + re.escape(words)):
        reconstruction_loss(**(dict(features=features, image=image, decoder=layers()) | wrong))
