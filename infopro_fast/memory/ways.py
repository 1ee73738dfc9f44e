"""Ways to train the same network, and what was measured of each."""

from __future__ import annotations

from dataclasses import dataclass

from .live import Bytes


@dataclass(frozen=True)
class Way:
    """A way to train. modules: K, 1 end to end. losses: "ours" or "released". planned: cut by `make_plan`, not as published.

    budget: the stages go through torch.compile with this activation_memory_budget, 0 (recompute all) to 1; None: not compiled.
    """

    modules: int = 1
    recompute: str = "none"
    losses: str = "ours"
    planned: bool = True
    budget: float | None = None

    @property
    def name(self) -> str:
        if self.modules > 1:
            ending = {"none": "", "norm": " + norms rebuilt", "block": " + recompute", "sqrt": " + recompute sqrt"}
            return f"{self.losses} K={self.modules}{ending[self.recompute]}"
        if self.budget is not None:
            return f"E2E compiled, budget {self.budget:g}"
        ending = {"none": "", "norm": " + norms rebuilt", "block": " checkpoint/block", "sqrt": " checkpoint/sqrt"}
        return f"E2E{ending[self.recompute]}"


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of a step.

    parameters, optimizer: bytes that are always there.
    saved: the most that autograd keeps at any time. peak: `Bytes` at the highest point, None where compiled code hides it.
    resident: the peak beyond the loaded model, its optimizer's state and the batch, as the system or a GPU's allocator sees it.
    seconds: median of a step. end_to_end: median of the end-to-end steps that took turns with those.
    """

    way: Way
    parameters: int
    optimizer: int
    saved: int
    peak: Bytes | None
    resident: int
    seconds: float
    end_to_end: float
    device: str = "cpu"
    threads: int = 0
