"""Throughput on G GPUs, predicted from times of one, for local modules and their end-to-end rivals.

The model has compute and links, and no machine: a GPU computes a block in its measured time whatever the
others do, a link carries one message at a time, and copies and reductions overlap with compute. Local modules
follow the timelines of `trainer.processes`. End to end they are those of DistributedDataParallel (buckets, Li
et al. 2020) and of pipelines with backward, GPipe (Huang et al. 2019) and 1F1B (Narayanan et al. 2019). Both
of these have the same bubble: (P - 1) / m of a step with m micro-batches on P stages.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infopro_fast import figure, info
from infopro_fast.errors import PlanError
from infopro_fast.planning.chains import Source, batch, usual_loss
from infopro_fast.planning.costs import ChainCosts, measure_chain
from infopro_fast.planning.fake import FakeTensorMode
from infopro_fast.planning.planner import best_cuts, spans_of
from infopro_fast.whole_files import replace_file

BUCKET = 25 * 2**20  # bytes of DistributedDataParallel's buckets
FORWARD = 1 / 3  # share of the forward in a block's time: one product, and the backward has two


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second in each direction. latency: seconds a message."""

    bandwidth: float
    latency: float

    def send(self, count: int) -> float:
        return count / self.bandwidth + self.latency

    def all_reduce(self, count: int, processes: int) -> float:
        """Seconds of a ring's 2 (G - 1) messages, each a G-th of the bytes."""
        if processes == 1:
            return 0.0
        return 2 * (processes - 1) * (count / processes / self.bandwidth + self.latency)


@dataclass(frozen=True)
class Cluster:
    """Machines of ``machine`` GPUs. inside: links in a machine. between: links from one to another."""

    machine: int
    inside: Link
    between: Link

    def link(self, gpus: int) -> Link:
        """Return the slowest link among so many neighbours."""
        return self.inside if gpus <= self.machine else self.between


@dataclass(frozen=True)
class Work:
    """A module or block: seconds of forward and backward for a batch, bytes of gradients and output."""

    seconds: float
    gradients: int
    output: int


@dataclass(frozen=True)
class Network:
    """A network measured for a batch of ``batch_size``.

    local: its modules with their auxiliary networks. plain: its blocks, trained end to end.
    carried: bytes of image and label, which a pipeline of local modules sends on with the features.
    cuts: where the modules but the last end, as `build` takes them.
    """

    arch: str
    batch_size: int
    local: tuple[Work, ...]
    plain: tuple[Work, ...]
    carried: int
    cuts: tuple[tuple[int, int], ...] = ()


def measure(arch: str, modules: int, batch_size: int, *, speedup: float = 1.0) -> Network:
    """Measure times here, divided by ``speedup``, and cut to balance them. Raises PlanError."""
    source = Source(arch, local_loss=usual_loss(arch))
    with FakeTensorMode():
        net = source.chain()
        bytes_of = measure_chain(net, *batch(net.found, batch_size, real=False))
    most = 1 + sum(bytes_of.cut_allowed(end) for end in range(len(bytes_of) - 1))
    if not 1 <= modules <= most:
        raise PlanError(f"modules: expected 1 to {most} for {arch}, got {modules}")
    image, label = batch(net.found, batch_size, real=True)
    times = measure_chain(source.chain(real=True), image, label, timed=True)
    carried = image.nbytes + label.nbytes
    return _network(arch, modules, batch_size, times, bytes_of, carried, net.positions, speedup)


