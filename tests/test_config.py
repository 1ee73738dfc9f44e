"""TrainConfig: what is refused and by which words, defaults written out, and that JSON gives the same
settings back."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infopro_fast.errors import ConfigError
from infopro_fast.trainer.settings import fields, files, recipes
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import different
from infopro_fast.trainer.settings.data_sets import IMAGE_SIZES, RECIPES


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(augment="yes"), "augment: expected true or false, got 'yes'"),
        (dict(lr="fast"), "lr: expected a positive number, got 'fast'"),
        (dict(data_root=3), "data_root: expected a path, got 3"),
        (dict(pipeline_modules=()), r"pipeline_modules: expected numbers of at least 1, got \(\)"),
        (dict(crop=(64,)), r"crop: expected height and width of at least 32, got \(64,\)"),
        (dict(dataset="mnist"), "dataset: expected one of fashion_mnist, .*, got 'mnist'"),
        (dict(arch="vgg"), "arch: expected one of .*, got 'vgg'"),
        (dict(local_loss="info"), "local_loss: expected one of"),
        (dict(dtype="float16"), "dtype: expected one of"),
        (dict(impl="tpu"), "impl: expected one of"),
        (dict(net_config="9c9f"), "net_config: expected one of"),
        (dict(schedule="linear"), "schedule: expected one of"),
        (dict(modules=0), "modules: expected an integer of at least 1, got 0"),
        (dict(epochs=0), "epochs: expected an integer of at least 1, got 0"),
        (dict(batch_size=2.5), "batch_size: expected an integer of at least 1, got 2.5"),
        (dict(lr=-1.0), "lr: expected a positive number, got -1.0"),
        (dict(lr=float("nan")), "lr: expected a positive number, got nan"),
        (dict(checkpoint_minutes=0), "checkpoint_minutes: expected a positive number"),
        (dict(momentum=1.0), r"momentum: expected a number in \[0, 1\), got 1.0"),
        (dict(weight_decay=float("inf")), "weight_decay"),
        (dict(lambdas=(1, 2)), "lambdas: expected 4 numbers"),
        (dict(lambdas=(1, 2, 3, -1)), "lambdas: expected 4 numbers of at least 0"),
        (dict(cuts=((1, 2, 3),)), "cuts: expected pairs"),
        (dict(data_root="x"), "fashion_mnist comes with the package"),
        (dict(download=True), "neither data_root nor download"),
        (dict(dataset="cifar10"), "dataset cifar10 needs data_root"),
        (dict(dataset="svhn", download=True), "dataset svhn needs data_root.*: give --data-root DIR$"),
        (dict(local_loss="none", modules=4), "local_loss none trains end to end: expected modules 1, got 4"),
        (dict(cuts=((1, 0),), balanced=True), "cuts, balanced, budget: a split is given"),
        (dict(cuts=((1, 0),), modules=4), "modules 4 and cuts: expected 3 cuts, got 1"),
        (
            dict(lambdas=(1, 1, 1, 1), local_loss="greedy"),
            "lambdas: local_loss greedy with modules 4 has nothing to weigh",
        ),
        (
            dict(lambdas=(1, 1, 1, 1), modules=1),
            "lambdas: local_loss contrast with modules 1 has nothing to weigh",
        ),
        (dict(net_config="1c2f", local_loss="dgl"), "net_config: local_loss dgl has no such head"),
        (
            dict(net_config="1c2f", modules=1),
            "net_config: local_loss contrast with modules 1 has no such net",
        ),
        (
            dict(feature_dim=64, local_loss="dgl"),
            "feature_dim: local_loss dgl with modules 4 has no such net",
        ),
        (dict(widen=2.0, local_loss="none"), "widen: local_loss none with modules 1 has no such net"),
        (dict(balanced=True, modules=1), "balanced: modules 1 has nothing to split"),
        (dict(zero_last_epoch=False), "zero_last_epoch: schedule one_cycle has no such epoch"),
        (dict(device="meta"), "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (dict(seed=-1), r"seed: expected an integer of at least 0 and below 2\^63, got -1"),
        (dict(seed=10**23), "seed: expected an integer"),
        (dict(seed=1.5), "seed: expected an integer"),
        (dict(batch_size=True), "batch_size: expected an integer of at least 1, got True"),
        (dict(impl="cpu", device="cuda"), "impl cpu and device cuda"),
        (dict(schedule="step", warmup=3), "schedule step has no warm-up, got warmup 3"),
        (dict(schedule="cosine", warmup=10, epochs=10), "warmup 10: expected fewer than the 10 epochs"),
    ],
)
def test_refuses_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("epochs, warmup", [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_a_short_run_has_a_short_warmup(epochs, warmup):
    recipe = RECIPES["fashion_mnist"]
    assert TrainConfig(epochs=epochs).resolved().warmup == min(warmup, recipe.warmup)


def test_a_run_counted_in_steps():
    """Its epochs, and how long a warm-up there can be, are known with the images."""
    config = TrainConfig(iterations=100).resolved()
    assert config.warmup is None and config.resolved() == config
    assert (config.in_epochs(125).epochs, config.in_epochs(125).warmup) == (1, 0)
    assert (config.in_epochs(30).epochs, config.in_epochs(30).warmup, config.in_epochs(30).iterations) == (
        4,
        1,
        100,
    )
    assert (
        TrainConfig(iterations=10000, warmup=6).resolved().in_epochs(125).warmup == 6
    )  # more than the 5 epochs of the recipe
    with pytest.raises(ConfigError, match="warmup 2: expected fewer than the 2 epochs of 100 iterations"):
        TrainConfig(iterations=100, warmup=2).resolved().in_epochs(50)
    assert TrainConfig().resolved().in_epochs(50) == TrainConfig().resolved()


def test_the_folder_of_the_images_is_absolute():
    assert TrainConfig(dataset="cifar10", data_root="data").resolved().data_root == Path.cwd() / "data"


def test_defaults_are_written_out():
    config = TrainConfig().resolved()
    recipe = RECIPES["fashion_mnist"]
    assert (config.dataset, config.arch, config.modules, config.local_loss) == (
        "fashion_mnist",
        "resnet32",
        4,
        "contrast",
    )
    assert config.lambdas == (6, 0, 1, 2)  # published for ResNet-32, K = 4
    assert (config.epochs, config.batch_size, config.lr) == (recipe.epochs, recipe.batch_size, recipe.lr)
    assert config.threads == torch.get_num_threads() and config.device in ("cpu", "cuda")
    assert None not in [
        getattr(config, n) for n in ("epochs", "batch_size", "lr", "schedule", "warmup", "modules", "lambdas")
    ]
    assert config.resolved() == config


@pytest.mark.parametrize(
    "settings,expected",
    [
        (dict(dataset="cifar10", arch="resnet110", modules=16), (5, 0, 0.5, 1)),
        (dict(dataset="cifar10", arch="resnet110", modules=3, balanced=True), (5, 0, 5, 0.1)),
        (dict(dataset="svhn", arch="resnet110", modules=2), (1, 0.1, 0, 0)),
        (dict(dataset="svhn", arch="resnet110", modules=16), (5, 0.2, 0.5, 1)),
        (dict(dataset="stl10", arch="resnet110", modules=4), (20, 0.2, 5, 2)),
        (dict(dataset="stl10", arch="resnet110", modules=4, balanced=True), (20, 0.5, 10, 1)),
        (dict(dataset="cifar10", arch="resnet32", modules=1), None),
        (dict(dataset="cifar10", arch="resnet32", local_loss="dgl"), None),
        (dict(dataset="cifar10", arch="resnet110", modules=8, lambdas=(1, 2, 3, 4)), (1, 2, 3, 4)),
    ],
)
def test_published_rows(settings, expected):
    """Weights and training settings of the paper's rows; a setting that is given stays."""
    config = TrainConfig(data_root="data", **settings).resolved()
    assert config.lambdas == expected
    published = {"cifar10": (160, 1024, 0.8), "svhn": (160, 1024, 0.8), "stl10": (160, 128, 0.1)}[
        config.dataset
    ]
    assert (config.epochs, config.batch_size, config.lr) == published
    assert (config.schedule, config.warmup, config.momentum, config.weight_decay) == ("cosine", 10, 0.9, 1e-4)
    assert config.zero_last_epoch and not config.drop_last


