"""`norm_relu_conv`: the values and gradients of its three modules, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast.modules.densenet import DenseLayer, Transition
from infopro_fast.modules.norm_recompute import has_chain, norm_relu_conv, run_block
from infopro_fast.planning.live import LiveBytes
from infopro_fast.trainer.schedule import released_sgd

GEOMETRIES = {
    "3x3": dict(kernel_size=3, padding=1, bias=False),
    "1x1 with bias": dict(kernel_size=1),
    "stride, groups": dict(kernel_size=3, stride=2, padding=1, groups=2, bias=False),
    "dilation, no padding": dict(kernel_size=(3, 1), dilation=2),
}


def layers(dtype=torch.float32, seed: int = 0, **geometry) -> tuple[nn.BatchNorm2d, nn.Conv2d]:
    torch.manual_seed(seed)
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, **(geometry or GEOMETRIES["3x3"]))
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return norm.to(dtype), conv.to(dtype)


def modules(x, norm, conv):
    return conv(F.relu(norm(x)))


def outcome(call, x, norm, conv, autocast=None):
    """Output, gradients of everything, buffers afterwards."""
    norm, conv, x = copy.deepcopy(norm), copy.deepcopy(conv), x.detach().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = call(x, norm, conv)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    parameters = [*norm.parameters(), *conv.parameters()]
    gradients = torch.autograd.grad(out, [x, *parameters], weight)
    return [out.detach(), *gradients, *norm.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_bits_of_the_modules(geometry, memory_format):
    norm, conv = layers(**geometry)
    x = torch.randn(3, 4, 9, 7).to(memory_format=memory_format)
    for ours, theirs in zip(
        outcome(norm_relu_conv, x, norm, conv), outcome(modules, x, norm, conv), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.eval(),
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: norm.__init__(4, track_running_stats=False),
        lambda norm: norm.double(),
    ],
    ids=["running statistics", "cumulative mean", "no running statistics", "float64"],
)
def test_norms(change):
    norm, conv = layers()
    change(norm)
    dtype = norm.weight.dtype
    x = torch.randn(3, 4, 5, 6, dtype=dtype)
    found = zip(
        outcome(norm_relu_conv, x, norm, conv.to(dtype)),
        outcome(modules, x, norm, conv.to(dtype)),
        strict=True,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The map that is kept is x, whatever its dtype; the convolution runs in autocast's."""
    norm, conv = layers()
    for x in (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6).to(dtype)):
        found = zip(
            outcome(norm_relu_conv, x, norm, conv, dtype), outcome(modules, x, norm, conv, dtype), strict=True
        )
        for ours, theirs in found:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    """Against differences of the function, in float64."""
    norm, conv = layers(torch.float64, kernel_size=3, stride=2, padding=1)
    norm.train(training)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, gamma, beta, weight, bias):
        n, c = copy.deepcopy(norm), copy.deepcopy(conv)
        for module, values in ((n, (gamma, beta)), (c, (weight, bias))):
            for name, value in zip(("weight", "bias"), values):
                del module._parameters[name]
                setattr(module, name, value)
        return norm_relu_conv(x, n, c)

    assert torch.autograd.gradcheck(call, (x, norm.weight, norm.bias, conv.weight, conv.bias))


@pytest.mark.parametrize("frozen", ["x", "norm", "conv", "x and norm"])
def test_parts_without_gradients(frozen):
    """What needs none gets none, and the others' are the same."""
    found = []
    for call in (norm_relu_conv, modules):
        norm, conv = layers()
        x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(
            "x" not in frozen
        )
        norm.requires_grad_("norm" not in frozen)
        conv.requires_grad_("conv" not in frozen)
        call(x, norm, conv).square().sum().backward()
        found.append([t.grad for t in (x, *norm.parameters(), *conv.parameters())])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    assert all(torch.equal(a, b) for a, b in zip(*found) if a is not None)


def test_without_gradients_it_is_the_modules():
    norm, conv = layers()
    x = torch.randn(3, 4, 5, 6)
    with torch.no_grad():
        assert torch.equal(norm_relu_conv(x, norm, conv), modules(x, *layers()))
    assert norm.num_batches_tracked == 1


