"""Information analysis: the meaning of the probes' numbers (docs/analysis.md), and the command."""

import json
import math
import re
import shutil
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast import cli, errors, ops
from infopro_fast.data import Split, fashion_mnist
from infopro_fast.modules.local_loss import Classifier
from infopro_fast.modules.network import LocalNetwork, Stage
from infopro_fast.studies import analyze, probes
from infopro_fast.studies.probes import ProbeSettings
from infopro_fast.trainer import fit
from tests import tiny_run

CHANNELS = 6


class Keep(nn.Module):
    """(N, 3, H, W) to (N, 6, H, W): x and -x, which keep all information."""

    def forward(self, x):
        return torch.cat([x, -x], 1)


class Destroy(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def keep_then_destroy() -> LocalNetwork:
    return LocalNetwork(
        [Stage(OrderedDict(keep=Keep(), destroy=Destroy()))], [Classifier(CHANNELS, 10)], [], ["", ""]
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The fixtures below need it too: the number of threads changes the rounding of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    """1000 and 500 images of 8x8."""
    found = fashion_mnist.load()
    train, test = (
        Split(s.images[:count], s.labels[:count]) for s, count in ((found.train, 1000), (found.test, 500))
    )
    return replace(found, train=train, test=test).shrunk(4)


@pytest.fixture(scope="module")
def few(images):
    train, test = (Split(s.images[:200], s.labels[:200]) for s in (images.train, images.test))
    return replace(images, train=train, test=test)


SETTINGS = ProbeSettings(epochs=5, batch_size=50)


@pytest.fixture(scope="module")
def kept_and_destroyed(images):
    return probes.probe_network(keep_then_destroy(), images, SETTINGS)


# ------------------------------------------------------------------------------------------------------------
# What the numbers mean


def test_tells_features_that_keep_information_from_those_that_do_not(kept_and_destroyed, images):
    known = probes.baseline(images.train, images.test)
    keep, destroy = kept_and_destroyed
    assert [keep["block"], destroy["block"]] == ["keep", "destroy"] and [keep["depth"], destroy["depth"]] == [
        1,
        2,
    ]
    assert (keep["channels"], keep["size"]) == (CHANNELS, [8, 8])
    most = known["constant"] - known["floor"]
    assert 0.5 * most < keep["pixel_information"] < most
    assert (
        keep["label_information"] > 0.5
        and keep["classifier_accuracy"] > 0.4
        and keep["linear_accuracy"] > 0.15
    )
    # From zeros a decoder cannot even have the mean image, but for the zeros around them; and no label is
    # better than chance.
    assert destroy["pixel_information"] < 0.02 * most
    assert destroy["label_information"] < 0.02
    assert destroy["classifier_accuracy"] < 0.15 and destroy["linear_accuracy"] < 0.15


def test_numbers_belong_together(kept_and_destroyed, images):
    known = probes.baseline(images.train, images.test)
    for row in kept_and_destroyed:
        assert row["pixel_information"] == known["constant"] - row["reconstruction"]
        assert row["label_information"] == known["label_entropy"] - row["classifier_loss"]
        assert row["label_information_bits"] * math.log(2) == pytest.approx(row["label_information"])


def test_shuffled_labels_hold_no_information(kept_and_destroyed, images):
    """The decoders stay the same: probes do not influence each other."""
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(1))
    shuffled = replace(images, train=Split(images.train.images, images.train.labels[order]))
    found = probes.probe_network(keep_then_destroy(), shuffled, SETTINGS)
    assert found[0]["label_information"] < 0.05 and found[0]["classifier_accuracy"] < 0.2
    assert [row["reconstruction"] for row in found] == [row["reconstruction"] for row in kept_and_destroyed]


def test_a_label_that_is_in_the_features_is_found_whole():
    """Two classes, dark and bright: I(h, y) = H(y) = 1 bit, and a line separates them."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(400) % 2
    pixels = torch.randint(0, 100, (400, 3, 8, 8), generator=generator) + 150 * labels.view(-1, 1, 1, 1)
    split = Split(pixels.to(torch.uint8), labels)
    two = replace(fashion_mnist.load(), name="two", train=split, test=split, num_classes=2)
    keep, destroy = probes.probe_network(keep_then_destroy(), two, SETTINGS)
    assert 0.97 < keep["label_information_bits"] <= 1 and keep["linear_accuracy"] == 1
    assert abs(destroy["label_information_bits"]) < 0.02 and destroy["linear_accuracy"] == 0.5


def test_baseline(images):
    known = probes.baseline(images.train, images.test)
    x = images.test.images.double() / 255
    mean = (images.train.images.double().sum(0) / 255 + 0.5) / 1001
    assert known["constant"] == pytest.approx(F.binary_cross_entropy(mean.expand_as(x), x).item(), rel=1e-12)
    assert known["floor"] == pytest.approx(F.binary_cross_entropy(x, x).item(), rel=1e-12)
    share = torch.tensor([(images.test.labels == c).double().mean() for c in range(10)])
    assert known["label_entropy"] == pytest.approx(torch.special.entr(share).sum().item(), rel=1e-12)
    # A pixel that is black in all training images and white in a test image costs much, not infinitely much.
    black = Split(torch.zeros(9, 3, 2, 2, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    white = Split(black.images + 255, black.labels)
    assert probes.baseline(black, white) == {
        "constant": pytest.approx(math.log(20)),
        "floor": 0,
        "label_entropy": 0,
    }


# ------------------------------------------------------------------------------------------------------------
# How they are found


@pytest.fixture(scope="module")
def net(images):
    """A small network whose running statistics have moved."""
    torch.manual_seed(3)
    net = infopro_fast.build(
        "resnet20", 3, "greedy", image_size=8, image_mean=images.mean, image_std=images.std
    )
    with torch.no_grad():
        net(torch.randn(16, 3, 8, 8))
    return net


QUICK = ProbeSettings(depths=3, epochs=2, batch_size=60)


def test_network_stays_as_it_is_and_a_seed_repeats(net, few):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = probes.probe_network(net, few, QUICK)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    after = net.state_dict()
    assert list(before) == list(after) and all(
        torch.equal(before[name], tensor) for name, tensor in after.items()
    )
    torch.manual_seed(4)  # nothing comes from the generator as it happens to stand
    assert probes.probe_network(net, few, QUICK) == found
    assert probes.probe_network(net, few, replace(QUICK, seed=1)) != found


def test_features_are_those_of_the_network(net):
    net.eval()
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    every = list(probes.features(net, image, range(10)))
    assert [tuple(h.shape[1:]) for h in every] == [(16, 8, 8)] * 4 + [(32, 4, 4)] * 3 + [(64, 2, 2)] * 3
    with torch.no_grad():
        assert torch.equal(net.classifier(every[-1]), net(image))
    some = list(probes.features(net, image, [2, 5]))
    assert torch.equal(some[0], every[2]) and torch.equal(some[1], every[5])
    assert not any(h.requires_grad for h in every) and torch.is_grad_enabled()
    assert probes.block_names(net) == ["stem", *(f"layer{s}_{b}" for s in (1, 2, 3) for b in (0, 1, 2))]
    net.train()


class Keep16(nn.Module):
    """16 channels: with 6, torch 2.14's 1x1 convolution of stride 2 corrupts memory (AVX2)."""

    def forward(self, x):
        return torch.cat([x, -x] * 3, 1)[:, :16].contiguous()


def test_a_deeper_classifier_finds_more(images):
    net = LocalNetwork(
        [Stage(OrderedDict(keep=Keep16(), destroy=Destroy()))], [Classifier(16, 10)], [], ["", ""]
    )
    found = {
        name: probes.probe_network(net, images, replace(SETTINGS, epochs=3, classifier=name))
        for name in probes.CLASSIFIERS
    }
    assert found["residual"][0]["label_information"] > found["1c2f"][0]["label_information"] + 0.05
    assert found["residual"][1]["label_information"] < 0.02


@pytest.mark.parametrize(
    "channels,widths", [(16, [16, 32, 64]), (32, [32, 64, 64]), (64, [64, 64, 64]), (8, [8, 16, 32])]
)
def test_residual_classifier(channels, widths):
    probe = probes.ResidualClassifier(channels, 7)
    assert [block.conv2.out_channels for block in probe.blocks] == widths and probe.fc.weight.shape == (
        7,
        widths[-1],
    )
    h, label = torch.randn(5, channels, 4, 4), torch.arange(5)
    loss, correct = probe.eval().loss_and_correct(h, label)
    logits = probe.fc(probe.blocks(h).mean((2, 3)))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-5)
    assert correct == (logits.argmax(1) == label).sum()


