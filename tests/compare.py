"""How close is close: every tolerance of the tests, and nothing but tolerances.

Errors are taken against float64 and relative to a tensor's own scale, so that a wrong small element among
large ones of the same tensor is judged as the optimizer would feel it. Nothing here is wider than what plain
torch itself achieves.
"""

from __future__ import annotations

import math
import typing

import torch

from tests import golden

# Relative to the scale of a digest: what "reproduces the released code" means.
GOLDEN = {torch.float64: 1e-9, torch.float32: 1e-4}

# A digest no larger than this is rounding noise around an exact zero (the gradient of a convolution's bias in
# front of a batch norm): the released code's own noise in float64 is 1e-16 to 1e-14, in float32 up to 1e-7.
GOLDEN_ZERO = 1e-12
NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}

# A sum that cancels is right to this many epsilons of the sum of its terms' magnitudes.
SUM_EPS = 32.0

# Largest absolute difference over the largest magnitude of the float64 values, for well-conditioned results.
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# Autocast against float32, of a whole step. Losses are means, in which rounding averages out: this many
# epsilons. Rounding also moves a share of the ReLUs' inputs across 0 that grows as epsilon does, each with
# the whole of its gradient: an update is off by the root of that share, this many roots of epsilon (measured:
# 1.5 to 2 in both dtypes).
AMP_LOSS = 1.0
AMP_UPDATE = 4.0

# Against plain torch in the same dtype: this many times its error, or this many units in the last place.
TIMES_PLAIN = 2.0
ULPS = 8.0

# Bytes, relative. Published tables have three or four digits; what the system sees rounds to pages and holds
# what no tensor owns.
TABLE = 4e-3
RESIDENT = 0.10


def assert_golden(
    name: str,
    tensor: torch.Tensor,
    expected: float | typing.Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    plain: torch.Tensor | None = None,
    terms: float = 0.0,
) -> None:
    """``tensor`` has the digest the released code gave.

    name: the tensor's name in the golden file, which seeds its digest. expected: [norm, dot], or a bare
    number for a loss.
    dtype: the precision it was computed in, float64 or float32; that of ``tensor`` if None.
    plain: the same from plain torch in the same dtype. Where that is itself further off (a few gradients of
        biases are sums that cancel to a thousandth of their terms), twice its error is allowed.
    terms: for such a sum, in float32, the sum of its terms' magnitudes: what float32 can be asked to be right
    to.
    """
    dtype = dtype or tensor.dtype
    number = isinstance(expected, (int, float))
    wanted = (float(expected),) if number else tuple(expected)
    found = (tensor.item(),) if number else golden.digest(name, tensor)
    scale = max(abs(v) for v in wanted)
    bound = NOISE[dtype] if scale <= GOLDEN_ZERO else GOLDEN[dtype] * scale
    off = [abs(f - w) for f, w in zip(found, wanted, strict=True)]
    if dtype == torch.float32:
        bound = max(bound, SUM_EPS * torch.finfo(dtype).eps * terms)
    if plain is not None and dtype == torch.float32:
        bound = max(
            bound,
            TIMES_PLAIN * max(abs(p - w) for p, w in zip(golden.digest(name, plain), wanted, strict=True)),
        )
    assert all(d <= bound for d in off), (
        f"{name} ({dtype}): expected {wanted}, got {found}: off by {max(off):.3g}, allowed {bound:.3g}"
    )


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    what: str = "",
) -> None:
    """Same shape, and equal to ``expected`` (float64) within what ``dtype`` (that of ``actual`` if None) can
    hold.

    scale: magnitude that errors are relative to, if not that of ``expected`` (sums that cancel; gradients
    that are exactly 0).
    """
    assert actual.shape == expected.shape, (
        f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )
    if expected.numel() == 0:
        return
    expected, found = expected.detach().double(), actual.detach().double()
    assert torch.isfinite(found).all() or not torch.isfinite(expected).all(), f"{what}: not finite: {found}"
    scale = expected.abs().max().item() if scale is None else scale
    bound = CLOSE[dtype or actual.dtype] * scale
    off = (found - expected).abs().max().item()
    assert off <= bound, (
        f"{what} ({dtype or actual.dtype}): off by {off:.3g}, allowed {bound:.3g}, scale {scale:.3g}"
    )


def relative_error(actual: torch.Tensor, reference64: torch.Tensor) -> float:
    """|actual - reference64| / |reference64|, Euclidean norms in float64 (the absolute error where the
    reference is 0)."""
    reference64 = reference64.detach().double()
    size = torch.linalg.vector_norm(reference64).item()
    return torch.linalg.vector_norm(actual.detach().double() - reference64).item() / (size or 1.0)


def assert_accurate(
    actual: torch.Tensor,
    plain: torch.Tensor,
    reference64: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    what: str = "",
) -> None:
    """Error against float64 no worse than twice that of plain torch in the same dtype (floor: a few units in
    the last place).

    dtype: the precision of the arithmetic, that of ``actual`` if None. scale: condition of the result, 1
    unless it is a sum that
    cancels: then (sum of magnitudes) / |result|, which is what an ulp of a term is worth.
    """
    assert actual.shape == reference64.shape, (
        f"{what}: expected shape {tuple(reference64.shape)}, got {tuple(actual.shape)}"
    )
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    ours, theirs = relative_error(actual, reference64), relative_error(plain, reference64)
    theirs = theirs if math.isfinite(theirs) else 0.0  # plain torch gives nan or overflows: no excuse
    bound = max(TIMES_PLAIN * theirs, ULPS * torch.finfo(dtype or actual.dtype).eps * scale)
    assert ours <= bound, f"{what}: relative error {ours:.3g}, plain torch {theirs:.3g}, allowed {bound:.3g}"


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Bit for bit: shape, dtype and every element (nan equals nan)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}"
    )
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements are not the same bits"
