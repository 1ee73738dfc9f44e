"""The command line: `infopro-fast train`, `eval`, `plan`, `memory`, `recipes`, `scale`, `analyze`, `reproduce` and `info`.

The flags of train are the fields of `TrainConfig`.

An error of the user's is one line on stderr and exit code 2; a run that went wrong is exit code 1; a run stopped by a signal
is 128 plus the signal's number, after a checkpoint. Importing this needs no torch, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from infopro_fast import errors, figure
from infopro_fast.errors import ConfigError

from .studies.tables import Study
from .trainer.settings.config import TrainConfig
from .trainer.settings.continuing import CHANGEABLE, SHARING, kept

PROG = "infopro-fast"
COMMANDS = ("train", "eval", "plan", "memory", "recipes", "scale", "analyze", "reproduce", "info")
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the paper


@dataclass(frozen=True)
class Train:
    """Train a network in local modules and write a run folder: settings, metrics, weights, learning curve, checkpoints.

    Without flags: ResNet-32 in 4 modules, InfoPro's contrastive losses, on images that come with the package.
    """

    resume: Path | None = None
    """Continue the run in this folder, with its own settings, from its last checkpoint. Of other flags only data_root may be given, and
    those that say how processes share it, parallel to patience: other processes may go on, where it stays the same training."""
    resume_previous: bool = False
    """With --resume: from the checkpoint before the last one, for when the last is damaged."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Eval:
    """Test accuracy, or mIoU, of a run's weights."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder that `train` wrote."""
    data_root: Path | None = None
    """Where the data set's files are, if not where the run found them."""
    device: str | None = None
    """cpu, cuda, ..., if not the device of the run."""
    multi_scale: bool = False
    """Segmentation: average over the image at 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times its size."""
    flip: bool = False
    """Segmentation: average over the image and its mirror image, at each size."""


@dataclass(frozen=True)
class MakePlan:
    """Where to cut a network so that its largest module is smallest, or what fits into a budget; nothing is trained.

    Writes a file that `train --plan` takes, and a figure beside it.
    """

    arch: Literal[
        "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
        "resnet50", "resnet101", "resnet152", "resnext101_32x8d", "deeplabv3_resnet101",
    ] = "resnet110"  # fmt: skip
    """Network."""
    batch_size: int | None = None
    """Images a step, 128 if not given. With budget and modules: the largest that fits."""
    image_size: tuple[int, ...] | None = None
    """Side, or height and width. Default: 32, 224 or 512 1024, by network."""
    modules: int | None = None
    """Number K of modules. Default: the smallest that fits into the budget."""
    budget: str | None = None
    """Bytes for everything, like 4GiB: parameters, momentum, batch, gradients and the highest point of a step."""
    grow: Literal["batch", "image"] | None = None
    """With budget and modules: what to find the largest of. Default: batch, unless a batch size is given."""
    recompute: Literal["none", "norm", "block"] = "none"
    """Make again in backward what a norm gives a convolution, or whole residual blocks."""
    losses: Literal["ours", "released"] = "ours"
    """Whose bytes: the kernels', or those of the authors' code in plain torch."""
    objective: Literal["peak", "saved", "time"] = "peak"
    """What the largest module is least in: bytes alive, bytes kept for backward, or seconds, measured here."""
    out: Path = Path("plan.json")
    """File to write; the figure is beside it, with .png."""


@dataclass(frozen=True)
class CompareMemory:
    """Bytes and time of a training step: end to end, checkpointed, compiled, with the released losses, and ours.

    Each in a process of its own. Writes a table (memory.md), all numbers (memory.json) and a figure (memory.png).
    """

    arch: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] = "resnet110"
    """Network."""
    batch_size: int = 128
    """Images a step."""
    image_size: int = 32
    """Side of the images."""
    modules: tuple[int, ...] = (4, 16)
    """Numbers K of local modules."""
    budgets: tuple[float, ...] = (0.5,)
    """activation_memory_budget of each torch.compile row, in [0, 1]; none leaves these out, which take minutes to compile."""
    rounds: int = 5
    """Timed steps."""
    device: str = "cpu"
    """cpu, or cuda."""
    threads: int | None = None
    """CPU threads. Default: torch's."""
    out: Path = Path("memory")
    """Folder to write into."""


