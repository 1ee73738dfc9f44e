"""Runs of several processes, over gloo, and what they compute; test_faults.py has those that fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from infopro_fast.errors import ConfigError
from infopro_fast.trainer import checkpoint, run_folder
from infopro_fast.trainer.processes.layout import place_of
from infopro_fast.trainer.settings.config import TrainConfig
from tests.compare import assert_close
from tests.process_tasks import BATCHES_SENT, IN_FLIGHT

pytestmark = pytest.mark.xdist_group("distributed")

ROOT = Path(__file__).parent.parent


def drive(folder, *tasks, prefix=()):
    """What `process_driver` prints; all processes of these tasks are its children. prefix: of the command."""
    command = [*prefix, sys.executable, "-m", "tests.process_driver", str(folder), *tasks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    return folder, drive(folder, "equal_contrast", "equal_float32", "equal_softmax_uneven")


@pytest.mark.parametrize("task, loss", [("equal_contrast", "contrast"), ("equal_softmax_uneven", "softmax")])
@pytest.mark.fast(1)
def test_data_parallel_equals_one_process(equal, task, loss):
    """2 x 64 images with SyncBatchNorm and the global contrast equal 1 x 128, in 20 steps; uneven ones, too.

    In float64: in float32 twenty steps blow rounding up beyond any bound (the test below).
    """
    assert_equal_to_one_process(*equal, task, loss)


def assert_equal_to_one_process(folder, found, task, name):
    """Two processes have the weights and statistics of one, to rounding, and each other's to the bit."""
    for size in ("1", "2"):
        assert set(found[task][size]["codes"]) == {0}, found[task][size]["errors"]
    one, *two = (
        torch.load(folder / task / f"{name}-{size}-{rank}.pt") for size, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert two[0]["norms"] <= {"SyncBatchNorm"}
    for key, expected in one["net"].items():
        if not expected.is_floating_point():
            continue
        assert_close(two[0]["net"][key], expected, what=key, scale=max(1.0, expected.abs().max().item()))
        assert torch.equal(two[0]["net"][key], two[1]["net"][key]), key


@pytest.fixture(scope="module")
def equal_larger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal_larger")
    return folder, drive(folder, "equal_segmenter", "equal_classifier")


@pytest.mark.parametrize("name", ["segmenter", "classifier"])
@pytest.mark.slow
def test_larger_networks_equal_one_process(equal_larger, name):
    """ChainDecoder, StridedHead and DenseHead, with SyncBatchNorm and batches that do not halve evenly."""
    pytest.importorskip("torchvision")
    assert_equal_to_one_process(*equal_larger, f"equal_{name}", name)


@pytest.mark.slow
def test_data_parallel_rounds_as_one_process_does(equal):
    """In float32, two processes are as far from the weights of float64 as one process is."""
    folder, found = equal
    for size in ("1", "2"):
        assert set(found["equal_float32"][size]["codes"]) == {0}, found["equal_float32"][size]["errors"]
    exact, one, two = (
        torch.load(folder / task / f"contrast-{size}-0.pt")["net"]
        for task, size in (("equal_contrast", 1), ("equal_float32", 1), ("equal_float32", 2))
    )

    def distance(net: dict) -> float:
        return (
            torch.stack(
                [
                    (net[name].double() - exact[name]).norm()
                    for name in exact
                    if exact[name].is_floating_point()
                ]
            )
            .norm()
            .item()
        )

    assert 1e-6 < distance(one) and distance(two) < 3 * distance(one), (distance(one), distance(two))


@pytest.mark.parametrize(
    "task, loss, steps", [("equal_contrast", "contrast", 20), ("equal_softmax_uneven", "softmax", 6)]
)
def test_reduced_bytes_are_those_of_the_gradients(equal, task, loss, steps):
    """One reduction a module and step, and as many bytes as the gradients have."""
    folder, _ = equal
    for rank in range(2):
        found = torch.load(folder / task / f"{loss}-2-{rank}.pt")
        assert len(found["calls"]) == 3 * steps
        assert sum(found["calls"]) == found["counted"] == steps * found["bytes"]


@pytest.fixture(scope="module")
def reductions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reductions")
    found = drive(folder, "reductions")["reductions"]
    assert set(found["codes"]) == {0}, found["errors"]
    return folder / "reductions"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_gradient_is_reduced_once(reductions, accumulate):
    """In two steps, the hook gets each gradient twice, and nothing starts another collective."""
    for rank in range(2):
        found = torch.load(reductions / f"reduced-{accumulate}-{rank}.pt")
        assert found["reduced"] == dict.fromkeys(found["trained"], 2) and found["unknown"] == []
        names, counts = zip(*found["collectives"])
        assert names == ("allreduce_.default",) * 6 and sum(counts) == 2 * sum(found["trained"].values())


def test_reductions_go_on_while_the_next_module_computes(reductions):
    """A reduction that begins after the next module's forward began is in time, and changes no bit."""
    for rank in range(2):
        found = torch.load(reductions / f"overlap-{rank}.pt")
        assert found["events"] == [
            "forward 1", "reduce 1", "forward 2", "reduce 2", "wait 1", "forward 3", "reduce 3", "wait 2",
            "wait 3",
        ]
        assert found["in_time"] == [True] * 3
        assert same(*found["nets"])


def test_batches_in_flight_are_bounded(tmp_path):
    """A sender is at most as far ahead as `in_flight` allows, on its side and on the receiver's."""
    found = drive(tmp_path, "back_pressure")["back_pressure"]
    for in_flight in IN_FLIGHT:
        own = found[str(in_flight)]
        assert set(own["codes"]) == {0}, own["errors"]
        sent, received = (
            torch.load(tmp_path / "back_pressure" / f"ahead-{in_flight}-{rank}.pt") for rank in range(2)
        )
        assert sent["kept"] == in_flight
        assert received["ahead"] == [
            min(1 + 2 * in_flight, BATCHES_SENT - number) for number in range(BATCHES_SENT)
        ]
        assert received["values"] == list(range(BATCHES_SENT))
        assert sent["bytes"] == BATCHES_SENT * (4 * 8 * 32 * 32 * 4 + 4 * 8 + 8)  # features, labels, request


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = drive(folder, "runs")["runs"]
    for name, run in runs.items():
        assert set(run["codes"]) == {0} and not any(run["errors"]), (name, run)
    return {name: Path(run["run"]) for name, run in runs.items()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def lines(run):
    """The metrics without what depends on the clock and the machine."""
    records = [json.loads(line) for line in (run / run_folder.METRICS).read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "peak_memory_bytes", "busy")}
        for r in records
    ]


