"""The released losses and step in plain torch, written from their description: what the kernels and the lean step are compared with.

Both auxiliary nets of a module run whatever their weight, layer by layer; one backward goes through both; the image is restored at
every boundary; all gradients stay until one optimizer has stepped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast.modules import Classifier, InfoPro, LocalLoss, LocalNetwork, Term
from infopro_fast.ops.reconstruction_loss import restore_image
from infopro_fast.trainer.step import LocalTrainer


class ReleasedLoss(LocalLoss):
    """The loss of an `InfoPro` module, on its own nets, as the released code computes it (networks/util.py)."""

    def __init__(self, loss: InfoPro):
        super().__init__()
        self.loss = loss

    def terms(self, features, image, label):
        decoder, head = self.loss.decoder, self.loss.aux_classifier
        target = restore_image(image, decoder.options["image_mean"], decoder.options["image_std"])
        resized = F.interpolate(features, [decoder.image_size] * 2, mode="bilinear", align_corners=True)
        reconstruction = F.binary_cross_entropy(decoder.decoder(resized), target)
        output = head.head(features)
        task = released_supcon(output, label) if head.loss_mode == "contrast" else F.cross_entropy(output, label)
        yield Term("local", 1.0, self.loss.reconstruction_weight * reconstruction + self.loss.task_weight * task, None)

    def trained_parameters(self):
        return list(self.loss.parameters())

    def released_nets(self, stage, block):
        return self.loss.released_nets(stage, block)


class ReleasedClassifier(Classifier):
    """The network's end with the logits formed."""

    def terms(self, features, image, label):
        logits = self(features)
        yield Term("cross_entropy", 1.0, F.cross_entropy(logits, label), (logits.argmax(1) == label).sum())


def released_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """One view, all anchors: a mask of equal labels, logits less the row's maximum, masks without the diagonal (class SupConLoss)."""
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


def with_released_losses(net: LocalNetwork) -> LocalNetwork:
    """``net`` itself, its InfoPro losses and classifier replaced by the released formulation on the same layers."""
    for k, loss in enumerate(net.local_losses):
        if isinstance(loss, InfoPro):
            net.local_losses[k] = ReleasedLoss(loss)
        elif isinstance(loss, Classifier):
            loss.__class__ = ReleasedClassifier
    return net


class ReleasedTrainer(LocalTrainer):
    """One optimizer over everything, which steps when all modules have their gradients."""

    def __init__(self, net: LocalNetwork, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        super().__init__(net, lambda parameters: _Later())
        losses = [p for local_loss in net.local_losses for p in local_loss.trained_parameters()]
        self.optimizers[-1] = make_optimizer([*net.stages.parameters(), *losses])


class _Later:
    """In place of a module's optimizer: gradients are kept for the one of the last module."""

    state: dict = {}
    param_groups: tuple = ()

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass
