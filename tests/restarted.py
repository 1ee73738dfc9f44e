"""A small run for torchrun, which loses a process in its first life.

Run as: torchrun ... -m tests.restarted OUT MODE RANK.
"""

import os
import sys
from pathlib import Path

import torch

from tests.process_driver import command
from tests.process_faults import MODES, in_step, kill
from tests.process_tasks import TINY
from tests.tiny_run import small_and_plain


def main(out: Path, mode: str, rank: int) -> None:
    torch.set_num_threads(1)
    small_and_plain()
    if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        in_step(7, kill)
    command(*TINY, "--out", out, *MODES[mode])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
