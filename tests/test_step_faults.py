"""What a step refuses, and what it has changed by then; frozen modules."""

import copy
import math

import pytest
import torch
from torch import nn

import infopro_fast
from infopro_fast.modules import PixelClassifier, Tap
from infopro_fast.trainer.settings import recipes

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABEL = torch.tensor([0, 1, 2, 0, 1, 1])
DENSE_IMAGE, DENSE_LABEL = torch.randn(2, 3, 48, 48), torch.zeros(2, 48, 48, dtype=torch.long)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def state(trainer):
    return copy.deepcopy((trainer.net.state_dict(), trainer.state_dict()))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def with_nan(image):
    image = image.clone()
    image[4, 1, 2, 3] = math.nan
    return image


@pytest.mark.parametrize(
    "image, label, error, message",
    [
        (IMAGE.numpy(), LABEL, TypeError, "step: image: expected a tensor, got ndarray"),
        (IMAGE, LABEL.tolist(), TypeError, "step: label: expected a tensor, got list"),
        (IMAGE.to("meta"), LABEL, ValueError, "step: image: expected it on cpu as the network, got meta"),
        (IMAGE, LABEL.to("meta"), ValueError, "step: label: expected it on cpu as the network, got meta"),
        (IMAGE[:, :1], LABEL, ValueError, r"expected \(N, 3, 32, 32\) with N > 0, got \(6, 1, 32, 32\)"),
        (IMAGE[0], LABEL, ValueError, r"step: image: .*, got \(3, 32, 32\)"),
        (IMAGE[..., :31], LABEL, ValueError, r"step: image: .*, got \(6, 3, 32, 31\)"),
        (IMAGE[:0], LABEL[:0], ValueError, r"step: image: .*, got \(0, 3, 32, 32\)"),
        (IMAGE.double(), LABEL, TypeError, "step: image: expected torch.float32 .*, got torch.float64"),
        (IMAGE.to(torch.uint8), LABEL, TypeError, "step: image: expected torch.float32 .*, got torch.uint8"),
        (IMAGE, LABEL[:5], ValueError, r"step: label: expected \(6,\), got \(5,\)"),
        (IMAGE, LABEL[:, None], ValueError, r"step: label: expected \(6,\), got \(6, 1\)"),
        (IMAGE, LABEL.float(), TypeError, "step: label: expected an integer tensor, got torch.float32"),
        (IMAGE, torch.rand(6, 10), ValueError, "step: label: expected integers for the contrastive loss"),
        (IMAGE, LABEL > 0, TypeError, "step: label: expected an integer tensor, got torch.bool"),
        (IMAGE, LABEL + 8, ValueError, r"label: expected integers in \[0, 10\), or -100 for none, got 10"),
        (IMAGE, LABEL - 1, ValueError, r"step: label: expected integers in \[0, 10\), .* got -1"),
        (255 * IMAGE, LABEL, ValueError, r"image \* image_std \+ image_mean: .* in \[0, 1\], got"),
        (with_nan(IMAGE), LABEL, FloatingPointError, "step 2, image: .* a nan or an infinity in image 4"),
    ],
)
def test_a_bad_batch_changes_nothing(image, label, error, message):
    """No weight, optimizer or running statistic, though the last module alone would meet some."""
    trainer = infopro_fast.LocalTrainer(infopro_fast.build("resnet20", 3, lambdas=(0, 1, 1, 1)), sgd)
    trainer.step(IMAGE, LABEL)
    before = state(trainer)
    with pytest.raises(error, match=message) as caught:
        trainer.step(image, label)
    assert "\n" not in str(caught.value) and same(state(trainer), before)
    trainer.step(IMAGE, LABEL)