def test_number_of_modules():
    assert TrainConfig(local_loss="none").resolved().modules == 1
    assert TrainConfig(cuts=((1, 0), (2, 0))).resolved().modules == 3
    assert TrainConfig(schedule="step").resolved().warmup == 0


def test_image_sizes_are_those_of_the_data():
    from infopro_fast import data

    assert IMAGE_SIZES["fashion_mnist"] == data.load("fashion_mnist").image_size
    assert set(IMAGE_SIZES) == set(RECIPES)


OTHER = TrainConfig(dataset="stl10", data_root="a b", cuts=((1, 0), (2, 1)), lambdas=(0.1, 0, 1 / 3, 2))


@pytest.mark.parametrize("config", [TrainConfig(), OTHER])
def test_json_round_trip(config):
    for each in (config, config.resolved()):
        assert TrainConfig.from_json(each.to_json()) == each
    assert set(json.loads(config.to_json())) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_json_of_an_unknown_setting():
    with pytest.raises(
        ConfigError, match="not the settings of a run: schedul: no such setting; did you mean schedule?"
    ):
        TrainConfig.from_json('{"schedul": "step"}')


@pytest.mark.parametrize("text", ["", "[1]", '{"learning_rate": 1}', "{"])
def test_json_of_something_else(text):
    with pytest.raises(ConfigError, match="not the settings of a run"):
        TrainConfig.from_json(text)


