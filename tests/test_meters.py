"""Means over steps of different sizes, by interval and by epoch."""

import pytest
import torch

from infopro_fast.trainer.meters import Meters


def step(loss: float, correct: int) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "correct": torch.tensor(correct)}


def test_means_weigh_steps_by_their_images():
    meters = Meters(capacity=2)
    meters.add(step(1.0, 3), 4)
    meters.add(step(4.0, 0), 2)
    meters.read()
    assert meters.finish_interval() == pytest.approx({"loss": (4 * 1 + 2 * 4) / 6, "accuracy": 3 / 6})
    meters.add(step(7.0, 6), 6)
    meters.read()
    assert meters.finish_interval() == pytest.approx({"loss": 7, "accuracy": 1})
    assert meters.finish_epoch() == pytest.approx({"loss": (4 + 8 + 42) / 12, "accuracy": 9 / 12})


def test_the_step_of_a_loss_that_is_not_finite_is_named():
    meters = Meters(capacity=3)
    for loss in (1.0, float("nan"), 2.0):
        meters.add(step(loss, 1), 2)
    with pytest.raises(FloatingPointError, match="^1 before the last: .*loss"):
        meters.read("{} before the last".format)
