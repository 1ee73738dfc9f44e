"""Whether an op or a training step of one version is slower than that of another, on the CPU.

    python benchmarks/compare_versions.py OLD NEW

OLD and NEW are checkouts with built kernels. Each has a process of its own with two threads, and the two take
turns at every case, so that other work on the machine slows both. Cases above the limit are measured once
more, in fresh processes. Exit code 1: a case stayed above it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

LIMIT = 1.03
SECONDS = 0.05  # least of a measurement: short calls are repeated


def cases() -> dict:
    """Return {case: function that makes the call to measure}, by the public API of any version."""
    import torch
    from torch import nn

    import infopro_fast
    from infopro_fast import ops
    from infopro_fast.trainer import released_sgd

    def both(function, *shapes: tuple[int, ...], layers: tuple[nn.Module, ...] = ()):
        """A call of the op and its backward, on leaves of these shapes and the layers' parameters."""
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        everything = [*leaves, *nn.Sequential(*layers).parameters()]
        return lambda: torch.autograd.grad(function(*leaves).mean(), everything)

    def conv(c: int, k: int, size: int = 3, *, bias: bool = True) -> nn.Conv2d:
        return nn.Conv2d(c, k, size, padding=size // 2, bias=bias)

    def reconstruction(layers: list[nn.Module], N: int, C: int, h: int, H: int):
        image, decoder = torch.rand(N, 3, H, H), nn.Sequential(*layers, nn.Sigmoid())
        return both(lambda h: ops.reconstruction_loss(h, image, decoder), (N, C, h, h), layers=decoder)

    def chain():
        layers = []
        for C, K, size in ((512, 128, 1), (128, 32, 3), (32, 12, 3)):
            layers += [conv(C, K, size), nn.BatchNorm2d(K), nn.ReLU()]
            layers += [nn.Upsample(scale_factor=2, mode="bilinear")]
        return reconstruction([*layers, conv(12, 3)], 8, 512, 28, 224)

    def step(K: int, **options):
        net = infopro_fast.build("resnet32", modules=K, **options)
        trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.01))
        image, target = torch.randn(128, 3, 32, 32), torch.arange(128) % 10
        return lambda: trainer.step(image, target)

    label, pixels = torch.arange(1024) % 10, torch.arange(2 * 512 * 1024).view(2, 512, 1024) % 19
    found = {
        f"reconstruction_loss, {C} channels {h}x{h}": lambda C=C, h=h: reconstruction(
            [conv(C, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 3)], 128, C, h, 32)
        for C, h in ((16, 32), (32, 16), (64, 8))
    }
    layers = conv(64, 64, bias=False), nn.BatchNorm2d(64)
    return found | {
        "reconstruction_loss, ImageNet's decoder": chain,
        "supcon_loss": lambda: both(lambda x: ops.supcon_loss(x, label), (1024, 128)),
        **{f"linear_cross_entropy, C {C}": lambda C=C: both(
            lambda x, w: ops.linear_cross_entropy(x, w, label), (1024, 128), (C, 128)) for C in (10, 10000)},
        "upsample_cross_entropy": lambda: both(
            lambda x: ops.upsample_cross_entropy(x, pixels), (2, 19, 64, 128)),
        "upsample_conv3x3": lambda: both(
            lambda x, w: ops.upsample_conv3x3(x, w, None, 64), (8, 128, 32, 32), (64, 128, 3, 3)),
        "norm_relu_pool": lambda: both(
            lambda x: ops.norm_relu_pool(x, layers[1]), (1024, 64, 8, 8), layers=layers[1:]),
        "norm_relu_pool with a convolution": lambda: both(
            lambda x: ops.norm_relu_pool(x, layers[1], conv=layers[0]), (128, 64, 8, 8), layers=layers),
        "step, K = 1": lambda: step(1, local_loss="none"),
        "step, K = 16": lambda: step(16, local_loss="contrast", lambdas=(5, 0.05, 0.2, 0.5)),
    }


def work() -> None:
    """Answer each line "case<TAB>number" with the seconds of so many calls."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    known, name, call = cases(), None, None
    print(*known, sep="\t", flush=True)
    for line in sys.stdin:
        asked, number = line.rstrip("\n").split("\t")
        if asked != name:
            call = None  # so that the tensors of the last case are freed first
            name, call = asked, known[asked]()
        start = time.perf_counter()
        for _ in range(int(number)):
            call()
        print(time.perf_counter() - start, flush=True)


class Version:
    def __init__(self, folder: str):
        environment = os.environ | {"PYTHONPATH": os.path.abspath(folder), "OMP_NUM_THREADS": "2"}
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.cases = self.process.stdout.readline().rstrip("\n").split("\t")

    def seconds(self, case: str, number: int) -> float:
        print(case, number, sep="\t", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def compare(folders: list[str], rounds: int, chosen: list[str] | None = None) -> list[str]:
    """Measure, print a line a case, and return the cases above the limit."""
    versions = [Version(folder) for folder in folders]
    slower = []
    for case in versions[0].cases if chosen is None else chosen:
        once = [[version.seconds(case, 1) for _ in range(3)][-1] for version in versions]
        number = max(1, int(SECONDS / min(once)))
        taken = []
        for r in range(rounds):
            turn = {i: versions[i].seconds(case, number) for i in ((0, 1), (1, 0))[r % 2]}
            taken.append((turn[0], turn[1]))
        old, new = (statistics.median(column) / number * 1e3 for column in zip(*taken))
        ratio = statistics.median(b / a for a, b in taken)
        print(f"{case:40} {old:9.3f} ms {new:9.3f} ms   new / old {ratio:.3f}", flush=True)
        slower += [case] if ratio > LIMIT else []
    for version in versions:
        version.process.communicate()  # closes its input, at which it ends
    return slower


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        sys.exit(work())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    slower = compare(given.folders, given.rounds)
    if slower:
        print("\nMeasured once more:")
        slower = compare(given.folders, 3 * given.rounds, slower)
    sys.exit(f"slower by more than {LIMIT - 1:.0%}: {slower}" if slower else 0)
