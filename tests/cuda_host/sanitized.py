"""Child process of tests/test_cuda_host.py: a few small calls of sanitized kernels, forward and backward.

AddressSanitizer and UndefinedBehaviorSanitizer end the process at a finding.
Usage: python -m tests.cuda_host.sanitized OBJECT decoder|chain
"""

from __future__ import annotations

import sys

import torch

from infopro_fast.ops import dispatch, reconstruction_loss_single
from tests import op_cases
from tests.cuda_host import binding

SMALL = 40 * 1024  # bytes of shared memory: several tiles, and several groups of channels
CASES = (
    dict(N=3, C=9, h=4, w=4, H=16, W=16, K=12),
    dict(N=2, C=5, h=5, w=7, H=23, W=17, K=7),
    dict(
        N=3, C=5, h=6, w=9, H=6, W=9, K=7, image_mean=(0.49, 0.48, 0.45), image_std=(0.25, 0.24, 0.26),
        loss="l1",
    ),
    dict(N=2, C=3, h=13, w=11, H=5, W=6, K=4, interpolate_mode="nearest", training=False, loss="mse"),
)

UNCHANGED = torch.nn.Upsample(scale_factor=1.0, mode="bilinear", align_corners=True)
CHAINS = (
    dict(N=3, h=7, w=9, stages=((None, 1, 4),)),
    dict(
        N=2, C=14, h=5, w=3, stages=(),
        last=torch.nn.Upsample((21, 13), mode="bilinear", align_corners=False), loss="mse",
    ),
    dict(
        N=2, C=3, h=19, w=23, stages=(), last=UNCHANGED, image_mean=(0.49, 0.48, 0.45),
        image_std=(0.25, 0.24, 0.26), loss="l1",
    ),
    dict(N=2, C=14, h=5, w=6, stages=((torch.nn.Upsample((9, 13)), 3, 5), (UNCHANGED, 3, 4))),
    dict(
        N=2, C=3, h=2, w=3, stages=((None, 1, 5),), last=torch.nn.Upsample((31, 48), mode="nearest"),
        training=False,
    ),
)


def main() -> None:
    path, chain = sys.argv[1], sys.argv[2] == "chain"
    kept = binding.register()
    dispatch.missing = lambda op, impl, device: None
    reconstruction_loss_single.operand_precision = lambda features: 0  # exact
    for shared in (binding.RTX4090.shared_per_block, SMALL):
        device = binding.Device(2, shared, shared)
        if chain:
            binding.current.chain = binding.ChainKernels(path, device, seed=2)
        else:
            binding.current.kernels = binding.Kernels(path, device, seed=2)
        for case in CHAINS if chain else CASES:
            for dtype in (torch.float32, torch.bfloat16) if case.get("training", True) else (torch.float32,):
                op_cases.check((op_cases.chain if chain else op_cases.reconstruction)(**case), "cuda", dtype)
    del kept
    print("no finding")


if __name__ == "__main__":
    main()
