"""The commands `infopro-fast plan`, `memory` and `scale`. Importing this needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from infopro_fast.errors import PlanError
from infopro_fast.trainer.settings.fields import SAID, keywords

CifarResNet = Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
Bottleneck = Literal["resnet50", "resnet101", "resnet152"]


@dataclass(frozen=True)
class MakePlan:
    """Find where to cut a network so that its largest module is smallest, or what fits into a budget.

    Writes a file that `train --plan` takes, and a figure beside it. Nothing is trained.
    """

    arch: str = "resnet110"
    """Network: a name that `build` takes, torchvision:NAME, timm:NAME or package.module:function."""
    arch_args: Annotated[tuple[str, ...] | None, SAID] = None
    """Arguments of the function that makes a network with a colon in its name, such as img_size=32."""
    batch_size: Annotated[int | None, SAID] = None
    """Images in a step. Default: 128; with budget and modules, the largest that fits."""
    image_size: Annotated[tuple[int, ...] | None, SAID] = None
    """Side, or height and width. Default: 32, 224 or 512 1024, depending on the network."""
    num_classes: Annotated[int | None, SAID] = None
    """Classes. Default: 10, 1000 or 19, depending on the network."""
    modules: Annotated[int | None, SAID] = None
    """Number K of modules. Default: the smallest that fits into the budget."""
    budget: Annotated[str | None, SAID] = None
    """Bytes for everything, such as 4GiB: parameters, momentum, batch, gradients and the peak of a step."""
    grow: Annotated[Literal["batch", "image"] | None, SAID] = None
    """With budget and modules: find the largest batch or image. Default: batch, unless its size is given."""
    recompute: Literal["none", "norm", "block"] = "none"
    """Recompute in backward: norm = each convolution's normalised input; block = each residual block."""
    local_loss: Annotated[str | None, SAID] = None
    """Local loss of the modules. Default: contrast for CIFAR's networks, softmax for others."""
    losses: Literal["ours", "released"] = "ours"
    """Count the bytes of our kernels (ours), or of the authors' code in plain PyTorch (released)."""
    objective: Literal["peak", "saved", "time"] = "peak"
    """What to minimise in the largest module: peak bytes, bytes saved for backward, or measured seconds."""
    out: Path = Path("plan.json")
    """File to write. The figure has the same name with .png."""

    def run(self) -> None:
        from infopro_fast.planning.chains import usual_loss
        from infopro_fast.planning.planner import largest_batch, largest_image, plan

        from . import figures

        self._check()
        size: Any = self.image_size
        size = size[0] if size is not None and len(size) == 1 else size
        how: dict[str, Any] = dict(
            modules=self.modules, budget=self.budget, num_classes=self.num_classes,
            arch_args=keywords(self.arch_args), local_loss=self.local_loss or usual_loss(self.arch),
            recompute=self.recompute, losses=self.losses, objective=self.objective,
        )
        batch_size = 128 if self.batch_size is None else self.batch_size
        grow = self.grow or ("batch" if self.budget and self.modules and self.batch_size is None else None)
        if grow == "batch":
            found = largest_batch(self.arch, image_size=size, **how)
        elif grow == "image":
            found = largest_image(self.arch, batch_size, **how)
        else:
            found = plan(self.arch, batch_size=batch_size, image_size=size, **how)
        found.write(self.out)
        figure = self.out.with_suffix(".png")
        figures.draw_plan(found, figure)
        print(figures.plan_table(found))
        print(f"written: {self.out}, {figure}")

    def _check(self) -> None:
        """Raise PlanError, before minutes are spent, for wrong numbers and a file that cannot be written."""
        for name in ("batch_size", "modules"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name}: expected at least 1, got {value}")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise PlanError(f"image_size: expected a side, or height and width, got {self.image_size}")
        if self.grow and not (self.budget and self.modules):
            raise PlanError(
                f"grow {self.grow}: expected a budget and modules, to find the largest {self.grow} that fits"
            )
        for grow, name in (("batch", "batch_size"), ("image", "image_size")):
            if self.grow == grow and getattr(self, name) is not None:
                raise PlanError(f"grow {grow}: expected no {name}, it is what is looked for")
        if self.out.is_dir():
            raise PlanError(f"out: {self.out} is a folder: expected a file to write")
        if not self.out.parent.is_dir():
            raise PlanError(f"out: {self.out}: there is no folder {self.out.parent}")


