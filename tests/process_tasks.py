"""What the processes of `process_driver` do, a function a task; each returns what its test looks at."""

import os
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from infopro_fast import build, modules
from infopro_fast.data import part_of
from infopro_fast.trainer import LocalTrainer, checkpoint, feature_cache, run_folder, schedule, sequential
from infopro_fast.trainer.processes.reduction import CommHook, all_reduce
from infopro_fast.trainer.processes.wire import Packet, Receiver, Sender
from tests.kill_driver import kill_before, kill_in_write
from tests.process_driver import Group, command

TINY = [
    "train", "--arch", "resnet20", "--modules", "3", "--lambdas", "1", "0", "1", "1", "--epochs", "3",
    "--warmup", "1", "--batch-size", "16", "--lr", "0.05", "--log-every", "3", "--threads", "1",
]

GLOBAL = [
    "--sync-batch-norm",
    "--global-contrast",
    "--dtype",
    "float64",
]  # the same batch as in one process, but for rounding


def tiny(folder: Path, size: int, name: str, *words: object) -> dict:
    """A small run of the command line by ``size`` processes; 0: by one that torchrun did not start."""
    run = folder / name
    group = Group(
        max(size, 1),
        lambda rank: (command if size else alone)(*TINY, "--out", run, *words),
        folder / f"{name}-output",
    )
    return {"codes": group.wait(), "errors": group.errors(), "run": str(run)}


def alone(*words):
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    command(*words)


def continue_run(folder: Path, run: Path | str, size: int, *words: object) -> dict:
    """Continue a run among ``size`` processes, 0: without torchrun. words: beside --resume."""
    again = Group(
        max(size, 1), lambda own: (command if size else alone)("train", "--resume", run, *words), folder
    )
    return {"codes": again.wait(), "errors": again.errors()}


# --------------------------------------------------------------------------------------------------------
# Data parallel


def _network(name: str, dtype: torch.dtype) -> tuple[modules.LocalNetwork, int]:
    """Return a network and the side of its images: the CIFAR ResNet with this loss, or a larger one."""
    if name == "segmenter":
        return build("fcn_resnet20", 3, "softmax", lambdas=(1, 0.5, 0.5, 1), image_size=16).to(dtype), 16
    if name == "classifier":
        from torchvision.models.resnet import BasicBlock, ResNet

        small = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
        return build(
            small, cuts=["layer1", "layer2"], local_loss="softmax", lambdas=(1, 0.5, 0.5, 1), image_size=64
        ).to(dtype), 64
    return build("resnet20", 3, name, lambdas=(1, 0.5, 0.5, 1), image_size=16).to(dtype), 16


