"""The commands `infopro-fast train`, `eval` and `recipes`. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from infopro_fast.errors import ConfigError

from .settings import continuing, files, recipes
from .settings.config import TrainConfig
from .settings.fields import SAID

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the paper's


@dataclass(frozen=True)
class Train:
    """Train a network in local modules and write a run folder.

    The folder has the settings, metrics, weights, learning curve and checkpoints. Without flags: ResNet-32 in
    4 modules, with InfoPro's contrastive losses, on images that come with the package.
    """

    config: Annotated[Path | None, SAID] = None
    """Take the settings from this file; other flags override them.
    A run's config.json, or its folder, repeats that run in a new folder.
    A JSON, YAML or TOML file of yours has the names of these flags."""
    resume: Annotated[Path | None, SAID] = None
    """Continue the run in this folder from its last checkpoint, with its own settings.
    Flags may change where files are, what is written how often, and which threads and processes work.
    What would change the training is refused, except for more epochs (see --epochs)."""
    resume_previous: bool = False
    """With --resume: continue from the checkpoint before the last one, for when the last is damaged."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def beside(self, default: Train) -> Train:
        """Return this command as it is to run, where ``default`` is what it would be without flags.

        A length that is given replaces the default's. Raises ConfigError for two.
        """
        ours, theirs = self.settings, default.settings
        given = [name for name in ("epochs", "iterations") if getattr(ours, name) != getattr(theirs, name)]
        if len(given) > 1:
            raise ConfigError(files.EITHER)
        if given != ["epochs"] or ours.iterations is None or self.resume is not None:
            return self
        return dataclasses.replace(self, settings=dataclasses.replace(ours, iterations=None))

    def run(self) -> None:
        from . import evaluation, run_folder
        from . import run as runs

        if self.resume is None:
            if self.resume_previous:
                raise ConfigError("--resume-previous says which checkpoint --resume takes: add --resume RUN")
            run = runs.fit(self.settings)
        else:
            run = runs.resume(self.resume, previous=self.resume_previous, **self._changes())
        if run is None:  # another process of the run reports
            return
        last = run_folder.read_metrics(run, "epoch")[-1]
        name, value = evaluation.headline(last["test"])
        best, seconds = f"best {100 * last['best']:.2f} %", f"{last['seconds']:.0f} s"
        print(f"test {name} {100 * value:.2f} % ({best}) after {seconds}; run folder {run}")

    def _changes(self) -> dict[str, Any]:
        """Return the settings in which this differs from the run that it continues."""
        from . import run_folder

        own, ours = vars(run_folder.read_config(self.resume)), vars(self.settings)
        if ours["out"] != own["out"]:
            raise ConfigError("--resume continues a run in its own folder: leave out --out")
        return {name: value for name, value in ours.items() if value != own[name]}


@dataclass(frozen=True)
class _Source:
    """The flags that say where the defaults of the other flags come from."""

    config: Path | None = None
    recipe: str | None = None
    resume: Path | None = None
    parallel: str | None = None


def default_of(words: Sequence[str]) -> Train:
    """Return what the flags of `train` override: a recipe, a file, the run to resume, or the usual defaults.

    Raises ConfigError where more than one of these is given, and where there is none of this name.
    """
    program = "infopro-fast train"
    source, _ = tyro.cli(_Source, args=words, return_unknown_args=True, add_help=False, prog=program)
    given = [f"--{name}" for name in ("config", "recipe", "resume") if getattr(source, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: each says where settings come from: expected one of them")
    if source.recipe is not None:
        return Train(settings=TrainConfig.unchecked(**recipes.settings_beside(source.recipe)))
    if source.config is not None:
        return Train(settings=files.read(source.config))
    if source.resume is not None:
        from .run_folder import read_config

        kept = continuing.kept(read_config(source.resume), source.parallel)
        return Train(settings=TrainConfig.unchecked(**kept))
    return Train()


@dataclass(frozen=True)
class Eval:
    """Report the test accuracy, or for segmentation the mIoU, of a run's weights."""

    folder: Annotated[Path, tyro.conf.arg(name="run"), tyro.conf.Positional]
    """Run folder that `train` wrote."""
    data_root: Annotated[Path | None, SAID] = None
    """Folder with the files of the data set. Default: where the run found them."""
    device: Annotated[str | None, SAID] = None
    """cpu, cuda or cuda:N. Default: the run's device."""
    multi_scale: bool = False
    """Segmentation: average over the image at 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times its size."""
    flip: bool = False
    """Segmentation: average over the image and its mirror image, at each size."""

    def run(self) -> None:
        from .run import evaluate_run

        scales = MULTI_SCALE if self.multi_scale else (1.0,)
        found = evaluate_run(
            self.folder, data_root=self.data_root, device=self.device, scales=scales, flip=self.flip
        )
        print(f"{self.folder}: {_result(found)}")


def _result(found: dict[str, Any]) -> str:
    accuracy, count = f"{100 * found['accuracy']:.2f} %", found["count"]
    end = f"cross entropy {found['loss']:.4f}"
    if "miou" in found:
        ious = " ".join("-" if v is None else f"{100 * v:.1f}" for v in found["iou"])
        miou = f"{100 * found['miou']:.2f} % (classes: {ious})"
        return f"test mIoU {miou}, pixels {accuracy}, {count} images, {end}"
    right = f"{round(found['accuracy'] * count)} of {count}"
    return f"test accuracy {accuracy} ({right}), top-5 {100 * found['top5']:.2f} %, {end}"


@dataclass(frozen=True)
class Recipes:
    """List the rows of the paper's tables that `train --recipe NAME` trains, with the paper's results."""

    beginning: Annotated[str, tyro.conf.Positional] = ""
    """List only rows whose names begin with this, such as table4; settings too for the name of one row."""

    def run(self) -> None:
        rows = {name: row for name, row in recipes.ROWS.items() if name.startswith(self.beginning)}
        if not rows:
            recipes.row(self.beginning)  # raises
        width = max(map(len, rows))
        for name, row in rows.items():
            text = recipes.expected_text(row.expected) + ", cannot be trained here" * bool(row.untrained)
            print(f"{name:{width}}  {text}")
        if self.beginning in rows:
            row = rows[self.beginning]
            about = {**row.settings, "note": row.note, "cannot be trained": row.untrained}
            print(*(f"  {name}: {value}" for name, value in about.items() if value != ""), sep="\n")
