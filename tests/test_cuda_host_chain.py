"""The CUDA kernels of a chain decoder's stages without a GPU, in the manner of tests/test_cuda_host.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks import floors
from infopro_fast.ops import dispatch, reconstruction_loss, reconstruction_loss_layers
from tests import compare, op_cases, test_chain_decoder, test_contract, test_cuda_host
from tests.cuda_host import binding
from tests.op_cases import chain, doubled
from tests.test_chain_decoder import FORMS, GOLDEN, resized, scaled
from tests.test_cuda_host import MEAN, STD, broken, results
from tests.test_resize import SIZES, by_stage, by_torch

SMALL = binding.Device(2, 24 * 1024, 24 * 1024)  # images of several tiles, of which a block takes several
MIDDLE = binding.Device(2, 32 * 1024, 32 * 1024)  # of which stages in front of the last need more
SMALLER = ("shrinks", "one row, one column")
STAGES = ((None, 1, 7), (op_cases.ODD, 3, 4))  # of a case that names none


@pytest.fixture(scope="session")
def library(request, tmp_path_factory) -> str:
    if request.config.getoption("--reference-only"):
        pytest.skip("--reference-only")
    return binding.build(str(tmp_path_factory.mktemp("cuda_host") / "chain.so"), source="chain_host.cpp")


@pytest.fixture
def on_host(monkeypatch):
    """Return a function that makes impl="cuda" run an object's kernels, or else the CPU kernels."""
    monkeypatch.setattr(dispatch, "missing", lambda op, impl, device: None)
    registered = []

    def install(
        path: str, device: binding.Device = binding.TWO_BLOCKS, seed: int = 0
    ) -> binding.ChainKernels:
        if not registered:
            registered.append(binding.register())
        binding.current.chain = binding.ChainKernels(path, device, seed)
        return binding.current.chain

    yield install
    binding.current.chain = None
    if registered:
        registered[0]._destroy()


def alone(h=5, w=4, H=9, W=11, C=5, **options) -> op_cases.Case:
    """The last stage by itself, on features."""
    return chain(C=C, h=h, w=w, stages=(), last=resized(H, W), **options)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
def test_released_values(case, library, on_host):
    kernels = on_host(library)
    test_chain_decoder.assert_released(case, "cuda", torch.float32)
    # 1x1 and many channels are Triton's, 32 to 12 and the last are not.
    assert kernels.calls == ["stage_forward", "loss_forward", "loss_backward", "stage_backward"]


@pytest.mark.parametrize("form", [form for form in FORMS if form not in SMALLER])
def test_forms(form, library, on_host):
    kernels = on_host(library)
    op_cases.check(chain(**FORMS[form]), "cuda", torch.float32)
    own = sum(
        side == 3 and channels <= reconstruction_loss_layers.MOST_OUTPUTS
        for _, side, channels in FORMS[form].get("stages", STAGES)
    )
    assert (
        kernels.calls
        == ["stage_forward"] * own + ["loss_forward", "loss_backward"] + ["stage_backward"] * own
    )


LAST = {
    "factors of no whole size": (scaled(2.3, 1.6, align_corners=False), 7, 6),
    "factors of no whole size, nearest": (scaled(2.3, 1.6, mode="nearest"), 7, 6),
    "a factor that keeps the size": (scaled(1.3, 1.3, align_corners=False), 3, 3),
    "doubled": (doubled(), 19, 17),
    "doubled, nearest": (doubled("nearest"), 19, 17),
    "doubled, corners not aligned": (doubled(align_corners=False), 19, 17),
    "one pixel": (resized(1, 1), 1, 1),
    "of one pixel": (resized(7, 16), 1, 1),
    "16 times": (resized(48, 32), 3, 2),
    "16 times, nearest": (resized(48, 32, mode="nearest"), 3, 2),
    "16 times, corners not aligned": (resized(48, 32, align_corners=False), 3, 2),
    "one axis alone": (resized(13, 9), 13, 4),
    "the other axis alone": (resized(31, 9), 13, 9),
    "one row": (resized(1, 21), 1, 13),
    "one column": (resized(21, 1), 13, 1),
}


@pytest.mark.parametrize("device", (binding.TWO_BLOCKS, SMALL), ids=("a tile", "several tiles"))
@pytest.mark.parametrize("name", LAST)
def test_resizes_of_the_last_stage(name, device, library, on_host):
    last, h, w = LAST[name]
    on_host(library, device, seed=2)
    op_cases.check(chain(N=2, C=3, h=h, w=w, stages=(), last=last), "cuda", torch.float32)


