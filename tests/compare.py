"""Every tolerance of the tests, and nothing but tolerances.

Errors are taken against float64 and relative to a tensor's own scale. A wrong small element among large ones
of the same tensor is thus judged as the optimizer would feel it. No tolerance is wider than what plain torch
achieves.
"""

from __future__ import annotations

import math
import typing

import torch

from tests import golden

# Relative to the scale of a digest: what "reproduces the authors' code" means.
GOLDEN = {torch.float64: 1e-9, torch.float32: 1e-4}

# A digest no larger than this is rounding noise around an exact zero, such as the gradient of a convolution's
# bias in front of a batch norm. The noise of the authors' code is 1e-16 to 1e-14 in float64, up to 1e-7 in
# float32.
GOLDEN_ZERO = 1e-12
NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}

# A sum that cancels is right to this many epsilons of the sum of its terms' magnitudes.
SUM_EPS = 32.0

# Largest absolute difference over the largest magnitude of the float64 values, for well-conditioned results.
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# A whole step under autocast against float32. Losses are means, in which rounding averages out: this many
# epsilons. Rounding also moves a share of the ReLUs' inputs across 0, and each takes its whole gradient
# along. The share grows as epsilon does, so an update is off by this many roots of epsilon (measured: 1.5 to
# 2 in both dtypes).
AMP_LOSS = 1.0
AMP_UPDATE = 4.0

# Against plain torch in the same dtype: this many times its error, or this many units in the last place.
TIMES_PLAIN = 2.0
ULPS = 8.0

# Bytes, relative. Published tables have three or four digits. The system rounds to pages and counts what no
# tensor owns.
TABLE = 4e-3
RESIDENT = 0.10

# Half the widest gap between torchao's dynamic 8-bit numbers, relative to the largest of a block.
EIGHT_BIT = 0.0071


def assert_golden(
    name: str,
    tensor: torch.Tensor,
    expected: float | typing.Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    plain: torch.Tensor | None = None,
    terms: float = 0.0,
) -> None:
    """Assert that ``tensor`` has the digest that the authors' code gave.

    name: the tensor's name in the golden file, which seeds its digest.
    expected: [norm, dot], or a bare number for a loss.
    dtype: the precision it was computed in, float64 or float32; the dtype of ``tensor`` if None.
    plain: the same tensor from plain torch in the same dtype. Twice its error is allowed where that is more:
        a few gradients of biases are sums that cancel to a thousandth of their terms.
    terms: for such a sum in float32, the sum of its terms' magnitudes, to which float32 can be right.
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
        pairs = zip(golden.digest(name, plain), wanted, strict=True)
        bound = max(bound, TIMES_PLAIN * max(abs(p - w) for p, w in pairs))
    message = f"{name} ({dtype}): expected {wanted}, got {found}: off by {max(off):.3g}, allowed {bound:.3g}"
    assert all(d <= bound for d in off), message


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    what: str = "",
) -> None:
    """Assert the shape of ``expected`` (float64), and its values within what ``dtype`` can hold.

    dtype: the dtype of ``actual`` if None.
    scale: magnitude that errors are relative to; the largest of ``expected`` if None. Give it for sums that
        cancel and for gradients that are exactly 0.
    """
    _assert_shape(actual, expected, what)
    if expected.numel() == 0:
        return
    expected, found = expected.detach().double(), actual.detach().double()
    assert torch.isfinite(found).all() or not torch.isfinite(expected).all(), f"{what}: not finite: {found}"
    scale = expected.abs().max().item() if scale is None else scale
    dtype = dtype or actual.dtype
    bound = CLOSE[dtype] * scale
    off = (found - expected).abs().max().item()
    assert off <= bound, f"{what} ({dtype}): off by {off:.3g}, allowed {bound:.3g}, scale {scale:.3g}"


def _assert_shape(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    wanted, found = tuple(expected.shape), tuple(actual.shape)
    assert found == wanted, f"{what}: expected shape {wanted}, got {found}"


def relative_error(actual: torch.Tensor, reference64: torch.Tensor) -> float:
    """|actual - reference64| / |reference64| in float64; the absolute error where the reference is 0."""
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
    """Assert an error of at most twice plain torch's in the same dtype, or a few units in the last place.

    dtype: the precision of the arithmetic; the dtype of ``actual`` if None.
    scale: condition of the result, 1 unless it is a sum that cancels. Then it is (sum of magnitudes) /
        |result|, which is what an ulp of a term is worth.
    """
    _assert_shape(actual, reference64, what)
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    ours, theirs = relative_error(actual, reference64), relative_error(plain, reference64)
    theirs = theirs if math.isfinite(theirs) else 0.0  # plain torch gives nan or overflows: no excuse
    bound = max(TIMES_PLAIN * theirs, ULPS * torch.finfo(dtype or actual.dtype).eps * scale)
    assert ours <= bound, f"{what}: relative error {ours:.3g}, plain torch {theirs:.3g}, allowed {bound:.3g}"


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Assert the same bits: shape, dtype and every element (nan equals nan)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}"
    )
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements are not the same bits"
