"""Ways to train the same network, and what was measured of each."""

from __future__ import annotations

from dataclasses import dataclass

from infopro_fast.planning.live import Bytes


@dataclass(frozen=True)
class Way:
    """A way to train.

    modules: K, 1 for end to end. losses: "ours" or "released". planned: cut by `plan`, not as published.
    budget: activation_memory_budget of torch.compile, 0 (recompute all) to 1 (keep what is fast); None: not
        compiled.
    """

    modules: int = 1
    recompute: str = "none"
    losses: str = "ours"
    planned: bool = True
    budget: float | None = None

    @property
    def name(self) -> str:
        if self.modules > 1:
            again = {"norm": " + norms rebuilt", "block": " + recompute", "sqrt": " + recompute sqrt"}
            return f"{self.losses} K={self.modules}{again.get(self.recompute, '')}"
        if self.budget is not None:
            return f"E2E compiled, budget {self.budget:g}"
        again = {"norm": " + norms rebuilt", "block": " checkpoint/block", "sqrt": " checkpoint/sqrt"}
        return f"E2E{again.get(self.recompute, '')}"


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of a step.

    parameters, optimizer: bytes that are always there. saved: the most that autograd keeps at any time.
    peak: `Bytes` at the highest point, or None where compiled code hides it.
    resident: the same point beyond model, optimizer state and batch, as the system or a GPU's allocator sees
        it.
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
