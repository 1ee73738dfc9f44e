"""`supcon_loss` against the released formula and the shortest one plain torch allows."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.SUPCON_METHODS)
@pytest.mark.parametrize("shape", shapes.SUPCON + shapes.SUPCON_LARGER, ids=workloads.label)
def bench_supcon_loss(measure, shape, method, direction):
    measure("supcon_loss", shape, method, direction, small=shape._replace(N=96))
