"""Networks, images, losses and optimizers of one's own on the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import infopro_fast
from infopro_fast import data
from infopro_fast.errors import ConfigError, DataError, RunError
from infopro_fast.modules import HeadLoss, LocalLoss, Place, StridedHead
from infopro_fast.planning import plan
from infopro_fast.trainer import TrainConfig, run_folder, setup
from tests.test_cli import run_here

CLASSES = 3


class Patches(torch.utils.data.Dataset):
    """Grey images of several sizes whose brightness is their class."""

    classes = ["dark", "grey", "light"]

    def __init__(self, train: bool = True, root: str | None = None):
        self.count = 48 if train else 12

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        label = index % CLASSES
        generator = np.random.default_rng(index)
        return generator.integers(80 * label, 80 * label + 80, (30 + index % 5, 36), dtype=np.uint8), label


def tiny(num_classes: int = CLASSES, width: int = 8) -> nn.Module:
    """Four blocks on 32x32 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes)
    return nn.Sequential(*layers[:-3], *end)


def greedy(place: Place) -> LocalLoss:
    return HeadLoss("own", StridedHead(place.channels, place.size, place.num_classes))


@pytest.fixture
def folder(tmp_path):
    """Folders of PNG files by class, brighter class by class."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 8), ("val", 3)):
        for label in range(CLASSES):
            place = tmp_path / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(80 * label, 80 * label + 80, (40, 52, 3), np.uint8)
                image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


OWN = ["--dataset", f"{__name__}:Patches", "--arch", f"{__name__}:tiny", "--threads", 1]
SHORT = ["--epochs", 2, "--batch-size", 16, "--warmup", 0]


def test_a_data_set_of_ones_own():
    images = data.load(f"{__name__}:Patches", crop=(32, 32))
    assert images.train.images.shape == (48, 3, 32, 32) and images.num_classes == CLASSES
    assert torch.equal(images.train.images[:, 0], images.train.images[:, 2])
    pixels = images.train.images.double() / 255
    assert images.mean == tuple(round(float(v), 4) for v in pixels.mean((0, 2, 3)))
    assert images.std == tuple(round(float(v), 4) for v in pixels.std((0, 2, 3), correction=0))
    given = data.load(f"{__name__}:Patches", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert (given.mean, given.image_size) == ((0.1, 0.2, 0.3), 32)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no.module:f", "no.module:f: No module named 'no'"),
        (f"{__name__}:nothing", "has no function 'nothing'"),
        (":f", "expected one of .* or package.module:function, got ':f'"),
        (".no:f", "expected one of .* or package.module:function, got '.no:f'"),
        (f"{__name__}:greedy", r"greedy\(train=True\): TypeError: greedy\(\) got an unexpected"),
        ("torchvision.datasets:CIFAR100", r"CIFAR100\(train=True\): TypeError: .*root"),
        (f"{__name__}:no_images", r"image 0: expected uint8, or numbers in \[0, 1\], of 1 or 3 channels"),
    ],
)
def test_data_sets_that_are_none(name, message):
    with pytest.raises(DataError, match=message):
        data.load(name)


def no_images(train: bool) -> list:
    return [(torch.full((2, 8, 8), 5.0), 0)]


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([0, 1], [0, 2], r"given: test labels: expected in \[0, 2\), got 0 to 2"),
        ([0, -1], [0], r"given: train labels: expected in \[0, 1\), got -1 to 0"),
        ([0, 1.5], [0, 1], r"train=True: label 1: expected an integer, got 1.5"),
        ([0, 1], ["dark"], r"train=False: label 0: expected an integer, got 'dark'"),
        ([0, None], [0], r"train=True: label 1: expected an integer, got None"),
        ([0], [torch.tensor([0, 1])], r"train=False: label 0: expected an integer, got tensor\(\[0, 1\]\)"),
        ([], [0], "train=True: expected at least one image, got none"),
    ],
)
def test_labels_that_are_none(train, test, message, monkeypatch):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    parts = {True: [(image, y) for y in train], False: [(image, y) for y in test]}
    monkeypatch.setattr(f"{__name__}.given", lambda train: parts[train])
    with pytest.raises(DataError, match=message):
        data.load(f"{__name__}:given")


def given(train: bool) -> list:
    """Numpy's integers and tensors of one integer are labels, too."""
    return [(np.zeros((8, 8), np.uint8), np.int32(1)), (np.zeros((8, 8), np.uint8), torch.tensor(0))]


