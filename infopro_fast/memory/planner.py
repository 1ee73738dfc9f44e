"""Where to cut: the split whose largest module is smallest, by dynamic programming over measured costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from infopro_fast.errors import PlanError
from infopro_fast.plan import Plan, PlannedModule, for_people

from . import chains, costs, fake
from .costs import ChainCosts
from .live import nbytes

Cost = Callable[[int, int], float]


def best_cuts(
    cost: Cost, blocks: int, modules: int, allowed: Callable[[int], bool] = lambda end: True
) -> tuple[int, ...]:
    """Return the last block of every module but the last; the most expensive module is as cheap as possible.

    cost: of the module from block a to block b, both included (0 to blocks - 1). modules: K, 1 to blocks.
    allowed: whether a module other than the last can end with a block.

    Among equal splits the sum of squared costs decides, so that the other modules are small too; then the
    earliest cuts.
    Raises ValueError if there is no split into K modules. Takes O(K blocks^2) costs.
    """
    if not 1 <= modules <= blocks:
        raise ValueError(f"best_cuts: modules: expected 1 to {blocks} for {blocks} blocks, got {modules}")
    ends = [end for end in range(blocks - 1) if allowed(end)]
    if len(ends) < modules - 1:
        places = f"a module can end at {len(ends)} places"
        raise ValueError(f"best_cuts: modules: expected at most {len(ends) + 1}: {places}, got {modules}")
    known: dict[tuple[int, int], float] = {}

    def once(a: int, b: int) -> float:
        if (a, b) not in known:
            known[a, b] = cost(a, b)
        return known[a, b]

    least = _search(once, blocks, modules, ends, lambda largest, own: max(largest, own), math.inf)[0]
    return _search(once, blocks, modules, ends, lambda total, own: total + own * own, least)[1]


def spans_of(cuts: Sequence[int], blocks: int) -> list[tuple[int, int]]:
    """Return the first and last block of every module."""
    ends = (*cuts, blocks - 1)
    return list(zip((0, *(end + 1 for end in cuts)), ends))


def _search(
    cost: Cost, blocks: int, modules: int, ends: list[int], add: Callable[[float, float], float], most: float
) -> tuple[float, tuple[int, ...]]:
    """Return value and cuts of the best split whose modules cost at most ``most``. add: cost to value."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}  # by the last block so far
    for module in range(modules):
        last = module == modules - 1
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in [blocks - 1] if last else ends:
            for before, (value, cuts) in best.items():
                if before >= end:
                    continue
                own = cost(before + 1, end)
                if own > most:
                    continue
                found = (add(value, own), cuts if last else (*cuts, end))
                if end not in following or found < following[end]:
                    following[end] = found
        best = following
    return best[blocks - 1]


# ------------------------------------------------------------------------------------------------------------
# Plans

OBJECTIVES = ("peak", "saved", "time")
LOSSES = ("ours", "released")
RECOMPUTE = ("none", "norm", "block")


def make_plan(
    arch: str,
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
    *,
    modules: int | None = None,
    budget: int | None = None,
    recompute: str = "none",
    losses: str = "ours",
    objective: str = "peak",
) -> Plan:
    """Return the best split of ``arch`` into ``modules``, or into as few as fit into ``budget``.

    Only the objective "time" runs anything.

    arch: one of `chains.ARCHS`. image_size: side, or (height, width); None: the published size.
    modules: K. None: the smallest K that fits; K = 1 is end to end.
    budget: bytes for parameters, optimizer state (SGD with momentum), the batch, gradients and the step's
        peak. With ``modules`` it is only checked whether they fit.
    recompute: "none", "norm" or "block", as in `build`. losses: "ours", or "released", the authors'.
    objective: what the largest module needs least of: "peak" (bytes alive), "saved" (bytes kept for backward,
        with the image, as the paper's tables count), or "time" (seconds of forward and backward, measured
        here, for a pipeline).

    Raises PlanError if nothing fits, and for arguments out of range.
    """
    _check(objective, losses, recompute, modules, budget, batch_size)
    size = image_sides(arch, image_size)
    if modules is None and budget is None:
        raise PlanError("plan: expected modules or a budget")
    try:
        chain = MeasuredChain(arch, batch_size, size, recompute, losses, objective == "time")
    except PlanError:
        raise
    except (ValueError, ImportError) as error:  # of `build`, or of a batch norm with a single value
        raise PlanError(f"{arch}, batch {batch_size} of images {size[0]}x{size[1]}: {error}") from error
    for K in range(1, len(chain.costs) + 1) if modules is None else [modules]:
        try:
            plan = chain.plan(K, objective)
        except ValueError as error:
            raise PlanError(f"{arch}, {K} modules: {error}".replace("best_cuts: modules: ", "")) from error
        if budget is None or plan.total <= budget:
            return plan
        if modules is None and K >= chain.most_modules:
            break
    least = f"{for_people(plan.total)} with {len(plan.modules)} module{'s' * (len(plan.modules) > 1)}"
    raise PlanError(f"{arch} at batch {batch_size} does not fit into {for_people(budget)}: it takes {least}")


