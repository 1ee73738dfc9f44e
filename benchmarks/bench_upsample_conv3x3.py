"""`upsample_conv3x3` against F.interpolate + F.conv2d."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.UPSAMPLE_CONV_METHODS)
@pytest.mark.parametrize("shape", shapes.UPSAMPLE_CONV, ids=workloads.label)
def bench_upsample_conv3x3(measure, shape, method, direction):
    measure("upsample_conv3x3", shape, method, direction, small=shape._replace(N=1, h=4))
