"""Runs of several processes, forked from one that has imported everything and never started a thread.

Run as: python -m tests.process_driver FOLDER TASK..., where a task is a function of `tests.process_tasks` or
`tests.process_faults`. Prints what happened as JSON.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import rich.console  # noqa: F401  imported here once rather than in each child
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  by every optimizer
import torch.distributed as dist

from infopro_fast import cli
from infopro_fast.trainer import run  # noqa: F401
from tests.tiny_run import small_and_plain


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """Processes with torchrun's variables, and the store that its agent keeps; each runs ``work(rank)``.

    folder: gets what each one prints, as out0, err0, ... keeper: whether the store is a process' of its own,
    as with torchrun.
    """

    def __init__(self, size: int, work: Callable[[int], object], folder: Path, keeper: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.folder, self.codes = folder, {}
        self._keeper = fork(lambda: _keep_store(port)) if keeper else None
        variables = {
            "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": keeper,
        }
        self.pids = [fork(lambda rank=rank: self._child(rank, variables, work)) for rank in range(size)]

    def _child(self, rank: int, variables: dict, work: Callable[[int], object]) -> None:
        os.environ.update(
            {k: str(v) for k, v in variables.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(
                os.open(self.folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                descriptor,
            )
        work(rank)

    def wait_for_others(self, but: int | None, timeout: float) -> None:
        """Until all have ended, or all but the one that cannot."""
        end = time.monotonic() + timeout
        while len(self.codes.keys() - {but}) < len(self.pids) - (but is not None) and time.monotonic() < end:
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.02)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Exit codes by rank, -9 for those that had to be killed in the end."""
        self.wait_for_others(None, timeout)
        self.end()
        return [self.codes[rank] for rank in range(len(self.pids))]

    def end(self) -> None:
        """Kill what is left."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if self._keeper is not None:
            os.kill(self._keeper, signal.SIGKILL)
            os.waitpid(self._keeper, 0)
            self._keeper = None

    def errors(self) -> list[str]:
        return [(self.folder / f"err{rank}").read_text() for rank in range(len(self.pids))]


def fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keep_store(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store is not None:
        time.sleep(60)


def command(*words: object) -> None:
    """The command line, in this process."""
    cli.main([str(word) for word in words])


def main(folder: Path, tasks: list[str]) -> None:
    torch.set_num_threads(1)
    small_and_plain()
    parts = [importlib.import_module(f"tests.process_{part}") for part in ("tasks", "faults")]
    known = {name: task for part in parts for name, task in vars(part).items()}
    found = {name: known[name](folder / name) for name in tasks}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
