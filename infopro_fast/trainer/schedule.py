"""The authors' optimizer and learning rates (train.py: adjust_learning_rate). Epochs count from 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .settings.config import TrainConfig


def released_sgd(
    lr: float, momentum: float = 0.9, weight_decay: float = 1e-4, nesterov: bool = True
) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    """Return make_optimizer of the authors' recipe: fused SGD, Nesterov momentum, decay on all parameters.

    nesterov: False on Cityscapes.
    """
    nesterov = nesterov and momentum > 0
    return functools.partial(
        torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )


def learning_rate(config: TrainConfig, epoch: int, batch: int, batches: int) -> float:
    """Learning rate of the step after ``epoch`` epochs and ``batch`` of the next epoch's ``batches``."""
    now, steps = epoch * batches + batch, config.iterations or config.epochs * batches
    if config.schedule == "one_cycle":
        return one_cycle(now, steps, config.lr, warmup_steps=config.warmup * batches)
    if config.schedule == "poly":
        return poly(now, steps, config.lr)
    if config.schedule == "half_cosine":
        return half_cosine(epoch + 1, config.epochs, config.lr)
    if config.schedule == "step":  # 80 and 120 of the authors' 160 epochs
        first = max(2, config.epochs // 2)  # a run of few epochs, too, begins with the full rate
        milestones = first, max(first + 1, 3 * config.epochs // 4)
        return step(epoch + 1, config.epochs, config.lr, milestones=milestones)
    warmup, zero = config.warmup, config.zero_last_epoch
    return cosine(epoch + 1, config.epochs, config.lr, warmup_epochs=warmup, zero_last_epoch=zero)


def cosine(
    epoch: int, epochs: int, lr: float, *,
    warmup_epochs: int = 10, warmup_start: float = 0.01, zero_last_epoch: bool = True,
) -> float:
    """Learning rate of 1-based ``epoch``: half a cosine from ``lr``, with a linear warm-up.

    base = lr / 2 (1 + cos(pi epoch / epochs)).
    For epoch <= warmup_epochs = w: base (epoch - 1) / w + warmup_start (w + 1 - epoch) / w.

    In the authors' code (w = 10, 160 epochs, 0.01) the last epoch has a rate of exactly 0, and only moves the
    batch norms' statistics. zero_last_epoch=False stretches the cosine by one epoch, so that the last trains.
    Raises ValueError if epoch is not in 1 to epochs.
    """
    _check(epoch, epochs)
    base = 0.5 * lr * (1 + math.cos(math.pi * epoch / (epochs if zero_last_epoch else epochs + 1)))
    if epoch > warmup_epochs:
        return base
    return base * (epoch - 1) / warmup_epochs + warmup_start * (warmup_epochs + 1 - epoch) / warmup_epochs


def step(
    epoch: int, epochs: int, lr: float, *, milestones: Sequence[int] = (80, 120), factor: float = 0.1
) -> float:
    """Learning rate of 1-based ``epoch``: ``lr`` times ``factor`` for each milestone reached.

    The authors' schedule without --cos_lr.
    """
    _check(epoch, epochs)
    return lr * factor ** sum(epoch >= milestone for milestone in milestones)


def half_cosine(epoch: int, epochs: int, lr: float) -> float:
    """Learning rate of 1-based ``epoch``: lr / 2 (1 + cos(pi (epoch - 1) / epochs)), half a cosine.

    The authors' ImageNet schedule, which has no warm-up.
    """
    _check(epoch, epochs)
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def poly(step: int, steps: int, lr: float, *, power: float = 0.9, least: float = 1e-4) -> float:
    """Learning rate of 0-based ``step``: least + (lr - least) (1 - step / steps)^power.

    The authors' Cityscapes schedule. Raises ValueError if step is not in 0 to steps - 1.
    """
    if not 0 <= step < steps:
        raise ValueError(f"schedule: step: expected 0 to {steps - 1}, got {step}")
    return least + (lr - least) * (1 - step / steps) ** power


def one_cycle(step: int, steps: int, lr: float, *, warmup_steps: int) -> float:
    """Learning rate of 0-based ``step``: linearly up to ``lr`` over ``warmup_steps``, then down to 0.

    For short runs: the authors' schedules change once an epoch, which is too coarse for a few epochs. The
    rate is taken at the middle of the step, so that the first and the last step train.
    Raises ValueError if step is not in 0 to steps - 1.
    """
    if not 0 <= step < steps or warmup_steps >= steps:
        expected = f"expected 0 to {steps - 1} with warmup_steps < {steps}"
        raise ValueError(f"schedule: step: {expected}, got {step} with {warmup_steps}")
    at = step + 0.5
    return lr * (at / warmup_steps if at < warmup_steps else (steps - at) / (steps - warmup_steps))


def _check(epoch: int, epochs: int) -> None:
    if not 1 <= epoch <= epochs:
        raise ValueError(f"schedule: epoch: expected 1 to {epochs}, got {epoch}")
