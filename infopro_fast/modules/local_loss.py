"""Local losses: what trains a module in place of the gradient of the next one.

A `LocalLoss` yields its weighted terms one by one. So the local step can back-propagate each term and free
its graph before it asks for the next. The last module's loss, the network's classifier, is a `LocalLoss` too,
so all modules train alike. `docs/local_losses.md` lists the losses and shows how to write one.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from infopro_fast import ops

from .heads import GlobalAveragePool, Head

LOCAL_LOSSES = ("contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none")
WEIGHTED = ("contrast", "softmax", "infopro_l")  # lambdas weigh their reconstruction and their task


class Term(typing.NamedTuple):
    """One term of a local loss, which trains weight * loss. correct: the number of right labels, or None."""

    name: str
    weight: float
    loss: torch.Tensor
    correct: torch.Tensor | None


class Place(typing.NamedTuple):
    """Where a local module begins and ends: the argument of a user's function that makes a local loss.

    module: its number, from 0. modules: K; the last module has the network's classifier and no local loss.
    channels, size: of its output (N, channels, h, w). input_channels, input_size: of its input; the first
    module's input is the image. image_size: (H, W). num_classes: classes. end: index of its last block in the
    network.
    """

    module: int
    modules: int
    channels: int
    size: tuple[int, int]
    input_channels: int
    input_size: tuple[int, int]
    image_size: tuple[int, int]
    num_classes: int
    end: int


class LocalLoss(nn.Module):
    """The loss of one module. Subclasses define the three methods below; their nets are ordinary submodules.

    dense: labels are (N, H, W), one a pixel (segmentation).
    wants_input: `terms` gets the module's input, without a graph, in place of the image. This costs no
    memory, because the input is alive during a step.
    """

    dense = False
    wants_input = False

    def terms(self, features: torch.Tensor, image: torch.Tensor, label: torch.Tensor) -> Iterator[Term]:
        """Compute and yield the terms one by one, none of weight 0. The caller back-propagates each at once.

        features: (N, C, h, w), the module's output. image: (N, 3, H, W), the network's input, or the module's
        input for a loss that ``wants_input``. label: (N,) integers.
        """
        raise NotImplementedError

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the nets that run, for the module's optimizer."""
        raise NotImplementedError

    def released_nets(self, stage: int, block: int) -> dict[str, nn.Module]:
        """Return all nets by the prefix of their names in the authors' code, even nets that never run.

        stage, block: where the module ends.
        """
        raise NotImplementedError


class InfoPro(LocalLoss):
    """InfoPro's upper bound (paper, eq. 6): weighted losses reconstruction(h, image) and task(h, label).

    A net of weight 0 never runs and has no optimizer. It exists so that the authors' weights load and save by
    name. (The authors' code runs it without an effect.)
    """

    def __init__(
        self, decoder: nn.Module, aux_classifier: Head, reconstruction_weight: float, task_weight: float
    ):
        super().__init__()
        if reconstruction_weight == task_weight == 0:
            raise ValueError("InfoPro: expected a weight other than 0, got 0 for reconstruction and task")
        self.decoder, self.aux_classifier = decoder, aux_classifier
        self.reconstruction_weight, self.task_weight = reconstruction_weight, task_weight
        self.task = "contrast" if aux_classifier.loss_mode == "contrast" else "softmax"

    def terms(self, features, image, label):
        if self.reconstruction_weight != 0:
            yield Term("reconstruction", self.reconstruction_weight, self.decoder(features, image), None)
        if self.task_weight != 0:
            yield Term(self.task, self.task_weight, *self.aux_classifier.loss_and_correct(features, label))

    def trained_parameters(self):
        weights = ((self.decoder, self.reconstruction_weight), (self.aux_classifier, self.task_weight))
        return [p for net, weight in weights if weight != 0 for p in net.parameters()]

    def released_nets(self, stage, block):
        end = f"{stage}_{block}."
        return {f"decoder_{end}": self.decoder, f"aux_classifier_{end}": self.aux_classifier}

    def extra_repr(self):
        return f"reconstruction_weight={self.reconstruction_weight}, task_weight={self.task_weight}"


