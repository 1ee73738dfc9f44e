"""Runs that other processes continue: the same training, whoever does it, or an error that says what is
missing."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from infopro_fast import cli
from infopro_fast.data import fashion_mnist
from infopro_fast.errors import ConfigError
from infopro_fast.trainer import checkpoint, fit, loop, resume, run_folder, schedule
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import changed
from tests import tiny_run
from tests.compare import assert_close
from tests.process_tasks import OTHERS, REFUSED
from tests.test_distributed import drive, lines, same

pytestmark = pytest.mark.xdist_group("continuing")

TO_THE_BIT = ("one_by_pipeline", "pipeline_by_one", "pipeline_by_three")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("others"), "others")["others"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_goes_on_as_the_same_training(others, name):
    """The third epoch by other processes than the first two: the weights of a run that one process trained,
    to the bit or to rounding."""
    found = others[f"others/{name}"]
    assert set(found["codes"]) == {0} and not any(found["errors"]), found
    run, one = Path(found["run"]), Path(others["one"]["run"])
    expected, got = (checkpoint.load(path / "checkpoints" / checkpoint.name_of(3, 0)) for path in (one, run))
    for key, value in expected["net"].items():
        if value.is_floating_point():
            assert_close(got["net"][key], value, what=key, scale=max(1.0, value.abs().max().item()))
    assert got["test"]["accuracy"] == expected["test"]["accuracy"]
    if name in TO_THE_BIT:
        assert same(got["net"], expected["net"]) and same(got["trainer"], expected["trainer"])
        assert lines(run) == lines(one)
    source, _, words = OTHERS[name]
    given = dict(word.partition("=")[::2] for word in words if "=" in word) or dict(zip(words, words[1:]))
    assert found["parallel"] == given.get("--parallel", {"one": "none"}.get(source, source))


@pytest.mark.parametrize(
    "name, message",
    {
        "one_by_data": "parallel data: the run's batch norms and losses are of whole batches: it lacks "
        "sync_batch_norm and global_contrast",
        "one_by_two": "parallel none: expected one process, torchrun started 2: give parallel pipeline, or "
        "data (with sync_batch_norm and",
        "parts_by_pipeline": "parallel pipeline: in the run each process' batch norms and losses were of its "
        "own part of a batch (parallel data, it lacks sync_batch_norm and global_contrast), which no process "
        "of this kind has: continue it with parallel data",
        "in_turn_by_pipeline": "order sequential and parallel pipeline: one module is trained after",
        "in_turn_by_two": "order sequential: expected one process, torchrun started 2",
    }.items(),
)
def test_what_is_another_training_is_refused(others, name, message):
    found = others[f"refused/{name}"]
    assert found["codes"] == [2] * REFUSED[name][1]
    assert all(message in text and text.count("\n") == 1 for text in found["errors"]), found["errors"]


def config(**settings):
    return TrainConfig(modules=3, **settings).resolved()


def test_rules():
    """What a batch norm and a contrast see must stay."""
    whole = dict(sync_batch_norm=True, global_contrast=True)
    anew = changed(config(batch_size=48), {"parallel": "data", **whole})
    assert (anew.parallel, anew.batch_size, anew.sync_batch_norm) == ("data", 48, True)
    assert changed(anew, {"parallel": "pipeline"}).sync_batch_norm  # kept, for pipelines that share batches
    assert not changed(anew, {"parallel": "none"}).sync_batch_norm
    pipeline = config(parallel="pipeline", pipeline_modules=(1, 2), in_flight=4, **whole)
    assert changed(pipeline, {"parallel": "data"}).pipeline_modules is None
    assert changed(pipeline, {"pipeline_modules": (2, 1)}).in_flight == 4
    parts = config(parallel="data")
    assert (
        changed(parts, {"parallel": "pipeline", "pipeline_modules": (1, 2)}).parallel == "pipeline"
    )  # parts of a batch as before
    assert changed(parts, {"patience": 60.0}).patience == 60
    free = changed(config(order="sequential"), {"threads": 5, "log_every": 2, "cache": False})
    assert (free.threads, free.log_every, free.cache) == (5, 2, False)
    assert changed(config(epochs=5), {"epochs": 6}) == config(epochs=6)
    softmax = config(local_loss="softmax")
    assert changed(softmax, {"parallel": "data", "sync_batch_norm": True}).parallel == "data"
    for before, sharing, message in (
        (softmax, {"parallel": "data"}, "it lacks sync_batch_norm$"),
        (config(), {"parallel": "data", "sync_batch_norm": True}, "it lacks global_contrast$"),
        (
            config(),
            {"parallel": "pipeline", "pipeline_modules": (1, 2)},
            "it lacks sync_batch_norm and global_contrast$",
        ),
        (
            config(local_loss="softmax", accumulate=2),
            {"parallel": "data", "sync_batch_norm": True},
            "accumulate 2 cuts a batch at other",
        ),
        (config(recompute="norm"), {"parallel": "data", **whole}, "sync_batch_norm and recompute norm"),
        (parts, {"parallel": "none"}, "continue it with parallel data$"),
        (config(), {"wire": "bfloat16"}, "leave out --wire"),
        (
            config(parallel="pipeline", wire="bfloat16"),
            {"parallel": "none"},
            "wire bfloat16 rounds the features of this run",
        ),
        (
            config(),
            {"lr": 0.1, "batch_size": 3},
            "continues a run with its own settings: leave out --lr, --batch-size",
        ),
        (config(), {"device": "cuda"}, "leave out --device"),
        (config(), {"thread": 2}, "thread: no such setting; did you mean threads"),
        (config(epochs=5), {"epochs": 4}, "epochs 4: expected more than the 5 epochs of the run"),
        (config(iterations=100).in_epochs(20), {"epochs": 9}, "epochs 9: the run is counted in iterations"),
        (config(order="sequential", epochs=5), {"epochs": 9}, "epochs 9: the run has order sequential"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(before, sharing)


def test_a_recipe_is_the_run_of_one_process():
    run = dataclasses.replace(config(), recipe="table2/cifar10/resnet32/k4/contrast")
    assert changed(run, {"parallel": "data"}).recipe == run.recipe


def test_flags_beside_resume(tmp_path, monkeypatch, capsys):
    """Those that leave the training what it is, in every spelling, on top of the run's own; no others."""
    run, seen = tmp_path / "run", []
    run.mkdir()
    own = config(cuts=((1, 1), (2, 1)), lambdas=(1, 0, 1, 1), batch_size=48)
    (run / run_folder.CONFIG).write_text(own.to_json())
    monkeypatch.setattr(
        "infopro_fast.trainer.run.resume", lambda *args, **options: seen.append((args, options))
    )

    def command(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *map(str, words)])
        return stop.value.code, capsys.readouterr().err

    for words in (
        ("--resume", run, "--parallel", "pipeline", "--pipeline-modules", "1", "2"),
        (f"--resume={run}", "--parallel=pipeline", "--pipeline_modules", "1", "2", "--resume-previous"),
        ("--pipeline-modules", "1", "2", "--parallel", "pipeline", f"--resume={run}"),
    ):
        assert command(*words)[0] == 0
        changes = {"parallel": "pipeline", "pipeline_modules": (1, 2)}
        assert seen.pop() == ((run,), {"previous": "--resume-previous" in words, **changes})
    for words, changes in (
        ((), {}),
        (("--threads", own.threads + 1, "--log-every=5"), {"threads": own.threads + 1, "log_every": 5}),
        (("--epochs", "9"), {"epochs": 9}),
        (("--lr", own.lr), {}),  # what the run has is no change
    ):
        assert command("--resume", run, *words)[0] == 0
        assert seen.pop() == ((run,), {"previous": False, **changes})
    code, error = command("--resume", run, "--data-root", "d")
    assert code == 2 and "fashion_mnist comes with the package" in error and not seen
    code, error = command("--resume", run, "--out", "d")
    assert code == 2 and "leave out --out" in error and not seen
    code, error = command("--resume", run, "--parallel", "pipeline", "--pipeline-modules", "2", "2")
    assert code == 2 and "pipeline_modules" in error and not seen
    (run / run_folder.CONFIG).write_text(config(dataset="cifar10", data_root="c").to_json())
    assert command("--resume", run, "--data-root=d")[0] == 0
    assert seen.pop() == ((run,), {"previous": False, "data_root": Path("d")})
    pipeline = config(parallel="pipeline", pipeline_modules=(1, 2), in_flight=4)
    (run / run_folder.CONFIG).write_text(pipeline.to_json())
    assert command("--resume", run, "--parallel", "none")[0] == 0
    changes = seen.pop()[1]
    assert changes == {"previous": False, "parallel": "none", "pipeline_modules": None, "in_flight": 2}
    monkeypatch.undo()
    code, error = command("--resume", run, "--dtype", "float64", "--lr=1")
    assert code == 2 and error.endswith("with its own settings: leave out --lr, --dtype\n")


