"""What `infopro-fast scale` predicts against what runs of two and of four processes on this machine do.

    python -m benchmarks.scale_validation            writes benchmarks/results/scale_validation.json and prints a table

ResNet-32, K = 4, batch 128 a replica, the images of the package, a thread a process, gloo. A core is a GPU of the model. Modules are timed
on every core at once, since cores share caches and memory as GPUs do not; processes beyond the cores each have their share of one. The
link is measured between two processes. Runs are `infopro-fast train` under torchrun with the cuts that were predicted for, one epoch:
images a second of the whole of it, its first step and the filling of a pipeline among them, no evaluation. A machine's speed drifts by more
than the model is wrong, so a layout runs right after the times it is predicted from were measured, three times over: medians count.
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
from pathlib import Path

import torch
import torch.distributed as dist

from infopro_fast.memory import figures, scale
from infopro_fast.trainer import report

from .device import provenance

RESULT = Path(__file__).parent / "results" / "scale_validation.json"
ARCH, MODULES, BATCH = "resnet32", 4, 128
LAYOUTS = 5
BAR = 0.2  # of the prediction


@dataclasses.dataclass(frozen=True)
class Layout:
    """name: in `scale.LAYOUTS`' words. pipeline: modules of every stage, empty for data parallelism."""

    name: str
    processes: int
    pipeline: tuple[int, ...] = ()

    @property
    def replicas(self) -> int:
        return self.processes // max(1, len(self.pipeline))

    def predicted(self, net: scale.Network, cluster: scale.Cluster) -> float:
        """Images a second."""
        if not self.pipeline:
            seconds = scale.local_step_seconds(net.local, self.processes, cluster.link(self.processes))
        else:
            seconds = scale.local_pipeline_seconds(net, len(self.pipeline), self.replicas, cluster)
        return self.replicas * net.batch_size / seconds

    def words(self) -> list[str]:
        if not self.pipeline:
            return ["--parallel", "data"]
        return ["--parallel", "pipeline", "--pipeline-modules", *map(str, self.pipeline)]


def layouts(net: scale.Network) -> list[Layout]:
    halves = tuple(len(run) for run in scale.stages_of(net.local, 2))
    of_two = [Layout("data", 2), Layout("pipeline", 2, halves)]
    return [*of_two, Layout("data", 4), Layout("pipeline", 4, (1,) * MODULES), Layout("mixed", 4, halves)]


# ---------------------------------------------------------------------------------------------------------------------
# Measured: blocks, the link


def _measured(_: int) -> scale.Network:
    torch.set_num_threads(1)
    return scale.measure(ARCH, MODULES, BATCH)


def measured(cores: int) -> scale.Network:
    """The modules' times, each core timing at the same time: the mean of those that find the first one's cuts."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        nets = pool.map(_measured, range(cores), chunksize=1)
    first = nets[0]
    works = zip(*(net.local for net in nets if net.cuts == first.cuts))
    mean = tuple(dataclasses.replace(same[0], seconds=statistics.mean(work.seconds for work in same)) for same in works)
    return dataclasses.replace(first, local=mean)


def slower(net: scale.Network, times: float) -> scale.Network:
    return dataclasses.replace(net, local=tuple(dataclasses.replace(work, seconds=work.seconds * times) for work in net.local))


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
    """Between two processes of this machine."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Run


def run(layout: Layout, net: scale.Network, epochs: int) -> float:
    """Images a second of the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        return train(net, layout.processes, layout.words(), Path(folder) / "run", epochs=epochs, batch_size=layout.replicas * BATCH)


def train(net: scale.Network, processes: int, words: list[str], out: Path, *, epochs: int, batch_size: int) -> float:
    """Images a second of the last epoch of a run with the cuts of ``net``, a thread a process; torchrun starts more than one."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    command = [
        sys.executable, "-m", *torchrun, "infopro_fast", "train", "--arch", ARCH, "--modules", str(MODULES),
        "--cuts", *(str(number) for cut in net.cuts for number in cut), "--batch-size", str(batch_size),
        "--threads", "1", "--epochs", str(epochs), "--warmup", "0", "--out", str(out), *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return report.read_metrics(out, "epoch")[-1]["images_per_second"]


def one_round(number: int, epochs: int, link: scale.Link) -> list[dict]:
    """Every layout once: predicted from times measured just before, and run."""
    cores, rows = os.cpu_count(), []
    for index in range(LAYOUTS):
        net = measured(cores)
        layout = layouts(net)[index]
        predicted = layout.predicted(slower(net, max(1.0, layout.processes / cores)), scale.Cluster(cores, link, link))
        got = run(layout, net, epochs)
        rows.append({"round": number, "layout": layout.name, "processes": layout.processes, "predicted": predicted, "measured": got})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of every run; the last one counts")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    link = measured_link()
    rows = [row for number in range(options.rounds) for row in one_round(number, options.epochs, link)]
    content = {**provenance(), "threads": 1, "epochs": options.epochs, "link": dataclasses.asdict(link), "layouts": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    head = ["layout", "processes", "predicted, images/s", "measured", "measured / predicted", "of", f"within {BAR:.0%}"]
    print(figures.aligned([head, *map(_row, _by_layout(rows))]))


def _by_layout(rows: list[dict]) -> list[list[dict]]:
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["layout"], row["processes"]), []).append(row)
    return list(found.values())


def _row(same: list[dict]) -> list[str]:
    """Medians of a layout's rounds, and the least and largest ratio."""
    ratios = [row["measured"] / row["predicted"] for row in same]
    ratio = statistics.median(ratios)
    holds = "yes" if abs(ratio - 1) <= BAR else "NO"
    predicted, got = (f"{statistics.median(row[name] for row in same):.0f}" for name in ("predicted", "measured"))
    name, processes = same[0]["layout"], str(same[0]["processes"])
    return [name, processes, predicted, got, f"{ratio:.3g}", f"{min(ratios):.3g} to {max(ratios):.3g}", holds]


if __name__ == "__main__":
    main()