def test_spread():
    assert probes.spread(16, 8) == [0, 2, 4, 6, 9, 11, 13, 15]
    assert probes.spread(5, 5) == probes.spread(5, 99) == [0, 1, 2, 3, 4]
    assert probes.spread(16, 2) == [0, 15] and probes.spread(16, 1) == [15]


def test_each_probe_is_measured_at_its_best_epoch(few, monkeypatch):
    """Epochs after the first ruin the probes; the numbers are those of the first."""
    settings, seen = replace(SETTINGS, epochs=1, depths=1), []
    net = LocalNetwork([Stage(OrderedDict(keep=Keep()))], [Classifier(CHANNELS, 10)], [], [""])
    steps = 180 // 50
    monkeypatch.setattr(probes, "one_cycle", lambda step, *_, **__: 0.01 if step < steps else 3.0)
    one = probes.probe_network(net, few, settings)
    three = probes.probe_network(
        net, few, replace(settings, epochs=3), lambda epoch, found: seen.append((epoch, found))
    )
    assert three == one and three[0]["best_epoch"] == dict.fromkeys(probes.PROBES, 1)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    for probe in probes.PROBES:
        losses = [found[0][probe]["loss"] for _, found in seen]
        assert losses[1] > losses[0] and losses[2] > losses[0]