# ------------------------------------------------------------------------------------------------------------
# Longer


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)


def cut_short(out, after, **settings):
    """The run folder of a run that died behind this many epochs."""

    class Killed(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        finish = loop.Training.finish_epoch

        def die(self):
            finish(self)
            if self.epoch == after:
                raise Killed

        patch.setattr(loop.Training, "finish_epoch", die)
        with pytest.raises(Killed):
            fit(tiny_run.config(out, **settings))
    return out


def rates(run):
    return [step["lr"] for step in run_folder.read_metrics(run, "step")]


def test_a_longer_run(few, tmp_path, capsys):
    """The epochs left have the rates of a run of that length; the run says so, and keeps it for the next
    time."""
    settings = dict(schedule="cosine", warmup=1, log_every=1)
    run = cut_short(tmp_path / "run", 2, epochs=3, **settings)
    before, longer = (tiny_run.config(None, epochs=n, **settings).resolved() for n in (3, 5))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(run), "--epochs", "5", "--threads", "2", "--log-every", "2"])
    said, expected = (
        capsys.readouterr().out,
        [schedule.learning_rate(longer, epoch, 0, 4) for epoch in (2, 3, 4)],
    )
    assert stop.value.code == 0 and rates(run)[8:] == [rate for rate in expected for _ in range(2)]
    old = schedule.learning_rate(before, 2, 0, 4)
    assert (
        "5 epochs in place of 3: the cosine schedule goes over all of them, so the learning rate is "
        f"{expected[0]:.4g} in "
        in said
    )
    assert f"in place of {old:.4g} in the next step" in said
    kept = run_folder.read_config(run)
    assert (kept.epochs, kept.threads, kept.log_every, kept.warmup) == (5, 2, 2, 1)
    assert [epoch["epoch"] for epoch in run_folder.read_metrics(run, "epoch")] == [1, 2, 3, 4, 5]


