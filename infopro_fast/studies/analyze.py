"""`infopro-fast analyze`: how much trained features tell of image and label, block by block, for each method.

Each run is probed alone (`probes.probe_network`) and written at once to analysis.json. Runs that are there
with the same settings and weights are not probed again. Then the runs of a method, which differ in their seed
alone, are averaged into a table (analysis.md) and a figure (analysis.png).
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

from infopro_fast import data, figure
from infopro_fast.errors import ConfigError, NonFiniteError, RunError
from infopro_fast.info import provenance
from infopro_fast.trainer import run_folder, setup
from infopro_fast.trainer.display import duration
from infopro_fast.trainer.settings.config import TrainConfig
from infopro_fast.trainer.settings.continuing import different
from infopro_fast.whole_files import replace_file

from . import figures
from .probes import DEFAULT, PROBES, ProbeSettings, baseline, probe_network

JSON, TABLE, FIGURE = "analysis.json", "analysis.md", "analysis.png"
METHODS = {
    "none": "end to end", "greedy": "greedy", "dgl": "DGL", "softmax": "InfoPro, softmax",
    "contrast": "InfoPro, contrast", "infopro_l": "InfoProL", "auglocal": "AugLocal",
}
QUANTITIES = (
    "reconstruction", "pixel_information", "classifier_loss", "label_information", "label_information_bits",
    "classifier_accuracy", "linear_accuracy",
)


@dataclass(frozen=True)
class Subject:
    """A run to probe."""

    run: Path
    config: TrainConfig
    weights: str  # SHA-256 of its file

    @property
    def method(self) -> str:
        c = self.config
        K = c.number_of_modules()
        if K == 1:  # no local loss runs, whatever the setting says
            return METHODS["none"]
        return f"{METHODS.get(c.loss, c.loss)}, K = {K}" + ", sequential" * (c.order == "sequential")

    @property
    def images_and_network(self) -> dict[str, Any]:
        c = self.config
        about = {"dataset": c.dataset, "hold_out": c.hold_out, "image_size": list(c.image_size)}
        return about | {"network": c.network}


def analyze(
    runs: Sequence[str | Path], out: str | Path, settings: ProbeSettings = DEFAULT, *,
    threads: int | None = None, device: str | None = None, data_root: str | Path | None = None,
    show: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[dict]:
    """Probe the networks in run folders, write analysis.json, .md and .png into ``out``, return `summarize`.

    threads: of the CPU; None: torch's number. device, data_root: replace the runs' own. show: takes a line an
    epoch.

    Before any training: raises RunError for an unfinished or damaged run, ConfigError for runs that cannot be
    compared. Later: DataError for missing images, NonFiniteError for a probe that diverges.
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
        images: Any = None  # an ImageSet: `check_comparable` refuses files
        began = time.monotonic()
        for number, subject in enumerate(left, 1):
            count = threads or torch.get_num_threads()
            config = subject.config.to_look_at(threads=count, device=device, data_root=data_root)
            progress = _Progress(show, subject, number, len(left), settings.epochs, began)
            with setup.machine(config):
                images = images or setup.load_data(config).to(config.device)  # all runs share them
                entry = _entry(subject, config, images, settings, progress)
            content["runs"] = [e for e in content["runs"] if e["run"] != entry["run"]] + [entry]
            replace_file(out / JSON, _json(content))
        found = summarize([_done(content, subject, settings) for subject in subjects])
        replace_file(out / JSON, _json(content | {"methods": found}))
        replace_file(out / TABLE, table(found, settings).encode())
        figures.draw_analysis(found, out / FIGURE)
    return found


