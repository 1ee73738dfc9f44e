"""SGD with its momentum in fewer bits: torch's SGD but for the rounding of what is kept, its bytes, and its life in a checkpoint."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch

import infopro_fast
from infopro_fast.errors import ConfigError
from infopro_fast.trainer import TrainConfig, checkpoint, low_bit_sgd, released_sgd
from infopro_fast.trainer.low_bit_sgd import BLOCK, LowBitSGD
from tests import compare

STATES = low_bit_sgd.STATES[1:]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=generator) for shape in ((16, 3, 3, 3), (300, 7), (10,), (1,))]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(w) for w in weights]


def train(params, optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * p.detach().abs().mean()
        optimizer.step()


@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.5, weight_decay=0.1), dict(momentum=0)], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_two_steps_are_sgd_within_the_momentums_rounding(state, settings):
    """The first step is SGD's; the second differs by the momentum's rounding alone, times lr momentum^2."""
    lr, momentum = 0.1, settings.get("momentum", 0.9)
    plain, ours = parameters(), parameters()
    make = {"lr": lr, "momentum": momentum, "weight_decay": settings.get("weight_decay", 0)}
    reference = torch.optim.SGD(plain, **make, nesterov=momentum > 0)
    optimizer = LowBitSGD(ours, **make, state=state)
    train(plain, reference, 1), train(ours, optimizer, 1)
    for p, q in zip(plain, ours):
        compare.assert_close(q, p.double())
    exact = [reference.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in plain]
    train(plain, reference, 1, seed=2), train(ours, optimizer, 1, seed=2)
    for p, q, buffer in zip(plain, ours, exact):
        rounding = compare.EIGHT_BIT if state == "8bit" and p.numel() >= BLOCK else compare.CLOSE[torch.bfloat16]
        slack = compare.CLOSE[torch.float32] * p.abs().max()
        assert (p - q).abs().max() <= lr * momentum**2 * rounding * buffer.abs().max() + slack
    assert any(not torch.equal(p, q) for p, q in zip(plain, ours)) == (momentum > 0)


@pytest.mark.parametrize("state, per_number", [("bfloat16", 2), ("8bit", 1 + 4 / BLOCK)])
def test_bytes_kept(state, per_number):
    net = infopro_fast.build("resnet20", 1)
    trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.1, state=state))
    trainer.step(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    (optimizer,) = trainer.optimizers
    for p, kept in optimizer.state.items():
        small = state == "8bit" and p.numel() < BLOCK
        padded = -(-p.numel() // BLOCK) * BLOCK if state == "8bit" else p.numel()
        assert sum(t.nbytes for t in kept.values()) == (4 * p.numel() if small else per_number * padded)
    assert len(optimizer.state) == len(list(net.parameters()))


@pytest.mark.parametrize("state", STATES)
def test_resumes_from_a_checkpoint_bit_for_bit(state, tmp_path):
    image, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    nets = [infopro_fast.build("resnet20", 2) for _ in range(2)]
    trainers = [infopro_fast.LocalTrainer(net, released_sgd(lr=0.05, state=state)) for net in nets]
    trainers[0].step(image, label)
    path = checkpoint.save(tmp_path, "epoch0000-batch000001", {"net": nets[0].state_dict(), "trainer": trainers[0].state_dict()})
    loaded = checkpoint.load(path)
    nets[1].load_state_dict(loaded["net"])
    trainers[1].load_state_dict(loaded["trainer"])
    for a, b in zip(*(trainer.optimizers for trainer in trainers)):
        for p, q in zip(a.state.values(), b.state.values(), strict=True):
            assert {name: t.dtype for name, t in p.items()} == {name: t.dtype for name, t in q.items()}
    for trainer in trainers:
        trainer.step(image, label)
    assert all(torch.equal(tensor, nets[1].state_dict()[name]) for name, tensor in nets[0].state_dict().items())


@pytest.mark.parametrize("state", STATES)
def test_it_trains(state):
    torch.manual_seed(0)
    image, label = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    net = infopro_fast.build("resnet20", 2)
    twin = copy.deepcopy(net)
    losses = []
    for each, make in ((net, released_sgd(lr=0.02, state=state)), (twin, functools.partial(released_sgd(lr=0.02)))):
        trainer = infopro_fast.LocalTrainer(each, make)
        losses.append([trainer.step(image, label)["loss"].item() for _ in range(10)])
    assert losses[0][0] == losses[1][0] and losses[0][-1] < losses[0][0] / 2 and losses[1][-1] < losses[1][0] / 2


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="LowBitSGD: state: expected one of .*, got 'float32'"):
        LowBitSGD(parameters(), 0.1, state="float32")
    with pytest.raises(ValueError, match="expected no closure"):
        LowBitSGD(parameters(), 0.1).step(lambda: None)
    with pytest.raises(ConfigError, match="optimizer_state 8bit and cuda_graph: its steps are not captured"):
        TrainConfig(optimizer_state="8bit", cuda_graph=True, device="cuda")
    with pytest.raises(ConfigError, match="optimizer_state: expected one of .*, got '4bit'"):
        TrainConfig(optimizer_state="4bit")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    low_bit_sgd.quantizer.cache_clear()
    with pytest.raises(ImportError, match=r"needs torchao: pip install 'infopro-fast\[8bit\]'"):
        LowBitSGD(parameters(), 0.1, state="8bit")
