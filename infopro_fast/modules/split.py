"""Where local modules end: the released tables (networks/configs.py), and a rule for what they leave out.

A cut (stage, block) is the last unit of a local module; stage 0 is the stem. K modules have K - 1 cuts, the rest of the
network being the last module.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

Cut = tuple[int, int]


def _stage(stage: int, *blocks: int) -> tuple[Cut, ...]:
    return tuple((stage, block) for block in blocks)


EQUAL: dict[tuple[str, int], tuple[Cut, ...]] = {
    ("resnet32", 2): _stage(2, 1),
    ("resnet32", 3): (*_stage(1, 4), *_stage(2, 4)),
    ("resnet32", 4): (*_stage(1, 2), *_stage(2, 1), *_stage(3, 0)),
    ("resnet32", 8): (*_stage(1, 0, 2, 4), *_stage(2, 1, 3), *_stage(3, 0, 2)),
    ("resnet32", 16): (*_stage(0, 0), *_stage(1, 0, 1, 2, 3, 4), *_stage(2, 0, 1, 2, 3, 4), *_stage(3, 0, 1, 2, 3)),
    ("resnet110", 2): _stage(2, 8),
    ("resnet110", 3): (*_stage(1, 17), *_stage(2, 17)),
    ("resnet110", 4): (*_stage(1, 11), *_stage(2, 7), *_stage(3, 3)),
    ("resnet110", 8): (*_stage(1, 4, 11), *_stage(2, 0, 7, 14), *_stage(3, 3, 10)),
    ("resnet110", 16): (*_stage(1, 1, 4, 7, 10, 13, 16), *_stage(2, 1, 4, 7, 11, 15), *_stage(3, 1, 5, 9, 13)),
}

# The one published split of the larger networks (InfoPro*, its K = 2).
PUBLISHED: dict[tuple[str, int], tuple[Cut, ...]] = {
    ("resnet101", 2): _stage(2, 0),
    ("resnet152", 2): _stage(2, 5),
    ("resnext101_32x8d", 2): _stage(2, 2),
    ("deeplabv3_resnet101", 2): _stage(3, 12),
}

# InfoPro* of the paper: equal memory rather than equal depth. Keyed by architecture, image size, number of modules.
BALANCED: dict[tuple[str, int, int], tuple[Cut, ...]] = {
    ("resnet110", 32, 2): _stage(1, 14),
    ("resnet110", 32, 3): (*_stage(1, 9), *_stage(2, 2)),
    ("resnet110", 32, 4): (*_stage(1, 6, 14), *_stage(2, 8)),
    ("resnet110", 96, 2): _stage(1, 14),
    ("resnet110", 96, 3): (*_stage(1, 8), *_stage(2, 1)),
    ("resnet110", 96, 4): (*_stage(1, 6, 14), *_stage(2, 8)),
}


def split(arch: str, positions: Sequence[Cut], modules: int, *, balanced: bool, image_size: int) -> tuple[Cut, ...]:
    """The cuts of ``arch``, whose units are at ``positions``, into ``modules`` local modules.

    balanced=False: the released table, or for a depth and K it does not have: sizes in units (stem and blocks) that differ by
    at most one, the larger modules last (as in the released ResNet-110 at K = 4, 8 and 16; maps shrink with depth).
    balanced=True: the released tables only. Raises ValueError saying what exists.
    """
    if not 1 <= modules <= len(positions):
        raise ValueError(f"build: modules: expected 1 to {len(positions)} for {arch} (stem and {len(positions) - 1} blocks), got {modules}")
    if modules == 1:
        return ()
    if (arch, modules) in PUBLISHED:
        return PUBLISHED[arch, modules]
    if balanced:
        if (arch, image_size, modules) not in BALANCED:
            raise ValueError(
                f"build: balanced: expected one of (arch, image_size, modules) in {sorted(BALANCED)}, got {(arch, image_size, modules)}; "
                "give `cuts` for another split"
            )
        return BALANCED[arch, image_size, modules]
    if (arch, modules) in EQUAL:
        return EQUAL[arch, modules]
    small, larger = divmod(len(positions), modules)
    ends, end = [], -1
    for module in range(modules - 1):
        end += small + (module >= modules - larger)
        ends.append(positions[end])
    return tuple(ends)


def check_cuts(
    arch: str, positions: Sequence[Cut], cuts: Sequence[Sequence[int] | str], modules: int, labels: Sequence[str] = (), reasons=None
) -> tuple[Cut, ...]:
    """``cuts`` given by the user as tuples, checked: units of ``arch``, in order, none twice, modules - 1 of them.

    labels: names of the units, by which they may be given too. reasons: why a module cannot end at other places, by name.
    """
    found = []
    for cut in cuts:
        if isinstance(cut, str):
            if cut not in labels:
                why = f": {reasons[cut]}" if reasons and cut in reasons else f"; expected one of {tuple(filter(None, labels))[:-1]}"
                raise ValueError(f"build: cuts: no module of {arch} can end with {cut!r}{why}")
            cut = positions[labels.index(cut)]
        try:
            cut = tuple(operator.index(i) for i in cut)
        except TypeError as error:
            raise ValueError(f"build: cuts: expected pairs (stage, block) of integers, or names, got {cut!r}") from error
        if cut not in positions[:-1]:
            last = positions[-1]
            raise ValueError(f"build: cuts: expected (stage, block) of {arch} from (0, 0) to the one before {last}, got {cut}")
        found.append(cut)
    if found != sorted(set(found)):
        raise ValueError(f"build: cuts: expected increasing (stage, block) pairs, each once, got {tuple(found)}")
    if len(found) != modules - 1:
        raise ValueError(f"build: cuts: expected {modules - 1} of them for modules={modules}, got {len(found)}: {tuple(found)}")
    return tuple(found)