@pytest.mark.parametrize("one, other", [("alone", "two"), ("alone", "three"), ("alone_of_four", "four")])
@pytest.mark.fast(1)
def test_pipeline_is_bit_for_bit_that_of_one_process(runs, one, other):
    """Weights, optimizers, running statistics, metrics, test accuracy."""
    names = [path.name for path in checkpoint.list_checkpoints(runs[one] / "checkpoints")]
    assert names == [path.name for path in checkpoint.list_checkpoints(runs[other] / "checkpoints")]
    for name in names:
        expected, got = (checkpoint.load(runs[run] / "checkpoints" / name) for run in (one, other))
        for part in ("net", "trainer", "meters", "rng", "best", "test", "epoch", "batch"):
            assert same(got[part], expected[part]), part
    assert lines(runs[other]) == lines(runs[one])
    expected, got = (safetensors.torch.load_file(runs[run] / run_folder.WEIGHTS) for run in (one, other))
    assert same(got, expected)


def test_pipeline_tells_how_busy_each_process_was(runs):
    for run, names in (("two", ["module 1", "modules 2-3"]), ("mixed", ["module 1", "modules 2-3"])):
        for record in run_folder.read_metrics(runs[run], "epoch"):
            assert list(record["busy"]) == names
            assert all(0 <= share <= 1 for share in record["busy"].values())
    assert "busy" not in run_folder.read_metrics(runs["alone"], "epoch")[0]


