"""What `infopro-fast scale` predicts against runs of two and of four processes on this machine.

    python -m benchmarks.scale_validation    writes benchmarks/results/scale_validation.json, prints a table

ResNet-32, K = 4, batch 64 a replica, the images of the package, a thread a process, gloo. A core stands for a
GPU of the model, whose timelines (`memory.scale`) are tested. What a core does differently from a GPU is
measured or counted:

- Modules are timed where they are trained. A process on every core takes steps as `infopro-fast train` does,
  all at once, since cores share caches and memory. (The cuts come from blocks timed one by one.) Medians over
  the steps, the mean over the cores.
- A core copies by itself: a message, at the speed measured between two processes, keeps both of its ends from
  computing.
- Four processes on two cores do not each have half of one: while one waits, others work. So a batch takes
  what its slowest process alone would need, or the work of all of them over the cores, whichever is more.

Runs are `infopro-fast train` under torchrun with the cuts and stages of the prediction. Their speed is that
of the steps from a quarter to seven eighths of the way: no first step, no pipeline that fills or drains. A
machine's speed drifts by more than the model is wrong, so modules are timed again before every round of all
layouts. Medians over the rounds count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from infopro_fast import build, data, figure
from infopro_fast.memory import scale
from infopro_fast.trainer import run_folder, schedule
from infopro_fast.trainer.step import LocalTrainer

from .device import provenance

RESULT = Path(__file__).parent / "results" / "scale_validation.json"
ARCH, MODULES, BATCH = "resnet32", 4, 64
BAR = 0.2  # share of the prediction
TIMED, UNTIMED = 8, 2  # steps, and those before them


@dataclasses.dataclass(frozen=True)
class Layout:
    """name: as in `scale.LAYOUTS`. pipeline: modules of every stage, empty for data parallelism."""

    name: str
    processes: int
    pipeline: tuple[int, ...] = ()

    @property
    def replicas(self) -> int:
        return self.processes // max(1, len(self.pipeline))

    @property
    def steps(self) -> int:
        """Steps of a run, which takes some ten seconds."""
        return 16 if self.replicas > 1 else 32

    def words(self) -> list[str]:
        if not self.pipeline:
            return ["--parallel", "data"]
        return ["--parallel", "pipeline", "--pipeline-modules", *map(str, self.pipeline)]


def layouts(net: scale.Network) -> list[Layout]:
    halves = tuple(len(run) for run in scale.stages_of(net.local, 2))
    of_two = [Layout("data", 2), Layout("pipeline", 2, halves)]
    return [*of_two, Layout("data", 4), Layout("pipeline", 4, (1,) * MODULES), Layout("mixed", 4, halves)]


# ------------------------------------------------------------------------------------------------------------
# Predicted


def predicted(layout: Layout, net: scale.Network, link: scale.Link, cores: int) -> float:
    """Predict the images a second of ``layout`` on so many cores."""
    works = copying(layout, net, link)
    cluster = scale.Cluster(cores, link, link)
    if layout.pipeline:
        seconds = scale.pipeline_seconds(runs_of(layout, works), net.carried, layout.replicas, cluster)
    else:
        seconds = scale.local_step_seconds(works, layout.processes, link)
    if layout.processes > cores:
        seconds = max(seconds, layout.replicas * sum(work.seconds for work in works) / cores)
    return layout.replicas * net.batch_size / seconds


def runs_of(layout: Layout, works: Sequence[scale.Work]) -> list[Sequence[scale.Work]]:
    """Return the modules of each stage."""
    ends = [sum(layout.pipeline[: i + 1]) for i in range(len(layout.pipeline))]
    return [works[end - count : end] for end, count in zip(ends, layout.pipeline)]


def copying(layout: Layout, net: scale.Network, link: scale.Link) -> list[scale.Work]:
    """Add to each module the time of its messages: gradients to other replicas, features to other stages."""
    seconds = [work.seconds + link.all_reduce(work.gradients, layout.replicas) for work in net.local]
    for end in (sum(layout.pipeline[: i + 1]) - 1 for i in range(len(layout.pipeline) - 1)):
        message = link.send(net.local[end].output + net.carried)
        seconds[end], seconds[end + 1] = seconds[end] + message, seconds[end + 1] + message
    return [dataclasses.replace(work, seconds=own) for work, own in zip(net.local, seconds)]


# ------------------------------------------------------------------------------------------------------------
# Measured: modules, the link


def measured(batch_size: int) -> scale.Network:
    """Return the network with the cuts that balance its modules, by the times of its blocks."""
    with _alone(1) as pool:
        return pool.apply(_chain, (batch_size,))


def _chain(batch_size: int) -> scale.Network:
    torch.set_num_threads(1)
    return scale.measure(ARCH, MODULES, batch_size)


def timed(net: scale.Network, cores: int) -> scale.Network:
    """Return ``net`` with its modules' seconds in training, every core training at the same time."""
    with _alone(cores) as pool:
        found = pool.map(_module_seconds, [net] * cores, chunksize=1)
    each = [statistics.mean(seconds) for seconds in zip(*found)]
    local = (dataclasses.replace(work, seconds=own) for work, own in zip(net.local, each))
    return dataclasses.replace(net, local=tuple(local))


