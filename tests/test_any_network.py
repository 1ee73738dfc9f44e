"""Thirty classifiers that the package has never heard of, of torchvision and timm, in four local modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast.modules import chain, features
from infopro_fast.modules.infopro_l import InfoProL

# The smallest network of each kind, and the smallest image that it takes in four modules.
TORCHVISION = {
    "resnet18": 32, "resnext50_32x4d": 32, "convnext_tiny": 32, "efficientnet_b0": 32,
    "mobilenet_v3_small": 32, "vgg11": 32, "densenet121": 32, "regnet_y_400mf": 32, "shufflenet_v2_x0_5": 32,
    "vit_b_16": 32, "swin_t": 32, "swin_v2_t": 32, "maxvit_t": 224,
}
TIMM = {
    "resnet10t": 64, "convnext_atto": 64, "efficientnet_lite0": 64, "vit_tiny_patch16_224": 32,
    "deit_tiny_patch16_224": 32, "eva02_tiny_patch14_224": 28, "beit_base_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 56, "swinv2_tiny_window8_256": 64, "maxvit_rmlp_pico_rw_256": 64,
    "mixer_s32_224": 64, "hiera_tiny_224": 224, "mambaout_femto": 64, "levit_128s": 224, "poolformer_s12": 64,
    "coatnet_pico_rw_224": 64, "fastvit_t8": 64,
}
# Built for one size of image.
SIZED = ("vit", "deit", "eva", "beit", "swin", "maxvit_rmlp", "mixer", "coatnet")


def network(library: str, name: str, size: int, **options) -> nn.Module:
    module = pytest.importorskip(library)
    if library == "torchvision":
        options |= {"image_size": size} if name.startswith("vit") else {}
        return getattr(module.models, name)(num_classes=10, **options)
    options |= {"img_size": size} if name.startswith(SIZED) else {}
    return module.create_model(name, pretrained=False, num_classes=10, **options)


CASES = [("torchvision", *case) for case in TORCHVISION.items()] + [("timm", *case) for case in TIMM.items()]


@pytest.mark.parametrize("library, name, size", CASES, ids=lambda value: str(value))
@pytest.mark.fast(6)
def test_it_is_cut_in_four(library, name, size):
    """The same weights and the same logits to the bit; one step changes every module. Prints a row."""
    torch.manual_seed(0)
    net = network(library, name, size).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = net(image)
    options = {"lambdas": (1, 1, 1, 1), "num_classes": 10, "image_size": size}
    split = infopro_fast.build(net, 4, "softmax", **options).eval()
    with torch.no_grad():
        assert torch.equal(split(image), expected)
    own, found = net.state_dict(), split.released_state_dict()
    assert all(found[key].data_ptr() == own[key].data_ptr() for key in own)
    before = copy.deepcopy(split.stages), copy.deepcopy(split.classifier)
    trainer = infopro_fast.LocalTrainer(split, lambda params: torch.optim.SGD(params, lr=0.1))
    infopro_fast.trainer.check_finite(trainer.step(image, torch.tensor([1, 2])))
    now = [*split.stages[:-1], split.classifier]  # where its weights begin at zero, no gradient is before it
    for module, old in zip(now, [*before[0][:-1], before[1]]):
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), old.parameters()))
    outputs = [loss.output for loss in split.local_losses[:-1]]
    maps = ", ".join("x".join(map(str, (one.channels, *one.size))) for one in outputs)
    print(f"{library:11} {name:29} {size:3}  {sum(map(len, split.stages)):3} blocks  {maps}")


@pytest.mark.parametrize("name", ["vit_tiny", "eva02", "swin_tiny", "mixer", "hiera", "mambaout", "levit"])
def test_the_maps_are_those_of_timm(name):
    """timm's `forward_intermediates` gives maps of its networks too. They are among those of the links."""
    name, size = next(case for case in TIMM.items() if case[0].startswith(name))
    net = network("timm", name, size).eval()
    links = chain.with_shapes(chain.trace(net).links, (size, size))
    found, _ = features.found(net, [(link.name, link.shape) for link in links], (size, size))
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        expected, maps = net.forward_intermediates(x, intermediates_only=True), []
        for link, one in zip(links, found):
            x = link.module(x)
            maps += [one.as_map(x)] if one else []
    for given in expected:
        assert any(torch.equal(given, one) for one in maps)