def test_rounded_on_the_wire(runs):
    """Rounded features train the first process' modules to the same bits, and the others to others."""
    expected, got = (
        checkpoint.load(checkpoint.list_checkpoints(runs[run] / "checkpoints")[-1])["net"]
        for run in ("alone", "rounded")
    )
    first = [name for name in expected if name.startswith(("stages.0.", "local_losses.0."))]
    assert first and all(torch.equal(got[name], expected[name]) for name in first)
    assert not torch.equal(got["stages.1.layer2_0.conv1.weight"], expected["stages.1.layer2_0.conv1.weight"])


@pytest.mark.parametrize("other", ["data", "mixed"])
def test_metrics_are_of_all_processes(runs, other):
    """With SyncBatchNorm and the global contrast, losses and accuracies equal one process's, to rounding."""
    expected, got = (run_folder.read_metrics(runs[run], "epoch") for run in ("alone_in_float64", other))
    assert [r["epoch"] for r in got] == [r["epoch"] for r in expected] == [1, 2, 3]
    for theirs, ours in zip(expected, got):
        for part in ("train", "test"):
            assert ours[part].keys() == theirs[part].keys()
            for name, value in theirs[part].items():
                assert_close(torch.tensor(ours[part][name]).double(), torch.tensor(value).double(), what=name)


def test_layouts():
    def spans(size, **settings):
        config = TrainConfig(parallel="pipeline", modules=4, **settings)
        every = [place_of(config, rank, size) for rank in range(size)]
        return [[(one.replica, *one.modules) for one in every], every[0]]

    assert spans(2)[0] == [(0, 0, 1), (0, 2, 3)]
    assert spans(3)[0] == [(0, 0), (0, 1), (0, 2, 3)]
    assert spans(4, pipeline_modules=(1, 3))[0] == [(0, 0), (0, 1, 2, 3), (1, 0), (1, 1, 2, 3)]
    assert spans(4, pipeline_modules=(1, 3))[1].ranks_of_stage(1) == [1, 3]
    data = place_of(TrainConfig(parallel="data", modules=4), 2, 3)
    assert (data.replica, data.replicas, list(data.modules), data.title, data.is_main) == (
        2,
        3,
        [0, 1, 2, 3],
        "rank 2",
        False,
    )
    assert place_of(TrainConfig(parallel="pipeline", modules=4), 1, 2).title == "rank 1 (modules 3-4 of 4)"
    with pytest.raises(ConfigError, match="5 processes for 4 modules: start 4 at most"):
        spans(5)
    with pytest.raises(ConfigError, match="expected a multiple of 2 processes, got 3"):
        spans(3, pipeline_modules=(1, 3))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(wire="bfloat16"), "wire: expected parallel pipeline, got parallel none"),
        (dict(parallel="data", in_flight=3), "in_flight: expected parallel pipeline, got parallel data"),
        (
            dict(sync_batch_norm=True),
            "sync_batch_norm: expected parallel data or pipeline, got parallel none",
        ),
        (
            dict(parallel="pipeline", pipeline_modules=(1, 2)),
            "pipeline_modules: expected numbers of at least 1 whose sum is the 4 modules",
        ),
        (
            dict(parallel="data", global_contrast=True, local_loss="softmax"),
            "global_contrast: local_loss softmax contrasts nothing",
        ),
        (dict(parallel="data", patience=0), "patience: expected a positive number"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_needs_torchrun(tmp_path):
    from infopro_fast.trainer import fit

    with pytest.raises(ConfigError, match="start it with torchrun"):
        fit(TrainConfig(parallel="data", out=tmp_path / "run"))


def test_several_processes_of_a_run_of_one(tmp_path, monkeypatch):
    from infopro_fast.trainer import fit, resume

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected one process, torchrun started 2"):
        fit(TrainConfig(out=tmp_path / "run"))
    (tmp_path / "config.json").write_text(TrainConfig(out=tmp_path).resolved().to_json())
    with pytest.raises(ConfigError, match="expected one process, torchrun started 2"):
        resume(tmp_path)
