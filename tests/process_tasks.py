"""What the processes of `process_driver` do, a function a task; each returns what its test looks at."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from infopro_fast import build, modules
from infopro_fast.data import part_of
from infopro_fast.trainer import LocalTrainer, schedule
from infopro_fast.trainer.parallel import ParallelTrainer
from tests.process_driver import Group, command

TINY = [
    "train", "--arch", "resnet20", "--modules", "3", "--lambdas", "1", "0", "1", "1", "--epochs", "3", "--warmup", "1",
    "--batch-size", "16", "--lr", "0.05", "--log-every", "3", "--threads", "1",
]  # fmt: skip

GLOBAL = ["--sync-batch-norm", "--global-contrast", "--dtype", "float64"]  # the same batch as in one process, but for rounding


def tiny(folder: Path, size: int, name: str, *words: object) -> dict:
    """A small run of the command line by ``size`` processes."""
    run = folder / name
    if size == 0:
        group = Group(1, lambda rank: _alone(*TINY, "--out", run, *words), folder / f"{name}-output")
    else:
        group = Group(size, lambda rank: command(*TINY, "--out", run, *words), folder / f"{name}-output")
    return {"codes": group.wait(), "errors": group.errors(), "run": str(run)}


def _alone(*words):
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    command(*words)


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel


def _train(rank: int, size: int, loss: str, counts: list[int], steps: int, sync: bool, out: Path) -> None:
    """Steps on batches of ``counts`` images, by ``size`` processes, from the same weights."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = build("resnet20", 3, loss, lambdas=(1, 0.5, 0.5, 1), image_size=16).double()
    sgd = schedule.released_sgd(0.05)
    if size > 1:
        if sync:
            modules.convert_sync_batch_norm(net)
        trainer = ParallelTrainer(net, sgd, group=dist.group.WORLD, global_contrast=loss == "contrast")
        calls = _counted_reductions()
    else:
        trainer = LocalTrainer(net, sgd)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        count = counts[step % len(counts)]
        image, label = torch.randn(count, 3, 16, 16, generator=generator).double(), torch.randint(10, (count,), generator=generator)
        own = part_of(0, count, rank, size)
        metrics = trainer.step(image[own], label[own], *([count] if size > 1 else []))
        losses.append({name: value.item() for name, value in metrics.items()})
    found = {"net": net.state_dict(), "losses": losses}
    if size > 1:
        parameters = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        found["calls"], found["bytes"] = calls, sum(p.numel() * p.element_size() for p in parameters)
        found["counted"] = sum(reduction.bytes for reduction in trainer.reductions)
        dist.destroy_process_group()
    torch.save(found, out / f"{loss}-{size}-{rank}.pt")


def _counted_reductions() -> list[int]:
    """Bytes of every all-reduce that is not waited for at once, from now on: those of gradients."""
    calls, reduce = [], dist.all_reduce

    def counted(t, *args, async_op=False, **options):
        if async_op:
            calls.append(t.numel() * t.element_size())
        return reduce(t, *args, async_op=async_op, **options)

    dist.all_reduce = counted
    return calls


def _both(folder: Path, loss: str, counts: list[int], steps: int) -> dict:
    found = {}
    for size in (1, 2):
        found[size] = Group(size, lambda rank, size=size: _train(rank, size, loss, counts, steps, True, folder), folder)
        found[size] = {"codes": found[size].wait(), "errors": found[size].errors()}
    return found


def equal_contrast(folder: Path) -> dict:
    return _both(folder, "contrast", [128], 20)


def equal_softmax_uneven(folder: Path) -> dict:
    return _both(folder, "softmax", [16, 7], 6)


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline


def runs(folder: Path) -> dict:
    """The same run by one process, by pipelines of 2, 3 and 4, by 2 x 2 processes, and by 2 that share the batches."""
    four = ("--modules", "4")
    return {
        "alone": tiny(folder, 0, "alone"),
        "two": tiny(folder, 2, "two", "--parallel", "pipeline"),
        "three": tiny(folder, 3, "three", "--parallel", "pipeline", "--in-flight", "1"),
        "alone_of_four": tiny(folder, 0, "alone_of_four", *four),
        "four": tiny(folder, 4, "four", "--parallel", "pipeline", *four, "--in-flight", "5"),
        "rounded": tiny(folder, 2, "rounded", "--parallel", "pipeline", "--wire", "bfloat16"),
        "mixed": tiny(folder, 4, "mixed", "--parallel", "pipeline", "--pipeline-modules", "1", "2", *GLOBAL),
        "data": tiny(folder, 2, "data", "--parallel", "data", *GLOBAL),
        "alone_in_float64": tiny(folder, 0, "alone_in_float64", "--dtype", "float64"),
    }
