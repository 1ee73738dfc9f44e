"""Auxiliary heads: what a local module's features are trained to say about the label.

`AuxClassifier` and `SupConLoss` are drop-ins for the released ones (networks/util.py, class AuxClassifier; losses of the same
file), `DGLHead` is the published head of Decoupled Greedy Learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from infopro_fast import ops

CONFIGS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")  # <convolutions>c<linear layers>f
LOSS_MODES = ("contrast", "cross_entropy")


class GlobalAveragePool(nn.Module):
    """(N, C, h, w) to (N, C), the mean over the map.

    On channels_last maps as a mean over rows: torch's own pooling hands back a gradient expanded in NCHW order, on which the
    ReLU before it is ten times slower than on this one (6.2 against 0.9 ms at 128x32x16x16, one thread of an EPYC).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return x.mean((2, 3))


class AuxClassifier(nn.Module):
    """Released auxiliary head: convolutions, global average pooling, linear layers; then a contrastive or cross-entropy loss.

    inplanes: channels C of the features. net_config: one of CONFIGS, "1c2f" in all published runs.
    loss_mode: "contrast" (the supervised contrastive loss of the normalised output, T = 0.07) or "cross_entropy".
    class_num: classes, for cross_entropy. widen: factor of the convolutions' and hidden layers' widths.
    feature_dim: width of the hidden layers, and of the output for contrast. label_smoothing: of the cross entropy.
    impl: as in `ops.supcon_loss`.

    The first convolution takes C to 2 C channels with stride 2 while C < 64, else C to C with stride 1: the released table
    (16 to 32, 32 to 64, 64 to 64), carried on to any C. The state_dict's keys are the released ones (``head.<layer>.weight``).
    Initialised as torch's layers are; `build` draws the convolutions as released (`backbones.initialize`).

    gather: None, or a function from the contrastive rows (N, D) and labels (N,) to those that the loss is over, e.g. of all processes.
    """

    gather: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __init__(
        self,
        inplanes: int,
        net_config: str = "1c2f",
        loss_mode: str = "contrast",
        class_num: int = 10,
        widen: float = 1,
        feature_dim: int = 128,
        *,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if net_config not in CONFIGS:
            raise ValueError(f"AuxClassifier: net_config: expected one of {CONFIGS}, got {net_config!r}")
        if loss_mode not in LOSS_MODES:
            raise ValueError(f"AuxClassifier: loss_mode: expected one of {LOSS_MODES}, got {loss_mode!r}")
        for name, value in (("inplanes", inplanes), ("class_num", class_num), ("feature_dim", feature_dim)):
            if value < 1:
                raise ValueError(f"AuxClassifier: {name}: expected at least 1, got {value}")
        if not widen > 0:
            raise ValueError(f"AuxClassifier: widen: expected a positive number, got {widen}")
        self.net_config, self.loss_mode, self.label_smoothing, self.impl = net_config, loss_mode, label_smoothing, impl
        out = feature_dim if loss_mode == "contrast" else class_num
        self.head = _head(inplanes, int(net_config[0]), int(net_config[2]), max(1, int(feature_dim * widen)), out, widen)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean loss, a 0-d tensor. features: (N, inplanes, h, w); target: (N,) integer labels."""
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward`, and for cross_entropy how many rows are classified right (0-d int64, the same pass), else None."""
        if self.loss_mode == "contrast":
            rows = run_head(self.head, features, self.impl)
            if self.gather is not None:
                rows, target = self.gather(rows, target)
            return ops.supcon_loss(rows, target, impl=self.impl), None
        return classify(self.head, features, target, self.impl, self.label_smoothing)


def run_head(layers: Sequence[nn.Module], x: torch.Tensor, impl: str) -> torch.Tensor:
    """The layers one after the other, but BatchNorm - ReLU - global average pooling in one op that keeps its input alone, with the
    convolution in front of them, if there is one.

    A SyncBatchNorm is not fused: its statistics come from other processes, and the layers run, and keep their maps, one by one.
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
    """Mean cross entropy and number of right rows of a head that ends in a Linear layer, without its logits."""
    rows, last = run_head(head[:-1], features, impl), head[-1]
    return ops.linear_cross_entropy(
        rows, last.weight, target, bias=last.bias, return_correct=True, label_smoothing=label_smoothing, impl=impl
    )


def _head(inplanes: int, convs: int, linears: int, hidden: int, out: int, widen: float) -> nn.Sequential:
    """conv3x3 - BatchNorm - ReLU, ``convs`` times; global average pooling; ``linears`` linear layers with ReLU between."""
    layers, width = [], inplanes
    for i in range(convs):
        shrink = i == 0 and inplanes < 64
        planes = width if i else max(1, int(widen * inplanes * (2 if shrink else 1)))
        conv = nn.Conv2d(width, planes, 3, stride=2 if shrink else 1, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
        width = planes
    layers += [GlobalAveragePool(), nn.Flatten()]  # the second keeps the released numbering of the layers
    for _ in range(linears - 1):
        layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, out))


class SupConLoss(nn.Module):
    """Drop-in for the released (SupContrast's) class of this name, without the N x N maps: T / T_base times `ops.supcon_loss`.

    temperature: T > 0. contrast_mode: "all" only, every view an anchor. base_temperature: T_base > 0. impl: as in the op.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07, *, impl: str = "auto"):
        super().__init__()
        if contrast_mode != "all":
            raise ValueError(f"SupConLoss: contrast_mode: expected 'all' (every view is an anchor), got {contrast_mode!r}")
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if not value > 0:
                raise ValueError(f"SupConLoss: {name}: expected a positive number, got {value}")
        self.temperature, self.contrast_mode, self.base_temperature, self.impl = temperature, contrast_mode, base_temperature, impl

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Mean loss over all views of all samples, a 0-d tensor.

        features: (N, views, ...), what follows the views being flattened; taken as they are: normalise them before.
        labels: (N,) or (N, 1) integers; None: every sample is a class of its own (its views are its positives, SimCLR).
        mask: not supported, pass labels. temperature: in place of the one given at construction.
        """
        if mask is not None:
            raise ValueError("SupConLoss: mask: expected None, arbitrary positives are not supported: pass labels")
        if features.dim() < 3:
            raise ValueError(f"SupConLoss: features: expected (N, views, ...), got {tuple(features.shape)}")
        N = features.shape[0]
        if labels is None:
            labels = torch.arange(N, device=features.device)
        elif labels.shape not in ((N,), (N, 1)):
            raise ValueError(f"SupConLoss: labels: expected ({N},) or ({N}, 1), got {tuple(labels.shape)}")
        temperature = self.temperature if temperature is None else temperature
        loss = ops.supcon_loss(features.flatten(2), labels.reshape(N), temperature=temperature, normalize=False, impl=self.impl)
        return loss * (temperature / self.base_temperature)


class DGLHead(nn.Module):
    """The MLP-SR auxiliary head of Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020, section 5), cross entropy.

    Average pooling to a quarter of the side (rounded up), three times conv1x1 (C to C, no bias) - BatchNorm - ReLU, average
    pooling to 2x2, three times Linear (4 C to 4 C) - BatchNorm - ReLU, Linear (4 C to classes): the authors' ``mlp-sr``
    (github.com/eugenium/DGL, auxiliary_nets_study/models.py: n_lin=3, mlp_layers=3).

    inplanes: channels C. feature_size: height and width of the (square) features. class_num: classes. label_smoothing,
    impl: as in `ops.linear_cross_entropy`. Batches need at least 2 images in training (BatchNorm over rows).
    """

    CONVS = 3
    HIDDEN = 3

    def __init__(self, inplanes: int, feature_size: int, class_num: int = 10, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.label_smoothing, self.impl = label_smoothing, impl
        layers = [nn.AdaptiveAvgPool2d(math.ceil(feature_size / 4))]
        for _ in range(self.CONVS):
            layers += [nn.Conv2d(inplanes, inplanes, 1, bias=False), nn.BatchNorm2d(inplanes), nn.ReLU(inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        width = 4 * inplanes
        for _ in range(self.HIDDEN):
            layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers, nn.Linear(width, class_num))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, a 0-d tensor. features: (N, inplanes, feature_size, feature_size); target: (N,) integers."""
        return self.loss_and_correct(features, target)[0]

    def loss_and_correct(self, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and how many rows are classified right (0-d int64), from the same pass."""
        return classify(self.head, features, target, self.impl, self.label_smoothing)
