"""Where a resize samples: Triton's tables say what torch says."""

from __future__ import annotations

import pytest
import torch

from tests import compare
from tests.test_resize import SIZES, by_torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", range(3))
def test_tables(mode):
    """Both tables are the matrix that torch resizes by, and no source has more takers than there is room
    for."""
    from infopro_fast.ops.triton_kernels import resize

    for size, out in SIZES:
        wanted = by_torch(size, out, mode)
        low, weights = resize.places(size, 1, out, 1, mode, CPU)
        low, (a, b) = low[: out + 2].long(), weights.view(2, -1)[:, : out + 2].double()
        found = torch.zeros(out + 2, size, dtype=torch.float64)
        rows = torch.arange(out + 2)
        found[rows, low] += a
        found[rows, (low + 1).clamp(max=size - 1)] += b
        compare.assert_close(found[1:-1], wanted, dtype=torch.float32, what=f"places {size} to {out}")
        assert not found[0].any() and not found[-1].any()
        first, weights, most, _ = resize.takers(size, 1, out, 1, mode, CPU)
        found = torch.zeros(out + most, size, dtype=torch.float64)
        table = weights[: (most + 4) * size].view(most + 4, size).double()
        assert not table[:2].any() and not table[-2:].any()
        for t in range(most):
            found[first[:size].long() + t, torch.arange(size)] += table[2 + t]
        assert not found[out:].any()
        compare.assert_close(found[:out], wanted, dtype=torch.float32, what=f"takers {size} to {out}")