def _alone(processes: int):
    """Return a pool of processes that begin together and import everything anew."""
    context = multiprocessing.get_context("spawn")
    return context.Pool(processes, _meet_here, (context.Barrier(processes),))


def _meet_here(barrier) -> None:
    global _barrier
    _barrier = barrier


def _module_seconds(net: scale.Network) -> list[float]:
    """Return median seconds of every module in a step of one process; the first one's include the batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, marks, rows = data.load("fashion_mnist"), [], []
    local = build(ARCH, MODULES, cuts=net.cuts, image_mean=images.mean, image_std=images.std)
    trainer = LocalTrainer(local, schedule.released_sgd(0.1), at=lambda *_: marks.append(time.perf_counter()))
    batches = images.train_epoch(net.batch_size, seed=0, epoch=0)
    _barrier.wait(300)
    for _ in range(UNTIMED + TIMED):
        marks.append(time.perf_counter())
        image, label = next(batches)
        trainer.step(image, label)
        begun, _, *others = marks  # the first module's own mark comes after its batch is made
        ends = [*others, time.perf_counter()]
        rows.append([after - before for before, after in zip([begun, *others], ends)])
        marks.clear()
    return [statistics.median(column) for column in zip(*rows[UNTIMED:])]


def _exchange(rank: int, port: int, answer) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    seconds = {}
    for count in (1, 2**22):
        t = torch.zeros(count, dtype=torch.float64)
        taken = []
        for _ in range(30):
            dist.barrier()
            start = time.perf_counter()
            for turn in range(2):  # there and back
                (dist.send if rank == turn else dist.recv)(t, 1 - rank)
            taken.append((time.perf_counter() - start) / 2)
        seconds[t.nbytes] = statistics.median(taken)
    if rank == 0:
        answer.put(seconds)
    dist.destroy_process_group()


def measured_link() -> scale.Link:
    """Measure the link between two processes of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    processes = [context.Process(target=_exchange, args=(rank, port, answer)) for rank in range(2)]
    for process in processes:
        process.start()
    (_, latency), (count, seconds) = sorted(answer.get(timeout=120).items())
    for process in processes:
        process.join()
    return scale.Link(count / (seconds - latency), latency)


# ------------------------------------------------------------------------------------------------------------
# Run


def run(layout: Layout, net: scale.Network) -> float:
    """Return the images a second of a run of ``layout``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        case = dict(steps=layout.steps, batch_size=layout.replicas * net.batch_size)
        return train(net, layout.processes, layout.words(), out, **case)


def train(
    net: scale.Network, processes: int, words: list[str], out: Path, *, steps: int, batch_size: int
) -> float:
    """Return the images a second of a run with the cuts of ``net``, a thread a process.

    They are taken from the step at a quarter of ``steps`` (a multiple of 8) to the one at seven eighths.
    """
    torchrun = []
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [
        sys.executable, "-m", *torchrun, "infopro_fast", "train", "--arch", ARCH, "--modules", str(MODULES),
        "--cuts", *(str(number) for cut in net.cuts for number in cut), "--batch-size", str(batch_size),
        "--iterations", str(steps), "--hold-out", "64", "--log-every", str(steps // 8), "--threads", "1",
        "--warmup", "0", "--out", str(out), *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    at = {record["batch"]: record["seconds"] for record in run_folder.read_metrics(out, "step")}
    first, last = steps // 4, 7 * steps // 8
    return (last - first) * batch_size / (at[last] - at[first])


def one_round(number: int, net: scale.Network, link: scale.Link) -> list[dict]:
    """Predict every layout from times measured just before, and run it."""
    cores, rows = os.cpu_count(), []
    now = timed(net, cores)
    for layout in layouts(net):
        expected, got = predicted(layout, now, link, cores), run(layout, net)
        row = {"round": number, "layout": layout.name, "processes": layout.processes}
        rows.append(row | {"predicted": expected, "measured": got})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    net, link = measured(BATCH), measured_link()
    rows = [row for number in range(options.rounds) for row in one_round(number, net, link)]
    about = {**provenance(), "threads": 1, "batch_size": BATCH, "cuts": net.cuts}
    content = {**about, "link": dataclasses.asdict(link), "layouts": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    head = ["layout", "processes", "predicted, images/s", "measured", "measured / predicted", "of"]
    head.append(f"within {BAR:.0%}")
    print(figure.aligned([head, *map(_row, _by_layout(rows))]))


def _by_layout(rows: list[dict]) -> list[list[dict]]:
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["layout"], row["processes"]), []).append(row)
    return list(found.values())


def _row(same: list[dict]) -> list[str]:
    """Return the medians of a layout's rounds, and the least and largest ratio."""
    ratios = [row["measured"] / row["predicted"] for row in same]
    ratio = statistics.median(ratios)
    holds = "yes" if abs(ratio - 1) <= BAR else "NO"
    names = ("predicted", "measured")
    predicted, got = (f"{statistics.median(row[name] for row in same):.0f}" for name in names)
    name, processes = same[0]["layout"], str(same[0]["processes"])
    return [name, processes, predicted, got, f"{ratio:.3g}", f"{min(ratios):.3g} to {max(ratios):.3g}", holds]


if __name__ == "__main__":
    main()
