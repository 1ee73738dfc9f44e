"""The released learning rates, and the released optimizer."""

from __future__ import annotations

import pytest
import torch

from infopro_fast.trainer import schedule


@pytest.mark.parametrize("epoch, expected", [(1, 0.01), (10, 0.714), (80, 0.4), (159, 7.7e-5), (160, 0.0)])
def test_cosine_is_the_released_one(epoch, expected):
    assert schedule.cosine(epoch, 160, 0.8) == pytest.approx(expected, rel=5e-3, abs=1e-12)


def test_cosine_warms_up_then_only_falls():
    rates = [schedule.cosine(e, 160, 0.8) for e in range(1, 161)]
    assert (
        rates[:10] == sorted(rates[:10])
        and rates[10:] == sorted(rates[10:], reverse=True)
        and max(rates) < 0.8
    )


def test_last_epoch_can_train():
    rates = [schedule.cosine(e, 20, 0.8, zero_last_epoch=False) for e in range(1, 21)]
    assert rates[-1] == pytest.approx(schedule.cosine(20, 21, 0.8)) and rates[-1] > 0
    assert schedule.cosine(20, 20, 0.8) == 0


def test_no_warmup():
    assert schedule.cosine(1, 4, 0.8, warmup_epochs=0) == pytest.approx(0.4 * (1 + 2**-0.5))


def test_step_schedule():
    assert [schedule.step(e, 160, 0.8) for e in (1, 79, 80, 119, 120, 160)] == pytest.approx(
        [0.8, 0.8, 0.08, 0.08, 0.008, 0.008]
    )


@pytest.mark.parametrize("epoch", [0, 161])
@pytest.mark.parametrize("function", [schedule.cosine, schedule.step])
def test_epochs_out_of_range(function, epoch):
    with pytest.raises(ValueError, match=f"epoch: expected 1 to 160, got {epoch}"):
        function(epoch, 160, 0.8)


def test_released_sgd():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = schedule.released_sgd(lr=0.5)([p])
    velocity, weight = 0.0, 1.0
    for grad in (0.3, -0.1):
        p.grad = torch.tensor([grad])
        optimizer.step()
        decayed = grad + 1e-4 * weight
        velocity = decayed if velocity == 0 else 0.9 * velocity + decayed
        weight -= 0.5 * (decayed + 0.9 * velocity)
        assert p.item() == pytest.approx(weight, rel=1e-6)
