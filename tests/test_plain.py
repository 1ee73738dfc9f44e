"""Layers that a kernel may not stand for: whatever a call of them does is done, or refused by name."""

from __future__ import annotations

import collections
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import infopro_fast
from infopro_fast import ops
from infopro_fast.modules import (
    AuxClassifier,
    ChainDecoder,
    Decoder,
    SyncBatchNorm,
    convert_sync_batch_norm,
)
from infopro_fast.modules.backbones import BasicBlock
from infopro_fast.modules.densenet import DenseLayer
from infopro_fast.modules.heads import run_loss
from infopro_fast.modules.infopro_l import FeatureDecoder
from infopro_fast.modules.local_loss import Classifier
from infopro_fast.modules.norm_recompute import run_block
from infopro_fast.modules.segmentation import PixelClassifier, dense_head
from infopro_fast.ops.plain import not_plain
from tests import compare, op_cases

OPS = ("op", "chain op", "pool", "conv pool", "block")  # forms that may refuse; modules run the layers
FORMS = (*OPS, "decoder", "chain", "head", "contrast", "classifier", "pixels", "features")
WHOLE = ("classifier", "pixels")  # forms whose module is itself changed, as one of its layers
TAKEN = ("nothing", "parametrised weight", "spectral_norm", "weight_norm")


class Scaled(nn.Module):
    def forward(self, t):
        return 1.25 * t


def own_class(layer: nn.Module, name: str = "forward") -> None:
    """Give a layer a subclass that overrides ``name``."""
    plain = getattr(type(layer), name)
    layer.__class__ = type(
        f"My{type(layer).__name__}", (type(layer),), {name: lambda self, *x: 1.25 * plain(self, *x)}
    )


def own_method(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda *x: 1.25 * plain(*x)


def low_rank(layer: nn.Module) -> None:
    """Add a low-rank update, as LoRA's layers do; the weight stays the layer's own."""
    layer.__class__ = type("LoRA", (type(layer),), {"forward": _with_update})
    size = layer.weight.numel() // len(layer.weight)
    layer.a = nn.Parameter(torch.full((len(layer.weight), 1), 0.1, dtype=layer.weight.dtype))
    layer.b = nn.Parameter(torch.full((1, size), 0.2, dtype=layer.weight.dtype))


def _with_update(self, x):
    weight = self.weight + (self.a @ self.b).view_as(self.weight)
    return torch.func.functional_call(_bare(self), {"weight": weight, "bias": self.bias}, (x,))


def _bare(layer: nn.Module) -> nn.Module:
    kind = type(layer).__mro__[1]
    if kind is nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    options = (layer.kernel_size, layer.stride, layer.padding)
    return nn.Conv2d(layer.in_channels, layer.out_channels, *options, bias=layer.bias is not None)


# What is done to a layer, and whether it needs a weight with two dimensions or more.
DISTURBANCES = {
    "nothing": (lambda layer: None, False),
    "forward hook": (lambda layer: layer.register_forward_hook(lambda _, x, y: 1.25 * y), False),
    "forward pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda _, x: (1.25 * x[0],)), False),
    "backward hook": (
        lambda layer: layer.register_full_backward_hook(lambda _, g_in, g_out: (2 * g_in[0],)), False
    ),
    "backward pre-hook": (
        lambda layer: layer.register_full_backward_pre_hook(lambda _, g_out: (2 * g_out[0],)), False
    ),
    "subclass": (own_class, False),
    "method": (own_method, False),
    "_conv_forward": (lambda layer: own_class(layer, "_conv_forward"), True),
    "parametrised weight": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Scaled(), unsafe=True), True
    ),
    "spectral_norm": (parametrizations.spectral_norm, True),
    "old spectral_norm": (nn.utils.spectral_norm, True),
    "weight_norm": (parametrizations.weight_norm, True),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), True),
    "low rank": (low_rank, True),
}


