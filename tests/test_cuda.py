"""Tests for a GPU, skipped without one: every op by every kernel that can run it, and the trainer.

benchmarks/gpu.sh runs them there. They need only pytest beside the package, since the machine may have no
more.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import infopro_fast
from infopro_fast import ops
from infopro_fast.data import Augmentation, ImageSet, Split
from infopro_fast.data.prefetch import prefetch
from infopro_fast.trainer.moving_average import MovingAverage
from infopro_fast.trainer.schedule import released_sgd
from tests import compare, op_cases
from tests.op_cases import FORMS, SMALL, Case, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_USE = {
    "reconstruction_loss": lambda: op_cases.reconstruction(N=24, C=64, h=8, w=8, H=32, W=32, K=12),
    "reconstruction_loss, no resize": lambda: op_cases.reconstruction(
        N=8, C=16, h=32, w=32, H=32, W=32, K=12
    ),
    "reconstruction_loss, odd": lambda: op_cases.reconstruction(
        N=3, C=19, h=7, w=9, H=31, W=23, K=24, loss="mse"
    ),
    "reconstruction_loss, chain": lambda: op_cases.chain(
        N=4,
        C=64,
        h=14,
        w=14,
        stages=((None, 1, 128), (op_cases.doubled(), 3, 32), (op_cases.doubled(), 3, 12)),
    ),
    "reconstruction_loss, chain, many tiles": lambda: op_cases.chain(
        N=8, C=16, h=61, w=47, stages=((None, 1, 12),)
    ),
    "reconstruction_loss, chain, stages of CUDA C++ alone": lambda: op_cases.chain(
        N=5, C=24, h=29, w=37, stages=((op_cases.doubled(), 3, 16), (op_cases.doubled("nearest"), 3, 13))
    ),
    "reconstruction_loss, chain, channels and 16 times": lambda: op_cases.chain(
        N=3,
        C=9,
        h=7,
        w=5,
        stages=((None, 1, 64),),
        last=torch.nn.Upsample((112, 80), mode="bilinear", align_corners=False),
        loss="mse",
    ),
    "reconstruction_loss, chain, the last stage alone": lambda: op_cases.chain(
        N=6, C=24, h=33, w=40, stages=(), loss="l1"
    ),
    "supcon_loss": lambda: op_cases.supcon(N=1000, D=128, views=None, classes=10, reduction="mean"),
    "linear_cross_entropy": lambda: op_cases.linear_ce(N=1000, D=128, C=10, ignored=3, reduction="mean"),
    "linear_cross_entropy, many classes": lambda: op_cases.linear_ce(
        N=200, D=128, C=10000, ignored=0, reduction="mean"
    ),
    "norm_relu_pool": lambda: op_cases.norm_pool(N=128, C=32, h=16, w=16),
    "upsample_cross_entropy": lambda: op_cases.upsample_ce(
        N=2, C=19, h=16, w=32, H=128, W=256, reduction="mean"
    ),
    "upsample_conv3x3": lambda: op_cases.up_conv(N=8, C=64, h=16, w=16, H=32, W=32, K=32),
    "upsample_conv3x3, odd": lambda: op_cases.up_conv(
        N=3, C=33, h=13, w=29, H=31, W=47, K=19, mode="nearest"
    ),
    "upsample_conv3x3, smaller": lambda: op_cases.up_conv(
        N=4, C=24, h=32, w=30, H=17, W=16, K=40, align_corners=True
    ),
}


@pytest.fixture(params=("triton", "cuda"))
def kernel(request) -> str:
    return request.param


def need(form: str, impl: str) -> None:
    """form: an op, or an op and a variant after a comma."""
    reason = ops.available(form.partition(", ")[0], "cuda")[impl]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=FORMS)
def case(request, kernel) -> Case:
    need(request.param, kernel)
    return FORMS[request.param]()


@pytest.fixture(autouse=True)
def full_precision():
    """Matrix products run in float32, torch's default for them."""
    with torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    ):  # `flags` turns cuDNN off where it is not told
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(before)


