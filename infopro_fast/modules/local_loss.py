"""Local losses: what trains a module in place of the gradient of the next one.

A `LocalLoss` yields its weighted terms one by one. So the local step can back-propagate each term and free
its graph before it asks for the next. The last module's loss, the network's classifier, is a `LocalLoss` too,
so all modules train alike. `docs/local_losses.md` lists the losses and shows how to write one.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from infopro_fast.ops.plain import not_plain

from .features import Features
from .heads import GlobalAveragePool, Head, classify, run_loss

LOCAL_LOSSES = ("contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal", "none")


class Term(typing.NamedTuple):
    """One term of a local loss, which trains weight * loss. correct: the number of right labels, or None."""

    name: str
    weight: float
    loss: torch.Tensor
    correct: torch.Tensor | None


class Place(typing.NamedTuple):
    """Where a local module begins and ends: the argument of a user's function that makes a local loss.

    module: its number, from 0. modules: K; the last module has the network's classifier and no local loss.
    channels, size: of its output as a map (N, channels, h, w). input_channels, input_size: of its input; the
    first module's input is the image. image_size: (H, W). num_classes: classes. end: index of its last block
    in the network. next_blocks: the blocks of the next module, whose weights are trained there: copy them for
    an auxiliary net.
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
    next_blocks: tuple[nn.Module, ...] = ()


class LocalLoss(nn.Module):
    """The loss of one module. Subclasses define the three methods below; their nets are ordinary submodules.

    dense: labels are (N, H, W), one a pixel (segmentation).
    wants_input: `terms` gets the module's input, without a graph, in place of the image. This costs no
    memory, because the input is alive during a step.
    blocks: names of blocks of the module, as in `net.stages[k]`, whose outputs `terms` needs. They are in
    ``outputs`` while it runs. What a term sends back into them trains the blocks in front.
    """

    dense = False
    wants_input = False
    blocks: tuple[str, ...] = ()
    outputs: Mapping[str, torch.Tensor] = {}
    output: Features | None = None  # how the module's features are a map; None: they are one
    input: Features | None = None  # likewise the module's input

    def on_map(self, features: torch.Tensor, given: torch.Tensor, label: torch.Tensor) -> Iterator[Term]:
        """Return `terms` of what the module hands on, which may be tokens, as a map.

        features: the module's output. given: the image, or the module's input for a loss that
        ``wants_input``.
        """
        if self.output is not None:
            features = self.output.as_map(features)
        if self.input is not None and self.wants_input:
            given = self.input.as_map(given)
        return self.terms(features, given, label)

    def terms(self, features: torch.Tensor, image: torch.Tensor, label: torch.Tensor) -> Iterator[Term]:
        """Compute and yield the terms one by one, none of weight 0. The caller back-propagates each at once.

        features: (N, C, h, w), the module's output, where it is tokens as a map. image: (N, 3, H, W), the
        network's input, or likewise the module's input for a loss that ``wants_input``. label: (N,) integers.
        """
        raise NotImplementedError

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the nets that run, for the module's optimizer."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called without gradients after each update of the module, to move averages for example."""

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
            yield Term(self.task, self.task_weight, *run_loss(self.aux_classifier, features, label))

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
        yield Term(self.name, 1.0, *run_loss(self.aux_classifier, features, label))

    def trained_parameters(self):
        return list(self.aux_classifier.parameters())

    def released_nets(self, stage, block):
        return {f"aux_classifier_{stage}_{block}.": self.aux_classifier}


class Classifier(LocalLoss):
    """The end of a network: pooling, linear classifier, cross entropy. channels: C; class_num: classes."""

    def __init__(self, channels: int, class_num: int, *, label_smoothing: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.class_num, self.label_smoothing, self.impl = class_num, label_smoothing, impl
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(channels, class_num)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of features (N, C, h, w)."""
        return self.fc(self.pool(features))

    def terms(self, features, image, label):
        # No name here outlives the term: the pooled features would stay until the next one is asked for.
        layers = (self,) if not_plain(self, Classifier) else (self.pool, self.fc)
        found = classify(layers, features, label, self.impl, self.label_smoothing)
        yield Term("cross_entropy", 1.0, *found)

    def trained_parameters(self):
        return list(self.fc.parameters())

    def released_nets(self, stage, block):
        return {"": self}  # ``fc.weight`` is part of the backbone


def interpolate_lambdas(lambdas: Sequence[float], module: int, modules: int) -> tuple[float, float]:
    """Return (reconstruction, task) weights of local module 0 to modules - 2, linear from first to last."""
    first, last = lambdas[:2], lambdas[2:]
    ratio = module / (modules - 2) if modules > 2 else 0.0
    reconstruction, task = (a * (1 - ratio) + b * ratio for a, b in zip(first, last))
    return reconstruction, task
