"""The command line: the list of commands, and what becomes of their errors.

A user's error is one line on stderr and exit code 2. A run that goes wrong has exit code 1. A run that a
signal stops writes a checkpoint and has exit code 128 plus the signal's number. Importing this needs no
torch, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import operator
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from infopro_fast import __version__, errors, output
from infopro_fast.errors import ConfigError

from .memory.command import CompareMemory, MakePlan, Scale
from .studies.command import Analyze, Reproduce
from .trainer.command import Eval, Recipes, Train, default_of
from .trainer.settings.fields import did_you_mean

PROG = "infopro-fast"
ABOUT = """Train networks in local modules with fused losses, plan and measure their memory, and reproduce the
paper's tables. --version shows the version."""


@dataclass(frozen=True)
class Info:
    """Show versions, the processor's instruction set, and which implementations of every op can run here."""

    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also run each of them, forward and backward, against float64. Takes seconds on a CPU."""

    def run(self) -> None:
        from . import check, info

        print(info.report())
        if self.check:
            print()
            check.show()


COMMANDS: dict[str, type] = {
    "train": Train, "eval": Eval, "plan": MakePlan, "memory": CompareMemory, "recipes": Recipes,
    "scale": Scale, "analyze": Analyze, "reproduce": Reproduce, "info": Info,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit."""
    with output.lasting():
        try:
            parse(sys.argv[1:] if argv is None else argv).run()
        except Exception as error:
            code = errors.exit_code(error)
            if code is None:
                raise
            _fail(errors.text(error), code)
        except KeyboardInterrupt as error:
            print(f"{PROG}: {error or 'interrupted'}", file=sys.stderr)
            sys.exit(128 + getattr(error, "signum", signal.SIGINT))
    sys.exit(0)


def parse(argv: Sequence[str]) -> Any:
    """Return the command that the words say, whose ``run`` runs it.

    Raises ConfigError for impossible settings. Words that tyro refuses, in a box, are one line on stderr and
    SystemExit. --help and --version exit, too.
    """
    argv = list(argv)
    if argv == ["--version"]:
        print(f"{PROG} {__version__}")
        sys.exit(0)
    name = argv[0] if argv else "-"
    if name not in COMMANDS and not name.startswith("-"):
        raise ConfigError(f"{name}: no such command{did_you_mean(name, COMMANDS)} (see {PROG} --help)")
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            default = default_of(argv[1:]) if name == "train" else Train()
            commands = [Annotated[kind, tyro.conf.subcommand(key)] for key, kind in COMMANDS.items()]
            commands[0] = Annotated[Train, tyro.conf.subcommand("train", default=default)]
            union: Any = functools.reduce(operator.or_, commands)
            no_none = (tyro.conf.DisallowNone,)  # a flag cannot be given the value None
            command = tyro.cli(union, prog=PROG, args=argv, description=ABOUT, config=no_none)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        where = f"{PROG} {name}" if name in COMMANDS else PROG
        _fail(f"{_one_line(boxes.getvalue())} (see {where} --help)", 2)
    return command.beside(default) if isinstance(command, Train) else command


def _one_line(box: str) -> str:
    """Return the message in one of tyro's boxes, with the nearest of the flags that it suggests.

    Rules divide the box into sections, of which the first has the message. In ASCII a title comes before it.
    """
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", box)
    framed = "╭" in text
    text = re.sub(r"(?m)^\s*[╭╰].*$", "", text).replace("│", " ")
    sections = re.split(r"(?m)^\s*[─-]{5,}\s*$", text)
    message = " ".join(sections[0 if framed or len(sections) == 1 else 1].split())
    several = re.match(r"Error parsing (--\S+):.* from \[(.*?)\]\..*expected argument count (\d+)", message)
    if several:
        flag, words, count = several.groups()
        return f"{flag}: expected {count} values with spaces between them, got {words}"
    meant = re.findall(r"(?m)^\s*(--[\w-]+)", text.partition("Perhaps you meant:")[2])
    given = re.search(r"--[\w-]+", message)
    near = difflib.get_close_matches(given[0], meant, 1, 0) if given else []
    return f"{message.rstrip('.')}; did you mean {near[0]}?" if near else message


def _fail(message: str, code: int) -> None:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
