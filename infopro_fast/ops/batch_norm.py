"""Batch norm inside the ops: the plain-torch reference, and the running statistics of the user's layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def uses_batch_statistics(norm: Norm) -> bool:
    """Whether the layer uses the batch's statistics: in training, or if it keeps no running ones."""
    return norm.training or norm.running_mean is None


def affine(norm: Norm) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return weight and bias, or (None, None). The bias is 0 if the layer has only a weight (bias=False)."""
    weight, bias = norm.weight, norm.bias
    return weight, torch.zeros_like(weight) if weight is not None and bias is None else bias


@torch.no_grad()
def update_running_statistics(
    norm: Norm, mean: torch.Tensor, var: torch.Tensor, count: int | torch.Tensor
) -> None:
    """Move the running statistics as nn.BatchNorm2d does.

    mean, var: (C,), the mean and biased variance of ``count`` > 1 values a channel.
    """
    if not (norm.training and norm.track_running_stats and norm.running_mean is not None):
        return
    norm.num_batches_tracked.add_(1)
    weight: float | torch.Tensor | None = norm.momentum
    if weight is None:  # a cumulative average
        weight = 1.0 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), weight)


def batch_norm_ref(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return the layer's output for x (N, C, h, w), in x's dtype; running statistics move in training."""
    if uses_batch_statistics(norm) and sync_group(norm) is not None:
        mean, var = _synced_statistics(norm, x)
    elif uses_batch_statistics(norm):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        update_running_statistics(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
    else:
        mean, var = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) * torch.rsqrt(var + norm.eps).view(shape)
    weight, bias = affine(norm)
    return x if weight is None else x * weight.to(x.dtype).view(shape) + bias.to(x.dtype).view(shape)


# ------------------------------------------------------------------------------------------------------------
# SyncBatchNorm


def sync_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """Return the processes that share a SyncBatchNorm's statistics.

    None for other layers, in eval mode, and in a group of one process.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def merged_statistics(
    statistics: torch.Tensor, count: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and biased variance (2, C) over all processes, and the number of values a channel.

    statistics, count: the same of this process. They are merged in float64 and in the order of ranks (Chan,
    Golub & LeVeque 1983), so that every process finds the same bits.
    """
    own = torch.cat([statistics.double().flatten(), statistics.new_full((1,), count, dtype=torch.float64)])
    each = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, own, group=group)
    every = torch.stack(each)
    counts, (means, variances) = every[:, -1:], every[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return torch.stack([mean, var]).to(statistics.dtype), total


def summed_across(t: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of ``t`` over processes; ``t`` stays as it is."""
    total = t.clone()
    dist.all_reduce(total, group=group)
    return total


class _SumAcross(torch.autograd.Function):
    """Sum over processes. The gradient is summed too, since every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return summed_across(t, group)

    @staticmethod
    def backward(ctx, grad):
        return _SumAcross.apply(grad, ctx.group), None


def _synced_statistics(norm: nn.SyncBatchNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    group = sync_group(norm)
    count = summed_across(x.new_tensor(x.numel() // x.shape[1], dtype=torch.float64), group)
    mean = (_SumAcross.apply(x.sum((0, 2, 3)), group) / count).to(x.dtype)
    var = (_SumAcross.apply((x - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3)), group) / count).to(x.dtype)
    update_running_statistics(norm, mean.detach(), var.detach(), count)
    return mean, var
