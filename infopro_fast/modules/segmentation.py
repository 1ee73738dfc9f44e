"""Segmentation: the dense heads of local modules and of whole networks, and their pixel-wise cross entropy.

A head gives logits (N, classes, h, w) at the size of its features; the loss resizes them to the labels (N, H, W), of which those
equal to IGNORE count nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from infopro_fast import ops

from .backbones import BasicBlock, Stem, Unit
from .local_loss import LocalLoss, Term

IGNORE = 255  # label of pixels that are neither trained nor counted


def pixel_loss(
    logits: torch.Tensor, label: torch.Tensor, *, align_corners: bool, label_smoothing: float = 0.0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy over labelled pixels, and the share of them that is right times N (0-d both; 0 where none is labelled).

    logits: (N, classes, h, w), resized bilinearly to label: (N, H, W) integers in [0, classes) or IGNORE.
    """
    loss, confusion = ops.upsample_cross_entropy(
        logits, label, align_corners=align_corners, ignore_index=IGNORE, label_smoothing=label_smoothing, return_confusion=True, impl=impl
    )
    return loss, confusion.diagonal().sum() / confusion.sum().clamp(min=1) * label.shape[0]


def dense_head(inplanes: int, planes: int, class_num: int, dropout: float = 0.1, *, bias: bool = True) -> nn.Sequential:
    """conv3x3, BatchNorm, ReLU, Dropout2d, conv1x1 to the classes: the released local head (bias) and FCN auxiliary head (no bias)."""
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, 3, padding=1, bias=bias),
        nn.BatchNorm2d(planes),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(planes, class_num, 1),
    )


class DenseHead(nn.Module):
    """The released Cityscapes local head on any width: `dense_head` to half the channels (1024 to 512); align_corners=True.

    inplanes: channels C. class_num: classes. label_smoothing, impl: of the loss.
    """

    loss_mode = "cross_entropy"

    def __init__(self, inplanes: int, class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.head = dense_head(inplanes, max(16, inplanes // 2), class_num)
        self.label_smoothing, self.impl = label_smoothing, impl

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, a 0-d tensor. features: (N, inplanes, h, w); target: (N, H, W) integers."""
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pixel_loss(self.head(features), target, align_corners=True, label_smoothing=self.label_smoothing, impl=self.impl)


class Tap(nn.Module):
    """Passes its input on, and lets a loss that is taken elsewhere train what comes before it.

    In training ``leaf`` is the input without its graph; the gradient that a loss leaves there is added to the one that comes back.
    So an auxiliary head inside a module is back-propagated before the module, like every other term.
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
    """The end of a segmentation network: its head, cross entropy of the resized logits, and weighted losses of heads on taps.

    head: features (N, C, h, w) to logits (N, classes, h', w'). class_num: classes. auxiliary: (tap, head, weight).
    align_corners: of the resize (False in DeepLabV3's head).
    """

    dense = True

    def __init__(
        self,
        head: nn.Module,
        class_num: int,
        auxiliary: tuple[Tap, nn.Module, float] | None = None,
        *,
        align_corners: bool = False,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.head, self.class_num = head, class_num
        self.align_corners, self.label_smoothing, self.impl = align_corners, label_smoothing, impl
        self.auxiliary_head, self._tap, self.auxiliary_weight = None, (), 0.0
        if auxiliary is not None:
            tap, self.auxiliary_head, self.auxiliary_weight = auxiliary
            self._tap = (tap,)  # a block of the network; in a tuple, it is no submodule of this one too

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes, h', w')."""
        return self.head(features)

    def terms(self, features, image, label):
        options = {"align_corners": self.align_corners, "label_smoothing": self.label_smoothing, "impl": self.impl}
        yield Term("cross_entropy", 1.0, *pixel_loss(self.head(features), label, **options))
        if self._tap:
            yield Term("auxiliary", self.auxiliary_weight, *pixel_loss(self.auxiliary_head(self._tap[0].leaf), label, **options))

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {"head.": self.head} | ({"auxiliary_head.": self.auxiliary_head} if self._tap else {})


def small_units(blocks: int) -> list[Unit]:
    """A CIFAR ResNet (`backbones`) for maps: the third stage has dilation 2 in place of its stride; its output is half the image."""
    found = [Unit((0, 0), "", Stem(16), 16, 1)]
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(blocks):
            layer = BasicBlock(found[-1].channels, width, 2 if stage == 2 and block == 0 else 1)
            if stage == 3:
                for conv in (layer.conv1, layer.conv2):
                    conv.dilation = conv.padding = (2, 2)
            found.append(Unit((stage, block), f"layer{stage}.{block}.", layer, width, 1 if stage < 2 else 2))
    return found
