"""Stopping and continuing a run, to the same bits; test_kill.py has the violent ends."""

import functools
import json
import signal

import pytest
import torch

import infopro_fast
from infopro_fast import errors
from infopro_fast.data import cifar10
from infopro_fast.errors import DataError
from infopro_fast.trainer import (
    checkpoint,
    evaluate_run,
    fit,
    resume,
    run_folder,
)
from infopro_fast.trainer.settings.config import TrainConfig
from tests import tiny_run
from tests.tiny_run import assert_same_weights, at_step

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.slow
def test_stopping_right_after_a_resume_that_dropped_lines(tmp_path, monkeypatch, finished):
    """Lines after the last checkpoint, as kill -9 leaves them, are dropped; the rest is counted."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(errors.Stopped):
            fit(tiny_run.config(run))
    with open(run / run_folder.METRICS, "ab") as file:
        file.write(b'{"kind": "step"}\n' * 20)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(errors.Stopped):
            resume(run)
    resume(run)
    assert_same_weights(run, finished)


@pytest.mark.parametrize(
    "signum,step",
    [
        (signal.SIGINT, 1), (signal.SIGTERM, 6), (signal.SIGINT, 8), (signal.SIGTERM, 11), (signal.SIGHUP, 3),
        (signal.SIGUSR1, 7),
    ],
)
@pytest.mark.fast(1)
def test_signal_stops_after_a_checkpoint_and_continues_to_the_same_bits(
    tmp_path, monkeypatch, finished, signum, step
):
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda trainer, metrics: signal.raise_signal(signum))
        with pytest.raises(
            errors.Stopped,
            match=f"stopped by {signum.name}; continue with: infopro-fast train --resume .*run",
        ) as stopped:
            fit(tiny_run.config(tmp_path / "run"))
    assert stopped.value.signum == signum
    last = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == checkpoint.name_of((step - 1) // 4, (step - 1) % 4 + 1)
    assert (tmp_path / "run" / "learning_curve.png").exists() == (step > 4)
    assert_same_weights(resume(tmp_path / "run"), finished)
    steps = [run_folder.read_metrics(run, "step") for run in (finished, tmp_path / "run")]
    assert len({line.pop("seconds") for line in steps[0]}) == len(steps[0])
    assert steps[0] == [{k: v for k, v in line.items() if k != "seconds"} for line in steps[1]]


@pytest.mark.slow
def test_float16_with_images_off_the_device_continues_to_the_same_bits(tmp_path, monkeypatch):
    """Scalers are part of a checkpoint: a scale that is about to double does so at the same step."""
    settings = dict(amp="float16", resident=False, epochs=2)
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "__init__",
        functools.partialmethod(torch.amp.GradScaler.__init__, growth_interval=3),
    )
    alone = fit(tiny_run.config(tmp_path / "alone", **settings))
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda trainer, metrics: signal.raise_signal(signal.SIGINT))
        with pytest.raises(errors.Stopped):
            fit(tiny_run.config(tmp_path / "run", **settings))
    assert_same_weights(resume(tmp_path / "run"), alone)


def test_signal_during_evaluation(tmp_path, monkeypatch, finished):
    """Stops between two batches of it; continuing evaluates that epoch again."""
    batches = infopro_fast.data.ImageSet.test_batches

    def interrupted(self, *args):
        for batch in batches(self, *args):
            signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(infopro_fast.data.ImageSet, "test_batches", interrupted)
        with pytest.raises(errors.Stopped):
            fit(tiny_run.config(tmp_path / "run"))
    assert run_folder.read_metrics(tmp_path / "run", "epoch") == []
    assert_same_weights(resume(tmp_path / "run"), finished)
    expected, got = (run_folder.read_metrics(run, "epoch") for run in (finished, tmp_path / "run"))
    assert [e["test"] for e in got] == [e["test"] for e in expected]


def test_second_signal_interrupts_at_once(tmp_path, monkeypatch):
    def twice(trainer, metrics):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        fit(tiny_run.config(tmp_path / "run"))
    assert not isinstance(interrupt.value, errors.Stopped)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        checkpoint.name_of(0, 0)
    ]


def test_timed_checkpoints(tmp_path, monkeypatch):
    """Every N minutes means inside epochs too."""
    names = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, name, *rest: (names.append(name), save(folder, name, *rest))
    )
    fit(tiny_run.config(tmp_path / "run", checkpoint_minutes=1e-9, epochs=2))
    assert names == [checkpoint.name_of(e, b) for e in (0, 1) for b in (0, 1, 2, 3)] + [
        checkpoint.name_of(2, 0)
    ]


def test_continuing_a_finished_run_changes_nothing(tmp_path, finished, capsys):
    run = fit(tiny_run.config(tmp_path / "run", epochs=2))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".png"}
    (run / "weights.safetensors").unlink()  # as after a kill right before they were written
    resume(run)
    assert {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".png"
    } == before


def test_images_that_have_been_moved(tmp_path, monkeypatch):
    """A run keeps the absolute path of its images; continued with another path, it keeps that one."""
    asked = []
    monkeypatch.setattr(cifar10, "load", lambda root, download: asked.append(root) or tiny_run.load())
    (tmp_path / "here/images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "run"
    at_step(monkeypatch, 2, lambda trainer, metrics: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(errors.Stopped):
        fit(
            tiny_run.config(
                run, dataset="cifar10", data_root="images", epochs=1, warmup=0, schedule="one_cycle"
            )
        )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/images").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=f"--data-root {tmp_path}/here/images is not a folder"):
        resume(run)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        resume(run, data_root="nowhere")
    assert run_folder.read_config(run).data_root == tmp_path / "here/images"  # what cannot be is not kept
    resume(run, data_root="moved")
    assert evaluate_run(run) == run_folder.read_metrics(run, "epoch")[-1]["test"]
    assert asked == [tmp_path / "here/images", tmp_path / "moved", tmp_path / "moved"]
    state = checkpoint.load(checkpoint.list_checkpoints(run / "checkpoints")[-1])
    assert (
        run_folder.read_config(run).data_root
        == TrainConfig.from_json(state["config"]).data_root
        == tmp_path / "moved"
    )


def test_a_run_counted_in_steps_has_the_warmup_there_is_room_for(tmp_path):
    """One that was not given; of two epochs, the second of a single step."""
    for steps, epochs, warmup in ((2, 1, 0), (5, 2, 1)):
        config = run_folder.read_config(
            fit(tiny_run.config(tmp_path / str(steps), iterations=steps, epochs=None, warmup=None))
        )
        assert (config.epochs, config.warmup, config.iterations) == (epochs, warmup, steps)
        epoch = run_folder.read_metrics(tmp_path / str(steps), "step")[-1]
        assert (epoch["epoch"], epoch["batch"]) == (epochs, steps - 4 * (epochs - 1))


def test_damaged_checkpoint(tmp_path, monkeypatch, finished):
    """Refused by name; the one before it is used only when asked, and leads to the same end."""
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda trainer, metrics: signal.raise_signal(signal.SIGINT))
        with pytest.raises(errors.Stopped):
            fit(tiny_run.config(tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / "epoch0002-batch000002"
    content = bytearray((last / "tensors.safetensors").read_bytes())
    content[-7] ^= 16
    (last / "tensors.safetensors").write_bytes(content)
    message = "epoch0002-batch000002 is damaged: tensors.*: .*epoch0002-batch000000, add --resume-previous"
    with pytest.raises(errors.CheckpointError, match=message):
        resume(tmp_path / "run")
    assert_same_weights(resume(tmp_path / "run", previous=True), finished)
    assert len(run_folder.read_metrics(tmp_path / "run", "step")) == 6


def test_metrics_that_are_not_those_of_the_checkpoint_are_refused(tmp_path, monkeypatch):
    run = fit(tiny_run.config(tmp_path / "run", epochs=2))
    path, content = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()
    for damaged, message in (
        (b"", "expected at least the .* bytes that the checkpoint has seen, got 0"),
        (content.replace(b"0", b"1", 1), "expected SHA-256 .* of the .* that the checkpoint has seen, got"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(errors.RunError, match=f"metrics.jsonl is damaged: {message}.*--resume-previous"):
            resume(run)
        assert path.read_bytes() == damaged
    path.write_bytes(content + b"more")
    resume(run)
    assert path.read_bytes() == content


def test_metrics_that_are_being_written(tmp_path):
    """A line is one when its newline is there; what is no line is named."""
    epoch = json.dumps({"kind": "epoch", "epoch": 1}).encode() + b"\n"
    path = tmp_path / run_folder.METRICS
    assert run_folder.read_metrics(tmp_path, "epoch") == []
    for cut in range(len(epoch)):
        path.write_bytes(epoch + epoch[:cut])
        assert (
            len(run_folder.read_metrics(tmp_path, "epoch")) == 1
            and run_folder.read_metrics(tmp_path, "step") == []
        )
    for line in (b"\xff\n", b"{\n", b"3\n", b"{}\n", b"\n"):
        path.write_bytes(epoch + line + epoch)
        with pytest.raises(
            errors.RunError, match="metrics.jsonl, line 2: expected an object of JSON with its kind"
        ):
            run_folder.read_metrics(tmp_path, "epoch")


def test_two_processes_cannot_share_a_run(finished):
    with (
        run_folder.locked(finished),
        pytest.raises(errors.RunError, match="alone is in use by another process"),
    ):
        resume(finished)
