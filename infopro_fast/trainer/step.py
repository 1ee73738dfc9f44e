"""The local step: every module is updated right after its own forward, and hands on features without a graph.

Replaces the released training step, which calls backward() inside the network's forward and one optimizer over everything at the
end. The updates are the same, since every parameter has a single loss; alive at any time are one module's activations, one
auxiliary net's, and one module's gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import nn

from infopro_fast.modules import LocalLoss, LocalNetwork

from .cuda_graph import GraphedStep, with_tensor_learning_rates
from .evaluation import evaluate

Metrics = dict[str, torch.Tensor]


def local_step(
    stage: nn.Module,
    local_loss: LocalLoss,
    optimizer: torch.optim.Optimizer,
    h: torch.Tensor,
    image: torch.Tensor,
    label: torch.Tensor,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    share: float = 1.0,
    update: bool = True,
) -> tuple[torch.Tensor, Metrics]:
    """Update one module from its input ``h`` (without a graph) and return its output, without a graph, and its metrics.

    A loss that ``wants_input`` is given ``h`` in the place of the image.
    autocast: makes the context that forwards run in. scaler: of this module's loss, for float16; a step whose gradients overflow
    leaves this module as it was, and no other.
    share: weight of this batch's losses, its part of a larger one. update: step and free the gradients, or let them add up.

    The terms of the local loss are back-propagated one after the other into the gradient of the output alone, each one's graph gone
    before the next is built; then the module itself, once; then the optimizer steps and the gradients are freed.
    This is the only place that calls backward() for a network (`studies.probes` does for probes of one that is frozen).

    Lifetimes, beside parameters, optimizer state and the batch (image, label), which stay:
    - h, the input: until the step ends, when the caller replaces it by the output;
    - the module's activations: from its forward to the backward of the block that made them;
    - a term's activations: within its turn, before the next term's exist;
    - the gradient of the output: from the first term's backward to the backward of the module's last operation, which frees it;
    - gradients of parameters: from the backward that makes them to the optimizer's step at the end of this call;
    - the output: it is returned. Of a module that is done nothing else is left but its metrics, 0-d.
    """
    version = h._version if local_loss.wants_input else 0
    with autocast():
        out = stage(h)
    if local_loss.wants_input:
        if h._version != version:
            raise ValueError("local_step: the local loss wants the module's input, and the module writes into it: cut at another place")
        image = h
    leaf = out.detach().requires_grad_()
    metrics: Metrics = {}
    terms = local_loss.terms(leaf, image, label)
    while True:
        with autocast():  # around each term's forward alone
            term = next(terms, None)
        if term is None:
            break
        metrics[term.name] = term.loss.detach()
        if term.correct is not None:
            metrics[f"{term.name}_correct"] = term.correct
        weight = term.weight * share
        loss = term.loss if weight == 1 else term.loss * weight
        (loss if scaler is None else scaler.scale(loss)).backward()
        del term, loss  # before the generator goes on, or this term's graph would outlive the next one's making
    grad, leaf.grad = [leaf.grad], None
    GradientOf.apply(out, grad).backward()
    if not update:
        return leaf.detach(), metrics
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return leaf.detach(), metrics


class GradientOf(torch.autograd.Function):
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
    amp: torch.bfloat16 or torch.float16: forwards run under autocast to it, weights stay as they are; with float16 every module
    has a gradient scaler of its own. With a fused optimizer no step waits for the device.
    cuda_graph: after three steps on batches of one shape the whole step is captured in a CUDA graph, and replayed for every batch
    of that shape; others run as before. The learning rates of the optimizers become tensors on the device, so that a schedule
    reaches the graph; every optimizer must be able to be captured (fused SGD is, Adam with capturable=True).
    accumulate: every batch is gone through in this many parts, whose gradients add up to one update. Losses that are means over images
    give the gradients of the whole batch (of a segmentation set: if its parts have as many labelled pixels); batch norms see a part,
    as each GPU does where several share a batch, and the contrastive loss compares the images of a part alone, so that a smaller part
    is another, weaker loss. The gradients of all modules are alive between the parts, which one batch at once avoids.

    Raises ValueError for another amp dtype, for cuda_graph where the network is not on a GPU, and for it with float16.
    """

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        amp: torch.dtype | None = None,
        cuda_graph: bool = False,
        accumulate: int = 1,
    ):
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"LocalTrainer: amp: expected torch.bfloat16, torch.float16 or None, got {amp}")
        if accumulate < 1:
            raise ValueError(f"LocalTrainer: accumulate: expected at least 1, got {accumulate}")
        self.net, self.amp, self.accumulate = net, amp, accumulate
        self.device = next(net.parameters()).device
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(f"LocalTrainer: cuda_graph: expected the network on a CUDA device, got {self.device}")
        if cuda_graph and amp == torch.float16:
            raise ValueError("LocalTrainer: cuda_graph: expected amp torch.bfloat16 or None, got torch.float16, which is not captured")
        self.optimizers = [
            make_optimizer([*stage.parameters(), *local_loss.trained_parameters()])
            for stage, local_loss in zip(net.stages, net.local_losses)
        ]
        self.scalers = [torch.amp.GradScaler(self.device.type) if amp == torch.float16 else None for _ in self.optimizers]
        self._graphed = GraphedStep(self._step) if cuda_graph else None
        if cuda_graph:
            with_tensor_learning_rates(self.optimizers, self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that forwards run in."""
        return contextlib.nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def step(self, image: torch.Tensor, label: torch.Tensor) -> Metrics:
        """One update of every module, in training mode.

        image: (N, 3, H, W), normalised; label: (N,) integers, for segmentation (N, H, W); on the network's device.
        Returns 0-d tensors on that device, of this step before its update: the unweighted loss of every term as
        "module<k>/<term>" (k from 1), "module<k>/<term>_correct" where the term classifies, and of the network itself "loss"
        (mean cross entropy) and "correct" (right predictions; of segmentation N times the share of right pixels). Nothing waits for
        the device.
        """
        if not self.net.training:
            self.net.train()
        return (self._graphed or self._step)(image, label)

    def _step(self, image: torch.Tensor, label: torch.Tensor) -> Metrics:
        if self.accumulate == 1:
            return self._part(image, label)
        parts = list(zip(image.chunk(self.accumulate), label.chunk(self.accumulate)))
        total: Metrics = {}
        for i, (some, labels) in enumerate(parts):
            share = len(labels) / len(label)
            for name, value in self._part(some, labels, share, update=i == len(parts) - 1).items():
                value = value if name.endswith("correct") else value * share
                total[name] = total[name] + value if name in total else value
        return total

    def _part(self, image: torch.Tensor, label: torch.Tensor, share: float = 1.0, update: bool = True) -> Metrics:
        metrics: Metrics = {}
        h = image.detach()
        modules = zip(self.net.stages, self.net.local_losses, self.optimizers, self.scalers)
        for k, (stage, local_loss, optimizer, scaler) in enumerate(modules, 1):
            h, found = local_step(
                stage, local_loss, optimizer, h, image, label, autocast=self.autocast, scaler=scaler, share=share, update=update
            )
            if k < len(self.optimizers):
                metrics.update((f"module{k}/{name}", value) for name, value in found.items())
        return metrics | {"loss": found["cross_entropy"], "correct": found["cross_entropy_correct"]}

    def evaluate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """`evaluation.evaluate` of the network in eval mode over batches of (image, label), under this trainer's autocast."""
        return evaluate(self.net, batches, autocast=self.autocast)

    def set_learning_rate(self, lr: float) -> None:
        """Give every parameter group of every optimizer this learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def state_dict(self) -> dict[str, list[dict]]:
        """State of the optimizers, in the modules' order, and of their gradient scalers where there are any."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for state in optimizers:
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])  # the same whether or not there is a graph
        scalers = [scaler.state_dict() for scaler in self.scalers if scaler is not None]
        return {"optimizers": optimizers} | ({"scalers": scalers} if scalers else {})

    def load_state_dict(self, state: dict[str, list[dict]]) -> None:
        """Take the state `state_dict` gave. Raises ValueError if it is of another number of modules, or of other scalers."""
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError(f"LocalTrainer: expected the state of {len(self.optimizers)} optimizers, got {len(state['optimizers'])}")
        scalers = [scaler for scaler in self.scalers if scaler is not None]
        if len(state.get("scalers", [])) != len(scalers):
            raise ValueError(f"LocalTrainer: expected the state of {len(scalers)} gradient scalers, got {len(state.get('scalers', []))}")
        for optimizer, own in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(own)
            for p, entry in optimizer.state.items():
                # Fused optimizers walk a parameter and its state side by side in memory: both need the same strides.
                entry.update({k: torch.empty_like(p, dtype=v.dtype).copy_(v) for k, v in entry.items() if _laid_out_otherwise(v, p)})
        for scaler, own in zip(scalers, state.get("scalers", [])):
            scaler.load_state_dict(own)
        if self._graphed is not None:  # a graph of before holds the old state's memory
            self._graphed = GraphedStep(self._step)
            with_tensor_learning_rates(self.optimizers, self.device)


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