def test_labels_of_other_kinds():
    assert data.load(f"{__name__}:given").test.labels.tolist() == [1, 0]


def test_a_label_outside_of_the_named_classes(monkeypatch):
    monkeypatch.setattr(Patches, "classes", ["dark", "light"])
    with pytest.raises(DataError, match=r"Patches: train labels: expected in \[0, 2\), got 0 to 2"):
        data.load(f"{__name__}:Patches")


@pytest.mark.parametrize(
    "item, message",
    [
        (np.zeros((8, 8), np.uint8), r"expected \(image, label\), got ndarray"),
        (("a.png", 0), "expected an image, an array or a tensor, got 'a.png'"),
        ((None, 0), "expected an image, an array or a tensor, got None"),
        ((np.zeros((1, 8, 8, 3)), 0), r"expected \(H, W\) or three dimensions, got \(1, 8, 8, 3\)"),
        ((np.zeros((0, 8)), 0), r"expected \(H, W\) or three dimensions, got \(0, 8\)"),
    ],
)
def test_items_that_are_no_images(item, message, monkeypatch):
    monkeypatch.setattr(f"{__name__}.given", lambda train: [item])
    with pytest.raises(DataError, match=f"train=True: image 0: {message}"):
        data.load(f"{__name__}:given")


def test_a_data_set_that_takes_no_root(tmp_path):
    with pytest.raises(DataError, match="takes no root: leave out --data-root"):
        data.load(f"{__name__}:no_images", tmp_path)


def test_a_run_of_ones_own(capsys, tmp_path):
    """Network, data set, loss, AdamW, clipping: trained, evaluated, and continued to the same bits."""
    flags = [*OWN, *SHORT, "--modules", 3, "--local-loss", f"{__name__}:greedy", "--optimizer", "adamw"]
    flags += ["--lr", 0.01, "--no-decay-all", "--clip-grad", 1, "--arch-args", "width=12"]
    flags += ["--out", tmp_path / "r"]
    code, out, err = run_here(capsys, "train", *flags)
    assert code == 0, err
    config = run_folder.read_config(tmp_path / "r")
    assert config.mean == data.load(f"{__name__}:Patches").mean and config.crop == (32, 32)
    code, out, err = run_here(capsys, "eval", tmp_path / "r")
    assert code == 0 and "of 12)" in out, err
    first = run_folder.read_weights(tmp_path / "r")
    assert any(w.shape[:1] == (12,) for w in first.values())  # the width that --arch-args says
    for again in (["--config", tmp_path / "r", "--out", tmp_path / "s"], ["--resume", tmp_path / "r"]):
        previous = ["--resume-previous"] * (again[0] == "--resume")
        code, out, err = run_here(capsys, "train", *again, *previous)
        assert code == 0, err
        second = run_folder.read_weights(tmp_path / ("s" if again[0] == "--config" else "r"))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_no_decay_of_norms_and_biases():
    config = TrainConfig(decay_all=False, weight_decay=0.1, lr=0.1).resolved()
    optimizer = setup.optimizer(config)(list(tiny().parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_folder_of_images(capsys, tmp_path, folder):
    flags = ["--dataset", "imagefolder", "--data-root", folder, "--crop", 32, 32, "--workers", 0, *SHORT]
    flags += ["--arch", f"{__name__}:tiny", "--threads", 1, "--modules", 2, "--out", tmp_path / "r"]
    code, out, err = run_here(capsys, "train", *flags)
    assert code == 0, err
    code, out, err = run_here(capsys, "eval", tmp_path / "r")
    assert code == 0 and "of 9)" in out, err
    config = run_folder.read_config(tmp_path / "r")
    assert 0.2 < config.mean[0] < 0.6 and config.arch.endswith(":tiny")


def test_a_budget_is_cut_before_training(capsys, tmp_path):
    budget = plan(tiny(), batch_size=16, modules=2, image_size=32).total
    found = plan(tiny(), batch_size=16, budget=budget, image_size=32)
    flags = [*OWN, *SHORT, "--local-loss", "softmax", "--budget", str(budget), "--out", tmp_path / "r"]
    code, out, err = run_here(capsys, "train", *flags)
    assert code == 0, err
    config = run_folder.read_config(tmp_path / "r")
    assert (config.cuts, config.modules, config.budget) == (found.cuts, len(found.modules), None)
    code, _, err = run_here(capsys, "train", *OWN, *SHORT, "--budget", "1KiB", "--out", tmp_path / "s")
    assert code == 2 and "does not fit into 1.0 KiB: it takes" in err and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dataset="cifar100"), "dataset: expected one of .*imagefolder.*or package.module:function"),
        (dict(arch="resnet_18"), "arch: expected one of .*or torchvision:NAME"),
        (dict(local_loss="own"), "local_loss: expected one of contrast, .*or package.module:function"),
        (dict(dataset=":f"), "dataset: expected one of .*or package.module:function, got ':f'"),
        (dict(arch=".own:f"), "arch: expected one of .*or package.module:function, got '.own:f'"),
        (dict(local_loss="own:"), "local_loss: expected one of .*or package.module:function, got 'own:'"),
        (dict(dataset="imagefolder"), "dataset imagefolder needs data_root"),
        (dict(mean=(0, 0, 0), std=(1, 1, 1)), "mean: dataset fashion_mnist has its own"),
        (dict(dataset="a:b", mean=(0, 0, 0), std=(1, 0, 1)), "std: expected three positive numbers, got"),
        (dict(dataset="a:b", mean=(0, 0, 0)), "mean and std: expected both or neither"),
        (dict(arch_args=("a=1",)), "arch_args: arch resnet32 has none: expected a name with a colon"),
        (dict(betas=(0.9, 0.9)), "betas: optimizer sgd has none"),
        (dict(optimizer="adamw", momentum=0.5), "momentum: optimizer adamw has none"),
        (dict(budget="1GiB", balanced=True), "cuts, balanced, budget: a split is given"),
        (dict(budget="1GiB", local_loss="none", modules=1), "budget: local_loss none trains end to end"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no.module:f", "local_loss no.module:f: No module named 'no'"),
        (f"{__name__}:nothing", "local_loss .*: tests.test_own_data has no function 'nothing'"),
        (f"{__name__}:CLASSES", "has no function 'CLASSES'"),
    ],
)
def test_local_losses_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        setup.local_loss(TrainConfig(local_loss=name))