def sampled(rng: random.Random):
    """Return (form, module, call of ours, call of plain torch, features) of a random form."""
    N, C, size = rng.randint(2, 3), rng.choice((3, 5, 16)), rng.choice((4, 6))
    x = torch.randn(N, C, size, size, dtype=torch.float64)
    label = torch.randint(5, (N,))
    form = rng.choice(FORMS)
    if form in ("op", "chain op", "decoder", "chain"):
        image = torch.rand(N, 3, 2 * size, 2 * size, dtype=torch.float64)
        options = {"loss": rng.choice(("bce", "mse", "l1"))}
        net = (
            Decoder(C, 2 * size, **options) if form in ("op", "decoder")
            else ChainDecoder(C, (size, size), (2 * size, 2 * size), **options)
        )
        plain = lambda net: op_cases.plain_reconstruction(x, image, net.decoder, **options)  # noqa: E731
        impl = rng.choice(("reference", "cpu"))
        if "op" in form:
            loss = ops.reconstruction_loss
            return form, net, lambda net: loss(x, image, net.decoder, impl=impl, **options), plain, x
        return form, net, lambda net: net(x, image), plain, x
    if "pool" in form:
        impl = rng.choice(("reference", "cpu"))
        layers = [nn.Conv2d(C, 16, 3, padding=1, bias=False)] if form == "conv pool" else []
        net = nn.Sequential(*layers, nn.BatchNorm2d(16 if layers else C))
        conv = lambda net: net[0] if len(net) == 2 else None  # noqa: E731
        return (
            form, net, lambda net: ops.norm_relu_pool(x, net[-1], conv=conv(net), impl=impl).square().sum(),
            lambda net: net(x).relu().mean((2, 3)).square().sum(), x,
        )
    if form == "head":
        net = AuxClassifier(C, rng.choice(("0c1f", "1c2f", "1c1f", "2c2f")), "cross_entropy", 5)
        plain = lambda net: F.cross_entropy(net.head(x), label)  # noqa: E731
        return form, net, lambda net: net(x, label), plain, x
    if form == "contrast":
        net, label = AuxClassifier(C, "1c2f", feature_dim=7), label % 2
        plain = lambda net: op_cases.plain_supcon(net.head(x), label)  # noqa: E731
        return form, net, lambda net: net(x, label), plain, x
    if form == "block":
        net = rng.choice((BasicBlock(C, C, 1), BasicBlock(C, 4, 2), DenseLayer(C, 2)))
        return form, net, lambda net: run_block(net, x).square().sum(), lambda net: net(x).square().sum(), x
    if form == "classifier":
        net = Classifier(C, 5)
        plain = lambda net: F.cross_entropy(net(x), label)  # noqa: E731
        return form, net, lambda net: next(iter(net.terms(x, None, label))).loss, plain, x
    if form == "pixels":
        head, label = dense_head(C, 4, 5), torch.randint(5, (N, 2 * size, size))
        head[3].p = 0.0
        net = PixelClassifier(head, 5, align_corners=True)
        resize = functools.partial(F.interpolate, size=label.shape[1:], mode="bilinear", align_corners=True)
        plain = lambda net: F.cross_entropy(resize(net(x)), label)  # noqa: E731
        return form, net, lambda net: next(iter(net.terms(x, None, label))).loss, plain, x
    given = torch.randn(N, 4, 2 * size, 2 * size, dtype=torch.float64)
    net = FeatureDecoder(C, 4, (2 * size, 2 * size))

    def plain(net):
        target = given - given.mean((0, 2, 3), keepdim=True)
        target = target / (given.var((0, 2, 3), correction=0).mean() + 1e-5).sqrt()
        return F.mse_loss(
            net.decoder(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)), target
        )

    return form, net, lambda net: net(x, given), plain, x


