"""What plain torch runs in place of an op; the authors' losses are in `infopro_fast.planning.released`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast.planning.released import ReleasedDecoder


class ReorderedDecoder(ReleasedDecoder):
    """Our algebra for a compiler to fuse: what the reordering gives without kernels.

    The first convolution becomes nine 1x1 convolutions at the size of h, whose results are resized, shifted
    and added.
    """

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        conv1, norm, relu, conv2, _ = self.decoder
        K, C = conv1.weight.shape[:2]
        H = self.size
        taps = conv1.weight.permute(2, 3, 0, 1).reshape(9 * K, C, 1, 1)
        low = F.interpolate(F.conv2d(features, taps), size=[H, H], mode="bilinear", align_corners=True)
        padded = F.pad(low.unflatten(1, (3, 3, K)), (1, 1, 1, 1))
        shifted = (padded[:, dy, dx, :, dy : dy + H, dx : dx + H] for dy in range(3) for dx in range(3))
        z = sum(shifted) + conv1.bias[:, None, None]
        return F.binary_cross_entropy_with_logits(conv2(relu(norm(z))), image)


def upsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return F.conv2d(doubled, weight, bias, padding=1)


def short_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """The supervised contrastive loss in the fewest N x N maps that plain torch allows."""
    z = F.normalize(features, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = z @ z.T / temperature
    positives = (labels[:, None] == labels) & ~itself
    count = positives.sum(1)
    chosen = torch.where(positives, logits, 0).sum(1)
    denominator = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    return -((chosen - count * denominator) / count.clamp(min=1)).mean()


def cross_entropy(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def norm_relu_pool(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    return F.relu(bn(x)).mean((2, 3))


def conv_norm_relu_pool(x: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> torch.Tensor:
    return norm_relu_pool(conv(x), bn)
