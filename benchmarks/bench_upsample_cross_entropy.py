"""`upsample_cross_entropy` against F.interpolate + F.cross_entropy."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.DENSE_METHODS)
@pytest.mark.parametrize("shape", shapes.DENSE + shapes.DENSE_LARGER, ids=workloads.label)
def bench_upsample_cross_entropy(measure, shape, method, direction):
    measure("upsample_cross_entropy", shape, method, direction, small=shape._replace(N=1, h=8, w=16, H=64, W=128))