def test_every_field_is_explained():
    import inspect

    source = inspect.getsource(TrainConfig).split("def __post_init__")[0]
    for field in dataclasses.fields(TrainConfig):
        after = source.split(f"\n    {field.name}: ")[1]
        assert re.match(r'(?s)[^"]*("\w+"[^"]*)*\n    """[A-Za-z0-9][^"]*\."""\n', after), field.name


def test_importing_settings_needs_no_torch():
    modules = "config, continuing, files, recipes"
    code = f"import sys\nfrom infopro_fast.trainer.settings import {modules}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not {"torch", "numpy", "matplotlib"} & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------------------
# What a change of a setting changes


def test_marks():
    """Every setting has one; two runs are the same training unless they differ in what changes the result."""
    marks = {name: field.mark for name, field in fields.of(TrainConfig).items()}
    assert set(marks) == {field.name for field in dataclasses.fields(TrainConfig)}
    by_mark = {mark: {name for name in marks if marks[name] is mark} for mark in set(marks.values())}
    assert set(by_mark) == {fields.NOTHING, fields.MACHINE, fields.BITS, fields.RESULT}
    assert {"out", "log_every", "recipe", "cache"} <= by_mark[fields.NOTHING]
    assert {"threads", "workers", "parallel", "in_flight", "pipeline_modules"} <= by_mark[fields.MACHINE]
    assert {"device", "impl", "recompute", "cuda_graph"} <= by_mark[fields.BITS]
    assert {"seed", "lr", "amp", "wire", "hold_out", "epochs"} <= by_mark[fields.RESULT]


@pytest.mark.parametrize(
    "settings, names",
    [
        (dict(out="x", log_every=3, patience=9.0), []),
        (dict(threads=7, recompute="block", impl="reference"), []),
        (dict(parallel="pipeline", in_flight=4), []),
        (dict(parallel="pipeline", pipeline_modules=(1, 3), sync_batch_norm=True, global_contrast=True), []),
        (dict(parallel="data", sync_batch_norm=True, global_contrast=True), []),
        (dict(parallel="data", sync_batch_norm=True), ["parallel"]),
        (dict(parallel="data", recipe="table2/cifar10/resnet32/k4/contrast"), []),
        (dict(parallel="pipeline", wire="bfloat16", seed=1), ["seed", "wire"]),
        (dict(lr=0.3, tf32=True, device="cuda"), ["lr", "tf32"]),
    ],
)
def test_different_trainings(settings, names):
    plain = TrainConfig(lr=0.1)
    assert different(plain, dataclasses.replace(plain, **settings)) == names


# ------------------------------------------------------------------------------------------------------------
# Settings from a file


def written(path, text):
    path.write_text(text)
    return path


