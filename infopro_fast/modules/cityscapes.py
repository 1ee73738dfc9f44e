"""DeepLabV3-ResNet-101 with output stride 8, as the authors train it on Cityscapes (with mmsegmentation).

The backbone is ResNetV1c: a stem of three conv3x3 (32, 32, 64 channels), stages with strides 1, 2, 1, 1 and
dilations 1, 1, 2, 4; the first block of a dilated stage has half the dilation. The ASPP head has 512 channels
and dilations 1, 12, 24, 36. An FCN head reads the third stage's output; its loss has weight 0.4. The residual
blocks are torchvision's. ``SyncBatchNorm.convert_sync_batchnorm`` gives it the authors' norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import Unit
from .heads import conv_norm_relu
from .imagenet import ReleasedNames
from .segmentation import PixelClassifier, Tap, dense_head

ARCHS = {"deeplabv3_resnet50": "resnet50", "deeplabv3_resnet101": "resnet101"}
AUXILIARY_WEIGHT = 0.4
TAP = 3  # stage whose output the FCN head reads


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the map's mean and branches, joined by conv3x3; Dropout2d, conv1x1."""

    def __init__(self, inplanes: int, planes: int, class_num: int):
        super().__init__()
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(inplanes, planes, 1))
        branches = (conv_norm_relu(inplanes, planes, 1 if d == 1 else 3, dilation=d) for d in (1, 12, 24, 36))
        self.branches = nn.ModuleList(nn.Sequential(*layers) for layers in branches)
        self.join = nn.Sequential(*conv_norm_relu((1 + len(self.branches)) * planes, planes))
        self.dropout = nn.Dropout2d(0.1)
        self.classes = nn.Conv2d(planes, class_num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = F.interpolate(self._mean(x), x.shape[-2:], mode="bilinear", align_corners=False)
        maps = torch.cat([mean, *(branch(x) for branch in self.branches)], 1)
        return self.classes(self.dropout(self.join(maps)))

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        norm, mode = self.mean[2], self.mean[2].training
        # A single image has one value a channel and no variance. Running statistics normalise it and stay.
        norm.training = mode and (len(x) > 1 or isinstance(norm, nn.SyncBatchNorm))
        try:
            return self.mean(x)
        finally:
            norm.training = mode


class DeepLabEnd(PixelClassifier):
    """The ASPP head, and the FCN head on the third stage's output, with the authors' names."""

    def released_nets(self, stage, block):
        nets = {f"decode_head.{name}": module for name, module in _aspp_names(self.head)}
        conv, norm, _, _, classes = self.auxiliary_head
        auxiliary = {"convs.0.conv.": conv, "convs.0.bn.": norm, "conv_seg.": classes}
        return nets | {f"auxiliary_head.{name}": module for name, module in auxiliary.items()}


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
    """Return the blocks of ``arch`` at positions like torchvision's (layer1.0: (1, 0)), and the tap."""
    import torchvision

    resnet = getattr(torchvision.models, ARCHS[arch])(replace_stride_with_dilation=[False, True, True])
    convs = [*conv_norm_relu(3, 32, stride=2), *conv_norm_relu(32, 32), *conv_norm_relu(32, 64)]
    stem = nn.Sequential(*convs, nn.MaxPool2d(3, 2, 1))
    found, tap = [Unit((0, 0), "backbone.stem.", stem, 64, 4)], Tap()
    for stage in (1, 2, 3, 4):
        blocks = list(getattr(resnet, f"layer{stage}"))
        for i, block in enumerate(blocks):
            name, scale = f"layer{stage}.{i}", 4 if stage == 1 else 8
            found.append(Unit((stage, i), f"backbone.{name}.", block, block.conv3.out_channels, scale, name))
        if stage == TAP:
            found.append(Unit((stage, len(blocks)), "", tap, found[-1].channels, 8, "tap"))
    return found, tap


def end(class_num: int, tap: Tap, **options: Any) -> DeepLabEnd:
    """Return the loss of the last module, which contains ``tap``. options: as in `PixelClassifier`."""
    auxiliary = (tap, dense_head(1024, 256, class_num, bias=False), AUXILIARY_WEIGHT)
    head = ASPP(2048, 512, class_num)
    return DeepLabEnd(head, class_num, auxiliary, **options)
