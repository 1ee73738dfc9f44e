"""Golden values: digests of what the authors' released code computes in float64, and the closed form of its
inputs.

Nothing but digests is stored (released_code.json). Inputs and parameters come from `wave`; a tensor's digest
is its Euclidean norm and its dot product with a wave seeded by its name.
"""

from __future__ import annotations

import json
import math
import pathlib
import zlib

import torch

CASES = json.loads((pathlib.Path(__file__).parent / "released_code.json").read_text())


def cases(op: str) -> list[dict]:
    """The cases of one op: cifar_decoder, aux_classifier, supcon, train_step, chain_decoder,
    upsample_cross_entropy."""
    return [case for case in CASES if case["op"] == op]


def wave(shape, seed: int, amp: float = 1.0, off: float = 0.0) -> torch.Tensor:
    """off + amp * sin(0.1 + 0.731 seed + i (0.618034 + 0.0137 (seed mod 17))), i row-major, float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (off + amp * torch.sin(0.1 + 0.731 * seed + i * (0.618034 + 0.0137 * (seed % 17)))).reshape(
        tuple(shape)
    )


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode()) % 997


def digest(name: str, tensor: torch.Tensor) -> tuple[float, float]:
    """[norm, dot product with the name's wave] of a tensor, in float64."""
    tensor = tensor.detach().double().contiguous()
    return tensor.norm().item(), (tensor * wave(tensor.shape, seed_of(name) + 1)).sum().item()


@torch.no_grad()
def fill_parameters(state: dict[str, torch.Tensor]) -> None:
    """Give every tensor of a state_dict, in place, the value the golden cases were computed with."""
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
        elif name.endswith("running_mean"):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1)
        elif tensor.dim() == 4:
            tensor.copy_(wave(tensor.shape, seed_of(name), math.sqrt(2 / math.prod(tensor.shape[1:]))))
        elif tensor.dim() == 2:
            tensor.copy_(wave(tensor.shape, seed_of(name), math.sqrt(2 / tensor.shape[1])))
        elif name.endswith(".weight"):
            tensor.copy_(wave(tensor.shape, seed_of(name), 0.2, 1.0))
        else:
            tensor.copy_(wave(tensor.shape, seed_of(name), 0.1))


def features(n: int, c: int, h: int, w: int) -> torch.Tensor:
    return wave((n, c, h, w), 11) + wave((n, c, 1, 1), 13)


def image(n: int, h: int, w: int) -> torch.Tensor:
    """Images in [0, 1]."""
    return wave((n, 3, h, w), 5, 0.25, 0.5) + wave((n, 3, 1, 1), 6, 0.2)


def labels(n: int, classes: int) -> torch.Tensor:
    i = torch.arange(n)
    return (i * i) % classes