@dataclass(frozen=True)
class CompareMemory:
    """Compare bytes and time of a training step among ways to train the same network.

    The ways: end to end, checkpointed, compiled, in modules with the authors' losses, and with ours. Each
    runs in its own process. Writes a table (memory.md), numbers (memory.json) and a figure (memory.png).
    """

    arch: CifarResNet = "resnet110"
    """Network."""
    batch_size: int = 128
    """Images in a step."""
    image_size: int = 32
    """Side of the images."""
    modules: tuple[int, ...] = (4, 16)
    """Numbers K of local modules."""
    budgets: tuple[float, ...] = (0.5,)
    """Values in [0, 1] of torch.compile's activation_memory_budget, one row each.
    Compiling takes minutes; without values there are no such rows."""
    rounds: int = 5
    """Steps to time."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: Annotated[int | None, SAID] = None
    """CPU threads. Default: torch's number."""
    out: Path = Path("memory")
    """Folder to write into."""

    def run(self) -> None:
        from infopro_fast import figure

        from . import compare, figures

        net = self.arch, self.batch_size, self.image_size
        how: dict[str, Any] = dict(rounds=self.rounds, device=self.device, threads=self.threads)
        compare.check(*net, self.modules, self.budgets, **how)
        found = []
        for way in compare.ways(list(self.modules), list(self.budgets)):
            print(f"{way.name} ...", file=sys.stderr)
            found.append(compare.measure(way, *net, **how))
            written = compare.write(found, *net, self.out)  # each row as it is measured: some take minutes
        print(figure.aligned([figures.COLUMNS, *figures.comparison_rows(found)]))
        print("written: " + ", ".join(map(str, written)))


@dataclass(frozen=True)
class Scale:
    """Predict the throughput of every layout on up to G GPUs, from bytes and from block times measured here.

    Compares with DistributedDataParallel and with pipelines that have a backward (GPipe, 1F1B). Writes a
    figure and, beside it, all numbers as JSON. Nothing is trained.
    """

    arch: tuple[Literal[CifarResNet, Bottleneck], ...] = ("resnet110",)
    """Networks, one panel each."""
    modules: tuple[int, ...] = (16,)
    """Number K of modules, cut by time: one for all networks, or one for each."""
    batch_size: int = 32
    """Images of a replica."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of GPUs."""
    machine: int = 8
    """GPUs in a machine."""
    link: float = 200.0
    """GB/s between two GPUs in a machine."""
    network: float = 25.0
    """GB/s between two machines."""
    latency: float = 10.0
    """Microseconds of a message inside a machine; between machines it takes three times as long."""
    micro_batches: int = 8
    """Micro-batches of GPipe and 1F1B."""
    speedup: float = 1.0
    """How many times faster than this machine a GPU is."""
    threads: Annotated[int | None, SAID] = None
    """CPU threads to measure with. Default: torch's number."""
    out: Path = Path("scale.png")
    """Figure to write."""

    def run(self) -> None:
        import torch

        from . import scale

        self._check()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        inside = scale.Link(1e9 * self.link, 1e-6 * self.latency)
        cluster = scale.Cluster(self.machine, inside, scale.Link(1e9 * self.network, 3e-6 * self.latency))
        modules = self.modules * len(self.arch) if len(self.modules) == 1 else self.modules
        nets, found = [], []
        for arch, K in zip(self.arch, modules):
            net = scale.measure(arch, K, self.batch_size, speedup=self.speedup)
            numbers = sorted(set(self.gpus))
            nets.append(net)
            of_net = [scale.predict(net, gpus, cluster, self.micro_batches) for gpus in numbers]
            found.append([p for predictions in of_net for p in predictions])
        for net, predictions in zip(nets, found):
            print(scale.table(net, predictions))
        print("written: " + ", ".join(map(str, scale.write(nets, found, cluster, self.out))))

    def _check(self) -> None:
        nets, got = len(self.arch), len(self.modules)
        if got not in (1, nets):
            raise PlanError(f"modules: expected one number, or one for each of {nets} networks, got {got}")
        for name in ("batch_size", "machine", "link", "network", "latency", "micro_batches", "speedup"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("gpus", "modules", "threads"):
            numbers = getattr(self, name)
            numbers = (1 if numbers is None else numbers,) if name == "threads" else numbers
            if not numbers or min(numbers) < 1:
                given = ", ".join(map(str, numbers)) or "none"
                raise PlanError(f"{name}: expected numbers of at least 1, got {given}")
