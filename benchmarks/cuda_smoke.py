"""The CUDA C++ kernels, once each on small inputs, for compute-sanitizer: ``compute-sanitizer python -m benchmarks.cuda_smoke``."""

from __future__ import annotations

import sys

import torch

from benchmarks import shapes, workloads
from infopro_fast import ops

SHAPES = (shapes.DecoderShape(3, 5, 9, 9), shapes.DecoderShape(2, 16, 8, 32), shapes.DecoderShape(2, 7, 5, 18))


def main() -> int:
    reason = ops.available("reconstruction_loss", "cuda")["cuda"]
    if reason:
        print(f"benchmarks.cuda_smoke: {reason}", file=sys.stderr)
        return 2
    for shape in SHAPES:
        error = workloads.relative_errors("reconstruction_loss", workloads.decoder(workloads.CUDA, shape, device="cuda"), shape)
        print(f"reconstruction_loss {workloads.label(shape)}: error {error:.1e}")
        if not error < 1e-4:
            return 1
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