@dataclass(frozen=True)
class Recipes:
    """The rows of the paper's tables that `train --recipe NAME` trains, and what the paper reports for each; some are data alone."""

    beginning: Annotated[str, tyro.conf.Positional] = ""
    """List the rows whose names begin with this, as table4; the settings too where it is one row's name."""


@dataclass(frozen=True)
class Scale:
    """Throughput on up to G GPUs, predicted from block times measured here and from bytes, for every layout; nothing is trained.

    Against DistributedDataParallel and pipelines with backward (GPipe, 1F1B). Writes a figure and, beside it, all numbers as JSON.
    """

    arch: tuple[Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet50", "resnet101", "resnet152"], ...] = (
        "resnet110",
    )
    """Networks, a panel each."""
    modules: tuple[int, ...] = (16,)
    """Number K of modules of each network, cut by time; one for all, or one a network."""
    batch_size: int = 32
    """Images a replica."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of GPUs."""
    machine: int = 8
    """GPUs of one machine."""
    link: float = 200.0
    """GB/s between two GPUs of a machine."""
    network: float = 25.0
    """GB/s between two machines."""
    latency: float = 10.0
    """Microseconds of a message in a machine; between machines three times as many."""
    micro_batches: int = 8
    """Of GPipe and 1F1B."""
    speedup: float = 1.0
    """How many times faster a GPU is than what is measured here."""
    threads: int | None = None
    """CPU threads that measure. Default: torch's."""
    out: Path = Path("scale.png")
    """Figure to write."""


@dataclass(frozen=True)
class Analyze:
    """What each block of trained networks still knows of image and label: fresh probes on frozen features, curves over depth.

    Runs that differ in their seed alone are averaged. Writes analysis.json, a table (analysis.md) and a figure (analysis.png);
    what is estimated is in docs/analysis.md. Called again, it continues: runs that are in analysis.json are not probed twice.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders that `train` wrote: one data set and network, any methods and seeds."""
    out: Path = Path("analysis")
    """Folder to write into."""
    depths: int = 8
    """Blocks to probe, evenly spread, first and last included; more than there are: every block."""
    epochs: int = 5
    """Passes of the probes over the training images."""
    classifier: Literal["1c2f", "residual"] = "1c2f"
    """Probe for I(h, y): the released auxiliary classifier, or three residual blocks, which find more and take longer."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 1e-2
    """Adam's rate at the beginning; it falls to 0."""
    seed: int = 0
    """Of the probes: first weights, order of the images, which of them choose the epoch."""
    threads: int | None = None
    """CPU threads. Default: torch's."""
    device: str | None = None
    """cpu, cuda, ..., if not the device of the runs."""
    data_root: Path | None = None
    """Where the data set's files are, if not where the runs found them."""


