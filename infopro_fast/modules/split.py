"""Where local modules end: the authors' tables (networks/configs.py), and a rule for other networks and K.

A cut (stage, block) is the last unit of a local module; stage 0 is the stem. K modules have K - 1 cuts: the
last module is the rest of the network.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

Cut = tuple[int, int]


def _stage(stage: int, *blocks: int) -> tuple[Cut, ...]:
    return tuple((stage, block) for block in blocks)


EQUAL: dict[tuple[str, int], tuple[Cut, ...]] = {
    ("resnet32", 2): _stage(2, 1),
    ("resnet32", 3): (*_stage(1, 4), *_stage(2, 4)),
    ("resnet32", 4): (*_stage(1, 2), *_stage(2, 1), *_stage(3, 0)),
    ("resnet32", 8): (*_stage(1, 0, 2, 4), *_stage(2, 1, 3), *_stage(3, 0, 2)),
    ("resnet32", 16): (
        *_stage(0, 0), *_stage(1, 0, 1, 2, 3, 4), *_stage(2, 0, 1, 2, 3, 4), *_stage(3, 0, 1, 2, 3),
    ),
    ("resnet110", 2): _stage(2, 8),
    ("resnet110", 3): (*_stage(1, 17), *_stage(2, 17)),
    ("resnet110", 4): (*_stage(1, 11), *_stage(2, 7), *_stage(3, 3)),
    ("resnet110", 8): (*_stage(1, 4, 11), *_stage(2, 0, 7, 14), *_stage(3, 3, 10)),
    ("resnet110", 16): (
        *_stage(1, 1, 4, 7, 10, 13, 16), *_stage(2, 1, 4, 7, 11, 15), *_stage(3, 1, 5, 9, 13),
    ),
}

# The only published splits of the larger networks (InfoPro*, K = 2).
PUBLISHED: dict[tuple[str, int], tuple[Cut, ...]] = {
    ("resnet101", 2): _stage(2, 0),
    ("resnet152", 2): _stage(2, 5),
    ("resnext101_32x8d", 2): _stage(2, 2),
    ("deeplabv3_resnet101", 2): _stage(3, 12),
}

# The paper's InfoPro*: equal memory instead of equal depth. Key: architecture, image size, modules.
BALANCED: dict[tuple[str, int, int], tuple[Cut, ...]] = {
    ("resnet110", 32, 2): _stage(1, 14),
    ("resnet110", 32, 3): (*_stage(1, 9), *_stage(2, 2)),
    ("resnet110", 32, 4): (*_stage(1, 6, 14), *_stage(2, 8)),
    ("resnet110", 96, 2): _stage(1, 14),
    ("resnet110", 96, 3): (*_stage(1, 8), *_stage(2, 1)),
    ("resnet110", 96, 4): (*_stage(1, 6, 14), *_stage(2, 8)),
}


def has_balanced(arch: str, image_size: tuple[int, int], modules: int | None) -> bool:
    return (arch, image_size[0], 4 if modules is None else modules) in BALANCED


def split(
    arch: str, positions: Sequence[Cut], modules: int, *, balanced: bool, image_size: int
) -> tuple[Cut, ...]:
    """Return the cuts of ``arch`` into ``modules`` local modules. positions: of its units, in order.

    balanced=False: the authors' table. For other depths and K the numbers of units (stem and blocks) differ
    by at most one, the larger modules last, as in the authors' ResNet-110 with K = 4, 8 and 16.
    balanced=True: the authors' table, for what `has_balanced`. Raises ValueError saying what exists.
    """
    units = len(positions)
    if not 1 <= modules <= units:
        expected = f"1 to {units} for {arch} (stem and {units - 1} blocks)"
        raise ValueError(f"build: modules: expected {expected}, got {modules}")
    if modules == 1:
        return ()
    if (arch, modules) in PUBLISHED:
        return PUBLISHED[arch, modules]
    if balanced:
        return BALANCED[arch, image_size, modules]
    if (arch, modules) in EQUAL:
        return EQUAL[arch, modules]
    small, larger = divmod(units, modules)
    ends, end = [], -1
    for module in range(modules - 1):
        end += small + (module >= modules - larger)
        ends.append(positions[end])
    return tuple(ends)


def check_cuts(
    arch: str, positions: Sequence[Cut], cuts: Sequence[Sequence[int] | str], modules: int,
    labels: Sequence[str] = (), reasons: Mapping[str, str] | None = None,
) -> tuple[Cut, ...]:
    """Return a user's cuts as tuples, after a check: modules - 1 units of ``arch``, in order, each once.

    labels: names of the units; a cut may be a name too. reasons: why a module cannot end at other names.
    """
    found: list = []
    for cut in cuts:
        if isinstance(cut, str):
            if cut not in labels:
                why = f"; expected one of {tuple(filter(None, labels))[:-1]}"
                if reasons and cut in reasons:
                    why = f": {reasons[cut]}"
                raise ValueError(f"build: cuts: no module of {arch} can end with {cut!r}{why}")
            cut = positions[labels.index(cut)]
        try:
            cut = tuple(operator.index(i) for i in cut)
        except TypeError as error:
            expected = "pairs (stage, block) of integers, or names"
            raise ValueError(f"build: cuts: expected {expected}, got {cut!r}") from error
        if cut not in positions[:-1]:
            expected = f"(stage, block) of {arch} from (0, 0) to the one before {positions[-1]}"
            raise ValueError(f"build: cuts: expected {expected}, got {cut}")
        found.append(cut)
    if found != sorted(set(found)):
        raise ValueError(f"build: cuts: expected increasing (stage, block) pairs, got {tuple(found)}")
    if len(found) != modules - 1:
        expected, got = f"{modules - 1} of them for modules={modules}", f"{len(found)}: {tuple(found)}"
        raise ValueError(f"build: cuts: expected {expected}, got {got}")
    return tuple(found)
