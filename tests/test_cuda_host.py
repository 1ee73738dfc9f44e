"""The CUDA kernels of `reconstruction_loss` without a GPU: nvcc's source, run on the host (tests/cuda_host).

Values and gradients go through the public op. Warps and lanes run in several orders. Sanitizers watch every
access. Copies of the source with a missing barrier or an index off by one are caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from infopro_fast.ops import dispatch
from infopro_fast.ops import reconstruction_loss_layers as layers
from infopro_fast.ops import reconstruction_loss_single as single
from tests import compare, op_cases
from tests.cuda_host import binding
from tests.op_cases import reconstruction

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SMALL = binding.Device(2, 24 * 1024, 24 * 1024)  # several tiles, and several groups of channels
NARROW = binding.Device(2, 40 * 1024, 40 * 1024)  # the same without a resize, which takes more


@pytest.fixture(scope="session")
def library(request, tmp_path_factory) -> str:
    if request.config.getoption("--reference-only"):
        pytest.skip("--reference-only")
    return binding.build(str(tmp_path_factory.mktemp("cuda_host") / "kernels.so"))


@pytest.fixture
def on_host(monkeypatch):
    """Return a function that makes impl="cuda" run an object's kernels on CPU tensors."""
    monkeypatch.setattr(dispatch, "missing", lambda op, impl, device: None)
    monkeypatch.setattr(single, "operand_precision", lambda features: 0)  # exact
    registered = []

    def install(path: str, device: binding.Device = binding.TWO_BLOCKS, seed: int = 0) -> binding.Kernels:
        if not registered:
            registered.append(binding.register())
        binding.current.kernels = binding.Kernels(path, device, seed)
        return binding.current.kernels

    yield install
    binding.current.kernels = None
    if registered:
        registered[0]._destroy()


SHAPES = {
    "no resize": dict(N=2, C=16, h=32, w=32, H=32, W=32, K=12),
    "2x": dict(N=2, C=32, h=16, w=16, H=32, W=32, K=12),
    "4x": dict(N=2, C=64, h=8, w=8, H=32, W=32, K=12),
    "4x to 96": dict(N=1, C=8, h=24, w=24, H=96, W=96, K=12),
    "no resize at 48": dict(N=1, C=3, h=48, w=40, H=48, W=40, K=12),
    "widen 0.5": dict(C=32, h=8, w=8, H=16, W=16, K=6),
    "widen 2": dict(C=16, h=8, w=8, H=16, W=16, K=24),
    "100 channels": dict(N=2, C=100, h=4, w=4, H=9, W=9, K=12),
    "one channel each": dict(C=1, h=3, w=4, H=7, W=6, K=1),
    "features 1x1": dict(h=1, w=1, H=6, W=5),
    "image one column": dict(h=4, w=3, H=9, W=1),
    "image one row": dict(h=4, w=3, H=1, W=9),
    "features and image 1x1": dict(N=5, h=1, w=1, H=1, W=1),
    "one axis kept": dict(h=7, w=3, H=7, W=12),
    "primes": dict(h=5, w=7, H=23, W=17),
    "downscaled": dict(h=13, w=17, H=5, W=6),
    "downscaled in one axis": dict(h=13, w=3, H=5, W=11),
    "much wider than high": dict(N=2, h=2, w=29, H=3, W=67),
    "large ratio": dict(N=2, C=4, h=2, w=2, H=41, W=37, K=5),
}


@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.fast(6)
def test_shapes(shape, mode, library, on_host):
    on_host(library)
    op_cases.check(reconstruction(**SHAPES[shape], interpolate_mode=mode), "cuda", torch.float32)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("restored", (False, True))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
@pytest.mark.fast(4)
def test_losses(loss, restored, training, library, on_host):
    on_host(library)
    restore = dict(image_mean=MEAN, image_std=STD) if restored else {}
    for size in (dict(), dict(C=4, h=8, w=8, H=8, W=8)):
        op_cases.check(reconstruction(**size, loss=loss, training=training, **restore), "cuda", torch.float32)


