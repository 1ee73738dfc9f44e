"""Every op by every method at the paper's shapes, and a whole training step: ``pytest --benchmark-only``."""

import pytest

from benchmarks import memory, report, shapes, train_step, workloads
from benchmarks.device import provenance

LARGER = {
    "reconstruction_loss": shapes.DECODER_LARGER, "supcon_loss": shapes.SUPCON_LARGER,
    "linear_cross_entropy": shapes.LINEAR_LARGER, "upsample_cross_entropy": shapes.DENSE_LARGER,
}
SHAPES = {op: over for op, (over, *_) in report.CLAIMS.items()} | {"norm_relu_pool": shapes.POOL}
CASES = [
    pytest.param(op, shape, method, id=f"{op}-{workloads.label(shape)}-{method}", marks=marks)
    for op, over in SHAPES.items()
    for marks, some in (([], over), ([pytest.mark.larger], LARGER.get(op, ())))
    for shape in some
    for method in workloads.OPS[op][2]
]


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("op, shape, method", CASES)
def bench_op(measure, op, shape, method, direction):
    measure(op, shape, method, direction)


@pytest.mark.parametrize("method", train_step.METHODS)
@pytest.mark.parametrize("K", shapes.TRAIN_STEP)
def bench_train_step(benchmark, K, method):
    """ResNet-32 at batch 128 in K modules."""
    benchmark.group = f"train_step resnet32 N{shapes.TRAIN_BATCH}"
    peak = memory.peak_bytes("benchmarks.train_step:for_peak", method=method, K=K)["peak"]
    row = dict(op="train_step", shape=f"K{K}", method=method, direction="step", peak_bytes=peak)
    benchmark.extra_info.update(row, **provenance())
    benchmark.pedantic(train_step.step(method, K), rounds=5, warmup_rounds=1)
