"""norm_relu_pool beyond the contract of every op: shapes, layers' options, running statistics, what it keeps, what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infopro_fast import ops
from tests import compare, op_cases
from tests.op_cases import norm_pool

SHAPES = [(128, 32, 16, 16), (2, 1, 1, 1), (1, 7, 1, 2), (3, 17, 5, 3), (2, 64, 8, 8), (5, 100, 1, 1), (2, 3, 7, 31)]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, shape, dtype):
    # two values a channel normalise to +-1: their gradient is what is left of a cancellation
    if dtype == torch.float32 and shape[0] * shape[2] * shape[3] <= 5:
        pytest.skip("float32 holds no digit of it")
    op_cases.check(norm_pool(*shape), impl, dtype)


@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
def test_every_instruction_set(isa, layout):
    case = norm_pool(4, 37, 6, 5)
    inputs = case.inputs(torch.float32)
    inputs["x"], _ = op_cases.relayout(inputs["x"], layout)
    op_cases.check(case, "cpu", torch.float32, inputs)


@pytest.mark.parametrize(
    "options", [{"training": False}, {"affine": False}, {"track_running_stats": False}, {"training": False, "track_running_stats": False},
                {"momentum": None}, {"eps": 0.3}], ids=str
)  # fmt: skip
def test_layer_options(impl, options):
    op_cases.check(norm_pool(4, 6, 3, 5, **options), impl, torch.float64)


@pytest.mark.parametrize("momentum", (0.1, None))
def test_running_statistics_move_as_in_the_layer(impl, momentum):
    theirs = nn.BatchNorm2d(5, momentum=momentum).double()
    ours = copy.deepcopy(theirs)
    for seed in range(3):
        x = torch.randn(4, 5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        theirs(x)
        ops.norm_relu_pool(x, ours, impl=impl)
    assert ours.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        compare.assert_close(getattr(ours, name), getattr(theirs, name), what=name)
    theirs.eval(), ours.eval()
    ops.norm_relu_pool(x, ours, impl=impl)
    assert ours.num_batches_tracked == 3


sizes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@given(size=sizes, training=st.booleans(), layout=st.sampled_from(op_cases.LAYOUTS))
def test_any_shape_and_layout(size, training, layout):
    n, c, h, w = size
    if n * h * w == 1:
        training = False
    case = norm_pool(n, c, h, w, training=training)
    inputs = case.inputs()
    inputs["x"], _ = op_cases.relayout(inputs["x"], layout)
    exact = op_cases.gradients(case.plain(fresh := case.inputs()), fresh)
    found = op_cases.gradients(case.function("auto")(inputs), inputs)
    for name, gradient in found.items():
        # the gradient in x of a batch of a few values cancels: its scale is that of what is cancelled
        scale = max(exact[name].abs().max().item(), exact["weight"].abs().max().item(), 1.0)
        compare.assert_close(gradient, exact[name], scale=scale * 10, what=name)


def test_keeps_its_input_and_a_few_numbers(cpu):
    N, C = 16, 8
    bn, x = nn.BatchNorm2d(C), torch.randn(N, C, 12, 12, requires_grad=True)
    kept = {}
    pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pooled = ops.norm_relu_pool(x, bn, impl=cpu)
    mine = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in bn.parameters())}
    extra = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in mine)
    assert pooled.shape == (N, C) and extra <= 4 * (2 * N * C + 2 * C)


def test_gradient_has_the_strides_of_the_input(cpu):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    ops.norm_relu_pool(x, nn.BatchNorm2d(3), impl=cpu).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_messages():
    bn = nn.BatchNorm2d(3)
    for arguments, kind, message in [
        ((torch.zeros(2, 3, 4, 4, dtype=torch.int64), bn), TypeError, "x: expected a floating-point tensor, got torch.int64"),
        (([1.0], bn), TypeError, "x: expected a floating-point tensor, got list"),
        ((torch.zeros(2, 3, 4, 4), nn.ReLU()), TypeError, "bn: expected a BatchNorm2d, got ReLU"),
        ((torch.zeros(2, 4, 4, 4), bn), ValueError, r"x: expected \(N, 3, h, w\) .* got \(2, 4, 4, 4\)"),
        ((torch.zeros(2, 3, 4), bn), ValueError, r"x: expected \(N, 3, h, w\) .* got \(2, 3, 4\)"),
        ((torch.zeros(2, 3, 0, 4), bn), ValueError, "x: expected .* maps of at least 1x1"),
        ((torch.zeros(1, 3, 1, 1), bn), ValueError, "x: expected more than 1 value per channel when training"),
    ]:
        with pytest.raises(kind, match=f"norm_relu_pool: {message}"):
            ops.norm_relu_pool(*arguments)
    with pytest.raises(ValueError, match="norm_relu_pool: impl='cpu' cannot run this call: x is on meta"):
        ops.norm_relu_pool(torch.zeros(2, 3, 4, 4, device="meta"), bn.to("meta"), impl="cpu")
