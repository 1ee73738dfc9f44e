"""`infopro-fast analyze`: what the features of trained networks still know of image and label, block by block, method against method.

Every run is probed by itself (`probes.probe_network`) and written at once, to analysis.json; runs that are in there under the same
settings and with the same weights are not probed again. Then the runs of a method, which differ in their seed alone, are averaged,
into a table (analysis.md) and a figure (analysis.png).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infopro_fast import data
from infopro_fast.errors import ConfigError, NonFiniteError, RunError
from infopro_fast.trainer import run_folder, setup
from infopro_fast.trainer.display import duration
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import different
from infopro_fast.whole_files import replace_file

from .probes import DEFAULT, PROBES, ProbeSettings, baseline, probe_network
from .provenance import provenance

JSON, TABLE, FIGURE = "analysis.json", "analysis.md", "analysis.png"
METHODS = {
    "none": "end to end", "greedy": "greedy", "dgl": "DGL", "softmax": "InfoPro, softmax", "contrast": "InfoPro, contrast",
    "infopro_l": "InfoProL", "auglocal": "AugLocal",
}  # fmt: skip
QUANTITIES = (
    "reconstruction", "pixel_information", "classifier_loss", "label_information", "label_information_bits", "classifier_accuracy",
    "linear_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A run that is to be probed."""

    run: Path
    config: TrainConfig
    weights: str  # SHA-256 of its file

    @property
    def method(self) -> str:
        c = self.config
        if c.number_of_modules() == 1:  # whatever its local loss is called, it has none
            return METHODS["none"]
        return f"{METHODS.get(c.loss, c.loss)}, K = {c.number_of_modules()}" + ", sequential" * (c.order == "sequential")

    @property
    def images_and_network(self) -> dict[str, Any]:
        c = self.config
        return {"dataset": c.dataset, "hold_out": c.hold_out, "image_size": list(c.image_size), "network": c.network}