def _train(
    rank: int, size: int, name: str, counts: list[int], steps: int, dtype: torch.dtype, out: Path
) -> None:
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
        calls = []
        hook = _counting(lambda flat: calls.append(flat.numel() * flat.element_size()))
        trainer = LocalTrainer(
            net, sgd, group=dist.group.WORLD, global_contrast=name == "contrast", comm_hook=hook
        )
    else:
        trainer = LocalTrainer(net, sgd)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        count = counts[step % len(counts)]
        labels = (count, side, side) if net.classifier.dense else (count,)
        image, label = (
            torch.randn(count, 3, side, side, generator=generator).to(dtype),
            torch.randint(10, labels, generator=generator),
        )
        own = part_of(0, count, rank, size)
        metrics = trainer.step(image[own], label[own], *([count] if size > 1 else []))
        losses.append({term: value.item() for term, value in metrics.items()})
    found = {"net": net.state_dict(), "losses": losses}
    if size > 1:
        parameters = [
            p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        found["calls"], found["bytes"] = calls, sum(p.numel() * p.element_size() for p in parameters)
        found["counted"] = sum(reduction.bytes for reduction in trainer.reductions)
        found["norms"] = {
            type(m).__name__ for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
        }
        dist.destroy_process_group()
    torch.save(found, out / f"{name}-{size}-{rank}.pt")


def _counting(count) -> CommHook:
    """A communication hook that reduces as usual, and shows what it is given before."""

    def hook(flat: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
        count(flat)
        return all_reduce(flat, group)

    return hook


class _Collectives(TorchDispatchMode):
    """Every collective that torch starts, by its operator: bytes of what it is given."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append((func.__name__, sum(t.numel() * t.element_size() for t in args[0])))
        return func(*args, **(kwargs or {}))


def _tiny_trainer(hook: CommHook, accumulate: int = 1) -> tuple[LocalTrainer, torch.Tensor, torch.Tensor]:
    """Return a trainer of three modules, and a batch."""
    torch.manual_seed(0)
    net = build("resnet20", 3, "softmax", lambdas=(1, 0.5, 0.5, 1), image_size=16)
    trainer = LocalTrainer(
        net, schedule.released_sgd(0.05), group=dist.group.WORLD, comm_hook=hook, accumulate=accumulate
    )
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    return (
        trainer,
        torch.randn(8, 3, 16, 16, generator=generator),
        torch.randint(10, (8,), generator=generator),
    )


def _reduce_counted(accumulate: int, out: Path) -> None:
    """Two steps: what the hook was given, gradient by gradient, and the collectives that there were."""
    dist.init_process_group("gloo")
    reduced: dict[
        str, int
    ] = {}  # how often each gradient was given to the hook, as its last backward left it
    unknown = []

    def count(flat: torch.Tensor) -> None:
        for optimizer in trainer.optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in gradients]
            if own and torch.equal(flat, torch.cat([_in_memory_order(p, gradients[id(p)]) for p in own])):
                for p in own:
                    reduced[names[id(p)]] = reduced.get(names[id(p)], 0) + 1
                return
        unknown.append(flat.numel())

    trainer, image, label = _tiny_trainer(_counting(count), accumulate)
    names, gradients = {id(p): name for name, p in trainer.net.named_parameters()}, {}
    for p in trainer.net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: gradients.__setitem__(id(p), p.grad.clone()))
    with _Collectives() as collectives:
        for _ in range(2):
            trainer.step(image, label)
    trained = {
        names[id(p)]: p.numel() * p.element_size()
        for o in trainer.optimizers
        for group in o.param_groups
        for p in group["params"]
    }
    found = {"reduced": reduced, "unknown": unknown, "collectives": collectives.calls, "trained": trained}
    torch.save(found, out / f"reduced-{accumulate}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def _in_memory_order(p: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's elements in the order that its parameter's have in memory."""
    channels_last = (
        p.dim() == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
    )
    return (gradient.permute(0, 2, 3, 1) if channels_last else gradient).flatten()


class _Withheld:
    """A reduction that starts when ``begun`` is set; it waits up to a minute, which stands for ever."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup, begun: threading.Event, waited):
        self.flat, self.group, self.begun, self.waited = flat, group, begun, waited
        self.in_time = False
        self._thread = threading.Thread(target=self._reduce)
        self._thread.start()

    def _reduce(self) -> None:
        self.in_time = self.begun.wait(60)
        dist.all_reduce(self.flat, group=self.group)

    def wait(self) -> None:
        self.waited()
        self._thread.join()


def _overlap(out: Path) -> None:
    """A step whose reductions wait for the next module's forward, and a usual one: events and weights."""
    dist.init_process_group("gloo")
    events, works, begun = [], [], [threading.Event() for _ in range(4)]

    def withhold(flat: torch.Tensor, group: dist.ProcessGroup) -> _Withheld:
        k = len(works)
        events.append(f"reduce {k + 1}")
        if k == 2:  # nothing is behind it
            begun[3].set()
        works.append(_Withheld(flat, group, begun[k + 1], lambda: events.append(f"wait {k + 1}")))
        return works[-1]

    nets = []
    for hook in (withhold, all_reduce):
        trainer, image, label = _tiny_trainer(hook)
        if hook is withhold:
            for k, stage in enumerate(trainer.net.stages):
                stage.register_forward_pre_hook(
                    lambda *_, k=k: (events.append(f"forward {k + 1}"), begun[k].set()) and None
                )
        trainer.step(image, label)
        nets.append(trainer.net.state_dict())
    found = {"events": events, "in_time": [work.in_time for work in works], "nets": nets}
    torch.save(found, out / f"overlap-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def reductions(folder: Path) -> dict:
    """Each in processes of its own: a group is not joined twice."""
    works = (
        lambda rank: _reduce_counted(1, folder),
        lambda rank: _reduce_counted(2, folder),
        lambda rank: _overlap(folder),
    )
    groups = [Group(2, work, folder / str(i)) for i, work in enumerate(works)]
    return {
        "codes": [code for group in groups for code in group.wait()],
        "errors": [text for group in groups for text in group.errors()],
    }


def _both(folder: Path, name: str, counts: list[int], steps: int, dtype: torch.dtype = torch.float64) -> dict:
    found = {}
    for size in (1, 2):
        found[size] = Group(
            size, lambda rank, size=size: _train(rank, size, name, counts, steps, dtype, folder), folder
        )
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


# --------------------------------------------------------------------------------------------------------
# Pipeline


def runs(folder: Path) -> dict:
    """The same run by one process, pipelines of 2, 3 and 4, by 2 x 2, and by 2 that share the batches."""
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
    return {
        "alone": tiny(folder, 0, "alone", *small),
        "two": tiny(folder, 2, "two", *small, "--parallel", "pipeline"),
    }


IN_FLIGHT = (1, 3)
BATCHES_SENT = 12


def _send_ahead(in_flight: int, out: Path) -> None:
    """One process sends as fast as it may; the other holds each batch until the sender can go no further."""
    dist.init_process_group("gloo")
    store = dist.PrefixStore(str(in_flight), dist.distributed_c10d._get_default_store())
    if dist.get_rank() == 0:
        sender, most = Sender(1, in_flight, None), 0
        sender.begin()
        for number in range(BATCHES_SENT):
            features = torch.full((4, 8, 32, 32), float(number))
            sender.send(Packet(features, None, torch.zeros(4, dtype=torch.int64)))
            most = max(most, len(sender.flying))
            store.set("sent", str(number + 1))
        sender.flush()
        found = {"kept": most, "bytes": sender.bytes}
    else:
        expected = (
            1 + 2 * in_flight
        )  # the batch that is held; those that were asked for, and have come; those that have not
        ahead, values = [], []
        for number, packet in enumerate(
            Receiver(0, in_flight, torch.device("cpu")).receive([4] * BATCHES_SENT)
        ):
            values.append(packet.features.mean().item())
            end = time.monotonic() + 60
            while (
                int(store.get("sent")) - number < min(expected, BATCHES_SENT - number)
                and time.monotonic() < end
            ):
                time.sleep(0.01)
            time.sleep(0.3)  # time for it to go further than it may
            ahead.append(int(store.get("sent")) - number)
        found = {"ahead": ahead, "values": values}
    torch.save(found, out / f"ahead-{in_flight}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def back_pressure(folder: Path) -> dict:
    found = {}
    for in_flight in IN_FLIGHT:
        group = Group(2, lambda rank, in_flight=in_flight: _send_ahead(in_flight, folder), folder)
        found[in_flight] = {"codes": group.wait(), "errors": group.errors()}
    return found


# --------------------------------------------------------------------------------------------------------
# A run that ended after its second epoch, continued by other processes

SHARED = ("--sync-batch-norm", "--global-contrast")
OTHERS = {  # name: (the run, processes, what is given with --resume)
    "one_by_pipeline": ("one", 2, ("--parallel", "pipeline")),
    "one_by_pipelines": ("one", 4, ("--parallel", "pipeline", "--pipeline-modules", "1", "2", *SHARED)),
    "one_by_data": ("one", 2, ("--parallel", "data", *SHARED)),
    "pipeline_by_data": ("pipeline", 2, ("--parallel", "data", *SHARED)),
    "pipeline_by_one": ("pipeline", 0, ("--parallel", "none")),
    "pipeline_by_three": ("pipeline", 3, ()),
    "data_by_pipeline": ("data", 2, ("--parallel", "pipeline", "--wire", "exact")),
    "data_by_one": ("data", 0, ("--parallel=none",)),
    "data_by_three": ("data", 3, ()),
}
REFUSED = {
    "one_by_data": ("one", 2, ("--parallel", "data")),
    "one_by_two": ("one", 2, ()),
    "parts_by_pipeline": ("parts", 2, ("--parallel", "pipeline")),
    "in_turn_by_pipeline": ("in_turn", 2, ("--parallel", "pipeline")),
    "in_turn_by_two": ("in_turn", 2, ()),
}


def others(folder: Path) -> dict:
    """Every pair of OTHERS and REFUSED, from runs that are equal to rounding, and in float64."""
    wide = ("--dtype", "float64")
    found = {
        "one": tiny(folder, 0, "one", *wide), "pipeline": tiny(folder, 2, "pipeline", *wide, "--parallel",
        "pipeline", "--in-flight", "3"), "data": tiny(folder, 2, "data", *wide, "--parallel", "data",
        *SHARED), "parts": tiny(folder, 2, "parts", "--parallel", "data"), "in_turn": tiny(folder, 0,
        "in_turn", "--order", "sequential", "--epochs", "1", "--warmup", "0"),
    }
    for kind, cases in (("others", OTHERS), ("refused", REFUSED)):
        for name, (source, size, words) in cases.items():
            run = folder / kind / name
            shutil.copytree(folder / source, run)
            shutil.rmtree(run / "checkpoints" / checkpoint.name_of(3, 0), ignore_errors=True)
            (run / run_folder.WEIGHTS).unlink()
            found[f"{kind}/{name}"] = {
                **continue_run(folder / f"{kind}-{name}-output", run, size, *words),
                "run": str(run),
            }
            found[f"{kind}/{name}"]["parallel"] = run_folder.read_config(run).parallel
    return found


# --------------------------------------------------------------------------------------------------------
# One module after the other: 12 steps each; its outputs are 3 x 4 batches of training images and 2 of test
# images

MOMENTS = {
    "module1": lambda: kill_before(torch.optim.SGD, "step", 6),
    "module2": lambda: kill_before(torch.optim.SGD, "step", 18),
    "module3": lambda: kill_before(torch.optim.SGD, "step", 33),
    "trained": lambda: kill_in_write("SHA256SUMS", 5),  # after the first checkpoint and one an epoch
    "cache": lambda: kill_before(feature_cache, "to_bytes", 7),
    "cache_without_its_sum": lambda: kill_before(feature_cache, "digest", 12),
    "cache_of_tests": lambda: kill_before(feature_cache, "digest", 14),
    "second_cache": lambda: kill_before(feature_cache, "to_bytes", 14 + 6),
    "between": lambda: kill_before(sequential.Sequence, "cached", 2),
    "end": lambda: kill_before(run_folder, "write_weights", 1),
}


AGAIN_KILLED = {  # what is continued, and killed again
    "module3": lambda: kill_before(torch.optim.SGD, "step", 3),  # in the module that it was killed in
    "module2": lambda: kill_before(feature_cache, "to_bytes", 5),  # in the cache that comes after it
    "second_cache": lambda: kill_before(feature_cache, "digest", 2),  # in the same cache
}


def in_turn(folder: Path) -> dict:
    """The run alone, without a cache, with one of an epoch; and killed at each moment, and continued."""
    words = ("--order", "sequential")
    found = {
        "never": tiny(folder, 0, "never", *words),
        "no_cache": tiny(folder, 0, "no_cache", *words, "--no-cache"),
    }
    found["one_epoch"] = tiny(folder, 0, "one_epoch", *words, "--cached-epochs", "1")
    for name, prepare in MOMENTS.items():
        run = folder / name

        def killed(rank: int, prepare=prepare, run=run) -> None:
            prepare()
            alone(*TINY, "--out", run, *words)

        first = Group(1, killed, folder / f"{name}-output")
        codes = first.wait()
        if name == "module2":
            shutil.copytree(run, folder / "damaged")
        errors = first.errors()
        if name in AGAIN_KILLED:

            def killed_again(rank: int, prepare=AGAIN_KILLED[name], run=run) -> None:
                prepare()
                alone("train", "--resume", run)

            second = Group(1, killed_again, folder / f"{name}-second")
            codes, errors = [*codes, *second.wait()], errors + second.errors()
        again = continue_run(folder / f"{name}-again", run, 0)
        found[name] = {
            "codes": [*codes, *again["codes"]],
            "errors": errors + again["errors"],
            "run": str(run),
        }
    run = folder / "damaged"
    with open(run / "cache" / "module001" / "epoch0002.bin", "r+b") as file:
        file.seek(70_000)
        file.write(b"other")
    found["damaged"] = continue_run(folder / "damaged-output", run, 0)
    shutil.rmtree(run / "cache")
    found["made_anew"] = {**continue_run(folder / "damaged-again", run, 0), "run": str(run)}
    return found
