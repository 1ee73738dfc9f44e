"""Networks with every block as a module of its own, as the planner measures them: those of `build`, and the paper's larger ones.

The larger ones (ImageNet: README of the released code, networks of its Imagenet folder; Cityscapes: its vendored mmsegmentation) are
put together from torchvision's blocks, with the released auxiliary nets in plain torch. They are for planning; nothing trains them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast.errors import PlanError
from infopro_fast.modules import LocalLoss, LocalNetwork, Stage, Term, backbones, build

from .costs import NoCut
from .released import with_released_losses

IMAGENET = ("resnet50", "resnet101", "resnet152", "resnext101_32x8d")
CITYSCAPES = ("deeplabv3_resnet101",)
ARCHS = (*backbones.BLOCKS, *IMAGENET, *CITYSCAPES)


def published_size(arch: str) -> tuple[int, int]:
    """Height and width of the images ``arch`` is published for."""
    return (224, 224) if arch in IMAGENET else (512, 1024) if arch in CITYSCAPES else (32, 32)


def chain(arch: str, size: tuple[int, int], losses: str, recompute: str = "none") -> LocalNetwork:
    """A network for `costs.measure_chain`; ``positions`` names its blocks. Raises PlanError for what there is none for.

    recompute: "norm", or anything else, which is added up from what blocks keep without (`ChainCosts`).
    """
    if arch not in ARCHS:
        raise PlanError(f"plan: arch: expected one of {ARCHS}, got {arch!r}")
    if arch in backbones.BLOCKS:
        if size[0] != size[1]:
            raise PlanError(f"plan: image_size: {arch} takes square images, got {size[0]}x{size[1]}")
        positions = [unit.position for unit in backbones.units(arch)]
        net = build(arch, cuts=positions[:-1], lambdas=(1, 1, 1, 1), image_size=size[0])
        net = with_released_losses(net) if losses == "released" else net
    else:
        if losses != "released":
            raise PlanError(f"plan: losses: {arch} has the released ones alone")
        positions, net = (_imagenet if arch in IMAGENET else _cityscapes)(arch)
    for stage in net.stages:
        stage.recompute = "norm" if recompute == "norm" else "none"
    net.positions = positions
    return net


def batch(arch: str, batch_size: int, size: tuple[int, int], real: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, random if ``real``, and labels."""
    make = torch.rand if real else torch.empty
    labels = (batch_size, *size) if arch in CITYSCAPES else (batch_size,)
    return make(batch_size, 3, *size), torch.zeros(labels, dtype=torch.long)


def merged(net: LocalNetwork, cuts, recompute: str = "none") -> LocalNetwork:
    """The blocks and losses of a chain as a network that ends its modules at ``cuts``."""
    ends = [*(net.positions.index(tuple(cut)) for cut in cuts), len(net.stages) - 1]
    stages, first = [], 0
    for end in ends:
        stages.append(Stage(OrderedDict((str(i), net.stages[i][0]) for i in range(first, end + 1)), recompute))
        first = end + 1
    return LocalNetwork(stages, [net.local_losses[end] for end in ends], cuts, [""] * len(net.stages))


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet and Cityscapes