def _network(
    arch: str, modules: int, batch_size: int, times: ChainCosts, bytes_of: ChainCosts, carried: int,
    positions, speedup: float,
) -> Network:
    """times: measured costs. bytes_of: costs of fake tensors, whose bytes are exact."""
    n = len(times)
    try:
        spans = spans_of(best_cuts(times.seconds, n, modules, times.cut_allowed), n)
    except ValueError as error:
        raise PlanError(f"{arch}, {modules} modules: {error}".replace("best_cuts: modules: ", "")) from error

    def gradients(a: int, b: int, loss: bool) -> int:
        own = sum(block.parameters for block in bytes_of.blocks[a : b + 1])
        return own + (bytes_of.losses[b].parameters if loss else 0)

    local = tuple(
        Work(times.seconds(a, b) / speedup, gradients(a, b, True), bytes_of.blocks[b].output)
        for a, b in spans
    )
    plain = []
    for i, block in enumerate(times.blocks):
        last = i == n - 1
        seconds = block.seconds + (times.losses[i].seconds if last else 0.0)
        plain.append(Work(seconds / speedup, gradients(i, i, last), bytes_of.blocks[i].output))
    cuts = tuple(positions[end] for _, end in spans[:-1])
    return Network(arch, batch_size, local, tuple(plain), carried, cuts)


# ------------------------------------------------------------------------------------------------------------
# Seconds of a step of one batch a replica


def local_step_seconds(modules: Sequence[Work], replicas: int, link: Link) -> float:
    """Data parallelism: a module's reduction overlaps with the next module's compute, and ends with it."""
    now = link_free = 0.0
    before = 0.0  # when the previous module's reduction is done
    for module in modules:
        now += module.seconds
        link_free = max(link_free, now) + link.all_reduce(module.gradients, replicas)
        now, before = max(now, before), link_free
    return max(now, before)


def ddp_seconds(blocks: Sequence[Work], replicas: int, link: Link) -> float:
    """End to end: a forward, then a backward during which full buckets are reduced."""
    now = FORWARD * sum(block.seconds for block in blocks)
    link_free, bucket = 0.0, 0
    for block in reversed(blocks):
        now += (1 - FORWARD) * block.seconds
        bucket += block.gradients
        if bucket >= BUCKET or block is blocks[0]:
            link_free = max(link_free, now) + link.all_reduce(bucket, replicas)
            bucket = 0
    return max(now, link_free)


def stages_of(works: Sequence[Work], stages: int) -> list[Sequence[Work]]:
    """Split into contiguous runs whose slowest is fastest."""
    cuts = best_cuts(lambda a, b: sum(work.seconds for work in works[a : b + 1]), len(works), stages)
    return [works[a : b + 1] for a, b in spans_of(cuts, len(works))]


def local_pipeline_seconds(net: Network, stages: int, replicas: int, cluster: Cluster) -> float:
    """Seconds between two batches of a pipeline of local modules, cut where its slowest stage is fastest."""
    return pipeline_seconds(stages_of(net.local, stages), net.carried, replicas, cluster)


def pipeline_seconds(runs: Sequence[Sequence[Work]], carried: int, replicas: int, cluster: Cluster) -> float:
    """The same for the stages ``runs``: seconds of the slowest stage, or of the slowest link between two."""
    reduce = cluster.link(len(runs) * replicas)  # replicas are apart
    slowest = max(local_step_seconds(run, replicas, reduce) for run in runs)
    wires = [cluster.link(len(runs)).send(run[-1].output + carried) for run in runs[:-1]]
    return max([slowest, *wires])