@pytest.mark.parametrize("shape, prefix, C", [((2, 4, 6, 5), 0, 5), ((2, 24, 5), 0, 5), ((2, 27, 5), 3, 5)])
def test_a_map_is_a_view(shape, prefix, C):
    """Pixel (y, x) is row y w + x after the class and register tokens; nothing is copied."""
    x = torch.randn(shape)
    given = features.Features(C, (4, 6), prefix).as_map(x)
    assert given.shape == (2, C, 4, 6)
    assert given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    rows = x.flatten(1, -2)[:, prefix:]
    assert torch.equal(given[1, :, 2, 3], rows[1, 2 * 6 + 3])


class Named(nn.Module):
    """Has the attributes by which a network says what its tokens are."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "shapes, image_size, expected, attributes",
    [
        ([(2, 197, 8)], (224, 224), [(8, (14, 14), 1)], {}),
        ([(2, 196, 8)], (224, 224), [(8, (14, 14), 0)], {}),
        ([(2, 201, 8)], (224, 224), [(8, (14, 14), 5)], {"num_prefix_tokens": 5}),
        ([(2, 9, 8), (2, 8, 8)], (16, 32), [(8, (2, 4), 1), (8, (2, 4), 0)], {"num_prefix_tokens": 1}),
        ([(2, 10, 8)], (96, 96), [None], {}),  # 3 x 3 + 1 or 2 x 2 + 6
        ([(2, 10, 8)], (96, 96), [(8, (3, 3), 1)], {"num_prefix_tokens": 1}),
        ([(2, 12, 8)], (32, 32), [None], {"num_prefix_tokens": 0}),
        ([(6, 49, 8)], (224, 224), [None], {}),  # three windows an image
        ([(2, 8, 4, 4), (2, 4, 4, 8)], (32, 32), [(8, (4, 4), None), (8, (4, 4), 0)], {}),
        ([(2, 8, 9, 9), (2, 8, 8, 8)], (32, 32), [(8, (9, 9), None), (8, (8, 8), None)], {}),
        ([(2, 9, 8, 8), (2, 8, 8, 8), (2, 4, 4, 9)], (32, 32), [(9, (8, 8), None), None, (9, (4, 4), 0)], {}),
        ([(2, 8, 1, 1), (2, 8)], (32, 32), [None, None], {}),
    ],
)
def test_what_is_a_map(shapes, image_size, expected, attributes):
    outputs = [(str(i), shape) for i, shape in enumerate(shapes)]
    found, reasons = features.found(Named(**attributes), outputs, image_size)
    assert [one and one[:3] for one in found] == expected
    assert list(reasons) == [str(i) for i, one in enumerate(expected) if one is None]


class Block(nn.Module):
    """Attention and a perceptron, with dropout and stochastic depth; refuses a mask."""

    def __init__(self, C):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True, dropout=0.3)
        self.mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU(), nn.Dropout(), nn.Linear(C, C))
        self.depth = pytest.importorskip("torchvision").ops.StochasticDepth(0.3, "row")

    def forward(self, x, mask=None, scale=1.0):
        assert mask is None
        y = self.norm(x)
        x = x + self.depth(self.attention(y, y, y, need_weights=False)[0]) * scale
        return F.dropout(x + self.depth(self.mlp(x)), 0.3, training=self.training)


class Encoder(nn.Module):
    def __init__(self, C, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(C) for _ in range(depth))

    def forward(self, x, mask=None, *, scale):
        for block in self.blocks:
            x = block(x, mask, scale=scale)
        return x


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels, a class and a register token; hands constants down to its blocks."""

    def __init__(self, C=16, depth=3, grid=4):
        super().__init__()
        self.embed, self.positions = nn.Conv2d(3, C, 4, 4), nn.Parameter(torch.randn(1, grid * grid, C))
        self.first, self.encoder = nn.Parameter(torch.randn(1, 2, C)), Encoder(C, depth)
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 5)

    def forward(self, image, mask=None, scale=0.5):
        x = self.embed(image).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = self.encoder(x, mask, scale=scale)
        return self.head(self.norm(x)[:, 0])


IMAGE, LABEL = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])


def cut(net, *args, **options):
    return infopro_fast.build(net, *args, image_size=16, lambdas=(1, 1, 1, 1), **options)


def test_constants_and_containers():
    """Arguments with defaults are constants, in the network and in what it calls; containers are entered."""
    net = Transformer()
    split = cut(net, 4, "softmax")
    assert [len(stage) for stage in split.stages] == [1, 2, 2, 2]  # embedding, then half a block at a time
    assert [one.output[:3] for one in split.local_losses[:-1]] == [(16, (4, 4), 2)] * 3
    assert split.released_state_dict().keys() > net.state_dict().keys()
    for mode in (True, False):
        net.train(mode), split.train(mode)
        torch.manual_seed(1)
        expected = net(IMAGE)
        torch.manual_seed(1)
        assert torch.equal(split(IMAGE), expected)


