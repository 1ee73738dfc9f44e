"""What a decoder of `reconstruction_loss` is: its layers, the sizes of its maps, and which kernels run it.

`decoder_stages` reads the layers, `find_layers` adds what depends on the call. Each runs once a call;
everything else takes its result.
"""

from __future__ import annotations

import math
import typing

import torch
from torch import nn

from . import dispatch
from .batch_norm import Norm, sync_group, uses_batch_statistics
from .plain import not_plain
from .resize import CORNERS, most_sources, resize_of

OP = "reconstruction_loss"
FORM = (
    "nn.Sequential of any number of (Conv2d 1x1 or 3x3, BatchNorm2d or SyncBatchNorm, ReLU, and an Upsample "
    "or none), then Conv2d 3x3 to 3 channels, Sigmoid"
)
CONVOLUTION = "a 1x1 or 3x3 convolution, stride 1, with the zero padding that keeps the size"
LAST_CONVOLUTION = "a 3x3 convolution to 3 channels, stride 1, zero padding 1"


class Stage(typing.NamedTuple):
    """Resize, convolution, batch norm and ReLU; the last stage has neither batch norm nor ReLU."""

    upsample: nn.Upsample | None
    conv: nn.Conv2d
    norm: Norm | None


class Resize(typing.NamedTuple):
    """The resize in front of a stage's convolution, from (h, w) to (H, W).

    mode: an index into `resize.RESIZES`. factors: the two scale factors that place the samples, or none.
    """

    h: int
    w: int
    H: int
    W: int
    mode: int
    factors: tuple[float, ...]


class Layers(typing.NamedTuple):
    """A decoder, and the facts about it in one call.

    resizes: one a stage. norms, batch_statistics, groups: for each hidden stage its batch norm, whether that
    takes the batch's statistics, and the process group it shares them with, or None. cuda_limits: for each
    stage, why the CUDA C++ kernels cannot run it, or None; () if the call is not for a GPU. single: whether
    the decoder has the form of the authors' CIFAR code, which is one op on the CPU and in CUDA C++.
    convolutions: weight and bias of each stage, read when the call is sure to run, since reading computes a
    parametrised weight.
    """

    stages: tuple[Stage, ...]
    resizes: tuple[Resize, ...]
    norms: tuple[Norm, ...]
    batch_statistics: tuple[bool, ...]
    groups: tuple
    cuda_limits: tuple[str | None, ...]
    single: bool
    convolutions: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()


# ------------------------------------------------------------------------------------------------------------
# The layers


def decoder_stages(decoder: nn.Sequential) -> tuple[Stage, ...]:
    """Return the stages of a decoder. Raises ValueError that names the layer which does not fit."""
    if not isinstance(decoder, nn.Sequential) or len(decoder) < 2:
        size = f" of {len(decoder)}" if isinstance(decoder, nn.Sequential) else ""
        inner = isinstance(getattr(decoder, "decoder", None), nn.Sequential)
        got = f"{type(decoder).__name__}{size}" + ": pass its .decoder" * inner
        raise ValueError(f"{OP}: decoder: expected {FORM}, got {got}")
    _check_plain("decoder", decoder, nn.Sequential)
    layers = list(decoder)  # not children(): a layer without parameters may stand in two places
    stages: list[Stage] = []
    at = 0

    def take(*kinds: typing.Any) -> typing.Any:
        nonlocal at
        layer = layers[at] if at < len(layers) else None
        kind = next((k for k in kinds if isinstance(layer, k)), None)
        if kind is None:
            names, got = " or ".join(k.__name__ for k in kinds), layer or "the end"
            raise ValueError(f"{OP}: decoder[{at}]: expected {names}, got {got}; a decoder is {FORM}")
        _check_plain(f"decoder[{at}]", layer, kind)
        at += 1
        return layer

    while True:
        upsample = None
        if at < len(layers) and isinstance(layers[at], nn.Upsample):
            upsample = take(nn.Upsample)
            if upsample.mode not in ("bilinear", "nearest"):
                expected = "mode 'bilinear' or 'nearest'"
                raise ValueError(f"{OP}: decoder[{at - 1}]: expected {expected}, got {upsample}")
        conv, place = take(nn.Conv2d), at - 1
        last = at == len(layers) - 1 and isinstance(layers[at], nn.Sigmoid)
        _check_convolution(conv, place, last, stages[-1].conv.out_channels if stages else conv.in_channels)
        if last:
            take(nn.Sigmoid)
            return (*stages, Stage(upsample, conv, None))
        norm = take(nn.BatchNorm2d, nn.SyncBatchNorm)
        if norm.num_features != conv.out_channels:
            expected = f"{conv.out_channels} features, as decoder[{place}] gives"
            raise ValueError(f"{OP}: decoder[{at - 1}]: expected {expected}, got {norm}")
        take(nn.ReLU)
        stages.append(Stage(upsample, conv, norm))


