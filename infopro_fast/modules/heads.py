"""Auxiliary heads: networks that predict the label from a local module's features.

`AuxClassifier` and `SupConLoss` replace the authors' classes of these names (networks/auxiliary_nets.py and
networks/losses.py). `DGLHead` is the published head of Decoupled Greedy Learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from infopro_fast import ops
from infopro_fast.ops.linear_cross_entropy import logits_cross_entropy
from infopro_fast.ops.plain import differs, not_plain
from infopro_fast.ops.supcon_loss import supcon_loss_ref

CONFIGS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")  # <convolutions>c<linear layers>f
LOSS_MODES = ("contrast", "cross_entropy")


class GlobalAveragePool(nn.Module):
    """(N, C, h, w) to (N, C), the mean over the map.

    channels_last maps are averaged as rows. torch's own pooling returns a gradient in NCHW order, on which
    the backward of the ReLU before it is slow.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return x.mean((2, 3))


POOLED = (nn.BatchNorm2d, nn.ReLU, GlobalAveragePool)  # what `ops.norm_relu_pool` runs


class Head(nn.Module):
    """Base of the heads: ``head``, layers that end in a Linear layer, and a loss of their output.

    loss_mode: "contrast" (supervised contrastive loss of the normalised output, T = 0.07) or "cross_entropy".
    label_smoothing: of the cross entropy. impl: as in the ops.
    gather: None, or a function from contrastive rows (N, D) and labels (N,) to the rows and labels in the
    loss, for example those of all processes.
    """

    gather: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __init__(self, head: nn.Sequential, loss_mode: str, label_smoothing: float, impl: str):
        super().__init__()
        self.loss_mode, self.label_smoothing, self.impl = loss_mode, label_smoothing, impl
        self.head = head

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss, a 0-d tensor. features: (N, C, h, w); target: (N,) integer labels.

        For cross_entropy class probabilities (N, classes), too.
        """
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `forward` and, for cross_entropy, the number of right rows (0-d int64) of the same pass."""
        if self.loss_mode == "cross_entropy":
            return classify(self.head, features, target, self.impl, self.label_smoothing)
        rows = run_head(self.head, features, self.impl)
        if self.gather is not None:
            rows, target = self.gather(rows, target)
        return ops.supcon_loss(rows, target, impl=self.impl), None