@pytest.mark.parametrize("restored", (False, True))
@pytest.mark.parametrize("loss", ("bce", "mse", "l1"))
def test_an_image_outside_the_unit_range_gives_nan(loss, restored, library, on_host):
    on_host(library)
    case = reconstruction(loss=loss, **(dict(image_mean=MEAN, image_std=STD) if restored else {}))
    for inputs in op_cases.outside(case):
        assert case.function("cuda")(inputs).isnan()


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    "norm", (dict(affine=False), dict(track_running_stats=False), dict(eps=0.1)), ids=str
)
def test_batch_norms(norm, bias, library, on_host):
    on_host(library)
    op_cases.check(reconstruction(norm=norm, bias=bias), "cuda", torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ("4x", "no resize at 48", "primes"))
@pytest.mark.fast(1)
def test_half_precision(shape, dtype, library, on_host):
    on_host(library)
    op_cases.check(reconstruction(**SHAPES[shape]), "cuda", dtype)


def test_a_scale_of_zero(library, on_host):
    """gamma = 0: a is constant inside the image, zero outside; at beta = 0 no gradient passes the ReLU."""
    on_host(library)
    case = reconstruction(H=8, W=8)
    case.tensors["decoder.1.weight"][:3] = 0
    case.tensors["decoder.1.bias"][:3] = torch.tensor([0.0, 0.7, -0.7], dtype=torch.float64)
    op_cases.check(case, "cuda", torch.float32)


@pytest.mark.parametrize("at", ("features", "image"))
def test_nan_stays_nan(at, library, on_host):
    on_host(library)
    case = reconstruction(training=False)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs[at][0, 0, 0, 0] = torch.nan
    loss = case.function("cuda")(inputs)
    assert loss.isnan()


@pytest.mark.parametrize(
    "shape", (dict(C=13, h=5, w=6, H=11, W=10, K=13), dict(C=6, h=9, w=10, H=9, W=10, K=5)),
    ids=("resized", "direct"),
)
@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
@pytest.mark.fast(3)
def test_layouts(layout, shape, library, on_host):
    on_host(library)
    case = reconstruction(**shape)
    inputs = {name: op_cases.relayout(t, layout)[0] for name, t in case.inputs(torch.float32).items()}
    op_cases.check(case, "cuda", torch.float32, inputs)


@pytest.mark.parametrize(
    "wanted", (("features",), ("decoder.0.weight",), ("decoder.0.bias", "decoder.3.weight"), ()), ids=str
)
@pytest.mark.parametrize("shape", (dict(), dict(h=9, w=7)), ids=("resized", "direct"))
@pytest.mark.fast(3)
def test_gradients_that_are_not_asked_for(shape, wanted, library, on_host):
    on_host(library)
    case = reconstruction(**shape)
    everything, some = case.inputs(torch.float32), case.inputs(torch.float32, wanted)
    expected, loss = case.function("cuda")(everything), case.function("cuda")(some)
    compare.assert_same(loss.detach(), expected.detach(), "loss")
    if wanted:
        full, part = op_cases.gradients(expected, everything), op_cases.gradients(loss, some)
        for name in wanted:
            compare.assert_same(part[name], full[name], name)


def results(case, dtype=torch.float32) -> dict[str, torch.Tensor]:
    inputs = case.inputs(dtype)
    loss = case.function("cuda")(inputs)
    return {"loss": loss.detach()} | op_cases.gradients(loss, inputs)


ORDERED = ("4x", "2x", "no resize", "primes")


@pytest.mark.parametrize("shape", ORDERED)
@pytest.mark.slow
def test_the_order_of_warps_changes_no_bit(shape, library, on_host):
    case = reconstruction(**SHAPES[shape])
    on_host(library, seed=0)
    expected = results(case)
    for seed in (1, 2, 3):
        on_host(library, seed=seed)
        for name, found in results(case).items():
            compare.assert_same(found, expected[name], f"{name}, seed {seed}")


