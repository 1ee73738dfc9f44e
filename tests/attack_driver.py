"""Attack runs at random (test_attack.py): python -m tests.attack_driver FOLDER KILLS FLIPS SEED.

KILLS times a run is killed with SIGKILL at a random moment, and once more while it continues; then it ends.
FLIPS times a random bit of a random file of a stopped run is flipped; then the run continues, and its weights
are evaluated. Prints as JSON how often each outcome was met: bits equal, one clear line, or anything else.
The children are forked from a process that has imported everything but never started a thread.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import rich.console  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  by every optimizer

from infopro_fast import errors
from infopro_fast.trainer import checkpoint, evaluate_run, fit, resume, run_folder
from tests.tiny_run import config, small_and_plain, weights

SAME, LINE = "the same bits", "one clear line"


def start(work, report) -> int:
    """Return the process that does this work. A user's error becomes a line in the file ``report``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        code = errors.exit_code(error)
        report.write_text(str(error) if code else f"{type(error).__name__}: {error}")
        os._exit(1 if code and "\n" not in str(error) else 70)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begin_or_continue(run: Path) -> None:
    """What a user does after a kill: continue, or begin where nothing was written."""
    if (run / run_folder.CONFIG).exists():
        resume(run)
    else:
        fit(config(run, checkpoint_minutes=1e-9))


def same_weights(run: Path, alone: Path) -> bool:
    expected, got = weights(alone), weights(run)
    return list(expected) == list(got) and all(torch.equal(got[name], t) for name, t in expected.items())


def outcome(code: int, report: Path, right) -> str:
    if code == 0:
        return SAME if right() else "OTHER BITS"
    return LINE if code == 1 else f"exit code {code}: {report.read_text() if report.exists() else ''}"


def kill(folder: Path, alone: Path, seconds: float, draw: random.Random) -> str:
    run, report = folder / "run", folder / "report"
    folder.mkdir()
    for longest in (seconds, seconds / 2):
        pid = start(lambda: begin_or_continue(run), report)
        time.sleep(draw.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    code = ended(start(lambda: begin_or_continue(run), report))
    return outcome(code, report, lambda: same_weights(run, alone))


def flip(folder: Path, stopped: Path, alone: Path, draw: random.Random) -> tuple[str, str]:
    run, report = folder / "run", folder / "report"
    shutil.copytree(stopped, run)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    found = []
    for work, right in (
        (lambda: Path(folder / "eval").write_text(json.dumps(evaluate_run(run))),
         lambda: json.loads((folder / "eval").read_text()) == evaluate_run(stopped)),
        (lambda: resume(run), lambda: same_weights(run, alone)),
    ):
        found.append(outcome(ended(start(work, report)), report, right))
    if not set(found) <= {SAME, LINE}:
        found = [f"{path.relative_to(run)}: {each}" for each in found]
    return found[0], found[1]


def main(folder: Path, kills: int, flips: int, seed: int) -> None:
    torch.set_num_threads(1)
    small_and_plain()
    draw, counts = random.Random(seed), {"kill": {}, "eval": {}, "resume": {}}
    folder.mkdir(exist_ok=True)

    def count(kind: str, what: str) -> None:
        counts[kind][what] = counts[kind].get(what, 0) + 1

    alone, begun = folder / "alone", time.monotonic()
    assert ended(start(lambda: begin_or_continue(alone), folder / "report")) == 0
    seconds = time.monotonic() - begun
    for i in range(kills):
        count("kill", kill(folder / f"kill{i}", alone, seconds, draw))
        shutil.rmtree(folder / f"kill{i}")

    stopped = folder / "stopped"
    shutil.copytree(alone, stopped)  # as a kill leaves it before its last checkpoint
    shutil.rmtree(checkpoint.list_checkpoints(stopped / run_folder.CHECKPOINTS)[-1])
    for i in range(flips):
        for kind, what in zip(("eval", "resume"), flip(folder / f"flip{i}", stopped, alone, draw)):
            count(kind, what)
        shutil.rmtree(folder / f"flip{i}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