def measured(seed: int, which: int):
    """Draw the case of ``seed`` afresh, disturb it, and return what ours (0) or plain torch (1) computes."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    form, net, *calls, x = sampled(rng)
    net = net.double().train(rng.random() < 0.7)
    leaves = [m for m in net.modules() if isinstance(m, nn.Sequential) or not list(m.children())]
    leaves += [net] * (form in WHOLE)
    name = rng.choice(list(DISTURBANCES))
    disturb, weighty = DISTURBANCES[name]
    if weighty:
        kinds = nn.Conv2d if name == "_conv_forward" else (nn.Conv2d, nn.Linear)
        leaves = [m for m in leaves if isinstance(m, kinds)] or [None]
    if form in ("pool", "conv pool", "classifier"):
        leaves = [m for m in leaves if not isinstance(m, nn.Sequential)] or [None]
    layer = rng.choice(leaves)
    if layer is None:
        name = "nothing"
    else:
        disturb(layer)
    handle = None
    if rng.random() < 0.05 and name == "nothing":
        name, handle = "hook of all modules", nn.modules.module.register_module_forward_hook(
            lambda m, x, y: 1.25 * y if isinstance(m, nn.Conv2d) else None
        )
    x.requires_grad_()
    try:
        loss = calls[which](net)
        named = {"x": x, **{k: p for k, p in net.named_parameters() if p.requires_grad}}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        if handle is not None:
            handle.remove()
    pairs = zip(named.items(), found, strict=True)
    given = {k: torch.zeros_like(t) if g is None else g for (k, t), g in pairs}
    return form, name, {"loss": loss.detach()} | given | dict(net.named_buffers())


@pytest.mark.parametrize("cases", (150, pytest.param(2000, marks=pytest.mark.slow)))
def test_nothing_differs_in_silence(cpu, cases, threads):
    """Each case is equal to the layers' own call, or refused by the op's name."""
    threads(1)  # the tensors are tiny: threads that wait for each other take most of the time
    outcomes: collections.Counter = collections.Counter()
    for seed in range(cases):
        try:
            form, name, expected = measured(seed, 1)
        except RuntimeError:  # a backward hook in front of a layer that works in place
            outcomes["torch refuses"] += 1
            continue
        try:
            form, name, found = measured(seed, 0)
        except (ValueError, TypeError) as error:
            names = ("reconstruction_loss: ", "norm_relu_pool: ", "norm_relu_conv: ")
            assert str(error).startswith(names), error
            assert form in OPS and name not in TAKEN, f"{seed}: {form}, {name}: {error}"
            outcomes["refused"] += 1
            continue
        outcomes[f"equal: {name}"] += 1
        outcomes[form] += 1
        assert found.keys() == expected.keys()
        size = max(1.0, max(t.abs().max().item() for t in expected.values()))
        for key, value in expected.items():
            compare.assert_close(
                found[key].double(), value.double(), scale=size, what=f"{seed}: {form}, {name}: {key}"
            )
    print(dict(outcomes))
    assert outcomes["equal: nothing"] and outcomes["refused"] and all(outcomes[form] for form in FORMS)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_not_plain(name):
    conv = nn.Conv2d(3, 4, 3)
    DISTURBANCES[name][0](conv)
    assert (not_plain(conv, nn.Conv2d) is None) == (name in TAKEN)
    assert not_plain(conv, nn.Linear) is not None


def test_a_parametrised_weight_is_computed_once(impl):
    """spectral_norm takes a step of its iteration each time."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, t):
            Counted.calls += 1
            return t

    decoder = op_cases.make_decoder(4, 5)
    bn, conv = nn.BatchNorm2d(16).double(), nn.Conv2d(4, 16, 3, padding=1, bias=False).double()
    for layer in (decoder[0], decoder[3], conv, bn):
        parametrize.register_parametrization(layer, "weight", Counted())
    x, image = torch.randn(2, 4, 4, 4).double(), torch.rand(2, 3, 8, 8).double()
    Counted.calls = 0
    ops.reconstruction_loss(x, image, decoder, impl=impl)
    assert Counted.calls == 2
    ops.norm_relu_pool(x, bn, conv=conv, impl=impl)
    assert Counted.calls == 4


def test_a_named_implementation_refuses_a_classifier_of_another_class(cpu):
    net = Classifier(4, 5, impl="cpu")
    own_class(net.fc)
    with pytest.raises(ValueError, match="linear_cross_entropy: impl='cpu' cannot run the last layer"):
        list(net.terms(torch.randn(2, 4, 3, 3), None, torch.tensor([0, 1])))


def test_hooks_of_a_head_run_in_a_step():
    """In the place of its call, without the number of right rows."""
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 3, "greedy")
    heads = [loss.aux_classifier for loss in net.local_losses[:2]]
    h, label = torch.randn(4, 16, 8, 8), torch.tensor([0, 1, 2, 3])
    expected = run_loss(heads[0], h, label)
    assert expected[1] is not None
    heads[0].register_forward_hook(lambda _, given, loss: 3 * loss)
    loss, correct = run_loss(heads[0], h, label)
    assert torch.equal(loss, 3 * expected[0]) and correct is None
    trainer = infopro_fast.LocalTrainer(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    metrics = trainer.step(torch.randn(4, 3, 32, 32), label)
    assert "module1/greedy" in metrics and "module1/greedy_correct" not in metrics
    assert "module2/greedy_correct" in metrics


@pytest.mark.parametrize("change", ("activation", "hook", "parametrised"))
def test_a_batch_norm_that_does_more_is_not_converted(change):
    """SyncBatchNorm would lose it."""

    class Rectified(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    norm = Rectified(4) if change == "activation" else nn.BatchNorm2d(4)
    if change == "hook":
        norm.register_forward_hook(lambda _, x, y: 2 * y)
    if change == "parametrised":
        parametrize.register_parametrization(norm, "weight", Scaled())
    with pytest.raises(ValueError, match="expected a batch norm whose call runs nothing else, which"):
        convert_sync_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), norm))
    assert type(convert_sync_batch_norm(nn.Sequential(nn.BatchNorm2d(4)))[0]) is SyncBatchNorm


def test_hooks_of_a_networks_end_run_in_training():
    """The last layers of a traced network are run, as when it predicts."""
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5))
    net = infopro_fast.build(net, 2, "greedy", image_size=16)
    net.classifier.register_forward_hook(lambda _, x, y: 3 * y)
    image, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    trainer = infopro_fast.LocalTrainer(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    expected = F.cross_entropy(net(image), label)
    compare.assert_close(trainer.step(image, label)["loss"], expected.detach())