@pytest.mark.parametrize("device", (binding.TWO_BLOCKS, MIDDLE), ids=("a tile", "several tiles"))
@pytest.mark.parametrize("name", LAST)
@pytest.mark.fast(10)
def test_resizes_of_a_stage(name, device, library, on_host):
    last, h, w = LAST[name]
    on_host(library, device, seed=2)
    op_cases.check(
        chain(N=2, C=3, h=h, w=w, stages=((last, 3, 4),), last=scaled(1.0, 1.0)), "cuda", torch.float32
    )


@pytest.mark.parametrize("mode", range(3))
def test_a_resize_samples_where_torch_does(mode, library, on_host):
    on_host(library)
    stage = torch.ops.infopro_fast.chain_stage_forward_cuda.default
    for n_in, n_out in (size for size in SIZES if size[0] <= size[1] <= 16 * size[0]):
        wanted = by_torch(n_in, n_out, mode)
        compare.assert_close(by_stage(stage, n_in, n_out, mode), wanted, what=f"{n_in} to {n_out}")


@pytest.mark.parametrize("C, K", ((1, 1), (5, 2), (12, 3), (13, 12), (64, 7), (3, 16)))
def test_channels_of_a_stage(C, K, library, on_host):
    kernels = on_host(library)
    op_cases.check(chain(N=2, C=C, stages=((doubled(), 3, K),)), "cuda", torch.float32)
    op_cases.check(chain(N=2, C=3, stages=((None, 1, C), (doubled("nearest"), 3, K))), "cuda", torch.float32)
    assert kernels.calls.count("stage_backward") == 2


@pytest.mark.parametrize("C", (1, 4, 12, 13, 26, 64))
def test_channels(C, library, on_host):
    """Those that are loaded, and those whose gradients are found, together: fewer, as many, and more."""
    on_host(library)
    op_cases.check(chain(N=2, C=3, stages=((None, 1, C),)), "cuda", torch.float32)
    op_cases.check(alone(C=C), "cuda", torch.float32)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("restored", (False, True))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
