"""BatchNorm, ReLU and convolution that keep the map before the norm alone, and norm it again in backward.

Autograd keeps two maps of such a chain: the norm's input, and the convolution's, which is the first one
scaled, shifted and rectified. Making the second again costs a pass over memory; running a whole block again
(`recompute="block"`) costs its convolutions. (For DenseNets: Pleiss et al. 2017, "Memory-Efficient
Implementation of DenseNets", arXiv 1707.06990.)

torch's selective checkpointing of blocks, with convolutions saved, gives the same bits. It makes all maps of
a block at once: peaks of ResNet-110 are 2.4 % (K = 4) and 7.7 % (K = 16) higher at batch 128, and a step
takes 1.5 times as long at batch 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast.ops.plain import not_plain

from .backbones import BasicBlock
from .densenet import DenseLayer, Transition

aten = torch.ops.aten


def norm_relu_conv(x: torch.Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d) -> torch.Tensor:
    """Return ``conv(relu(norm(x)))``, keeping x for backward and no other map.

    x: (N, C, H, W), floating point, any memory format. norm, conv: used through their parameters. The norm's
    running statistics move once. On a CPU values and gradients are those of the three modules bit for bit.

    Raises TypeError for a norm that is not BatchNorm2d itself (the statistics of SyncBatchNorm come from
    other processes), a convolution that is not Conv2d itself, and hooks on them; ValueError for padding that
    is not by zeros.
    """
    _check(norm, conv)
    if not torch.is_grad_enabled():
        return conv(F.relu(norm(x), inplace=True))
    training = norm.training or norm.running_mean is None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    else:
        weight, bias = conv.weight, conv.bias
    geometry = ((*conv.stride,), (*conv.padding,), (*conv.dilation,), conv.groups)
    how = (training, _momentum(norm), norm.eps, *geometry)
    statistics = (norm.running_mean, norm.running_var)
    return _NormReluConv.apply(x, norm.weight, norm.bias, weight, bias, *statistics, how)


def _check(norm: nn.Module, conv: nn.Module) -> None:
    for name, layer, kind in (("norm", norm, nn.BatchNorm2d), ("conv", conv, nn.Conv2d)):
        reason = not_plain(layer, kind)
        if reason is not None:
            got = f"{type(layer).__name__}: {reason}"
            raise TypeError(f"norm_relu_conv: {name}: expected {kind.__name__}, got {got}")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        got = f"{conv.padding!r} of {conv.padding_mode!r}"
        raise ValueError(f"norm_relu_conv: conv: expected padding by a number of zeros, got {got}")


def _momentum(norm: nn.BatchNorm2d) -> float:
    """Count the batch, as `BatchNorm2d.forward` does, and return its weight in the running statistics."""
    if not (norm.training and norm.track_running_stats):
        return 0.0
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


class _NormReluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, running_mean, running_var, how):
        training, momentum, eps, *geometry, groups = how
        running = (running_mean, running_var)
        y, mean, invstd = aten.native_batch_norm(x, gamma, beta, *running, training, momentum, eps)
        y = y.relu_().to(weight.dtype)
        ctx.how, ctx.bias_sizes = how, None if bias is None else list(bias.shape)
        # Backward needs the statistics that forward used; in training the running ones move on.
        ctx.save_for_backward(x, gamma, beta, weight, mean, invstd, *((None, None) if training else running))
        return aten.convolution(y, weight, bias, *geometry, False, [0, 0], groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gamma, beta, weight, mean, invstd, running_mean, running_var = ctx.saved_tensors
        training, _, eps, *geometry, groups = ctx.how
        need_x, need_gamma, need_beta, need_weight, need_bias = ctx.needs_input_grad[:5]
        need_norm = need_x or need_gamma or need_beta
        # The same kernel on the same input: if kernels are deterministic, this is forward's map to the bit.
        y = aten.native_batch_norm(x, gamma, beta, running_mean, running_var, training, 0.0, eps)[0]
        y = y.relu_().to(weight.dtype)
        need = [need_norm, need_weight, need_bias]
        through, grad_weight, grad_bias = aten.convolution_backward(
            grad, y, weight, ctx.bias_sizes, *geometry, False, [0, 0], groups, need
        )
        if not need_norm:
            return None, None, None, grad_weight, grad_bias, None, None, None
        # In place: no more maps than in autograd's own backward.
        aten.threshold_backward.grad_input(through, y, 0, grad_input=through)
        del y
        need = [need_x, need_gamma, need_beta]
        found = aten.native_batch_norm_backward(
            through.to(x.dtype), x, gamma, running_mean, running_var, mean, invstd, training, eps, need
        )
        return *found, grad_weight, grad_bias, None, None, None


# ------------------------------------------------------------------------------------------------------------
# Blocks


def run_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``block(x)``; its norms, ReLUs and convolutions are run by `norm_relu_conv`.

    A block whose call does more than its class's (`not_plain`) runs itself, and keeps what autograd keeps.
    """
    forward = None if not_plain(block, type(block)) else _forward_of(block)
    return block(x) if forward is None else forward(block, x)


def has_chain(block: nn.Module) -> bool:
    """Whether `run_block` keeps less for this block: a residual or dense layer, ours or torchvision's."""
    return _forward_of(block) is not None


def _forward_of(block: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor] | None:
    kind = type(block)
    if isinstance(relu := getattr(block, "relu", None), nn.Module) and not_plain(relu, nn.ReLU):
        return None  # a network of torchvision's blocks with another activation
    return _FORWARDS.get((kind.__module__, kind.__name__))  # by name: torchvision may be missing


def _basic_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _joined(block, block.bn2(norm_relu_conv(block.conv1(x), block.bn1, block.conv2)), x)


def _bottleneck(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = norm_relu_conv(block.conv1(x), block.bn1, block.conv2)
    return _joined(block, block.bn3(norm_relu_conv(out, block.bn2, block.conv3)), x)


def _joined(block: nn.Module, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out += x if block.downsample is None else block.downsample(x)
    return F.relu(out, inplace=True)


def _dense_layer(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = norm_relu_conv(x, block.bn1, block.conv1)
    return torch.cat([x, norm_relu_conv(out, block.bn2, block.conv2)], 1)


def _transition(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(norm_relu_conv(x, block.bn, block.conv), 2)


_TORCHVISION = "torchvision.models.resnet"
_FORWARDS = {
    (BasicBlock.__module__, "BasicBlock"): _basic_block,
    (DenseLayer.__module__, "DenseLayer"): _dense_layer,
    (Transition.__module__, "Transition"): _transition,
    (_TORCHVISION, "BasicBlock"): _basic_block,
    (_TORCHVISION, "Bottleneck"): _bottleneck,
}
