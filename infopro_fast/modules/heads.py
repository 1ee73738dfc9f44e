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

from infopro_fast import ops

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
        """Return the mean loss, a 0-d tensor. features: (N, C, h, w); target: (N,) integer labels."""
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


class AuxClassifier(Head):
    """The authors' auxiliary head: convolutions, global average pooling, linear layers.

    inplanes: channels C of the features. net_config: one of CONFIGS ("1c2f" in all published runs).
    class_num: classes, for cross_entropy. widen: factor of the convolutions' and hidden layers' widths.
    feature_dim: width of the hidden layers, and of the output for contrast. The other arguments: as in
    `Head`.

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
        for name, value in (("inplanes", inplanes), ("class_num", class_num), ("feature_dim", feature_dim)):
            if value < 1:
                raise ValueError(f"AuxClassifier: {name}: expected at least 1, got {value}")
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
        layers.append(nn.Linear(width, feature_dim if loss_mode == "contrast" else class_num))
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

    A convolution in front of the three joins the op. A SyncBatchNorm is not fused, because its statistics
    come from other processes: then the layers run one by one and keep their maps.
    """
    layers = list(layers)
    while layers:
        kinds = [type(layer) for layer in layers[:4]]
        if kinds[:3] == [nn.BatchNorm2d, nn.ReLU, GlobalAveragePool]:
            x = ops.norm_relu_pool(x, layers[0], impl=impl)
            layers = layers[3:]
        elif kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, GlobalAveragePool]:
            x = ops.norm_relu_pool(x, layers[1], conv=layers[0], impl=impl)
            layers = layers[4:]
        else:
            x = layers.pop(0)(x)
    return x


def classify(
    head: nn.Sequential, features: torch.Tensor, target: torch.Tensor, impl: str, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean cross entropy and number of right rows of a head that ends in a Linear layer."""
    rows, last = run_head(head[:-1], features, impl), head[-1]
    options: dict[str, Any] = {"return_correct": True, "label_smoothing": label_smoothing, "impl": impl}
    loss, correct = ops.linear_cross_entropy(rows, last.weight, target, bias=last.bias, **options)
    return loss, correct


class SupConLoss(nn.Module):
    """T / T_base times `ops.supcon_loss`: replaces the authors' (SupContrast's) class, without N x N maps.

    temperature: T > 0. contrast_mode: "all" only (every view is an anchor). base_temperature: T_base > 0.
    impl: as in the op.
    """

    def __init__(
        self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07, *,
        impl: str = "auto",
    ):
        super().__init__()
        if contrast_mode != "all":
            raise ValueError(f"SupConLoss: contrast_mode: expected 'all', got {contrast_mode!r}")
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if not value > 0:
                raise ValueError(f"SupConLoss: {name}: expected a positive number, got {value}")
        self.temperature, self.contrast_mode = temperature, contrast_mode
        self.base_temperature, self.impl = base_temperature, impl

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Return the mean loss over all views of all samples, a 0-d tensor.

        features: (N, views, ...), flattened after the views, and not normalised here. labels: (N,) or (N, 1)
        integers; None: every sample is a class, whose views are its positives (SimCLR). mask: not supported,
        pass labels. temperature: replaces the one given at construction.
        """
        if mask is not None:
            raise ValueError("SupConLoss: mask: expected None, got one: pass labels")
        if features.dim() < 3:
            raise ValueError(f"SupConLoss: features: expected (N, views, ...), got {tuple(features.shape)}")
        N = features.shape[0]
        if labels is None:
            labels = torch.arange(N, device=features.device)
        elif labels.shape not in ((N,), (N, 1)):
            raise ValueError(f"SupConLoss: labels: expected ({N},) or ({N}, 1), got {tuple(labels.shape)}")
        T = self.temperature if temperature is None else temperature
        rows, labels = features.flatten(2), labels.reshape(N)
        loss = ops.supcon_loss(rows, labels, temperature=T, normalize=False, impl=self.impl)
        return loss * (T / self.base_temperature)


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
