"""The decoder's products on tensor cores, on the host: fragments, precisions, bank conflicts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infopro_fast.ops import reconstruction_loss_single as single
from tests import compare, op_cases
from tests.cuda_host import binding
from tests.test_cuda_host import broken, library, on_host  # noqa: F401

EXACT, TF32, BF16, F16 = range(4)
TYPES = {TF32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}


def layout(*modes):
    """Return where CuTe's layout of (shape, stride) modes puts (thread, value), the first mode fastest."""

    def at(mode, i):
        total = 0
        for size, stride in mode:
            total, i = total + i % size * stride, i // size
        return total

    thread, value = modes
    count = 1
    for size, _ in value:
        count *= size
    return [[at(thread, t) + at(value, v) for v in range(count)] for t in range(32)]


# CUTLASS, include/cute/atom/mma_traits_sm80.hpp: SM80_16x8_Row, and the A and B layouts of
# SM80_16x8x16_F32BF16BF16F32_TN and SM80_16x8x8_F32TF32TF32F32_TN. Offsets in column-major matrices.
OUTPUT = layout([(4, 32), (8, 1)], [(2, 16), (2, 8)])
FRAGMENTS = {
    8: (layout([(4, 16), (8, 1)], [(2, 8), (2, 64)]), layout([(4, 8), (8, 1)], [(2, 32)])),
    16: (
        layout([(4, 32), (8, 1)], [(2, 16), (2, 8), (2, 128)]), layout([(4, 16), (8, 1)], [(2, 8), (2, 64)])
    ),
}


@pytest.mark.parametrize("precision", TYPES)
def test_fragments_are_cutlass_layouts(precision, library, on_host):  # noqa: F811
    K = 8 if precision == TF32 else 16
    generator = torch.Generator().manual_seed(precision)
    a, b, c = (
        torch.randint(-8, 9, size, generator=generator).float() for size in ((16, K), (8, K), (16, 8))
    )
    flat = [t.t().reshape(-1) for t in (a, b, c)]
    places = (*FRAGMENTS[K], OUTPUT)
    lanes = [values[torch.tensor(place)] for values, place in zip(flat, places, strict=True)]
    found = lanes[2].clone()
    on_host(library).product(precision, *(t.to(TYPES[precision]).contiguous() for t in lanes[:2]), found)
    wanted = (a @ b.t() + c).t().reshape(-1)[torch.tensor(OUTPUT)]
    compare.assert_same(found, wanted, "product")


# ------------------------------------------------------------------------------------------------------------
# Against float64 arithmetic on operands rounded where the kernels, and plain torch's convolutions, round


def rounded(x: torch.Tensor, precision: int) -> torch.Tensor:
    if precision == TF32:
        return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()
    return x.to(TYPES[precision]).double()


class RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, precision):
        return rounded(x.float().contiguous(), precision)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class RoundBackward(torch.autograd.Function):
    """Round the gradient, in units of `unit`."""

    @staticmethod
    def forward(ctx, x, precision, unit):
        ctx.options = precision, unit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        precision, unit = ctx.options
        return rounded((grad / unit).float().contiguous(), precision) * unit, None, None


def expected(tensors, precision: int, unit: float):
    """Return loss and gradients in float64, with the operands of convolutions rounded unless exact.

    unit: the kernels hold gradients without the mean's factor, which matters to float16 alone.
    """
    t = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    forward = (lambda x: RoundForward.apply(x, precision)) if precision else (lambda x: x)
    back = (lambda x: RoundBackward.apply(x, precision, unit)) if precision else (lambda x: x)
    z = back(F.conv2d(forward(t["features"]), forward(t["decoder.0.weight"]), padding=1))
    z = z + t["decoder.0.bias"].view(1, -1, 1, 1)
    norm = F.batch_norm(z, None, None, t["decoder.1.weight"], t["decoder.1.bias"], True, 0.0, 1e-5)
    s = back(F.conv2d(forward(F.relu(norm)), forward(t["decoder.3.weight"]), padding=1))
    loss = F.binary_cross_entropy_with_logits(
        s + t["decoder.3.bias"].view(1, -1, 1, 1), t["image"].detach()
    )
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in t.items() if name != "image"}