def test_the_next_module_gets_tokens_and_the_local_loss_the_map():
    split = cut(Transformer(), 2, "softmax")
    trainer = infopro_fast.LocalTrainer(split, lambda params: torch.optim.SGD(params, lr=0.0))
    seen = {}
    split.stages[1].register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))
    head = split.local_losses[0].aux_classifier.head
    head.register_forward_pre_hook(lambda _, args: seen.update(map=args[0]))
    head[0].register_forward_pre_hook(lambda _, args: seen.update(map=args[0]))
    trainer.step(IMAGE, LABEL)
    assert seen["tokens"].shape == (4, 18, 16)
    assert torch.equal(seen["map"], seen["tokens"][:, 2:].transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("how", ["block", "sqrt"])
@pytest.mark.parametrize("loss", ["softmax", "infopro_l"])
def test_a_second_forward_draws_the_same_numbers(how, loss):
    """Dropout and stochastic depth: gradients with recomputation are the same bits."""
    torch.manual_seed(0)
    net, found = Transformer(), {}
    for recompute in ("none", how):
        split = cut(copy.deepcopy(net), 3, loss, recompute=recompute)
        torch.manual_seed(1)
        for local_loss in split.local_losses[:-1]:
            for module in local_loss.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        trainer = infopro_fast.LocalTrainer(split, lambda params: torch.optim.SGD(params, lr=1.0))
        trainer.step(IMAGE, LABEL)
        found[recompute] = [p.detach().clone() for p in split.parameters()], torch.random.get_rng_state()
    assert all(torch.equal(p, q) for p, q in zip(found["none"][0], found[how][0]))
    assert torch.equal(found["none"][1], found[how][1])
    assert any(not torch.equal(p, q) for p, q in zip(found["none"][0], net.parameters()))


def test_infopro_l_reconstructs_the_tokens_that_a_module_is_given():
    split = cut(Transformer(), 3, "infopro_l")
    first, second = split.local_losses[:2]
    assert isinstance(second, InfoProL) and first.input is None and second.input == first.output
    assert first.decoder.size == (16, 16) and second.decoder.size == (4, 4)
    given, out = torch.randn(4, 18, 16), torch.randn(4, 18, 16)
    value = next(second.on_map(out, given, LABEL)).loss
    maps = [t[:, 2:].transpose(1, 2).reshape(4, 16, 4, 4) for t in (out, given)]
    assert torch.equal(value, second.decoder(*maps))
    again = given.clone()
    again[:, :2] = 7  # no part of the target
    assert torch.equal(value, next(second.on_map(out, again, LABEL)).loss)


def test_the_layers_of_a_users_network_keep_their_memory_format():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 5))
    split = cut(net, 2, "softmax")
    assert net[0].weight.is_contiguous() and net[1].weight.is_contiguous()
    assert split.local_losses[0].decoder.decoder[-2].weight.is_contiguous(memory_format=torch.channels_last)


class Folded(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (-1, 2)).flatten(2)


def test_places_without_a_map():
    """A module that ends there is refused by name, and no other one is made to end there."""
    folded = nn.Sequential(nn.Conv2d(6, 6, 1), Folded())
    body = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 1), folded
    net = nn.Sequential(*body, nn.Linear(128, 128), nn.Flatten(), nn.Linear(384, 5))
    with pytest.raises(ValueError, match=r"can end with '2': it gives \(N, 3, 128\), which is no map"):
        cut(net, cuts=["2"], local_loss="softmax")
    with pytest.raises(ValueError, match=r"into 2 at most, got 3: not after 2, since it gives \(N, 3, 128\)"):
        cut(net, 3, "softmax")


def test_tokens_that_may_be_two_maps():
    """Either 3 x 3 patches and 2 tokens, or 2 x 2 and 7: the network says which."""
    net = Transformer(grid=3)
    with pytest.raises(ValueError, match=r"after cat, since it gives \(N, 11, 16\), which may be two .*maps"):
        infopro_fast.build(net, 2, "softmax", image_size=12)
    net.num_prefix_tokens = 2
    split = infopro_fast.build(net, 2, "softmax", image_size=12)
    assert split.local_losses[0].output[:3] == (16, (3, 3), 2)
