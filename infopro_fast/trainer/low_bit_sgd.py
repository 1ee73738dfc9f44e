"""SGD whose momentum is kept in bfloat16 or in 8 bits: a half or a little over a quarter of the optimizer's state.

Replaces the fused SGD where that state is worth saving; it costs a few passes over each parameter. The momentum is rounded when a
step has used it, so that of every update the last gradient is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

STATES = ("float32", "bfloat16", "8bit")
BLOCK = 256  # numbers that share a scale (Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022)


class LowBitSGD(torch.optim.Optimizer):
    """torch.optim.SGD with Nesterov momentum (momentum 0: none), decay on all parameters, and a rounded momentum.

    state: "bfloat16", rounded to nearest; or "8bit", torchao's dynamic 8-bit numbers in blocks of 256 with a float32 scale each
    (parameters of fewer numbers keep float32). 2, or 1.016, bytes a number instead of 4.

    Raises ValueError for another state, ImportError if torchao is needed and not installed.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, state: str = "bfloat16"
    ):
        if state not in STATES[1:]:
            raise ValueError(f"LowBitSGD: state: expected one of {STATES[1:]}, got {state!r}")
        if state == "8bit":
            quantizer()
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._eight_bit = state == "8bit"

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient. closure: not supported."""
        if closure is not None:
            raise ValueError("LowBitSGD: step: expected no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, p: torch.Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        d = p.grad.add(p, alpha=weight_decay) if weight_decay else p.grad
        if momentum:
            kept = self.state[p]
            buffer = self._unpack(p, kept).mul_(momentum).add_(d) if kept else d.clone()
            p.add_(d, alpha=-lr)
            d = buffer.mul(momentum)
            kept.update(self._pack(p, buffer))
        p.add_(d, alpha=-lr)

    def _pack(self, p: torch.Tensor, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._eight_bit:
            return {"momentum_buffer": buffer.bfloat16()}
        if p.numel() < BLOCK:
            return {"momentum_buffer": buffer}
        flat = torch.nn.functional.pad(buffer.reshape(-1), (0, -p.numel() % BLOCK)).float()
        scaled, scale = quantizer().scale_tensor(flat, BLOCK)
        return {"codes": quantizer().quantize_8bit_with_qmap(scaled, _map(p.device)), "scale": scale}

    def _unpack(self, p: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        if "momentum_buffer" in kept:
            return kept["momentum_buffer"].to(p.dtype, copy=True)
        flat = quantizer().dequant_with_qmap(kept["codes"], _map(p.device), kept["scale"])
        return torch.empty_like(p).copy_(flat[: p.numel()].view(p.shape))

    def load_state_dict(self, state_dict) -> None:
        """As torch's, but what is kept in fewer bits stays so: torch turns all of a parameter's state into its dtype."""
        super().load_state_dict(state_dict)
        for kept in self.state.values():
            if "codes" in kept:
                kept["codes"], kept["scale"] = kept["codes"].to(torch.uint8), kept["scale"].float()
            elif not self._eight_bit and "momentum_buffer" in kept:
                kept["momentum_buffer"] = kept["momentum_buffer"].bfloat16()


@functools.cache
def quantizer():
    """torchao's quantisation of optimizer states. Raises ImportError saying what to install."""
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ImportError("an optimizer state of 8 bits needs torchao: pip install 'infopro-fast[8bit]'") from error
    return quant_utils


@functools.cache
def _map(device: torch.device) -> torch.Tensor:
    """The 256 numbers in [-1, 1] that a code stands for."""
    return torch.tensor(quantizer().create_dynamic_map(signed=True), dtype=torch.float32, device=device)
