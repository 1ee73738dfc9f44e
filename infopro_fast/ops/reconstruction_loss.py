"""Decoder-reconstruction loss of InfoPro, fused: the bound on I(h, x) of the paper (Wang et al. 2021, eq. 6).

For each stage of the decoder, with a = h at first, the last stage without batch norm and ReLU:

    z = conv(resize(a)) + bias      conv 1x1 or 3x3; resize bilinear, nearest or none
    a = relu(batch_norm(z))

    loss = mean BCE(sigmoid(z), image), or the mean squared or absolute error

`reconstruction_loss_layers` reads the decoder. The decoder of the authors' CIFAR code, one hidden stage, runs
as one op on the CPU and in CUDA C++ (`reconstruction_loss_single`). Longer decoders, and all of them under
Triton, run as an op a stage (`reconstruction_loss_chain`).
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import nn

from .batch_norm import batch_norm_ref
from .dispatch import LIBRARY, check_floating, compute_dtype, no_autocast, resolve
from .reconstruction_loss_chain import chain_loss
from .reconstruction_loss_layers import OP, Layers, decoder_stages, find_layers, limitations
from .reconstruction_loss_single import single_loss

MODES = ("bilinear", "nearest")
LOSSES = ("bce", "mse", "l1")


def reconstruction_loss(
    features: torch.Tensor,
    image: torch.Tensor,
    decoder: nn.Sequential,
    *,
    interpolate_mode: str = "bilinear",
    loss: str = "bce",
    image_mean: typing.Sequence[float] | None = None,
    image_std: typing.Sequence[float] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return the mean loss of reconstructing ``image`` from ``features`` by ``decoder``.

    Running statistics move as in the layers' own forward.

    Args:
        features: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
        image: (N, 3, H, W), floating, in [0, 1], or normalised if ``image_mean`` and ``image_std`` are given.
            Clamped to [0, 1] where it is at most 1/512 outside, as rounding is, or 1 if normalised, as noise
            and augmentation may be. Further outside, the CPU raises ValueError; a GPU, where a check would
            wait, gives a loss of nan. Only the reference gives it a gradient.
        decoder: any number of hidden stages (Upsample or none, Conv2d 1x1 or 3x3, BatchNorm2d or
            SyncBatchNorm, ReLU), then Upsample or none, Conv2d 3x3 to 3 channels, Sigmoid. The decoders of
            the authors' code for CIFAR, ImageNet and Cityscapes are such. Convolutions keep the size. Biases
            and affine parameters are optional. An Upsample is bilinear or nearest, to a size or by a factor.
            A SyncBatchNorm in training takes the statistics of all processes in its group. A layer whose call
            does more (`plain.not_plain`: hooks, subclasses) is refused; parametrised weights are taken.
        interpolate_mode: how features are resized to (H, W) if the decoder has no Upsample: "bilinear"
            (align_corners=True, as in the authors' code) or "nearest".
        loss: "bce", "mse" or "l1", the mean over all N*3*H*W elements.
        image_mean, image_std: three numbers each, or both None: the target is image * std + mean.
        impl: "auto", "reference", "cpu", "triton" or "cuda". A named implementation runs or raises. "cuda"
            takes a CIFAR decoder if its hidden channels fit the shared memory of every GPU: 140 at the usual
            sizes. In other decoders it runs 3x3 convolutions of at most 64 to at most 16 channels that
            enlarge at most 16 times; the last must be one, and Triton's kernels run the rest. Triton has none
            for an Upsample whose factor gives no whole size; there "auto" takes the reference, and warns.

    Returns:
        A 0-d tensor, float64 if any input is, else float32, as is the arithmetic. An empty batch gives 0.
        For a CIFAR decoder without a resize, "cuda" multiplies in the precision that torch's own convolutions
        have: autocast's or the features' type, TF32 as torch.backends.cudnn.conv.fp32_precision says; sums
        are float32.

    Raises:
        TypeError, ValueError: names the argument or the layer, what was expected and what came.

    The kernels keep for backward the inputs and, for each hidden stage of K channels, its z (N K H W numbers)
    and 2 K numbers. "cpu" and "cuda" keep for a CIFAR decoder 31 K + 3 numbers in all. "cuda" without a
    resize also keeps 4 N H W numbers in the type of the products' operands.
    """
    stages = decoder_stages(decoder)
    _check(features, image, stages[0].conv.in_channels, interpolate_mode, loss, image_mean, image_std)
    for_gpu = impl in ("triton", "cuda") or features.device.type == "cuda"
    layers = find_layers(stages, features, image, interpolate_mode, for_gpu)
    tensors = {"features": features, "image": image}
    tensors |= {f"decoder.{name}": p for name, p in decoder.named_parameters()}
    limitation: dict[str, str | None] | str | None = limitations(layers, features.device) if for_gpu else None
    if image.requires_grad:
        limitation = "image requires grad, which the reference alone supports"
    chosen = resolve(OP, impl, tensors, limitation)
    layers = layers._replace(convolutions=tuple((stage.conv.weight, stage.conv.bias) for stage in stages))
    if chosen == "reference":
        options = (interpolate_mode, loss, image_mean, image_std)
        return reconstruction_loss_ref(features, image, decoder, layers, *options)
    restore = [] if image_mean is None else [float(v) for v in (*image_mean, *image_std)]
    run = single_loss if layers.single and chosen != "triton" else chain_loss
    return run(features, image, layers, LOSSES.index(loss), restore, chosen)


