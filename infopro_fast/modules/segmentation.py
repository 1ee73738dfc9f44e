"""Segmentation: the dense heads of local modules and of whole networks, and their pixel-wise cross entropy.

A head returns logits (N, classes, h, w) at the size of its features. The loss resizes them to the labels (N,
H, W) and skips the pixels labelled IGNORE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from infopro_fast import ops

from .backbones import BasicBlock, Stem, Unit
from .heads import Head
from .local_loss import LocalLoss, Term

IGNORE = 255  # label of pixels that are neither trained nor counted


def pixel_loss(
    logits: torch.Tensor, label: torch.Tensor, *, align_corners: bool, label_smoothing: float = 0.0,
    reduction: str = "mean", impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross entropy, and N times the share of labelled pixels that are right (both 0-d).

    logits: (N, classes, h, w), resized bilinearly to label: (N, H, W) integers in [0, classes) or IGNORE.
    reduction: "mean" over labelled pixels or "mean_all" over all, of which those not labelled count 0. Both
    results are 0 where no pixel is labelled.
    """
    options: dict[str, Any] = {"align_corners": align_corners, "label_smoothing": label_smoothing}
    options |= {"reduction": reduction, "ignore_index": IGNORE, "return_confusion": True, "impl": impl}
    loss, confusion = ops.upsample_cross_entropy(logits, label, **options)
    return loss, confusion.diagonal().sum() / confusion.sum().clamp(min=1) * label.shape[0]


def dense_head(inplanes: int, planes: int, class_num: int, *, bias: bool = True) -> nn.Sequential:
    """Return conv3x3, BatchNorm, ReLU, Dropout2d, conv1x1: the local head or, without bias, the FCN head."""
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, 3, padding=1, bias=bias),
        nn.BatchNorm2d(planes),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(planes, class_num, 1),
    )


class DenseHead(Head):
    """The authors' Cityscapes local head at any width: `dense_head` with half the channels.

    inplanes: channels C. class_num: classes. label_smoothing, impl: of the loss, which takes (N, H, W)
    labels.
    """

    def __init__(self, inplanes: int, class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        head = dense_head(inplanes, max(16, inplanes // 2), class_num)
        super().__init__(head, "cross_entropy", label_smoothing, impl)

    def loss_and_correct(self, features, target):
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "impl": self.impl}
        return pixel_loss(self.head(features), target, align_corners=True, **options)


class Tap(nn.Module):
    """The identity, at which a loss elsewhere in the module reads features and trains the blocks before it.

    In training ``leaf`` is the input without its graph. Backward adds the gradient that a loss left there to
    the gradient from the blocks behind. So the local step back-propagates an auxiliary head before the
    module, like every other term.
    """

    leaf: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return x
        self.leaf = x.detach().requires_grad_()
        return _WithGradientOf.apply(x, self)


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tap):
        ctx.tap, ctx.leaf = tap, tap.leaf
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        leaf, ctx.leaf, ctx.tap.leaf = ctx.leaf, None, None
        return grad if leaf.grad is None else grad + leaf.grad, None


class PixelClassifier(LocalLoss):
    """The end of a segmentation network, with an optional auxiliary head that reads a tap.

    head: features (N, C, h, w) to logits (N, classes, h', w'). class_num: classes.
    auxiliary: (tap, head, weight). align_corners: of the resize to the labels (False in DeepLabV3's head).
    reduction: of both losses, as in `pixel_loss`; the authors' DeepLab has "mean_all".
    """

    dense = True

    def __init__(
        self, head: nn.Module, class_num: int, auxiliary: tuple[Tap, nn.Module, float] | None = None, *,
        align_corners: bool = False, label_smoothing: float = 0.0, reduction: str = "mean",
        impl: str = "auto",
    ):
        super().__init__()
        self.head, self.class_num = head, class_num
        self.align_corners, self.label_smoothing, self.impl = align_corners, label_smoothing, impl
        self.reduction = reduction
        self.auxiliary_head, self.auxiliary_weight = None, 0.0
        self._tap: tuple[Tap, ...] = ()  # a tuple, so that the block is not a submodule here too
        if auxiliary is not None:
            tap, self.auxiliary_head, self.auxiliary_weight = auxiliary
            self._tap = (tap,)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes, h', w')."""
        return self.head(features)

    def terms(self, features, image, label):
        names = ("align_corners", "label_smoothing", "reduction", "impl")
        options = {name: getattr(self, name) for name in names}
        yield Term("cross_entropy", 1.0, *pixel_loss(self(features), label, **options))
        for tap in self._tap:
            yield Term(
                "auxiliary", self.auxiliary_weight,
                *pixel_loss(self.auxiliary_head(tap.leaf), label, **options),
            )

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {"head.": self.head} | ({"auxiliary_head.": self.auxiliary_head} if self._tap else {})


def small_units(blocks: int) -> list[Unit]:
    """Return a CIFAR ResNet with dilation 2 in place of the third stage's stride: maps are half the image."""
    found = [Unit((0, 0), "", Stem(16), 16, 1)]
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(blocks):
            layer = BasicBlock(found[-1].channels, width, 2 if stage == 2 and block == 0 else 1)
            if stage == 3:
                for conv in (layer.conv1, layer.conv2):
                    conv.dilation = conv.padding = (2, 2)
            found.append(Unit((stage, block), f"layer{stage}.{block}.", layer, width, 1 if stage < 2 else 2))
    return found
