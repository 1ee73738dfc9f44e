"""Plans: the best of all splits, the published splits, sums of blocks against steps, budgets, the file."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re

import pytest
import torch
from torch import nn

import infopro_fast
from infopro_fast import memory, planning
from infopro_fast.errors import ConfigError, PlanError
from infopro_fast.memory import compare as comparing
from infopro_fast.memory import figures
from infopro_fast.memory.command import CompareMemory
from infopro_fast.memory.ways import Measured, Way
from infopro_fast.modules import backbones, split
from infopro_fast.plan_file import Plan, for_people, parse_bytes
from infopro_fast.planning import best_cuts, chains, planner
from infopro_fast.planning import plan as make_plan
from infopro_fast.planning.released import with_released_losses
from infopro_fast.trainer import TrainConfig, released_sgd
from tests import compare
from tests.test_cli import assert_one_line, run_here

MIB = 2**20
GIB = 2**30


# ------------------------------------------------------------------------------------------------------------
# The dynamic programme


@pytest.mark.parametrize("seed", range(8))
def test_best_cuts_is_the_best_of_all_splits(seed):
    draw = random.Random(seed)
    n, modules = draw.randint(4, 9), draw.randint(1, 4)
    cost = {
        (a, b): sum(draw.randint(1, 20) for _ in range(a, b + 1)) + draw.randint(0, 30)
        for a in range(n)
        for b in range(a, n)
    }
    ends = sorted(draw.sample(range(n - 1), draw.randint(modules - 1, n - 1)))
    values = {}
    for cuts in itertools.combinations(ends, modules - 1):
        own = [cost[a, b] for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, n - 1])]
        values[cuts] = (max(own), sum(c * c for c in own), cuts)
    found = best_cuts(lambda a, b: cost[a, b], n, modules, lambda end: end in ends)
    assert found == min(values, key=values.get)


def test_best_cuts_errors():
    with pytest.raises(ValueError, match="modules: expected 1 to 3 for 3 blocks, got 4"):
        best_cuts(lambda a, b: 1, 3, 4)
    with pytest.raises(ValueError, match="expected at most 2: a module can end at 1 places, got 3"):
        best_cuts(lambda a, b: 1, 5, 3, lambda end: end == 2)


# ------------------------------------------------------------------------------------------------------------
# With the released losses' bytes


@functools.cache
def chain(arch: str, losses: str, recompute: str, batch_size: int, image_size: int | None):
    source = chains.Source(arch, image_size, local_loss=chains.usual_loss(arch), losses=losses)
    return planner.MeasuredChain(source, batch_size, recompute, timed=False)


def plan(
    arch, modules, objective="saved", losses="released", recompute="none", batch_size=4, image_size=None
) -> Plan:
    """`make_plan` with every network measured once."""
    return chain(arch, losses, recompute, batch_size, image_size).plan(modules, objective)


@pytest.mark.parametrize("modules", [2, 4])
@pytest.mark.parametrize("image_size", [32, 96])
def test_published_balanced_splits_are_found(modules, image_size):
    found = plan("resnet110", modules, image_size=image_size)
    if image_size == 32 and modules == 2:
        assert found == make_plan(
            "resnet110", batch_size=4, modules=2, local_loss="contrast", losses="released", objective="saved"
        )
    assert found.cuts == split.BALANCED["resnet110", image_size, modules]


# Largest module over end to end, what is kept for backward, the image counted in both: the best splits there
# are.
@pytest.mark.parametrize("modules, bar", [(2, 0.526), (3, 0.363), (4, 0.286), (8, 0.162), (16, 0.108)])
def test_resnet110_ratios(modules, bar):
    theirs, ours = plan("resnet110", modules), plan("resnet110", modules, losses="ours")
    image = 4 * 4 * 3 * 32 * 32
    ratio = max(theirs.modules[0].saved + image, *(m.saved for m in theirs.modules[1:])) / (
        theirs.end_to_end["saved"] + image
    )
    assert round(ratio, 3) <= bar
    assert ours.saved / ours.end_to_end["saved"] <= bar


def test_better_than_published():
    """K = 3: the published balanced split takes .379; K = 16: the equal one .131."""
    assert plan("resnet110", 3).cuts == ((1, 9), (2, 3))
    assert plan("resnet110", 8).cuts == ((1, 2), (1, 6), (1, 10), (1, 14), (2, 0), (2, 8), (2, 16))


@pytest.mark.parametrize(
    "arch, bar, saved",
    [
        ("resnet101", 0.565, 121.2),
        ("resnet152", 0.540, 169.5),
        ("resnext101_32x8d", 0.535, 235.6),
        ("deeplabv3_resnet101", 0.55, 3946),
    ],
)
@pytest.mark.fast(2)
def test_larger_networks(arch, bar, saved):
    """End to end, MiB a sample with the image, as in the authors' code; then the best two modules' share."""
    pytest.importorskip("torchvision")
    N = 2
    found = plan(arch, 2, batch_size=N)
    H, W = found.image_size
    image = 4 * N * 3 * H * W
    assert (found.end_to_end["saved"] + image) / N / MIB == pytest.approx(saved, rel=compare.TABLE)
    assert found.saved / found.end_to_end["saved"] <= bar


# ------------------------------------------------------------------------------------------------------------
# With ours


@pytest.mark.parametrize(
    "recompute, bars",
    [("none", {4: 0.27, 16: 0.085}), ("norm", {4: 0.215, 16: 0.07}), ("block", {4: 0.12, 16: 0.06})],
)
def test_saved_at_the_peak(recompute, bars):
    """ResNet-110, planned: what autograd keeps at most, over what it keeps end to end (8.05 MiB a sample)."""
    for modules, bar in bars.items():
        for objective in ("saved", "peak"):
            found = plan("resnet110", modules, objective, "ours", recompute)
            assert found.end_to_end["saved"] / 4 / MIB == pytest.approx(8.05, rel=compare.TABLE)
            assert found.saved <= bar * found.end_to_end["saved"], (modules, objective)


@pytest.mark.parametrize(
    "arch, modules, recompute, losses",
    [
        ("resnet32", 4, "none", "ours"), ("resnet32", 4, "norm", "ours"),
        ("resnet32", 3, "block", "ours"), ("resnet20", 1, "block", "ours"),
        ("resnet32", 4, "none", "released"), ("resnet50", 3, "none", "ours"),
        ("resnet50", 2, "none", "released"),
        ("deeplabv3_resnet101", 2, "none", "ours"), ("deeplabv3_resnet101", 1, "none", "released"),
    ],
)
@pytest.mark.fast(4)
def test_sums_of_blocks_are_the_step(arch, modules, recompute, losses):
    """Every module takes what a step of the planned network is measured to take."""
    N = 64 if arch in backbones.BLOCKS else 2
    found = plan(arch, modules, "peak", losses, recompute, N)
    with planning.FakeTensorMode(allow_non_fake_inputs=True):
        local_loss = "none" if modules == 1 else "contrast" if arch in backbones.BLOCKS else "softmax"
        of_loss = dict(local_loss=local_loss, lambdas=None if modules == 1 else (1, 1, 1, 1))
        size = found.image_size
        net = planning.build_fake(
            lambda: infopro_fast.build(arch, cuts=found.cuts, recompute=recompute, image_size=size, **of_loss)
        )
        net = with_released_losses(net) if losses == "released" else net
        image, label = chains.batch(chains.Source(arch, size).family(meta=True), N, real=False)
        step = memory.measure_step(infopro_fast.LocalTrainer(net, released_sgd(lr=0.1)), image, label)
    for planned, measured in zip(found.modules, step.modules, strict=True):
        assert planned.peak == pytest.approx(measured.peak.total, rel=compare.TABLE)
        assert planned.saved == pytest.approx(measured.saved, rel=compare.TABLE)
        assert planned.parameters == measured.parameters
    assert found.resident == pytest.approx(step.parameters + step.optimizer + step.batch, rel=compare.TABLE)


def test_smallest_number_of_modules_in_a_budget():
    found = make_plan("resnet32", batch_size=512, budget=GIB // 2)
    assert found.total <= GIB // 2
    with pytest.raises(
        PlanError, match=rf"does not fit into 512.0 MiB: it takes .* with {len(found.modules) - 1} module"
    ):
        make_plan("resnet32", batch_size=512, modules=len(found.modules) - 1, budget=GIB // 2)
    with pytest.raises(
        PlanError, match="resnet20 at batch 128 does not fit into 1.0 MiB: it takes .* with 10 modules"
    ):
        make_plan("resnet20", batch_size=128, budget=MIB)


def test_largest_batch_and_image_in_a_budget():
    found = planning.largest_batch("resnet20", image_size=32, modules=2, budget=100 * MIB)
    more = make_plan("resnet20", batch_size=found.batch_size + 1, image_size=32, modules=2)
    assert found.total <= 100 * MIB < more.total
    found = planning.largest_image("resnet20", 8, modules=2, budget=100 * MIB, recompute="block")
    side = found.image_size[0]
    more = make_plan("resnet20", batch_size=8, image_size=side + 8, modules=2, recompute="block")
    assert side % 8 == 0 and found.total <= 100 * MIB < more.total
    with pytest.raises(PlanError, match="a batch 1 is too large: .* does not fit into 1000.0 KiB"):
        planning.largest_batch("resnet20", image_size=32, modules=2, budget=1000 * 1024)


def test_balanced_time(monkeypatch):
    """The slowest module is as fast as possible; a block of the first stage takes ten times the others."""
    monkeypatch.setattr(planner.costs, "_best_of_three", lambda call: (call(), 0.0)[1])
    chain = planner.MeasuredChain(chains.Source("resnet20"), 2, "none", timed=True)
    blocks = [block._replace(seconds=10.0 if i < 4 else 1.0) for i, block in enumerate(chain.seconds.blocks)]
    chain.seconds = planner.ChainCosts(blocks, chain.seconds.losses, chain.seconds.image)
    assert chain.plan(4, "time").cuts == ((0, 0), (1, 0), (1, 1))
    assert [m.seconds for m in chain.plan(2, "time").modules] == [20, 26]
    assert make_plan("resnet20", batch_size=2, modules=2, objective="time").objective == "time"


def test_errors():
    for kwargs, message in (
        (dict(arch="resnet33", modules=2), "plan: resnet33, .* arch: expected one of .*, got 'resnet33'"),
        (dict(arch="resnet50", modules=18), "resnet50, 18 modules: expected 1 to 17 for 17 blocks"),
        (
            dict(arch="resnet50", modules=6, losses="released"),
            "resnet50, 6 modules: expected at most 5: a module can end at 4 places",
        ),
        (dict(arch="resnet20"), "plan: expected modules or a budget"),
        (dict(arch="resnet20", modules=11), "resnet20, 11 modules: expected 1 to 10 for 10 blocks"),
        (dict(arch="resnet20", modules=2, recompute="sqrt"), "plan: recompute: expected one of"),
        (dict(arch="resnet20", modules=2, image_size=(32, 64)), "resnet20 takes square images, got 32x64"),
        (dict(arch="resnet20", modules=0), "plan: modules: expected at least 1"),
    ):
        with pytest.raises(PlanError, match=message):
            make_plan(**{"batch_size": 2, **kwargs})


# ------------------------------------------------------------------------------------------------------------
# The file, the table, the commands


def test_file(tmp_path):
    found = plan("resnet20", 3, "peak", "ours")
    found.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == found and [p.name for p in tmp_path.iterdir()] == [
        "plan.json"
    ]
    no_plans = {
        "{}": "not a plan",
        "[1]": "not a plan",
        "plan": "not a plan",
        '{"infopro_fast plan": 9}': "version 1",
    }
    for content, message in no_plans.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(PlanError, match=f"bad.json: .*{message}"):
            Plan.read(tmp_path / "bad.json")
    with pytest.raises(PlanError, match="no such plan"):
        Plan.read(tmp_path / "none.json")


def test_training_takes_a_plan(tmp_path):
    path = tmp_path / "plan.json"
    make_plan("resnet20", batch_size=48, modules=3, recompute="block").write(path)
    found = TrainConfig(plan=path)
    written = Plan.read(path)
    assert (found.arch, found.cuts, found.recompute, found.batch_size, found.plan) == (
        "resnet20",
        written.cuts,
        "block",
        48,
        None,
    )
    assert TrainConfig.from_json(found.to_json()) == found and found.resolved().modules == 3
    assert TrainConfig(plan=path, batch_size=16).batch_size == 16
    for settings, message in (
        (dict(arch="resnet44"), "has arch resnet20, not resnet44"),
        (dict(modules=4), "modules 4 and cuts: expected 3 cuts, got 2"),
        (dict(recompute="sqrt"), "has recompute block, not sqrt"),
        (dict(dataset="stl10", data_root="x"), r"is for images of \(32, 32\), dataset stl10 has \(96, 96\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(plan=path, **settings)
    path.write_text("no plan")
    with pytest.raises(ConfigError, match="plan: .*plan.json: not a plan"):
        TrainConfig(plan=path)


def test_plan_command(capsys, tmp_path):
    out = tmp_path / "p.json"
    code, text, err = run_here(
        capsys, "plan", "--arch", "resnet20", "--batch-size", 64, "--modules", 2, "--out", out
    )
    found = Plan.read(out)
    assert code == 0 and err == "" and found == make_plan(
        "resnet20", batch_size=64, modules=2, local_loss="contrast"
    )
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for module in found.modules:
        assert re.search(
            rf"(?m)^\d +{re.escape(module.last)} +{module.blocks} .* {re.escape(for_people(module.peak))} ",
            text,
        ), text
    assert f"with the peak {for_people(found.total)}" in text
    code, text, err = run_here(
        capsys, "plan", "--arch", "resnet20", "--modules", 2, "--budget", "100MiB", "--out", out
    )
    how = dict(modules=2, budget=100 * MIB, local_loss="contrast")
    assert code == 0 and Plan.read(out) == planning.largest_batch("resnet20", **how)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arch resnet20", "plan: expected modules or a budget"),
        ("--arch resnet20 --budget much", "expected bytes like 4GiB, 500MiB or 3.5GB, got 'much'"),
        ("--arch resnet20 --modules 2 --grow image", "grow image: expected a budget and modules"),
        (
            "--arch resnet20 --modules 2 --budget 1GiB --grow batch --batch-size 3",
            "grow batch: expected no batch_size",
        ),
        (
            "--arch resnet20 --modules 2 --image-size 1 2 3",
            "image_size: expected a side, or height and width",
        ),
        ("--arch resnet20 --modules 2 --image-size 0", "image_size: expected at least 4, .* got 0"),
        ("--arch resnet20 --modules 2 --image-size 2", "image_size: expected at least 4, .* got 2"),
        (
            "--arch resnet20 --modules 2 --batch-size 1 --image-size 4",
            "batch 1: norm_relu_pool: x: expected more than 1 value",
        ),
        ("--arch resnet20 --modules 2 --batch-size 0", "batch_size: expected at least 1, got 0"),
        ("--arch resnet20 --modules 0 --budget 1GiB", "modules: expected at least 1, got 0"),
    ],
)
def test_plan_command_errors(capsys, tmp_path, flags, message):
    code, out, err = run_here(capsys, "plan", *flags.split(), "--out", tmp_path / "p.json")
    assert code == 2 and out == "" and re.search(message, err) and not list(tmp_path.iterdir())
    assert_one_line(err)


@pytest.mark.parametrize(
    "out, message", [("none/p.json", "there is no folder {}/none"), ("", "is a folder: expected a file")]
)
def test_plan_that_cannot_be_written_is_not_made(capsys, tmp_path, monkeypatch, out, message):
    monkeypatch.setattr(planner, "plan", lambda *a, **k: pytest.fail("measured"))
    code, _, err = run_here(capsys, "plan", "--arch", "resnet20", "--modules", 2, "--out", tmp_path / out)
    assert (
        code == 2
        and f"out: {tmp_path / out}" in err
        and message.format(tmp_path) in err
        and not list(tmp_path.iterdir())
    )
    assert_one_line(err)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 0", "batch_size: expected at least 1, got 0"),
        ("--image-size 0", "image_size: expected at least 4, got 0"),
        ("--rounds 0", "rounds: expected at least 1, got 0"),
        ("--threads 0", "threads: expected at least 1, got 0"),
        ("--modules 40", r"modules: expected 2 to 10 for resnet20 (stem and 9 blocks), got 40"),
        ("--modules 4 1", r"modules: expected 2 to 10 for resnet20 (stem and 9 blocks), got 1"),
        ("--budgets 1.5", "budgets: expected numbers in [0, 1], got 1.5"),
        ("--device abacus", "device: expected cpu, cuda or cuda:N, got 'abacus'"),
        ("--device cuda:99", "device: cuda:99: torch sees "),
    ],
)
def test_memory_command_errors(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(comparing, "measure", lambda *a, **k: pytest.fail("measured"))
    code, out, err = run_here(
        capsys, "memory", "--arch", "resnet20", "--modules", 4, *flags.split(), "--out", tmp_path / "m"
    )
    assert code == 2 and out == "" and message in err and not list(tmp_path.iterdir())
    assert_one_line(err)


@pytest.mark.slow
def test_memory_command(capsys, tmp_path, monkeypatch, cpu):
    monkeypatch.setattr(
        comparing, "ways", lambda modules, budgets: [Way(), *(Way(K, "block") for K in modules)]
    )
    flags = "--arch resnet20 --batch-size 16 --modules 2 --rounds 1 --threads 2 --budgets".split()
    code, out, _ = run_here(capsys, "memory", *flags, "--out", tmp_path / "m")
    assert code == 0
    rows = json.loads((tmp_path / "m" / "memory.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["E2E", "ours K=2 + recompute"]
    assert rows[1]["saved"] < rows[0]["saved"] / 3 and rows[1]["resident"] < rows[0]["resident"] / 2
    assert all(row["seconds"] > 0 and row["peak"]["saved"] > 0 for row in rows)
    table = (tmp_path / "m" / "memory.md").read_text()
    assert all(f"| {row['name']} |" in table and row["name"] in out for row in rows)
    assert (tmp_path / "m" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_for_people():
    assert [parse_bytes(text) for text in ("4GiB", "1.5 MiB", "2kb", "17", "3B")] == [
        4 * GIB,
        1572864,
        2000,
        17,
        3,
    ]
    for text in ("", "GiB", "-1GiB", "4 parsecs", "0", "nan"):
        with pytest.raises(PlanError, match="expected bytes like 4GiB|expected at least one byte"):
            parse_bytes(text)
    assert [for_people(n) for n in (5, 2048, 3 * MIB, 1.5 * GIB)] == ["5 B", "2.0 KiB", "3.0 MiB", "1.50 GiB"]


def test_table_of_a_comparison():
    """Only what autograd and the system see of compiled code is known."""
    base = Measured(Way(), 100, 90, 1000, planning.Bytes(0, 0, 900, 100), 1100, 2.0, 2.0)
    compiled = dataclasses.replace(base, way=Way(budget=0.5), saved=500, peak=None, resident=550, seconds=1.0)
    rows = figures.comparison_rows([base, compiled])
    assert rows[1][:5] == ["E2E compiled, budget 0.5", "500 B", "50.0 %", "?", "?"]
    assert rows[1][-4:] == ["550 B", "50.0 %", "1000 ms", "0.50"]
    assert [w.name for w in comparing.ways([4], [0.5])] == [
        "E2E", "E2E + norms rebuilt", "E2E checkpoint/block", "E2E checkpoint/sqrt",
        "E2E compiled, budget 0.5",
        "released K=4", "ours K=4", "ours K=4 + norms rebuilt", "ours K=4 + recompute",
    ]


def test_each_way_is_written_as_it_is_measured(tmp_path, monkeypatch):
    """The third fails: the two before it are on the disk."""
    measured = []

    def measure(way, *_, **__):
        if len(measured) == 2:
            raise RuntimeError("the third")
        bytes_of_purposes = planning.Bytes(0, 0, 900, 100)
        measured.append(Measured(way, 100, 90, 1000, bytes_of_purposes, 1100, 2.0, 2.0))
        return measured[-1]

    monkeypatch.setattr(comparing, "measure", measure)
    with pytest.raises(RuntimeError, match="the third"):
        CompareMemory(arch="resnet20", modules=(2,), budgets=(), out=tmp_path / "found").run()
    rows = json.loads((tmp_path / "found" / "memory.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["E2E", "E2E + norms rebuilt"]
    assert (tmp_path / "found" / "memory.png").stat().st_size > 0


def test_every_block_has_a_place():
    for arch in backbones.BLOCKS:
        net = chains.Source(arch).chain(real=True)
        assert len(net.positions) == len(net.stages) == len(net.local_losses)


# ------------------------------------------------------------------------------------------------------------
# Any network


def own_network() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (8, 8, 16, 16):
        layers += [nn.LazyConv2d(width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
    net(torch.randn(2, 3, 32, 32))
    return net


def test_a_network_of_ones_own_is_planned_and_stays_as_it_is():
    net = own_network()
    before = {name: (t.clone(), t.data_ptr()) for name, t in net.state_dict().items()}
    for objective in ("time", "peak"):
        found = make_plan(net, batch_size=8, modules=3, image_size=32, objective=objective)
        assert (found.arch, len(found.modules), found.image_size) == ("Sequential", 3, (32, 32))
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name][0]) and t.data_ptr() == before[name][1]
    built = infopro_fast.build(net, plan=found, local_loss="softmax", image_size=32)
    assert built.cuts == found.cuts
    with pytest.raises(ValueError, match=r"plan: expected one for image_size \(64, 64\), got \(32, 32\)"):
        infopro_fast.build(own_network(), plan=found, image_size=64)
    with pytest.raises(ValueError, match="plan: expected one for arch resnet20, got Sequential"):
        infopro_fast.build("resnet20", plan=found)


def test_planned_bytes_of_an_own_network_are_those_of_its_step():
    found = make_plan(own_network(), batch_size=16, modules=3, image_size=32)
    net = infopro_fast.build(
        own_network(), plan=found, local_loss="softmax", lambdas=(1, 1, 1, 1), image_size=32
    )
    trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.1))
    step = memory.measure_step(trainer, torch.rand(16, 3, 32, 32), torch.zeros(16, dtype=torch.long))
    for planned, measured in zip(found.modules, step.modules, strict=True):
        assert planned.peak == pytest.approx(measured.peak.total, rel=compare.TABLE)
        assert planned.saved == pytest.approx(measured.saved, rel=compare.TABLE)


def test_build_cuts_what_has_no_published_split_by_a_plan():
    found = make_plan("resnet20", batch_size=128, modules=3, local_loss="contrast")
    assert infopro_fast.build("resnet20", 3, balanced=True).cuts == found.cuts
    assert infopro_fast.build("resnet110", 4, balanced=True).cuts == split.BALANCED["resnet110", 32, 4]
    net = infopro_fast.build(own_network(), 3, "softmax", balanced=True, image_size=32)
    assert net.cuts == make_plan(own_network(), batch_size=32, modules=3, image_size=32).cuts


def test_build_takes_a_budget():
    budget = make_plan("resnet20", batch_size=64, modules=4, local_loss="contrast").total
    found = make_plan("resnet20", batch_size=64, budget=budget, local_loss="contrast")
    assert found.total <= budget and len(found.modules) <= 4
    assert infopro_fast.build("resnet20", budget=budget, batch_size=64).cuts == found.cuts
    with pytest.raises(PlanError, match="resnet20 at batch 64 does not fit into 1.0 MiB: it takes"):
        infopro_fast.build("resnet20", budget="1MiB", batch_size=64)
    for settings, message in (
        (dict(budget="1GiB", cuts=[(1, 0)]), "budget, cuts: expected one or the other"),
        (dict(balanced=True, plan="p.json"), "plan, balanced: expected one or the other"),
        (dict(budget="1GiB", local_loss="none"), "local_loss='none' trains end to end"),
        (dict(plan="p.json", modules=2), "plan, modules: the plan has its number of modules"),
        (dict(plan="p.json"), "p.json: no such plan"),
    ):
        with pytest.raises(ValueError, match=message):
            infopro_fast.build("resnet20", **settings)


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would():
    with pytest.raises(PlanError) as error:
        make_plan("resnet20", batch_size=128, modules=2, budget="8MiB")
    took = {
        (K, how): make_plan("resnet20", batch_size=128, modules=K, recompute=how).total
        for K in range(1, 11) for how in ("none", "block")
    }  # fmt: skip
    (none, K), (block, L) = (min((took[K, how], K) for K in range(1, 11)) for how in ("none", "block"))
    given, none, block = (for_people(n) for n in (took[2, "none"], none, block))
    expected = f"it takes {given} with 2 modules; {K} modules would take {none}; with recompute 'block' "
    assert expected + f"{L} modules would take {block}; a smaller batch takes less" in str(error.value)


def test_one_module_that_keeps_nearly_everything_is_told():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(8)])

        def forward(self, x):
            maps = [x]
            for conv in self.convs:
                maps.append(conv(maps[-1]).relu())
            return sum(maps)

    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Whole(), *end)
    with pytest.warns(UserWarning, match="the module that ends with block 0.1 keeps 100% of what end to"):
        make_plan(net, batch_size=4, modules=2, image_size=64)


@pytest.mark.parametrize(
    "arch, message",
    [
        ("torchvision:resnet_18", "torchvision has no 'resnet_18'; did you mean resnet18"),
        ("tests.test_plan:no_network", "tests.test_plan has no 'no_network'; did you mean own_network"),
        ("no_package:net", "no_package:net needs no_package, which is not installed"),
        (":net", "expected one of .*, timm:NAME or package.module:function, .*got ':net'"),
        ("resnet33", "expected one of .*, timm:NAME or package.module:function, .*got 'resnet33'"),
    ],
)
def test_names_of_networks(arch, message):
    with pytest.raises((ValueError, ImportError), match=message):
        infopro_fast.build(arch)


def test_networks_of_other_packages_by_name():
    pytest.importorskip("torchvision")
    net = infopro_fast.build("torchvision:vgg11_bn", 2, "greedy", num_classes=7, image_size=32)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    net = infopro_fast.build("tests.test_plan:own_network", 2, "greedy", image_size=32)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    options = {"width_per_group": 64}
    net = infopro_fast.build("torchvision:resnet18", 2, "greedy", arch_args=options, num_classes=5)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="resnet18 with the arguments .*depth.*unexpected keyword"):
        infopro_fast.build("torchvision:resnet18", arch_args={"depth": 5})


# Peak of a step over end to end, our losses and nothing recomputed.
@pytest.mark.parametrize(
    "arch, modules, batch_size, bar",
    [("resnet101", 4, 32, 0.38), ("resnet101", 7, 32, 0.25), ("resnet152", 4, 32, 0.38),
     ("deeplabv3_resnet101", 4, 4, 0.30)],
)  # fmt: skip
@pytest.mark.fast(2)
def test_peaks_of_large_networks(arch, modules, batch_size, bar):
    pytest.importorskip("torchvision")
    found = make_plan(arch, batch_size=batch_size, modules=modules)
    assert found.peak <= bar * found.end_to_end["peak"]
