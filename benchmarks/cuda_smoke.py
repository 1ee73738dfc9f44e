"""The CUDA C++ kernels, once each on small inputs, for compute-sanitizer: ``compute-sanitizer python -m benchmarks.cuda_smoke``.

What they should give is computed on the CPU: every kernel on the GPU takes a sanitizer's time.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from infopro_fast import ops
from infopro_fast.modules import Decoder

CUDA = ("cuda", torch.float32, "cuda")
REFERENCE = ("reference", torch.float64, "cpu")


def gradients(decoder: nn.Sequential, features: torch.Tensor, image: torch.Tensor, impl: str, dtype: torch.dtype, device: str):
    """Of the features and the parameters, on the CPU in float64."""
    net, x = copy.deepcopy(decoder).to(device, dtype), features.to(device, dtype, copy=True).requires_grad_()
    loss = ops.reconstruction_loss(x, image.to(device, dtype), net, impl=impl)
    return [t.cpu().double() for t in torch.autograd.grad(loss, [x, *net.parameters()])]


def error(decoder: nn.Sequential, features: torch.Tensor, image: torch.Tensor, measured=CUDA) -> float:
    """Largest of |measured - reference| / |reference|, the norms of a gradient; one that is exactly 0 is left out."""
    pairs = zip(gradients(decoder, features, image, *measured), gradients(decoder, features, image, *REFERENCE), strict=True)
    return max(((found - e).norm() / e.norm()).item() for found, e in pairs if e.norm() > 1e-12)


def cases() -> dict[str, tuple[nn.Sequential, torch.Tensor, torch.Tensor]]:
    """Decoder, features and image: without a resize, with one, and to a size that is no multiple; a chain whose stages all have kernels."""
    torch.manual_seed(0)
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    chain = nn.Sequential(
        double, nn.Conv2d(13, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), double, nn.Conv2d(7, 3, 3, padding=1), nn.Sigmoid()
    )
    found = {"a chain decoder": (chain, torch.randn(2, 13, 21, 19), torch.rand(2, 3, 84, 76))}
    for N, C, h, H in ((3, 5, 9, 9), (2, 16, 8, 32), (2, 7, 5, 18)):
        decoder = Decoder(C, H).decoder
        found[f"{C} channels {h}x{h} to {H}x{H}"] = decoder, torch.randn(N, C, h, h), torch.rand(N, 3, H, H)
    return found


def main() -> int:
    reason = ops.available("reconstruction_loss", "cuda")["cuda"]
    if reason:
        print(f"benchmarks.cuda_smoke: {reason}", file=sys.stderr)
        return 2
    worst = 0.0
    for name, case in cases().items():
        found = error(*case)
        print(f"reconstruction_loss, {name}: error {found:.1e}")
        worst = max(worst, found)
    torch.cuda.synchronize()
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
