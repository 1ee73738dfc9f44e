"""Sequential training: the same bits with and without a cache and after kill -9; one module in memory."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from infopro_fast import build
from infopro_fast.data import fashion_mnist
from infopro_fast.errors import ConfigError, RunError
from infopro_fast.memory import measure_step
from infopro_fast.planning import LiveBytes
from infopro_fast.planning.live import OPTIMIZER
from infopro_fast.trainer import LocalTrainer, evaluate_run, feature_cache, fit, run_folder, schedule
from infopro_fast.trainer.feature_cache import CacheFile, Features
from infopro_fast.trainer.settings.config import TrainConfig
from tests import tiny_run
from tests.process_tasks import AGAIN_KILLED, MOMENTS
from tests.test_distributed import drive, lines, same

pytestmark = pytest.mark.xdist_group("sequential")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("in_turn"), "in_turn")["in_turn"]


def weights(found):
    return safetensors.torch.load_file(Path(found["run"]) / run_folder.WEIGHTS)


def test_each_module_is_trained_in_turn(runs):
    run = Path(runs["never"]["run"])
    assert runs["never"]["codes"] == [0], runs["never"]["errors"]
    records = run_folder.read_metrics(run, "epoch")
    assert [(r["module"], r["epoch"]) for r in records] == [(k, e) for k in (1, 2, 3) for e in (1, 2, 3)]
    assert [r["test"] is None for r in records] == [True] * 6 + [False] * 3
    assert [sorted(r["train"]) for r in records[::3]] == [
        ["module1/reconstruction"], ["module2/contrast", "module2/reconstruction"], ["accuracy", "loss"],
    ]
    assert (run / run_folder.CURVE).is_file() and not (run / "cache").exists()
    assert (
        "the cache of 3 epochs takes up to 16.5 MiB in " in (run.parent / "never-output" / "out0").read_text()
    )


def test_weights_are_of_the_whole_network(runs, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    run = Path(runs["never"]["run"])
    assert evaluate_run(run) == run_folder.read_metrics(run, "epoch")[-1]["test"]


def test_the_cache_changes_no_bit(runs):
    """A cache of all epochs changes no bit; a cache of one epoch is another training."""
    assert runs["no_cache"]["codes"] == runs["one_epoch"]["codes"] == [0]
    assert same(weights(runs["no_cache"]), weights(runs["never"]))
    assert lines(Path(runs["no_cache"]["run"])) == lines(Path(runs["never"]["run"]))
    one, never = weights(runs["one_epoch"]), weights(runs["never"])
    assert torch.equal(one["conv1.weight"], never["conv1.weight"]) and not torch.equal(
        one["fc.weight"], never["fc.weight"]
    )


@pytest.mark.parametrize("moment", [*MOMENTS, "made_anew"])
def test_continues_to_the_same_bits(runs, moment):
    found = runs[moment]
    killed = 0 if moment == "made_anew" else 1 + (moment in AGAIN_KILLED)
    assert found["codes"] == [-9] * killed + [0], found["errors"]
    assert same(weights(found), weights(runs["never"]))
    assert lines(Path(found["run"])) == lines(Path(runs["never"]["run"]))
    leftovers = [path.name for path in Path(found["run"]).rglob(".aside-*")]
    assert leftovers == [] and not (Path(found["run"]) / "cache").exists()


def test_a_damaged_cache_is_found(runs):
    assert runs["damaged"]["codes"] == [2]
    (message,) = runs["damaged"]["errors"]
    assert "epoch0002.bin, batch 0, is damaged: remove" in message and message.count("\n") == 1


def test_one_module_is_in_memory(tmp_path, monkeypatch):
    """In every step there are the parameters of the module in training, and no other."""
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    step, found = LocalTrainer.step_from, []

    def patched(self, *batch):
        if not found or found[-1][0] != self.first:
            own = {id(p) for p in self.net.parameters()}
            found.append(
                (self.first, {id(p) for p in gc.get_objects() if type(p) is nn.Parameter} - before, own)
            )
        return step(self, *batch)

    # The first training of a process imports modules of torch's as it goes, and frames from then, in a cycle,
    # hold on to their parameters.
    fit(tiny_run.config(tmp_path / "first", epochs=1, warmup=0))
    monkeypatch.setattr(LocalTrainer, "step_from", patched)
    gc.collect()
    gc.disable()  # what goes, goes by itself
    try:
        before = {id(p) for p in gc.get_objects() if type(p) is nn.Parameter}
        fit(tiny_run.config(tmp_path / "run", order="sequential", epochs=1, warmup=0))
    finally:
        gc.enable()
    assert [first for first, _, _ in found] == [0, 1, 2]
    for _, alive, own in found:
        assert alive == own and own


def test_the_peak_of_a_step_is_that_of_the_largest_module(tmp_path, monkeypatch):
    """Bytes alive in a step of each module: what it takes among the others, and nothing of theirs."""
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    step, found = LocalTrainer.step_from, {}

    def patched(self, h, image, label, total):
        if self.first:
            h = h.clone()  # what this batch has of the file's mapping, which is of all batches
        live = LiveBytes([*self.net.parameters(), *self.net.buffers(), image, label])
        state = [
            t for optimizer in self.optimizers for entry in optimizer.state.values() for t in entry.values()
        ]
        live.hold(OPTIMIZER, state)
        with live, live.watch_gradients(self.net.parameters()):
            done = step(self, h, image, label, total)
        if state:  # a step that makes it is higher
            found[self.first], given[self.first] = live.peak._replace(optimizer=0), (image, label)
        return done

    given = {}
    monkeypatch.setattr(LocalTrainer, "step_from", patched)
    config = tiny_run.config(tmp_path / "run", order="sequential", epochs=1, warmup=0)
    fit(config)
    net = build("resnet20", 3, lambdas=config.lambdas, image_size=32)
    among_others = measure_step(LocalTrainer(net, schedule.released_sgd(0.05)), *given[0])
    assert found.keys() == {0, 1, 2}
    for k, module in enumerate(among_others.modules):
        less = module.peak.transient - found[k].transient
        assert found[k] == module.peak._replace(transient=found[k].transient) and 0 <= less <= 8 * k, (
            k
        )  # the others' losses


def test_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", tiny_run.load)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(
        RunError,
        match=r"the cache of 3 epochs takes 16\.5 MiB, the disk has 9\.5 MiB free: cache fewer epochs",
    ):
        fit(tiny_run.config(tmp_path / "run", order="sequential"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_file_round_trip(tmp_path, dtype, channels_last):
    batches = [torch.randn(n, 4, 3, 5).to(dtype) for n in (3, 3, 2)]
    if channels_last:
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    file = CacheFile(tmp_path / "x.bin", Features.of(batches[0]), [3, 3, 2])
    file.write(iter(batches[:2]))
    assert len(file.sums) == 2 and not file.is_complete
    file.write(iter(batches[2:]))
    assert file.is_complete and file.path.stat().st_size == file.nbytes == 8 * 60 * dtype.itemsize
    for i, batch in enumerate(batches):
        assert torch.equal(file.read(i), batch) and file.read(i).stride() == batch.stride()


def test_settings(tmp_path):
    for settings, message in (
        (dict(cache=False), "cache: expected order sequential, got order simultaneous"),
        (dict(order="sequential", modules=1), "modules 1 has nothing to train in turn"),
        (dict(order="sequential", cache=False, cached_epochs=2), "cached_epochs and no-cache"),
        (dict(order="sequential", parallel="data"), "order sequential and parallel data"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**settings)
    assert json.loads(TrainConfig(order="sequential", cached_epochs=2).to_json())["cached_epochs"] == 2