def results(case, precision: int, monkeypatch):
    monkeypatch.setattr(single, "operand_precision", lambda features: precision)
    inputs = case.inputs(torch.float32)
    loss = case.function("cuda")(inputs)
    loss.backward()
    return loss.detach(), inputs


SIZES = {
    "32x32": dict(N=2, C=16, h=32, w=32, H=32, W=32, K=12),
    "tiles, chunks and blocks": dict(N=2, C=35, h=21, w=37, H=21, W=37, K=20),
}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.fast(1)
def test_rounds_where_plain_torch_does(size, precision, library, on_host, monkeypatch):  # noqa: F811
    """As near to float64 arithmetic on rounded operands as float32 sums are, and no further from the exact
    results than plain torch's convolutions, which round the same operands."""
    kernels = on_host(library, binding.RTX4090, seed=3)
    case = op_cases.reconstruction(**SIZES[size])
    kernels.conflicts()
    loss, inputs = results(case, precision, monkeypatch)
    assert kernels.conflicts() <= 2, "bank conflicts"
    unit = 1 / (3 * inputs["image"][:, 0].numel())
    plain_loss, plain = expected(inputs, precision, unit)
    exact_loss, exact = expected(inputs, EXACT, unit)
    assert abs(loss - plain_loss) <= 1e-6 * plain_loss
    assert abs(loss - exact_loss) <= abs(plain_loss - exact_loss) + 1e-6 * exact_loss
    for name, wanted in plain.items():
        if name == "decoder.0.bias":  # zero
            continue
        found = inputs[name].grad
        ours, theirs = (compare.relative_error(t, exact[name]) for t in (found, wanted))
        assert ours <= 1.05 * theirs + 1e-6, f"{name}: {ours:.3g}, plain torch {theirs:.3g}"


def test_precision_follows_torch():
    x = torch.zeros(1)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting, precision in (("ieee", EXACT), ("tf32", TF32)):
            torch.backends.cudnn.conv.fp32_precision = setting
            assert single.operand_precision(x) == precision
        assert single.operand_precision(x.bfloat16()) == BF16
        assert single.operand_precision(x.half()) == F16
        with torch.autocast("cpu", torch.bfloat16):
            assert single.operand_precision(x) == BF16
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


STEPS, MMA = "cuda/reconstruction_loss_same_steps.cuh", "cuda/mma.cuh"
BREAKS = {
    "a barrier that is not there": (
        STEPS, "load<decltype(dtype)::value>(d, r); });\n    __syncthreads();",
        "load<decltype(dtype)::value>(d, r); });",
    ),
    "a fragment's words swapped": (
        MMA, "split(first, m.v[0], m.v[2]), split(second, m.v[1], m.v[3]);",
        "split(second, m.v[0], m.v[2]), split(first, m.v[1], m.v[3]);",
    ),
    "a part of the split lost": (MMA, "    mma_tf32(d, a.v[0], small.x, small.y);\n", ""),
}


@pytest.mark.parametrize("case", BREAKS)
@pytest.mark.fast(1)
def test_a_broken_copy_is_caught(case, library, on_host, tmp_path):  # noqa: F811
    path = binding.build(str(tmp_path / "broken.so"), csrc=broken(tmp_path, *BREAKS[case]))
    small = op_cases.reconstruction(N=2, C=16, h=10, w=12, H=10, W=12, K=12)
    caught = 0
    for seed in (0, 1, 2, 3):
        on_host(path, seed=seed)
        try:
            op_cases.check(small, "cuda", torch.float32)
        except AssertionError:
            caught += 1
    assert caught
    on_host(library)
    op_cases.check(small, "cuda", torch.float32)
