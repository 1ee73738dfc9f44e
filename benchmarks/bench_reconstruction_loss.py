"""`reconstruction_loss` against the released decoder run layer by layer, at the shapes of the paper."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.DECODER_METHODS)
@pytest.mark.parametrize("shape", shapes.DECODER + shapes.DECODER_LARGER, ids=workloads.label)
def bench_reconstruction_loss(measure, shape, method, direction):
    measure("reconstruction_loss", shape, method, direction, small=shape._replace(N=4))
