"""The moving average of a network's weights, which `--ema` tests and writes."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """Averages parameters and buffers of ``net``: decay * average + (1 - decay) * value at each update.

    The first update copies. Values and state_dict equal those of torch's AveragedModel with
    `get_ema_multi_avg_fn`. torch copies the number of updates to the device each time, and so waits for a
    GPU; this class does not.
    """

    def __init__(self, net: nn.Module, decay: float):
        super().__init__(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards ``model``, which has the net's layers."""
        own, new = (itertools.chain(net.parameters(), net.buffers()) for net in (self.module, model))
        alike: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for average, value in zip(own, new, strict=True):
            averages, values = alike.setdefault(average.dtype, ([], []))
            averages.append(average)
            values.append(value)
        first = self.n_averaged.item() == 0  # it stays on the CPU, also when a checkpoint is loaded
        for averages, values in alike.values():
            if first:
                torch._foreach_copy_(averages, values)
            else:
                self.multi_avg_fn(averages, values, None)
        self.n_averaged += 1