@dataclass(frozen=True)
class Info:
    """Versions, instruction set, and which implementations of every op can run here."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[MakePlan, tyro.conf.subcommand("plan")]
    | Annotated[CompareMemory, tyro.conf.subcommand("memory")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Scale, tyro.conf.subcommand("scale")]
    | Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Study, tyro.conf.subcommand("reproduce")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; always exits."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(_parse(argv), argv)
    except Exception as error:
        code = errors.exit_code(error)
        if code is None:
            raise
        _fail(str(error), code)
    except KeyboardInterrupt as error:
        print(f"{PROG}: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))
    sys.exit(0)


def _parse(argv: list[str]) -> Train | Eval | MakePlan | CompareMemory | Recipes | Scale | Analyze | Study | Info:
    """The command; its errors, which tyro draws in a box, on one line."""
    errors = io.StringIO()
    argv = _with_run(_with_recipe(_in_epochs_or_steps(argv)))
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Command, prog=PROG, args=argv, description=__doc__.split("\n")[0], config=(tyro.conf.DisallowNone,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        where = " ".join([PROG, *[word for word in argv[:1] if word in COMMANDS]])
        _fail(f"{_one_line(errors.getvalue())} (see {where} --help)", 2)


def _with_recipe(argv: list[str]) -> list[str]:
    """`train --recipe NAME` with the settings of that row in front of the flags that are given, which so override them."""
    if argv[:1] != ["train"]:
        return argv
    for i, word in enumerate(argv):
        if word == "--recipe" and i + 1 < len(argv) or word.startswith("--recipe="):
            from .trainer.settings.recipes import as_flags, settings_beside

            name = word.partition("=")[2] or argv[i + 1]
            return ["train", *as_flags(settings_beside(name, _given(argv))), *argv[1:]]
    return argv


def _in_epochs_or_steps(argv: list[str]) -> list[str]:
    """The words as they are. Raises ConfigError for a training whose length is given twice: one would silently lose."""
    if argv[:1] == ["train"] and {"epochs", "iterations"} <= _given(argv).keys():
        raise ConfigError("epochs and iterations: each says how long to train: expected one of them")
    return argv


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The flags among the words, by the setting that each is of."""
    return {re.sub(r"^no_", "", word[2:].partition("=")[0].replace("-", "_")): word for word in argv if word.startswith("--")}


def _beside_resume(argv: list[str]) -> tuple[set[str], list[str]]:
    """Of the words behind `train`: the settings that --resume may change, and the other flags but those of --resume itself."""
    given = _given(argv)
    return set(CHANGEABLE) & given.keys(), [flag for name, flag in given.items() if name not in (*CHANGEABLE, "resume", "resume_previous")]


def _with_run(argv: list[str]) -> list[str]:
    """`train --resume RUN --parallel ...` with the run's settings in front of these."""
    changed, others = _beside_resume(argv[1:])
    run = _value(argv, "--resume")
    if argv[:1] != ["train"] or run is None or not changed or others:
        return argv
    from .trainer.run_folder import read_config
    from .trainer.settings.recipes import as_flags

    own = kept(read_config(Path(run)), _value(argv, "--parallel"))
    return ["train", *as_flags({name: value for name, value in own.items() if value is not None}), *argv[1:]]


