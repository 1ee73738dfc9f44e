"""Replace the losses of a training script: the same numbers, and a fraction of the memory."""

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast import ops

torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
hidden = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
decoder = nn.Sequential(*hidden, nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid())
head = nn.Linear(16, 10)
image, label = torch.rand(32, 3, 32, 32), torch.arange(32) % 10  # the op's image is in [0, 1]


def plain(h):
    resized = F.interpolate(h, image.shape[-2:], mode="bilinear", align_corners=True)
    reconstruction = F.binary_cross_entropy(decoder(resized), image)
    return reconstruction + F.cross_entropy(head(h.mean((2, 3))), label)


def fused(h):
    reconstruction = ops.reconstruction_loss(h, image, decoder)
    return reconstruction + ops.linear_cross_entropy(h.mean((2, 3)), head.weight, label, bias=head.bias)


h = body(image)
print(f"plain {plain(h).item():.6f}, fused {fused(h).item():.6f}")
torch.testing.assert_close(fused(h), plain(h), rtol=1e-4, atol=1e-5)
