"""The moving average of the weights: torch's to the bit, without its wait for the device at every step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from infopro_fast.trainer.moving_average import MovingAverage


def network() -> nn.Module:
    """Parameters and buffers of several dtypes: a batch norm counts its batches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1).double())


def moved(net: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


def test_it_is_that_of_torch_to_the_bit():
    """After every update; and each continues from the other's state."""
    net = network()
    ours, theirs = (
        MovingAverage(net, 0.9),
        AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    for step in range(5):
        moved(net)
        for average in (ours, theirs):
            average.update_parameters(net)
        found, expected = ours.state_dict(), theirs.state_dict()
        assert list(found) == list(expected) and found["n_averaged"] == step + 1
        assert all(
            found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
            for name, tensor in expected.items()
        )
        if step == 2:
            expected = {name: tensor.clone() for name, tensor in expected.items()}
            theirs.load_state_dict({name: tensor.clone() for name, tensor in found.items()})
            ours.load_state_dict(expected)
    assert all(p.requires_grad for p in net.parameters())


class Copies(TorchDispatchMode):
    """Counts copies of a tensor to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and found.device != args[0].device
        return found


def test_an_update_copies_nothing_to_the_device():
    """Which would be to wait for a GPU; meta stands for one."""
    net = network().to("meta")
    average = MovingAverage(net, 0.9)
    for _ in range(3):
        with Copies() as copies:
            average.update_parameters(net)
        assert copies.count == 0
    assert average.n_averaged == 3
