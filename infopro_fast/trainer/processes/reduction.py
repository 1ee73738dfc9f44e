"""Data parallelism: every process takes a part of the same batch, and each gradient is reduced exactly once.

Replaces nn.DataParallel and DistributedDataParallel of the released code, which reduces twice what it must: its `no_sync` is around
the backward alone, where it does nothing. Here one flat tensor a module holds its gradients; its all-reduce starts right after the
module's backward and is waited for only after the next module's backward, when the optimizer steps: nobody needs that module's
weights in between. That of the last module alone is not covered by anything.

The global batch is the mean over its images, whatever part each process has: a process weighs its losses by its part, so that
gradients, those through a SyncBatchNorm's statistics included, are those of one process with the whole batch, to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from infopro_fast.data import part_of
from infopro_fast.modules import AuxClassifier, LocalNetwork

from ..step import LocalTrainer, Metrics, local_step

CommHook = Callable[[torch.Tensor, dist.ProcessGroup], dist.Work]


def all_reduce(flat: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """The communication hook of those who give none: the sum over the processes, in place of ``flat``."""
    return dist.all_reduce(flat, group=group, async_op=True)


class GradientReduction:
    """The mean of one module's gradients over the processes of ``group``, on its way while other modules compute.

    parameters: of the module's optimizer. hook: as `ParallelTrainer`'s comm_hook. bytes: reduced so far.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, hook: CommHook = all_reduce):
        self.parameters, self.group, self.hook = list(parameters), group, hook
        self.bytes = 0
        self._on_the_way: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []

    def start(self) -> None:
        """Take the gradients, which are there, and send them off: one all-reduce for each dtype, of which there is usually one."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in self.parameters:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p)
        for some in by_dtype.values():
            flat = some[0].grad.new_empty(sum(p.numel() for p in some))
            for p, own in zip(some, _parts(flat, some)):
                own.copy_(p.grad)
                p.grad = None
            self.bytes += flat.numel() * flat.element_size()
            self._on_the_way.append((some, flat, self.hook(flat, self.group)))

    def finish(self) -> None:
        """Wait, and give the parameters their gradients: parts of the one tensor, in the layout of the parameters."""
        processes = dist.get_world_size(self.group)
        for some, flat, work in self._on_the_way:
            work.wait()
            flat.div_(processes)
            for p, own in zip(some, _parts(flat, some)):
                p.grad = own
        self._on_the_way = []


def _parts(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Views of one tensor in the shapes of the parameters and, where these are dense, with their strides, as optimizers want it."""
    parts = zip(parameters, flat.split([p.numel() for p in parameters]))
    return [part.as_strided(p.shape, p.stride(), part.storage_offset()) if _is_dense(p) else part.view(p.shape) for p, part in parts]


