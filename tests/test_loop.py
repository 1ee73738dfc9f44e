"""The training loop: what it computes, writes and refuses; test_resume.py stops and continues it."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import threading
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import infopro_fast
from infopro_fast import errors
from infopro_fast.data import fashion_mnist
from infopro_fast.errors import ConfigError
from infopro_fast.trainer import (
    checkpoint,
    curve,
    display,
    evaluate_run,
    fit,
    resume,
    run_folder,
    schedule,
    setup,
)
from infopro_fast.trainer.meters import Meters
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.step import LocalTrainer
from tests import tiny_run
from tests.tiny_run import assert_same_weights, at_step, weights

pytestmark = pytest.mark.usefixtures("few_images")


def test_cuda_is_asked_of_the_op_that_has_it_and_triton_of_all(monkeypatch):
    """On a machine with a GPU, as `available` and `build` are told here."""
    reasons = {}

    def available(op, device):
        return {
            "cuda": reasons.get(op) if op == "reconstruction_loss" else f"{op} has no CUDA C++ kernels",
            "triton": reasons.get(op),
        }

    monkeypatch.setattr(setup.ops, "available", available)
    monkeypatch.setattr(
        setup, "build_network", lambda *args, **options: SimpleNamespace(to=lambda *_: options["impl"])
    )

    def build(impl):
        return setup.build(TrainConfig(impl=impl, device="cuda").resolved(), tiny_run.load())

    assert build("cuda") == "cuda" and build("triton") == "triton"
    reasons["supcon_loss"] = "not installed"
    assert build("cuda") == "cuda"
    with pytest.raises(ConfigError, match="impl triton: supcon_loss: not installed"):
        build("triton")
    reasons["reconstruction_loss"] = "none were built"
    with pytest.raises(ConfigError, match="impl cuda: reconstruction_loss: none were built"):
        build("cuda")


# --------------------------------------------------------------------------------------------------------
# What it computes


def test_equals_a_loop_written_out(finished):
    """LocalTrainer alone, with the same seeds, batches and rates, gives the same bits and test accuracy."""
    config = run_folder.read_config(finished)
    images = tiny_run.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            net = infopro_fast.build(
                "resnet20", 3, lambdas=(1, 0, 1, 1), image_mean=images.mean, image_std=images.std
            )
            trainer = LocalTrainer(net, schedule.released_sgd(0.05))
            for step in range(12):
                epoch, batch = divmod(step, 4)
                image, label = list(images.train_epoch(16, seed=0, epoch=epoch))[batch]
                trainer.set_learning_rate(schedule.one_cycle(step, 12, 0.05, warmup_steps=4))
                trainer.step(image, label)
        found = trainer.evaluate(images.test_batches(16))
    finally:
        torch.set_num_threads(threads)
    expected = net.released_state_dict()
    got = weights(finished)
    assert set(got) == set(expected) and all(
        torch.equal(got[name], tensor) for name, tensor in expected.items()
    )
    last = run_folder.read_metrics(finished, "epoch")[-1]
    assert last["test"] == found == evaluate_run(finished)


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "weights.safetensors",
        "learning_curve.png",
        "checkpoints",
        ".lock",
    }
    assert run_folder.read_config(finished) == tiny_run.config(finished).resolved()
    assert (finished / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in checkpoint.list_checkpoints(finished / "checkpoints")] == [
        "epoch0002-batch000000",
        "epoch0003-batch000000",
    ]
    state = checkpoint.load(finished / "checkpoints" / "epoch0003-batch000000")
    assert state["metrics_bytes"] == (finished / "metrics.jsonl").stat().st_size


def test_metrics_are_means_over_images(finished):
    """An epoch's means are those of its steps' means by their images: 48 (three batches) and 4."""
    steps, epochs = run_folder.read_metrics(finished, "step"), run_folder.read_metrics(finished, "epoch")
    assert [(s["epoch"], s["batch"]) for s in steps] == [(e, b) for e in (1, 2, 3) for b in (3, 4)]
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    names = {"module1/reconstruction", "module2/reconstruction", "module2/contrast", "loss", "accuracy"}
    for epoch in epochs:
        first, second = (s for s in steps if s["epoch"] == epoch["epoch"])
        assert set(epoch["train"]) == names
        for name in names:
            assert epoch["train"][name] == pytest.approx(
                (48 * first[name] + 4 * second[name]) / 52, rel=1e-12
            )
        assert epoch["best"] == max(e["test"]["accuracy"] for e in epochs[: epoch["epoch"]])
        assert (epoch["train"]["accuracy"] * 52) == pytest.approx(round(epoch["train"]["accuracy"] * 52))
        assert (
            epoch["test"]["count"] == 20
            and epoch["images_per_second"] > 0
            and epoch["peak_memory_bytes"] > 2**20
        )
    assert [s["lr"] for s in steps] == [
        schedule.one_cycle(step, 12, 0.05, warmup_steps=4) for step in (2, 3, 6, 7, 10, 11)
    ]


@pytest.mark.parametrize(
    "settings,released",
    [
        (dict(schedule="cosine", epochs=160, warmup=10), lambda e: schedule.cosine(e, 160, 0.8)),
        (dict(schedule="cosine", epochs=9, warmup=0, zero_last_epoch=False),
         lambda e: schedule.cosine(e, 9, 0.8, warmup_epochs=0, zero_last_epoch=False)),
        (dict(schedule="step", epochs=160), lambda e: schedule.step(e, 160, 0.8)),
    ],
)
def test_released_learning_rates(settings, released):
    config = TrainConfig(lr=0.8, **settings).resolved()
    for epoch in range(config.epochs):
        assert {schedule.learning_rate(config, epoch, batch, 7) for batch in range(7)} == {
            released(epoch + 1)
        }


def test_one_cycle_changes_every_step():
    config = TrainConfig(epochs=5, warmup=2, lr=0.3).resolved()
    rates = [schedule.learning_rate(config, epoch, batch, 10) for epoch in range(5) for batch in range(10)]
    assert (
        max(rates) <= 0.3
        and rates[:20] == sorted(rates[:20])
        and rates[20:] == sorted(rates[20:], reverse=True)
    )
    assert (
        rates[0] == pytest.approx(0.3 / 40) and rates[-1] == pytest.approx(0.3 / 60) and len(set(rates)) > 40
    )
    assert math.fsum(rates) / 50 == pytest.approx(0.15)
    for step, warmup in ((50, 20), (-1, 20), (0, 50)):
        with pytest.raises(ValueError, match="step: expected 0 to 49 with warmup_steps < 50"):
            schedule.one_cycle(step, 50, 0.3, warmup_steps=warmup)


@pytest.mark.parametrize(
    "settings",
    [
        dict(local_loss="softmax", dtype="float64"),
        dict(modules=1, local_loss="none", lambdas=None),
        dict(local_loss="greedy", lambdas=None, drop_last=True, augment=False),
    ],
)
def test_other_runs(tmp_path, settings):
    run = fit(tiny_run.config(tmp_path / "run", epochs=1, warmup=0, **settings))
    (epoch,) = run_folder.read_metrics(run, "epoch")
    assert all(map(math.isfinite, epoch["train"].values()))
    dtypes = {tensor.dtype for tensor in weights(run).values() if tensor.is_floating_point()}
    assert dtypes == {getattr(torch, settings.get("dtype", "float32"))}
    assert evaluate_run(run) == epoch["test"]
    if settings.get("drop_last"):
        assert epoch["train"]["module1/greedy_accuracy"] * 48 == pytest.approx(
            round(epoch["train"]["module1/greedy_accuracy"] * 48)
        )


def test_leaves_the_process_as_it_was(tmp_path, finished):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = fit(tiny_run.config(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_weights(run, finished)  # whatever the state of torch's generator outside
    other = fit(tiny_run.config(tmp_path / "other", seed=1))
    assert not torch.equal(weights(other)["fc.weight"], weights(run)["fc.weight"])


def test_in_another_thread(tmp_path, finished):
    """Python allows no signal handlers there; the run is the same."""
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(tiny_run.config(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert_same_weights(found[0], finished)


# --------------------------------------------------------------------------------------------------------
# Non-finite losses


@pytest.mark.parametrize(
    "name,where",
    [("module2/contrast", "module 2, contrast loss: nan"), ("loss", "last module, cross-entropy loss: nan")],
)
def test_non_finite_loss_is_named_and_the_last_checkpoint_is_good(tmp_path, monkeypatch, name, where):
    """In step 2 of epoch 2, found when step 3 is read, where no step looks at its own losses."""

    def spoil(trainer, metrics):
        trainer.check_finite = False
        with torch.no_grad():
            trainer.net.stages[1][0].bn1.weight.fill_(math.nan)
        return metrics | {name: torch.tensor(math.nan)}

    at_step(monkeypatch, 6, spoil)
    kept = "training stopped, the last checkpoint before it, .*epoch0001-batch000000, is kept"
    with pytest.raises(errors.NonFiniteError, match=f"^epoch 2, step 2 of 4: {where}; {kept}"):
        fit(tiny_run.config(tmp_path / "run"))
    last = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = checkpoint.load(last)
    assert last.name == checkpoint.name_of(1, 0) and list(checkpoint.not_finite(state)) == []
    assert [e["epoch"] for e in run_folder.read_metrics(tmp_path / "run", "epoch")] == [1]


def test_a_non_finite_loss_is_found_in_its_own_step(tmp_path, monkeypatch):
    def spoil(trainer, metrics):
        with torch.no_grad():
            trainer.net.stages[1][0].bn1.weight.fill_(math.nan)

    at_step(monkeypatch, 6, spoil)
    message = "^epoch 2, step 3 of 4: module 2, reconstruction loss: nan; "
    with pytest.raises(errors.NonFiniteError, match=message):
        fit(tiny_run.config(tmp_path / "run"))


def test_a_rate_that_diverges(tmp_path):
    """For real: the loss overflows."""
    with pytest.raises(
        errors.NonFiniteError,
        match=r"module \d, \w+ loss: (nan|inf)|cross-entropy loss: (nan|inf)|not finite",
    ):
        fit(tiny_run.config(tmp_path / "run", lr=1e30))
    for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert list(checkpoint.not_finite(checkpoint.load(path))) == []


def test_non_finite_weights_never_get_into_a_checkpoint(tmp_path, monkeypatch):
    """The update of a step whose losses were all finite can still overflow."""

    def overflow(trainer, metrics):
        with torch.no_grad():
            trainer.net.classifier.fc.weight[0, 0] = math.inf

    at_step(monkeypatch, 4, overflow)
    monkeypatch.setattr(
        LocalTrainer, "evaluate", lambda self, batches: {"accuracy": 0.5, "loss": 1.0, "count": 2}
    )
    message = "net.local_losses.2.fc.weight is not finite, though every loss was; .*epoch0000-batch000000"
    with pytest.raises(errors.NonFiniteError, match=message):
        fit(tiny_run.config(tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------
# Refusals


def test_refuses_to_write_over_something(tmp_path, finished):
    with pytest.raises(
        errors.RunError,
        match="alone exists already: give another folder as out, or continue it with --resume",
    ):
        fit(tiny_run.config(finished))
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.RunError, match="file exists already"):
        fit(tiny_run.config(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with contextlib.ExitStack() as held:
        assert run_folder.create(tiny_run.config(tmp_path / "empty"), held) == tmp_path / "empty"


def test_default_folder_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260102-030405")  # three in the same second
    with contextlib.ExitStack() as held:
        names = [run_folder.create(TrainConfig(modules=16).resolved(), held).as_posix() for _ in range(3)]
    name = "runs/fashion_mnist-resnet32-k16-contrast-20260102-030405"
    assert names == [name, f"{name}-2", f"{name}-3"]


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(modules=99, lambdas=None), "modules: expected 1 to 10 for resnet20"),
        (dict(cuts=((9, 9),), modules=None), r"cuts: expected \(stage, block\) of resnet20"),
        (dict(device="tpu"), "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (
            dict(drop_last=True, batch_size=53),
            "batch_size 53: there are only 52 training images",
        ),
        (
            dict(local_loss="dgl", lambdas=None, hold_out=3),
            "local_loss dgl: .* need 2 images, and 49 in batches of 16 leave 1 alone",
        ),
        (
            dict(local_loss="dgl", lambdas=None, batch_size=13, accumulate=4),
            "52 in batches of 13 leave 1 alone",
        ),  # parts of 4, 4, 4, 1
        (
            dict(iterations=4, warmup=1, epochs=None),
            "warmup 1: expected fewer than the 1 epochs of 4 iterations",
        ),
    ],
)
def test_impossible_settings_leave_no_folder(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        fit(tiny_run.config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_dgl_needs_two_images_in_every_part(tmp_path):
    dgl = tiny_run.config(tmp_path, local_loss="dgl", lambdas=None).resolved()
    images = fashion_mnist.load()
    shared = dataclasses.replace(
        dgl, parallel="data", batch_size=26
    )  # two batches of 26: parts of 13, or of 4 and 3
    for fits, replicas in (
        (dgl, 1),
        (shared, 2),
        (shared, 8),
        (dataclasses.replace(shared, sync_batch_norm=True), 26),
    ):
        setup.check_batches(fits, images, replicas)
    setup.check_batches(dataclasses.replace(dgl, drop_last=True), images.held_out(3))
    for alone, replicas in ((shared, 26), (shared, 20), (dataclasses.replace(shared, accumulate=4), 2)):
        with pytest.raises(ConfigError, match="local_loss dgl: .* leave 1 alone"):
            setup.check_batches(alone, images, replicas)


@pytest.mark.parametrize(
    "trained",
    [
        {"device": "cuda", "tf32": True, "cuda_graph": True, "impl": "triton"},
        {"device": "cuda:1", "tf32": True, "impl": "cuda"},
        {"optimizer_state": "float32"},  # a setting of earlier versions
    ],
)
def test_what_a_run_had_in_training_alone_is_not_needed_to_evaluate_it(finished, tmp_path, trained):
    content = json.loads((finished / run_folder.CONFIG).read_text())
    del content["sha256"]  # changed by hand
    (tmp_path / run_folder.CONFIG).write_text(json.dumps(content | trained))
    (tmp_path / run_folder.WEIGHTS).write_bytes((finished / run_folder.WEIGHTS).read_bytes())
    assert evaluate_run(tmp_path, device="cpu") == evaluate_run(finished)


def test_a_run_with_an_optimizer_state_of_fewer_bits_is_refused(finished, tmp_path):
    content = json.loads((finished / run_folder.CONFIG).read_text())
    del content["sha256"]  # changed by hand
    (tmp_path / run_folder.CONFIG).write_text(json.dumps(content | {"optimizer_state": "8bit"}))
    message = "optimizer_state: expected float32, .* got 8bit"
    for call in (resume, evaluate_run):
        with pytest.raises((ConfigError, errors.RunError), match=message):
            call(tmp_path)


def test_folders_that_are_no_runs(tmp_path, finished):
    for call in (resume, evaluate_run):
        with pytest.raises(errors.RunError, match="is not a run folder: it has no config.json"):
            call(tmp_path)
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    message = "has no weights.safetensors: no epoch is finished; continue with: infopro-fast train --resume"
    with pytest.raises(errors.RunError, match=message):
        evaluate_run(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((finished / "weights.safetensors").read_bytes()[:-100])
    with pytest.raises(errors.CheckpointError, match="checkpoints: expected a checkpoint, found 0"):
        resume(tmp_path)  # a run that has weights has begun
    with pytest.raises(errors.RunError, match="weights.safetensors is damaged"):
        evaluate_run(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(safetensors.torch.save({"fc.weight": torch.zeros(10, 64)}))
    with pytest.raises(
        errors.RunError, match="weights.safetensors does not fit config.json: .*missing .*bn1.bias"
    ):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.RunError, match="config.json: not the settings of a run"):
        evaluate_run(tmp_path)


# --------------------------------------------------------------------------------------------------------
# Metrics, display, picture


class NoWait(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_meters_wait_only_when_read():
    meters = Meters(3)
    with NoWait():
        for i in range(3):
            local = {"a": torch.tensor(float(i)), "a_correct": torch.tensor(i)}
            meters.add(local | {"loss": torch.tensor(1.0), "correct": torch.tensor(2)}, 4)
        with pytest.raises(AssertionError):
            bool(torch.tensor(1.0) > 0)
    meters.read()
    assert meters.finish_interval() == {"a": 1.0, "a_accuracy": 3 / 12, "loss": 1.0, "accuracy": 0.5}
    meters.add(
        {
            "a": torch.tensor(7.0),
            "a_correct": torch.tensor(0),
            "loss": torch.tensor(0.0),
            "correct": torch.tensor(1),
        },
        1,
    )
    meters.read()
    state = json.loads(json.dumps(meters.state_dict()))
    other = Meters(3)
    other.load_state_dict(state)
    for each in (meters, other):
        assert each.finish_interval() == {"a": 7.0, "a_accuracy": 0.0, "loss": 0.0, "accuracy": 1.0}
        assert each.finish_epoch() == pytest.approx(
            {"a": (12 + 7) / 13, "a_accuracy": 3 / 13, "loss": 12 / 13, "accuracy": 7 / 13}
        )
        assert each.finish_epoch() == {}


def status():
    train = {
        "module1/reconstruction": 0.25,
        "module2/reconstruction": 0.5,
        "module2/contrast": 3.25,
        "loss": 1.5,
        "accuracy": 0.625,
    }
    return display.Status(
        "a title",
        2,
        8,
        30,
        63,
        0.1,
        train,
        {"accuracy": 0.7512, "loss": 0.9},
        0.76,
        321.4,
        500 * 2**20,
        3725.0,
    )


def test_live_table_shows_everything():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    console.print(display.render(status()))
    text = console.file.getvalue()
    for expected in (
        "a title", "reconstruction", "contrast", "0.2500", "0.5000", "3.2500", "1.5000", "62.50 %",
        "75.12 %", "epoch 2/8", "30/63", "321 images/s", "peak 500 MiB", "1:02:05", "best test 76.00 %",
        "rate 0.1",
    ):
        assert expected in text, expected
    screen = display.LiveDisplay(console)
    with screen:
        screen.message("a message [not markup]")
        screen.update(status())
    assert "a message [not markup]" in console.file.getvalue()


def test_plain_lines():
    stream = io.StringIO()
    screen = display.PlainDisplay(stream)
    screen.update(status())
    screen.update(status())  # too soon for another line
    assert len(stream.getvalue().splitlines()) == 1 and "batch 30/63" in stream.getvalue()
    screen.epoch(status())
    _, line = stream.getvalue().splitlines()
    for expected in (
        "epoch 2/8", "loss 1.5000", "train accuracy 62.50%", "test accuracy 75.12%",
        "m1/reconstruction 0.2500", "m2/contrast 3.2500", "321 images/s", "peak 500 MiB", "left 1:02:05",
    ):
        assert expected in line, expected
    screen._last -= display.PLAIN_SECONDS + 1
    screen.update(status())
    assert "batch 30/63" in stream.getvalue().splitlines()[2]
    assert [display.duration(s) for s in (None, 0, 59.6, 3599.6)] == ["-", "0:00", "1:00", "1:00:00"]


def test_the_first_step_is_shown(tmp_path, capsys):
    fit(tiny_run.config(tmp_path / "run", epochs=2, log_every=10**6))
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch "))
    assert re.match(r"epoch 1/2 batch 1/\d+  loss \d+\.\d+  train accuracy .*m1/", first)


@pytest.mark.parametrize("threads, load, told", ((2, 9.0, 1), (1, 9.0, 0), (2, 0.5, 0)))
def test_a_busy_machine_is_told_of(monkeypatch, tmp_path, threads, load, told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    found = list(setup.advice(tiny_run.config(tmp_path, threads=threads, device="cpu")))
    assert len(found) == told
    assert not told or "busy (load 9.0, 4 cores): --threads 1" in found[0]


def test_display_follows_the_terminal():
    with contextlib.redirect_stdout(io.StringIO()):
        assert isinstance(display.choose(), display.PlainDisplay)


def test_learning_curve_draws_every_series(finished, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: drawn.append(self))
    copy = finished / "learning_curve.png"
    content = copy.read_bytes()
    try:
        curve.draw_learning_curve(finished, "a title")
    finally:
        copy.write_bytes(content)
    (figure,) = drawn
    epochs = run_folder.read_metrics(finished, "epoch")
    panels = {panel.get_title().split(",")[0]: panel for panel in figure.axes}
    assert list(panels) == [
        "reconstruction loss",
        "contrast loss",
        "cross entropy of the network",
        "accuracy (%)",
    ]
    lines = {line.get_label(): line for line in panels["reconstruction loss"].get_lines()}
    assert set(lines) == {"module 1", "module 2"}
    assert list(lines["module 2"].get_xdata()) == [1, 2, 3]
    assert list(lines["module 2"].get_ydata()) == [e["train"]["module2/reconstruction"] for e in epochs]
    test = panels["accuracy (%)"].get_lines()[1]
    assert test.get_label() == "test" and list(test.get_ydata()) == [
        100 * e["test"]["accuracy"] for e in epochs
    ]


def test_learning_curve_without_an_epoch(tmp_path):
    assert curve.draw_learning_curve(tmp_path, "") is None and list(tmp_path.iterdir()) == []
