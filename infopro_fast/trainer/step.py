"""The local step: every module is updated right after its own forward, and hands on features without a graph.

Replaces the released training step, which calls backward() inside the network's forward and one optimizer over everything at the
end. The updates are the same, since every parameter has a single loss; alive at any time are one module's activations, one
auxiliary net's, and one module's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from infopro_fast.modules import LocalLoss, LocalNetwork

Metrics = dict[str, torch.Tensor]


def local_step(
    stage: nn.Module, local_loss: LocalLoss, optimizer: torch.optim.Optimizer, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    """Update one module from its input ``h`` (without a graph) and return its output, without a graph, and its metrics.

    The terms of the local loss are back-propagated one after the other into the gradient of the output alone, each one's graph gone
    before the next is built; then the module itself, once; then the optimizer steps and the gradients are freed.
    This is the only place of the package that calls backward().

    Lifetimes, beside parameters, optimizer state and the batch (image, label), which stay:
    - h, the input: until the step ends, when the caller replaces it by the output;
    - the module's activations: from its forward to the backward of the block that made them;
    - a term's activations: within its turn, before the next term's exist;
    - the gradient of the output: from the first term's backward to the backward of the module's last operation, which frees it;
    - gradients of parameters: from the backward that makes them to the optimizer's step at the end of this call;
    - the output: it is returned. Of a module that is done nothing else is left but its metrics, 0-d.
    """
    out = stage(h)
    leaf = out.detach().requires_grad_()
    metrics: Metrics = {}
    for term in local_loss.terms(leaf, image, label):
        metrics[term.name] = term.loss.detach()
        if term.correct is not None:
            metrics[f"{term.name}_correct"] = term.correct
        (term.loss if term.weight == 1 else term.loss * term.weight).backward()
        del term  # before the generator goes on, or this term's graph would outlive the next one's making
    grad, leaf.grad = [leaf.grad], None
    _GradientOf.apply(out, grad).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return leaf.detach(), metrics


class _GradientOf(torch.autograd.Function):
    """A scalar whose gradient with respect to ``out`` is the one tensor in the list ``grad``, which is left empty.

    out.backward(gradient) would hold the gradient, as large as the output, until the whole module is done.
    """

    @staticmethod
    def forward(ctx, out, grad):
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.grad.pop(), None


class LocalTrainer:
    """Trains a network in local modules, one optimizer a module.

    net: as `build` makes it. make_optimizer: called once a module with the list of its parameters: the stage's and those of the
    auxiliary nets that run (a net whose weight is 0 has no optimizer).
    """

    def __init__(self, net: LocalNetwork, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.net = net
        self.optimizers = [
            make_optimizer([*stage.parameters(), *local_loss.trained_parameters()])
            for stage, local_loss in zip(net.stages, net.local_losses)
        ]

    def step(self, image: torch.Tensor, label: torch.Tensor) -> Metrics:
        """One update of every module, in training mode.

        image: (N, 3, H, W), normalised; label: (N,) integers; on the network's device.
        Returns 0-d tensors on that device, of this step before its update: the unweighted loss of every term as
        "module<k>/<term>" (k from 1), "module<k>/<term>_correct" where the term classifies, and of the network itself "loss"
        (mean cross entropy) and "correct" (right predictions). Nothing waits for the device.
        """
        if not self.net.training:
            self.net.train()
        metrics: Metrics = {}
        h = image.detach()
        for k, (stage, local_loss, optimizer) in enumerate(zip(self.net.stages, self.net.local_losses, self.optimizers), 1):
            h, found = local_step(stage, local_loss, optimizer, h, image, label)
            if k < len(self.optimizers):
                metrics.update((f"module{k}/{name}", value) for name, value in found.items())
        return metrics | {"loss": found["cross_entropy"], "correct": found["cross_entropy_correct"]}

    def evaluate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Top-1 of the network in eval mode over batches of (image, label): {"accuracy", "loss", "count"}; one wait, at the end.

        accuracy in [0, 1], loss the mean cross entropy, count the number of images. The network's mode is put back.
        """
        training, count = self.net.training, 0
        sums = torch.zeros(2, dtype=torch.float64, device=next(self.net.parameters()).device)
        self.net.eval()
        try:
            with torch.inference_mode():
                for image, label in batches:
                    h = image
                    for stage in self.net.stages:
                        h = stage(h)
                    (term,) = self.net.classifier.terms(h, image, label)
                    sums += torch.stack([term.correct.double(), term.loss.double() * len(label)])
                    count += len(label)
        finally:
            self.net.train(training)
        if count == 0:
            raise ValueError("evaluate: batches: expected at least one image, got none")
        correct, loss = sums.tolist()
        return {"accuracy": correct / count, "loss": loss / count, "count": count}

    def set_learning_rate(self, lr: float) -> None:
        """Give every parameter group of every optimizer this learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def state_dict(self) -> dict[str, list[dict]]:
        """State of the optimizers, in the modules' order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, list[dict]]) -> None:
        """Take the state `state_dict` gave. Raises ValueError if it is of another number of modules."""
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError(f"LocalTrainer: expected the state of {len(self.optimizers)} optimizers, got {len(state['optimizers'])}")
        for optimizer, own in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(own)
            for p, entry in optimizer.state.items():
                # Fused optimizers walk a parameter and its state side by side in memory: both need the same strides.
                entry.update({k: torch.empty_like(p).copy_(v) for k, v in entry.items() if _laid_out_otherwise(v, p)})


def _laid_out_otherwise(value: object, p: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride()


def check_finite(metrics: Metrics) -> None:
    """Raise FloatingPointError naming module and loss if any metric of a step is not finite. Waits for the device, once."""
    names = [name for name, value in metrics.items() if value.is_floating_point()]
    finite = torch.stack([metrics[name].double() for name in names]).isfinite().tolist()
    for name, fine in zip(names, finite):
        if not fine:
            module, _, term = name.rpartition("/")
            where = f"module {module.removeprefix('module')}, {term} loss" if module else "last module, cross-entropy loss"
            raise FloatingPointError(f"{where}: {metrics[name].item()}")
