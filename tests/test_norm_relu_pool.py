"""`norm_relu_pool`: shapes, options of the layers, running statistics, memory, messages, the convolution."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from infopro_fast import ops
from infopro_fast.modules.heads import GlobalAveragePool, run_head
from tests import compare, op_cases
from tests.op_cases import norm_pool

SHAPES = [
    (128, 32, 16, 16), (2, 1, 1, 1), (1, 7, 1, 2), (3, 17, 5, 3), (2, 64, 8, 8), (5, 100, 1, 1),
    (2, 3, 7, 31),
]


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
    "options", [{"training": False}, {"affine": False}, {"track_running_stats": False},
    {"training": False, "track_running_stats": False},
                {"momentum": None}, {"eps": 0.3}], ids=str
)
def test_layer_options(impl, options):
    op_cases.check(norm_pool(4, 6, 3, 5, **options), impl, torch.float64)


@pytest.mark.parametrize("momentum", (0.1, None))
def test_running_statistics_move_as_in_the_layer(impl, momentum):
    theirs = nn.BatchNorm2d(5, momentum=momentum).double()
    ours = copy.deepcopy(theirs)
    for seed in range(3):
        x = (
            torch.randn(4, 5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
            + 1
        )
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
        (
            (torch.zeros(2, 3, 4, 4, dtype=torch.int64), bn),
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        (([1.0], bn), TypeError, "x: expected a floating-point tensor, got list"),
        ((torch.zeros(2, 3, 4, 4), nn.ReLU()), TypeError, "bn: expected a BatchNorm2d, got ReLU"),
        ((torch.zeros(2, 4, 4, 4), bn), ValueError, r"x: expected \(N, 3, h, w\) .* got \(2, 4, 4, 4\)"),
        ((torch.zeros(2, 3, 4), bn), ValueError, r"x: expected \(N, 3, h, w\) .* got \(2, 3, 4\)"),
        ((torch.zeros(2, 3, 0, 4), bn), ValueError, "x: expected .* maps of at least 1x1"),
        (
            (torch.zeros(1, 3, 1, 1), bn),
            ValueError,
            "x: expected more than 1 value per channel when training",
        ),
    ]:
        with pytest.raises(kind, match=f"norm_relu_pool: {message}"):
            ops.norm_relu_pool(*arguments)
    with pytest.raises(ValueError, match="norm_relu_pool: impl='cpu' cannot run this call: x is on meta"):
        ops.norm_relu_pool(torch.zeros(2, 3, 4, 4, device="meta"), bn.to("meta"), impl="cpu")


# ------------------------------------------------------------------------------------------------------------
# With a convolution before it


MODULE = importlib.import_module("infopro_fast.ops.norm_relu_pool")
NAMES = ("x", "conv.weight", "bn.weight", "bn.bias")


@pytest.fixture
def fused(monkeypatch, cpu):
    """The kernels take convolutions of any number of channels, also those that oneDNN would run."""
    monkeypatch.setattr(MODULE, "pays", lambda shape, conv: True)
    return cpu


def head(C, K, stride, *, dtype=torch.float64, training=True, affine=True, seed=0):
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(C, K, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(K, affine=affine)
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.3, 2)
    return conv.to(dtype), bn.to(dtype).train(training)


def pooled_and_gradients(call, x, conv, bn, upstream=None):
    """Return result, gradients and statistics of copies of the layers."""
    conv, bn, x = copy.deepcopy(conv), copy.deepcopy(bn), x.detach().clone().requires_grad_()
    pooled = call(x, conv, bn)
    generator = torch.Generator().manual_seed(1)
    grad = (
        torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled.dtype)
        if upstream is None
        else upstream
    )
    leaves = [t for t in (x, conv.weight, bn.weight, bn.bias) if t is not None and t.requires_grad]
    found = torch.autograd.grad(pooled, leaves, grad)
    return [pooled.detach(), *found, bn.running_mean, bn.running_var]


def ours(impl):
    return lambda x, conv, bn: ops.norm_relu_pool(x, bn, conv=conv, impl=impl)


def plain(x, conv, bn):
    return bn(conv(x)).relu().mean((2, 3))


def assert_conv(x, conv, bn, impl):
    """Errors against float64 are at most twice torch's; the gradient has the input's strides."""
    wide = (x.double(), copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    exact = pooled_and_gradients(plain, *wide)
    found, theirs = pooled_and_gradients(ours(impl), x, conv, bn), pooled_and_gradients(plain, x, conv, bn)
    for name, a, b, c in zip(("pooled", *NAMES, "mean", "variance"), found, exact, theirs):
        assert a.dtype == c.dtype and a.stride() == c.stride(), name
        if x.dtype == torch.float64:
            compare.assert_close(a, b, what=name)
        else:
            compare.assert_accurate(a, c, b, what=name)


CONVOLUTIONS = [  # N, C, K, h, w, stride
    (128, 16, 32, 32, 32, 2), (16, 64, 64, 8, 8, 1), (3, 5, 7, 9, 11, 2), (2, 17, 35, 8, 6, 1),
    (5, 3, 4, 1, 1, 2), (3, 20, 13, 7, 5, 1),
    (3, 3, 4, 2, 3, 2), (7, 1, 1, 33, 31, 2), (8, 6, 9, 1, 9, 1),
]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution(fused, isa, shape, dtype):
    N, C, K, h, w, stride = shape
    conv, bn = head(C, K, stride, dtype=dtype)
    x = torch.randn(N, C, h, w, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    if dtype == torch.float32 and N * h * w <= 5:
        pytest.skip("float32 holds no digit of it: a handful of values a channel")
    assert MODULE.fuses(x, conv)
    assert_conv(x, conv, bn, fused)


shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(2, 9), st.integers(2, 9)
)


@given(
    size=shapes, stride=st.sampled_from((1, 2)), training=st.booleans(),
    layout=st.sampled_from(op_cases.LAYOUTS),
)
def test_convolution_of_any_shape_and_layout(size, stride, training, layout):
    N, C, K, h, w = size
    if N * -(-h // stride) * -(-w // stride) <= 2:
        training = False
    conv, bn = head(C, K, stride, training=training)
    x = torch.randn(N, C, h, w, dtype=torch.float64)
    expected = pooled_and_gradients(plain, x, conv, bn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "pays", lambda shape, conv: True)
        stored, _ = op_cases.relayout(x, layout)
        leaf = stored.detach().requires_grad_()
        pooled = ops.norm_relu_pool(leaf, bn, conv=conv, impl="cpu")
        grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = [pooled.detach(), *torch.autograd.grad(pooled, [leaf, conv.weight, bn.weight, bn.bias], grad)]
    for name, a, b in zip(("pooled", *NAMES), found, expected):
        scale = max(b.abs().max().item(), expected[3].abs().max().item(), 1.0)
        compare.assert_close(a, b, scale=scale * 10, what=name)


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_gradcheck(fused, stride, training, affine):
    conv, bn = head(2, 3, stride, training=training, affine=affine)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    parameters = [conv.weight, *bn.parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *_: ops.norm_relu_pool(x, bn, conv=conv, impl=fused), (x, *parameters), atol=1e-6, rtol=1e-5
    )
    g = torch.autograd.grad(ops.norm_relu_pool(x, bn, conv=conv, impl=fused).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="norm_relu_pool: the kernels have no second derivative"):
        g.square().sum().backward()


@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_each_subset_of_gradients(fused, stride):
    conv, bn = head(5, 6, stride)
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64)
    leaves = {"x": x.requires_grad_(), "conv": conv.weight, "bn": bn.weight}
    everything = torch.autograd.grad(
        ops.norm_relu_pool(x, bn, conv=conv, impl=fused).square().sum(), list(leaves.values())
    )
    for chosen in ({"x"}, {"conv"}, {"bn"}, {"x", "bn"}, {"conv", "bn"}):
        for name, t in leaves.items():
            t.requires_grad_(name in chosen)
        pooled = ops.norm_relu_pool(x, bn, conv=conv, impl=fused)
        found = torch.autograd.grad(pooled.square().sum(), [leaves[k] for k in leaves if k in chosen])
        for a, b in zip(found, (g for k, g in zip(leaves, everything) if k in chosen), strict=True):
            compare.assert_close(a, b, what=str(chosen))


@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_contract(fused, threads, stride):
    """Empty batches; nan is not hidden; nothing is written; same bits twice; any number of threads."""
    conv, bn = head(5, 6, stride)
    x = torch.randn(7, 5, 9, 8, dtype=torch.float64)
    empty = x[:0].clone().requires_grad_()
    out = ops.norm_relu_pool(empty, bn, conv=conv, impl=fused)
    assert out.shape == (0, 6)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), [empty, conv.weight, bn.weight]))
    before = [t.clone() for t in (x, conv.weight)]
    found = []
    for n in (1, 2, 2, 3):
        threads(n)
        found.append(pooled_and_gradients(ours(fused), x, conv, bn))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, conv.weight)))
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2]))
    for other in found[1:]:
        for name, a, b in zip(("pooled", *NAMES), other, found[0]):
            compare.assert_close(a, b, what=name)
    x[0, 0, 0, 0] = torch.nan
    assert not torch.isfinite(ops.norm_relu_pool(x, bn, conv=conv, impl=fused)).all()


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_convolution_opcheck(fused, stride, dtype):
    conv, bn = head(4, 5, stride, dtype=dtype)
    x = torch.randn(2, 4, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    forward, backward = (
        torch.ops.infopro_fast.conv_norm_relu_pool_forward,
        torch.ops.infopro_fast.conv_norm_relu_pool_backward,
    )
    arguments = (x, conv.weight.detach(), stride, bn.weight.detach(), bn.bias.detach(), None, None, 1e-5)
    torch.library.opcheck(forward.default, arguments)
    pooled, z, saved = forward(*arguments)
    torch.library.opcheck(
        backward.default, (pooled, *arguments[:3], z, *arguments[3:5], saved, True, 1e-5, True, True)
    )
    torch.library.opcheck(
        backward.default, (pooled, *arguments[:3], z, *arguments[3:5], saved, True, 1e-5, False, False)
    )
    for wrong in (z[:1], z.permute(0, 2, 1, 3), z[..., :4], z.half()):
        with pytest.raises(
            (ValueError, RuntimeError), match="norm_relu_pool: expected the convolution's output as forward"
        ):
            backward(pooled, *arguments[:3], wrong, *arguments[3:5], saved, True, 1e-5, True, True)


@pytest.mark.compile
@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_compiles(fused, stride):
    conv, bn = head(4, 5, stride)
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    compiled = torch.compile(ours(fused), fullgraph=True)
    for a, b in zip(
        pooled_and_gradients(compiled, x, conv, bn), pooled_and_gradients(ours(fused), x, conv, bn),
        strict=True,
    ):
        compare.assert_close(a, b, what="compiled")


@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_with_kept_tensors_stored_anew(fused, stride):
    """saved_tensors_hooks may return other strides, as torch.autograd.graph.save_on_cpu does."""
    conv, bn = head(5, 6, stride)
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64)
    expected = pooled_and_gradients(ours(fused), x, conv, bn)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, lambda t: t
    ):
        found = pooled_and_gradients(ours(fused), x, conv, bn)
    for name, a, b in zip(("pooled", *NAMES), found, expected):
        compare.assert_close(a, b, what=name)


@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_of_weights_of_any_strides(fused, stride):
    conv, bn = head(5, 6, stride)
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64)
    expected = pooled_and_gradients(plain, x, conv, bn)
    for layout in op_cases.LAYOUTS:
        conv.weight = nn.Parameter(op_cases.relayout(conv.weight, layout)[0].detach())
        for name, a, b in zip(("pooled", *NAMES), pooled_and_gradients(ours(fused), x, conv, bn), expected):
            compare.assert_close(a, b, what=f"{layout}: {name}")


def test_a_nan_stays_in_its_sample(fused):
    for stride in (1, 2):
        conv, bn = head(5, 6, stride, training=False)
        x = torch.randn(4, 5, 6, 7, dtype=torch.float64)
        expected = plain(x, conv, bn)
        x[2, 1, 3, 3] = torch.nan
        found = ops.norm_relu_pool(x, bn, conv=conv, impl=fused)
        assert found[2].isnan().all()
        for n in (0, 1, 3):
            compare.assert_close(found[n], expected[n], what="another sample")


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), None)


def test_what_else_a_layer_does_is_done(fused):
    """With hooks, pruning, weight norms, parametrisations or subclasses the layer itself is called."""
    x, bn, calls = torch.randn(4, 16, 8, 8), nn.BatchNorm2d(32), []
    conv = lambda kind=nn.Conv2d: kind(16, 32, 3, stride=2, padding=1, bias=False)  # noqa: E731
    hooked, pruned, normed, parametrised, standardised = conv(), conv(), conv(), conv(), conv(Standardised)
    hooked.register_forward_hook(lambda *_: calls.append(1))
    prune.l1_unstructured(pruned, "weight", 0.5)
    pruned.weight_orig.data.mul_(0.1)
    nn.utils.weight_norm(normed)
    nn.utils.parametrizations.weight_norm(parametrised)
    for layer in (hooked, pruned, normed, parametrised, standardised):
        expected = ops.norm_relu_pool(layer(x), bn, impl=fused)
        compare.assert_same(ops.norm_relu_pool(x, bn, conv=layer, impl=fused), expected, str(layer))
        compare.assert_same(
            run_head([layer, bn, nn.ReLU(), GlobalAveragePool()], x, fused), expected, str(layer)
        )
    assert len(calls) == 3
    plain_layer = conv()
    assert MODULE.fuses(x, plain_layer)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not MODULE.fuses(x, plain_layer)
    finally:
        handle.remove()


def test_large_maps_are_left_to_the_library():
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
    assert MODULE.fuses(torch.empty(1, 16, 32, 32), conv) and not MODULE.fuses(
        torch.empty(1, 16, 224, 224), conv
    )


def test_other_convolutions_are_the_layers_own(cpu, impl):
    """Convolutions that the kernels cannot take, or leave to oneDNN, run as the layer."""
    x = torch.randn(2, 4, 6, 5)
    for conv in (
        nn.Conv2d(4, 20, 3, padding=1), nn.Conv2d(4, 20, 1, bias=False),
        nn.Conv2d(4, 20, 3, 2, 1, groups=2, bias=False), nn.Conv2d(4, 5, 3, padding=1, bias=False),
        nn.Conv2d(4, 20, 3, padding=1, padding_mode="reflect", bias=False),
    ):
        bn = nn.BatchNorm2d(conv.out_channels)
        assert not MODULE.fuses(x, conv)
        compare.assert_same(
            ops.norm_relu_pool(x, bn, conv=conv, impl=impl), ops.norm_relu_pool(conv(x), bn, impl=impl),
            str(conv),
        )
    conv, bn = nn.Conv2d(4, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
    assert MODULE.fuses(x, conv) and not MODULE.fuses(x.bfloat16(), conv.bfloat16())
    conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not MODULE.fuses(x, conv)
        compare.assert_same(
            ops.norm_relu_pool(x, bn, conv=conv, impl=impl), ops.norm_relu_pool(conv(x), bn, impl=impl),
            "autocast",
        )


def test_convolution_messages():
    x, bn = torch.zeros(2, 3, 4, 4), nn.BatchNorm2d(5)
    for conv, kind, message in [
        (nn.ReLU(), TypeError, "conv: expected a Conv2d or None, got ReLU"),
        (nn.Conv2d(3, 4, 3), ValueError, "conv: expected 5 output channels, those of bn, got 4"),
        (nn.Conv2d(2, 5, 3), ValueError, r"x: expected \(N, 2, h, w\) .* got \(2, 3, 4, 4\)"),
    ]:
        with pytest.raises(kind, match=f"norm_relu_pool: {message}"):
            ops.norm_relu_pool(x, bn, conv=conv)
    one = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
    with pytest.raises(
        ValueError,
        match="norm_relu_pool: x: expected more than 1 value per channel behind conv when training",
    ):
        ops.norm_relu_pool(x[:1, :, :2, :2], nn.BatchNorm2d(16), conv=one)
