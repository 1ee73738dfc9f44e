"""Batch norm as the ops fold it in: the plain-torch reference, and the running statistics of the layer that was given."""

from __future__ import annotations

import torch
from torch import nn


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether the layer normalises with its batch's statistics: in training mode, or where it keeps no running ones."""
    return norm.training or norm.running_mean is None


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """Move the running statistics as nn.BatchNorm2d does: mean and biased var (C,) of ``count`` > 1 values a channel."""
    if not (norm.training and norm.track_running_stats and norm.running_mean is not None):
        return
    norm.num_batches_tracked.add_(1)
    # no momentum: a cumulative average
    weight = 1.0 / norm.num_batches_tracked.to(norm.running_mean.dtype) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), weight)


def batch_norm_ref(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """The layer on x (N, C, h, w), in x's dtype, whatever the dtype of its parameters; running statistics move in training."""
    if uses_batch_statistics(norm):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        update_running_statistics(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
    else:
        mean, var = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) * torch.rsqrt(var + norm.eps).view(shape)
    return x if norm.weight is None else x * norm.weight.to(x.dtype).view(shape) + norm.bias.to(x.dtype).view(shape)