def run_loss(
    head: nn.Module, features: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a head's `loss_and_correct`; where it has hooks by a call, without the right rows."""
    if differs(head, type(head)):
        return head(features, target), None
    return head.loss_and_correct(features, target)


class AuxClassifier(Head):
    """The authors' auxiliary head: convolutions, global average pooling, linear layers.

    inplanes: channels C of the features. net_config: one of CONFIGS ("1c2f" in all published runs).
    class_num: classes, for cross_entropy. widen: factor of the convolutions' and hidden layers' widths.
    feature_dim: width of the hidden layers, and of the output for contrast; it may be 0 where there are
    neither. The other arguments: as in `Head`.

    The first convolution takes C to 2 C channels with stride 2 while C < 64, else C to C with stride 1. This
    is the authors' table (16 to 32, 32 to 64, 64 to 64), continued to any C. The state_dict has the authors'
    keys (``head.<layer>.weight``). Layers are initialised as in torch; `build` draws the convolutions as the
    authors do (`backbones.initialize`).
    """

    def __init__(
        self, inplanes: int, net_config: str = "1c2f", loss_mode: str = "contrast", class_num: int = 10,
        widen: float = 1, feature_dim: int = 128, *, label_smoothing: float = 0.0, impl: str = "auto",
    ):
        if net_config not in CONFIGS:
            raise ValueError(f"AuxClassifier: net_config: expected one of {CONFIGS}, got {net_config!r}")
        if loss_mode not in LOSS_MODES:
            raise ValueError(f"AuxClassifier: loss_mode: expected one of {LOSS_MODES}, got {loss_mode!r}")
        contrast = loss_mode == "contrast"
        least = {"inplanes": 1, "class_num": 1, "feature_dim": int(contrast or net_config[2] != "1")}
        for name, value in (("inplanes", inplanes), ("class_num", class_num), ("feature_dim", feature_dim)):
            if value < least[name]:
                raise ValueError(f"AuxClassifier: {name}: expected at least {least[name]}, got {value}")
        if not widen > 0:
            raise ValueError(f"AuxClassifier: widen: expected a positive number, got {widen}")
        convs, linears, layers, width = int(net_config[0]), int(net_config[2]), [], inplanes
        for i in range(convs):
            shrink = i == 0 and inplanes < 64
            planes = width if i else max(1, int(widen * inplanes * (2 if shrink else 1)))
            layers += conv_norm_relu(width, planes, 3, 2 if shrink else 1)
            width = planes
        layers += [GlobalAveragePool(), nn.Flatten()]  # the second keeps the authors' numbers of the layers
        hidden = max(1, int(feature_dim * widen))
        for _ in range(linears - 1):
            layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
            width = hidden
        layers.append(nn.Linear(width, feature_dim if contrast else class_num))
        super().__init__(nn.Sequential(*layers), loss_mode, label_smoothing, impl)
        self.net_config = net_config


def conv_norm_relu(
    inplanes: int, planes: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """Return a convolution without bias that keeps the map's size at stride 1, a BatchNorm and a ReLU."""
    conv = nn.Conv2d(inplanes, planes, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


def run_head(layers: Sequence[nn.Module], x: torch.Tensor, impl: str) -> torch.Tensor:
    """Run the layers in order, with BatchNorm - ReLU - global average pooling as one op.

    A convolution in front of the three joins the op. A layer whose call does more than its class's (hooks,
    subclasses: `not_plain`) runs itself. So does a SyncBatchNorm: its statistics come from other processes.
    """
    if isinstance(layers, nn.Sequential) and not_plain(layers, nn.Sequential):
        return layers(x)
    layers = list(layers)
    while layers:
        at = int(type_before_parametrizations(layers[0]) is nn.Conv2d)  # a convolution that is not plain, too
        three = layers[at : at + 3]
        if len(three) == 3 and not any(map(not_plain, three, POOLED)):
            x = ops.norm_relu_pool(x, three[0], conv=layers[0] if at else None, impl=impl)
            layers = layers[at + 3 :]
        else:
            x = layers.pop(0)(x)
    return x


def classify(
    head: Sequence[nn.Module], features: torch.Tensor, target: torch.Tensor, impl: str,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean cross entropy and number of right rows of a head.

    A last layer that is nn.Linear and nothing else (`not_plain`) is one op with the loss. Any other runs
    itself, then the plain loss. Raises ValueError there if ``impl`` names kernels.
    """
    last, whole = head[-1], isinstance(head, nn.Sequential)
    reason = (whole and not_plain(head, nn.Sequential)) or not_plain(last, nn.Linear)
    if not reason:
        rows = run_head(head[:-1], features, impl)
        options: dict[str, Any] = {"return_correct": True, "label_smoothing": label_smoothing, "impl": impl}
        loss, correct = ops.linear_cross_entropy(rows, last.weight, target, bias=last.bias, **options)
        return loss, correct
    if impl not in ("auto", "reference"):
        raise ValueError(f"linear_cross_entropy: impl={impl!r} cannot run the last layer {last}: {reason}")
    return logits_cross_entropy(run_head(head, features, impl), target, label_smoothing=label_smoothing)


class SupConLoss(nn.Module):
    """T / T_base times `ops.supcon_loss`: replaces the authors' (SupContrast's) class, without N x N maps.

    temperature: T > 0. contrast_mode: "all", every view is an anchor, or "one", a sample's first view is.
    base_temperature: T_base > 0. impl: as in the op. (contrast_mode, base_temperature) may come first, as in
    the authors' networks/losses.py.
    """

    def __init__(
        self, temperature: float | str = 0.07, contrast_mode: str | float = "all",
        base_temperature: float = 0.07, *, impl: str = "auto",
    ):
        super().__init__()
        if isinstance(temperature, str):
            base_temperature = base_temperature if isinstance(contrast_mode, str) else contrast_mode
            temperature, contrast_mode = 0.07, temperature
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"SupConLoss: contrast_mode: expected 'all' or 'one', got {contrast_mode!r}")
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if not value > 0:
                raise ValueError(f"SupConLoss: {name}: expected a positive number, got {value}")
        self.temperature, self.contrast_mode = temperature, contrast_mode
        self.base_temperature, self.impl = base_temperature, impl

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None,
        mask: Any = None, temperature: Any = None,
    ) -> torch.Tensor:
        """Return the mean loss over all anchors, a 0-d tensor.

        features: (N, views, ...), flattened after the views, and not normalised here. labels: (N,) or (N, 1),
        integers or floats (equal floats are a class); None: every sample is a class, whose views are its
        positives (SimCLR). mask: (N, N) in place of labels, the weight of sample j as a positive of sample i;
        plain torch, with N x N maps. temperature: replaces the one given at construction. The last two may
        change places, as in the authors' networks/losses.py.
        """
        if not isinstance(mask, torch.Tensor) and (mask is not None or isinstance(temperature, torch.Tensor)):
            mask, temperature = temperature, mask
        if labels is not None and mask is not None:
            raise ValueError("SupConLoss: labels, mask: expected one or the other, got both")
        if features.dim() < 3:
            raise ValueError(f"SupConLoss: features: expected (N, views, ...), got {tuple(features.shape)}")
        N = features.shape[0]
        if labels is None:
            labels = torch.arange(N, device=features.device)
        elif labels.shape not in ((N,), (N, 1)):
            raise ValueError(f"SupConLoss: labels: expected ({N},) or ({N}, 1), got {tuple(labels.shape)}")
        if labels.is_floating_point():
            labels = (labels.double() + 0.0).view(torch.int64)  # no -0.0: equal numbers have equal bits
        T = self.temperature if temperature is None else temperature
        options: dict[str, Any] = {"temperature": T, "normalize": False}
        rows, labels = features.flatten(2), labels.reshape(N)
        if mask is None:
            loss = ops.supcon_loss(rows, labels, reduction="none", impl=self.impl, **options)
        elif tuple(mask.shape) != (N, N):
            raise ValueError(f"SupConLoss: mask: expected {(N, N)}, got {tuple(mask.shape)}")
        elif self.impl not in ("auto", "reference"):
            raise ValueError(f"SupConLoss: mask: impl={self.impl!r} takes labels alone: pass labels")
        else:
            loss = supcon_loss_ref(rows, labels, mask=mask, **options).view(rows.shape[:2])
        anchors = loss if self.contrast_mode == "all" else loss[:, :1]
        return anchors.sum() / max(1, anchors.numel()) * (T / self.base_temperature)


class DGLHead(Head):
    """The MLP-SR head of Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020, section 5).

    Average pooling to a quarter of the side (rounded up), three times conv1x1 (C to C, no bias) - BatchNorm -
    ReLU, average pooling to 2x2, three times Linear (4 C to 4 C) - BatchNorm - ReLU, Linear (4 C to classes);
    cross entropy. This is ``mlp-sr`` of github.com/eugenium/DGL (auxiliary_nets_study/models.py: n_lin=3,
    mlp_layers=3).

    inplanes: channels C. feature_size: height and width of the (square) features. class_num: classes.
    label_smoothing, impl: as in `Head`. A training batch needs at least 2 images (BatchNorm over rows).
    """

    CONVS = 3
    HIDDEN = 3

    def __init__(
        self, inplanes: int, feature_size: int, class_num: int = 10, *, label_smoothing: float = 0.0,
        impl: str = "auto",
    ):
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(math.ceil(feature_size / 4))]
        for _ in range(self.CONVS):
            layers += conv_norm_relu(inplanes, inplanes, 1)
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        width = 4 * inplanes
        for _ in range(self.HIDDEN):
            layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        head = nn.Sequential(*layers, nn.Linear(width, class_num))
        super().__init__(head, "cross_entropy", label_smoothing, impl)