def _subject(run: Path) -> Subject:
    """Read a run. Raises RunError if the folder holds none, or an unfinished one."""
    config = run_folder.read_config(run)
    run_folder.read_weights(run)
    epochs = run_folder.read_metrics(run, "epoch")
    # In a sequential run, only the last module's epochs have a test.
    done = max((record["epoch"] for record in epochs if record["test"] is not None), default=0)
    if config.epochs is None or done < config.epochs:
        advice = f"continue with: infopro-fast train --resume {run}"
        raise RunError(f"{run} is not finished: {done} of {config.epochs} epochs; {advice}")
    return Subject(run, config, hashlib.sha256((run / run_folder.WEIGHTS).read_bytes()).hexdigest())


def check_comparable(subjects: Sequence[Subject]) -> None:
    """Raise ConfigError unless all share data set, size and network, and a method's runs all but the seed."""
    if not subjects:
        raise ConfigError("analyze: expected at least one run folder, got none")
    first = subjects[0]
    methods: dict[str, list[Subject]] = {}
    for subject in subjects:
        c = subject.config
        if c.dataset in ("imagenet", "cityscapes", "shapes_seg"):
            expected = "a run that classifies the images of a set in memory"
            raise ConfigError(f"{subject.run}: expected {expected}, got one of {c.dataset}")
        for name, expected in first.images_and_network.items():
            got = subject.images_and_network[name]
            if got != expected:
                those = f"{name} of {first.run} is {expected}, of {subject.run} {got}"
                raise ConfigError(f"runs cannot be compared: {those}")
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
        problem = f"differ in more than their seed, so their mean has no meaning: {said}"
        raise ConfigError(f"{where} {problem}; analyze them into two folders")
    if a.config.seed == b.config.seed:
        raise ConfigError(f"{where} have the same seed {a.config.seed}: they are one run, with no error bar")


def _entry(
    subject: Subject, config: TrainConfig, images: data.ImageSet, settings: ProbeSettings, progress: _Progress
) -> dict:
    """Probe one run and return its entry."""
    began = time.monotonic()
    net = setup.build(config, images)
    try:
        net.load_released_state_dict(run_folder.read_weights(subject.run))
    except ValueError as error:
        weights = subject.run / run_folder.WEIGHTS
        raise RunError(f"{weights} does not fit {run_folder.CONFIG}: {error}") from error
    try:
        blocks = probe_network(net, images, settings, progress)
    except FloatingPointError as error:
        raise NonFiniteError(f"{subject.run}: {error}") from error
    return {
        "run": str(subject.run), "where": provenance(), "method": subject.method,
        "modules": subject.config.number_of_modules(), "seed": subject.config.seed,
        "weights": subject.weights, "settings": dataclasses.asdict(settings),
        **subject.images_and_network, "classes": images.num_classes,
        "train_images": len(images.train), "test_images": len(images.test),
        "baseline": baseline(images.train, images.test), "blocks": blocks,
        "seconds": round(time.monotonic() - began, 1),
    }


def _read(path: Path) -> dict:
    """Return the content of analysis.json, empty without the file. Raises RunError for another file."""
    if not path.exists():
        return {"runs": []}
    needed = {"run", "method", "seed", "weights", "settings", "blocks"}
    try:
        content = json.loads(path.read_text())
        if not all(needed <= set(entry) for entry in content["runs"]):
            raise KeyError("runs")
    except (ValueError, KeyError, TypeError) as error:
        advice = "give another folder as out, or remove it"
        raise RunError(f"{path} is not what analyze writes: {error!r}; {advice}") from error
    return content


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _done(content: dict, subject: Subject, settings: ProbeSettings) -> dict | None:
    """Return the entry of this network under these settings, or None. Weights identify it, not its folder."""
    wanted = (subject.method, subject.config.seed, subject.weights, dataclasses.asdict(settings))
    keys = ("method", "seed", "weights", "settings")
    return next((entry for entry in content["runs"] if tuple(entry[key] for key in keys) == wanted), None)


