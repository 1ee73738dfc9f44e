"""The step of the authors' code: all gradients stay until one optimizer has stepped."""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import nn

from infopro_fast.modules import LocalNetwork
from infopro_fast.trainer.step import LocalTrainer


class ReleasedTrainer(LocalTrainer):
    """One optimizer over everything, which steps when all modules have their gradients."""

    def __init__(
        self, net: LocalNetwork, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ):
        super().__init__(net, lambda parameters: typing.cast(torch.optim.Optimizer, _Later()))
        losses = [p for local_loss in net.local_losses for p in local_loss.trained_parameters()]
        self.optimizers[-1] = make_optimizer([*net.stages.parameters(), *losses])


class _Later:
    """Stands for a module's optimizer, and leaves its gradients to the optimizer of the last module."""

    state: dict = {}
    param_groups: tuple = ()

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass
