"""Networks of all kinds as chains: the same layers, names and numbers; cuts, and errors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast.modules import chain
from infopro_fast.modules.imagenet import units_and_tail


def conv(inplanes, planes, stride=1):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 3, stride, 1), nn.BatchNorm2d(planes), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.body = conv(planes, planes)

    def forward(self, x):
        return F.relu(x + self.body(x))


class WrittenOut(nn.Module):
    """Layers in attributes; the forward has a residual sum and a flatten."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = (
            conv(3, 8, 2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            conv(8, 16, 2),
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, image):
        x = self.first(image)
        x = F.relu(self.a(x)) + self.b(x)
        x = self.last(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.up, self.head = (
            conv(3, 8),
            conv(8, 8, 2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 4, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, image):
        a = self.down1(image)
        b = self.up(self.down2(a))
        return self.pool(self.head(torch.cat([a, b], 1))).flatten(1)


def sequential():
    return nn.Sequential(
        conv(3, 8),
        Residual(8),
        conv(8, 16, 2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize(
    "make, modules", [(sequential, 4), (sequential, 2), (WrittenOut, 3), (WrittenOut, 1)]
)
def test_the_split_network_is_the_network(make, modules):
    """The same function of the same parameters under the same names, in training and evaluation."""
    net = make().double()
    image = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    loss = "none" if modules == 1 else "softmax"
    split = infopro_fast.build(net, modules, loss, image_size=16, image_mean=None, image_std=None)
    assert len(split.stages) == modules
    names = split.released_state_dict()
    for name, tensor in net.state_dict().items():
        assert names[name].data_ptr() == tensor.data_ptr(), name
        assert torch.equal(names[name], tensor)
    for mode in (True, False):
        net.train(mode), split.train(mode)
        assert torch.equal(net(image), split(image))


def test_it_trains_and_keeps_its_weights():
    net = sequential()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    split = infopro_fast.build(net, 3, "contrast", lambdas=(1, 1, 1, 1), image_size=16)
    assert all(
        torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items()
    )  # nothing drawn anew
    trainer = infopro_fast.LocalTrainer(split, lambda params: torch.optim.SGD(params, lr=0.1))
    image, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    metrics = trainer.step(image, label)
    infopro_fast.trainer.check_finite(metrics)
    assert {"module1/reconstruction", "module2/contrast", "loss"} <= metrics.keys()
    changed = {
        name
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point() and not torch.equal(before[name], tensor)
    }
    zero = {
        "0.0.bias",
        "1.body.0.bias",
        "2.0.bias",
        "3.body.0.bias",
    }  # in front of a batch norm: no gradient but rounding
    assert changed | zero >= {name for name, _ in net.named_parameters()}


def test_positions_and_names():
    units, tail, _ = units_and_tail(sequential(), (16, 16))
    assert [(unit.position, unit.label) for unit in units] == [((0, i), str(i)) for i in range(4)]
    assert [(unit.channels, unit.size) for unit in units] == [
        (8, (16, 16)),
        (8, (16, 16)),
        (16, (8, 8)),
        (16, (8, 8)),
    ]
    assert [link.name for link in tail] == ["4", "5", "6"]
    for cuts in ([(0, 1), (0, 2)], ["1", "2"], ["1", (0, 2)]):
        assert infopro_fast.build(sequential(), cuts=cuts, local_loss="softmax", image_size=16).cuts == (
            (0, 1),
            (0, 2),
        )
    nested = nn.Sequential(conv(3, 8), nn.Sequential(Residual(8), Residual(8)), *list(sequential())[2:])
    found, _, _ = units_and_tail(nested, (16, 16))
    assert [(unit.position, unit.label) for unit in found] == [
        ((0, 0), "0"), ((1, 0), "1.0"), ((1, 1), "1.1"), ((2, 0), "2"), ((2, 1), "3"),
    ]


def test_a_residual_sum_is_not_cut():
    """Inside a + b two tensors are alive: the stretch stays whole, and its layers are the network's."""
    net = WrittenOut()
    units, _, _ = units_and_tail(net, (16, 16))
    assert [unit.label for unit in units] == ["first", "add", "last"]
    own, fc = {id(p) for p in net.parameters()}, {id(p) for p in net.fc.parameters()}
    assert {id(p) for unit in units for p in unit.block.parameters()} == own - fc


class TwoOutputs(WrittenOut):
    def forward(self, image):
        x = self.first(image)
        return {"out": x, "aux": x}


class TwoInputs(WrittenOut):
    def forward(self, image, extra):
        return self.fc(self.first(image).mean((2, 3)) + extra)


class Branching(WrittenOut):
    def forward(self, image):
        return self.first(image) if image.sum() > 0 else self.a(image)


class OtherInTraining(WrittenOut):
    def forward(self, image):
        return super().forward(image + 1 if self.training else image)


def hooked():
    net = sequential()
    net.register_forward_hook(lambda *_: None)
    return net


def own_forward():
    net = sequential()
    net.forward = lambda x, run=net.forward: run(2 * x)
    return net


def fails():
    return nn.Sequential(
        conv(3, 8), nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.mark.parametrize(
    "make, kwargs, message",
    [
        (
            UNet,
            {"modules": 4},
            "modules: UNet can be cut into 3 at most, got 4: not after down2, since down1 is needed later",
        ),
        (
            UNet,
            {"cuts": ["down2"]},
            "cuts: no module of UNet can end with 'down2': down1 is needed later, by cat",
        ),
        (
            sequential,
            {"cuts": ["7"]},
            r"no module of Sequential can end with '7'; expected one of \('0', '1', '2'\)",
        ),
        (
            TwoOutputs,
            {},
            "TwoOutputs cannot be split: TwoOutputs: expected one tensor as its output, got .*dict",
        ),
        (TwoInputs, {}, "TwoInputs: expected a forward of one tensor: missing a required argument: 'extra'"),
        (Branching, {}, "Branching: its forward cannot be traced .*control flow"),
        (OtherInTraining, {}, "OtherInTraining: its forward is not the same in training and in evaluation"),
        (hooked, {}, "Sequential: has forward hooks"),
        (own_forward, {}, "Sequential: has a forward in place of its class's, which a split network would"),
        (fails, {}, r"Sequential cannot be split: 1: failed on \(2, 8, 16, 16\): RuntimeError"),
        (
            lambda: nn.Sequential(conv(3, 8), conv(8, 4)),
            {},
            r"ends in class scores \(N, classes\), got \(N, 4, 16, 16\)",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), {}, r"no block gives a map; 0: .*N, 768"),
        (sequential, {"num_classes": 7}, "num_classes: Sequential has 5 classes, got 7"),
        (sequential, {"net_config": "1c2f"}, "the auxiliary nets of Sequential have no such settings"),
    ],
)
def test_what_cannot_be_split_says_why(make, kwargs, message):
    with pytest.raises(ValueError) as caught:
        infopro_fast.build(
            make(),
            **{
                "modules": None if "cuts" in kwargs else 2,
                "local_loss": "softmax",
                "image_size": 16,
                **kwargs,
            },
        )
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "vgg11_bn", "convnext_tiny", "efficientnet_b0"])
def test_torchvision(name):
    """On the meta device: every weight is in the chain under its own name."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = getattr(models, name)()
        split = infopro_fast.build(net, 3, "softmax", image_size=224)
    names = split.released_state_dict()
    assert {k: v.shape for k, v in net.state_dict().items()}.items() <= {
        k: v.shape for k, v in names.items()
    }.items()
    assert split(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_timm(name):
    """Networks unknown to this package: in 3 modules the same numbers, and every module trains."""
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False, num_classes=7).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = net(image)
    split = infopro_fast.build(net, 3, "softmax", lambdas=(1, 1, 1, 1), image_size=64).eval()
    assert len(split.stages) == 3 and torch.equal(split(image), expected)
    assert net.state_dict().keys() <= split.released_state_dict().keys()
    trainer = infopro_fast.LocalTrainer(split, lambda params: torch.optim.SGD(params, lr=0.1))
    before = copy.deepcopy(split.stages)
    infopro_fast.trainer.check_finite(trainer.step(image, torch.tensor([0, 6])))
    for stage, old in zip(split.stages, before):  # not all: timm's blocks begin with a norm of weight 0
        assert any(not torch.equal(p, q) for p, q in zip(stage.parameters(), old.parameters()))


@pytest.mark.parametrize("change", ("forward hook", "backward pre-hook", "method"))
def test_a_changed_container_is_not_entered(change):
    """Its parts alone would be another network."""
    inner = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))
    if change == "forward hook":
        inner.register_forward_hook(lambda _, x, y: 2 * y)
    elif change == "backward pre-hook":
        inner.register_full_backward_pre_hook(lambda _, g: (2 * g[0],))
    else:
        inner.forward = lambda x, run=inner.forward: 2 * run(x)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    net = nn.Sequential(conv(3, 8), inner, *end)
    links = chain.trace(net).links
    assert [link.name for link in links][:2] == ["0", "1"] and links[1].module is inner
    x = torch.randn(2, 3, 16, 16)
    expected = net(x)
    assert torch.equal(infopro_fast.build(net, 2, "greedy", image_size=16)(x), expected)
