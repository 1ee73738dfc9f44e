"""`build`: slices of the authors' network with their names, and contradictory arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast.modules import LOCAL_LOSSES
from infopro_fast.modules.local_loss import interpolate_lambdas
from infopro_fast.published import DEFAULT_LAMBDAS, default_lambdas
from tests import golden

TRAIN_STEPS = golden.cases("train_step")


@pytest.mark.parametrize(
    "arch, blocks, parameters",
    [("resnet20", 10, 272474), ("resnet32", 16, 466906), ("resnet44", 22, 661338), ("resnet56", 28, 855770),
     ("resnet110", 55, 1730714)],
)
def test_depths(arch, blocks, parameters):
    # The parameter counts of He et al. 2016 (0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M), with the two conv1x1
    # shortcuts.
    net = infopro_fast.build(arch, modules=1)
    assert len(net.stages) == 1 and len(net.stages[0]) == blocks
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("case", TRAIN_STEPS, ids=lambda c: f"{c['arch']}-{c['modules']}-{c['loss_mode']}")
def test_released_names(case):
    loss = "contrast" if case["loss_mode"] == "contrast" else "softmax"
    net = infopro_fast.build(case["arch"], case["modules"], loss, balanced=case["balanced"])
    assert len(net.stages) == len(net.local_losses) == case["modules"]
    names = {name for name in net.released_state_dict() if not name.endswith("num_batches_tracked")}
    assert names == case["grads"].keys() | case["buffers"].keys()
    assert len(net.released_state_dict()) == len(net.state_dict())


def test_stages_are_slices_of_one_network():
    whole = infopro_fast.build("resnet20", modules=1).eval()
    image = torch.randn(3, 3, 32, 32)
    for modules in (2, 5, 10):
        net = infopro_fast.build("resnet20", modules, "greedy").eval()
        state = net.released_state_dict()
        net.load_released_state_dict(state | whole.released_state_dict())
        assert torch.equal(net(image), whole(image))


def test_forward_is_the_written_out_network():
    net = infopro_fast.build("resnet20", modules=3).double().eval()
    state = net.released_state_dict()

    def conv_norm(x, conv, norm, stride=1):
        x = F.conv2d(
            x, state[f"{conv}.weight"], stride=stride, padding=state[f"{conv}.weight"].shape[-1] // 2
        )
        return F.batch_norm(
            x, *(state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        )

    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = conv_norm(image, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2")
            x = (
                y
                + (conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if stride == 2 else x)
            ).relu()
    logits = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(net(image), logits)


def test_initialised_as_released():
    torch.manual_seed(0)
    net = infopro_fast.build("resnet110", modules=16)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            std = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            # The standard deviation of n normal numbers is off by std / sqrt(2 n): five of those.
            assert abs(module.weight.std().item() / std - 1) < 5 / math.sqrt(2 * module.weight.numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


# ------------------------------------------------------------------------------------------------------------
# Released checkpoints


def test_released_state_dict_round_trip():
    torch.manual_seed(1)
    source, target = (infopro_fast.build("resnet20", modules=4) for _ in range(2))
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    released = {
        f"module.{name}": tensor.clone() for name, tensor in source.released_state_dict().items()
    }  # nn.DataParallel's names
    target.load_released_state_dict(released)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_loading_is_strict_and_all_or_nothing():
    net = infopro_fast.build("resnet20", modules=2)
    state = {name: tensor.clone() + 1 for name, tensor in net.released_state_dict().items()}
    before = {name: tensor.clone() for name, tensor in net.released_state_dict().items()}
    del state["layer2.1.bn1.bias"]
    state["layer4.0.conv1.weight"] = torch.zeros(1)
    state["fc.bias"] = torch.zeros(100)
    with pytest.raises(ValueError) as caught:
        net.load_released_state_dict(state)
    message = str(caught.value)
    assert "missing layer2.1.bn1.bias" in message and "unexpected layer4.0.conv1.weight" in message
    assert "fc.bias: expected (10,), got (100,)" in message
    whole = {name: tensor + 1 for name, tensor in before.items()}
    for wrong, message in (
        (whole | {"fc.bias": [1.0] * 10}, "fc.bias: expected a tensor, got list"),
        (whole | {0: torch.zeros(1)}, "expected tensors by name, got dict"),
        (list(whole.values()), "expected tensors by name, got list"),
    ):
        with pytest.raises(ValueError, match=f"load_released_state_dict: {message}"):
            net.load_released_state_dict(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.released_state_dict().items())


# ------------------------------------------------------------------------------------------------------------
# Weights of the local losses


def test_interpolation_is_the_released_one():
    assert [interpolate_lambdas((5, 0.05, 0.2, 0.5), k, 16) for k in (0, 14)] == [(5, 0.05), (0.2, 0.5)]
    middle = interpolate_lambdas((5, 0.05, 0.2, 0.5), 7, 16)
    assert middle == pytest.approx((2.6, 0.275))
    assert interpolate_lambdas((5, 1, 0, 0), 0, 2) == (5, 1)


def test_lambdas_default_to_the_published_ones():
    net = infopro_fast.build("resnet32", modules=4)
    weights = [(loss.reconstruction_weight, loss.task_weight) for loss in list(net.local_losses)[:-1]]
    assert weights == [(6, 0), (3.5, 1), (1, 2)]
    assert default_lambdas("resnet110", 3, "contrast", balanced=True, image_size=96) == (20, 0.5, 5, 2)
    assert default_lambdas("resnet32", 4, "softmax", balanced=False, image_size=32) == DEFAULT_LAMBDAS
    assert default_lambdas("resnet56", 4, "contrast", balanced=False, image_size=32) == DEFAULT_LAMBDAS
    cut = infopro_fast.build(
        "resnet32", cuts=[(1, 0), (2, 0), (3, 0)]
    )  # not the published split, so not its weights
    assert (cut.local_losses[0].reconstruction_weight, cut.local_losses[0].task_weight) == DEFAULT_LAMBDAS[:2]


def test_number_of_modules_follows_from_the_rest():
    assert len(infopro_fast.build("resnet20").stages) == 4
    assert len(infopro_fast.build("resnet20", local_loss="none").stages) == 1
    assert infopro_fast.build("resnet20", cuts=[(1, 1)]).cuts == ((1, 1),)


@pytest.mark.parametrize("local_loss, config", [("greedy", "0c1f"), ("softmax", "1c2f")])
def test_default_head(local_loss, config):
    net = infopro_fast.build("resnet20", 2, local_loss)
    assert net.local_losses[0].aux_classifier.net_config == config


@pytest.mark.parametrize("modules", [2, 10])
@pytest.mark.parametrize("local_loss", [name for name in LOCAL_LOSSES if name != "none"])
def test_every_local_loss_at_other_image_sizes(local_loss, modules):
    small = {} if local_loss in ("dgl", "auglocal") else {"feature_dim": 8, "widen": 0.5}
    net = infopro_fast.build("resnet20", modules, local_loss, num_classes=3, image_size=20, **small)
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
    metrics = trainer.step(torch.randn(4, 3, 20, 20), torch.tensor([0, 1, 2, 0]))
    infopro_fast.trainer.check_finite(metrics)
    assert {name.split("/")[0] for name in metrics} == {f"module{k}" for k in range(1, modules)} | {
        "loss",
        "correct",
    }


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"arch": "resnet19"}, r"arch: expected one of \('resnet20'"),
        ({"local_loss": "infonce"}, "local_loss: expected one of"),
        (
            {"local_loss": "none", "modules": 4},
            "local_loss='none' trains end to end: expected modules=1, got 4",
        ),
        ({"modules": 17}, "modules: expected 1 to 16 for resnet32"),
        ({"balanced": True, "cuts": [(1, 1)]}, "cuts, balanced: expected one or the other"),
        ({"cuts": [(1, 1)], "modules": 3}, "cuts: expected 2 of them"),
        ({"lambdas": (1, 2)}, "lambdas: expected 4 numbers"),
        ({"lambdas": (1, 2, -1, 0)}, "lambdas: expected 4 numbers"),
        ({"lambdas": (1, 2, math.nan, 0)}, "lambdas: expected 4 numbers"),
        ({"lambdas": (1, 1, 1, 1), "local_loss": "greedy"}, "lambdas: local_loss='greedy' has no weights"),
        ({"lambdas": (1, 1, 1, 1), "modules": 1}, "lambdas: modules=1 has no local loss"),
        (
            {"lambdas": (5, 0, 0, 0), "modules": 4},
            r"lambdas: \(5, 0, 0, 0\) leave local module 3 of 4 without any loss",
        ),
        ({"net_config": "1c2f", "local_loss": "dgl"}, "net_config: local_loss='dgl' has no such head"),
        ({"widen": 2, "local_loss": "dgl"}, "widen: local_loss='dgl' has no such net, got 2"),
        ({"feature_dim": 64, "local_loss": "none"}, "feature_dim: local_loss='none' has no such net, got 64"),
        (
            {"widen": 2, "local_loss": lambda place: None, "modules": 2},
            "widen: local_loss=.* has no such net, got 2",
        ),
        (
            {"impl": "tpu"},
            r"impl: expected one of \('auto', 'reference', 'cpu', 'triton', 'cuda'\), got 'tpu'",
        ),
        ({"modules": 2.0}, "modules: expected an integer, got 2.0"),
        ({"modules": "4"}, "modules: expected an integer, got '4'"),
        ({"image_size": 32.0}, r"image_size: expected an integer, or two \(height, width\), got 32.0"),
        (
            {"image_size": (32, 32.5)},
            r"image_size: expected an integer, or two \(height, width\), got \(32, 32.5\)",
        ),
        ({"cuts": [1, 2]}, r"cuts: expected pairs \(stage, block\) of integers, or names, got 1"),
        (
            {"cuts": [(1, 0.5)]},
            r"cuts: expected pairs \(stage, block\) of integers, or names, got \(1, 0.5\)",
        ),
        ({"cuts": "layer1.0"}, "cuts: expected a list of .* got 'layer1.0'"),
        ({"cuts": 3}, "cuts: expected a list of .* got 3"),
        ({"net_config": "4c4f"}, "net_config: expected one of"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"image_size": 2}, "image_size: expected at least 4"),
        ({"image_mean": None}, "image_mean, image_std: expected both or neither"),
        ({"image_mean": (0.5,), "image_std": (0.5,)}, "image_mean: expected 3 numbers"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        infopro_fast.build(**{"arch": "resnet32", **kwargs})


# ------------------------------------------------------------------------------------------------------------
# Recompute


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("recompute", ["norm", "block", "sqrt"])
def test_recompute_changes_no_bit(modules, recompute):
    """Losses, gradients (the momentum of a step), weights and statistics are equal; statistics move once."""
    states = []
    for each in ("none", recompute):
        torch.manual_seed(0)
        net = infopro_fast.build("resnet20", modules, recompute=each, impl="reference")
        trainer = infopro_fast.LocalTrainer(
            net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)
        )
        image, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        losses = [trainer.step(image, label)["loss"]]
        momenta = [
            entry["momentum_buffer"].clone()
            for optimizer in trainer.optimizers
            for entry in optimizer.state.values()
        ]
        losses += [trainer.step(image, label)["loss"]]
        states.append(
            {
                **net.state_dict(),
                "losses": torch.stack(losses),
                **{f"gradient {i}": m for i, m in enumerate(momenta)},
            }
        )
    tracked = [
        name for name in states[1] if name.startswith("stages") and name.endswith("num_batches_tracked")
    ]
    assert len(tracked) == 21 and all(
        states[1][name] == 2 for name in tracked
    )  # conv1 and 18 of 9 blocks, 2 shortcuts
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("recompute, kept_blocks", [("block", range(10)), ("sqrt", (0, 3, 6, 9))])
def test_recompute_keeps_only_inputs(recompute, kept_blocks):
    """A stage of 10 blocks keeps the bytes of its blocks' inputs, or of every third block's (sqrt)."""
    N = 4
    net = infopro_fast.build("resnet20", 1, recompute=recompute)
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net.stages[0](torch.randn(N, 3, 32, 32))
    # input of the stem: the image; of block i of the next nine: the output of the one before it
    inputs = [3 * 32 * 32] + [16 * 32 * 32] * 4 + [32 * 16 * 16] * 3 + [64 * 8 * 8] * 2
    assert out.requires_grad and sum(kept.values()) == 4 * N * sum(inputs[i] for i in kept_blocks)


def test_recompute_in_eval_mode_runs_once():
    net = infopro_fast.build("resnet20", 2, recompute="block").eval()
    runs = []
    net.stages[0][1].register_forward_hook(lambda *_: runs.append(1))
    net.stages[0](torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(runs) == 1
    with pytest.raises(ValueError, match="build: recompute: expected one of .*, got 'blocks'"):
        infopro_fast.build("resnet20", 2, recompute="blocks")


def test_a_network_of_pixels_has_a_loss_that_suits_it():
    assert infopro_fast.build("fcn_resnet20").local_losses[0].task == "softmax"
    assert infopro_fast.build("resnet20").local_losses[0].task == "contrast"


def test_another_number_of_classes_than_the_networks_says_what_to_do():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 30 * 30, 7))
    with pytest.raises(ValueError, match="has 7 classes, got 10: leave num_classes out, or give the network"):
        infopro_fast.build(net, 1, num_classes=10, image_size=32)
