"""DeepLabV3-ResNet-101 with output stride 8, as the released segmentation code (on mmsegmentation) trains it on Cityscapes.

ResNetV1c: a stem of three conv3x3 (32, 32, 64), strides 1, 2, 1, 1 and dilations 1, 1, 2, 4 of the stages, the first block of a
dilated stage with half its dilation; an ASPP head of 512 channels (dilations 1, 12, 24, 36); an FCN head on the third stage's output,
weight 0.4. The residual blocks are torchvision's. With ``SyncBatchNorm.convert_sync_batchnorm`` it has the released norms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import Unit
from .imagenet import ReleasedNames
from .segmentation import PixelClassifier, Tap, dense_head

ARCHS = {"deeplabv3_resnet50": "resnet50", "deeplabv3_resnet101": "resnet101"}
AUXILIARY_WEIGHT = 0.4
TAP = 3  # stage whose output the FCN head reads


def _conv(inplanes: int, planes: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inplanes, planes, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the image's mean and four branches, concatenated, conv3x3, Dropout2d, conv1x1 to the classes."""

    def __init__(self, inplanes: int, planes: int, class_num: int, dilations: tuple[int, ...] = (1, 12, 24, 36)):
        super().__init__()
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(inplanes, planes, 1))
        self.branches = nn.ModuleList(nn.Sequential(*_conv(inplanes, planes, 1 if d == 1 else 3, dilation=d)) for d in dilations)
        self.join = nn.Sequential(*_conv((1 + len(dilations)) * planes, planes))
        self.dropout = nn.Dropout2d(0.1)
        self.classes = nn.Conv2d(planes, class_num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = F.interpolate(self._mean(x), x.shape[-2:], mode="bilinear", align_corners=False)
        maps = torch.cat([mean, *(branch(x) for branch in self.branches)], 1)
        return self.classes(self.dropout(self.join(maps)))

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        pool, conv, norm, relu = self.mean
        mean = conv(pool(x))
        if len(x) > 1 or not self.training or isinstance(norm, nn.SyncBatchNorm):
            return relu(norm(mean))
        # A single image has one value a channel, and no variance: its running statistics normalise it, and do not move.
        return relu(F.batch_norm(mean, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps))


class DeepLabEnd(PixelClassifier):
    """The ASPP head, and the FCN head on the third stage's output. Released names."""

    def released_nets(self, stage, block):
        nets = {f"decode_head.{name}": module for name, module in _aspp_names(self.head)}
        conv, norm, _, _, classes = self.auxiliary_head
        return nets | {"auxiliary_head.convs.0.conv.": conv, "auxiliary_head.convs.0.bn.": norm, "auxiliary_head.conv_seg.": classes}


def _aspp_names(aspp: ASPP) -> Iterator[tuple[str, nn.Module]]:
    _, conv, norm, _ = aspp.mean
    yield from (("image_pool.1.conv.", conv), ("image_pool.1.bn.", norm))
    for i, (conv, norm, _) in enumerate(aspp.branches):
        yield from ((f"aspp_modules.{i}.conv.", conv), (f"aspp_modules.{i}.bn.", norm))
    conv, norm, _ = aspp.join
    yield from (("bottleneck.conv.", conv), ("bottleneck.bn.", norm), ("conv_seg.", aspp.classes))


class CityscapesInfoPro(ReleasedNames):
    names = ("decoder_inter", "head_inter")

    def released_nets(self, stage, block):
        decoder, head = super().released_nets(stage, block)
        return {decoder: self.decoder.decoder, head: self.aux_classifier.head}


def units(arch: str) -> tuple[list[Unit], Tap]:
    """The blocks of ``arch``, positions as torchvision's (stem (0, 0), layer1.0 (1, 0), ...), and the tap behind the third stage."""
    import torchvision

    resnet = getattr(torchvision.models, ARCHS[arch])(replace_stride_with_dilation=[False, True, True])
    stem = nn.Sequential(*_conv(3, 32, stride=2), *_conv(32, 32), *_conv(32, 64), nn.MaxPool2d(3, 2, 1))
    found, tap = [Unit((0, 0), "backbone.stem.", stem, 64, 4)], Tap()
    for stage in (1, 2, 3, 4):
        blocks = list(getattr(resnet, f"layer{stage}"))
        for i, block in enumerate(blocks):
            scale = 4 if stage == 1 else 8
            found.append(Unit((stage, i), f"backbone.layer{stage}.{i}.", block, block.conv3.out_channels, scale, f"layer{stage}.{i}"))
        if stage == TAP:
            found.append(Unit((stage, len(blocks)), "", tap, found[-1].channels, 8, "tap"))
    return found, tap


def end(class_num: int, tap: Tap, *, label_smoothing: float = 0.0, impl: str = "auto") -> DeepLabEnd:
    """The loss of the last module, which ``tap`` is in."""
    auxiliary = (tap, dense_head(1024, 256, class_num, bias=False), AUXILIARY_WEIGHT)
    return DeepLabEnd(ASPP(2048, 512, class_num), class_num, auxiliary, label_smoothing=label_smoothing, impl=impl)
