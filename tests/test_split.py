"""Splits: the authors' tables as in the golden cases, equal sizes elsewhere, and refusals."""

from __future__ import annotations

import pytest

from infopro_fast.modules import backbones, split
from tests import golden


def _positions(arch: str) -> list[tuple[int, int]]:
    return [(0, 0)] + [(stage, block) for stage in (1, 2, 3) for block in range(backbones.BLOCKS[arch])]


def _sizes(positions, cuts) -> list[int]:
    ends = [-1, *(positions.index(cut) for cut in cuts), len(positions) - 1]
    return [b - a for a, b in zip(ends, ends[1:])]


@pytest.mark.parametrize(
    "case", golden.cases("train_step"), ids=lambda c: f"{c['arch']}-{c['modules']}-{c['balanced']}"
)
def test_tables_are_the_released_ones(case):
    # The authors' code names an auxiliary net by the (stage, block) its module ends with.
    named = [
        tuple(int(i) for i in name.split("_")[1:])
        for name, _ in case["local_losses"]
        if name.startswith("decoder")
    ]
    found = split.split(
        case["arch"], _positions(case["arch"]), case["modules"], balanced=case["balanced"], image_size=32
    )
    assert list(found) == named


@pytest.mark.parametrize("arch, modules", split.EQUAL)
def test_equal_tables_differ_by_at_most_one_unit(arch, modules):
    sizes = _sizes(_positions(arch), split.EQUAL[arch, modules])
    assert len(sizes) == modules and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("arch", backbones.BLOCKS)
def test_every_depth_and_k_has_an_equal_split(arch):
    positions = _positions(arch)
    for modules in range(1, len(positions) + 1):
        sizes = _sizes(positions, split.split(arch, positions, modules, balanced=False, image_size=32))
        assert (
            len(sizes) == modules
            and sum(sizes) == len(positions)
            and min(sizes) >= 1
            and max(sizes) - min(sizes) <= 1
        )
        if (arch, modules) not in split.EQUAL:
            assert sizes == sorted(sizes)


@pytest.mark.parametrize("arch, modules", [key for key in split.EQUAL if key[1] in (2, 4, 8, 16)])
def test_the_rule_continues_the_tables(arch, modules, monkeypatch):
    positions, published = _positions(arch), split.EQUAL[arch, modules]
    monkeypatch.setattr(split, "EQUAL", {})
    rule = split.split(arch, positions, modules, balanced=False, image_size=32)
    assert sorted(_sizes(positions, rule)) == sorted(_sizes(positions, published))


def test_balanced_tables():
    positions = _positions("resnet110")
    assert split.split("resnet110", positions, 3, balanced=True, image_size=32) == ((1, 9), (2, 2))
    assert split.split("resnet110", positions, 3, balanced=True, image_size=96) == ((1, 8), (2, 1))
    assert not split.has_balanced("resnet32", (32, 32), 4)  # a plan cuts it: tests/test_plan.py


def test_modules_out_of_range():
    with pytest.raises(ValueError, match="modules: expected 1 to 10 for resnet20"):
        split.split("resnet20", _positions("resnet20"), 11, balanced=False, image_size=32)
    with pytest.raises(ValueError, match="modules: expected 1 to 10"):
        split.split("resnet20", _positions("resnet20"), 0, balanced=False, image_size=32)


@pytest.mark.parametrize(
    "cuts, modules, message",
    [
        ([(1, 5)], 2, r"cuts: expected \(stage, block\) of resnet32"),
        ([(3, 4)], 2, "cuts: expected"),  # nothing would be left for the last module
        ([(2, 0), (1, 0)], 3, "cuts: expected increasing"),
        ([(1, 0), (1, 0)], 3, "cuts: expected increasing"),
        ([(1, 0)], 3, "cuts: expected 2 of them for modules=3, got 1"),
    ],
)
def test_bad_cuts(cuts, modules, message):
    with pytest.raises(ValueError, match=message):
        split.check_cuts("resnet32", _positions("resnet32"), cuts, modules)


def test_cuts_from_lists():
    assert split.check_cuts("resnet32", _positions("resnet32"), [[0, 0], [1, 3]], 3) == ((0, 0), (1, 3))
