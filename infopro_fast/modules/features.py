"""What a module hands on, as a map: local losses see (N, C, h, w), whatever the next module is given.

Features are (N, C, h, w), (N, h, w, C), or tokens (N, p + h w, C): p class and register tokens come first,
then the rows of the map. All become maps by a view, which copies nothing.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

import torch
from torch import nn

BATCH = 2  # images in the shapes that `found` is given
NONE = "which is no map (N, C, h, w) or (N, h, w, C), nor tokens (N, p + h w, C), with the image's h : w"
AMBIGUOUS = "which may be two different maps (of tokens, set num_prefix_tokens of the network to say which)"
MOST_PREFIX = 8  # class and register tokens, where the network does not say how many it has


class Order(typing.NamedTuple):
    """``reroll`` for the tokens of one block, as timm's Hiera calls it."""

    reroll: nn.Module
    block: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.reroll(x, self.block)


class Features(typing.NamedTuple):
    """Features as a map. channels: C. size: (h, w).

    prefix: class and register tokens in front of the map's; None: the features are maps (N, C, h, w).
    restore: gives (N, h, w, C) of tokens that the network keeps in another order.
    """

    channels: int
    size: tuple[int, int]
    prefix: int | None = None
    restore: Order | None = None

    def as_map(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (N, ...) as (N, C, h, w): a view, unless ``restore`` copies."""
        if self.prefix is None:
            return x
        if self.restore is not None:
            x = self.restore(x)
        elif x.dim() == 3:
            x = x[:, self.prefix :].unflatten(1, self.size)
        return x.permute(0, 3, 1, 2)


def found(
    net: nn.Module, outputs: Sequence[tuple[str, tuple[int, ...]]], image_size: tuple[int, int]
) -> tuple[list[Features | None], dict[str, str]]:
    """Return the features of each output of ``net``, and by name why others are none.

    outputs: names and shapes. A shape that is both (N, C, h, w) and (N, h, w, C) is what the outputs around
    it are. ``net.num_prefix_tokens`` (timm) is the number of class and register tokens; without it the one
    that leaves h w tokens with h : w of the image, if there is one alone.
    """
    kinds = [_candidates(net, shape, image_size) for _, shape in outputs]
    result: list[Features | None] = []
    reasons, before = {}, None
    for i, (name, shape) in enumerate(outputs):
        kind = kinds[i]
        if len(kind) > 1:
            after = next((some[0].prefix for some in kinds[i + 1 :] if len(some) == 1), before)
            kind = [one for one in kind if one.prefix == before == after]
            what = AMBIGUOUS
        else:
            what = NONE
        result.append(kind[0] if kind else None)
        if kind:
            before = kind[0].prefix
        else:
            got = ", ".join(map(str, ("N", *shape[1:])))
            reasons[name] = f"it gives ({got}), {what}"
    return result, reasons


def _candidates(net: nn.Module, shape: tuple[int, ...], image_size: tuple[int, int]) -> list[Features]:
    if shape[:1] != (BATCH,):  # windows, or a statistic
        return []
    if len(shape) == 3:
        return _of_tokens(net, shape[1], shape[2], image_size)
    if len(shape) != 4:
        return []
    both = (Features(shape[1], (shape[2], shape[3])), Features(shape[3], (shape[1], shape[2]), 0))
    fitting = [(_misfit(one.size, image_size), one) for one in both]
    least = min(misfit for misfit, _ in fitting)
    return [one for misfit, one in fitting if misfit == least <= max(image_size)]


def _misfit(size: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Return how far h : w is from the image's: at most the larger side, where a rounding explains it."""
    return abs(size[0] * image_size[1] - size[1] * image_size[0]) if size[0] * size[1] > 1 else float("inf")


def _of_tokens(net: nn.Module, tokens: int, channels: int, image_size: tuple[int, int]) -> list[Features]:
    if hasattr(net, "reroll"):  # blocks with maps of one size have their tokens in one order
        sizes = {math.prod(size): (block, size) for block, (_, size) in net.reroll.schedule.items()}
        block, size = sizes.get(tokens, (None, None))
        return [Features(channels, tuple(size), 0, Order(net.reroll, block))] if size else []
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    known = getattr(net, "num_prefix_tokens", None)
    result = []
    for prefix in range(MOST_PREFIX + 1) if known is None else dict.fromkeys((known, 0)):
        size = grid
        if size is None or size[0] * size[1] != tokens - prefix:
            rows = round(((tokens - prefix) * image_size[0] / image_size[1]) ** 0.5) if tokens > prefix else 1
            size = (rows, (tokens - prefix) // max(1, rows))
        if size[0] * size[1] == tokens - prefix and _misfit(size, image_size) == 0:
            result.append(Features(channels, (size[0], size[1]), prefix))
    if known is not None:
        return result[:1]
    return [one for one in result if image_size[0] % one.size[0] == 0] or result
