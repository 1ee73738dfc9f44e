"""Runs of several processes, for the tests: forked from a process that has imported everything and never started a thread.

Run as: python -m tests.process_driver FOLDER TASK..., where a task is a name in `tests.process_tasks`. Prints what happened as JSON.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  imported here once rather than in each child
import matplotlib.figure  # noqa: F401
import rich.console  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  by every optimizer

from infopro_fast import cli
from infopro_fast.data import fashion_mnist
from infopro_fast.trainer import distributed  # noqa: F401
from tests.tiny_run import load


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """Processes with the variables that torchrun sets; each runs ``work(rank)``. out, err: what each one prints."""

    def __init__(self, size: int, work: Callable[[int], object], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pids, self.codes = folder, [], {}
        variables = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._child(rank, variables, work)
            self.pids.append(pid)

    def _child(self, rank: int, variables: dict, work: Callable[[int], object]) -> None:
        code = 70
        try:
            os.environ.update({k: str(v) for k, v in variables.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for descriptor, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
            work(rank)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Exit codes by rank; -9 for those that had to be killed in the end."""
        end = time.monotonic() + timeout
        while len(self.codes) < len(self.pids):
            self.poll()
            if time.monotonic() > end:
                for rank, pid in enumerate(self.pids):
                    if rank not in self.codes:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, 9)
            time.sleep(0.02)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def poll(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])

    def errors(self) -> list[str]:
        return [(self.folder / f"err{rank}").read_text() for rank in range(len(self.pids))]


def command(*words: object) -> None:
    """The command line, in this process."""
    cli.main([str(word) for word in words])


def main(folder: Path, tasks: list[str]) -> None:
    torch.set_num_threads(1)
    images = load()
    fashion_mnist.load = lambda: images
    known = importlib.import_module("tests.process_tasks")
    found = {name: getattr(known, name)(folder / name) for name in tasks}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