@dataclass
class _Progress:
    """Shows a line an epoch: the run, validation losses of three blocks, the time left."""

    show: Callable[[str], None]
    subject: Subject
    number: int
    runs: int
    epochs: int
    began: float

    def __call__(self, epoch: int, found: list[dict[str, dict[str, float]]]) -> None:
        done, passed = self.number - 1 + epoch / self.epochs, time.monotonic() - self.began
        some = [found[0], found[len(found) // 2], found[-1]]
        losses = "  ".join(
            f"{probe} loss " + " ".join(f"{rows[probe]['loss']:.4f}" for rows in some) for probe in PROBES
        )
        run = f"run {self.number}/{self.runs}, {self.subject.method}, seed {self.subject.config.seed}"
        left = duration(passed / done * (self.runs - done))
        self.show(
            f"{run}: epoch {epoch}/{self.epochs}  validation (first, middle, last block): {losses}  "
            f"{duration(passed)}, left {left}"
        )


def summarize(entries: Sequence[dict]) -> list[dict]:
    """Return mean and standard error over each method's runs, block by block, in the order of first runs.

    entries: from analysis.json, of one data set and network. A result has "method", "seeds", "baseline", the
    entries' images and network, and "blocks": a list of {"block", "depth", a {"mean", "error"} for each of
    QUANTITIES}. The error, the sample's deviation / sqrt(runs), is None for one run.
    """
    methods: dict[str, list[dict]] = {}
    for entry in entries:
        methods.setdefault(entry["method"], []).append(entry)
    same = (
        "dataset", "hold_out", "network", "image_size", "classes", "train_images", "test_images", "baseline",
    )
    found = []
    for method, group in methods.items():
        blocks = [
            {name: rows[0][name] for name in ("block", "depth")}
            | {q: _mean_and_error([row[q] for row in rows]) for q in QUANTITIES}
            for rows in zip(*(entry["blocks"] for entry in group))
        ]
        seeds = [entry["seed"] for entry in group]
        about = {name: group[0][name] for name in same}
        found.append({"method": method, "seeds": seeds, **about, "blocks": blocks})
    return found


def _mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}


def table(found: Sequence[dict], settings: ProbeSettings) -> str:
    """Return Markdown with a line for each method and block."""
    first, known = found[0], found[0]["baseline"]
    size = "x".join(map(str, first["image_size"]))
    lines = [
        f"# What the features know: {first['network']} on {first['dataset']}, {size} images",
        "",
        f"Fresh probes on frozen networks, trained for {settings.epochs} epochs on {first['train_images']} "
        f"images (a share of {settings.validation:g} chooses the epoch), measured on {first['test_images']} "
        "test images. Mean ± standard error over the runs.",
        f"Without any feature: reconstruction loss {known['constant']:.4f} nats a pixel and channel (mean "
        f"image; {known['floor']:.4f} for the image itself, the least there is), "
        f"H(y) = {known['label_entropy']:.4f} nats = {known['label_entropy'] / math.log(2):.4f} bits.",
        f"Classifier: {settings.classifier}.",
        "I(h, x) and I(h, y) are lower bounds; one below 0 means that the probe did worse than without "
        "features.",
        "",
    ]
    head = (
        "method", "runs", "block", "reconstruction loss, nats", "I(h, x) >=, nats a pixel",
        "I(h, y) >=, nats", "I(h, y) >=, bits", "classifier, %", "linear probe, %",
    )
    rows = []
    for method in found:
        for row in method["blocks"]:
            cells = [method["method"], len(method["seeds"]), f"{row['depth']} {row['block']}"]
            nats = ("reconstruction", "pixel_information", "label_information", "label_information_bits")
            cells += [_cell(row[q], 4) for q in nats]
            cells += [_cell(row[q], 2, 100) for q in ("classifier_accuracy", "linear_accuracy")]
            rows.append(cells)
    return "\n".join([*lines, figure.markdown(head, rows)]) + "\n"


def _cell(value: dict[str, float | None], digits: int, scale: float = 1) -> str:
    error = "" if value["error"] is None else f" ± {scale * value['error']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{error}"
