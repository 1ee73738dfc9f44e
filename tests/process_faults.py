"""Tasks of `process_driver` about faults: processes that are killed, fail or stand still, and full disks."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from infopro_fast import modules, whole_files
from infopro_fast.data import folder_set
from infopro_fast.trainer import LocalTrainer, checkpoint, feature_cache
from infopro_fast.trainer.processes import watch
from tests.kill_driver import nth
from tests.process_driver import Group, command, fork
from tests.process_tasks import TINY, alone, continue_run, tiny

# --------------------------------------------------------------------------------------------------------
# Faults: in the 7th step of 12, in the second epoch


def in_step(number: int, action) -> None:
    step, count = LocalTrainer.step_from, 0

    def patched(self, *batch):
        nonlocal count
        count += 1
        if count == number:
            action(self)
        return step(self, *batch)

    LocalTrainer.step_from = patched


def _saved(run: Path) -> bool:
    """Wait for the first epoch's checkpoint: a pipeline's first process may be ahead of the writer."""
    while not (run / "checkpoints" / checkpoint.name_of(1, 0)).is_dir():
        time.sleep(0.01)
    return True


def kill(_) -> None:
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
    "killed": kill, "stopped": _stop, "stands_still": _stand_still, "out_of_memory": _exhaust_memory,
    "not_finite": _explode, "disk_full": _fill_disk, "terminated": _terminate,
}
MODES = {
    "data": ("--parallel", "data"), "pipeline": ("--parallel", "pipeline"), "three": ("--parallel",
    "pipeline"), "mixed": ("--parallel", "pipeline", "--pipeline-modules", "1", "2"),
}
SIZES = {"three": 3, "mixed": 4}  # processes, where there are more than two
AGAIN = {
    "pipeline-killed-1": 3,
    "pipeline-stands_still-0": 0,
    "data-stands_still-0": 0,
}  # processes that continue; 0: without torchrun


def _begin(folder: Path, mode: str, fault: str, rank: int) -> Group:
    def work(own: int) -> None:
        if own == rank:
            in_step(7, lambda trainer: _saved(folder / "run") and FAULTS[fault](trainer))
        command(*TINY, "--out", folder / "run", *MODES[mode], "--patience", "4")

    return Group(
        SIZES.get(mode, 2), work, folder / "output", keeper=(mode, fault, rank) != ("data", "killed", 0)
    )


def _fail_and_continue(folder: Path, cases: list[tuple[str, str, int]]) -> dict:
    """All faults at once, since they mostly wait: processes and run after 30 s; then the run continues."""
    found, groups = {}, {case: _begin(folder / "-".join(map(str, case)), *case) for case in cases}
    for case, group in groups.items():
        group.wait_for_others(case[2] if case[1] == "stopped" else None, 30.0)
        ended = dict(group.codes)
        group.end()
        run = group.folder.parent / "run"
        found["-".join(map(str, case))] = {
            "codes": ended, "errors": group.errors(), "run": str(run),
            "checkpoints": [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")],
        }
    for name, one in found.items():
        one["again"] = continue_run(
            folder / name / "again", one["run"], AGAIN.get(name, SIZES.get(name.partition("-")[0], 2))
        )
    return found


def faults(folder: Path) -> dict:
    """Every fault of runs of two processes."""
    first = (("killed", 0), ("killed", 1), ("stopped", 1), ("stands_still", 0))
    cases = [(mode, fault, rank) for mode in ("data", "pipeline") for fault, rank in first]
    cases += [
        ("data", "out_of_memory", 1),
        ("pipeline", "out_of_memory", 0),
        ("data", "not_finite", 0),
        ("pipeline", "not_finite", 1),
    ]
    cases += [
        ("data", "disk_full", 0),
        ("pipeline", "disk_full", 1),
        ("data", "terminated", 1),
        ("pipeline", "terminated", 0),
    ]
    found = {"data": tiny(folder, 2, "data", *MODES["data"]), "pipeline": tiny(folder, 0, "pipeline")}
    return found | _fail_and_continue(folder, cases[:8]) | _fail_and_continue(folder, cases[8:])


def kills(folder: Path) -> dict:
    """Each process of larger layouts is killed in turn."""
    found = {"three": tiny(folder, 0, "three"), "mixed": tiny(folder, 4, "mixed", *MODES["mixed"])}
    for mode in ("three", "mixed"):
        found |= _fail_and_continue(folder, [(mode, "killed", rank) for rank in range(SIZES[mode])])
    return found


# --------------------------------------------------------------------------------------------------------
# A disk that is full: a small one of memory, in mounts of this driver's own (`unshare --mount`)

FULL = {  # run, processes, who writes
    "alone": ((), 0, 0), "data": (MODES["data"], 2, 0), "pipeline": (MODES["pipeline"], 2, 1),
    "cache": (("--order", "sequential"), 0, 0),
}
ROOM = 300_000  # bytes that are left on it: less than a checkpoint or a file of the cache has


def _fill(disk: Path) -> None:
    there = os.statvfs(disk)
    with open(disk / "of_others", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - ROOM)


def full_disk(folder: Path) -> dict:
    """The disk fills up in the second epoch, or before a cache; with room again, the run continues."""
    found = {
        "data-undisturbed": tiny(folder, 2, "data-undisturbed", *MODES["data"]), "undisturbed": tiny(folder,
        0, "undisturbed"), "cache-undisturbed": tiny(folder, 0, "cache-undisturbed", *FULL["cache"][0]),
    }
    for mode, (words, size, writer) in FULL.items():
        disk = folder / f"disk-{mode}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)

        def work(own: int, mode=mode, disk=disk, words=words, size=size, writer=writer) -> None:
            if own == writer and mode == "cache":
                reserve = feature_cache.CacheFile.reserve
                feature_cache.CacheFile.reserve = nth(reserve, 1, lambda file: (_fill(disk), reserve(file)))
            elif own == writer:
                in_step(7, lambda _: _fill(disk))
            (command if size else alone)(*TINY, "--out", disk / "run", *words)

        group = Group(max(size, 1), work, folder / f"{mode}-output")
        found[mode] = {
            "codes": group.wait(),
            "errors": group.errors(),
            "run": str(disk / "run"),
            "kept": str(folder / mode),
        }
        found[mode]["checkpoints"] = [
            path.name for path in checkpoint.list_checkpoints(disk / "run" / "checkpoints")
        ]
        found[mode]["trained"] = [path.name for path in (disk / "run").glob("trained/*")]
        found[mode]["aside"] = [path.name for path in (disk / "run").rglob(whole_files.ASIDE + "*")]
        (disk / "of_others").unlink()
        found[mode]["again"] = continue_run(folder / f"{mode}-again", disk / "run", size)
        shutil.copytree(disk / "run", folder / mode)  # these mounts end with this driver
    return found


# --------------------------------------------------------------------------------------------------------
# Processes that stand still outside the modules, from the second epoch on; and one that is slow everywhere,
# and moves

PATIENCE, SLOW_PATIENCE = 4, 6


def _for_ever(mark: Path) -> None:
    mark.touch()
    time.sleep(1000)


def _stop_reader(mark: Path) -> None:
    """A worker process of this one is stopped at its 5th image."""
    read, count = folder_set.Samples.__getitem__, 0

    def patched(self, index):
        nonlocal count
        count += 1
        if count == 5:
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(self, index)

    folder_set.Samples.__getitem__ = patched  # workers are forked from here, one an epoch


def _stop_evaluation(mark: Path) -> None:
    def patched(trainer) -> None:
        last = trainer.net.stages[-1]
        forward = last.forward
        last.forward = lambda h: forward(h) if last.training else _for_ever(mark)

    in_step(7, patched)


def _stop_disk(mark: Path) -> None:
    in_step(7, lambda trainer: setattr(os, "fsync", lambda descriptor: _for_ever(mark)))


def _stop_reader_of_output(mark: Path) -> None:
    """Standard output is a pipe that is full."""

    def patched(_) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, bytes(4096))
        os.set_blocking(write, True)
        os.dup2(write, 1)
        mark.touch()

    in_step(7, patched)


def _stop_cache(mark: Path) -> None:
    digest, count = feature_cache.digest, 0

    def patched(content):
        nonlocal count
        count += 1
        return digest(content) if count < 7 else _for_ever(mark)

    feature_cache.digest = patched


STALLS = {  # what stands still: where, in which process of how many, and the run
    "reader": (_stop_reader, 1, 2, ("--parallel", "data")),
    "evaluation": (_stop_evaluation, 0, 2, ("--parallel", "data")),
    "evaluation_of_first_stage": (_stop_evaluation, 0, 2, ("--parallel", "pipeline")),
    "disk": (_stop_disk, 0, 2, ("--parallel", "data")),
    "disk_of_last_stage": (_stop_disk, 1, 2, ("--parallel", "pipeline")),
    "output": (_stop_reader_of_output, 1, 2, ("--parallel", "pipeline")),
    "cache": (_stop_cache, 0, 0, ("--order", "sequential")),
}
DEFAULT_PATIENCE = "evaluation"  # the others' is shorter


def _image_files(root: Path) -> tuple[str, ...]:
    """ImageNet's layout with 12 training and 10 test images; the settings of a small run on it."""
    from PIL import Image

    for part, count in (("train", 6), ("val", 5)):
        for name in ("n01440764", "n01443537"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (i, 2 * i, 3 * i)).save(root / part / name / f"{name}_{i}.JPEG")
    return (
        "--dataset", "imagenet", "--data-root", str(root), "--arch", "resnet18", "--crop", "32", "32",
        "--modules", "2", "--lambdas", "1", "0", "1", "1", "--epochs", "1", "--batch-size", "6", "--lr",
        "0.05", "--log-every", "1", "--threads", "1", "--workers", "1",
    )


