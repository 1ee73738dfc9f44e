"""InfoPro's auxiliary decoders, which reconstruct the image from a local module's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from infopro_fast import ops
from infopro_fast.ops.plain import not_plain
from infopro_fast.ops.reconstruction_loss import reconstruction_loss_by_layers

KINDS = (
    nn.Sequential, nn.Upsample, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Sigmoid,
)  # what `ops.reconstruction_loss` takes
HIDDEN = 12  # channels between the two convolutions, times ``widen``


class _Fused(nn.Module):
    """Base of the decoders: ``decoder``, which ends in a sigmoid, and the op that fuses it with a loss."""

    def __init__(self, decoder: nn.Sequential, **options):
        super().__init__()
        self.decoder, self.options = decoder, options

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return the mean reconstruction loss, a 0-d tensor. features: (N, C, h, w); image: (N, 3, H, W).

        If a layer does more than its class (`not_plain`: hooks, subclasses) or is another one, the layers run
        one by one. An ``impl`` of kernels by name raises there.
        """
        options, impl = dict(self.options), self.options["impl"]
        layers = (self.decoder, *self.decoder)
        if impl in ("auto", "reference") and any(not_plain(layer, *KINDS) for layer in layers):
            del options["impl"]
            return reconstruction_loss_by_layers(features, image, self.decoder, **options)
        return ops.reconstruction_loss(features, image, self.decoder, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Decoder(_Fused):
    """The authors' CIFAR decoder: resize to the image, conv3x3, BatchNorm, ReLU, conv3x3, sigmoid.

    inplanes: channels C of the features. image_size: height and width of the (square) images.
    interpolate_mode: "bilinear" (align_corners=True) or "nearest". widen: factor of the 12 hidden channels.
    image_mean, image_std: pass both, three numbers each, with normalised images; the op undoes the
    normalisation. None: images in [0, 1], as in the authors' code.
    loss: "bce" (the authors'), "mse" or "l1". impl: as in `ops.reconstruction_loss`.

    The state_dict has the authors' keys (``decoder.0.weight``, ..., ``decoder.3.bias``). Layers are
    initialised as in torch; `build` draws the convolutions as the authors do (`backbones.initialize`).
    """

    def __init__(
        self, inplanes: int, image_size: int, interpolate_mode: str = "bilinear", widen: float = 1, *,
        image_mean: Sequence[float] | None = None, image_std: Sequence[float] | None = None,
        loss: str = "bce", impl: str = "auto",
    ):
        hidden = int(HIDDEN * widen)
        if hidden < 1:
            raise ValueError(f"Decoder: widen: expected at least {1 / HIDDEN:.3f}, got {widen}")
        first, last = nn.Conv2d(inplanes, hidden, 3, padding=1), nn.Conv2d(hidden, 3, 3, padding=1)
        layers = nn.Sequential(first, nn.BatchNorm2d(hidden), nn.ReLU(), last, nn.Sigmoid())
        options = {"image_mean": image_mean, "image_std": image_std, "impl": impl}
        super().__init__(layers, interpolate_mode=interpolate_mode, loss=loss, **options)
        self.image_size = image_size

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        side = self.image_size
        if tuple(image.shape[-2:]) != (side, side):
            raise ValueError(f"Decoder: image: expected (N, 3, {side}, {side}), got {tuple(image.shape)}")
        return super().forward(features, image)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, {super().extra_repr()}"


# Channels at the image's size, a half, a quarter and an eighth of it, in the authors' ImageNet and Cityscapes
# decoders.
CHAIN_WIDTHS = (12, 12, 32, 128)


class ChainDecoder(_Fused):
    """The authors' ImageNet and Cityscapes decoder, for features of any width and size.

    conv1x1 to 128, BatchNorm, ReLU; then up to the image's size: a doubling (bilinear, align_corners=True)
    and conv3x3 to 32, 12, 3 channels, with BatchNorm and ReLU between them; sigmoid. Features smaller than an
    eighth of the image get more doublings, of 128 channels; larger features skip the first ones. If the ratio
    of the sizes is no power of two, the resizes lead to sizes in between.

    inplanes: channels C. size: (h, w) of the features. image_size: (H, W). The other arguments: as in
    `Decoder`.
    """

    def __init__(
        self, inplanes: int, size: tuple[int, int], image_size: tuple[int, int], *,
        image_mean: Sequence[float] | None = None, image_std: Sequence[float] | None = None,
        loss: str = "bce", impl: str = "auto",
    ):
        sides = list(zip(image_size, size))
        doublings = max(0, math.ceil(math.log2(max(big / small for big, small in sides))))
        exact = all(big == small << doublings for big, small in sides)
        width = CHAIN_WIDTHS[min(doublings, 3)]
        layers = [nn.Conv2d(inplanes, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        for left in range(doublings - 1, -1, -1):
            between = [round(big * (small / big) ** (left / doublings)) for big, small in sides]
            to = {"scale_factor": 2} if exact else {"size": between}
            planes = CHAIN_WIDTHS[min(left, 3)] if left else 3
            layers += [nn.Upsample(**to, mode="bilinear", align_corners=True)]
            layers += [nn.Conv2d(width, planes, 3, padding=1)]
            layers += [nn.BatchNorm2d(planes), nn.ReLU()] if left else []
            width = planes
        if not doublings:
            layers.append(nn.Conv2d(width, 3, 3, padding=1))
        options = {"loss": loss, "image_mean": image_mean, "image_std": image_std, "impl": impl}
        super().__init__(nn.Sequential(*layers, nn.Sigmoid()), **options)