class HeadLoss(LocalLoss):
    """The cross entropy of one auxiliary head: greedy supervised learning, DGL or AugLocal."""

    def __init__(self, name: str, head: nn.Module):
        super().__init__()
        self.name, self.aux_classifier = name, head

    def terms(self, features, image, label):
        yield Term(self.name, 1.0, *self.aux_classifier.loss_and_correct(features, label))

    def trained_parameters(self):
        return list(self.aux_classifier.parameters())

    def released_nets(self, stage, block):
        return {f"aux_classifier_{stage}_{block}.": self.aux_classifier}


class Classifier(LocalLoss):
    """The end of a network: pooling, linear classifier, cross entropy. channels: C; class_num: classes."""

    def __init__(self, channels: int, class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.label_smoothing, self.impl = label_smoothing, impl
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(channels, class_num)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of features (N, C, h, w)."""
        return self.fc(self.pool(features))

    def terms(self, features, image, label):
        options = {"return_correct": True, "label_smoothing": self.label_smoothing, "impl": self.impl}
        rows, fc = self.pool(features), self.fc
        found = ops.linear_cross_entropy(rows, fc.weight, label, bias=fc.bias, **options)
        yield Term("cross_entropy", 1.0, *found)

    def trained_parameters(self):
        return list(self.fc.parameters())

    def released_nets(self, stage, block):
        return {"": self}  # ``fc.weight`` is part of the backbone


# Weights of the published CIFAR-10 and STL-10 runs (README of the authors' code): (reconstruction, task) of
# the first local module, then of the last. Key: architecture, image size, balanced; number of modules.
Lambdas = tuple[float, float, float, float]
PUBLISHED_LAMBDAS: dict[tuple[str, int, bool], dict[int, Lambdas]] = {
    ("resnet32", 32, False): {2: (5, 1, 0, 0), 4: (6, 0, 1, 2), 8: (5, 0, 0, 2), 16: (5, 0.05, 0.2, 0.5)},
    ("resnet110", 32, False): {2: (5, 0.5, 0, 0), 4: (1, 0, 0, 1), 8: (5, 0, 0, 1), 16: (5, 0, 0.5, 1)},
    ("resnet110", 32, True): {2: (5, 0.1, 0, 0), 3: (5, 0, 5, 0.1), 4: (5, 0, 5, 0.1)},
    ("resnet110", 96, False): {
        2: (10, 1, 0, 0), 4: (20, 0.2, 5, 2), 8: (20, 0.2, 5, 1), 16: (20, 0.5, 10, 0.1),
    },  # fmt: skip
    ("resnet110", 96, True): {2: (20, 1, 0, 0), 3: (20, 0.5, 5, 2), 4: (20, 0.5, 10, 1)},
}

# Weights of the ImageNet and Cityscapes runs (README and configurations of the authors' code), K = 2.
PUBLISHED_SOFTMAX: dict[str, Lambdas] = {
    "resnet101": (5, 0.75, 0, 0),
    "resnet152": (5, 1, 0, 0),
    "resnext101_32x8d": (5, 0.75, 0, 0),
    "deeplabv3_resnet101": (1.5, 1, 0, 0),
}

# Ours, for unpublished runs (softmax, other depths and K): reconstruction early, task late.
DEFAULT_LAMBDAS = (5.0, 0.5, 0.5, 1.0)

# Ours. A reconstruction loss that falls from 1 to 0 weighs a fifth of one that hardly falls, as on images.
INFOPRO_L_LAMBDAS = (1.0, 0.5, 0.1, 1.0)


def default_lambdas(arch: str, modules: int, local_loss: str, *, balanced: bool, image_size: int) -> Lambdas:
    """Return the published weights of a run (image size 32: CIFAR-10, 96: STL-10), else ours."""
    if local_loss == "infopro_l":
        return INFOPRO_L_LAMBDAS
    if local_loss == "softmax" and modules == 2 and arch in PUBLISHED_SOFTMAX:
        return PUBLISHED_SOFTMAX[arch]
    published = PUBLISHED_LAMBDAS.get((arch, image_size, balanced), {}) if local_loss == "contrast" else {}
    return published.get(modules, DEFAULT_LAMBDAS)


def interpolate_lambdas(lambdas: Sequence[float], module: int, modules: int) -> tuple[float, float]:
    """Return (reconstruction, task) weights of local module 0 to modules - 2, linear from first to last."""
    first, last = lambdas[:2], lambdas[2:]
    ratio = module / (modules - 2) if modules > 2 else 0.0
    reconstruction, task = (a * (1 - ratio) + b * ratio for a, b in zip(first, last))
    return reconstruction, task
