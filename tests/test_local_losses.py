"""Local losses: what all have in common, what defines each, and a user's own."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast import cli
from infopro_fast.data import fashion_mnist
from infopro_fast.errors import ConfigError
from infopro_fast.modules import LOCAL_LOSSES, FeatureDecoder, LocalLoss, Place, Term, backbones
from infopro_fast.modules.auglocal import aux_depths, sampled_blocks
from infopro_fast.modules.heads import GlobalAveragePool
from infopro_fast.published import INFOPRO_L_LAMBDAS, WEIGHTED
from infopro_fast.trainer import fit, run_folder
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.step import local_step
from tests import compare, tiny_run
from tests.test_distributed import drive
from tests.test_step import Recorder, recorded_gradients

DOC = Path(__file__).parents[1] / "docs" / "local_losses.md"
LOCAL = [name for name in LOCAL_LOSSES if name != "none"]
LATER = ("infopro_l", "auglocal")
IMAGE, LABEL = (
    torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5)),
    torch.tensor([0, 1, 2, 0, 1, 1]),
)


def build(local_loss, modules=3, **settings) -> infopro_fast.LocalNetwork:
    torch.manual_seed(0)
    weights = {"lambdas": (1, 0.5, 0.5, 1)} if local_loss in WEIGHTED else {}
    return infopro_fast.build("resnet20", modules, local_loss, image_size=16, **{**weights, **settings})


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def gradients(net) -> list[list[torch.Tensor]]:
    """Return the gradients of every stage's parameters, from a step that updates nothing."""
    trainer = infopro_fast.LocalTrainer(net, Recorder)
    trainer.step(IMAGE, LABEL)
    recorded = recorded_gradients(trainer)
    return [[recorded[p][0] for p in stage.parameters()] for stage in net.stages]


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))


# ------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", LOCAL)
def test_a_module_learns_from_its_own_loss_alone(name):
    """Other weights in the auxiliary nets of a module change its gradients, and no bit of others'."""
    base = build(name)
    expected = gradients(copy.deepcopy(base))
    for j in range(3):
        net = copy.deepcopy(base)
        scramble(net.local_losses[j])
        for k, (found, before) in enumerate(zip(gradients(net), expected)):
            same = all(torch.equal(a, b) for a, b in zip(found, before))
            assert same == (k != j), (j, k)


@pytest.mark.parametrize("name", LOCAL)
def test_auxiliary_nets_are_for_training_alone(name):
    net = build(name).eval()
    logits = net(IMAGE)
    for loss in net.local_losses[:-1]:
        for t in [*loss.parameters(), *loss.buffers()]:
            t.data.fill_(torch.nan if t.is_floating_point() else 7)
    assert logits.isfinite().all() and torch.equal(net(IMAGE), logits)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.fast(2)
def test_states_go_round(name):
    """With both kinds of names, a loaded network and its optimizers continue to the same bits."""
    net = build(name)
    trainer = infopro_fast.LocalTrainer(net, sgd)
    trainer.step(IMAGE, LABEL)
    own, released = build(name), build(name)
    for twin in (own, released):
        scramble(twin)
    own.load_state_dict(net.state_dict())
    released.load_released_state_dict(net.released_state_dict())
    assert len(net.released_state_dict()) == len(net.state_dict())
    (stage, block), *_ = net.cuts
    added = {n for n in net.released_state_dict() if n not in build("none", 1).released_state_dict()}
    assert {n.split(".")[0] for n in added if n.split(".")[0].endswith(f"_{stage}_{block}")} == (
        {f"aux_classifier_{stage}_{block}"} | ({f"decoder_{stage}_{block}"} if name in WEIGHTED else set())
    )
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(IMAGE, LABEL)
    for twin in (own, released):
        again = infopro_fast.LocalTrainer(twin, sgd)
        again.load_state_dict(copy.deepcopy(state))
        again.step(IMAGE, LABEL)
        assert all(torch.equal(t, net.state_dict()[n]) for n, t in twin.state_dict().items())