def _check_plain(name: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    reason = not_plain(layer, kind)
    if reason is not None:
        expected = f"a {kind.__name__} whose call runs nothing else, as the kernels run nothing else"
        raise ValueError(f"{OP}: {name}: expected {expected}, got {layer}: {reason}")


def _check_convolution(conv: nn.Conv2d, place: int, last: bool, inputs: int) -> None:
    known: dict[tuple[int, ...], tuple] = {(3, 3): ((1, 1), "same"), (1, 1): ((0, 0), "same", "valid")}
    padding = known.get(conv.kernel_size, ())
    options = (conv.padding_mode, conv.stride, conv.dilation, conv.groups)
    plain = conv.padding in padding and options == ("zeros", (1, 1), (1, 1), 1)
    if not plain or (last and (conv.kernel_size != (3, 3) or conv.out_channels != 3)):
        expected = LAST_CONVOLUTION if last else CONVOLUTION
        raise ValueError(f"{OP}: decoder[{place}]: expected {expected}, got {conv}")
    if conv.in_channels != inputs:
        expected = f"{inputs} input channels, as the convolution before gives"
        raise ValueError(f"{OP}: decoder[{place}]: expected {expected}, got {conv}")


# ------------------------------------------------------------------------------------------------------------
# Sizes, statistics and limits of one call


def find_layers(
    stages: tuple[Stage, ...],
    features: torch.Tensor,
    image: torch.Tensor,
    interpolate_mode: str,
    for_gpu: bool,
) -> Layers:
    """Return the `Layers` of a call.

    A decoder without an Upsample gets features that are first resized to the image's size, by
    ``interpolate_mode``. Raises ValueError if the decoder makes maps of another size than the image, or if a
    batch norm in training would see one value a channel, as the layer itself raises.
    """
    N, _, h, w = features.shape
    alone = all(stage.upsample is None for stage in stages)
    resizes: list[Resize] = []
    for stage in stages:
        if stage.upsample is not None:
            resize = _resize_by(stage.upsample, h, w)
        elif alone and not resizes:
            resize = Resize(h, w, image.shape[2], image.shape[3], resize_of(interpolate_mode, True), ())
        else:
            resize = Resize(h, w, h, w, CORNERS, ())
        resizes.append(resize)
        h, w = resize.H, resize.W
    if (h, w) != tuple(image.shape[2:]):
        made = f"({N}, 3, {h}, {w}), which the decoder makes of features {tuple(features.shape)}"
        raise ValueError(f"{OP}: image: expected {made}, got {tuple(image.shape)}")

    norms = tuple(stage.norm for stage in stages if stage.norm is not None)
    batch_statistics, groups = tuple(map(uses_batch_statistics, norms)), tuple(map(sync_group, norms))
    for norm, resize, of_batch, group in zip(norms, resizes, batch_statistics, groups, strict=False):
        if of_batch and group is None and N * resize.H * resize.W == 1:
            got = f"{(N, norm.num_features, resize.H, resize.W)} in front of {norm}"
            raise ValueError(f"{OP}: image: expected more than 1 value per channel when training, got {got}")

    single = alone and len(stages) == 2 and stages[0].conv.kernel_size == (3, 3) and groups[0] is None
    limits: tuple[str | None, ...] = ()
    if for_gpu and single:
        limits = (_single_cuda_limitation(stages[0].conv, resizes[0], N),)
    elif for_gpu:
        convs = [stage.conv for stage in stages]
        limits = tuple(_stage_cuda_limitation(conv, r, N) for conv, r in zip(convs, resizes, strict=True))
    return Layers(stages, tuple(resizes), norms, batch_statistics, groups, limits, single)


def _resize_by(upsample: nn.Upsample, h: int, w: int) -> Resize:
    mode = resize_of(upsample.mode, upsample.align_corners)
    pair = lambda value: tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # noqa: E731
    if upsample.size is not None:
        H, W = (int(n) for n in pair(upsample.size))
        return Resize(h, w, H, W, mode, ())
    factors = tuple(float(f) for f in pair(upsample.scale_factor))
    H, W = math.floor(h * factors[0]), math.floor(w * factors[1])
    return Resize(h, w, H, W, mode, () if upsample.recompute_scale_factor else factors)


# ------------------------------------------------------------------------------------------------------------
# Which kernels run it


def limitations(layers: Layers, device: torch.device) -> dict[str, str | None]:
    """Return for "cuda" and "triton" why their kernels cannot run the call, or None."""
    cuda = layers.cuda_limits[0] if layers.single else _cuda_limitation(layers, device)
    return {"cuda": cuda, "triton": _triton_limitation(layers.resizes)}


def implementations(layers: Layers, impl: str) -> tuple[str, ...]:
    """Return what runs each stage. "cuda" leaves hidden stages to Triton that its own kernels cannot run."""
    if impl != "cuda":
        return (impl,) * len(layers.stages)
    return tuple("cuda" if limit is None else "triton" for limit in layers.cuda_limits)


def _cuda_limitation(layers: Layers, device: torch.device) -> str | None:
    *hidden, last = layers.cuda_limits
    for limit, resize in zip(hidden, layers.resizes, strict=False):
        if limit is not None:
            missing = dispatch.missing(OP, "triton", device) or _triton_limitation((resize,))
            if missing is not None:
                return f"an earlier stage has Triton kernels alone ({limit}): {missing}"
    return None if last is None else f"the last stage: {last}"


def _triton_limitation(resizes: tuple[Resize, ...]) -> str | None:
    for h, w, H, W, mode, factors in resizes:
        if factors and mode != CORNERS and (H, W) != (h * factors[0], w * factors[1]):
            takes = "which kernels for the CPU alone take"
            return f"an Upsample by {factors} makes maps of ({h}, {w}) no whole size, {takes}"
        if max(h * w, H * W) >= 2**31:
            return f"maps of ({h}, {w}) and ({H}, {W}) need more than 32 bits to count in"
    return None


# As in csrc/cuda/chain_stage_plan.cuh: the most channels of a stage's input and output, and the largest
# enlargement. Beyond those channels, products of matrices are most of the work; the kernels do them in
# float32 alone, and again where tiles meet. Within all three limits, any GPU's shared memory holds a tile.
MOST_CHANNELS, MOST_OUTPUTS, MOST_ENLARGED = 64, 16, 16


def _stage_cuda_limitation(conv: nn.Conv2d, resize: Resize, N: int) -> str | None:
    h, w, H, W = resize[:4]
    if conv.kernel_size != (3, 3):
        return "a 1x1 convolution is left to cuBLAS"
    if conv.in_channels > MOST_CHANNELS or conv.out_channels > MOST_OUTPUTS:
        has = f"a convolution has {conv.in_channels} input and {conv.out_channels} output channels"
        return f"{has}, the CUDA C++ kernels take {MOST_CHANNELS} and {MOST_OUTPUTS}"
    if not (h <= H <= MOST_ENLARGED * h and w <= W <= MOST_ENLARGED * w):
        enlarge = f"the CUDA C++ kernels enlarge 1 to {MOST_ENLARGED} times"
        return f"maps of ({h}, {w}) become ({H}, {W}); {enlarge}"
    return "maps have 2^31 pixels or more" if N * H * W >= 2**31 else None


SHARED_MEMORY = 99 * 1024  # bytes a block may use on any GPU of compute capability 8.0 or later


def _single_cuda_limitation(conv: nn.Conv2d, resize: Resize, N: int) -> str | None:
    (h, w, H, W), C, K = resize[:4], conv.in_channels, conv.out_channels
    if max(N * H * W, 12 * C * (K + 6), C * h * w) >= 2**31:
        return "2^31 or more pixels, weights, or features of a sample"
    if least_shared_memory(h, w, H, W, K) > SHARED_MEMORY:
        maps = f"maps of ({h}, {w}) resized to ({H}, {W})"
        return f"{K} hidden channels of {maps} do not fit the shared memory of every GPU"
    return None


def least_shared_memory(h: int, w: int, H: int, W: int, K: int) -> int:
    """Return the bytes of the smallest plan in csrc/cuda/reconstruction_loss_plan.cuh, or slightly more.

    That plan has tiles of one pixel, and takes hidden channels one by one.
    """
    low_h, low_w = most_sources(5, h, H), most_sources(5, w, W)
    pixels = 4 * (-(-low_h * low_w // 4) | 1)
    z, logits = 20 * K, 3 * 56 + 4 * 27 * K  # with their borders
    rounding = 3 * 4 + 8 * 3  # to whole float4
    fixed = 34 * K + 20 + 2 * (low_h + low_w) + 8 * (2 * K + 4) + rounding
    taps, late = 9 * pixels, 4 * pixels
    scratch = max(9 * low_h, 36, pixels + 12, logits - taps) + 3
    return 4 * (z + fixed + taps + late + scratch)
