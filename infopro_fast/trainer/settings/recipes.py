"""The rows of the paper's tables as data (Wang et al., ICLR 2021, Tables 2 to 5): settings, and reported
results.

Settings are those of the authors' code (README and configurations). A row's note says what the paper does not
publish, such as the weights of the losses in the rows of softmax and DenseNet, which are ours. Importing this
needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from infopro_fast.errors import ConfigError
from infopro_fast.published import default_lambdas

from .config import TrainConfig
from .continuing import different
from .data_sets import RECIPES


@dataclass(frozen=True)
class Row:
    """One row of a table. settings: fields of `TrainConfig`.

    expected: what the paper reports: {"error": (mean, standard deviation of 5 trials) in % of the test
    images; "top1", "top5": errors in %; "miou", "miou_multi_scale", "miou_multi_scale_flip": in %;
    "memory_gb": of one GPU}. note: what differs from the paper. untrained: why the row cannot be trained
    here; "" where it can.
    """

    settings: dict[str, Any]
    expected: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    untrained: str = ""


OWN_WEIGHTS = "the paper's weights of the losses are not published; these are ours"

# Methods of Table 2 that are no `local_loss`: the settings that stand for them, and what is not known about
# them.
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "greedy+": (
        # Of all heads, 2c2f comes nearest to the cost that a local module of InfoPro adds: decoder and 1c2f.
        {"local_loss": "greedy", "net_config": "2c2f"},
        "the paper calls Greedy SL+ deeper, at InfoPro's computational cost, and its code was not released: "
        "whether the network or its heads are deeper is not known for certain; here the heads are (2c2f, the "
        "authors' deepest)",
    ),
    "async": (
        {"local_loss": "contrast", "order": "sequential"},
        "the code of the paper's asynchronous training was not released: here each module in turn has the "
        "whole schedule, with the lambdas of the simultaneous run",
    ),
}

# Table 2, test errors: data set and network: method: K (2, 4, 8, 16), or end-to-end training.
TABLE2: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar10", "resnet32"): {
        "e2e": (7.37, 0.10),
        "greedy": {2: (10.30, 0.20), 4: (16.07, 0.46), 8: (21.19, 0.52), 16: (24.59, 0.83)},
        "dgl": {2: (8.69, 0.12), 4: (11.48, 0.20), 8: (14.17, 0.28), 16: (16.21, 0.36)},
        "softmax": {2: (8.13, 0.23), 4: (8.64, 0.25), 8: (11.40, 0.18), 16: (14.23, 0.42)},
        "contrast": {2: (7.76, 0.12), 4: (8.58, 0.17), 8: (11.13, 0.19), 16: (12.75, 0.11)},
    },
    ("cifar10", "resnet110"): {
        "e2e": (6.50, 0.34),
        "greedy": {2: (8.21, 0.24), 4: (13.16, 0.28), 8: (15.61, 0.57), 16: (18.92, 1.27)},
        "greedy+": {2: (8.00, 0.11), 4: (12.47, 0.17), 8: (14.58, 0.36), 16: (17.35, 0.31)},
        "dgl": {2: (7.70, 0.28), 4: (10.50, 0.11), 8: (12.46, 0.37), 16: (13.80, 0.15)},
        "softmax": {2: (7.01, 0.34), 4: (7.96, 0.06), 8: (9.40, 0.27), 16: (10.78, 0.28)},
        "async": {2: (7.34, 0.11), 4: (8.39, 0.15)},
        "contrast": {2: (6.42, 0.08), 4: (7.30, 0.14), 8: (8.93, 0.40), 16: (9.90, 0.19)},
    },
    ("cifar10", "densenet_bc_100_12"): {
        "e2e": (4.61, 0.08),
        "greedy": {2: (5.10, 0.05), 4: (6.07, 0.21), 8: (8.21, 0.31), 16: (10.41, 0.42)},
        "dgl": {2: (4.86, 0.15), 4: (5.71, 0.04), 8: (6.82, 0.21), 16: (7.67, 0.16)},
        "softmax": {2: (4.79, 0.07), 4: (5.69, 0.21), 8: (6.44, 0.11), 16: (7.47, 0.21)},
        "contrast": {2: (4.74, 0.04), 4: (5.24, 0.25), 8: (5.86, 0.18), 16: (6.92, 0.16)},
    },
    ("svhn", "resnet110"): {
        "e2e": (3.07, 0.23),
        "greedy": {2: (3.71, 0.16), 4: (5.39, 0.22), 8: (5.75, 0.10), 16: (6.37, 0.42)},
        "dgl": {2: (3.61, 0.16), 4: (4.97, 0.19), 8: (5.35, 0.13), 16: (5.55, 0.34)},
        "softmax": {2: (3.41, 0.08), 4: (3.72, 0.03), 8: (4.67, 0.07), 16: (5.14, 0.08)},
        "contrast": {2: (3.15, 0.03), 4: (3.28, 0.11), 8: (3.62, 0.11), 16: (3.91, 0.16)},
    },
    ("stl10", "resnet110"): {
        "e2e": (22.27, 1.61),
        "greedy": {2: (25.56, 1.37), 4: (27.97, 0.75), 8: (29.07, 0.76), 16: (30.38, 0.39)},
        "dgl": {2: (24.96, 1.18), 4: (26.77, 0.64), 8: (27.33, 0.24), 16: (27.73, 0.58)},
        "softmax": {2: (21.02, 0.51), 4: (21.28, 0.27), 8: (23.60, 0.49), 16: (26.05, 0.71)},
        "contrast": {2: (20.99, 0.64), 4: (22.73, 0.40), 8: (25.15, 0.52), 16: (26.27, 0.48)},
    },
}

# Table 3, ResNet-110 on one Titan Xp: error and memory (GB) of end-to-end training, of the same with gradient
# checkpointing, and of the balanced splits by K.
TABLE3 = {
    "cifar10": {
        "e2e": ((6.50, 0.34), 9.40), "checkpoint": ((6.50, 0.34), 3.91),
        2: ((6.41, 0.13), 5.38), 3: ((6.74, 0.12), 4.22), 4: ((6.93, 0.20), 3.52),
    },
    "stl10": {
        "e2e": ((22.27, 1.61), 10.77), "checkpoint": ((22.27, 1.61), 4.50),
        2: ((20.95, 0.57), 6.15), 3: ((21.00, 0.52), 4.96), 4: ((21.22, 0.72), 4.08),
    },
}

# Table 4, ImageNet on 8 GPUs: batch size; (top-1, top-5, GB on each GPU) of end-to-end training and InfoPro*,
# K = 2.
TABLE4 = {
    "resnet101": (1024, (22.03, 5.93, 19.71), (21.85, 5.89, 12.06)),
    "resnet152": (1024, (21.60, 5.92, 26.29), (21.45, 5.84, 15.53)),
    "resnext101_32x8d": (512, (20.64, 5.40, 19.22), (20.35, 5.28, 11.55)),
}

# Table 5, DeepLabV3-ResNet-101 on Cityscapes, 40k steps: settings; mIoU at one scale, several scales, several
# scales and flipped; GB on each GPU.
TABLE5: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "512x1024": ({"lambdas": (1.5, 1.0, 0.0, 0.0)}, (79.37, 80.53, 80.54, 12.01)),
    "512x1024/bs12": (
        {"lambdas": (1.0, 0.1, 0.0, 0.0), "batch_size": 12, "lr": 0.015}, (79.99, 81.09, 81.20, 16.62)
    ),
    "640x1280": (
        {"lambdas": (2.0, 1.0, 0.0, 0.0), "crop": (640, 1280), "lr": 0.015}, (80.25, 81.33, 81.42, 17.00)
    ),
}

NO_DENSE_DGL = (
    "the head of DGL pools its map to 2x2 and classifies the image, and the head that the paper used for "
    "labels of pixels is not published; local_loss greedy trains the authors' dense head by cross entropy "
    "alone, which is no row"
)

GPUS = 8  # in Table 4; each normalises its own part of a batch


def _published(dataset: str) -> dict[str, Any]:
    """Return the recipe of a data set as settings."""
    recipe = RECIPES[dataset]
    names = ("epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "nesterov", "drop_last")
    return {"dataset": dataset, **{name: getattr(recipe, name) for name in names}}


def _table2() -> dict[str, Row]:
    rows = {}
    for (dataset, arch), methods in TABLE2.items():
        common = {**_published(dataset), "arch": arch}
        dense = arch.startswith("densenet")
        where = (
            "the schedule and splits of DenseNet are not published; these are the ResNets' schedule and "
            "equal splits" if dense else ""
        )
        for method, values in methods.items():
            if method == "e2e":
                settings = {**common, "local_loss": "none", "modules": 1}
                rows[f"table2/{dataset}/{arch}/e2e"] = Row(settings, {"error": values}, where)
                continue
            for K, error in values.items():
                of_method, unknown = METHODS.get(method, ({"local_loss": method}, ""))
                settings, notes = {**common, **of_method, "modules": K}, [where, unknown]
                if dataset == "svhn" and method == "contrast":
                    settings["lambdas"] = default_lambdas(
                        arch, K, method, balanced=False, image_size=32, dataset=dataset
                    )
                if method == "softmax" or (dense and method == "contrast"):
                    notes.append(OWN_WEIGHTS)
                name = f"table2/{dataset}/{arch}/k{K}/{method}"
                rows[name] = Row(settings, {"error": error}, "; ".join(filter(None, notes)))
    return rows


def _table3() -> dict[str, Row]:
    rows = {}
    for dataset, values in TABLE3.items():
        for way, (error, memory) in values.items():
            settings = {**_published(dataset), "arch": "resnet110"}
            if isinstance(way, int):
                settings |= {"local_loss": "contrast", "modules": way, "balanced": True}
            else:
                recompute = "sqrt" if way == "checkpoint" else "none"
                settings |= {"local_loss": "none", "modules": 1, "recompute": recompute}
            name = f"k{way}" if isinstance(way, int) else way
            rows[f"table3/{dataset}/resnet110/{name}"] = Row(settings, {"error": error, "memory_gb": memory})
    return rows


def _table4() -> dict[str, Row]:
    rows = {}
    note = (
        f"the paper's {GPUS} GPUs are {GPUS} parts of a batch here, divided among the processes; each part "
        "has its own batch norm statistics; memory is that of one GPU"
    )
    for arch, (batch_size, e2e, infopro) in TABLE4.items():
        common = {
            **_published("imagenet"), "arch": arch, "batch_size": batch_size, "accumulate": GPUS,
            "crop": (224, 224),
        }
        more = note + "; the authors' command says batch size 1024, the table 512" * (batch_size == 512)
        for name, found, settings in (
            (f"table4/{arch}", infopro, {"local_loss": "softmax", "modules": 2}),
            (f"table4/{arch}/e2e", e2e, {"local_loss": "none", "modules": 1}),
        ):
            rows[name] = Row({**common, **settings}, dict(zip(("top1", "top5", "memory_gb"), found)), more)
    return rows


def _table5() -> dict[str, Row]:
    note = (
        "begins with --init, a ResNetV1c-101 trained end to end on ImageNet (mmsegmentation's "
        "resnet101_v1c); batch norms see the whole batch, with several processes by sync_batch_norm; memory "
        "is that of one of two GPUs"
    )
    names = ("miou", "miou_multi_scale", "miou_multi_scale_flip", "memory_gb")
    common = {
        **_published("cityscapes"), "arch": "deeplabv3_resnet101", "crop": (512, 1024), "iterations": 40000,
        "momentum": 0.9, "pixel_reduction": "mean_all",
    }
    rows = {
        f"table5/deeplabv3/{name}": Row(
            {**common, "local_loss": "softmax", "modules": 2, **settings}, dict(zip(names, found)), note
        )
        for name, (settings, found) in TABLE5.items()
    }
    of_others = (
        "the table quotes the original DeepLab paper, which trained in another way: the table gives steps, "
        "batch size and crop, and the other settings are those of its e2e row"
    )
    others: list[tuple[str, dict[str, Any], tuple[float, ...], str]] = [
        ("e2e", {}, (79.12, 79.81, 80.02, 19.43), ""),
        ("e2e/60k", {"iterations": 60000}, (79.32, 79.95, 80.07, 19.43), ""),
        ("e2e/769x769", {"crop": (769, 769)}, (77.82, 79.06, 79.30), of_others),
    ]
    for name, settings, found, more in others:
        settings = {**common, "local_loss": "none", "modules": 1, **settings}
        notes = "; ".join(filter(None, (more, note)))
        rows[f"table5/deeplabv3/{name}"] = Row(settings, dict(zip(names, found)), notes)
    rows["table5/deeplabv3/dgl"] = Row(
        {**common, "local_loss": "dgl", "modules": 2}, dict(zip(names, (78.15, 79.40, 79.56))),
        untrained=NO_DENSE_DGL,
    )
    return rows


ROWS: dict[str, Row] = {**_table2(), **_table3(), **_table4(), **_table5()}


def row(name: str) -> Row:
    """Return a row. Raises ConfigError, with rows of similar names, where there is none."""
    if name not in ROWS:
        near = [known for known in ROWS if name and (known.startswith(name) or name in known)]
        near = near or difflib.get_close_matches(name, ROWS)
        hint = f"; there is {', '.join(near[:6])}{', ...' * (len(near) > 6)}" if near else ""
        raise ConfigError(f"recipe: no row of this name: {name!r}{hint}; `infopro-fast recipes` lists them")
    return ROWS[name]


def settings(name: str) -> dict[str, Any]:
    """Return the settings of a row. Raises ConfigError for a row that cannot be trained here."""
    found = row(name)
    if found.untrained:
        raise ConfigError(f"recipe {name} cannot be trained: {found.untrained}")
    return found.settings


def settings_beside(name: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Return a row's name and settings, without those that follow from others. given: names to override.

    The warm-up follows from the data set, as far as a shorter run has room for it, and epochs follow from
    iterations. Given epochs replace iterations.
    """
    found = settings(name)
    gone = {"warmup", "iterations" if "epochs" in given or "iterations" not in found else "epochs"}
    return {"recipe": name, **{key: value for key, value in found.items() if key not in gone}}