@pytest.mark.parametrize("shape", ("4x", "no resize", "primes", "widen 2", "100 channels"))
@pytest.mark.slow
def test_small_shared_memory(shape, library, on_host):
    """Several tiles, groups of hidden channels, groups of channels, and launches of backward."""
    full = dict(N=3, C=5, K=7) | SHAPES[shape]
    ample = on_host(library, binding.H100).plan(**full)
    device = NARROW if shape == "no resize" else SMALL
    plan = on_host(library, device, seed=2).plan(**full)
    assert plan.shared <= device.shared_per_block
    assert plan.tiles > ample.tiles or plan.part < ample.part, "the same work in more pieces"
    op_cases.check(reconstruction(**SHAPES[shape]), "cuda", torch.float32)


def test_too_many_hidden_channels(library, on_host, monkeypatch):
    """Refused by the op, and by the launcher too."""
    kernels = on_host(library)
    assert kernels.plan(N=1, C=1, h=2, w=2, H=4, W=4, K=3000).shared == 0
    with pytest.raises(
        ValueError, match="impl='cuda' cannot run this call: 3000 hidden channels of maps of .* do not fit"
    ):
        results(reconstruction(C=1, K=3000))
    monkeypatch.setattr(layers, "SHARED_MEMORY", 2**31)
    with pytest.raises(RuntimeError, match="no plan fits"):
        results(reconstruction(C=1, K=3000))


@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
@pytest.mark.parametrize("shape", SHAPES)
def test_what_fits_every_gpu_is_known_from_the_shapes(shape, mode, library, on_host):
    """On the GPU with the least shared memory, every accepted call has a plan, and few others do."""
    s = dict(N=3, C=5, h=4, w=3, H=9, W=7) | SHAPES[shape]
    kernels = on_host(library, binding.RTX4090)
    assert kernels.device.shared_per_block == layers.SHARED_MEMORY
    there_is_a_plan = [
        kernels.plan(**s | {"K": K}, nearest=mode == "nearest").shared > 0 for K in range(1, 161)
    ]
    sizes = [s[name] for name in ("h", "w", "H", "W")]
    taken = [
        layers.least_shared_memory(*sizes, K) <= layers.SHARED_MEMORY
        for K in range(1, 161)
    ]
    assert not there_is_a_plan[-1] and all(
        planned for planned, it in zip(there_is_a_plan, taken, strict=True) if it
    )
    assert sum(taken) >= 0.95 * sum(there_is_a_plan), (sum(taken), sum(there_is_a_plan))


@pytest.mark.parametrize("multiprocessors", (1, 3))
@pytest.mark.fast(1)
def test_tiles_of_a_block_add_up(multiprocessors, library, on_host):
    for case in (reconstruction(N=7), reconstruction(N=7, h=9, w=7)):
        on_host(library, binding.Device(multiprocessors, 40 * 1024, 40 * 1024))
        op_cases.check(case, "cuda", torch.float32)


# ------------------------------------------------------------------------------------------------------------
# Plans for real devices

PAPER = {
    "C16 32x32": dict(N=1024, C=16, h=32, w=32, H=32, W=32, K=12),
    "C32 16x16": dict(N=1024, C=32, h=16, w=16, H=32, W=32, K=12),
    "C64 8x8": dict(N=1024, C=64, h=8, w=8, H=32, W=32, K=12),
    "C16 96x96": dict(N=128, C=16, h=96, w=96, H=96, W=96, K=12),
    "C32 48x48": dict(N=128, C=32, h=48, w=48, H=96, W=96, K=12),
    "C64 24x24": dict(N=128, C=64, h=24, w=24, H=96, W=96, K=12),
    "C64 8x8, widen 2": dict(N=1024, C=64, h=8, w=8, H=32, W=32, K=24),
}