def largest_batch(
    arch: str, image_size: int | tuple[int, int] | None, *, modules: int, budget: int, **options: str
) -> Plan:
    """Return the plan of the largest batch that fits into ``budget`` bytes; options as in `make_plan`."""
    how: dict[str, Any] = dict(modules=modules, budget=budget, **options)
    return _largest(lambda n: make_plan(arch, n, image_size, **how), f"{arch}: a batch", 1)


def largest_image(
    arch: str, batch_size: int, *, modules: int, budget: int, step: int = 8, **options: str
) -> Plan:
    """Return the plan of the largest square image that fits, its side a multiple of ``step`` pixels."""
    how: dict[str, Any] = dict(modules=modules, budget=budget, **options)
    return _largest(lambda n: make_plan(arch, batch_size, step * n, **how), f"{arch}: images of {step}", step)


def _largest(make: Callable[[int], Plan], what: str, unit: int) -> Plan:
    """Return the plan of the largest n that has one, by doubling and then bisection."""
    fits, plan = 0, None
    too_large = None
    n = 1
    while too_large is None or too_large - fits > 1:
        try:
            plan, fits = make(n), n
        except PlanError as error:
            too_large = n
            if n == 1:
                raise PlanError(f"{what} {unit} is too large: {error}") from error
        n = 2 * fits if too_large is None else (fits + too_large) // 2
    return plan


class MeasuredChain:
    """A network measured block by block for one batch."""

    def __init__(
        self, arch: str, batch_size: int, size: tuple[int, int], recompute: str, losses: str, timed: bool
    ):
        self.arch, self.batch_size, self.size = arch, batch_size, size
        self.recompute, self.losses = recompute, losses
        with fake.FakeTensorMode():
            image, label = chains.batch(arch, batch_size, size, real=False)
            self.net = fake.build_fake(lambda: chains.chain(arch, size, losses, recompute))
            self.costs = costs.measure_chain(self.net, image, label, recompute=recompute)
            self.plain = ChainCosts(self.costs.blocks, self.costs.losses, self.costs.image)
            if recompute == "norm":  # the blocks above keep less than end to end
                plain = fake.build_fake(lambda: chains.chain(arch, size, losses))
                self.plain = costs.measure_chain(plain, image, label)
            self.batch_bytes = nbytes([image, label])
        self.buffers = nbytes(self.net.buffers())
        if timed:
            net = chains.chain(arch, size, losses, recompute)
            image, label = chains.batch(arch, batch_size, size, real=True)
            self.seconds = costs.measure_chain(net, image, label, timed=True)

    @property
    def most_modules(self) -> int:
        return 1 + sum(self.costs.cut_allowed(end) for end in range(len(self.costs) - 1))

    def plan(self, modules: int, objective: str) -> Plan:
        n, costs = len(self.costs), self.costs
        cost = {
            "peak": costs.peak,
            "saved": lambda a, b: costs.saved(a, b, count_image=True),
            "time": lambda a, b: self.seconds.seconds(a, b),
        }[objective]
        spans, found = spans_of(best_cuts(cost, n, modules, costs.cut_allowed), n), []
        for a, b in spans:
            parameters = costs.losses[b].parameters + sum(c.parameters for c in costs.blocks[a : b + 1])
            seconds = self.seconds.seconds(a, b) if objective == "time" else 0.0
            name = ".".join(str(i) for i in self.net.positions[b])
            saved, peak = costs.saved(a, b), costs.peak(a, b)
            found.append(PlannedModule(name, b - a + 1, saved, peak, parameters, seconds))
        resident = 2 * sum(module.parameters for module in found) + self.buffers + self.batch_bytes
        end_to_end = {"peak": self.plain.peak(0, n - 1), "saved": self.plain.saved(0, n - 1)}
        cuts = tuple(self.net.positions[end] for _, end in spans[:-1])
        what = (self.arch, self.size, self.batch_size, cuts, self.recompute, self.losses, objective)
        return Plan(*what, tuple(found), resident, end_to_end)


def image_sides(arch: str, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images; None: the published size."""
    if image_size is None:
        return chains.published_size(arch)
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if min(size) < 4:
        raise PlanError(f"plan: image_size: expected at least 4, got {size[0]}x{size[1]}")
    return size


def _check(
    objective: str, losses: str, recompute: str, modules: int | None, budget: int | None, batch_size: int
) -> None:
    choices = {"objective": OBJECTIVES, "losses": LOSSES, "recompute": RECOMPUTE}
    for (name, known), value in zip(choices.items(), (objective, losses, recompute)):
        if value not in known:
            raise PlanError(f"plan: {name}: expected one of {known}, got {value!r}")
    for name, count in (("modules", modules), ("budget", budget), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise PlanError(f"plan: {name}: expected at least 1, got {count}")
