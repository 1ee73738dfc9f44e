"""Bytes alive, against sums done by hand, the paper's tables, real steps and the operating system."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import infopro_fast
from infopro_fast import memory, planning
from infopro_fast.memory import compare, resident
from infopro_fast.memory.released_trainer import ReleasedTrainer
from infopro_fast.planning.released import with_released_losses
from infopro_fast.trainer import released_sgd
from tests import compare as tolerances

MIB = 2**20


# ------------------------------------------------------------------------------------------------------------
# The meter


def test_storages_are_counted_once_and_until_they_end():
    x = torch.zeros(256)
    with planning.LiveBytes([x]) as live:
        a = x + 1
        b = a[::2].view(8, 16)  # of a's storage
        assert live.now.total == 1024
        c = torch.cat([a, x]).mul_(2)
        assert live.now == planning.Bytes(transient=3072) and live.peak.total == 3072
        del a
        assert live.now.total == 3072  # b has it
        del b
        assert live.now.total == 2048
        live.reset()
        assert live.peak.total == 2048
        del c
        assert live.now.total == 0 and live.peak.total == 2048


def test_kinds_of_bytes():
    layer = nn.Linear(256, 64)
    x = torch.randn(16, 256)
    live = planning.LiveBytes([*layer.parameters(), x])
    with live, live.watch_gradients(layer.parameters()):
        y = layer(x)
        assert live.now == planning.Bytes(
            transient=4 * 16 * 64
        )  # the layer keeps x and its weight, which were there
        z = y.exp()  # keeps its result
        loss = z.square().sum()  # keeps its input, the same storage
        assert live.now.saved == 4 * 16 * 64 == live.most_saved
        del y, z
        loss.backward()
        assert live.now.saved == 0 and live.now.gradients == 4 * (256 * 64 + 64)
        gradients = [p.grad for p in layer.parameters()]
        layer.zero_grad()
        assert live.now.gradients == 4 * (256 * 64 + 64)
        del gradients
        assert live.now.gradients == 0


def test_what_a_second_forward_leaves_counts_as_saved():
    x = torch.randn(2, 3, 32, 32)
    net = infopro_fast.build("resnet20", 1, recompute="block")
    trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.01))
    label = torch.tensor([1, 2])
    found = memory.measure_step(trainer, x, label)
    A, B, C = (2 * 4 * 64 * 32 * 32 // s for s in (4, 8, 16))  # a map of each stage: 16, 32, 64 channels
    inputs = (3 + 1) * A + 3 * B + 2 * C  # of the blocks after the stem; what the image is, is not counted
    last = 4 * C  # the last block again: its two pre-norm maps, the rectified one, its output
    statistics = (
        2 * 4 * 2 * (64 + 64)
    )  # means and deviations that its two batch norms keep, and their copies of running statistics
    assert found.saved == inputs + last + statistics
    assert found.modules[0].input == 0


# ------------------------------------------------------------------------------------------------------------
# A step


def fake_step(
    batch_size: int = 4, image_size: int = 32, released_losses: bool = False, **settings
) -> memory.StepMemory:
    with planning.FakeTensorMode():
        net = planning.build_fake(lambda: infopro_fast.build(image_size=image_size, **settings))
        if released_losses:
            trainer = ReleasedTrainer(with_released_losses(net), released_sgd(lr=0.1))
        else:
            trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.1))
        return memory.measure_step(trainer, *planning.fake_batch(batch_size, image_size))


@pytest.mark.parametrize(
    "settings",
    [
        dict(modules=3, lambdas=(1, 1, 1, 1)),
        dict(modules=2, recompute="norm"),
        dict(modules=2, recompute="block"),
    ],
    ids=str,
)
def test_without_running_the_same_bytes_as_running(settings, cpu):
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", **settings)
    trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.1))
    ran = memory.measure_step(trainer, *compare.batch(4, 32))
    assert ran == fake_step(arch="resnet20", **settings)
    assert ran.optimizer == sum(
        p.numel() * 4 for o in trainer.optimizers for g in o.param_groups for p in g["params"]
    )


def test_meta_device():
    net = infopro_fast.build("resnet20", 3, impl="reference").to("meta")
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    found = memory.measure_step(
        trainer, torch.zeros(4, 3, 32, 32, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    )
    assert (
        found.modules[0].saved > 4 * 4 * 16 * 32 * 32 * 4 and found.modules[1].input == 4 * 16 * 32 * 32 * 4
    )


def test_what_is_alive_at_each_point_of_a_step(monkeypatch, cpu):
    """The lifetimes that `local_step` documents, by their bytes: ResNet-20 in 3 modules, every term on."""
    N, K = 8, 3
    A, B, C = (4 * N * 64 * 32 * 32 // s for s in (4, 8, 16))  # a map of each stage
    small = 2**11  # loss values, counts
    seen: list[tuple[str, int, planning.Bytes]] = []
    with planning.FakeTensorMode():
        net = planning.build_fake(
            lambda: infopro_fast.build("resnet20", cuts=[(1, 1), (2, 0)], lambdas=(1, 1, 1, 1))
        )
        image, label = planning.fake_batch(N, 32)
        live = planning.LiveBytes([*net.parameters(), *net.buffers(), image, label])

        class Watched(torch.optim.SGD):
            def step(self, closure=None):
                seen.append(("optimizer", sum(p.numel() for p in self.param_groups[0]["params"]), live.now))

        for k, (stage, local_loss) in enumerate(zip(net.stages, net.local_losses)):
            stage.register_forward_pre_hook(lambda *_, k=k: seen.append(("start", k, live.now)))
            stage.register_forward_hook(lambda *_, k=k: seen.append(("forward done", k, live.now)))
            monkeypatch.setattr(
                local_loss,
                "terms",
                _watched(local_loss.terms, lambda k=k: seen.append(("next term", k, live.now))),
            )
        trainer = infopro_fast.LocalTrainer(net, lambda params: Watched(params, lr=0.1))
        with live, live.watch_gradients(net.parameters()):
            metrics = trainer.step(image, label)
        end = live.now

    # kept by its blocks: pre-norm maps, rectified maps and outputs, the input of the first block included
    # where it is no image
    kept = [2 * A + 8 * A, A + 4 * A + 5 * B, B + 8 * B + 13 * C]
    given, output = [0, A, B], [A, B, C]
    statistics = 2**13  # a batch norm's means and deviations
    terms = {k: [now for where, at, now in seen if (where, at) == ("next term", k)] for k in range(K)}
    for where, k, now in seen:
        if where == "start":  # the input, and nothing of a finished module but its metrics
            assert given[k] <= now.total <= given[k] + small and now.gradients == now.saved == 0
        elif where == "forward done":  # what backward needs, and nothing else
            assert (
                kept[k] <= now.total <= kept[k] + statistics and kept[k] <= now.saved <= kept[k] + statistics
            )
    for k in range(K):
        assert len(terms[k]) == (3 if k < K - 1 else 2)  # one more than there are terms
        trained = 0
        for i, now in enumerate(
            terms[k]
        ):  # no graph but the module's; the gradient of its output once there is one
            trained = now.gradients
            assert kept[k] <= now.saved <= kept[k] + statistics
            assert 0 <= now.total - now.saved - trained - (output[k] if i else 0) <= small
    steps = [(4 * count, now) for where, count, now in seen if where == "optimizer"]
    for k, (gradients, now) in enumerate(steps):  # the gradients of one module, its input and its output
        assert now.gradients == gradients and now.saved == 0
        assert 0 <= now.total - gradients - given[k] - output[k] <= small
    assert end.total <= small and len(metrics) == 2 * 2 + 2


def _watched(terms, note):
    """The same generator, with a note each time it is asked for a term."""

    def watched(features, image, label):
        found = terms(features, image, label)
        while True:
            note()
            term = next(found, None)
            if term is None:
                return
            yield term
            del term

    return watched


# Peak over modules of what is kept for backward, MiB a sample: the image, which the first module keeps, is
# counted there.
PUBLISHED_SPLITS = [
    ("resnet32", 32, 1, False, 2.376), ("resnet32", 32, 2, False, 1.944), ("resnet32", 32, 4, False, 1.130),
    ("resnet32", 32, 8, False, 0.806), ("resnet32", 32, 16, False, 0.556),
    ("resnet110", 32, 1, False, 8.075), ("resnet110", 32, 2, False, 6.072),
    ("resnet110", 32, 4, False, 3.381), ("resnet110", 32, 8, False, 2.056),
    ("resnet110", 32, 16, False, 1.056), ("resnet110", 32, 2, True, 4.249),
    ("resnet110", 32, 3, True, 3.060), ("resnet110", 32, 4, True, 2.308), ("resnet110", 96, 4, True, 20.7),
]


@pytest.mark.parametrize("arch, image_size, modules, balanced, expected", PUBLISHED_SPLITS)
@pytest.mark.fast(3)
def test_the_released_losses_keep_what_the_released_code_keeps(arch, image_size, modules, balanced, expected):
    N = 4
    found = fake_step(N, image_size, released_losses=True, arch=arch, modules=modules, balanced=balanced)
    image = 4 * N * 3 * image_size**2
    kept = max(found.modules[0].saved + image, *(m.saved for m in found.modules[1:]), 0)
    # the table also counts running statistics, less than 0.4 % of these batches
    assert kept / N / MIB == pytest.approx(expected, rel=tolerances.TABLE)


def test_the_parts_of_the_largest_module():
    """Three blocks of the first stage, decoder and head; ours keep neither u nor the decoder's maps."""
    N, per_map = 4, 0.0625
    theirs = fake_step(N, released_losses=True, arch="resnet110", modules=16).modules[1].saved / N / MIB
    ours = fake_step(N, arch="resnet110", modules=16, lambdas=(1, 1, 1, 1)).modules[1].saved / N / MIB
    assert theirs == pytest.approx(13 * per_map + 0.180 + 0.063, rel=tolerances.TABLE)
    assert ours == pytest.approx(
        13 * per_map + per_map / 2, rel=tolerances.TABLE
    )  # the head's convolution, half a map