@pytest.mark.parametrize("name", LOCAL)
def test_a_part_of_the_modules_trains_to_the_same_bits(name):
    """As in a pipeline, modules 2 and 3 get the features of module 1; infopro_l needs no image there."""
    net, whole = build(name), build(name)
    trainer = infopro_fast.LocalTrainer(whole, sgd)
    first = infopro_fast.LocalTrainer(net.part(range(0, 1)), sgd, modules=3)
    rest = infopro_fast.LocalTrainer(net.part(range(1, 3)), sgd, first=1, modules=3)
    for step in range(2):
        expected = trainer.step(IMAGE, LABEL)
        features, found = first.step_from(IMAGE, IMAGE, LABEL)
        ended, others = rest.step_from(features, None if name == "infopro_l" else IMAGE, LABEL)
        found |= others
        assert ended is None
        assert found.keys() == expected.keys(), step
        assert all(torch.equal(found[n], expected[n]) for n in found), step
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in net.state_dict().items())


@pytest.mark.slow
def test_infopro_l_in_a_pipeline_of_processes(tmp_path):
    found = drive(tmp_path, "infopro_l")["infopro_l"]
    assert [run["codes"] for run in found.values()] == [[0], [0, 0]], [
        run["errors"] for run in found.values()
    ]
    alone, two = (
        safetensors.torch.load_file(Path(run["run"]) / run_folder.WEIGHTS) for run in found.values()
    )
    assert alone.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in alone.items())


@pytest.mark.parametrize("name", LATER)
@pytest.mark.fast(1)
def test_trains_in_sequence_from_a_cache_and_without_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    found = []
    for cache in (True, False):
        lambdas = (1, 1, 1, 1) if name in WEIGHTED else None
        settings = dict(
            order="sequential", cache=cache, local_loss=name, lambdas=lambdas, epochs=1, warmup=0, shrink=4
        )
        run = fit(tiny_run.config(tmp_path / str(cache), **settings))
        found.append(safetensors.torch.load_file(run / run_folder.WEIGHTS))
    assert found[0].keys() == found[1].keys() and all(
        torch.equal(t, found[1][n]) for n, t in found[0].items()
    )


@pytest.mark.parametrize("name", LATER)
def test_command_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    run = tmp_path / "run"
    flags = "--arch resnet20 --modules 3 --epochs 1 --warmup 0 --batch-size 16 --shrink 4 --threads 1".split()
    more = ["--aux-depth", "2"] if name == "auglocal" else []
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--local-loss", name, *flags, *more, "--out", str(run)])
    assert stop.value.code in (0, None), capsys.readouterr().err
    config = run_folder.read_config(run)
    assert (config.local_loss, config.aux_depth, config.lambdas) == (
        ("auglocal", 2, None) if name == "auglocal" else ("infopro_l", None, INFOPRO_L_LAMBDAS)
    )
    terms = {
        "auglocal": ("auglocal", "auglocal_accuracy"),
        "infopro_l": ("reconstruction", "softmax", "softmax_accuracy"),
    }[name]
    (last,) = run_folder.read_metrics(run, "epoch")
    assert set(last["train"]) == {f"module{k}/{term}" for k in (1, 2) for term in terms} | {
        "loss",
        "accuracy",
    }


# ------------------------------------------------------------------------------------------------------------
# Greedy and DGL: their layers. (That DGL's head computes what its authors' does: test_modules)


def test_greedy_has_pooling_and_a_linear_layer():
    loss = build("greedy").local_losses[0]
    assert [type(layer) for layer in loss.aux_classifier.head] == [GlobalAveragePool, nn.Flatten, nn.Linear]
    features = torch.randn(6, 16, 16, 16)
    (term,) = loss.terms(features, IMAGE, LABEL)
    logits = loss.aux_classifier.head[-1](features.mean((2, 3)))
    compare.assert_close(term.loss, F.cross_entropy(logits, LABEL))
    assert term.weight == 1 and sum(p.numel() for p in loss.trained_parameters()) == 10 * 16 + 10