def test_files_of_settings(tmp_path):
    """JSON, YAML and TOML say the same; a recipe in a file is the row beneath the file's other settings."""
    expected = TrainConfig(
        modules=3, cuts=((1, 0), (2, 1)), lr=1e-3, data_root="d", dataset="svhn", augment=False
    )
    texts = {
        "a.json": '{"modules": 3, "cuts": [[1, 0], [2, 1]], "lr": 1e-3, "data-root": "d", "dataset": "svhn", '
        '"augment": false}',
        "a.yaml": "modules: 3\ncuts: [[1, 0], [2, 1]]\nlr: 1e-3\ndata_root: d\ndataset: svhn\naugment: no\n",
        "a.toml": 'modules = 3\ncuts = [[1, 0], [2, 1]]\nlr = 1e-3\ndata_root = "d"\ndataset = "svhn"\n'
        "augment = false\n",
    }
    for name, text in texts.items():
        if name == "a.toml" and sys.version_info < (3, 11):
            with pytest.raises(ConfigError, match="TOML needs Python 3.11: write YAML or JSON"):
                files.read(written(tmp_path / name, text))
        else:
            assert files.read(written(tmp_path / name, text)) == expected
    row = "table5/deeplabv3/e2e"
    read = files.read(written(tmp_path / "row.yaml", f"recipe: {row}\nepochs: 2\ndata_root: d\n"))
    assert TrainConfig(**vars(read)).resolved() == recipes.config(row, epochs=2, data_root="d").resolved()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "learning_rate: 1", "a.yaml: learning_rate: no such setting$"),
        ("a.json", '{"epoch": 1}', "a.json: epoch: no such setting; did you mean epochs\\?"),
        ("a.yaml", "lr: fast", "a.yaml: lr: expected a positive number, got 'fast'"),
        ("a.yaml", "augment: 3", "a.yaml: augment: expected true or false, got 3"),
        ("a.yaml", "cuts: [1, 2]", "a.yaml: cuts: expected pairs of stage and block"),
        ("a.yaml", "epochs: 1\niterations: 2", "epochs and iterations: each says how long to train"),
        ("a.yaml", "recipe: table9", "a.yaml: recipe: no row of this name: 'table9'"),
        ("a.yaml", "a: [", "a.yaml: not YAML: "),
        ("a.json", "{", "a.json: not JSON: "),
        ("a.json", "[1]", "a.json: expected settings by name, got list"),
        ("a.txt", "lr: 1", "a.txt: expected a file that ends in .json, .yaml, .yml or .toml"),
    ],
)
def test_files_of_something_else(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        files.read(written(tmp_path / name, text))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="none.json: No such file"):
        files.read(tmp_path / "none.json")


def test_a_runs_settings_are_repeated(tmp_path):
    """They resolve to the same run in a new folder, and what followed from others follows from these
    again."""
    run = TrainConfig(seed=3, batch_size=32, lambdas=(1, 0, 1, 1), threads=1, out=tmp_path).resolved()
    read = files.read(written(tmp_path / "config.json", run.to_json()))
    assert read.resolved() == dataclasses.replace(run, out=None) and files.read(tmp_path) == read
    assert read == TrainConfig(seed=3, batch_size=32, lambdas=(1, 0, 1, 1), threads=read.threads)
    plain = files.read(written(tmp_path / "config.json", TrainConfig().resolved().to_json()))
    assert plain == TrainConfig()
    assert dataclasses.replace(plain, modules=8).resolved().lambdas == (5, 0, 0, 2)  # those of 8 modules
    steps = TrainConfig(iterations=100).resolved().in_epochs(30)
    read = files.read(written(tmp_path / "config.json", steps.to_json()))
    assert read.resolved().in_epochs(30) == steps and read.epochs is None


def test_settings_to_look_at_a_run_with():
    """On the same kind of device they are those of the run; the other kind has neither its precision nor its
    kernels."""
    gpu = {"device": "cuda", "tf32": True, "cuda_graph": True, "impl": "triton"}
    run = TrainConfig(dataset="cifar10", data_root="there", download=True, threads=3, **gpu)
    same = dataclasses.replace(run, download=False)
    assert run.to_look_at() == same and run.to_look_at(device="cuda:1") == dataclasses.replace(
        same, device="cuda:1"
    )
    plain = dataclasses.replace(same, device="cpu", tf32=False, cuda_graph=False, impl="auto", threads=1)
    assert run.to_look_at(device="cpu", threads=1) == plain
    assert run.to_look_at(data_root="here") == dataclasses.replace(same, data_root="here")
    assert TrainConfig(device="cpu", impl="cpu").to_look_at(device="cuda").impl == "auto"
    assert TrainConfig(device="cpu", impl="reference").to_look_at(device="cuda").impl == "reference"
