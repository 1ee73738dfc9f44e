"""A whole step of ResNet-32 at batch 128, in 1, 4 and 16 modules: ours and the released formulation."""

import pytest

from benchmarks import memory, shapes, train_step
from benchmarks.device import provenance


@pytest.mark.parametrize("method", train_step.METHODS)
@pytest.mark.parametrize("K", shapes.TRAIN_STEP)
def bench_train_step(benchmark, K, method):
    benchmark.group = f"train_step resnet32 N{shapes.TRAIN_BATCH}"
    benchmark.extra_info.update(op="train_step", shape=f"K{K}", method=method, direction="step", **provenance())
    benchmark.extra_info["peak_bytes"] = memory.peak_bytes("benchmarks.train_step:for_peak", method=method, K=K)["peak"]
    benchmark.pedantic(train_step.step(method, K), rounds=5, warmup_rounds=1)