def results(case: Case, impl: str, inputs) -> dict[str, torch.Tensor]:
    loss = case.function(impl)(inputs)
    return {"loss": loss.detach()} | gradients(loss, inputs)


# ------------------------------------------------------------------------------------------------------------
# Ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(case, kernel, dtype):
    op_cases.check(case, kernel, dtype, case.inputs(dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_USE)
def test_shapes_in_use(name, kernel, dtype):
    need(name, kernel)
    case = IN_USE[name]()
    op_cases.check(case, kernel, dtype, case.inputs(dtype, device="cuda"))


def test_tf32_is_used_when_asked_for_and_only_then(kernel):
    """Errors of a product with long sums: about 1e-7 in float32, 1e-4 in TF32."""
    if kernel == "cuda":
        pytest.skip("the CUDA C++ kernels compute in float32")
    case = op_cases.linear_ce(
        N=256, D=512, C=512, ignored=0, label_smoothing=0.0, class_weight=False, reduction="mean", size=8.0
    )
    inputs = case.inputs(torch.float32, device="cuda")
    exact = results(case, "reference", op_cases.widened(inputs))["input"]
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = compare.relative_error(results(case, kernel, inputs)["input"], exact)
    assert errors["highest"] < 1e-5 < errors["high"] < 1e-2, errors


def test_same_bits_every_time(case, kernel):
    inputs = case.inputs(torch.float32, device="cuda")
    first = results(case, kernel, inputs)
    for _ in range(5):
        for name, t in results(case, kernel, inputs).items():
            compare.assert_same(t, first[name], name)


def test_no_wait_for_the_device(case, kernel):
    inputs = case.inputs(torch.float32, device="cuda")
    results(case, kernel, inputs)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case, kernel, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph(case, kernel):
    inputs = case.inputs(torch.float32, device="cuda")
    expected = results(case, kernel, inputs)
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        for _ in range(3):
            results(case, kernel, inputs)
    torch.cuda.current_stream().wait_stream(own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(case, kernel, inputs)
    for _ in range(2):
        for t in found.values():
            t.zero_()
        graph.replay()
        for name, t in found.items():
            compare.assert_same(t, expected[name], name)


def test_compiled_equals_eager(case, kernel):
    inputs = case.inputs(torch.float32, device="cuda")
    expected = results(case, kernel, inputs)
    function = torch.compile(case.function(kernel), fullgraph=True)
    loss = function(inputs)
    for name, t in ({"loss": loss.detach()} | gradients(loss, inputs)).items():
        compare.assert_close(
            t, expected[name].double(), what=name,
            scale=expected[case.zero.get(name, name)].abs().max().item(),
        )


def test_compiled_layer(kernel):
    need("norm_relu_pool", kernel)
    bn, x = torch.nn.BatchNorm2d(8).cuda(), torch.randn(4, 8, 5, 5, device="cuda", requires_grad=True)
    call = lambda x: ops.norm_relu_pool(x, bn, impl=kernel).square().sum()  # noqa: E731
    expected, found = (torch.autograd.grad(f(x), x)[0] for f in (call, torch.compile(call, fullgraph=True)))
    compare.assert_close(found, expected.double(), what="gradient of x")


def test_another_device_is_current(case, kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = results(case, kernel, case.inputs(torch.float32, device="cuda:0"))
    for name, t in results(case, kernel, case.inputs(torch.float32, device="cuda:1")).items():
        compare.assert_same(t.cpu(), expected[name].cpu(), name)


@pytest.mark.parametrize("op", SMALL)
def test_auto_is_a_kernel_and_float64_the_reference_with_a_warning(op):
    missing = ops.available(op, "cuda")
    fastest = next((i for i in ("cuda", "triton") if missing[i] is None), None)
    assert fastest is not None, missing
    case = SMALL[op]()
    inputs = case.inputs(torch.float32, device="cuda")
    expected = results(case, fastest, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, t in results(case, "auto", inputs).items():
            compare.assert_same(t, expected[name], name)
    op_cases.check(case, "auto", torch.float64, case.inputs(device="cuda"))


# ------------------------------------------------------------------------------------------------------------
# Memory


def peak(call) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - before
    del kept
    return held


CHUNK = 2**25  # bytes: the most of a buffer of Triton's launchers, unless a sample needs more
SMALL_TENSORS = 2**18  # bytes: weights' gradients and copies, sums, and what the allocator rounds up


@pytest.mark.parametrize("C, h", [(16, 32), (32, 16), (64, 8)])
def test_decoder_peak(kernel, C, h):
    """Memory beyond the returned gradient.

    CUDA C++ needs under a quarter of the resized map: tests/test_cuda_host.py has its plans' bytes. Triton
    needs z, its gradient, the logits, and four buffers of a chunk of samples.
    """
    need("reconstruction_loss", kernel)
    N = 1024
    case = op_cases.reconstruction(N=N, C=C, h=h, w=h, H=32, W=32, K=12)
    inputs = case.inputs(torch.float32, device="cuda")
    transient = peak(lambda: results(case, kernel, inputs)) - 4 * N * C * h * h
    triton = 4 * N * 32 * 32 * (2 * 12 + 3) + 4 * CHUNK
    most = triton if kernel == "triton" else 4 * N * C * 32 * 32 / 4
    assert transient <= most + SMALL_TENSORS, transient


@pytest.mark.parametrize("stages", ((), ((op_cases.doubled(), 3, 12),)), ids=("last", "two"))
def test_chain_decoder_peak(stages):
    """CUDA C++ memory beyond z, its gradient and the features' gradient: a sixteenth of the logits.

    The partial sums of the blocks add to it, for every N the same; tests/test_cuda_host_chain.py has the
    plans' bytes.
    """
    need("reconstruction_loss", "cuda")
    N, C, h = 64, 32 if stages else 12, 56 if stages else 112
    case = op_cases.chain(
        N=N, C=C, h=h, w=h, stages=stages, magnified=1.0
    )  # not looked for: no values are compared
    inputs = case.inputs(torch.float32, device="cuda")
    kept = 4 * N * C * h * h + (2 * 4 * N * 12 * 112**2 if stages else 0)
    transient = peak(lambda: results(case, "cuda", inputs)) - kept
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    sums = max(
        op_cases.chain_block_sums(processors, C, 12 if stages else 3),
        op_cases.chain_block_sums(processors, 12, 3),
    )
    assert transient <= 4 * N * 3 * 224**2 / 16 + sums + SMALL_TENSORS, transient


def test_supcon_peak():
    need("supcon_loss", "triton")
    N, D = 16384, 128
    features = torch.randn(N, D, device="cuda", requires_grad=True)
    labels = torch.randint(10, (N,), device="cuda")
    held = peak(lambda: torch.autograd.grad(ops.supcon_loss(features, labels, impl="triton"), features))
    assert held <= 8 * 4 * N * D, f"{held} bytes; one N x N map has {4 * N * N}"


# ------------------------------------------------------------------------------------------------------------
# Trainer


def trainer(device: str = "cuda", **options):
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 3, "contrast", cuts=[(1, 1), (2, 1)], lambdas=(5, 0.5, 0.5, 1))
    return infopro_fast.LocalTrainer(net.to(device), released_sgd(lr=0.02), **options)


@pytest.fixture
def replays(monkeypatch) -> list[torch.cuda.CUDAGraph]:
    """The graph of each replay so far."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: found.append(graph) or replay(graph))
    return found


def batches(count: int, N: int = 16):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(N, 3, 32, 32, generator=generator).cuda(),
         torch.randint(10, (N,), generator=generator).cuda())
        for _ in range(count)
    ]


@pytest.mark.parametrize("amp", (None, torch.bfloat16))
def test_graph_makes_the_steps_that_python_makes(amp, replays):
    """Also with rates that change and a smaller batch in between."""
    torch.backends.cudnn.deterministic = True
    plain, graphed = trainer(amp=amp), trainer(amp=amp, cuda_graph=True)
    given = batches(7)
    given.insert(5, tuple(t[:7].clone() for t in given[0]))
    for i, (image, label) in enumerate(given):
        for t in (plain, graphed):
            t.set_learning_rate(0.02 / (1 + i))
        expected, found = plain.step(image, label), graphed.step(image, label)
        assert list(expected) == list(found)
        for name, value in expected.items():
            compare.assert_close(
                found[name].double(), value.double(), dtype=torch.float32, what=f"step {i}: {name}"
            )
    assert replays, "no step was captured"
    for (name, p), q in zip(plain.net.state_dict().items(), graphed.net.state_dict().values()):
        if p.is_floating_point():
            compare.assert_close(q, p.double(), what=name)
        else:
            assert torch.equal(p, q), name


def test_state_from_before_the_graph_is_taken_after_it():
    a = trainer(cuda_graph=True)
    given = batches(6)
    for batch in given[:5]:
        a.step(*batch)
    state, net = copy.deepcopy(a.state_dict()), copy.deepcopy(a.net.state_dict())
    expected = {k: v.clone() for k, v in a.step(*given[5]).items()}
    a.net.load_state_dict(net)
    a.load_state_dict(state)
    for name, value in a.step(*given[5]).items():
        compare.assert_close(value.double(), expected[name].double(), dtype=torch.float32, what=name)


def test_a_graph_on_a_device_that_is_not_the_current_one(replays):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    torch.backends.cudnn.deterministic = True
    runs = []
    for device in ("cuda:0", "cuda:1"):
        t = trainer(cuda_graph=True, device=device)
        replays.clear()
        runs.append([t.step(image.to(device), label.to(device))["loss"].cpu() for image, label in batches(6)])
        assert replays and torch.cuda.current_device() == 0
    for found, expected in zip(*runs, strict=True):
        compare.assert_close(found, expected.double(), what="loss")


@pytest.mark.parametrize(
    "options", ({}, {"amp": torch.bfloat16}, {"amp": torch.float16}, {"cuda_graph": True})
)
def test_steps_do_not_wait_for_the_device(options):
    t = trainer(**options)
    given = batches(8)
    for batch in given[:5]:
        t.step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[5:]:
            t.step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_moving_average_does_not_wait_for_the_device():
    t = trainer()
    average = MovingAverage(t.net, 0.9)
    (batch,) = batches(1)
    for i in range(4):
        t.step(*batch)
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            average.update_parameters(t.net)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert average.n_averaged == 4


@pytest.mark.parametrize("resident", (True, False))
def test_batches_do_not_wait_for_the_device(resident):
    """From the second on: an epoch first copies its order, and a run the mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    split = Split(
        torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(64) % 10
    )
    images = ImageSet("images", split, split, 10, (0.5,) * 3, (0.25,) * 3, Augmentation(4, "reflect", True))
    images = images.to("cuda") if resident else images
    batches = images.train_epoch(8, seed=0, epoch=0, device="cuda")
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        left = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(left) == 7 and all(image.is_cuda and image.dtype == torch.float32 for image, _ in left)


def test_float16_trains():
    t = trainer(amp=torch.float16)
    (batch,) = batches(1)
    losses = [t.step(*batch)["loss"].item() for _ in range(40)]
    assert losses[-1] < losses[0] / 2


def test_prefetched_batches_are_the_batches():
    made = [
        (torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,))) for _ in range(20)
    ]
    got = []
    for image, label in prefetch(made, "cuda"):
        torch.cuda._sleep(1_000_000)  # the copies of later batches run ahead of this
        got.append((image.clone(), label.clone()))
    for (a, b), (c, d) in zip(got, made, strict=True):
        assert torch.equal(a.cpu(), c) and torch.equal(b.cpu(), d)
