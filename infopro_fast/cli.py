"""The command line: `infopro-fast train`, `eval` and `info`. Its flags are the fields of `TrainConfig`.

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
from typing import Annotated

import tyro

from .trainer.config import ConfigError, TrainConfig

PROG = "infopro-fast"


@dataclass(frozen=True)
class Train:
    """Train a network in local modules and write a run folder: settings, metrics, weights, learning curve, checkpoints.

    Without flags: ResNet-32 in 4 modules, InfoPro's contrastive losses, on images that come with the package.
    """

    resume: Path | None = None
    """Continue the run in this folder, with its own settings, from its last checkpoint."""
    resume_previous: bool = False
    """With --resume: from the checkpoint before the last one, for when the last is damaged."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Eval:
    """Test accuracy of a run's weights."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder that `train` wrote."""
    data_root: Path | None = None
    """Where the data set's files are, if not where the run found them."""
    device: str | None = None
    """cpu, cuda, ..., if not the device of the run."""


@dataclass(frozen=True)
class Info:
    """Versions, instruction set, and which implementations of every op can run here."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; always exits."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(_parse(argv), argv)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        _fail(str(error), code)
    except KeyboardInterrupt as error:
        print(f"{PROG}: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))
    sys.exit(0)


def _parse(argv: list[str]) -> Train | Eval | Info:
    """The command; its errors, which tyro draws in a box, on one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Command, prog=PROG, args=argv, description=__doc__.split("\n")[0], config=(tyro.conf.DisallowNone,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        where = " ".join([PROG, *[word for word in argv[:1] if word in ("train", "eval", "info")]])
        _fail(f"{_one_line(errors.getvalue())} (see {where} --help)", 2)


def _one_line(box: str) -> str:
    """The message in one of tyro's boxes: between the title, in the frame or ruled off where the output is ASCII, and the next rule."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", box)
    framed = "╭" in text
    text = re.sub(r"(?m)^\s*[╭╰].*$", "", text).replace("│", " ")
    sections = re.split(r"(?m)^\s*[─-]{5,}\s*$", text)
    message = sections[0] if framed or len(sections) == 1 else sections[1]
    return " ".join(message.split())


def _run(command: Train | Eval | Info, argv: list[str]) -> None:
    if isinstance(command, Info):
        from .info import report

        print(report())
    elif isinstance(command, Eval):
        from .trainer.loop import evaluate_run

        found = evaluate_run(command.run, data_root=command.data_root, device=command.device)
        right = f"{round(found['accuracy'] * found['count'])} of {found['count']}"
        print(f"{command.run}: test accuracy {100 * found['accuracy']:.2f} % ({right}), cross entropy {found['loss']:.4f}")
    else:
        _train(command, argv)


def _train(command: Train, argv: list[str]) -> None:
    others = [word for word in argv if word.startswith("--") and not re.match(r"--resume([-_]previous)?(=|$)", word)]
    if command.resume is not None and others:
        raise ConfigError(f"--resume continues a run with its own settings: leave out {', '.join(others)}")
    if command.resume is None and command.resume_previous:
        raise ConfigError("--resume-previous says which checkpoint --resume takes: add --resume RUN")
    from .trainer import loop, report

    run = loop.fit(command.config) if command.resume is None else loop.resume(command.resume, previous=command.resume_previous)
    last = report.read_metrics(run, "epoch")[-1]
    accuracy = f"test accuracy {100 * last['test']['accuracy']:.2f} % (best {100 * last['best']:.2f} %)"
    print(f"{accuracy} after {last['seconds']:.0f} s; run folder {run}")


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that is for people, or None for one that is a bug and keeps its traceback."""
    from .data import DataError
    from .trainer.checkpoint import CheckpointError
    from .trainer.loop import NonFiniteError
    from .trainer.report import RunError

    if isinstance(error, (ConfigError, DataError, CheckpointError, RunError)):
        return 2
    return 1 if isinstance(error, (NonFiniteError, OSError)) else None


def _fail(message: str, code: int) -> None:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
