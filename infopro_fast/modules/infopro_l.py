"""InfoProL: a local module reconstructs its input instead of the image.

The idea is that of Pathak, Zhang, Samaras, "Local Learning on Transformers via Feature Reconstruction" (arXiv
2212.14215), whose modules "reconstruct their input features, generated from previous modules". They train
transformers; decoder, normalisation and weights for the networks here are choices of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast import ops
from infopro_fast.ops.plain import not_plain

from .decoder import HIDDEN
from .local_loss import InfoPro

VARIANCE_EPS = 1e-5  # as in a batch norm


class FeatureDecoder(nn.Module):
    """Resize to the module's input, conv3x3, BatchNorm, ReLU, conv3x3, BatchNorm; mean squared error.

    inplanes: channels C of the module's output. planes: channels C' of its input. size: (H, W) of its input.
    widen: factor of the hidden channels, max(12, C'). impl: of `ops.upsample_conv3x3`, which resizes
    (bilinear, align_corners=True) where the module changes the size; the other layers are torch's.

    The target is the input minus its channels' means over the batch, divided by the root of the channels'
    average variance. So a decoder that knows nothing has a loss of 1 at every module, and a weight means the
    same everywhere. The last batch norm keeps the output at the target's scale. Without it the squared error,
    which has no bound, diverged at usual learning rates (SGD with momentum 0.9, lr 0.05, weight 5).
    """

    def __init__(
        self, inplanes: int, planes: int, size: tuple[int, int], widen: float = 1, *, impl: str = "auto"
    ):
        super().__init__()
        hidden = int(max(HIDDEN, planes) * widen)
        if hidden < 1:
            least = 1 / max(HIDDEN, planes)
            raise ValueError(f"FeatureDecoder: widen: expected at least {least:.3f}, got {widen}")
        self.size, self.impl = (size[0], size[1]), impl
        self.decoder = nn.Sequential(
            nn.Conv2d(inplanes, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )

    def forward(self, features: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return a 0-d tensor. features: (N, C, h, w), the output; given: (N, C', H, W), the input."""
        if tuple(given.shape[-2:]) != self.size:
            raise ValueError(f"FeatureDecoder: given: expected maps of {self.size}, got {tuple(given.shape)}")
        first, resized = self.decoder[0], tuple(features.shape[-2:]) != self.size
        if resized and not (not_plain(self.decoder, nn.Sequential) or not_plain(first, nn.Conv2d)):
            weight, bias = first.weight, first.bias
            x = ops.upsample_conv3x3(features, weight, bias, self.size, align_corners=True, impl=self.impl)
            x = self.decoder[1:](x)
        else:
            if resized:
                features = F.interpolate(features, self.size, mode="bilinear", align_corners=True)
            x = self.decoder(features)
        dtype = torch.promote_types(x.dtype, torch.float32)
        target = given.detach().to(dtype)
        variance, mean = torch.var_mean(target, (0, 2, 3), correction=0, keepdim=True)
        target = (target - mean) * torch.rsqrt(variance.mean() + VARIANCE_EPS)
        return (x.to(dtype) - target).square().mean()

    def extra_repr(self) -> str:
        return f"size={self.size}, impl={self.impl!r}"


class InfoProL(InfoPro):
    """reconstruction_weight * reconstruction(h_k, h_{k-1}) + task_weight * task(h_k, label).

    For the first module h_0 is the normalised image. decoder: a `FeatureDecoder`; the rest as in `InfoPro`.
    """

    wants_input = True
