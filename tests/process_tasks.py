"""What the processes of `process_driver` do, a function a task; each returns what its test looks at."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from infopro_fast import build, modules
from infopro_fast.data import part_of
from infopro_fast.trainer import LocalTrainer, checkpoint, feature_cache, report, schedule, sequential
from infopro_fast.trainer.parallel import ParallelTrainer
from tests.kill_driver import kill_before, kill_in_write
from tests.process_driver import Group, command

TINY = [
    "train", "--arch", "resnet20", "--modules", "3", "--lambdas", "1", "0", "1", "1", "--epochs", "3", "--warmup", "1",
    "--batch-size", "16", "--lr", "0.05", "--log-every", "3", "--threads", "1",
]  # fmt: skip

GLOBAL = ["--sync-batch-norm", "--global-contrast", "--dtype", "float64"]  # the same batch as in one process, but for rounding


def tiny(folder: Path, size: int, name: str, *words: object) -> dict:
    """A small run of the command line by ``size`` processes; 0: by one that torchrun did not start."""
    run = folder / name
    group = Group(max(size, 1), lambda rank: (command if size else _alone)(*TINY, "--out", run, *words), folder / f"{name}-output")
    return {"codes": group.wait(), "errors": group.errors(), "run": str(run)}


def _alone(*words):
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    command(*words)


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel


def _network(name: str, dtype: torch.dtype) -> tuple[modules.LocalNetwork, int]:
    """A network, and the side of its images: the CIFAR ResNet with the loss of this name, or one with larger auxiliary nets."""
    if name == "segmenter":
        return build("fcn_resnet20", 3, "softmax", lambdas=(1, 0.5, 0.5, 1), image_size=16).to(dtype), 16
    if name == "classifier":
        from torchvision.models.resnet import BasicBlock, ResNet

        small = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
        return build(small, cuts=["layer1", "layer2"], local_loss="softmax", lambdas=(1, 0.5, 0.5, 1), image_size=64).to(dtype), 64
    return build("resnet20", 3, name, lambdas=(1, 0.5, 0.5, 1), image_size=16).to(dtype), 16


def _train(rank: int, size: int, name: str, counts: list[int], steps: int, dtype: torch.dtype, out: Path) -> None:
    """Steps on batches of ``counts`` images, by ``size`` processes, from the same weights."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    net, side = _network(name, dtype)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # each process draws its own
    sgd = schedule.released_sgd(0.05)
    if size > 1:
        modules.convert_sync_batch_norm(net)
        trainer = ParallelTrainer(net, sgd, group=dist.group.WORLD, global_contrast=name == "contrast")
        calls = _counted_reductions()
    else:
        trainer = LocalTrainer(net, sgd)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        count = counts[step % len(counts)]
        labels = (count, side, side) if net.classifier.dense else (count,)
        image, label = torch.randn(count, 3, side, side, generator=generator).to(dtype), torch.randint(10, labels, generator=generator)
        own = part_of(0, count, rank, size)
        metrics = trainer.step(image[own], label[own], *([count] if size > 1 else []))
        losses.append({term: value.item() for term, value in metrics.items()})
    found = {"net": net.state_dict(), "losses": losses}
    if size > 1:
        parameters = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        found["calls"], found["bytes"] = calls, sum(p.numel() * p.element_size() for p in parameters)
        found["counted"] = sum(reduction.bytes for reduction in trainer.reductions)
        found["norms"] = {type(m).__name__ for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        dist.destroy_process_group()
    torch.save(found, out / f"{name}-{size}-{rank}.pt")


def _counted_reductions() -> list[int]:
    """Bytes of every all-reduce that is not waited for at once, from now on: those of gradients."""
    calls, reduce = [], dist.all_reduce

    def counted(t, *args, async_op=False, **options):
        if async_op:
            calls.append(t.numel() * t.element_size())
        return reduce(t, *args, async_op=async_op, **options)

    dist.all_reduce = counted
    return calls


def _both(folder: Path, name: str, counts: list[int], steps: int, dtype: torch.dtype = torch.float64) -> dict:
    found = {}
    for size in (1, 2):
        found[size] = Group(size, lambda rank, size=size: _train(rank, size, name, counts, steps, dtype, folder), folder)
        found[size] = {"codes": found[size].wait(), "errors": found[size].errors()}
    return found


def equal_contrast(folder: Path) -> dict:
    return _both(folder, "contrast", [128], 20)


def equal_float32(folder: Path) -> dict:
    return _both(folder, "contrast", [128], 20, torch.float32)


def equal_softmax_uneven(folder: Path) -> dict:
    return _both(folder, "softmax", [16, 7], 6)


def equal_segmenter(folder: Path) -> dict:
    return _both(folder, "segmenter", [8, 7], 3)


def equal_classifier(folder: Path) -> dict:
    return _both(folder, "classifier", [8, 7], 3)


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


def infopro_l(folder: Path) -> dict:
    """A loss that wants its module's input, by one process and by a pipeline of two."""
    small = ("--local-loss", "infopro_l", "--epochs", "1", "--warmup", "0", "--shrink", "4")
    return {"alone": tiny(folder, 0, "alone", *small), "two": tiny(folder, 2, "two", *small, "--parallel", "pipeline")}


# ---------------------------------------------------------------------------------------------------------------------
# Faults: in the 7th step of 12, in the second epoch


def _in_step(number: int, action) -> None:
    step, count = ParallelTrainer.step, 0

    def patched(self, *args):
        nonlocal count
        count += 1
        if count == number:
            action(self)
        return step(self, *args)

    ParallelTrainer.step = patched


def _kill(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(_) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _exhaust_memory(trainer) -> None:
    def forward(_):
        return torch.empty(2**50)

    trainer.net.stages[-1].forward = forward


def _stand_still(trainer) -> None:
    trainer.net.stages[0].forward = lambda _: time.sleep(1000)


def _explode(trainer) -> None:
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(torch.inf)


def _fill_disk(_) -> None:
    """No file of this process grows beyond 100 kB from now on, which a checkpoint's tensors do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def _terminate(_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


FAULTS = {
    "killed": _kill, "stopped": _stop, "stands_still": _stand_still, "out_of_memory": _exhaust_memory, "not_finite": _explode,
    "disk_full": _fill_disk, "terminated": _terminate,
}  # fmt: skip
MODES = {"data": ("--parallel", "data"), "pipeline": ("--parallel", "pipeline")}
AGAIN = {"pipeline-killed-1": 3, "pipeline-stands_still-0": 0, "data-stands_still-0": 0}  # processes that continue; 0: without torchrun


def _begin(folder: Path, mode: str, fault: str, rank: int) -> Group:
    def work(own: int) -> None:
        if own == rank:
            _in_step(7, FAULTS[fault])
        command(*TINY, "--out", folder / "run", *MODES[mode], "--patience", "4")

    return Group(2, work, folder / "output", keeper=(mode, fault, rank) != ("data", "killed", 0))


def faults(folder: Path) -> dict:
    """Every fault; how the processes ended within 30 s, and how the run looked then; then it continues, until it ends."""
    cases = [(mode, fault, rank) for mode in MODES for fault, rank in (("killed", 0), ("killed", 1), ("stopped", 1), ("stands_still", 0))]
    cases += [("data", "out_of_memory", 1), ("pipeline", "out_of_memory", 0), ("data", "not_finite", 0), ("pipeline", "not_finite", 1)]
    cases += [("data", "disk_full", 0), ("pipeline", "disk_full", 1), ("data", "terminated", 1), ("pipeline", "terminated", 0)]
    found = {"data": tiny(folder, 2, "data", *MODES["data"]), "pipeline": tiny(folder, 0, "pipeline")}
    for some in (cases[:8], cases[8:]):  # at the same time, since they mostly wait
        groups = {case: _begin(folder / "-".join(map(str, case)), *case) for case in some}
        for case, group in groups.items():
            group.wait_for_others(case[2] if case[1] == "stopped" else None, 30.0)
            ended = dict(group.codes)
            group.end()
            run = group.folder.parent / "run"
            found["-".join(map(str, case))] = {
                "codes": ended, "errors": group.errors(), "run": str(run),
                "checkpoints": [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")],
            }  # fmt: skip
        for case in some:
            name = "-".join(map(str, case))
            words = ("train", "--resume", found[name]["run"])
            size = AGAIN.get(name, 2)
            again = Group(max(size, 1), lambda own, words=words, run=command if size else _alone: run(*words), folder / name / "again")
            found[name]["again"] = {"codes": again.wait(), "errors": again.errors()}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One module after the other: 12 steps each; its outputs are 3 x 4 batches of training images and 2 of test images

MOMENTS = {
    "module1": lambda: kill_before(torch.optim.SGD, "step", 6),
    "module2": lambda: kill_before(torch.optim.SGD, "step", 18),
    "module3": lambda: kill_before(torch.optim.SGD, "step", 33),
    "trained": lambda: kill_in_write("SHA256SUMS", 5),  # after the first checkpoint and one an epoch
    "cache": lambda: kill_before(feature_cache, "_bytes", 7),
    "cache_without_its_sum": lambda: kill_before(feature_cache, "_digest", 12),
    "cache_of_tests": lambda: kill_before(feature_cache, "_digest", 14),
    "second_cache": lambda: kill_before(feature_cache, "_bytes", 14 + 6),
    "between": lambda: kill_before(sequential._Sequence, "cache", 2),
    "end": lambda: kill_before(report, "write_weights", 1),
}


def in_turn(folder: Path) -> dict:
    """The run alone, without a cache, with one of a single epoch; and killed at every moment, and continued."""
    words = ("--order", "sequential")
    found = {"never": tiny(folder, 0, "never", *words), "no_cache": tiny(folder, 0, "no_cache", *words, "--no-cache")}
    found["one_epoch"] = tiny(folder, 0, "one_epoch", *words, "--cached-epochs", "1")
    for name, prepare in MOMENTS.items():
        run = folder / name

        def killed(rank: int, prepare=prepare, run=run) -> None:
            prepare()
            _alone(*TINY, "--out", run, *words)

        first = Group(1, killed, folder / f"{name}-output")
        codes = first.wait()
        if name == "module2":
            shutil.copytree(run, folder / "damaged")
        again = Group(1, lambda rank, run=run: _alone("train", "--resume", run), folder / f"{name}-again")
        found[name] = {"codes": [*codes, *again.wait()], "errors": first.errors() + again.errors(), "run": str(run)}
    run = folder / "damaged"
    with open(run / "cache" / "module001" / "epoch0002.bin", "r+b") as file:
        file.seek(70_000)
        file.write(b"other")
    damaged = Group(1, lambda rank: _alone("train", "--resume", run), folder / "damaged-output")
    found["damaged"] = {"codes": damaged.wait(), "errors": damaged.errors()}
    shutil.rmtree(run / "cache")
    again = Group(1, lambda rank: _alone("train", "--resume", run), folder / "damaged-again")
    found["made_anew"] = {"codes": again.wait(), "errors": again.errors(), "run": str(run)}
    return found