def config(name: str, **overrides: Any) -> TrainConfig:
    """Return the settings of a row, some overridden. Raises ConfigError for a row that is data alone."""
    return TrainConfig(**{**settings_beside(name, overrides), **overrides})


def difference(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (the recipe's, the run's)} for the settings that change the result and differ.

    config: resolved, with its ``recipe``.
    """
    settings = {**row(config.recipe).settings, "recipe": config.recipe, "device": config.device}
    if config.data_root is not None:
        settings["data_root"] = config.data_root
    published = TrainConfig(**settings).resolved()
    in_steps = config.iterations is not None and published.iterations is not None
    return {
        name: (getattr(published, name), getattr(config, name))
        for name in different(published, config)
        if not (in_steps and name == "epochs")  # then the iterations are compared
    }


def shared(config: TrainConfig, processes: int) -> TrainConfig:
    """Return the settings with which each of several processes makes the run that one process would make.

    A row that accumulates stands for as many GPUs, each of which normalises its own images; the processes
    divide these parts of a batch among themselves. In the other rows batch norms and contrastive losses see
    the whole batch. An ``accumulate`` other than the row's is each process's own. config: resolved; without a
    recipe it stays as it is. Raises ConfigError where the parts cannot be divided, or batch norms cannot see
    the whole batch.
    """
    if config.recipe is None or processes == 1:
        return config
    parts = row(config.recipe).settings.get("accumulate", 1)
    if parts == 1:
        contrast = config.loss == "contrast" and config.accumulate == 1
        try:
            return dataclasses.replace(
                config, sync_batch_norm=True, global_contrast=config.global_contrast or contrast
            )
        except ConfigError as error:
            raise ConfigError(
                f"recipe {config.recipe}, whose batch norms are those of all {processes} processes: {error}"
            ) from error
    if config.accumulate != parts:
        return config
    if parts % processes:
        numbers = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
        raise ConfigError(
            f"recipe {config.recipe}: a batch has {parts} parts, one for each GPU of the paper, which "
            f"{processes} processes cannot divide: expected {numbers} processes, or accumulate "
            f"{max(1, parts // processes)}, the parts of each process"
        )
    return dataclasses.replace(config, accumulate=parts // processes)


def expected_text(expected: dict[str, Any]) -> str:
    """Return what the paper reports for a row, in words."""
    words = []
    if "error" in expected:
        words.append("error {:.2f} ± {:.2f} %".format(*expected["error"]))
    if "top1" in expected:
        words.append(f"error {expected['top1']:.2f} % (top-5 {expected['top5']:.2f} %)")
    if "miou" in expected:
        scales = (f"{expected[name]:.2f}" for name in ("miou", "miou_multi_scale", "miou_multi_scale_flip"))
        words.append(f"mIoU {'/'.join(scales)} %")
    if "memory_gb" in expected:
        words.append(f"{expected['memory_gb']:.2f} GB")
    return ", ".join(words)