def _slow() -> None:
    """A batch, an evaluation and a checkpoint take longer than the patience; none of their pieces does."""

    def slowly(function, share: float):
        def wrapped(*args):
            time.sleep(share * SLOW_PATIENCE)
            return function(*args)

        return wrapped

    folder_set.Samples.__getitem__ = slowly(folder_set.Samples.__getitem__, 0.35)
    modules.LocalNetwork.forward = slowly(modules.LocalNetwork.forward, 0.6)
    os.fsync = slowly(os.fsync, 0.2)


def _begin_stall(folder: Path, name: str, images: tuple[str, ...]) -> Group:
    stop, rank, size, words = STALLS[name]

    def work(own: int) -> None:
        if own == rank:
            stop(folder / "stalled")
        patience = () if name == DEFAULT_PATIENCE else ("--patience", PATIENCE)
        settings = ("train", *images) if name == "reader" else TINY
        (command if size else alone)(*settings, "--out", folder / "run", *words, *patience)

    return Group(max(size, 1), work, folder / "output")


def starved(folder: Path) -> dict:
    """A process that gets hardly any CPU, and then stalls, with a patience of a second."""

    def work(_: int) -> None:
        cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpu})
        other = fork(_compute_for_ever)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        watch.TICK = 0.25
        ended: list[str] = []
        watch.end_process = ended.append
        one = watch.Watch(dist.HashStore(), 0, 1, "this process", lambda: "", 1.0)
        one.start()
        one.at("in a step")
        t, end = torch.randn(200, 200), time.monotonic() + 8
        while time.monotonic() < end and not ended:
            t = (t @ t).clamp(-1, 1)
        found = {"while_starved": list(ended)}
        one.at("in another step")
        while time.monotonic() < end + 60 and not ended:
            time.sleep(0.1)
        found["while_standing"] = list(ended)
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        (folder / "found.json").write_text(json.dumps(found))
        os._exit(0)

    group = Group(1, work, folder)
    return {"codes": group.wait(), "errors": group.errors()} | json.loads((folder / "found.json").read_text())


def _compute_for_ever() -> None:
    while True:
        pass


def stalls(folder: Path) -> dict:
    """All stalls at once, since they mostly wait: exit codes, messages, and seconds until they came."""
    images = _image_files(folder / "images")
    groups = {name: _begin_stall(folder / name, name, images) for name in STALLS}

    def slow(_: int) -> None:
        _slow()
        command(
            "train",
            *images,
            "--out",
            folder / "slow" / "run",
            "--parallel",
            "data",
            "--patience",
            SLOW_PATIENCE,
        )

    groups["slow"] = Group(2, slow, folder / "slow" / "output")
    found = {}
    for name, group in groups.items():
        codes, errors, mark = group.wait(), group.errors(), folder / name / "stalled"
        said = max((group.folder / f"err{rank}").stat().st_mtime for rank in range(len(group.pids)))
        found[name] = {"codes": codes, "errors": errors, "run": str(folder / name / "run")}
        found[name]["seconds"] = said - mark.stat().st_mtime if mark.exists() else None
    for name in ("disk_of_last_stage", "cache"):
        size = STALLS[name][2]
        found[name]["again"] = continue_run(folder / name / "again", found[name]["run"], size)
    return found