class PlainLoss(LocalLoss):
    """reconstruction(decoder(h), image) + task(head(h), label) in one graph; decoder None: the last module."""

    def __init__(self, decoder: nn.Module | None, head: nn.Module, task: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.decoder, self.head, self.task = decoder, head, task

    def terms(self, features, image, label):
        loss = self.task(self.head(features), label)
        if self.decoder is not None:
            restored = (image * 0.25 + 0.5).clamp(0, 1)  # the network's constants change no bytes
            loss = loss + F.binary_cross_entropy(self.decoder(features), restored)
        yield Term("local", 1.0, loss, None)

    def trained_parameters(self):
        return list(self.parameters())


def _torchvision():
    try:
        import torchvision
    except ImportError as error:
        raise PlanError("this network is put together from torchvision's blocks: pip install 'infopro-fast[data]'") from error
    return torchvision.models


def _conv(inplanes: int, planes: int, kernel: int, stride: int = 1, bias: bool = False, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inplanes, planes, kernel, stride, padding, dilation, bias=bias)
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


def _decoder(inplanes: int) -> nn.Sequential:
    """conv1x1 to 128, then three times twice the size and conv3x3 to 32, 12, 3; sigmoid."""
    up = functools.partial(nn.Upsample, scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(
        *_conv(inplanes, 128, 1, bias=True), up(), *_conv(128, 32, 3, bias=True), up(), *_conv(32, 12, 3, bias=True), up(),
        nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def _blocks(resnet: nn.Module, stem: nn.Module) -> tuple[list[tuple[int, int]], list[nn.Module]]:
    positions, blocks = [(0, 0)], [stem]
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(getattr(resnet, f"layer{stage}")):
            positions.append((stage, i))
            blocks.append(block)
    return positions, blocks


def _network(positions, blocks, losses) -> LocalNetwork:
    stages = [Stage(OrderedDict(block=block)) for block in blocks]
    return LocalNetwork(stages, losses, positions[:-1], [""] * len(blocks))


def _imagenet(arch: str):
    """Modules can end in the second stage (512 channels at 28x28), where the published auxiliary nets fit."""
    resnet = getattr(_torchvision(), arch)()
    positions, blocks = _blocks(resnet, nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool))

    def loss() -> PlainLoss:
        head = nn.Sequential(
            *_conv(512, 128, 1), *_conv(128, 256, 3, 2), *_conv(256, 512, 3, 2), *_conv(512, 2048, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000),
        )  # fmt: skip
        return PlainLoss(_decoder(512), head, F.cross_entropy)

    losses = [loss() if stage == 2 else NoCut() for stage, _ in positions[:-1]]
    losses.append(PlainLoss(None, nn.Sequential(resnet.avgpool, nn.Flatten(), resnet.fc), F.cross_entropy))
    return positions, _network(positions, blocks, losses)


def _segmentation_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(logits, label, ignore_index=255)


def _segmentation_head(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(*_conv(inplanes, planes, 3, bias=True), nn.Dropout2d(0.1), nn.Conv2d(planes, 19, 1))


class _ASPP(nn.Module):
    """Four dilated branches and the image's mean, 512 channels each, concatenated; conv3x3 to 512."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(2048, 512, 1))
        self.branches = nn.ModuleList(nn.Sequential(*_conv(2048, 512, 1 if d == 1 else 3, dilation=d)) for d in (1, 12, 24, 36))
        self.join = nn.Sequential(*_conv(2560, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, 19, 1))

    def forward(self, x):
        mean = F.interpolate(self.mean(x), x.shape[-2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat([mean, *(branch(x) for branch in self.branches)], 1))


class _Carried(torch.autograd.Function):
    """``out`` as it is; the graph of the scalar ``loss`` beside it lives as long."""

    @staticmethod
    def forward(ctx, out, loss):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones(())


class _WithAuxiliaryHead(nn.Module):
    """A block and, on its output, the FCN head that DeepLab trains end to end too."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.head = block, _segmentation_head(1024, 256)

    def forward(self, x):
        out = self.block(x)
        N, _, h, w = out.shape
        label = torch.zeros(N, 8 * h, 8 * w, dtype=torch.long, device=out.device)
        return _Carried.apply(out, 0.4 * _segmentation_loss(self.head(out), label))


def _cityscapes(arch: str):
    """ResNetV1c-101-D8 and an ASPP head; modules can end in the third stage (1024 channels at an eighth)."""
    resnet = _torchvision().resnet101(replace_stride_with_dilation=[False, True, True])
    stem = nn.Sequential(*_conv(3, 32, 3, 2), *_conv(32, 32, 3), *_conv(32, 64, 3), resnet.maxpool)
    positions, blocks = _blocks(resnet, stem)
    last = positions.index((3, 22))
    blocks[last] = _WithAuxiliaryHead(blocks[last])
    losses = [
        PlainLoss(_decoder(1024), _segmentation_head(1024, 512), _segmentation_loss) if stage == 3 and i < 22 else NoCut()
        for stage, i in positions[:-1]
    ]
    losses.append(PlainLoss(None, _ASPP(), _segmentation_loss))
    return positions, _network(positions, blocks, losses)