def test_images_that_choose_the_epoch_train_nothing(net, few):
    study = probes.Training(net, few, QUICK)
    assert len(study.held) == 20 and len(study.kept) == 180
    assert torch.equal(torch.cat([study.held, study.kept]).sort().values, torch.arange(200))


def test_a_loss_that_is_not_finite_is_named(net, few, monkeypatch):
    monkeypatch.setattr(probes, "one_cycle", lambda *_, **__: math.nan)
    with pytest.raises(FloatingPointError, match="decoder probe of stem: loss is nan in epoch 1"):
        probes.probe_network(net, few, QUICK)


# ------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: end to end, and greedy with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", tiny_run.load)
        common = dict(lambdas=None, epochs=1, warmup=0, shrink=4)
        fit(tiny_run.config(folder / "whole", local_loss="none", modules=1, **common))
        for seed in (0, 1):
            fit(tiny_run.config(folder / f"greedy{seed}", local_loss="greedy", seed=seed, **common))
    return folder


FLAGS = ("--depths", 3, "--epochs", 2, "--batch-size", 16, "--threads", 1)


def call(capsys, *argv):
    """Return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["analyze", *map(str, argv)])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


@pytest.fixture(scope="module")
def once(runs, tmp_path_factory):
    """Folder of an analysis of all three runs, and its output."""
    folder, said = tmp_path_factory.mktemp("once"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", tiny_run.load)
        every = [runs / "whole", runs / "greedy0", runs / "greedy1"]
        analyze.analyze(
            every, folder, ProbeSettings(depths=3, epochs=2, batch_size=16), threads=1, show=said.append
        )
    return folder, said


@pytest.fixture
def analyzed(once, tmp_path):
    return shutil.copytree(once[0], tmp_path / "out")


def test_what_is_written(once):
    folder, said = once
    expected = [
        "run 1/3, end to end, seed 0",
        "run 2/3, greedy, K = 3, seed 0",
        "run 3/3, greedy, K = 3, seed 1",
    ]
    assert [line.split(":")[0] for line in said] == [line for line in expected for _ in range(2)]
    content = json.loads((folder / "analysis.json").read_text())
    assert [entry["seed"] for entry in content["runs"]] == [0, 0, 1]
    assert all(
        entry["image_size"] == [8, 8] and entry["train_images"] == tiny_run.TRAIN for entry in content["runs"]
    )
    assert [row["block"] for row in content["runs"][0]["blocks"]] == ["stem", "layer2_0", "layer3_2"]
    whole, greedy = content["methods"]
    assert (whole["method"], whole["seeds"], greedy["method"], greedy["seeds"]) == (
        "end to end",
        [0],
        "greedy, K = 3",
        [0, 1],
    )
    for k, row in enumerate(greedy["blocks"]):
        for name in analyze.QUANTITIES:
            a, b = (entry["blocks"][k][name] for entry in content["runs"][1:])
            assert row[name] == {"mean": pytest.approx((a + b) / 2), "error": pytest.approx(abs(a - b) / 2)}
            assert whole["blocks"][k][name] == {"mean": content["runs"][0]["blocks"][k][name], "error": None}
    assert (folder / "analysis.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = [
        line
        for line in (folder / "analysis.md").read_text().splitlines()
        if line.startswith(("| end", "| greedy"))
    ]
    assert len(rows) == 6 and "±" not in rows[0] and rows[3].count("±") == 6
    assert f"| {whole['blocks'][0]['reconstruction']['mean']:.4f} |" in rows[0]
    assert not list(folder.glob(".aside-*"))


def test_runs_that_are_there_are_not_probed_again(analyzed, runs, few_images, capsys, monkeypatch):
    folder = analyzed
    before, probed = json.loads((folder / "analysis.json").read_text()), []

    def counted(net, images, settings, progress):
        probed.append(settings)
        return probes.probe_network(net, images, settings, progress)

    monkeypatch.setattr(analyze, "probe_network", counted)
    (folder / "analysis.png").unlink()
    every = [runs / "whole", runs / "greedy0", runs / "greedy1"]
    code, said, err = call(capsys, *every, "--out", folder, *FLAGS)
    assert code == 0 and err == "" and said.splitlines()[-1].startswith("written: ")
    assert not probed and said.count("already") == 3 and (folder / "analysis.png").exists()
    assert json.loads((folder / "analysis.json").read_text()) == before
    call(capsys, runs / "whole", "--out", folder, *FLAGS, "--seed", 7)  # other settings
    assert len(probed) == 1 and len(json.loads((folder / "analysis.json").read_text())["runs"]) == 3
    call(capsys, *every, "--out", folder, *FLAGS)
    assert len(probed) == 2
    after = json.loads((folder / "analysis.json").read_text())["runs"]
    assert [{**entry, "seconds": 0} for entry in after] == [
        {**before["runs"][i], "seconds": 0} for i in (1, 2, 0)
    ]


@pytest.mark.slow
def test_runs_are_known_by_their_weights(analyzed, runs, few_images, tmp_path, monkeypatch):
    """A moved run is recognised. analysis.json has the folders as they were given."""
    moved = shutil.copytree(runs / "whole", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "probe_network", lambda *a: pytest.fail("probed again"))
    said = []
    analyze.analyze(
        [moved.name], "out", ProbeSettings(depths=3, epochs=2, batch_size=16), threads=1, show=said.append
    )
    assert said == ["moved: in out/analysis.json already"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    analyze.analyze(
        ["moved"], "elsewhere", ProbeSettings(depths=1, epochs=1, batch_size=16), threads=1, show=said.append
    )
    text = (tmp_path / "elsewhere/analysis.json").read_text()
    (entry,) = json.loads(text)["runs"]
    assert entry["run"] == "moved" and str(tmp_path) not in text
    assert entry["where"]["isa"] == ops.cpu_isa() and entry["where"]["torch"] == torch.__version__


def test_a_run_of_a_gpu_is_analyzed_on_the_cpu(runs, few_images, tmp_path):
    """Settings that only a GPU has change no number."""
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    del content["sha256"]  # changed by hand
    (run / "config.json").write_text(
        json.dumps(content | {"device": "cuda", "tf32": True, "cuda_graph": True, "impl": "triton"})
    )
    settings = ProbeSettings(depths=1, epochs=1, batch_size=16)
    found = [
        analyze.analyze([at], tmp_path / f"of {at.name}", settings, threads=1, device="cpu", show=str)
        for at in (run, runs / "whole")
    ]
    assert found[0][0]["blocks"] == found[1][0]["blocks"]


def test_a_run_with_other_weights_is_probed_again(runs, few_images, tmp_path):
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    settings, said = ProbeSettings(depths=1, epochs=1, batch_size=16), []
    first = analyze.analyze([run], tmp_path / "out", settings, threads=1, show=said.append)
    shutil.copy(runs / "greedy0" / "weights.safetensors", run)
    with pytest.raises(
        errors.RunError, match="does not fit config.json: load_released_state_dict: unexpected aux_classifier"
    ):
        analyze.analyze([run], tmp_path / "out", settings, threads=1, show=said.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", tiny_run.load)
        other = fit(
            tiny_run.config(
                tmp_path / "x",
                local_loss="none",
                modules=1,
                lambdas=None,
                epochs=1,
                warmup=0,
                shrink=4,
                seed=9,
            )
        )
    shutil.copy(other / "weights.safetensors", run)
    second = analyze.analyze([run], tmp_path / "out", settings, threads=1, show=said.append)
    assert second[0]["blocks"] != first[0]["blocks"] and not any("already" in line for line in said)
    assert len(json.loads((tmp_path / "out" / "analysis.json").read_text())["runs"]) == 1


def test_what_is_done_survives_a_crash(runs, few_images, tmp_path, monkeypatch):
    settings, kept = ProbeSettings(depths=1, epochs=1, batch_size=16), analyze.probe_network

    def fails_later(*args):
        monkeypatch.setattr(analyze, "probe_network", stop)
        return kept(*args)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "probe_network", fails_later)
    with pytest.raises(KeyboardInterrupt):
        analyze.analyze([runs / "greedy0", runs / "greedy1"], tmp_path, settings, threads=1, show=str)
    assert [entry["seed"] for entry in json.loads((tmp_path / "analysis.json").read_text())["runs"]] == [0]
    monkeypatch.setattr(analyze, "probe_network", kept)
    said = []
    found = analyze.analyze(
        [runs / "greedy0", runs / "greedy1"], tmp_path, settings, threads=1, show=said.append
    )
    assert (
        found[0]["seeds"] == [0, 1]
        and sum(line.startswith("run 1/1") for line in said) == 1
        and "already" in said[0]
    )


def changed(run, to, **settings):
    """Copy a run and change settings in its config.json."""
    shutil.copytree(run, to)
    content = json.loads((to / "config.json").read_text())
    del content["sha256"]
    (to / "config.json").write_text(json.dumps(content | settings))
    return to


def wrong(name, runs, folder):
    """Return run folders that `analyze` must refuse."""
    greedy = runs / "greedy0"
    if name == "unfinished":
        return [changed(greedy, folder / "longer", epochs=5)]
    if name == "no weights":
        (changed(greedy, folder / "bare") / "weights.safetensors").unlink()
        return [folder / "bare"]
    others = {
        "network": dict(arch="resnet32"), "size": dict(shrink=2), "held out": dict(hold_out=10),
        "rate": dict(seed=5, lr=0.3), "same seed": {},
        "segmentation": dict(
            dataset="shapes_seg", arch="fcn_resnet20", local_loss="softmax", modules=2, shrink=1
        ),
    }
    return (
        [greedy, greedy] if name == "twice" else [greedy, changed(greedy, folder / "other", **others[name])]
    )


def test_seeds_that_other_processes_trained(tmp_path):
    """A pipeline and other kernels train the same.

    Batch norms that see parts of a batch do not, nor do processes that round what they send.
    """

    def subject(seed, **settings):
        config = tiny_run.config(None, seed=seed, local_loss="greedy", lambdas=None, **settings)
        return analyze.Subject(tmp_path / str(seed), config, "")

    pipeline = subject(1, parallel="pipeline", in_flight=3, threads=2, impl="reference", recompute="block")
    analyze.check_comparable([subject(0), pipeline, subject(2, parallel="data", sync_batch_norm=True)])
    rounded = dict(parallel="pipeline", wire="bfloat16")
    for settings, name in ((dict(parallel="data"), "parallel"), (rounded, "wire")):
        with pytest.raises(errors.ConfigError, match=rf"differ in more than their seed.*: {name} \("):
            analyze.check_comparable([subject(0), subject(1, **settings)])


@pytest.mark.parametrize(
    "name,message",
    [
        ("unfinished", "longer is not finished: 1 of 5 epochs; continue with: infopro-fast train --resume"),
        ("no weights", "bare has no weights.safetensors"),
        ("network", "runs cannot be compared: network of .*greedy0 is resnet20, of .*other resnet32"),
        ("size", r"runs cannot be compared: image_size of .*greedy0 is \[8, 8\], of .*other \[16, 16\]"),
        ("held out", "hold_out of .*greedy0 is 0, of .*other 10"),
        ("rate", r"differ in more than their seed, so their mean has no meaning: lr \(0.05 and 0.3\)"),
        ("same seed", "have the same seed 0"),
        ("twice", "greedy0 is given twice"),
        (
            "segmentation",
            "other: expected a run that classifies the images of a set in memory, got one of shapes_seg",
        ),
    ],
)
def test_runs_that_cannot_be_analyzed(runs, few_images, tmp_path, capsys, name, message):
    code, out, err = call(capsys, *wrong(name, runs, tmp_path), "--out", tmp_path / "out", *FLAGS)
    assert code == 2 and out == "" and err.startswith("infopro-fast: error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "expected at least one run folder, got none"),
        (["no/such/run"], "no/such/run is not a run folder: it has no config.json"),
        (["run", "--depths", 0], "depths: expected at least 1, got 0"),
        (["run", "--epochs", 0], "epochs: expected at least 1, got 0"),
        (["run", "--batch-size", 1], "batch_size: expected at least 2, got 1"),
        (["run", "--lr", 0], "lr: expected a positive number, got 0.0"),
        (["run", "--classifier", "2c9f"], "invalid choice '2c9f' for argument '--classifier'"),
        (["run", "--lr", "inf"], "lr: expected a positive number, got inf"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    code, out, err = call(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1


def test_wrong_folder(runs, few_images, tmp_path, capsys):
    (tmp_path / "analysis.json").write_text("[1, 2")
    code, _, err = call(capsys, runs / "whole", "--out", tmp_path, *FLAGS)
    assert (
        code == 2
        and "analysis.json is not what analyze writes" in err
        and (tmp_path / "analysis.json").read_text() == "[1, 2"
    )
    code, _, err = call(capsys, runs / "whole", "--out", tmp_path / "out", "--threads", 0)
    assert code == 2 and "threads: expected at least 1, got 0" in err
    code, _, err = call(capsys, runs / "whole", "--out", tmp_path / "out", "--device", "abacus")
    assert code == 2 and "device" in err and "abacus" in err
