"""`norm_relu_pool` against BatchNorm2d, F.relu and the mean over the map, and behind an auxiliary head's convolution."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.POOL_METHODS)
@pytest.mark.parametrize("shape", shapes.POOL, ids=workloads.label)
def bench_norm_relu_pool(measure, shape, method, direction):
    measure("norm_relu_pool", shape, method, direction, small=shape._replace(N=4))


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.POOL_METHODS)
@pytest.mark.parametrize("shape", shapes.HEAD, ids=workloads.label)
def bench_conv_norm_relu_pool(measure, shape, method, direction):
    measure("conv_norm_relu_pool", shape, method, direction, small=shape._replace(N=4))