@pytest.mark.parametrize("device", ("H100", "A100", "RTX4090"))
@pytest.mark.parametrize("shape", PAPER)
def test_plans_of_the_papers_shapes(shape, device, library, on_host):
    limits = getattr(binding, device)
    s = PAPER[shape]
    plan = on_host(library, limits).plan(**s, precision=2)  # bfloat16, without a resize
    assert 0 < plan.shared <= limits.shared_per_block
    assert plan.blocks * (plan.shared + 1024) <= limits.shared_per_multiprocessor
    if device == "H100" and shape in ("C16 32x32", "C64 8x8", "C64 24x24"):
        assert plan.blocks == 2
    if plan.low_resolution:
        assert 2 * plan.late_channels >= s["C"], (
            "every block of channels gathers the gradient of the taps again"
        )
    if s["H"] == 32 and s["K"] == 12:
        assert plan.tiles == 1, "no pixel computed twice"
    resized = 4 * s["N"] * s["C"] * s["H"] * s["W"]
    assert max(plan.forward_bytes, plan.backward_bytes) <= resized / 4


# ------------------------------------------------------------------------------------------------------------
# The net holds


def broken(tmp_path, file: str, text: str, instead: str) -> str:
    """Return a copy of csrc with one place changed."""
    copy = str(tmp_path / "csrc")
    shutil.copytree(binding.CSRC, copy)
    path = os.path.join(copy, file)
    with open(path) as source:
        whole = source.read()
    assert whole.count(text) == 1, f"{file}: expected {text!r} once, found it {whole.count(text)} times"
    with open(path, "w") as source:
        source.write(whole.replace(text, instead))
    return copy


COLUMN = "const Cell c = s.columns[x + dx{}];\n      const float* row"
BREAKS = {
    "a barrier that is not there": ("    __syncthreads();\n    gather_columns(", "    gather_columns("),
    "an index off by one": (COLUMN.format(""), COLUMN.format(" + 1")),
}


@pytest.mark.parametrize("case", BREAKS)
@pytest.mark.fast(1)
def test_a_broken_copy_is_caught(case, library, on_host, tmp_path):
    """The comparison of the tests above fails for some order of the warps."""
    path = binding.build(
        str(tmp_path / "broken.so"), csrc=broken(tmp_path, "cuda/reconstruction_loss_taps.cuh", *BREAKS[case])
    )
    caught = []
    for seed in (0, 1, 2, 3):
        on_host(path, seed=seed)
        try:
            op_cases.check(reconstruction(**SHAPES["primes"]), "cuda", torch.float32)
        except AssertionError as error:
            caught.append(f"seed {seed}: {error}")
    assert caught
    on_host(library)
    op_cases.check(reconstruction(**SHAPES["primes"]), "cuda", torch.float32)


@pytest.mark.slow
def test_a_divergent_barrier_is_a_deadlock(on_host, library, tmp_path):
    where = (
        "cuda/reconstruction_loss_taps.cuh", "__syncthreads();  // T is whole",
        "if (threadIdx.x < 40) __syncthreads();  // T is whole",
    )
    on_host(binding.build(str(tmp_path / "broken.so"), csrc=broken(tmp_path, *where)))
    with pytest.raises(RuntimeError, match=r"deadlock: threads .*at __syncthreads"):
        op_cases.check(reconstruction(**SHAPES["primes"]), "cuda", torch.float32)


def sanitized(path: str, what: str = "decoder") -> subprocess.CompletedProcess:
    """Run sanitized.py. Python is not instrumented: the sanitizers' runtimes are loaded first."""
    find = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = ("g++", f"-print-file-name={name}")
        find.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    environment = os.environ | {
        "LD_PRELOAD": ":".join(os.path.realpath(library) for library in find),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = (sys.executable, "-m", "tests.cuda_host.sanitized", path, what)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_sanitizers_find_nothing(library, tmp_path):
    done = sanitized(binding.build(str(tmp_path / "kernels.so"), *binding.SANITIZERS))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "no finding\n"


@pytest.mark.slow
def test_sanitizers_find_an_overrun_of_shared_memory(library, tmp_path):
    where = (
        "cuda/reconstruction_loss_kernels.cuh",
        "i < WARPS * row; i += THREADS) s.sums[i] = 0.0f",
        "i <= WARPS * row; i += THREADS) s.sums[i] = 0.0f",
    )
    done = sanitized(
        binding.build(str(tmp_path / "kernels.so"), *binding.SANITIZERS, csrc=broken(tmp_path, *where))
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "decoder_loss_kernel" in done.stderr, done.stderr[-5000:]
