"""Data parallelism: each process takes a part of the same batch, and each gradient is reduced exactly once.

The authors' DistributedDataParallel reduces twice what it must: its `no_sync` is around the backward alone,
where it has no effect. Here one flat tensor a module holds its gradients. Its all-reduce starts right after
the module's backward, and is waited for after the next module's backward, when the optimizer steps. Only the
last module's all-reduce overlaps no computation.

The loss is the mean over the images of the global batch: a process weighs its losses by its part of it. So
gradients, also through a SyncBatchNorm's statistics, equal one process's with the whole batch, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from infopro_fast.data import part_of

CommHook = Callable[[torch.Tensor, dist.ProcessGroup], dist.Work]


def all_reduce(flat: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start the sum over the processes, in place of ``flat``; the default communication hook."""
    return dist.all_reduce(flat, group=group, async_op=True)


class GradientReduction:
    """Averages one module's gradients over the processes of ``group``, while other modules compute.

    parameters: those of the module's optimizer. hook: `LocalTrainer`'s comm_hook. bytes: reduced so far.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, hook: CommHook = all_reduce
    ):
        self.parameters, self.group, self.hook = list(parameters), group, hook
        self.bytes = 0
        self._on_the_way: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []

    def start(self) -> None:
        """Take the gradients and start an all-reduce for each dtype (usually one)."""
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
        """Wait, and give the parameters their gradients: views of the flat tensor in their layout."""
        processes = dist.get_world_size(self.group)
        for some, flat, work in self._on_the_way:
            work.wait()
            flat.div_(processes)
            for p, own in zip(some, _parts(flat, some)):
                p.grad = own
        self._on_the_way = []


def _parts(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Return views of ``flat`` in the parameters' shapes and, where dense, their strides, for optimizers."""
    parts = zip(parameters, flat.split([p.numel() for p in parameters]))
    return [
        part.as_strided(p.shape, p.stride(), part.storage_offset()) if _is_dense(p) else part.view(p.shape)
        for p, part in parts
    ]


def _is_dense(t: torch.Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def gather_rows(
    rows: torch.Tensor, labels: torch.Tensor, total: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (n, D) and labels (n,) of the whole batch of ``total``; own rows alone get gradients."""
    rank, replicas = dist.get_rank(group), dist.get_world_size(group)
    parts = [part_of(0, total, r, replicas) for r in range(replicas)]
    counts = [part.stop - part.start for part in parts]
    return _GatherRows.apply(rows, counts, rank, group), _gathered(labels, counts, group)


class _GatherRows(torch.autograd.Function):
    """Gathers the rows of all processes.

    All processes compute the same loss of all rows. So each has the gradient of its rows already, and
    backward exchanges nothing. It multiplies by (all rows / own rows), since the loss was weighed by (own
    rows / all rows).
    """

    @staticmethod
    def forward(ctx, rows, counts, rank, group):
        ctx.start, ctx.count, ctx.total = sum(counts[:rank]), counts[rank], sum(counts)
        return _gathered(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.start : ctx.start + ctx.count] * (ctx.total / ctx.count), None, None, None


def _gathered(t: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the ``t`` of all processes, which may differ in their first size, as one tensor."""
    most = max(counts)
    own = t.detach().new_zeros((most, *t.shape[1:]))
    own[: len(t)] = t.detach()
    each = [torch.empty_like(own) for _ in counts]
    dist.all_gather(each, own, group=group)
    return torch.cat([some[:count] for some, count in zip(each, counts)])
