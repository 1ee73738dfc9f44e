"""Runs that other processes continue: the same training, whoever does it, or an error that says what is missing."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from infopro_fast import cli
from infopro_fast.errors import ConfigError
from infopro_fast.trainer import checkpoint, run_folder
from infopro_fast.trainer.settings import continuing
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import shared_anew
from tests.compare import assert_close
from tests.process_tasks import OTHERS, REFUSED
from tests.test_distributed import drive, lines, same

pytestmark = pytest.mark.xdist_group("continuing")

TO_THE_BIT = ("one_by_pipeline", "pipeline_by_one", "pipeline_by_three")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("others"), "others")["others"]


@pytest.mark.parametrize("name", OTHERS)
def test_goes_on_as_the_same_training(others, name):
    """The third epoch by other processes than the first two: the weights of a run that one process trained, to the bit or to rounding."""
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
        "one_by_data": "parallel data: the run's batch norms and losses are of whole batches: it lacks sync_batch_norm and global_contrast",
        "one_by_two": "parallel none: expected one process, torchrun started 2: give parallel pipeline, or data (with sync_batch_norm and",
        "parts_by_pipeline": "parallel pipeline: in the run each process' batch norms and losses were of its own part of a batch (parallel "
        "data, it lacks sync_batch_norm and global_contrast), which no process of this kind has: continue it with parallel data",
        "in_turn_by_pipeline": "order sequential and parallel pipeline: one module is trained after the other",
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
    anew = shared_anew(config(batch_size=48), {"parallel": "data", **whole})
    assert (anew.parallel, anew.batch_size, anew.sync_batch_norm) == ("data", 48, True)
    assert shared_anew(anew, {"parallel": "pipeline"}).sync_batch_norm  # kept, for pipelines that share batches
    assert not shared_anew(anew, {"parallel": "none"}).sync_batch_norm
    pipeline = config(parallel="pipeline", pipeline_modules=(1, 2), in_flight=4, **whole)
    assert shared_anew(pipeline, {"parallel": "data"}).pipeline_modules is None
    assert shared_anew(pipeline, {"pipeline_modules": (2, 1)}).in_flight == 4
    parts = config(parallel="data")
    assert shared_anew(parts, {"parallel": "pipeline", "pipeline_modules": (1, 2)}).parallel == "pipeline"  # parts of a batch as before
    assert shared_anew(parts, {"patience": 60.0}).patience == 60
    softmax = config(local_loss="softmax")
    assert shared_anew(softmax, {"parallel": "data", "sync_batch_norm": True}).parallel == "data"
    for before, sharing, message in (
        (softmax, {"parallel": "data"}, "it lacks sync_batch_norm$"),
        (config(), {"parallel": "data", "sync_batch_norm": True}, "it lacks global_contrast$"),
        (config(), {"parallel": "pipeline", "pipeline_modules": (1, 2)}, "it lacks sync_batch_norm and global_contrast$"),
        (config(local_loss="softmax", accumulate=2), {"parallel": "data", "sync_batch_norm": True}, "accumulate 2 cuts a batch at other"),
        (config(recompute="norm"), {"parallel": "data", **whole}, "sync_batch_norm and recompute norm"),
        (parts, {"parallel": "none"}, "continue it with parallel data$"),
        (config(), {"wire": "bfloat16"}, "wire: expected parallel pipeline, got parallel none"),
    ):
        with pytest.raises(ConfigError, match=message):
            shared_anew(before, sharing)


def test_a_recipe_is_the_run_of_one_process():
    run = dataclasses.replace(config(), recipe="table2/cifar10/resnet32/k4/contrast")
    assert shared_anew(run, {"parallel": "data"}).recipe == run.recipe


def test_flags_beside_resume(tmp_path, monkeypatch, capsys):
    """Those of SHARING, in every spelling, on top of the run's own, and the folder of the images; no others."""
    run, seen = tmp_path / "run", []
    run.mkdir()
    (run / run_folder.CONFIG).write_text(config(cuts=((1, 1), (2, 1)), lambdas=(1, 0, 1, 1), batch_size=48).to_json())
    monkeypatch.setattr("infopro_fast.trainer.run.resume", lambda *args, **options: seen.append((args, options)))

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
        args, options = seen.pop()
        assert args == (run,) and options["previous"] == ("--resume-previous" in words)
        assert options["sharing"] == {
            "parallel": "pipeline", "pipeline_modules": (1, 2), "wire": "exact", "in_flight": 2, "sync_batch_norm": False,
            "global_contrast": False, "patience": None,
        }  # fmt: skip
        assert options["sharing"].keys() == set(continuing.SHARING)
    assert command("--resume", run)[0] == 0 and seen.pop()[1]["sharing"] is None
    code, error = command("--resume", run, "--data-root", "d")
    assert code == 2 and "fashion_mnist comes with the package" in error and not seen
    (run / run_folder.CONFIG).write_text(config(dataset="cifar10", data_root="c").to_json())
    for words in (("--data-root", "d"), ("--data-root=d", "--parallel", "pipeline")):
        assert command("--resume", run, *words)[0] == 0
        args, options = seen.pop()
        assert args == (run,) and options["data_root"] == Path("d") and (options["sharing"] is None) == (len(words) == 2)
    code, error = command("--resume", run, "--parallel", "data", "--lr", "1")
    assert code == 2 and "leave out --lr" in error and not seen
    code, error = command("--resume", run, "--parallel", "pipeline", "--pipeline-modules", "2", "2")
    assert code == 2 and "pipeline_modules" in error and not seen


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(tmp_path):
    """Its reader of safetensors takes a checkpoint's tensors, all or some of them, without a pickle."""
    optimizer = {"state": {0: {"momentum_buffer": torch.arange(5)}}}
    state = {"net": {"a": torch.randn(3, 4), "b": torch.randn(2).double()}, "trainer": {"optimizers": [optimizer]}, "epoch": 1}
    path = checkpoint.save(tmp_path, checkpoint.name_of(1, 0), state)
    momentum = "trainer.optimizers.0.state.0.momentum_buffer"
    some = {"net.b": torch.zeros(2).double(), momentum: torch.zeros(5, dtype=torch.int64)}
    dcp.load(some, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert torch.equal(some["net.b"], state["net"]["b"]) and some[momentum].tolist() == [0, 1, 2, 3, 4]