def plain_pipeline_seconds(
    net: Network, stages: int, replicas: int, cluster: Cluster, micro_batches: int
) -> float:
    """Seconds of a step of GPipe or 1F1B: m micro-batches through P stages and back, then the reduction."""
    runs = stages_of(net.plain, stages)
    link = cluster.link(stages)
    wire = max([2 * link.send(run[-1].output // micro_batches) for run in runs[:-1]], default=0.0)
    slowest = max(max(sum(work.seconds for work in run) / micro_batches for run in runs), wire)
    reduce = cluster.link(stages * replicas)
    reduction = max(reduce.all_reduce(sum(work.gradients for work in run), replicas) for run in runs)
    return (micro_batches + stages - 1) * slowest + reduction


# ------------------------------------------------------------------------------------------------------------
# Layouts


@dataclass(frozen=True)
class Prediction:
    """Images a second of a layout. stages: GPUs that share a replica."""

    layout: str
    gpus: int
    stages: int
    images_per_second: float


LAYOUTS = ("data", "pipeline", "mixed", "DDP, end to end", "GPipe/1F1B, end to end")


def predict(net: Network, gpus: int, cluster: Cluster, micro_batches: int) -> list[Prediction]:
    """Predict each layout on so many GPUs, a batch for every replica; a pipeline needs a module for each GPU.

    "mixed", and GPipe with replicas, have the best number of stages.
    """

    def rate(replicas: int, seconds: float) -> float:
        return replicas * net.batch_size / seconds

    link, n = cluster.link(gpus), gpus
    found = [Prediction("data", n, 1, rate(n, local_step_seconds(net.local, n, link)))]
    if n <= len(net.local):
        found.append(Prediction("pipeline", n, n, rate(1, local_pipeline_seconds(net, n, 1, cluster))))
    divisors = [p for p in range(1, n + 1) if n % p == 0]
    split = [p for p in divisors if p <= len(net.local)]
    best, stages = max((rate(n // p, local_pipeline_seconds(net, p, n // p, cluster)), p) for p in split)
    found.append(Prediction("mixed", n, stages, best))
    found.append(Prediction("DDP, end to end", n, 1, rate(n, ddp_seconds(net.plain, n, link))))
    split = [p for p in divisors if p <= len(net.plain) and (p > 1 or n == 1)]
    pipes = [(rate(n // p, plain_pipeline_seconds(net, p, n // p, cluster, micro_batches)), p) for p in split]
    if pipes:
        best, stages = max(pipes)
        found.append(Prediction("GPipe/1F1B, end to end", n, stages, best))
    return found


def table(net: Network, found: Sequence[Prediction]) -> str:
    """A line for each number of GPUs: images a second of each layout, in brackets the stages of a replica."""
    rows = [["GPUs", *LAYOUTS]]
    for gpus in sorted({p.gpus for p in found}):
        here = {p.layout: p for p in found if p.gpus == gpus}
        cells = [f"{p.images_per_second:.0f} ({p.stages})" if p else "-" for p in map(here.get, LAYOUTS)]
        rows.append([str(gpus), *cells])
    head = f"{net.arch}, {len(net.local)} modules, batch {net.batch_size} a replica, images/s"
    return f"{head}\n{figure.aligned(rows)}"


def write(
    nets: Sequence[Network], found: Sequence[Sequence[Prediction]], cluster: Cluster, out: Path
) -> tuple[Path, Path]:
    """Draw ``out``, a panel a network, and write all numbers beside it as JSON, each whole or not at all."""
    drawing, panels = figure.new_figure((5.5 * len(nets), 4.2), columns=len(nets))
    for panel, net, predictions in zip(panels if len(nets) > 1 else [panels], nets, found):
        for i, name in enumerate(LAYOUTS):
            points = [(p.gpus, p.images_per_second) for p in predictions if p.layout == name]
            style = "--" if "end to end" in name else "-"
            if points:
                panel.plot(*zip(*points), style, marker="o", markersize=3, color=f"C{i}", label=name)
        title = f"{net.arch}, {len(net.local)} modules (predicted)"
        panel.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s", title=title)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    png, numbers = out.with_suffix(".png"), out.with_suffix(".json")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.save(drawing, png)
    content = [
        {"network": dataclasses.asdict(net), "predictions": [dataclasses.asdict(p) for p in predictions]}
        for net, predictions in zip(nets, found)
    ]
    whole = {"where": info.provenance(), "cluster": dataclasses.asdict(cluster), "networks": content}
    replace_file(numbers, (json.dumps(whole, indent=1) + "\n").encode())
    return png, numbers
