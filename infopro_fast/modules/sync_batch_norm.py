"""SyncBatchNorm that also runs on the CPU: batch norm with the statistics of all processes' images."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from infopro_fast.ops import batch_norm
from infopro_fast.ops.plain import differs

from .decoder import ChainDecoder, Decoder


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's layer, with the same arithmetic on the CPU, where torch refuses to run several processes.

    A layer exchanges twice a step: mean, variance and count in forward, two sums a channel in backward. The
    statistics are merged in float64 in the order of ranks, so that every process gets the same bits.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised x: (N, C, ...), float32 or float64. N may differ between processes."""
        group = batch_norm.sync_group(self)
        if x.device.type != "cpu" or group is None:
            return super().forward(x)
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, group)
        batch_norm.update_running_statistics(self, mean, var, count)
        return y


class _Normalize(torch.autograd.Function):
    """Saves x and 2 C numbers for backward, as torch's layer does."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        own = torch.stack([mean, var])
        (mean, var), count = batch_norm.merged_statistics(own, x.numel() // x.shape[1], group)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group, ctx.has_bias = eps, group, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var, count = ctx.saved_tensors
        channel = (1, -1, *(1,) * (x.dim() - 2))
        dims = [d for d in range(x.dim()) if d != 1]
        inverse = torch.rsqrt(var + ctx.eps)
        centered = x - mean.view(channel)
        own = torch.stack([grad.sum(dims), (grad * centered).sum(dims)])
        g_weight, g_bias = None if weight is None else own[1] * inverse, own[0] if ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, g_weight, g_bias, None, None
        g_mean, g_var = batch_norm.summed_across(own, ctx.group) / count.to(own.dtype)
        scale = inverse if weight is None else inverse * weight
        # dx = scale (dy - mean(dy) - x^ mean(dy x^)), where x^ is the normalised x
        centered.mul_((-g_var * inverse.square()).view(channel)).add_(grad).sub_(g_mean.view(channel))
        return centered.mul_(scale.view(channel)), g_weight, g_bias, None, None


def convert_sync_batch_norm(net: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replace every batch norm inside ``net`` by a SyncBatchNorm among ``group`` (None: all); return ``net``.

    Parameters and buffers stay the same tensors. Decoders, whose op computes the norm, get torch's class.
    Raises ValueError for a batch norm whose call does more than its class's, which would be lost (`differs`).
    """
    for module in net.children():
        if isinstance(module, (Decoder, ChainDecoder)):
            for name, layer in list(module.named_modules()):
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    _set(module, name, _converted(layer, nn.SyncBatchNorm, group))
        elif not isinstance(module, nn.modules.batchnorm._BatchNorm):
            convert_sync_batch_norm(module, group)
    for name, module in list(net.named_children()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            setattr(net, name, _converted(module, SyncBatchNorm, group))
    return net


def _set(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, layer)


def _converted(
    norm: nn.Module, kind: type[nn.SyncBatchNorm], group: dist.ProcessGroup | None
) -> nn.SyncBatchNorm:
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
    reason = "it is parametrised" if is_parametrized(norm) else differs(norm, *known)
    if reason is not None:
        expected = "a batch norm whose call runs nothing else, which would be lost"
        raise ValueError(f"convert_sync_batch_norm: expected {expected}, got {norm}: {reason}")
    options = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made = kind(*options, process_group=group)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(made, name, getattr(norm, name))
    return made.train(norm.training)