def analyze(
    runs: Sequence[str | Path],
    out: str | Path,
    settings: ProbeSettings = DEFAULT,
    *,
    threads: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    show: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[dict]:
    """Probe the networks in the run folders ``runs`` and write analysis.json, analysis.md and analysis.png into the folder ``out``.

    threads: of the CPU; None: torch's. device, data_root: if not those of the runs. show: takes a line after every epoch.
    Returns the methods' means (`summarize`).

    Raises RunError for a folder that is no finished run or is damaged, ConfigError for runs that cannot be compared, DataError where
    images are missing, NonFiniteError for a probe that diverges: all of these but the last two before anything is trained.
    """
    out, subjects = Path(out), [_subject(Path(run)) for run in runs]
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")
    check_comparable(subjects)
    out.mkdir(parents=True, exist_ok=True)
    with run_folder.locked(out):
        content = _read(out / JSON)
        left = [subject for subject in subjects if _done(content, subject, settings) is None]
        for subject in subjects:
            if subject not in left:
                show(f"{subject.run}: in {out / JSON} already")
        images, began = None, time.monotonic()
        for number, subject in enumerate(left, 1):
            config = subject.config.to_look_at(threads=threads or torch.get_num_threads(), device=device, data_root=data_root)
            progress = _Progress(show, subject, number, len(left), settings.epochs, began)
            with setup.machine(config):
                images = images or setup.load_data(config).to(config.device)  # the same of all
                entry = _entry(subject, config, images, settings, progress)
            content["runs"] = [e for e in content["runs"] if e["run"] != entry["run"]] + [entry]
            replace_file(out / JSON, _json(content))
        found = summarize([_done(content, subject, settings) for subject in subjects])
        replace_file(out / JSON, _json(content | {"methods": found}))
        replace_file(out / TABLE, table(found, settings).encode())
        from .analyze_figure import draw

        draw(found, out / FIGURE)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def _subject(run: Path) -> Subject:
    """Raises RunError if the folder is no run, or one that is not finished."""
    config = run_folder.read_config(run)
    run_folder.read_weights(run)
    epochs = run_folder.read_metrics(run, "epoch")
    # Of a sequential run, those of the last module have a test.
    done = max((record["epoch"] for record in epochs if record["test"] is not None), default=0)
    if config.epochs is None or done < config.epochs:
        raise RunError(f"{run} is not finished: {done} of {config.epochs} epochs; continue with: infopro-fast train --resume {run}")
    return Subject(run, config, hashlib.sha256((run / run_folder.WEIGHTS).read_bytes()).hexdigest())


def check_comparable(subjects: Sequence[Subject]) -> None:
    """Raises ConfigError unless all have one data set, image size and network, and those of a method differ in their seed alone."""
    if not subjects:
        raise ConfigError("analyze: expected at least one run folder, got none")
    first, methods = subjects[0], {}
    for subject in subjects:
        c = subject.config
        if c.dataset in ("imagenet", "cityscapes", "shapes_seg"):
            raise ConfigError(f"{subject.run}: expected a run that classifies the images of a set in memory, got one of {c.dataset}")
        for name, expected in first.images_and_network.items():
            got = subject.images_and_network[name]
            if got != expected:
                raise ConfigError(f"runs cannot be compared: {name} of {first.run} is {expected}, of {subject.run} {got}")
        for other in methods.setdefault(subject.method, []):
            _check_same_but_seed(other, subject)
        methods[subject.method].append(subject)


def _check_same_but_seed(a: Subject, b: Subject) -> None:
    where = f"{a.run} and {b.run} (both {a.method})"
    if a.run.resolve() == b.run.resolve():
        raise ConfigError(f"{a.run} is given twice: no error bar comes of that")
    differing = [name for name in different(a.config, b.config) if name != "seed"]
    if differing:
        said = ", ".join(f"{n} ({getattr(a.config, n)} and {getattr(b.config, n)})" for n in differing)
        raise ConfigError(f"{where} differ in more than their seed, so their mean has no meaning: {said}; analyze them into two folders")
    if a.config.seed == b.config.seed:
        raise ConfigError(f"{where} have the same seed {a.config.seed}: they are one run twice, and no error bar comes of that")


# ---------------------------------------------------------------------------------------------------------------------
# analysis.json


def _entry(subject: Subject, config: TrainConfig, images: data.ImageSet, settings: ProbeSettings, progress: _Progress) -> dict:
    """Probe one run."""
    began = time.monotonic()
    net = setup.build(config, images)
    try:
        net.load_released_state_dict(run_folder.read_weights(subject.run))
    except ValueError as error:
        raise RunError(f"{subject.run / run_folder.WEIGHTS} does not fit {run_folder.CONFIG}: {error}") from error
    try:
        blocks = probe_network(net, images, settings, progress)
    except FloatingPointError as error:
        raise NonFiniteError(f"{subject.run}: {error}") from error
    return {
        "run": str(subject.run), "where": provenance(), "method": subject.method, "modules": subject.config.number_of_modules(),
        "seed": subject.config.seed, "weights": subject.weights, "settings": dataclasses.asdict(settings), **subject.images_and_network,
        "classes": images.num_classes, "train_images": len(images.train), "test_images": len(images.test),
        "baseline": baseline(images.train, images.test), "blocks": blocks, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _read(path: Path) -> dict:
    """Raises RunError if the file is there and is not one of ours."""
    if not path.exists():
        return {"runs": []}
    try:
        content = json.loads(path.read_text())
        if not all({"run", "method", "seed", "weights", "settings", "blocks"} <= set(entry) for entry in content["runs"]):
            raise KeyError("runs")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not what analyze writes: {error!r}; give another folder as out, or remove it") from error
    return content


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _done(content: dict, subject: Subject, settings: ProbeSettings) -> dict | None:
    """The entry of this very network, probed under these settings. Its weights say which it is; "run" is where it lay, as it was given."""
    wanted = (subject.method, subject.config.seed, subject.weights, dataclasses.asdict(settings))
    return next((e for e in content["runs"] if (e["method"], e["seed"], e["weights"], e["settings"]) == wanted), None)


class _Progress:
    """A line an epoch: where the analysis is, what the probes of the first, the middle and the last block have reached, time left."""

    def __init__(self, show: Callable[[str], None], subject: Subject, number: int, runs: int, epochs: int, began: float):
        self.show, self.subject, self.number, self.runs, self.epochs, self.began = show, subject, number, runs, epochs, began

    def __call__(self, epoch: int, found: list[dict[str, dict[str, float]]]) -> None:
        done, passed = self.number - 1 + epoch / self.epochs, time.monotonic() - self.began
        some = [found[0], found[len(found) // 2], found[-1]]
        losses = "  ".join(f"{probe} loss " + " ".join(f"{rows[probe]['loss']:.4f}" for rows in some) for probe in PROBES)
        self.show(
            f"run {self.number}/{self.runs}, {self.subject.method}, seed {self.subject.config.seed}: epoch {epoch}/{self.epochs}  "
            f"validation (first, middle, last block): {losses}  {duration(passed)}, left {duration(passed / done * (self.runs - done))}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def summarize(entries: Sequence[dict]) -> list[dict]:
    """Mean and standard error over the runs of each method, block by block; methods in the order of their first run.

    entries: of analysis.json, of one data set and network. Each result has "method", "seeds", what the entries say of images and
    network, "baseline" and "blocks": a list of {"block", "depth", and of each of QUANTITIES {"mean", "error"}}; the error, the
    sample's deviation / sqrt(runs), is None for one run.
    """
    methods: dict[str, list[dict]] = {}
    for entry in entries:
        methods.setdefault(entry["method"], []).append(entry)
    same = ("dataset", "hold_out", "network", "image_size", "classes", "train_images", "test_images", "baseline")
    found = []
    for method, group in methods.items():
        blocks = [
            {"block": rows[0]["block"], "depth": rows[0]["depth"], **{q: _mean_and_error([row[q] for row in rows]) for q in QUANTITIES}}
            for rows in zip(*(entry["blocks"] for entry in group))
        ]
        found.append({"method": method, "seeds": [entry["seed"] for entry in group], **{n: group[0][n] for n in same}, "blocks": blocks})
    return found


def _mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}


def table(found: Sequence[dict], settings: ProbeSettings) -> str:
    """Markdown: one line a method and block."""
    first, known = found[0], found[0]["baseline"]
    size = "x".join(map(str, first["image_size"]))
    lines = [
        f"# What the features know: {first['network']} on {first['dataset']}, {size} images",
        "",
        f"Fresh probes on frozen networks, trained for {settings.epochs} epochs on {first['train_images']} images (a share of "
        f"{settings.validation:g} chooses the epoch), measured on {first['test_images']} test images. Mean ± standard error over the runs.",
        f"Without any feature: reconstruction loss {known['constant']:.4f} nats a pixel and channel (mean image; "
        f"{known['floor']:.4f} for the image itself, the least there is), H(y) = {known['label_entropy']:.4f} nats = "
        f"{known['label_entropy'] / math.log(2):.4f} bits.",
        f"Classifier: {settings.classifier}.",
        "I(h, x) and I(h, y) are lower bounds; one below 0 means that the probe did worse than without features.",
        "",
        "| method | runs | block | reconstruction loss, nats | I(h, x) >=, nats a pixel | I(h, y) >=, nats | I(h, y) >=, bits "
        "| classifier, % | linear probe, % |",
        "|" + " --- |" * 9,
    ]
    for method in found:
        for row in method["blocks"]:
            cells = [method["method"], len(method["seeds"]), f"{row['depth']} {row['block']}"]
            cells += [_cell(row[q], 4) for q in ("reconstruction", "pixel_information", "label_information", "label_information_bits")]
            cells += [_cell(row[q], 2, 100) for q in ("classifier_accuracy", "linear_accuracy")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float | None], digits: int, scale: float = 1) -> str:
    error = "" if value["error"] is None else f" ± {scale * value['error']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{error}"