def test_a_second_derivative_is_an_error():
    norm, conv = layers()
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(norm_relu_conv(x, norm, conv).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_is_kept():
    """x, two numbers a channel, and nothing else; parameters aside."""
    norm, conv = layers()
    x = torch.randn(8, 4, 16, 16)
    live = LiveBytes([*norm.parameters(), *norm.buffers(), *conv.parameters()])
    kept = []

    def pack(t):
        kept.append(t.untyped_storage()._cdata)
        return t

    with live, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = norm_relu_conv(x, norm, conv)
    parameters = {p.untyped_storage()._cdata for p in (*norm.parameters(), *conv.parameters())}
    others = set(kept) - parameters - {x.untyped_storage()._cdata}
    assert len(others) == 2  # mean and 1 / deviation
    assert live.now.total == 4 * (out.numel() + 2 * 4)


@pytest.mark.parametrize(
    ("norm", "conv", "error", "message"),
    [
        (nn.SyncBatchNorm(4), nn.Conv2d(4, 6, 3), TypeError, "norm: expected BatchNorm2d, got SyncBatchNorm"),
        (
            nn.BatchNorm2d(4),
            nn.ConvTranspose2d(4, 6, 3),
            TypeError,
            "conv: expected Conv2d, got ConvTranspose2d",
        ),
        (
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3, padding="same"),
            ValueError,
            "conv: expected padding by a number of zeros, got 'same'",
        ),
        (
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
            ValueError,
            "of 'reflect'",
        ),
    ],
)
def test_errors(norm, conv, error, message):
    with pytest.raises(error, match=message):
        norm_relu_conv(torch.randn(2, 4, 8, 8), norm, conv)


@pytest.mark.slow
def test_compiled():
    """torch.compile: one graph, the same numbers, running statistics moved once."""
    norm, conv = layers()
    x = torch.randn(3, 4, 5, 6)
    compiled = torch.compile(norm_relu_conv, fullgraph=True)
    for ours, theirs in zip(outcome(compiled, x, norm, conv), outcome(modules, x, norm, conv), strict=True):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------------------
# Blocks


def blocks():
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return [
        infopro_fast.build("resnet20", 1).stages[0].layer2_0,
        DenseLayer(16, 4),
        Transition(16, 8),
        resnet.BasicBlock(8, 16, 2, down),
        resnet.Bottleneck(16, 4),
        resnet.Bottleneck(16, 4, groups=2, base_width=64, dilation=2),
    ]


@pytest.mark.parametrize(
    "i", range(6), ids=["BasicBlock", "DenseLayer", "Transition", "torchvision's", "Bottleneck", "ResNeXt's"]
)
def test_blocks_keep_their_bits(i):
    torch.manual_seed(0)
    block = blocks()[i]
    assert has_chain(block)
    channels = next(p for p in block.parameters() if p.dim() == 4).shape[1] if i != 1 else 16
    x = torch.randn(4, channels, 8, 8)
    found = []
    for call in (lambda b, x: b(x), run_block):
        own, given = copy.deepcopy(block), x.clone().requires_grad_()
        out = call(own, given)
        out.square().sum().backward()
        found.append([out.detach(), given.grad, *(p.grad for p in own.parameters()), *own.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "relu", nn.SiLU()),
        lambda block: block.relu.register_forward_hook(lambda _, x, y: 2 * y),
        lambda block: block.register_full_backward_hook(lambda _, g_in, g_out: (2 * g_in[0],)),
        lambda block: setattr(block, "forward", lambda x, run=block.forward: 2 * run(x)),
    ],
    ids=["activation", "hook of it", "backward hook", "method"],
)
def test_changed_blocks_run_as_they_are(change):
    torchvision = pytest.importorskip("torchvision")
    found = []
    for call in (lambda b, x: b(x), run_block):
        torch.manual_seed(0)
        block = torchvision.models.resnet.BasicBlock(8, 8)
        block.relu.inplace = False  # as a hook needs
        change(block)
        x = torch.randn(2, 8, 6, 6, requires_grad=True)
        out = call(block, x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_blocks_run_as_they_are():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert not has_chain(block)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(run_block(block, x), block(x))
    with pytest.raises(
        ValueError,
        match="build: recompute='norm' knows the blocks of ResNets and DenseNets, and Sequential has none",
    ):
        net = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        infopro_fast.build(net, 1, "none", image_size=32, recompute="norm")


def test_a_step_of_a_network():
    """A module keeps three of four maps of a residual block, and trains to the same weights."""
    image, label = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 1, 2])
    found, saved = [], []
    for recompute in ("none", "norm"):
        torch.manual_seed(0)
        net = infopro_fast.build("resnet20", 2, recompute=recompute)
        trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.1))
        trainer.step(image, label)
        saved.append(infopro_fast.memory.measure_step(trainer, image, label).modules[0].saved)
        found.append(net.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    A, B = (4 * 4 * 16 * 32 * 32 // s for s in (1, 2))
    first = infopro_fast.build("resnet20", 2).stages[0]
    assert len(first) == 5  # the stem, three blocks of the first stage, one of the second
    assert saved[0] - saved[1] == 3 * A + B