def test_dgl_pools_first_and_has_no_convolution_of_a_neighbourhood():
    """MLP-SR: pooling to a quarter of the side, 1x1 convolutions, a perceptron on 2x2."""
    loss = build("dgl").local_losses[0]
    layers = list(loss.aux_classifier.head)
    assert type(layers[0]) is nn.AdaptiveAvgPool2d and layers[0](torch.randn(1, 16, 16, 16)).shape == (
        1,
        16,
        4,
        4,
    )
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    linears = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert [(c.kernel_size, c.stride, c.out_channels) for c in convs] == [((1, 1), (1, 1), 16)] * 3
    assert linears == [(64, 64)] * 3 + [(64, 10)]


# ------------------------------------------------------------------------------------------------------------
# InfoProL: the target is the module's input


def _metrics(net, k, given, image):
    net = copy.deepcopy(net)
    return local_step(
        net.stages[k], net.local_losses[k], Recorder(list(net.stages[k].parameters())), given, image, LABEL
    )[1]


def test_infopro_l_reconstructs_the_input_of_the_module():
    net = build("infopro_l")
    with torch.no_grad():
        h = net.stages[0](IMAGE)
    other = torch.randn_like(IMAGE)
    found, again = _metrics(net, 1, h, IMAGE), _metrics(net, 1, h, other)
    assert set(found) == {"reconstruction", "softmax", "softmax_correct"}
    assert all(torch.equal(found[n], again[n]) for n in found)
    # The loss is against h: with the module's output held, another target gives another loss, and the image
    # is none.
    loss, (C, H) = net.local_losses[1], (h.shape[1], h.shape[2])
    assert loss.wants_input and loss.decoder.decoder[-1].num_features == C and loss.decoder.size == (H, H)
    with torch.no_grad():
        out = net.stages[1](h)
        assert (
            next(loss.terms(out, h, LABEL)).loss
            == found["reconstruction"]
            != next(loss.terms(out, h + h.roll(1, 2), LABEL)).loss
        )
    first = net.local_losses[0].decoder  # of the first module, the image as the network is given it
    assert first.decoder[-1].num_features == 3 and first.size == (16, 16)
    contrast = build("contrast")
    found, again = _metrics(contrast, 1, h, IMAGE), _metrics(contrast, 1, h, other)
    assert found["reconstruction"] != again["reconstruction"]  # InfoPro's is the image


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (3, 5)])
def test_feature_decoder_written_out(size, impl):
    decoder = FeatureDecoder(5, 7, (8, 8), widen=0.5, impl=impl).double()
    features, given = (
        torch.randn(4, 5, *size, dtype=torch.float64),
        3 * torch.randn(4, 7, 8, 8, dtype=torch.float64) + 2,
    )
    p = dict(decoder.named_parameters())
    x = F.interpolate(features, (8, 8), mode="bilinear", align_corners=True)
    x = F.conv2d(x, p["decoder.0.weight"], p["decoder.0.bias"], padding=1)
    x = F.batch_norm(x, None, None, p["decoder.1.weight"], p["decoder.1.bias"], training=True).relu()
    x = F.conv2d(x, p["decoder.3.weight"], padding=1)
    x = F.batch_norm(x, None, None, p["decoder.4.weight"], p["decoder.4.bias"], training=True)
    centered = given - given.mean((0, 2, 3), keepdim=True)
    expected = ((x - centered / ((centered**2).mean() + 1e-5).sqrt()) ** 2).mean()
    compare.assert_close(decoder(features, given), expected)
    assert x.shape[1] == 7 and p["decoder.0.weight"].shape[0] == 6  # max(12, 7) / 2
    assert decoder(features, 100 * given - 5).item() == pytest.approx(
        expected.item(), rel=1e-5
    )  # no matter the input's scale
    with torch.no_grad():  # one that knows nothing
        p["decoder.4.weight"].zero_()
    assert decoder(features, given).item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(
        ValueError, match=r"FeatureDecoder: given: expected maps of \(8, 8\), got \(4, 7, 9, 9\)"
    ):
        decoder(features, torch.zeros(4, 7, 9, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="FeatureDecoder: widen: expected at least"):
        FeatureDecoder(5, 7, (8, 8), widen=0.01)


def test_infopro_l_weights_and_terms_that_do_not_run():
    net = build("infopro_l", 3, lambdas=(2, 0, 0, 3))
    first, second, _ = net.local_losses
    assert [t.name for t in first.terms(torch.randn(6, 16, 16, 16), IMAGE, LABEL)] == ["reconstruction"]
    assert set(first.trained_parameters()) == set(first.decoder.parameters())
    assert set(second.trained_parameters()) == set(second.aux_classifier.parameters())
    assert build("infopro_l", 2, lambdas=None).local_losses[0].reconstruction_weight == INFOPRO_L_LAMBDAS[0]


class PreActivation(nn.Module):
    """A block that writes into its input where ``inplace``."""

    def __init__(self, inplanes: int, inplace: bool):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=inplace), nn.Conv2d(inplanes, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(self.relu(x))


def test_an_input_that_is_overwritten_is_no_target():
    def trainer(inplace: bool) -> infopro_fast.LocalTrainer:
        blocks = [PreActivation(3, False), PreActivation(8, inplace), PreActivation(8, False)]
        chain = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return infopro_fast.LocalTrainer(
            infopro_fast.build(chain, 3, "infopro_l", cuts=["0", "1"], image_size=16), sgd
        )

    infopro_fast.trainer.check_finite(trainer(False).step(IMAGE, LABEL))
    with pytest.raises(ValueError, match="wants the module's input, and the module writes into it"):
        trainer(True).step(IMAGE, LABEL)


def test_infopro_l_is_stable_at_the_learning_rates_of_the_recipes():
    """On images that can be reconstructed, with the runs' momentum, every loss falls."""
    torch.manual_seed(1)
    image = F.interpolate(torch.randn(32, 3, 4, 4), (16, 16), mode="bilinear")
    label = torch.arange(32) % 10
    net = build("infopro_l", 4, lambdas=(5, 1, 5, 1))
    trainer = infopro_fast.LocalTrainer(
        net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    )
    history = [trainer.step(image, label) for _ in range(25)]
    for k in (1, 2, 3):
        assert history[-1][f"module{k}/reconstruction"] < 1 < history[0][f"module{k}/reconstruction"], k


# ------------------------------------------------------------------------------------------------------------
# AugLocal: blocks of later layers, fewer for later modules


@pytest.mark.parametrize("depth, modules", [(1, 16), (2, 16), (3, 16), (6, 55), (9, 2), (4, 3)])
def test_depth_falls_with_the_position(depth, modules):
    depths = aux_depths(depth, modules)
    assert len(depths) == modules - 1 and depths[0] == depth and depths == sorted(depths, reverse=True)
    end = depth if modules == 2 else (depth + 1) / 2  # half the way to 1, as in the authors' scripts
    assert abs(depths[-1] - end) <= 0.5


def test_sampled_blocks_are_later_ones_at_equal_distances():
    for end in range(15):
        for depth in range(1, 8):
            found = sampled_blocks(end, 16, depth)
            steps = [b - a for a, b in zip([end, *found], found)]
            assert (
                len(found) == min(depth, 15 - end)
                and found[-1] == 15
                and min(steps) > 0
                and max(steps) - min(steps) <= 1
            )
    assert sampled_blocks(0, 16, 3) == [5, 10, 15]


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_auglocal_heads_are_made_of_the_networks_later_blocks(depth):
    net = build("auglocal", 10, aux_depth=depth)
    units = backbones.units("resnet20")
    own = {p.data_ptr() for p in net.stages.parameters()}
    counts = []
    for end, (loss, expected) in enumerate(zip(net.local_losses[:-1], aux_depths(depth, 10))):
        *blocks, pool, last = loss.aux_classifier.head
        later = sampled_blocks(end, 10, expected)
        assert [type(block) for block in blocks] == [type(units[i].block) for i in later]
        assert [block.conv2.out_channels for block in blocks] == [units[i].channels for i in later]
        assert type(pool) is GlobalAveragePool and last.in_features == 64
        assert not own & {p.data_ptr() for p in loss.parameters()}
        counts.append(len(blocks))
    assert counts == sorted(counts, reverse=True) and counts[0] == depth and counts[-1] == 1
    first = net.local_losses[0].aux_classifier
    x = torch.randn(2, 16, 16, 16)
    for block in list(first.head)[:-2]:
        x = block(x)
    assert tuple(x.shape) == ((2, 64, 4, 4) if depth > 1 else (2, 64, 8, 8))  # one block halves once


def test_settings_of_auglocal():
    for settings, message in (
        (
            dict(arch="resnet18"),
            "local_loss 'auglocal' takes its blocks from a CIFAR ResNet: expected arch resnet20, .* resnet18",
        ),
        (dict(arch="densenet_bc_100_12"), "takes its blocks from a CIFAR ResNet: .*, got densenet_bc_100_12"),
        (
            dict(arch="fcn_resnet20"),
            "segments images: expected 'softmax', 'greedy' or 'none', got 'auglocal'",
        ),
        (dict(aux_depth=0), "aux_depth: expected an integer of at least 1, got 0"),
        (dict(local_loss="dgl", aux_depth=2), "aux_depth: local_loss='dgl' has no such net, got 2"),
        (dict(net_config="1c2f"), "net_config: local_loss='auglocal' has no such head"),
    ):
        with pytest.raises(ValueError, match=message):
            infopro_fast.build(**{"arch": "resnet20", "modules": 3, "local_loss": "auglocal", **settings})
    for settings, message in (
        (dict(arch="densenet_bc_100_12"), "takes its blocks from a CIFAR ResNet: .*, got densenet_bc_100_12"),
        (dict(dataset="shapes_seg"), "dataset shapes_seg is segmented"),
        (dict(aux_depth=0), "aux_depth: expected an integer of at least 1, got 0"),
        (
            dict(local_loss="greedy", aux_depth=2),
            "aux_depth: local_loss greedy with modules 4 has no such net",
        ),
        (dict(widen=2.0), "widen: local_loss auglocal with modules 4 has no such net"),
        (dict(lambdas=(1, 1, 1, 1)), "lambdas: local_loss auglocal with modules 4 has nothing to weigh"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**{"local_loss": "auglocal", **settings})
    assert (
        TrainConfig(local_loss="auglocal").resolved().aux_depth == 3
        and TrainConfig().resolved().aux_depth is None
    )


# ------------------------------------------------------------------------------------------------------------
# A user's own


def test_the_example_of_the_documentation_trains():
    code, _ = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    scope = {}
    exec(compile(code, str(DOC), "exec"), scope)
    metrics, net = scope["metrics"], scope["net"]
    terms = ("task", "task_correct", "sparsity")
    assert set(metrics) == {*(f"module{k}/{term}" for k in (1, 2) for term in terms), "loss", "correct"}
    assert metrics["module1/task"] < scope["before"]["module1/task"]
    assert sum(name.startswith("sparse_head_") for name in net.released_state_dict()) == 4


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::UserWarning")  # torchao's, of caches
def test_an_optimizer_with_state_of_8_bits():
    pytest.importorskip("torchao.optim")
    _, code = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    scope = {"net": build("contrast", 2), "infopro_fast": infopro_fast}
    exec(compile(code, str(DOC), "exec"), scope)
    losses = [scope["trainer"].step(IMAGE, LABEL)["loss"].item() for _ in range(5)]
    states = [state for o in scope["trainer"].optimizers for state in o.state.values()]
    kept = [type(t).__name__ for state in states for t in state.values()]
    assert losses[-1] < losses[0] and "OptimState8bit" in kept


def test_places():
    seen = []

    class Silent(LocalLoss):
        def terms(self, features, image, label):
            yield Term("mean", 1.0, features.mean(), None)

        def trained_parameters(self):
            return []

        def released_nets(self, stage, block):
            return {}

    def make(place: Place) -> LocalLoss:
        seen.append(place)
        return Silent()

    infopro_fast.build("resnet20", local_loss=make, cuts=[(1, 1), (2, 0)], image_size=16, num_classes=5)
    assert [place._replace(next_blocks=()) for place in seen] == [
        Place(0, 3, 16, (16, 16), 3, (16, 16), (16, 16), 5, 2),
        Place(1, 3, 32, (8, 8), 16, (16, 16), (16, 16), 5, 4),
    ]
    with pytest.raises(
        ValueError, match="local_loss: expected the function to return a LocalLoss, got NoneType"
    ):
        infopro_fast.build("resnet20", 2, lambda place: None)
    with pytest.raises(
        ValueError, match="local_loss: expected one of .* or a function that makes one, got Silent"
    ):
        infopro_fast.build("resnet20", 2, Silent())
    with pytest.raises(ValueError, match="lambdas: local_loss=<function .* has no weights"):
        infopro_fast.build("resnet20", 2, make, lambdas=(1, 1, 1, 1))


def test_the_table_of_the_documentation_has_all():
    rows = re.findall(r"^\| `(\w+)` \|", DOC.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(LOCAL_LOSSES)


# ------------------------------------------------------------------------------------------------------------
# Inside a module, behind it, and after its step


class Inside(LocalLoss):
    """Mean square of the output and, weighted, of a block in the middle."""

    blocks = ("layer1_0",)

    def __init__(self, place):
        super().__init__()
        self.place, self.steps = place, 0

    def terms(self, features, image, label):
        yield Term("end", 1.0, features.square().mean(), None)
        yield Term("middle", 0.3, self.outputs["layer1_0"].square().mean(), None)

    def trained_parameters(self):
        return []

    def released_nets(self, stage, block):
        return {}

    def after_step(self):
        self.steps += 1


@pytest.mark.parametrize("recompute", ["none", "block", "norm"])
def test_a_loss_reaches_into_its_module(recompute):
    torch.manual_seed(0)
    net = infopro_fast.build(
        "resnet20", cuts=[(1, 2)], local_loss=Inside, image_size=8, recompute=recompute
    ).double()
    plain = copy.deepcopy(net.stages[0])
    plain.recompute = "none"
    image, label = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    metrics = infopro_fast.LocalTrainer(net, lambda p: torch.optim.SGD(p, lr=1.0)).step(image, label)
    h = plain.train().layer1_0(plain.stem(image))
    end = plain.layer1_2(plain.layer1_1(h)).square().mean()
    (end + 0.3 * h.square().mean()).backward()
    assert metrics["module1/middle"].item() == pytest.approx(h.square().mean().item(), rel=1e-12)
    moved = {name: p.detach() for name, p in net.stages[0].named_parameters()}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(moved[name], (p - p.grad).detach(), rtol=1e-10, atol=1e-12)
    loss = net.local_losses[0]
    assert loss.steps == 1 and loss.outputs == {}
    assert not any(block._forward_hooks for block in net.stages[0])


def test_a_step_that_raises_leaves_no_outputs_with_its_loss():
    net = infopro_fast.build("resnet20", cuts=[(1, 2)], local_loss=Inside, image_size=8)
    torch.nn.init.constant_(next(net.stages[0].parameters()), torch.nan)
    with pytest.raises(FloatingPointError, match="module 1, "):
        infopro_fast.LocalTrainer(net, lambda p: torch.optim.SGD(p, lr=1.0)).step(
            torch.rand(4, 3, 8, 8), torch.arange(4)
        )
    assert net.local_losses[0].outputs == {}


def test_a_loss_knows_the_next_module():
    net = infopro_fast.build("resnet20", cuts=[(1, 0), (2, 0)], local_loss=Inside, image_size=8)
    for k, loss in enumerate(net.local_losses[:-1]):
        assert loss.place.next_blocks == tuple(net.stages[k + 1])


def test_a_block_that_is_written_into_is_no_output():
    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 3))

    class First(Inside):
        blocks = ("stem",)

    built = infopro_fast.build(net, cuts=[(0, 1)], local_loss=First, image_size=8)
    built.stages[0][1].register_forward_pre_hook(lambda module, given: (given[0].add_(1),))
    with pytest.raises(ValueError, match="wants the output of stem, and the block after it writes into it"):
        infopro_fast.LocalTrainer(built, lambda p: torch.optim.SGD(p, lr=0.1)).step(
            torch.rand(2, 3, 8, 8), torch.arange(2)
        )