def test_a_finished_run_has_annealed(few, tmp_path, capsys):
    """Its rate does not go up again; a step schedule whose rate stays or falls goes on."""
    run = fit(tiny_run.config(tmp_path / "annealed", epochs=2, schedule="cosine", warmup=1))
    with pytest.raises(
        ConfigError,
        match=r"epochs 4: the run has finished its 2 epochs, and its cosine .* down to 0; .*--init",
    ):
        resume(run, epochs=4)
    assert run_folder.read_config(run).epochs == 2
    run = fit(tiny_run.config(tmp_path / "steps", epochs=4, schedule="step", warmup=0, log_every=1))
    capsys.readouterr()
    resume(run, epochs=5)
    assert "the learning rate stays 0.0005 in the next step" in capsys.readouterr().out
    assert rates(run)[-4:] == pytest.approx([0.0005] * 4)
    with pytest.raises(
        ConfigError, match="epochs 12: the run has finished its 5 epochs, and its step schedule"
    ):
        resume(run, epochs=12)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(tmp_path):
    """Its reader of safetensors takes a checkpoint's tensors, all or some of them, without a pickle."""
    optimizer = {"state": {0: {"momentum_buffer": torch.arange(5)}}}
    state = {
        "net": {"a": torch.randn(3, 4), "b": torch.randn(2).double()},
        "trainer": {"optimizers": [optimizer]},
        "epoch": 1,
    }
    path = checkpoint.save(tmp_path, checkpoint.name_of(1, 0), state)
    momentum = "trainer.optimizers.0.state.0.momentum_buffer"
    some = {"net.b": torch.zeros(2).double(), momentum: torch.zeros(5, dtype=torch.int64)}
    dcp.load(some, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert torch.equal(some["net.b"], state["net"]["b"]) and some[momentum].tolist() == [0, 1, 2, 3, 4]