def reconstruction_loss_ref(
    features, image, decoder, layers: Layers, interpolate_mode, loss, image_mean, image_std
) -> torch.Tensor:
    """The specification, in plain torch: arguments as in `reconstruction_loss`, and the call's `Layers`."""
    dtype = compute_dtype(features, image, layers.convolutions[0][0])
    with no_autocast(features.device):
        target = image_target(image.to(dtype), image_mean, image_std)
        if features.shape[0] == 0 and all(group is None for group in layers.groups):
            touched = features.sum() + image.sum() + sum(p.sum() for p in decoder.parameters())
            return touched.to(dtype) * 0
        x = features.to(dtype)
        if all(stage.upsample is None for stage in layers.stages):
            corners = True if interpolate_mode == "bilinear" else None
            x = F.interpolate(x, image.shape[-2:], mode=interpolate_mode, align_corners=corners)
        for (upsample, conv, norm), (weight, bias) in zip(layers.stages, layers.convolutions, strict=True):
            x = x if upsample is None else upsample(x)
            bias = None if bias is None else bias.to(dtype)
            x = F.conv2d(x, weight.to(dtype), bias, padding=conv.kernel_size[0] // 2)
            x = x if norm is None else F.relu(batch_norm_ref(x, norm))
        if x.shape[0] == 0:  # the other processes of a SyncBatchNorm wait for this one's statistics
            return x.sum()
        if loss == "bce":
            return F.binary_cross_entropy_with_logits(x, target)
        return F.mse_loss(x.sigmoid(), target) if loss == "mse" else F.l1_loss(x.sigmoid(), target)


def reconstruction_loss_by_layers(
    features: torch.Tensor, image: torch.Tensor, decoder: nn.Sequential, *,
    interpolate_mode: str = "bilinear", loss: str = "bce", image_mean=None, image_std=None,
) -> torch.Tensor:
    """Return the loss by a call of the decoder, whatever its layers; arguments as in `reconstruction_loss`.

    Hooks, subclasses and other layers run. The binary cross entropy is taken from probabilities, as in the
    authors' code: it saturates where a logit's magnitude exceeds 16 in float32.
    """
    if not any(isinstance(layer, nn.Upsample) for layer in decoder):
        corners = True if interpolate_mode == "bilinear" else None
        features = F.interpolate(features, image.shape[-2:], mode=interpolate_mode, align_corners=corners)
    output = decoder(features)
    dtype = compute_dtype(output, image)
    with no_autocast(image.device):
        output, target = output.to(dtype), image_target(image.to(dtype), image_mean, image_std)
        if loss == "bce":
            known = ~(output * target).isnan()  # torch's loss raises for others, which must give nan
            value = F.binary_cross_entropy(torch.where(known, output, 0.5), torch.where(known, target, 0.5))
            return torch.where(known.all(), value, torch.nan)
        return F.mse_loss(output, target) if loss == "mse" else F.l1_loss(output, target)


def restore_image(image: torch.Tensor, mean, std) -> torch.Tensor:
    """Return the image (N, 3, H, W) from one normalised per channel; as it is if mean is None."""
    if mean is None:
        return image
    shape = (1, -1, 1, 1)
    return image * image.new_tensor(std).view(shape) + image.new_tensor(mean).view(shape)


def image_target(image: torch.Tensor, mean, std) -> torch.Tensor:
    """Return the restored image, clamped to [0, 1]: ValueError, on a GPU nan, where it is far outside.

    Rounding moves an image by less than 1/512, half a step of 8 bits. A normalised image may overshoot, by
    noise or augmentation, but not by 1. A GPU would have to wait for a check.
    """
    image = restore_image(image, mean, std)
    outside = torch.ops.infopro_fast.outside_unit_range(image.detach(), mean is not None)
    return torch.where(outside, torch.nan, image.clamp(0, 1))


def _outside_unit_range(image, restored):
    outside = (image - image.clamp(0, 1)).abs() > (1 if restored else 1 / 512)
    if image.device.type == "cpu" and outside.any():
        name = "image * image_std + image_mean" if restored else "image"
        hint = "" if restored else ": pass image_mean and image_std for a normalised image"
        known = image.nan_to_num(0.5, torch.inf, -torch.inf)
        got = f"{known.min().item():g} to {known.max().item():g}"
        raise ValueError(f"{OP}: {name}: expected numbers in [0, 1], got {got}{hint}")
    return outside


# An op of its own, so that a compiler does not trace into it.
LIBRARY.define("outside_unit_range(Tensor image, bool restored) -> Tensor")
LIBRARY.impl("outside_unit_range", _outside_unit_range, "CompositeExplicitAutograd")
torch.library.register_fake(
    "infopro_fast::outside_unit_range", lambda image, restored: torch.empty_like(image, dtype=torch.bool),
    lib=LIBRARY,
)


def _check(features, image, C, interpolate_mode, loss, image_mean, image_std):
    check_floating(OP, {"features": features, "image": image})
    if features.dim() != 4 or features.shape[1] != C:
        raise ValueError(f"{OP}: features: expected (N, {C}, h, w), got {tuple(features.shape)}")
    if image.dim() != 4 or image.shape[1] != 3 or image.shape[0] != features.shape[0]:
        raise ValueError(f"{OP}: image: expected ({features.shape[0]}, 3, H, W), got {tuple(image.shape)}")
    if 0 in features.shape[2:] or 0 in image.shape[2:]:
        got = f"features {tuple(features.shape)}, image {tuple(image.shape)}"
        raise ValueError(f"{OP}: expected maps of at least 1x1, got {got}")
    if interpolate_mode not in MODES:
        raise ValueError(f"{OP}: interpolate_mode: expected one of {MODES}, got {interpolate_mode!r}")
    if loss not in LOSSES:
        raise ValueError(f"{OP}: loss: expected one of {LOSSES}, got {loss!r}")
    if (image_mean is None) != (image_std is None):
        got = f"{image_mean}, {image_std}"
        raise ValueError(f"{OP}: image_mean, image_std: expected both or neither, got {got}")
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if value is not None and (not hasattr(value, "__len__") or len(value) != 3):
            raise ValueError(f"{OP}: {name}: expected 3 numbers, got {value}")
