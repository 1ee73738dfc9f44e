"""Where to cut: the split whose largest module is smallest, by dynamic programming over measured costs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from infopro_fast.errors import PlanError
from infopro_fast.modules import LocalLoss, Place
from infopro_fast.plan_file import Plan, PlannedModule, for_people, parse_bytes

from . import chains, costs
from .chains import Source
from .costs import ChainCosts
from .fake import FakeTensorMode
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
NEARLY_ALL = 0.9  # of what end to end keeps: a module with more is worth a warning


def plan(
    arch: str | nn.Module,
    *,
    batch_size: int,
    modules: int | None = None,
    budget: int | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    arch_args: Mapping[str, Any] | None = None,
    local_loss: str | Callable[[Place], LocalLoss] = "softmax",
    recompute: str = "none",
    losses: str = "ours",
    objective: str = "peak",
) -> Plan:
    """Return the best split of a network into ``modules``, or into as few as fit into ``budget``.

    Tensors have shapes and no values, so a plan of any size needs little memory. Only the objective "time"
    runs anything. Networks of your own are not changed.

    arch, image_size, num_classes, arch_args, local_loss, recompute: as in `build`, which takes the result as
        ``plan``. A loss is measured as if a module ended with each block. recompute: not "sqrt".
    batch_size: images in a step.
    modules: K. None: the smallest K that fits; K = 1 is end to end.
    budget: bytes, or a text like "8GiB", for parameters, optimizer state (SGD with momentum), the batch,
        gradients and the step's peak. With ``modules`` it is only checked whether they fit.
    losses: "ours", or "released", the authors'.
    objective: what the largest module needs least of: "peak" (bytes alive), "saved" (bytes kept for backward,
        with the image, as the paper's tables count), or "time" (seconds of forward and backward, measured
        here, for a pipeline).

    Raises PlanError if nothing fits, which says what would, and for arguments out of range. Warns if one
    module keeps nearly everything.
    """
    size = parse_bytes(budget) if isinstance(budget, str) else budget
    _check(objective, losses, recompute, modules, size, batch_size)
    if modules is None and size is None:
        raise PlanError("plan: expected modules or a budget")
    source = Source(arch, image_size, num_classes, arch_args, local_loss=local_loss, losses=losses)
    chain = MeasuredChain(source, batch_size, recompute, objective == "time")
    found = fitting(chain, modules, size, objective)
    largest = max(found.modules, key=lambda module: module.saved)
    if len(found.modules) > 1 and largest.saved > NEARLY_ALL * found.end_to_end["saved"]:
        share = largest.saved / found.end_to_end["saved"]
        what = f"the module that ends with block {largest.last} keeps {share:.0%} of what end to end keeps"
        warnings.warn(f"plan: {found.arch}: {what}: cutting it there saves little", stacklevel=2)
    return found


def fitting(chain: MeasuredChain, modules: int | None, budget: int | None, objective: str) -> Plan:
    """Return the plan with ``modules``, or the first that fits. Raises PlanError that says what would fit."""
    for K in range(1, len(chain.costs) + 1) if modules is None else [modules]:
        try:
            found = chain.plan(K, objective)
        except ValueError as error:
            reason = str(error).removeprefix("best_cuts: modules: ")
            raise PlanError(f"{chain.name}, {K} modules: {reason}") from error
        if budget is None or found.total <= budget:
            return found
        if modules is None and K >= chain.most_modules:
            break
    least = f"{for_people(found.total)} with {len(found.modules)} module{'s' * (len(found.modules) > 1)}"
    does_not = f"{chain.name} at batch {chain.batch_size} does not fit into {for_people(budget)}"
    raise PlanError(f"{does_not}: it takes {least}{_advice(chain, found, objective)}")


def _advice(chain: MeasuredChain, found: Plan, objective: str) -> str:
    """Return what would take less than a plan that does not fit."""
    ways = [("", chain)] + [("with recompute 'block' ", chain.recomputed())] * (chain.recompute == "none")
    less = []
    for how, other in ways:
        total, K = min((other.plan(K, objective).total, K) for K in range(1, chain.most_modules + 1))
        if total < found.total:
            less.append(f"{how}{K} module{'s' * (K > 1)} would take {for_people(total)}")
    less += ["a smaller batch takes less"] if chain.batch_size > 1 else []
    return "".join(f"; {what}" for what in less)


def largest_batch(arch: str | nn.Module, *, modules: int, budget: int | str, **options: Any) -> Plan:
    """Return the plan of the largest batch that fits into ``budget`` bytes; options as in `plan`."""
    how: dict[str, Any] = dict(modules=modules, budget=budget, **options)
    return _largest(lambda n: plan(arch, batch_size=n, **how), "a batch", 1)


def largest_image(
    arch: str | nn.Module, batch_size: int, *, modules: int, budget: int | str, step: int = 8, **options: Any
) -> Plan:
    """Return the plan of the largest square image that fits, its side a multiple of ``step`` pixels."""
    how: dict[str, Any] = dict(batch_size=batch_size, modules=modules, budget=budget, **options)
    return _largest(lambda n: plan(arch, image_size=step * n, **how), f"an image of {step}", step)


def _largest(make: Callable[[int], Plan], what: str, unit: int) -> Plan:
    """Return the plan of the largest n that has one, by doubling and then bisection."""
    fits, found = 0, None
    too_large = None
    n = 1
    while too_large is None or too_large - fits > 1:
        try:
            found, fits = make(n), n
        except PlanError as error:
            too_large = n
            if n == 1:
                raise PlanError(f"{what} {unit} is too large: {error}") from error
        n = 2 * fits if too_large is None else (fits + too_large) // 2
    return found


class MeasuredChain:
    """A network measured block by block for one batch. Raises PlanError for what `build` refuses."""

    def __init__(self, source: Source, batch_size: int, recompute: str, timed: bool):
        self.source, self.batch_size, self.recompute = source, batch_size, recompute
        try:
            self._measure(timed)
        except (ValueError, ImportError) as error:  # from `build`, or a batch norm with a single value
            what = getattr(source.arch, "__name__", None) or type(source.arch).__name__
            what = source.arch if isinstance(source.arch, str) else what
            reason = str(error).replace("build: ", "")
            raise PlanError(f"plan: {what}, batch {batch_size}: {reason}") from error

    def _measure(self, timed: bool) -> None:
        source, N = self.source, self.batch_size
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.net = source.chain(self.recompute)
            found = self.net.found
            image, label = chains.batch(found, N, real=False)
            self.costs = costs.measure_chain(self.net, image, label, recompute=self.recompute)
            self.plain = ChainCosts(self.costs.blocks, self.costs.losses, self.costs.image)
            if self.recompute == "norm":  # the blocks above keep less than end to end
                self.plain = costs.measure_chain(source.chain(), image, label)
            self.batch_bytes = nbytes([image, label])
        self.name, self.size = found.name, found.image_size
        self.buffers = nbytes(self.net.buffers())
        if timed:
            net, (image, label) = source.chain(self.recompute, real=True), chains.batch(found, N, real=True)
            self.seconds = costs.measure_chain(net, image, label, timed=True)

    def recomputed(self) -> MeasuredChain:
        """Return the same network with recompute "block", which needs no new measurement."""
        found = copy.copy(self)
        found.recompute = "block"
        found.costs = ChainCosts(self.costs.blocks, self.costs.losses, self.costs.image, "block")
        return found

    @property
    def most_modules(self) -> int:
        return 1 + sum(self.costs.cut_allowed(end) for end in range(len(self.costs) - 1))

    def plan(self, modules: int, objective: str) -> Plan:
        """Return the best split into so many modules. Raises ValueError if there is none."""
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
        what = (self.name, self.size, self.batch_size, cuts, self.recompute, self.source.losses, objective)
        return Plan(*what, tuple(found), resident, end_to_end)


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