@pytest.mark.parametrize(
    "label, message",
    [
        (DENSE_LABEL[:, 0], r"expected \(2, H, W\), a label for each pixel, got \(2, 48\)"),
        (DENSE_LABEL + 11, r"expected integers in \[0, 11\), or 255 for none, got 11"),
    ],
)
def test_a_bad_label_of_pixels_changes_nothing(label, message):
    trainer = infopro_fast.LocalTrainer(infopro_fast.build("fcn_resnet20", 2, "softmax"), sgd)
    before = state(trainer)
    with pytest.raises(ValueError, match=f"step: label: {message}"):
        trainer.step(DENSE_IMAGE, label)
    assert same(state(trainer), before)
    trainer.step(DENSE_IMAGE, DENSE_LABEL.clone().fill_(255))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_updates_no_later_weight(accumulate):
    """The module of the loss and later ones keep their weights; with accumulate, a first part's keeps all."""
    net = infopro_fast.build("resnet20", 3, lambdas=(1, 1, 1, 1))
    trainer = infopro_fast.LocalTrainer(net, sgd, accumulate=accumulate)
    trainer.step(IMAGE, LABEL)
    with torch.no_grad():
        bias = net.local_losses[1].decoder.decoder[3].bias
        kept = bias.clone()
        bias.fill_(math.nan)
    before = [copy.deepcopy(dict(stage.named_parameters())) for stage in net.stages]
    with pytest.raises(FloatingPointError, match=r"^step 2, module 2, reconstruction loss: nan$"):
        trainer.step(IMAGE, LABEL)
    moved = [not same(dict(stage.named_parameters()), own) for stage, own in zip(net.stages, before)]
    assert moved == [accumulate == 1, False, False]
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        bias.copy_(kept)
    assert trainer.step(IMAGE, LABEL)["loss"].isfinite()


def test_finite_is_not_looked_for_on_request():
    net = infopro_fast.build("resnet20", 2)
    trainer = infopro_fast.LocalTrainer(net, sgd, check_finite=False)
    assert trainer.step(with_nan(IMAGE), LABEL)["loss"].isnan()


def test_mean_all_counts_ignored_pixels_in_the_networks_own_heads_alone():
    """As the authors' DeepLab, whose local heads average over labelled pixels."""
    found, label = {}, DENSE_LABEL.clone()
    label[:, :20] = 255
    share = (label != 255).double().mean().item()
    for reduction in ("mean", "mean_all"):
        torch.manual_seed(0)
        net = infopro_fast.build("fcn_resnet20", 2, "softmax", pixel_reduction=reduction)
        tap, head = Tap(), nn.Conv2d(64, 11, 1)
        end = PixelClassifier(net.classifier.head, 11, (tap, head, 0.4), reduction=reduction)
        end.train(), tap.train()
        features = tap(torch.randn(2, 64, 24, 24, requires_grad=True))
        auxiliary = list(end.terms(features, None, label))[1].loss.item()
        metrics = infopro_fast.LocalTrainer(net, sgd).step(DENSE_IMAGE, label)
        found[reduction] = [metrics["loss"].item(), auxiliary, metrics["module1/softmax"].item()]
    (loss, auxiliary, local), of_all = found["mean"], found["mean_all"]
    assert of_all == pytest.approx([share * loss, share * auxiliary, local], rel=1e-5)


def test_recipes_of_table_5_take_the_authors_mean():
    rows = {name: row for name, row in recipes.ROWS.items() if name.startswith("table5/") and row.settings}
    assert rows and all(row.settings["pixel_reduction"] == "mean_all" for row in rows.values())


# --------------------------------------------------------------------------------------------------------
# Frozen modules


