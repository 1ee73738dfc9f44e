"""Local losses: what trains a module instead of the gradient of the next one.

A `LocalLoss` yields its weighted terms one after the other, so that the local step can back-propagate each and drop its graph
before the next is built. The last module's loss, the network's own classifier, is one too: every module trains alike.
`docs/local_losses.md` lists them all, and shows how to write one.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from infopro_fast import ops

from .decoder import Decoder
from .heads import AuxClassifier, GlobalAveragePool

LOCAL_LOSSES = ("contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none")


class Term(typing.NamedTuple):
    """One term of a local loss: weight * loss is trained. correct: how many labels it got right, or None."""

    name: str
    weight: float
    loss: torch.Tensor
    correct: torch.Tensor | None


class Place(typing.NamedTuple):
    """Where a local module begins and ends: what a local loss of one's own is made from.

    module: its number, from 0. modules: K, of which the last has the network's own classifier in place of a local loss.
    channels, size: of its output (N, channels, h, w), for images of the network's size. input_channels, input_size: of its input, which
    for the first module is the image. image_size: (H, W). num_classes: classes. end: number of its last block, from 0.
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
    """The loss of one module. Subclasses give the three methods below; nets are ordinary submodules.

    dense: labels are (N, H, W), one a pixel (segmentation).
    wants_input: `terms` is given the module's input, without a graph, in the place of the image. The input is alive during a step
    anyway, so that this costs no memory.
    """

    dense = False
    wants_input = False

    def terms(self, features: torch.Tensor, image: torch.Tensor, label: torch.Tensor) -> Iterator[Term]:
        """Compute and yield one `Term` after the other, none of weight 0; the caller back-propagates each before it asks for the next.

        features: (N, C, h, w), the module's output; image: (N, 3, H, W), the network's input, or the module's where the loss
        ``wants_input``; label: (N,) integers.
        """
        raise NotImplementedError

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of the nets that run, for the module's optimizer."""
        raise NotImplementedError

    def released_nets(self, stage: int, block: int) -> dict[str, nn.Module]:
        """All nets by the prefix of their released names, for a module that ends at (stage, block); nets that never run included."""
        raise NotImplementedError


class InfoPro(LocalLoss):
    """InfoPro's upper bound (paper, eq. 6): reconstruction_weight * reconstruction(h, image) + task_weight * task(h, label).

    A net whose weight is exactly 0 never runs and is given to no optimizer: it only stays where the released code has it, so
    that released weights load and save by their names. (The released code runs it; nothing that is kept depends on it.)
    """

    def __init__(self, decoder: Decoder, aux_classifier: AuxClassifier, reconstruction_weight: float, task_weight: float):
        super().__init__()
        if reconstruction_weight == 0 and task_weight == 0:
            raise ValueError("InfoPro: expected a weight other than 0 for reconstruction or task, got 0 for both")
        self.decoder, self.aux_classifier = decoder, aux_classifier
        self.reconstruction_weight, self.task_weight = reconstruction_weight, task_weight
        self.task = "contrast" if aux_classifier.loss_mode == "contrast" else "softmax"

    def terms(self, features, image, label):
        if self.reconstruction_weight != 0:
            yield Term("reconstruction", self.reconstruction_weight, self.decoder(features, image), None)
        if self.task_weight != 0:
            yield Term(self.task, self.task_weight, *self.aux_classifier.loss_and_correct(features, label))

    def trained_parameters(self):
        decoder = [] if self.reconstruction_weight == 0 else list(self.decoder.parameters())
        return decoder + ([] if self.task_weight == 0 else list(self.aux_classifier.parameters()))

    def released_nets(self, stage, block):
        return {f"decoder_{stage}_{block}.": self.decoder, f"aux_classifier_{stage}_{block}.": self.aux_classifier}

    def extra_repr(self):
        return f"reconstruction_weight={self.reconstruction_weight}, task_weight={self.task_weight}"


class HeadLoss(LocalLoss):
    """The cross entropy of one auxiliary head: greedy supervised learning (the released head 0c1f), DGL and AugLocal (their own)."""

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
    """The end of the network: global average pooling, linear classifier, cross entropy. channels: C; class_num: classes."""

    def __init__(self, channels: int, class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.label_smoothing, self.impl = label_smoothing, impl
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(channels, class_num)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of features (N, C, h, w)."""
        return self.fc(self.pool(features))

    def terms(self, features, image, label):
        loss, correct = ops.linear_cross_entropy(
            self.pool(features), self.fc.weight, label, bias=self.fc.bias, return_correct=True, label_smoothing=self.label_smoothing,
            impl=self.impl,
        )  # fmt: skip
        yield Term("cross_entropy", 1.0, loss, correct)

    def trained_parameters(self):
        return list(self.fc.parameters())

    def released_nets(self, stage, block):
        return {"": self}  # part of the backbone: ``fc.weight``, wherever the module ends


def interpolate_lambdas(lambdas: Sequence[float], module: int, modules: int) -> tuple[float, float]:
    """(reconstruction, task) weights of local module ``module`` (0 to modules - 2): linear from the first to the last local one."""
    first, last = lambdas[:2], lambdas[2:]
    ratio = module / (modules - 2) if modules > 2 else 0.0
    reconstruction, task = (a * (1 - ratio) + b * ratio for a, b in zip(first, last))
    return reconstruction, task
