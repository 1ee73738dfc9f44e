"""How the Triton kernels of `reconstruction_loss` cut a batch: what it takes, without Triton."""

from __future__ import annotations

import pytest

from benchmarks import shapes
from infopro_fast.ops.triton_kernels import reconstruction_loss_plan as plans
from tests.test_resize import SIZES, by_torch

SWEEPS = ("statistics", "loss", "backward")
PLACES = 264  # of an H100


def shape_of(s: shapes.DecoderShape, N: int) -> plans.Shape:
    return plans.Shape(N, s.C, s.h, s.h, s.H, s.H, s.K, False)


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("shape", (*shapes.DECODER, *shapes.DECODER_LARGER), ids=str)
def test_scratch_keeps_to_its_budget(shape, sweep):
    """A quarter of the resized map, or what is little in any case; and no more for a batch four times as large."""
    for N in (shape.N, 1024):
        found = plans.plan(shape_of(shape, N), sweep, PLACES)
        assert 4 * found.programs * found.scratch <= max(plans.MIN_SCRATCH, shape._replace(N=N).resized_bytes() / 4)
        assert 1 <= found.programs <= min(PLACES, N * found.strips)
        own = shape.h if sweep == "backward" else shape.H
        assert found.rows * found.strips >= own > found.rows * (found.strips - 1)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_stage_of_many_channels_needs_a_quarter_of_the_resized_map_in_all(sweep):
    """Partial sums of every program included."""
    shape = shapes.DecoderShape(1024, 64, 8, 32)
    assert plans.workspace(shape_of(shape, 1024), sweep, PLACES) < shape.resized_bytes() / 4


@pytest.mark.parametrize("nearest", (False, True))
@pytest.mark.parametrize("n_in, n_out", SIZES)
def test_outputs_of_an_input_lie_in_its_window(n_in, n_out, nearest):
    count = plans.outputs_of_one(n_in, n_out, nearest)
    weights = by_torch(n_in, n_out, int(nearest))
    for i in range(n_in):
        outputs = weights[:, i].gt(1e-12).nonzero().flatten().tolist()
        first = plans.first_output(i, n_in, n_out, nearest)
        assert all(first <= p < first + count for p in outputs)
