"""The losses and the step of the authors' code in plain torch, written from its description, as a baseline.

Both auxiliary networks of a module run layer by layer whatever their weight, and one backward goes through
both. The image is restored at every boundary, and all gradients stay until one optimizer has stepped.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast.modules import Decoder, InfoPro, LocalLoss, LocalNetwork, Term
from infopro_fast.ops.reconstruction_loss import restore_image
from infopro_fast.trainer.step import LocalTrainer


class ReleasedDecoder(nn.Module):
    """Binary cross entropy of a decoder's output; autograd keeps every map in between.

    decoder: layers that end in a sigmoid. size: features are resized to it first; None: the layers resize.
    """

    def __init__(self, decoder: nn.Sequential, size: int | None = None):
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            features = F.interpolate(features, [self.size] * 2, mode="bilinear", align_corners=True)
        return F.binary_cross_entropy(self.decoder(features), image)


class ReleasedHead(nn.Module):
    """The contrastive loss or the cross entropy of a head's output. Logits of pixels are resized first."""

    def __init__(self, head: nn.Sequential, contrast: bool):
        super().__init__()
        self.head, self.contrast = head, contrast

    def forward(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = self.head(features)
        if self.contrast:
            return released_supcon(output, label)
        return (resized_cross_entropy if output.dim() == 4 else F.cross_entropy)(output, label)


def released_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """Supervised contrastive loss with N x N masks and logits (the authors' class SupConLoss, one view)."""
    z = F.normalize(features, dim=1)
    labels = labels.view(-1, 1)
    mask = torch.eq(labels, labels.T).float()
    logits = torch.div(z @ z.T, temperature)
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask).fill_diagonal_(0)
    mask = mask * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    positives = mask.sum(1)
    positives = torch.where(positives < 1e-6, torch.ones_like(positives), positives)
    return -((mask * log_prob).sum(1) / positives).mean()


def resized_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits (N, C, h, w) resized to labels (N, H, W), those of 255 left out."""
    resized = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(resized, target, ignore_index=255)


class ReleasedLoss(LocalLoss):
    """The loss of an `InfoPro` module as the authors' code computes it, on the module's own layers."""

    def __init__(self, loss: InfoPro):
        super().__init__()
        decoder, head = loss.decoder, loss.aux_classifier
        self.loss = loss
        size = decoder.image_size if isinstance(decoder, Decoder) else None
        self.reconstruction = ReleasedDecoder(decoder.decoder, size)
        self.task = ReleasedHead(head.head, head.loss_mode == "contrast")

    def terms(self, features, image, label):
        options = self.loss.decoder.options
        target = restore_image(image, options["image_mean"], options["image_std"]).clamp(0, 1)
        reconstruction = self.loss.reconstruction_weight * self.reconstruction(features, target)
        yield Term("local", 1.0, reconstruction + self.loss.task_weight * self.task(features, label), None)

    def trained_parameters(self):
        return list(self.loss.parameters())

    def released_nets(self, stage, block):
        return self.loss.released_nets(stage, block)


class ReleasedEnd(LocalLoss):
    """The network's own loss with its logits formed; for segmentation all its terms in one graph."""

    def __init__(self, end: LocalLoss):
        super().__init__()
        self.end, self.dense = end, end.dense
        end.impl = "reference"

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.end(features)

    def terms(self, features, image, label):
        if self.dense:
            terms = list(self.end.terms(features, image, label))
            loss = typing.cast(torch.Tensor, sum(term.weight * term.loss for term in terms))
            yield Term("cross_entropy", 1.0, loss, terms[0].correct)
        else:
            logits = self.end(features)
            loss, correct = F.cross_entropy(logits, label), (logits.argmax(1) == label).sum()
            yield Term("cross_entropy", 1.0, loss, correct)

    def trained_parameters(self):
        return self.end.trained_parameters()

    def released_nets(self, stage, block):
        return self.end.released_nets(stage, block)


def with_released_losses(net: LocalNetwork) -> LocalNetwork:
    """Replace the losses of ``net`` by the authors' on the same layers, and return it."""
    for k, loss in enumerate(net.local_losses[:-1]):
        if isinstance(loss, InfoPro):
            net.local_losses[k] = ReleasedLoss(loss)
    net.local_losses[-1] = ReleasedEnd(net.classifier)
    return net


class ReleasedTrainer(LocalTrainer):
    """One optimizer over everything, which steps when all modules have their gradients."""

    def __init__(
        self, net: LocalNetwork, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ):
        super().__init__(net, lambda parameters: typing.cast(torch.optim.Optimizer, _Later()))
        losses = [p for local_loss in net.local_losses for p in local_loss.trained_parameters()]
        self.optimizers[-1] = make_optimizer([*net.stages.parameters(), *losses])


class _Later:
    """Stands for a module's optimizer, and leaves its gradients to the optimizer of the last module."""

    state: dict = {}
    param_groups: tuple = ()

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass
