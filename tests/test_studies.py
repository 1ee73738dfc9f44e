"""`reproduce`: which runs it trains, resumes and skips, and what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tyro

import infopro_fast
from infopro_fast import errors
from infopro_fast.errors import ConfigError
from infopro_fast.modules import split
from infopro_fast.studies import costs, figures, known, runner, summary, tables
from infopro_fast.studies import results as results_module
from infopro_fast.studies.reproduce import reproduce, write
from infopro_fast.trainer import checkpoint, run_folder
from infopro_fast.trainer.settings.config import TrainConfig

pytestmark = pytest.mark.xdist_group("studies")

SMALL = dict(
    scale="tiny", arch="resnet20", methods=("e2e", "greedy"), modules=(2,), seeds=1, epochs=1, measure=False
)


def result(method, K, errors, cost=None, weights=None):
    curves = tuple((error + 5, error) for error in errors)
    return results_module.Result(
        tables.Cell(method, K, weights),
        tuple(range(len(errors))),
        tuple(errors),
        tuple(errors),
        curves,
        cost,
        None,
    )


def test_cells_of_the_tables():
    names = [cell.name for cell in tables.cells(tables.Study("table2"))]
    assert names[:5] == ["e2e-k1", "greedy-k2", "greedy-k4", "greedy-k8", "greedy-k16"] and len(names) == 17
    names = [cell.name for cell in tables.cells(tables.Study("table3"))]
    assert names == ["e2e-k1", "checkpoint-k1", "contrast-k2", "contrast-k3", "contrast-k4"]
    assert [cell.name for cell in tables.cells(tables.Study("lambdas", modules=(8,)))][
        1
    ] == "softmax-k8-l5_0_0_2"
    assert [cell.name for cell in tables.cells(tables.Study("fused"))] == ["contrast-k4", "plain-k4"]


def test_settings_of_a_cell():
    study = tables.Study("table2", scale="small")
    differing = {"local_loss", "modules", "lambdas"}
    greedy = {"local_loss": "greedy", "modules": 8, "lambdas": None}
    assert known.settings_of_a_cell(study, tables.Cell("greedy", 8)) == greedy
    assert set(known.settings_of_a_cell(study, tables.Cell("e2e", 1))) == differing
    table3 = tables.Study("table3", scale="full")
    checkpointed = known.settings_of_a_cell(table3, tables.Cell("checkpoint", 1))
    assert set(checkpointed) == differing | {"balanced", "recompute"}
    config = tables.config(study, tables.Cell("contrast", 8), 3)
    assert (config.modules, config.local_loss, config.shrink, config.seed) == (8, "contrast", 2, 3)
    full = tables.config(tables.Study("table2", scale="full"), tables.Cell("contrast", 8), 0)
    assert full.resolved().lambdas == (5, 0, 0, 2)  # the published ones
    assert tables.config(study, tables.Cell("async", 4), 0).order == "sequential"
    assert tables.config(study, tables.Cell("plain", 4), 0).impl == "reference"
    assert tables.config(tables.Study("table3"), tables.Cell("checkpoint", 1), 0).recompute == "sqrt"
    assert tables.config(tables.Study("table3", scale="full"), tables.Cell("contrast", 3), 0).balanced
    searched = tables.config(tables.Study("lambdas"), tables.Cell("softmax", 8, (1.0, 0.0, 0.0, 1.0)), 0)
    assert searched.hold_out == tables.HOLD_OUT and searched.lambdas == (1, 0, 0, 1)


@pytest.mark.parametrize("scale", tables.SCALES)
def test_cells_of_table3_can_be_built(scale):
    """At every scale the cuts are the published ones. Other K and networks are an error before training."""
    study = tables.Study("table3", scale=scale)
    for job in tables.jobs(dataclasses.replace(study, seeds=1)):
        config = job.config.resolved()
        net = infopro_fast.build(
            config.arch,
            config.modules,
            config.local_loss,
            config.lambdas,
            config.balanced,
            cuts=config.cuts,
            image_size=config.image_size,
        )
        cuts = split.BALANCED.get(("resnet110", 32, config.modules), ())
        assert [list(dict(stage.named_children()))[-1] for stage in net.stages[:-1]] == [
            f"layer{stage}_{block}" for stage, block in cuts
        ]
    for wrong in (dict(modules=(5,)), dict(arch="resnet32")):
        with pytest.raises(ConfigError, match="table3: the published balanced splits are of"):
            tables.jobs(dataclasses.replace(study, **wrong))


def test_scale_paper_is_the_published_recipe(tmp_path):
    study = tables.Study("table2", scale="paper", dataset="cifar10", data_root=tmp_path)
    config = tables.config(study, tables.Cell("contrast", 16), 0)
    assert (config.epochs, config.batch_size, config.lr, config.schedule) == (160, 1024, 0.8, "cosine")
    with pytest.raises(ConfigError, match="scale paper: the published recipe is of cifar10"):
        tables.Study("table2", scale="paper")
    digits = tables.Study("table2", scale="paper", dataset="svhn", data_root=tmp_path)
    with pytest.raises(
        ConfigError, match="the paper has arch resnet110 on svhn, got resnet32: give --arch resnet110"
    ):
        tables.jobs(digits)
    assert tables.jobs(dataclasses.replace(digits, arch="resnet110"))[0].config.epochs == 160


def test_published_numbers():
    study = tables.Study("table2")
    assert tables.published(study, tables.Cell("greedy", 8)) == (21.19, 0.52)
    assert tables.published(study, tables.Cell("e2e", 1)) == (7.37, 0.10)
    assert tables.published(study, tables.Cell("auglocal", 8)) is None
    assert tables.published(tables.Study("table3"), tables.Cell("checkpoint", 1)) == (6.50, 0.34)
    digits = tables.Study("table2", dataset="svhn", arch="resnet110")
    assert tables.published(digits, tables.Cell("contrast", 16)) == (3.91, 0.16)
    for none in (dataclasses.replace(digits, arch="resnet32"), dataclasses.replace(digits, table="table3")):
        assert (
            tables.published(none, tables.Cell("e2e", 1)) is None
            and tables.published_memory(none, tables.Cell("e2e", 1)) is None
        )
    photos = tables.Study("table3", dataset="stl10")
    assert tables.published(photos, tables.Cell("contrast", 3)) == (21.00, 0.52)
    assert tables.published_memory(photos, tables.Cell("contrast", 3)) == 4.96


ORDER = ", other numbers: what can be compared is the order of the methods."


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(), f"on CIFAR-10 after 160 epochs. Other images{ORDER}"),
        (dict(dataset="cifar10", scale="paper"), "on CIFAR-10 after 160 epochs."),
        (dict(dataset="svhn", scale="paper", arch="resnet110"), "on SVHN after 160 epochs."),
        (
            dict(dataset="cifar10", scale="paper", epochs=20),
            f"on CIFAR-10 after 160 epochs. Another schedule{ORDER}",
        ),
        (dict(dataset="stl10", scale="full"), f"on STL-10 after 160 epochs. Another schedule{ORDER}"),
    ],
)
def test_what_the_text_says_of_the_papers_numbers(tmp_path, settings, text):
    root = {"data_root": tmp_path} if "dataset" in settings else {}
    whole = summary.markdown(
        tables.Study("table2", **settings, **root),
        [dataclasses.replace(result("e2e", 1, (7,)), paper=(7.37, 0.10))],
    )
    assert f"\n\nIn brackets: what the paper has in this cell, {text}\n" in whole


def test_flags_say_the_settings():
    """The command line parses them to the same settings."""
    for settings in (
        dict(modules=16, lambdas=(5.0, 0.05, 0.2, 0.5), augment=False, shrink=2),
        dict(local_loss="none", recompute="sqrt", amp="bfloat16", epochs=3),
        dict(modules=3, cuts=((1, 9), (2, 2))),
    ):
        config = TrainConfig(**settings)
        assert tyro.cli(TrainConfig, args=runner.flags(config)) == config


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two cells, trained at the same time for an epoch on images of 8x8."""
    found = tables.Study("table2", jobs=2, out=tmp_path_factory.mktemp("study"), **SMALL)
    reproduce(found)
    return found


def test_table_and_figures(study):
    text = (study.out / "table2.md").read_text()
    assert "resnet20 on fashion_mnist, 8x8 (averaged down), 1 epochs" in text and "| greedy SL |  | " in text
    content = json.loads((study.out / "table2.json").read_text())
    cells = {(cell["method"], cell["modules"]): cell for cell in content["cells"]}
    assert set(cells) == {("e2e", 1), ("greedy", 2)} and all(cell["seeds"] == [0] for cell in cells.values())
    for job in tables.jobs(study):
        accuracy = run_folder.read_metrics(job.folder, "epoch")[-1]["test"]["accuracy"]
        assert cells[job.cell.method, job.cell.modules]["errors"][job.seed] == pytest.approx(
            100 - 100 * accuracy
        )
    for name in ("table2_modules.png", "table2_curves.png"):
        assert (study.out / name).read_bytes()[:4] == b"\x89PNG"


def test_finished_runs_are_not_trained_again(study, capsys, monkeypatch):
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *a, **k: pytest.fail("a run was started"))
    reproduce(study)
    assert "2 of 2 runs are there already" in capsys.readouterr().out


@pytest.mark.slow
def test_another_run_in_the_folder_is_an_error(study):
    other = dataclasses.replace(study, epochs=2)
    with pytest.raises(
        errors.StudyError, match=r"e2e-k1-seed0 holds a run with other settings \(epochs 1, warmup 0\)"
    ):
        reproduce(other)


def test_failed_runs_are_named_and_the_others_written(study, monkeypatch):
    """A third cell fails: the table has the other two."""
    small = dataclasses.replace(study, methods=("e2e", "greedy", "dgl"))
    (study.out / "table2.md").unlink()
    real = runner.flags
    monkeypatch.setattr(
        runner, "flags", lambda c: real(c) + (["--resume-previous"] if c.local_loss == "dgl" else [])
    )
    with pytest.raises(
        errors.StudyError,
        match=r"1 of 3 runs failed .*dgl-k2-seed0: infopro-fast: error: --resume-previous says",
    ):
        reproduce(small)
    text = (study.out / "table2.md").read_text()
    assert "| end to end |" in text and "| greedy SL |" in text and "DGL" not in text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(errors.StudyError, match="no run of table2 at scale tiny is finished"):
        reproduce(tables.Study("table2", out=tmp_path, train=False, **SMALL))


@pytest.mark.slow
def test_stopped_study_goes_on(tmp_path):
    """After SIGTERM no process is left, and the same command continues the run."""
    # One run of enough epochs to be in the middle of.
    command = [
        sys.executable, "-m", "infopro_fast", "reproduce", "table2", "--scale", "tiny", "--arch", "resnet20",
        "--methods", "e2e", "--seeds", "1", "--epochs", "4", "--no-measure", "--out", str(tmp_path / "study"),
    ]
    folder = tmp_path / "study/runs/fashion_mnist-resnet20-tiny/e2e-k1-seed0"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not run_folder.read_metrics(folder, "epoch") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "stopped by SIGTERM; the same command goes on from here" in error
    ), error
    before = run_folder.read_metrics(folder, "epoch")
    assert 0 < len(before) < 4
    with run_folder.locked(folder):  # nobody is left in it
        pass
    assert subprocess.run(command, capture_output=True).returncode == 0
    after = run_folder.read_metrics(folder, "epoch")
    assert len(after) == 4 and after[: len(before)] == before


def test_comparison():
    cost = {"seconds": 0.1, "saved": 2**20, "peak": 2**21}
    results = [
        result("e2e", 1, (10, 11, 12), cost), result("greedy", 8, (20, 21, 22), cost),
        result("softmax", 8, (15, 16, 17), cost),
        result("contrast", 8, (14, 15, 16), cost),
    ]
    (row,) = results_module.compare(results)
    assert (
        row["which"] == "contrast"
        and row["margin"] == pytest.approx(6)
        and row["gap_to_e2e"] == pytest.approx(4)
    )
    assert row["standard_error"] == pytest.approx(math.sqrt(2 / 3)) and row[
        "in_standard_errors"
    ] == pytest.approx(6 / math.sqrt(2 / 3))
    text = summary.markdown(tables.Study("table2"), results)
    assert "| greedy SL |  | 21.00 ± 1.00 |" in text and "100 ms, 1.0, 2.0" in text
    assert (
        "K = 8: greedy SL 21.00 %, InfoPro, contrast 15.00 %: 6.00 points lower, 7.3 standard errors" in text
    )


def test_single_runs_have_no_standard_error(tmp_path):
    """The text has none, and the JSON no nan."""
    results = [result("e2e", 1, (10,)), result("greedy", 8, (20,)), result("contrast", 8, (14,))]
    (row,) = results_module.compare(results)
    assert (row["margin"], row["standard_error"], row["in_standard_errors"]) == (6, None, None)
    study = tables.Study("table2", out=tmp_path)
    text, numbers, *_ = write(study, results, known.Known({}, {}, []))
    assert "InfoPro, contrast 14.00 %: 6.00 points lower; +4.00 points from end to end." in text.read_text()
    assert "nan" not in text.read_text()
    json.loads(numbers.read_text(), parse_constant=pytest.fail)


def test_every_method_against_greedy():
    """Each is compared with the greedy SL of its K; end to end, and K without greedy SL, are not."""
    results = [
        result("e2e", 1, (10, 11)), result("greedy", 8, (20, 21, 22)), result("dgl", 8, (22, 23, 24)),
        result("contrast", 8, (14, 15, 16)),
        result("contrast", 4, (1, 3)), result("greedy", 2, (7,)), result("softmax", 2, (5,)),
    ]
    found = {cell.name: difference for cell, difference in results_module.below_greedy(results).items()}
    assert set(found) == {"dgl-k8", "contrast-k8", "softmax-k2"}
    assert found["dgl-k8"] == pytest.approx((-2, math.sqrt(2 / 3))) and found["contrast-k8"] == pytest.approx(
        (6, math.sqrt(2 / 3))
    )
    assert found["softmax-k2"][0] == 2 and math.isnan(found["softmax-k2"][1])
    text = summary.markdown(tables.Study("table2"), results)
    assert (
        "| InfoPro, contrast |  |  | 2.00 ± 1.41 (2 runs) | 15.00 ± 1.00 |" in text
        and "| greedy SL |  | 7.00 (one run) |" in text
    )
    for line in (
        "| DGL |  | -2.00 (-2.4) |",
        "| InfoPro, contrast |  | 6.00 (7.3) |",
        "| InfoPro, softmax | 2.00 |  |",
    ):
        assert line in text
    # Squares about the means: 0.5, 2, 2, 2, 2 of cells with 1, 2, 2, 2, 1 degrees of freedom; single runs
    # have none.
    assert results_module.pooled_deviation(results) == pytest.approx(math.sqrt(8.5 / 8))
    assert (
        "Pooled over all cells it is 1.03 points" in text
        and "means of 3 runs then has a standard error of 0.84" in text
    )
    assert math.isnan(results_module.pooled_deviation(results[-2:])) and "Pooled" not in summary.markdown(
        tables.Study("table2"), results[-2:]
    )
    assert summary.AGAINST_GREEDY not in summary.markdown(tables.Study("table2"), results[:1])


def test_table3_has_memory_beside_the_papers():
    cost = {"seconds": 0.1, "saved": 2**20, "peak": 2**21}
    results = [
        result("e2e", 1, (10,), cost),
        result("contrast", 4, (20,), {"seconds": 0.2, "saved": 2**18, "peak": 2**20}),
    ]
    study = tables.Study("table3")
    text = summary.markdown(study, results)
    assert "| end to end | 1 | 1.0 | 100.0 % | 2.0 | 100.0 % | 100 | 9.40 | 100.0 % |" in text
    assert "| InfoPro, contrast | 4 | 0.2 | 25.0 % | 1.0 | 50.0 % | 200 | 3.52 | 37.4 % |" in text
    alone = summary.markdown(study, results[1:])  # end to end has not been trained yet
    assert "| InfoPro, contrast | 4 | 0.2 |  | 1.0 |  | 200 | 3.52 | 37.4 % |" in alone
    assert tables.published_memory(tables.Study("table2"), tables.Cell("e2e", 1)) is None
    assert "on a Titan Xp, images of 32x32, batch 1024." in text
    photos = summary.markdown(tables.Study("table3", dataset="stl10", data_root="d"), results)
    assert "on a Titan Xp, images of 96x96, batch 128." in photos and "| 100 | 10.77 | 100.0 % |" in photos
    assert "Titan" not in summary.markdown(tables.Study("table3", dataset="svhn", data_root="d"), results)


def test_table_of_weights():
    results = [
        result("softmax", 8, (20,), weights=(5.0, 0.0, 0.0, 2.0)),
        result("softmax", 8, (19,), weights=(5.0, 0.5, 0.5, 1.0)),
    ]
    text = summary.markdown(tables.Study("lambdas"), results)
    assert text.index("| InfoPro, softmax | 8 | 5, 0.5, 0.5, 1 | 19.00 (one run) |") < text.index(
        "| 5, 0, 0, 2 | 20.00 (one run) |"
    )
    assert "on the last 1000 training images held out" in text and "[" not in text


def test_figures_of_costs(tmp_path):
    cost = {"seconds": 0.1, "saved": 2**20, "peak": 2**21}
    results = [
        result("e2e", 1, (10, 11), cost),
        result("greedy", 8, (20, 21), cost),
        result("greedy", 16, (22, 23), cost),
    ]
    paths = figures.draw(tables.Study("table2", out=tmp_path), results)
    assert [path.name for path in paths] == ["table2_curves.png", "table2_modules.png", "table2_memory.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


@pytest.mark.slow
def test_costs_of_a_step():
    """A module keeps less than the whole network; seeds share a measurement, numbers of modules do not."""
    study = tables.Study("table2", scale="tiny", arch="resnet20")
    jobs = [
        tables.config(study, tables.Cell(method, K), seed)
        for method, K, seed in (("e2e", 1, 0), ("e2e", 1, 1), ("greedy", 4, 0))
    ]
    keys = [costs.key(config) for config in jobs]
    assert keys[0] == keys[1] != keys[2]
    whole, part = costs.measure(jobs[0]), costs.measure(jobs[2])
    assert 0 < part["saved"] < whole["saved"] <= whole["peak"] and whole["seconds"] > 0
    assert costs.measure(tables.config(study, tables.Cell("async", 4), 0)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(seeds=0), "seeds: expected an integer of at least 1, got 0"),
        (dict(modules=(1,)), "modules: expected numbers of at least 2"),
        (dict(first_seed=-1), "first_seed: expected an integer of at least 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        tables.Study("table2", **settings)


def test_impossible_cells_are_found_before_training(tmp_path):
    with pytest.raises(
        ConfigError, match=r"modules: expected at most 16 for resnet32 \(stem and 15 blocks\), got 40"
    ):
        reproduce(tables.Study("table2", modules=(40, 2), out=tmp_path))
    for table, message in (
        ("fused", "methods: fused has its own"),
        ("lambdas", "methods: lambdas are of softmax and contrast"),
    ):
        with pytest.raises(ConfigError, match=message):
            reproduce(tables.Study(table, methods=("e2e",), out=tmp_path))
    assert not any(os.scandir(tmp_path))


@pytest.mark.parametrize(
    "there", ["", "checkpoints/{name}", "checkpoints/module001/{name}", "trained/module001"]
)
def test_what_a_killed_run_has_to_go_on_from(tmp_path, there):
    """A run continues from a whole checkpoint or a trained module. After half of one it begins again."""
    run = tmp_path / "run"
    for half in (
        f"checkpoints/.aside-{checkpoint.name_of(0, 0)}",
        "checkpoints/module001",
        "trained/.aside-module001",
    ):
        (run / half).mkdir(parents=True)
    (run / run_folder.CONFIG).touch()
    if there:
        (run / there.format(name=checkpoint.name_of(0, 0))).mkdir(exist_ok=True)
    runner.remove_unbegun(run)
    assert run.is_dir() == bool(there)


@pytest.mark.slow
def test_modules_trained_in_turn(tmp_path, monkeypatch):
    """An asynchronous cell continues between its modules; its curve has the last module's epochs."""
    study = tables.Study("table2", out=tmp_path, **{**SMALL, "methods": ("async",)})
    (job,) = tables.jobs(study)
    statuses, real = [], runner.status
    monkeypatch.setattr(runner, "status", lambda job: statuses.append(real(job)) or statuses[-1])
    monkeypatch.setattr(runner, "progress", _bars_without_a_terminal)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    runs = runner.subprocess.Popen
    started = []
    monkeypatch.setattr(
        runner.subprocess,
        "Popen",
        lambda command, **options: started.append(runs(command, **options)) or started[-1],
    )

    def stopped_between(status: str):
        if "module 1/2" in status and len(started) == 1 and (job.folder / "trained" / "module001").is_dir():
            started[0].kill()
            started[0].wait()
            shutil.rmtree(
                job.folder / "checkpoints"
            )  # as the trainer leaves it while the first module's outputs are cached
            (job.folder / "checkpoints").mkdir()

    monkeypatch.setattr(_Watched, "seen", staticmethod(stopped_between))
    with pytest.raises(errors.StudyError, match="1 of 1 runs failed"):
        reproduce(study)
    reproduce(study)
    assert len(started) == 2 and any(status.startswith("module 1/2, epoch 1/1") for status in statuses)
    assert "test accuracy" in real(job) and real(job).startswith("module 2/2, epoch 1/1")
    (cell,) = json.loads((tmp_path / "table2.json").read_text())["cells"]
    assert cell["method"] == "async" and len(cell["curves"][0]) == 1
    records = run_folder.read_metrics(job.folder, "epoch")
    assert [(r["module"], r["test"] is None) for r in records] == [(1, True), (2, False)]


class _Watched:
    @staticmethod
    def seen(status: str) -> None: ...


@contextlib.contextmanager
def _bars_without_a_terminal(total: int, done: int):
    """Show the bars of a terminal, without one."""
    from rich.console import Console
    from rich.progress import Progress

    class Bars(runner.Bars):
        def update(self, job):
            super().update(job)
            if run_folder.read_metrics(job.folder, "epoch"):
                _Watched.seen(runner.status(job))

    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as bars:
        yield Bars(total, done, bars)


# ------------------------------------------------------------------------------------------------------------
# Runs of earlier studies


def test_known_runs_are_not_trained_again(study, tmp_path, monkeypatch):
    """A known table has end to end, greedy is trained here; the new table has both, with sources."""
    elsewhere = dataclasses.replace(study, methods=("e2e",), train=False)
    nothing = known.Known({}, {}, [])
    _, path, *_ = write(
        dataclasses.replace(elsewhere, out=tmp_path / "there"),
        results_module.collect(elsewhere, nothing),
        nothing,
    )
    asked = []
    monkeypatch.setattr(
        runner, "run_all", lambda jobs, at_a_time: asked.extend(job.cell.name for job in jobs)
    )
    joined = dataclasses.replace(study, known=(path,), out=tmp_path / "here")
    reproduce(joined)
    assert asked == ["greedy-k2"]
    ours = json.loads((study.out / "table2.json").read_text())
    content = json.loads((tmp_path / "here/table2.json").read_text())
    assert content["cells"] == [cell for cell in ours["cells"] if cell["method"] == "e2e"]
    (source,) = content["known"]
    expected = {"method": "e2e", "modules": 1, "weights": None, "seeds": [0]}
    assert source["cells"] == [expected] and source["where"] == ours["where"]


def test_sources_survive_joining_again(study, tmp_path, monkeypatch):
    """A run that a known table took from an earlier one keeps its first source."""
    content = json.loads((study.out / "table2.json").read_text())
    there, earlier = {"cpu": "this"}, {"cpu": "another"}
    # As the oldest tables have it: without weights.
    content |= {
        "where": there,
        "known": [{"where": earlier, "cells": [{"method": "e2e", "modules": 1, "seeds": [0]}]}],
    }
    (tmp_path / "joined.json").write_text(json.dumps(content))
    monkeypatch.setattr(runner, "run_all", lambda jobs, at_a_time: None)
    for again in (tmp_path / "joined.json", tmp_path / "1/table2.json"):
        out = tmp_path / str(int(again.parent.name == "1") + 1)
        reproduce(dataclasses.replace(study, known=(again,), out=out))
        sources = {s["cells"][0]["method"]: s for s in json.loads((out / "table2.json").read_text())["known"]}
        assert {method: source["where"] for method, source in sources.items()} == {
            "e2e": earlier,
            "greedy": there,
        }
        assert all(
            len(source["cells"]) == 1 and source["cells"][0]["seeds"] == [0] for source in sources.values()
        )


def test_known_seeds_join_new_ones(study, tmp_path, monkeypatch):
    """A known seed 0 and a new seed 1 make one cell."""
    two = dataclasses.replace(
        study, seeds=2, methods=("e2e",), known=(study.out / "table2.json",), out=tmp_path
    )
    monkeypatch.setattr(runner, "run_all", lambda jobs, at_a_time: None)
    monkeypatch.setattr(results_module, "finished", lambda job: True)
    epochs = [{"epoch": 1, "test": {"accuracy": 0.5, "loss": 1.25}}]
    monkeypatch.setattr(
        results_module, "tested_epochs", lambda job: epochs if job.seed == 1 else pytest.fail(job.folder.name)
    )
    reproduce(two)
    (cell,) = json.loads((tmp_path / "table2.json").read_text())["cells"]
    assert cell["seeds"] == [0, 1] and cell["errors"][1] == 50 and cell["cross_entropies"][1] == 1.25


def test_known_tables_of_other_settings_are_an_error(study, tmp_path):
    path = study.out / "table2.json"
    for settings, message in (
        (
            dict(epochs=2),
            r"table2.json: e2e-k1: runs with other settings "
            r"\(epochs: expected 2, got 1, warmup: expected 1, got 0\)",
        ),
        (dict(arch="resnet32"), "arch: expected resnet32, got resnet20"),
    ):
        with pytest.raises(errors.StudyError, match=message):
            reproduce(dataclasses.replace(study, known=(path,), out=tmp_path, **settings))
    content = json.loads(path.read_text())
    content["cells"][1]["settings"]["local_loss"] = "dgl"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(
        errors.StudyError, match=r"other.json: greedy-k2: .*local_loss: expected greedy, got dgl"
    ):
        reproduce(dataclasses.replace(study, known=(tmp_path / "other.json",), out=tmp_path))
    content = json.loads(path.read_text())
    # none of these changes a result
    content["settings"] |= {"device": "cuda", "threads": 64, "impl": "triton", "in_flight": 2, "gone": 1}
    (tmp_path / "elsewhere.json").write_text(json.dumps(content))
    assert len(known.read(dataclasses.replace(study, known=(tmp_path / "elsewhere.json",))).runs) == 2
    for text in ("{", "[]", "{}", "3"):
        (tmp_path / "none.json").write_text(text)
        with pytest.raises(errors.StudyError, match="none.json: not the JSON of a table"):
            reproduce(dataclasses.replace(study, known=(tmp_path / "none.json",), out=tmp_path))
    with pytest.raises(errors.StudyError, match="absent.json: not the JSON of a table"):
        reproduce(dataclasses.replace(study, known=(tmp_path / "absent.json",), out=tmp_path))


def test_the_depth_of_auglocals_nets_is_of_a_cell(study, tmp_path):
    """Tables without this setting are accepted; in a row of auglocal that has it, it must agree."""
    path, deep = study.out / "table2.json", dataclasses.replace(study, methods=("auglocal", "e2e"))
    assert [cell.name for cell, _ in known.read(dataclasses.replace(deep, known=(path,))).runs] == ["e2e-k1"]
    content = json.loads(path.read_text())
    e2e, row = content["cells"]
    cell = tables.Cell("auglocal", 2)
    for depth in (3, 5, None):
        settings = known.settings_of_a_cell(deep, cell) | {"aux_depth": depth}
        if depth is None:
            del settings["aux_depth"]
        row |= {"method": "auglocal", "settings": settings}
        (tmp_path / "table.json").write_text(json.dumps(content))
        there = dataclasses.replace(deep, known=(tmp_path / "table.json",))
        if depth == 5:
            with pytest.raises(
                errors.StudyError, match="auglocal-k2: runs with other settings .aux_depth: expected 3, got 5"
            ):
                known.read(there)
        else:
            assert set(known.read(there).runs) == {(cell, 0), (tables.Cell("e2e", 1), 0)}
