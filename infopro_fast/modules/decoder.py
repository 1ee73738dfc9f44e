"""The auxiliary decoder of InfoPro: reconstructs the image from a local module's features (released networks/util.py, Decoder)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from infopro_fast import ops

HIDDEN = 12  # channels between the two convolutions, times ``widen``


class Decoder(nn.Module):
    """Drop-in for the released CIFAR decoder: resize to the image, conv3x3, BatchNorm, ReLU, conv3x3, sigmoid, BCE; fused.

    inplanes: channels C of the features. image_size: height and width of the (square) images.
    interpolate_mode: "bilinear" (align_corners=True) or "nearest". widen: factor of the 12 hidden channels.
    image_mean, image_std: three numbers each if the images come normalised; they are then restored inside the loss.
        None (as released): images in [0, 1]. loss: "bce" (released), "mse" or "l1". impl: as in `ops.reconstruction_loss`.

    The state_dict's keys are the released ones (``decoder.0.weight``, ..., ``decoder.3.bias``). Initialised as torch's layers
    are; the released code draws the convolutions' weights in the network (`backbones.initialize`, called by `build`).
    """

    def __init__(
        self,
        inplanes: int,
        image_size: int,
        interpolate_mode: str = "bilinear",
        widen: float = 1,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        loss: str = "bce",
        impl: str = "auto",
    ):
        super().__init__()
        hidden = int(HIDDEN * widen)
        if hidden < 1:
            raise ValueError(f"Decoder: widen: expected at least {1 / HIDDEN:.3f} (one hidden channel), got {widen}")
        self.image_size = image_size
        self.options = {"interpolate_mode": interpolate_mode, "loss": loss, "image_mean": image_mean, "image_std": image_std, "impl": impl}
        self.decoder = nn.Sequential(
            nn.Conv2d(inplanes, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Mean reconstruction loss, a 0-d tensor. features: (N, inplanes, h, w); image: (N, 3, image_size, image_size)."""
        if tuple(image.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(f"Decoder: image: expected (N, 3, {self.image_size}, {self.image_size}), got {tuple(image.shape)}")
        return ops.reconstruction_loss(features, image, self.decoder, **self.options)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, " + ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# Channels at a whole, a half, a quarter and an eighth of the image's size: those of the released ImageNet and Cityscapes decoders.
CHAIN_WIDTHS = (12, 12, 32, 128)


class ChainDecoder(nn.Module):
    """The released ImageNet and Cityscapes decoder on features of any width and size.

    conv1x1 to 128, BatchNorm, ReLU; then until the image's size: twice the size (bilinear, align_corners=True), conv3x3 to 32, 12, 3
    channels, BatchNorm and ReLU between them; sigmoid, BCE. Features that are smaller than an eighth of the image begin with as many
    doublings more (of 128 channels), larger ones leave out the first ones; sizes whose ratio is no power of two are resized to sizes
    in between.

    inplanes: channels C. size: (h, w) of the features. image_size: (H, W). The other arguments: as in `Decoder`.
    """

    def __init__(
        self,
        inplanes: int,
        size: tuple[int, int],
        image_size: tuple[int, int],
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        loss: str = "bce",
        impl: str = "auto",
    ):
        super().__init__()
        self.options = {"loss": loss, "image_mean": image_mean, "image_std": image_std, "impl": impl}
        doublings = max(0, math.ceil(math.log2(max(big / small for big, small in zip(image_size, size)))))
        exact = all(big == small << doublings for big, small in zip(image_size, size))
        width = CHAIN_WIDTHS[min(doublings, 3)]
        layers = [nn.Conv2d(inplanes, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        for left in range(doublings - 1, -1, -1):
            if exact:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
            else:
                between = [round(big * (small / big) ** (left / doublings)) for big, small in zip(image_size, size)]
                layers.append(nn.Upsample(size=between, mode="bilinear", align_corners=True))
            planes = CHAIN_WIDTHS[min(left, 3)] if left else 3
            layers += [nn.Conv2d(width, planes, 3, padding=1), *([nn.BatchNorm2d(planes), nn.ReLU()] if left else [])]
            width = planes
        if not doublings:
            layers.append(nn.Conv2d(width, 3, 3, padding=1))
        self.decoder = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Mean reconstruction loss, a 0-d tensor. features: (N, inplanes, h, w); image: (N, 3, H, W), as large as the decoder makes it."""
        return ops.reconstruction_loss(features, image, self.decoder, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
