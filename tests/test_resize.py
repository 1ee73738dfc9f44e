"""Where a resize samples: the CPU kernels have torch's matrix of weights, (n_out, n_in).

`tests/interpreted/test_resize.py` holds Triton's tables to the same matrices, `tests/test_cuda_host_chain.py`
CUDA C++.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from infopro_fast import ops
from infopro_fast.ops import resize
from tests import compare

MODES = (
    dict(mode="bilinear", align_corners=True),
    dict(mode="nearest"),
    dict(mode="bilinear", align_corners=False),
)
SIZES = [
    *itertools.product(range(1, 8), range(1, 13)), (9, 1), (13, 64), (28, 224), (5, 37), (64, 13), (60, 61),
    (41, 299), (300, 7),
]
CENTRE = torch.zeros(1, 1, 3, 3, dtype=torch.float64)  # a convolution that changes nothing
CENTRE[..., 1, 1] = 1


def by_torch(n_in: int, n_out: int, mode: int, **size) -> torch.Tensor:
    """Return the matrix by which `torch.nn.functional.interpolate` resizes an axis."""
    x = torch.eye(n_in, dtype=torch.float64)[:, None, :, None]
    return F.interpolate(x, **(size or dict(size=(n_out, 1))), **MODES[mode])[:, 0, :, 0].T


def by_stage(op, n_in: int, n_out: int, mode: int, factors=()) -> torch.Tensor:
    """Return the matrix of a stage of a chain decoder. op: the opaque op of an implementation."""
    x = torch.eye(n_in)[:, None, :, None].contiguous()
    z, _ = op(x, None, None, None, None, 0.0, CENTRE.float(), None, n_out, 1, mode, list(factors), False)
    return z[:, 0, :, 0].T


def test_the_indices_of_the_modes():
    assert [resize.resize_of(m["mode"], m.get("align_corners")) for m in MODES] == [0, 1, 2]
    assert (resize.CORNERS, resize.NEAREST, resize.CENTERS) == (0, 1, 2)
    assert resize.RESIZES == ("corners", "nearest", "centers")


@pytest.mark.parametrize("mode", range(3))
def test_cpu_kernels(mode, cpu):
    """Forward mixes by the matrix, backward by its transpose."""
    for n_in, n_out in SIZES:
        wanted = by_torch(n_in, n_out, mode)
        x = torch.eye(n_in, dtype=torch.float64)[:, None, :, None]
        z = ops.upsample_conv3x3(x, CENTRE, None, (n_out, 1), impl=cpu, **MODES[mode])
        compare.assert_close(z[:, 0, :, 0].T, wanted, what=f"{n_in} to {n_out}")
        x = torch.zeros(n_out, 1, n_in, 1, dtype=torch.float64, requires_grad=True)
        z = ops.upsample_conv3x3(x, CENTRE, None, (n_out, 1), impl=cpu, **MODES[mode])
        (found,) = torch.autograd.grad(z, x, torch.eye(n_out, dtype=torch.float64)[:, None, :, None])
        compare.assert_close(found[:, 0, :, 0], wanted, what=f"{n_in} to {n_out}, backward")


@pytest.mark.parametrize("mode", range(3))
def test_cpu_kernels_by_a_factor(mode, cpu):
    """A factor that gives no whole size places the samples itself, except with aligned corners."""
    stage = torch.ops.infopro_fast.chain_stage_forward.default
    for n_in, factor in itertools.product((1, 3, 7, 20), (1.0, 1.3, 1.7, 2.0, 2.3, 2.6)):
        factors, n_out = (factor, 1.0), int(n_in * factor)
        wanted = by_torch(n_in, n_out, mode, scale_factor=factors, recompute_scale_factor=False)
        compare.assert_close(by_stage(stage, n_in, n_out, mode, factors), wanted, what=f"{n_in} by {factor}")


@pytest.mark.parametrize("mode", (resize.CORNERS, resize.NEAREST))
def test_most_sources_is_a_bound(mode):
    for n_in, n_out in SIZES:
        mixed = by_torch(n_in, n_out, mode) > 1e-9
        for outputs in range(1, 7):
            spans = [mixed[p : p + outputs].any(0).nonzero().flatten() for p in range(n_out)]
            most = max(int(span[-1] - span[0]) + 1 for span in spans)
            assert most <= resize.most_sources(outputs, n_in, n_out) <= n_in, (n_in, n_out, outputs)
