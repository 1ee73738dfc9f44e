"""Kill training with SIGKILL at chosen moments (test_kill.py): python -m tests.kill_driver FOLDER MOMENT...

For each moment a child process trains in FOLDER/MOMENT and kills itself there; then children continue the run
until it ends. The children are forked from a process that has imported everything but never started a thread.
Prints what happened as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import rich.console  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  by every optimizer

from infopro_fast import whole_files
from infopro_fast.trainer import checkpoint, evaluation, fit, resume, run_folder
from tests.tiny_run import config, small_and_plain


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def nth(function, n, instead):
    """``function``, but ``instead`` in its n-th call."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        return instead(*args, **kwargs) if calls == n else function(*args, **kwargs)

    return wrapped


def kill_before(owner, name, n):
    setattr(owner, name, nth(getattr(owner, name), n, lambda *args, **kwargs: kill()))


def kill_after(owner, name, n):
    function = getattr(owner, name)

    def instead(*args, **kwargs):
        function(*args, **kwargs)
        kill()

    setattr(owner, name, nth(function, n, instead))


def kill_in_write(suffix, n):
    """Half of the file's bytes reach the disk, in the n-th file of this name."""
    write, seen = whole_files.write_file, 0

    def half(path, content, *rest):
        nonlocal seen
        seen += path.name.endswith(suffix)
        if path.name.endswith(suffix) and seen == n:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                os.fsync(file.fileno())
            kill()
        write(path, content, *rest)

    whole_files.write_file = half


def kill_in_metrics(n):
    write = run_folder.MetricsLog.write

    def half(self, record):
        self._file.write(json.dumps(record).encode()[:37])
        self._file.flush()
        kill()

    run_folder.MetricsLog.write = nth(write, n, half)


MOMENTS = {
    "never": lambda: None,
    "first_step": lambda: kill_before(torch.optim.SGD, "step", 2),  # the second module of the first step
    "step": lambda: kill_before(
        torch.optim.SGD, "step", 3 * 5 + 2
    ),  # in the sixth step, after one module of three
    "tensors": lambda: kill_in_write("tensors.safetensors", 4),
    "state": lambda: kill_in_write("state.json", 5),
    "sums": lambda: kill_in_write("SHA256SUMS", 3),
    "before_rename": lambda: kill_before(
        whole_files, "sync_folder", 9
    ),  # the folder aside is whole but has no name yet
    "after_rename": lambda: kill_after(os, "rename", 3),
    "retiring": lambda: kill_after(checkpoint, "retire", 1),
    "metrics": lambda: kill_in_metrics(4),
    "evaluation": lambda: kill_before(evaluation, "evaluate", 2),
    "weights": lambda: kill_in_write("weights.safetensors", 2),
    "last_weights": lambda: kill_in_write("weights.safetensors", 3),
}


def in_child(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, moments: list[str]) -> None:
    torch.set_num_threads(1)
    small_and_plain()
    found = {}
    for moment in moments:
        # With a checkpoint after every step, except where one step must be repeated from further back.
        minutes = 60.0 if moment in ("step", "first_step", "never") else 1e-9

        def train(moment=moment, minutes=minutes):
            MOMENTS[moment]()
            fit(config(folder / moment, checkpoint_minutes=minutes))

        codes = [in_child(train)]
        if moment != "never":
            codes.append(in_child(lambda moment=moment: resume(folder / moment)))
        found[moment] = codes
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