def _is_dense(t: torch.Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


class ParallelTrainer(LocalTrainer):
    """`LocalTrainer` of one process among several: of some of the network's modules, on its part of every batch.

    net: as `build` makes it, or its modules from ``first`` on (`modules_of`), of ``modules`` in all.
    group: the processes that train the same modules on other parts of the batch; None: there are none. Weights must be equal at the
    beginning, and stay so. Batch norms that are no SyncBatchNorm normalise by the process' own images.
    global_contrast: the contrastive loss is over the images of all processes of the group.
    comm_hook: called once a module and step (and dtype of its gradients) with these in one flat tensor and the group, right after the
    module's backward; starts to replace the tensor by the sum over the group and returns what to wait for (its ``wait()`` is called
    after the next module's backward), as for DistributedDataParallel's hooks, to send fewer bytes or to look on.
    at, waiting: told where this process is and with how many images, and the context in which it waits for others (`Watch`).
    Other arguments as in `LocalTrainer`.
    """

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        first: int = 0,
        modules: int | None = None,
        global_contrast: bool = False,
        comm_hook: CommHook = all_reduce,
        at: Callable[[str, int], None] = lambda place, images: None,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        **options,
    ):
        super().__init__(net, make_optimizer, **options)
        self.group, self.first, self.at, self.waiting = group, first, at, waiting
        self.modules = len(net.stages) if modules is None else modules
        self.incoming: torch.Tensor | None = None  # what the first module here is given, if not the image
        self.outgoing: torch.Tensor | None = None  # what the last one gave
        self._share = 1.0
        self.reductions = None
        if group is not None:
            parameters = [[p for entry in optimizer.param_groups for p in entry["params"]] for optimizer in self.optimizers]
            self.reductions = [GradientReduction(some, group, comm_hook) for some in parameters]
        if global_contrast and group is not None:
            for module in net.modules():
                if isinstance(module, AuxClassifier) and module.loss_mode == "contrast":
                    module.gather = self._gather

    def step(
        self, image: torch.Tensor | None, label: torch.Tensor, total: int | None = None, *, features: torch.Tensor | None = None
    ) -> Metrics:
        """One update of every module here. total: images of the whole batch, of which ``image`` is this process' part (`data.part_of`);
        None: every process has as many. Metrics are of this part, those of the last module (loss, correct) only where it is here."""
        replicas = 1 if self.group is None else dist.get_world_size(self.group)
        self._total = len(label) * replicas if total is None else total
        self._share = len(label) * replicas / self._total
        self.incoming = None if self.first == 0 else features
        return super().step(features if image is None else image, label)

    def _part(self, image: torch.Tensor, label: torch.Tensor, share: float = 1.0, update: bool = True) -> Metrics:
        metrics: Metrics = {}
        h = image.detach() if self.incoming is None else self.incoming
        here = list(zip(self.net.stages, self.net.local_losses, self.optimizers, self.scalers))
        for i, (stage, local_loss, optimizer, scaler) in enumerate(here):
            number = self.first + i + 1
            self.at(f"module {number}", len(label))
            h, found = local_step(
                stage, local_loss, optimizer, h, image, label, autocast=self.autocast, scaler=scaler, share=share * self._share,
                update=update and self.reductions is None,
            )  # fmt: skip
            if update and self.reductions is not None:
                self.reductions[i].start()
                if i:
                    self._update(i - 1)
            if number < self.modules:
                metrics.update((f"module{number}/{name}", value) for name, value in found.items())
            else:
                metrics |= {"loss": found["cross_entropy"], "correct": found["cross_entropy_correct"]}
        if update and self.reductions is not None:
            self._update(len(here) - 1)
        self.outgoing = h
        return metrics

    def _update(self, i: int) -> None:
        """The optimizer's step of a module whose gradients are on their way."""
        with self.waiting():
            self.reductions[i].finish()
        optimizer, scaler = self.optimizers[i], self.scalers[i]
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _gather(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n, D) and labels (n,) of the whole batch; gradients reach this process' rows alone."""
        rank, replicas = dist.get_rank(self.group), dist.get_world_size(self.group)
        counts = [part_of(0, self._total, r, replicas) for r in range(replicas)]
        counts = [part.stop - part.start for part in counts]
        return _GatherRows.apply(rows, counts, rank, self.group), _gathered(labels, counts, self.group)


class _GatherRows(torch.autograd.Function):
    """All processes' rows, of which each has its own part.

    Every process computes the same loss of all rows, so that nothing has to be exchanged for the gradient: a process has that of its
    own rows already. It is multiplied by (all rows / own rows), as its loss was weighed by (own rows / all rows).
    """

    @staticmethod
    def forward(ctx, rows, counts, rank, group):
        ctx.start, ctx.count, ctx.total = sum(counts[:rank]), counts[rank], sum(counts)
        return _gathered(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.start : ctx.start + ctx.count] * (ctx.total / ctx.count), None, None, None


def _gathered(t: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Every process' ``t``, which differ in their first size alone, one after the other."""
    most = max(counts)
    own = t.detach().new_zeros((most, *t.shape[1:]))
    own[: len(t)] = t.detach()
    each = [torch.empty_like(own) for _ in counts]
    dist.all_gather(each, own, group=group)
    return torch.cat([some[:count] for some, count in zip(each, counts)])


def modules_of(net: LocalNetwork, span: range) -> LocalNetwork:
    """The modules ``span`` (from 0) of a network, as one of their own; blocks and losses are the network's."""
    blocks = [len(stage) for stage in net.stages]
    start, stop = sum(blocks[: span.start]), sum(blocks[: span.stop])
    cuts = net.cuts[span.start : span.stop]
    return LocalNetwork(net.stages[span.start : span.stop], net.local_losses[span.start : span.stop], cuts, net._prefixes[start:stop])
