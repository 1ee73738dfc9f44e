"""Networks whose tensors have shapes and no values, so that a training step of any size needs no memory.

Unlike tensors on the meta device, fake tensors report the CPU as theirs, so the ops choose what they would
choose there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FakeTensorMode", "build_fake", "copy_to_meta", "fake", "fake_batch"]


def build_fake(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``build()`` makes, with fake parameters and buffers, for use inside a `FakeTensorMode`."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        net = build()
    return fake(net)


def fake(net: nn.Module) -> nn.Module:
    """Replace parameters and buffers by fake CPU tensors of the same shapes, strides and dtypes."""
    like: dict[torch.Tensor, torch.Tensor] = {}  # a tensor in two places stays one
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = like.setdefault(t, _like(t, "cpu"))
    return net


def copy_to_meta(net: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers have shapes and no values."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(t): _like(t, "meta") for t in tensors})


def _like(t: torch.Tensor, device: str) -> torch.Tensor:
    like = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
    return nn.Parameter(like, t.requires_grad) if isinstance(t, nn.Parameter) else like


def fake_batch(
    batch_size: int, image_size: int | tuple[int, int], labels: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, H, W) and labels (N, *labels). Call it inside a `FakeTensorMode`."""
    H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
    return torch.empty(batch_size, 3, H, W), torch.empty(batch_size, *labels, dtype=torch.long)