def test_released_formulas_are_the_ops():
    torch.manual_seed(0)
    image, label = compare.batch(8, 32)
    losses = []
    for with_released in (False, True):
        torch.manual_seed(0)
        net = infopro_fast.build("resnet20", 3, lambdas=(2, 0.5, 1, 1), impl="reference").double()
        weights = [local_loss.trained_parameters() for local_loss in net.local_losses]
        make = released_sgd(lr=0.1)
        if with_released:
            trainer = ReleasedTrainer(with_released_losses(net), make)
        else:
            trainer = infopro_fast.LocalTrainer(net, make)
        metrics = trainer.step(image.double(), label)
        if with_released:
            losses.append([metrics["module1/local"], metrics["module2/local"], metrics["loss"]])
        else:
            parts = [2 * metrics["module1/reconstruction"] + 0.5 * metrics["module1/contrast"]]
            parts += [metrics["module2/reconstruction"] + metrics["module2/contrast"]]
            losses.append([*parts, metrics["loss"]])
        losses.append([p.detach() for p in itertools.chain(net.stages.parameters(), *weights)])
    for a, b in zip([*losses[0], *losses[1]], [*losses[2], *losses[3]]):
        tolerances.assert_close(a, b, scale=max(1.0, b.abs().max().item()))


# ------------------------------------------------------------------------------------------------------------
# What the system sees


@pytest.mark.memory
@pytest.mark.parametrize(
    "way",
    [compare.Way(), compare.Way(2), compare.Way(2, losses="released", planned=False)],
    ids=lambda w: w.name,
)
@pytest.mark.fast(1)
def test_accounted_peak_is_the_systems(way, cpu):
    """The resident set at the highest point of a step of ResNet-20 is the sum of storages."""
    found = compare.measure(way, "resnet20", 96, 32, rounds=1, threads=2)
    assert found.peak.total == pytest.approx(found.resident, rel=tolerances.RESIDENT)
    assert found.peak.saved > found.peak.total / 2


def test_a_failing_process_is_told():
    with pytest.raises(
        RuntimeError, match="infopro_fast.memory.compare:_bytes_here .*nonsense(.|\n)*arch: expected one of"
    ):
        resident.in_a_process(
            "infopro_fast.memory.compare:_bytes_here", way=dict(modules=1), arch="nonsense", batch_size=1,
            image_size=32,
            device="cpu", threads=1,
        )
