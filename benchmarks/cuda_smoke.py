"""The CUDA C++ kernels, once each on small inputs, for compute-sanitizer: ``compute-sanitizer python -m benchmarks.cuda_smoke``."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from benchmarks import shapes, workloads
from infopro_fast import ops

SHAPES = (shapes.DecoderShape(3, 5, 9, 9), shapes.DecoderShape(2, 16, 8, 32), shapes.DecoderShape(2, 7, 5, 18))


def chain_error() -> float:
    """Of a chain decoder whose stages all have CUDA C++ kernels: of the features' gradient, against the reference in float64."""
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(13, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(7, 3, 3, padding=1), nn.Sigmoid(),
    ).cuda()  # fmt: skip
    features, image = torch.randn(2, 13, 21, 19, device="cuda"), torch.rand(2, 3, 84, 76, device="cuda")
    found = []
    for impl, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        x = features.to(dtype).requires_grad_()
        loss = ops.reconstruction_loss(x, image.to(dtype), copy.deepcopy(decoder).to(dtype), impl=impl)
        found.append(torch.autograd.grad(loss, x)[0].double())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


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
    error = chain_error()
    print(f"reconstruction_loss of a chain decoder: error {error:.1e}")
    if not error < 1e-4:
        return 1
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