def test_clipping_scales_a_modules_gradients():
    from infopro_fast.modules.local_step import update_module

    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    update_module(LocalLoss(), optimizer, None, clip_grad=1.0)
    assert torch.cat([p.detach() for p in parameters]).norm().item() == pytest.approx(1.0, abs=1e-5)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    before = parameters[0].detach().clone()
    update_module(LocalLoss(), optimizer, None, clip_grad=1.0)
    assert torch.allclose(before - parameters[0], torch.full((3,), 1e-3), rtol=1e-5)


def test_a_run_is_loaded_to_predict(capsys, tmp_path):
    flags = [*OWN, *SHORT, "--modules", 2, "--local-loss", "softmax", "--lr", 0.05, "--out", tmp_path / "r"]
    assert run_here(capsys, "train", *flags)[0] == 0
    trained = infopro_fast.load(tmp_path / "r")
    images = data.load(f"{__name__}:Patches")
    assert (trained.classes, trained.image_size) == (("dark", "grey", "light"), (32, 32))
    assert (trained.mean, trained.std) == (images.mean, images.std)
    pixels = images.test.images
    expected = trained.net(next(iter(images.test_batches(12)))[0])
    assert torch.equal(trained(pixels), expected) and not trained.training
    assert torch.allclose(trained(pixels.double() / 255), expected, atol=1e-5)
    assert torch.allclose(trained.predict(pixels).sum(1), torch.ones(12))
    code, out, _ = run_here(capsys, "eval", tmp_path / "r")
    right = int((trained(pixels).argmax(1) == images.test.labels).sum())
    assert code == 0 and f"({right} of 12)" in out
    for wrong, message in (
        (pixels.float(), r"expected numbers in \[0, 1\], not normalised, got 3 to 238"),
        (pixels[0], r"expected \(N, 3, H, W\), got \(3, 32, 32\)"),
        (pixels.int(), "expected uint8 or floating point, got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(wrong)
    with pytest.raises(RunError, match="is not a run folder"):
        infopro_fast.load(tmp_path)
