"""`linear_cross_entropy` against linear + cross entropy, and torch's own chunked one where there is one."""

import pytest

from benchmarks import shapes, workloads


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("method", workloads.LINEAR_METHODS)
@pytest.mark.parametrize("shape", shapes.LINEAR + shapes.LINEAR_LARGER, ids=workloads.label)
def bench_linear_cross_entropy(measure, shape, method, direction):
    measure("linear_cross_entropy", shape, method, direction, small=shapes.LinearShape(64, shape.D, min(100, shape.C)))
