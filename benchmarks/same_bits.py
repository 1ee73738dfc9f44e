"""Compare the weights that two versions train, bit for bit: python benchmarks/same_bits.py OLD NEW

OLD, NEW: folders that hold an `infopro_fast` with built kernels (a checkout, or the target of `pip install
--target`). Each version trains a ResNet-20 in 3 modules for an epoch on the embedded images, with the same
seed, in each way below. Prints a table; the exit code is 1 if a tensor of weights.safetensors differs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

TRAIN = (
    "train --arch resnet20 --modules 3 --epochs 1 --warmup 0 --shrink 4 --batch-size 128 --lr 0.1 --seed 3 "
    "--threads 1 --device cpu --checkpoint-minutes {minutes} --out {run}"
)
WAYS = {  # way: (processes that torchrun starts, more flags)
    "alone": (0, ""),
    "sequential, cached": (0, "--order sequential"),
    "sequential, no cache": (0, "--order sequential --no-cache"),
    "data parallel, 2 processes": (2, "--parallel data"),
    "pipeline, 2 processes": (2, "--parallel pipeline"),
    "killed and resumed": (0, ""),
}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node {}"


def start(version: Path, folder: Path, flags: str, processes: int = 0) -> subprocess.Popen:
    """Start the command line of a version."""
    launcher = TORCHRUN.format(processes).split() if processes else []
    environment = {**os.environ, "PYTHONPATH": str(version), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "ab") as log:
        command = [sys.executable, *launcher, "-m", "infopro_fast", *flags.split()]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait(1800):
        sys.exit(f"{' '.join(process.args)}\n{(folder / 'log').read_text()[-3000:]}")


def train(version: Path, folder: Path, way: str) -> dict[str, torch.Tensor]:
    """Return the weights that a version trains in a new ``folder``."""
    folder.mkdir(parents=True)
    processes, more = WAYS[way]
    killed = way == "killed and resumed"
    run = folder / "run"
    flags = f"{TRAIN.format(minutes=1e-9 if killed else 60, run=run)} {more}"
    process = start(version, folder, flags, processes)
    if killed:
        while not list(run.glob("checkpoints/epoch0000-batch00001*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"{way}: the run ended before it was killed\n{(folder / 'log').read_text()[-3000:]}")
        process = start(version, folder, f"train --resume {run}")
    finish(process, folder)
    return safetensors.torch.load_file(run / "weights.safetensors")


def difference(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> str:
    """Return what differs; "" for the same names, shapes, dtypes and bits."""
    if old.keys() != new.keys():
        return f"names: {sorted(old.keys() ^ new.keys())}"
    for name, t in old.items():
        if t.dtype != new[name].dtype or t.shape != new[name].shape:
            return f"{name}: {t.dtype} {tuple(t.shape)}, {new[name].dtype} {tuple(new[name].shape)}"
        if t.numpy().tobytes() != new[name].numpy().tobytes():
            return f"{name}: by up to {(t.double() - new[name].double()).abs().max().item():.3g}"
    return ""


def main(versions: list[Path]) -> int:
    for version in versions:
        if not (version / "infopro_fast" / "__init__.py").is_file():
            sys.exit(f"{version}: expected a folder with the package infopro_fast")
    wrong = 0
    print(f"{'way':28}{'tensors':>9}{'numbers':>10}  difference", flush=True)
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            old, new = (train(version, Path(folder) / str(i), way) for i, version in enumerate(versions))
        found = difference(old, new)
        wrong += bool(found)
        numbers = sum(t.numel() for t in new.values())
        print(f"{way:28}{len(new):9}{numbers:10}  {found or 'none: the same bits'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main([Path(word).absolute() for word in sys.argv[1:]]))
