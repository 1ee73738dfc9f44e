"""MixUp and CutMix of training batches, by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch

from infopro_fast.errors import DataError

Mix = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def mixing(mixup: float | None, cutmix: float | None, num_classes: int) -> Mix:
    """Return a function from a batch's images (N, 3, H, W), labels (N,) and a seed to mixed ones.

    mixup, cutmix: the alphas; None: not that one. Of both, a batch takes one at random. The probabilities are
    (N, num_classes), float32. What a batch becomes depends on the seed alone; torch's generators stay as they
    are. Raises DataError without torchvision.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise DataError(f"mixup, cutmix: need torchvision: pip install torchvision ({error})") from error
    kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    transforms = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha is not None]

    def mix(image: torch.Tensor, label: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            chosen = transforms[int(torch.randint(len(transforms), ()))]
            return chosen(image, label)

    return mix