@pytest.mark.parametrize("nets", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_module_only_runs_forward(frozen, nets):
    """It has no optimizer and no loss; the modules after it learn what they would from its output."""
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 3, lambdas=(1, 1, 1, 1))
    net.stages[frozen].requires_grad_(False)
    net.local_losses[frozen].requires_grad_(not nets)
    trainer = infopro_fast.LocalTrainer(net, sgd)
    assert [optimizer is None for optimizer in trainer.optimizers] == [k == frozen for k in range(3)]
    before, plain = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(True)
    metrics = trainer.step(IMAGE, LABEL)
    assert not any(name.startswith(f"module{frozen + 1}/") for name in metrics)
    for part, old in ((net.stages, before.stages), (net.local_losses, before.local_losses)):
        pairs = [[dict(module.named_parameters()) for module in pair] for pair in zip(part, old)]
        moved = [not same(*pair) for pair in pairs]
        assert moved == [k != frozen for k in range(3)]

    expected = infopro_fast.LocalTrainer(plain, sgd).step(IMAGE, LABEL)
    assert {name: value for name, value in expected.items() if name in metrics} == metrics
    for k in {0, 1, 2} - {frozen}:
        assert same(net.stages[k].state_dict(), plain.stages[k].state_dict())

    trainer.set_learning_rate(0.01)
    other = infopro_fast.LocalTrainer(copy.deepcopy(net), sgd)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for each in (trainer, other):
        each.set_learning_rate(0.01)
        each.step(IMAGE, LABEL)
    assert same(state(trainer), state(other))
    thawed = infopro_fast.LocalTrainer(infopro_fast.build("resnet20", 3), sgd)
    with pytest.raises(ValueError, match=rf"expected the state of frozen modules \[\], got \[{frozen + 1}\]"):
        thawed.load_state_dict(trainer.state_dict())


def test_the_classifier_alone_is_trained_on_a_frozen_network():
    net = infopro_fast.build("resnet20", 2)
    net.stages.requires_grad_(False)
    trainer = infopro_fast.LocalTrainer(net, sgd)
    assert trainer.optimizers[0] is None
    before = copy.deepcopy(net)
    losses = [trainer.step(IMAGE, LABEL)["loss"].item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert same(dict(net.stages.named_parameters()), dict(before.stages.named_parameters()))


def test_a_network_that_is_frozen_at_its_end_still_tells_its_loss():
    net = infopro_fast.build("resnet20", 2)
    net.stages[1].requires_grad_(False)
    net.classifier.requires_grad_(False)
    trainer = infopro_fast.LocalTrainer(net, sgd, accumulate=2)
    assert trainer.optimizers[1] is None
    assert {"loss", "correct", "module1/contrast"} <= trainer.step(IMAGE, LABEL).keys()


# --------------------------------------------------------------------------------------------------------
# What is no trainer


@pytest.mark.parametrize(
    "net, make, message",
    [
        (nn.Linear(2, 2), sgd, "net: expected a network from infopro_fast.build, got Linear: split it first"),
        (
            infopro_fast.build("resnet20", 2), sgd(nn.Linear(2, 2).parameters()),
            r"make_optimizer: expected a function .* lambda params: .*SGD\(params, lr=0.1\); got SGD",
        ),
    ],
)
def test_what_a_trainer_is_made_of(net, make, message):
    with pytest.raises(TypeError, match=message):
        infopro_fast.LocalTrainer(net, make)


@pytest.mark.parametrize("name", ("hook", "method"))
def test_a_network_whose_call_does_more_than_its_modules_is_refused(name):
    net = infopro_fast.build("resnet20", 2)
    if name == "hook":
        net.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    else:
        net.forward = lambda image, run=net.forward: run(2 * image)
    with pytest.raises(ValueError, match="net: expected a network whose call runs its modules and nothing"):
        infopro_fast.LocalTrainer(net, sgd)


def test_a_classifier_that_does_not_tell_its_classes_is_trained():
    """A low-rank update around the linear layer; labels are checked by the classes that there were."""

    class Updated(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer.requires_grad_(False), layer.weight
            self.a, self.b = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 10))

        def forward(self, rows):
            return self.layer(rows) + rows @ self.a @ self.b

    net = infopro_fast.build("resnet20", 2)
    net.classifier.fc = Updated(net.classifier.fc)
    trainer = infopro_fast.LocalTrainer(net, sgd)
    logits = copy.deepcopy(net).train()(IMAGE)
    before = [net.classifier.fc.a.detach().clone(), net.classifier.fc.layer.weight.clone()]
    loss = trainer.step(IMAGE, LABEL)["loss"]
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, LABEL).item(), rel=1e-5)
    moved = zip(before, (net.classifier.fc.a, net.classifier.fc.layer.weight), strict=True)
    assert [not torch.equal(a, b) for a, b in moved] == [True, False]
    with pytest.raises(ValueError, match=r"label: expected integers in \[0, 10\)"):
        trainer.step(IMAGE, LABEL + 8)