def _value(argv: list[str], flag: str) -> str | None:
    """What follows a flag, as a word of its own or after "="."""
    for word, following in zip(argv, [*argv[1:], None]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _one_line(box: str) -> str:
    """The message in one of tyro's boxes: between the title, in the frame or ruled off where the output is ASCII, and the next rule."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", box)
    framed = "╭" in text
    text = re.sub(r"(?m)^\s*[╭╰].*$", "", text).replace("│", " ")
    sections = re.split(r"(?m)^\s*[─-]{5,}\s*$", text)
    message = sections[0] if framed or len(sections) == 1 else sections[1]
    return " ".join(message.split())


def _run(command: Train | Eval | MakePlan | CompareMemory | Recipes | Scale | Analyze | Study | Info, argv: list[str]) -> None:
    if isinstance(command, Info):
        from .info import report

        print(report())
    elif isinstance(command, Eval):
        from .trainer.run import evaluate_run

        scales = MULTI_SCALE if command.multi_scale else (1.0,)
        found = evaluate_run(command.run, data_root=command.data_root, device=command.device, scales=scales, flip=command.flip)
        print(f"{command.run}: {_result(found)}")
    elif isinstance(command, Recipes):
        print(_recipes(command.beginning))
    elif isinstance(command, MakePlan):
        _plan(command)
    elif isinstance(command, Study):
        _reproduce(command)
    elif isinstance(command, Scale):
        _scale(command)
    elif isinstance(command, CompareMemory):
        _memory(command)
    elif isinstance(command, Analyze):
        _analyze(command)
    else:
        _train(command, argv)


def _recipes(beginning: str) -> str:
    from .trainer.settings import recipes

    rows = {name: row for name, row in recipes.ROWS.items() if name.startswith(beginning)}
    if not rows:
        recipes.row(beginning)  # raises
    width = max(map(len, rows))
    lines = [
        f"{name:{width}}  {recipes.expected_text(row.expected)}" + ", cannot be trained here" * bool(row.untrained)
        for name, row in rows.items()
    ]
    if beginning in rows:
        found = rows[beginning]
        lines += [f"  {key}: {value}" for key, value in found.settings.items()]
        lines += [f"  {what}: {text}" for what, text in (("note", found.note), ("cannot be trained", found.untrained)) if text]
    return "\n".join(lines)


def _result(found: dict) -> str:
    if "miou" in found:
        ious = " ".join("-" if v is None else f"{100 * v:.1f}" for v in found["iou"])
        return (
            f"test mIoU {100 * found['miou']:.2f} % (classes: {ious}), pixels {100 * found['accuracy']:.2f} %, "
            f"{found['count']} images, cross entropy {found['loss']:.4f}"
        )
    right = f"{round(found['accuracy'] * found['count'])} of {found['count']}"
    return f"test accuracy {100 * found['accuracy']:.2f} % ({right}), top-5 {100 * found['top5']:.2f} %, cross entropy {found['loss']:.4f}"


def _train(command: Train, argv: list[str]) -> None:
    changed, others = _beside_resume(argv)
    if command.resume is not None and others:
        raise ConfigError(f"--resume continues a run with its own settings: leave out {', '.join(others)}")
    if command.resume is None and command.resume_previous:
        raise ConfigError("--resume-previous says which checkpoint --resume takes: add --resume RUN")
    from .trainer import run as runs
    from .trainer import run_folder

    if command.resume is None:
        run = runs.fit(command.config)
    else:
        anew = {name: getattr(command.config, name) for name in SHARING} if changed & set(SHARING) else None
        moved = command.config.data_root if "data_root" in changed else None
        run = runs.resume(command.resume, previous=command.resume_previous, sharing=anew, data_root=moved)
    if run is None:  # another process of the run says it
        return
    last = run_folder.read_metrics(run, "epoch")[-1]
    from .trainer.evaluation import headline

    name, value = headline(last["test"])
    print(f"test {name} {100 * value:.2f} % (best {100 * last['best']:.2f} %) after {last['seconds']:.0f} s; run folder {run}")


def _plan(command: MakePlan) -> None:
    from infopro_fast.errors import PlanError

    from .memory import figures, largest_batch, largest_image, make_plan
    from .plan import parse_bytes

    _check_plan(command)
    size = command.image_size[0] if command.image_size is not None and len(command.image_size) == 1 else command.image_size
    budget = None if command.budget is None else parse_bytes(command.budget)
    how = dict(recompute=command.recompute, losses=command.losses, objective=command.objective)
    grow = command.grow or ("batch" if budget and command.modules and command.batch_size is None else None)
    if grow and not (budget and command.modules):
        raise PlanError(f"grow {grow}: expected a budget and modules, to find the largest {grow} that fits")
    if grow == "batch" and command.batch_size is not None:
        raise PlanError("grow batch: expected no batch_size, it is what is looked for")
    if grow == "image" and command.image_size is not None:
        raise PlanError("grow image: expected no image_size, it is what is looked for")
    batch_size = 128 if command.batch_size is None else command.batch_size
    if grow == "batch":
        plan = largest_batch(command.arch, size, modules=command.modules, budget=budget, **how)
    elif grow == "image":
        plan = largest_image(command.arch, batch_size, modules=command.modules, budget=budget, **how)
    else:
        plan = make_plan(command.arch, batch_size, size, modules=command.modules, budget=budget, **how)
    plan.write(command.out)
    figures.draw_plan(plan, command.out.with_suffix(".png"))
    print(figures.plan_table(plan))
    print(f"written: {command.out}, {command.out.with_suffix('.png')}")


def _check_plan(command: MakePlan) -> None:
    """Raises PlanError for numbers that are none, and for a file that cannot be written, before what is to be in it takes minutes."""
    from infopro_fast.errors import PlanError

    for name in ("batch_size", "modules"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise PlanError(f"{name}: expected at least 1, got {value}")
    if command.image_size is not None and len(command.image_size) not in (1, 2):
        raise PlanError(f"image_size: expected a side, or height and width, got {command.image_size}")
    if command.out.is_dir():
        raise PlanError(f"out: {command.out} is a folder: expected a file to write")
    if not command.out.parent.is_dir():
        raise PlanError(f"out: {command.out}: there is no folder {command.out.parent}")


def _memory(command: CompareMemory) -> None:
    from .memory import compare, figures

    c, found = command, []
    compare.check(c.arch, c.batch_size, c.image_size, c.modules, c.budgets, rounds=c.rounds, device=c.device, threads=c.threads)
    for way in compare.ways(list(c.modules), list(c.budgets)):
        print(f"{way.name} ...", file=sys.stderr)
        found.append(compare.measure(way, c.arch, c.batch_size, c.image_size, rounds=c.rounds, device=c.device, threads=c.threads))
    print(figure.aligned([figures.COLUMNS, *figures.comparison_rows(found)]))
    paths = compare.write(found, c.arch, c.batch_size, c.image_size, c.out)
    print("written: " + ", ".join(str(path) for path in paths))


def _reproduce(command: Study) -> None:
    from .studies.reproduce import reproduce

    paths = reproduce(command)
    print(paths[0].read_text(), end="")
    print("written: " + ", ".join(str(path) for path in paths))


def _scale(command: Scale) -> None:
    import torch

    from infopro_fast.errors import PlanError

    from .memory import scale

    c, K = command, command.modules * len(command.arch) if len(command.modules) == 1 else command.modules
    if len(K) != len(c.arch):
        raise PlanError(f"modules: expected one number, or one for each of {len(c.arch)} networks, got {len(K)}")
    for name in ("batch_size", "machine", "link", "network", "latency", "micro_batches", "speedup"):
        if not getattr(c, name) > 0:
            raise PlanError(f"{name}: expected a positive number, got {getattr(c, name)}")
    for name, numbers in (("gpus", c.gpus), ("modules", c.modules), ("threads", () if c.threads is None else (c.threads,))):
        if min(numbers, default=1) < 1:
            raise PlanError(f"{name}: expected numbers of at least 1, got {', '.join(map(str, numbers))}")
    if not c.gpus:
        raise PlanError("gpus: expected numbers of at least 1, got none")
    if c.threads is not None:
        torch.set_num_threads(c.threads)
    cluster = scale.Cluster(c.machine, scale.Link(1e9 * c.link, 1e-6 * c.latency), scale.Link(1e9 * c.network, 3e-6 * c.latency))
    nets = [scale.measure(arch, k, c.batch_size, speedup=c.speedup) for arch, k in zip(c.arch, K)]
    found = [[p for gpus in sorted(set(c.gpus)) for p in scale.predict(net, gpus, cluster, c.micro_batches)] for net in nets]
    for net, predictions in zip(nets, found):
        print(scale.table(net, predictions))
    print("written: " + ", ".join(str(path) for path in scale.write(nets, found, cluster, c.out)))


def _analyze(command: Analyze) -> None:
    from .studies import analyze, probes

    c = command
    settings = probes.ProbeSettings(c.depths, c.epochs, c.batch_size, c.lr, c.seed, classifier=c.classifier)
    analyze.analyze(c.runs, c.out, settings, threads=c.threads, device=c.device, data_root=c.data_root)
    print("written: " + ", ".join(str(c.out / name) for name in (analyze.JSON, analyze.TABLE, analyze.FIGURE)))


def _fail(message: str, code: int) -> None:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