def test_losses(loss, restored, training, library, on_host):
    on_host(library)
    restore = dict(image_mean=MEAN, image_std=STD) if restored else {}
    op_cases.check(chain(loss=loss, training=training, **restore), "cuda", torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", ("the last convolution alone", "no bias", "nearest", "Upsample first"))
def test_half_precision(form, dtype, library, on_host):
    on_host(library)
    op_cases.check(chain(**FORMS[form]), "cuda", dtype)


def test_features_of_16_bits_and_parameters_of_32(library, on_host):
    """Autocast gives such calls."""
    on_host(library)
    for case in (chain(), alone()):
        inputs = case.inputs(torch.float32)
        inputs["features"] = inputs["features"].detach().bfloat16().requires_grad_()
        exact = op_cases.widened(inputs)
        found, wanted = (
            op_cases.gradients(case.function("cuda")(inputs), inputs),
            op_cases.gradients(case.plain(exact), exact),
        )
        for name, g in found.items():
            assert g.dtype == inputs[name].dtype
            scale = wanted[case.zero.get(name, name)].abs().max().item()
            compare.assert_close(g, wanted[name], scale=scale, what=name)


@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
def test_layouts(layout, library, on_host):
    on_host(library)
    for case in (alone(), chain(stages=((None, 1, 6),))):
        inputs = {name: op_cases.relayout(t, layout)[0] for name, t in case.inputs(torch.float32).items()}
        op_cases.check(case, "cuda", torch.float32, inputs)


def test_a_shifted_channel(library, on_host):
    """A mean far larger than the spread: the statistics have to be stable."""
    on_host(library, MIDDLE)
    x, weight, bias = (
        torch.randn(4, 5, 8, 8), torch.randn(4, 5, 3, 3) / 7, torch.tensor([1000.0, -1000.0, 0.0, 30.0]),
    )
    z, statistics = torch.ops.infopro_fast.chain_stage_forward_cuda(
        x, None, None, None, None, 0.0, weight, bias, 16, 16, 0, [], False
    )
    var, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert (mean / var.sqrt()).abs().max() > 1000
    size = torch.maximum(mean.abs(), var.sqrt())
    assert ((statistics[0] - mean) / size).abs().max() < 1e-7 and (
        (statistics[1] - var) / var
    ).abs().max() < 1e-6


def test_a_scale_of_zero(library, on_host):
    """gamma = 0 in a channel: at beta = 0 no gradient passes the ReLU."""
    on_host(library)
    case = chain(stages=((None, 1, 7),))
    case.tensors["decoder.1.weight"][:3] = 0
    case.tensors["decoder.1.bias"][:3] = torch.tensor([0.0, 0.7, -0.7], dtype=torch.float64)
    op_cases.check(case, "cuda", torch.float32)


@pytest.mark.parametrize("at", ("features", "image"))
def test_nan_stays_nan(at, library, on_host):
    on_host(library)
    case = chain(training=False)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs[at][0, 0, 0, 0] = torch.nan
    assert case.function("cuda")(inputs).isnan()


@pytest.mark.parametrize("N", (0, 1))
def test_few_samples(N, library, on_host):
    on_host(library)
    case = chain(N=N, training=False)
    inputs = case.inputs(torch.float32)
    found = op_cases.gradients(case.function("cuda")(inputs), inputs)
    assert all(torch.isfinite(t).all() for t in found.values()) and (
        N > 0 or not any(t.any() for t in found.values())
    )


SOME = (("features",), ("decoder.7.weight",), ("decoder.7.bias",), ("decoder.0.weight", "decoder.4.bias"), ())


@pytest.mark.parametrize("wanted", SOME, ids=str)
def test_gradients_that_are_not_asked_for(wanted, library, on_host):
    on_host(library)
    case = chain(stages=((None, 1, 7), (None, 3, 4)))
    everything, some = case.inputs(torch.float32), case.inputs(torch.float32, wanted)
    expected, loss = case.function("cuda")(everything), case.function("cuda")(some)
    compare.assert_same(loss.detach(), expected.detach(), "loss")
    if wanted:
        full, part = op_cases.gradients(expected, everything), op_cases.gradients(loss, some)
        for name in wanted:
            compare.assert_same(part[name], full[name], name)


ORDERED = {
    "doubled": chain(), "alone": alone(), "many channels": chain(N=2, stages=((None, 1, 30),)),
    "stages": chain(
        N=2, C=13, h=6, w=5, stages=((doubled(), 3, 5), (doubled(), 3, 4)), last=scaled(1.0, 1.0),
    ),
}


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("device", (binding.TWO_BLOCKS, MIDDLE), ids=("a tile", "several tiles"))
def test_the_order_of_warps_changes_no_bit(name, device, library, on_host):
    on_host(library, device, seed=0)
    expected = results(ORDERED[name])
    for seed in (1, 2, 3):
        on_host(library, device, seed=seed)
        for what, found in results(ORDERED[name]).items():
            compare.assert_same(found, expected[what], f"{what}, seed {seed}")


def test_opcheck(library, on_host):
    on_host(library)
    calls = test_contract.raw_calls("reconstruction_loss, chain", torch.float32, "cuda")
    own = {
        overload.overloadpacket.__name__: (overload, args)
        for overload, args in calls
        if "cuda" in overload.overloadpacket.__name__
    }
    assert set(own) == {
        f"chain_{op}_cuda" for op in ("stage_forward", "loss_forward", "loss_backward", "stage_backward")
    }
    for overload, args in own.values():
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("multiprocessors", (1, 3))
def test_tiles_of_a_block_add_up(multiprocessors, library, on_host):
    kernels = on_host(library, binding.Device(multiprocessors, 24 * 1024, 24 * 1024))
    for last, size in (
        (True, dict(C=4, h=20, w=15, H=40, W=30)),
        (False, dict(C=3, K=4, h=20, w=15, H=20, W=15)),
    ):
        for backward in (False, True):
            plan = kernels.plan(last, backward, N=3, **size)
            assert 3 * plan.tiles >= 2 * multiprocessors * plan.blocks, "two tiles of a block and more"
    op_cases.check(chain(N=3, C=3, h=20, w=15, stages=((scaled(1.0, 1.0), 3, 4),)), "cuda", torch.float32)


# ------------------------------------------------------------------------------------------------------------
# What is taken, and what is not


REFUSED = {
    "shrinks": (
        FORMS["shrinks"],
        r"the last stage: maps of \(2, 7\) become \(5, 5\); the CUDA C\+\+ kernels enlarge 1 to 16 times",
    ),
    "17 times": (
        dict(last=resized(119, 5)),
        r"the last stage: maps of \(7, 5\) become \(119, 5\); .* enlarge 1 to 16 times",
    ),
    "many channels": (
        dict(stages=((None, 1, 65),)),
        r"the last stage: a convolution has 65 input and 3 output channels, the .* kernels take 64 and 16",
    ),
    "a 1x1 convolution of no whole size": (
        dict(stages=((scaled(1.7, 2.4, align_corners=False), 1, 6),)),
        r"an earlier stage has Triton kernels alone \(a 1x1 convolution is left to cuBLAS\): "
        r"an Upsample by \(1.7, 2.4\) makes maps .*",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_are_refused(name, library, on_host):
    on_host(library)
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"impl='cuda' cannot run this call: {words}"):
        results(chain(**options))


def test_without_triton_stages_with_kernels_of_their_own_run(library, on_host, monkeypatch):
    on_host(library)
    monkeypatch.setattr(
        dispatch, "missing", lambda op, impl, device: "triton is not installed" if impl == "triton" else None
    )
    op_cases.check(chain(stages=((doubled(), 3, 4),)), "cuda", torch.float32)
    with pytest.raises(
        ValueError, match=r"an earlier stage has Triton kernels alone \(a 1x1 .*\): triton is not installed"
    ):
        results(chain())


def test_limits_are_those_of_the_kernels():
    """The limits stand twice: the op refuses a call before anything runs, and the kernels check it."""
    with open(f"{binding.CSRC}/cuda/chain_stage_plan.cuh") as source:
        text = source.read()
    channels, outputs = reconstruction_loss_layers.MOST_CHANNELS, reconstruction_loss_layers.MOST_OUTPUTS
    assert f"MOST_CHANNELS = {channels}, MOST_OUTPUTS = {outputs};" in text
    assert f"MOST_ENLARGED = {reconstruction_loss_layers.MOST_ENLARGED};" in text


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("mode", (0, 1, 2))
def test_every_call_that_is_taken_has_a_plan(mode, last, backward, library, on_host):
    """On the device with the least shared memory, at the most channels."""
    kernels = on_host(library, binding.RTX4090)
    most = dict(
        C=reconstruction_loss_layers.MOST_CHANNELS, K=3 if last else reconstruction_loss_layers.MOST_OUTPUTS,
        mode=mode,
    )
    for h in (1, 2, 3, 5, 9, 40):
        for H in sorted({h, h + 1, 2 * h, 7 * h, 16 * h}):
            for w, W in ((1, 16), (3, 48), (4, 4), (33, 100)):
                plan = kernels.plan(last, backward, N=2, h=h, w=w, H=H, W=W, **most)
                assert 0 < plan.shared <= binding.RTX4090.shared_per_block, (h, H, w, W)


PAPER = {
    "ImageNet, last": dict(last=True, N=64, C=12, K=3, h=112, w=112, H=224, W=224),
    "Cityscapes, last": dict(last=True, N=2, C=12, K=3, h=256, w=512, H=512, W=1024),
    "ImageNet": dict(last=False, N=64, C=32, K=12, h=56, w=56, H=112, W=112),
    "Cityscapes": dict(last=False, N=2, C=32, K=12, h=128, w=256, H=256, W=512),
}


@pytest.mark.parametrize("device", ("H100", "A100", "RTX4090"))
@pytest.mark.parametrize("shape", PAPER)
def test_plans_of_the_papers_shapes(shape, device, library, on_host):
    limits, s = getattr(binding, device), PAPER[shape]
    kernels = on_host(library, limits)
    for backward in (False, True):
        plan = kernels.plan(backward=backward, **s)
        assert plan.blocks * (plan.shared + 1024) <= limits.shared_per_multiprocessor
        assert plan.blocks == 2 or (device == "RTX4090" and not s["last"] and backward)
        if s["N"] == 64:  # the bound of tests/test_cuda.py: a sixteenth of the logits, and a constant part
            sums = op_cases.chain_block_sums(limits.multiprocessors, s["C"], s["K"]) if backward else 0
            assert plan.bytes <= 4 * 64 * 3 * 224**2 / 16 + sums
        if (shape, device) == ("ImageNet, last", "A100"):
            counted = floors.LAST_TILE["backward" if backward else "forward"]
            assert (plan.tile_h, plan.tile_w) == counted, "what benchmarks/floors.py counts with"
        if backward:
            around, own = plan.out_h * plan.out_w, 4 * plan.tile_h * plan.tile_w
        else:
            around, own = plan.low_h * plan.low_w, plan.tile_h * plan.tile_w / 4
        assert around <= 2.25 * own, "what neighbours take, too"
        assert plan.bytes <= 2**22, "the maps have 12 MB and more"


# ------------------------------------------------------------------------------------------------------------
# The net holds

KERNELS, OF_STAGES = "cuda/chain_stage_loss.cuh", "cuda/chain_stage_kernels.cuh"
BREAKS = {
    "a barrier that is not there": (KERNELS, "  mix(d, s, t);\n  __syncthreads();", "  mix(d, s, t);"),
    "a barrier that is not there, backward": (
        KERNELS, "    collect(d, s, t);\n    __syncthreads();", "    collect(d, s, t);"
    ),
    "an index off by one": (
        "cuda/chain_stage_block.cuh", "const Cell c = s.columns[x + dx];",
        "const Cell c = s.columns[x + (dx + 1) % 3];",
    ),
    "a barrier of a stage that is not there": (
        OF_STAGES, "      __syncthreads();\n      tile_moments", "      tile_moments"
    ),
    "a barrier of a stage that is not there, backward": (
        OF_STAGES, "        __syncthreads();\n        add_weights", "        add_weights"
    ),
    "a channel of a stage too far": (
        OF_STAGES, "k = channel + o;\n    float g", "k = channel + (o + 1) % 3;\n    float g"
    ),
    "a tile's pixels counted twice": (KERNELS, "y >= top && y < bottom && ", "y >= top && bottom > 0 && "),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.fast(1)
def test_a_broken_copy_is_caught(name, library, on_host, tmp_path):
    """The comparison of the tests above fails for some order of the warps."""
    case = chain(N=2, C=13, h=14, w=10, stages=((scaled(1.0, 1.0), 3, 4),))
    path = binding.build(
        str(tmp_path / "broken.so"), csrc=broken(tmp_path, *BREAKS[name]), source="chain_host.cpp"
    )
    with pytest.raises(AssertionError, match="relative error|not finite|nan"):
        for seed in (0, 1, 2, 3):
            on_host(path, MIDDLE, seed)
            op_cases.check(case, "cuda", torch.float32)
    on_host(library, MIDDLE)
    op_cases.check(case, "cuda", torch.float32)


@pytest.mark.slow
def test_sanitizers_find_nothing(library, tmp_path):
    done = test_cuda_host.sanitized(
        binding.build(str(tmp_path / "chain.so"), *binding.SANITIZERS, source="chain_host.cpp"), "chain"
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "no finding\n"


@pytest.mark.slow
def test_sanitizers_find_an_overrun_of_shared_memory(library, tmp_path):
    zeroed = "TAPS * d.s.C; i += THREADS) s.d_weight[i] = 0.0f"
    where = (KERNELS, f"i < {zeroed}", f"i <= {zeroed}")
    path = binding.build(
        str(tmp_path / "chain.so"), *binding.SANITIZERS, csrc=broken(tmp_path, *where),
        source="chain_host.cpp",
    )
    done = test_cuda_host.sanitized(path, "chain")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-5000:]
    assert "chain_gradient_kernel" in done.stderr, done.stderr[-5000:]


def test_a_decoder_of_plain_layers(library, on_host):
    """The op as a user calls it, running statistics included."""
    on_host(library)
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), doubled(),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), doubled(),
        nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid(),
    )
    other = copy.deepcopy(decoder).double()
    features, image = torch.randn(2, 5, 3, 4), torch.rand(2, 3, 12, 16)
    loss = reconstruction_loss(features, image, decoder, impl="cuda")
    compare.assert_close(
        loss, op_cases.plain_reconstruction(features.double(), image.double(), other), what="loss"
    )
    for (name, found), expected in zip(decoder.named_buffers(), other.buffers(), strict=True):
        compare.assert_close(found, expected.double(), dtype=torch.float32, what=name)


def test_compiled_equals_eager(library, on_host):
    """Tracing decides which kernels run a stage."""
    kernels = on_host(library)
    decoder = op_cases.make_chain(5, ((None, 1, 7), (doubled(), 3, 4)), doubled()).float()
    other = copy.deepcopy(decoder)
    features, image = torch.randn(2, 5, 4, 3, requires_grad=True), torch.rand(2, 3, 16, 12)
    torch._dynamo.reset()
    compiled = torch.compile(reconstruction_loss, fullgraph=True, backend="aot_eager")
    loss, expected = (
        compiled(features, image, other, impl="cuda"),
        reconstruction_loss(features, image, decoder, impl="cuda"),
    )
    compare.assert_same(loss.detach(), expected.detach(), "loss")
    found, wanted = (torch.autograd.grad(t, features)[0] for t in (loss, expected))
    compare.assert_same(found, wanted, "gradient of the features")
    for (name, t), plain in zip(other.named_buffers(), decoder.buffers(), strict=True):
        compare.assert_same(t, plain, name)
    assert kernels.calls.count("stage_backward") == 2
