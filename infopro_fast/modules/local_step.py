"""The local step: each module is updated right after its own forward, and hands on features without a graph.

The authors' code calls backward() inside the network's forward, and one optimizer updates everything at the
end. The updates here are the same, since each parameter has a single loss. Only one module's activations, one
auxiliary net's and one module's gradients are alive at any time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .local_loss import LocalLoss

Metrics = dict[str, torch.Tensor]


def local_step(
    stage: nn.Module,
    local_loss: LocalLoss,
    optimizer: torch.optim.Optimizer | None,
    h: torch.Tensor,
    image: torch.Tensor,
    label: torch.Tensor,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    share: float = 1.0,
    update: bool = True,
    clip_grad: float | None = None,
    check: bool = False,
) -> tuple[torch.Tensor, Metrics]:
    """Update one module from its input ``h``; return its output and metrics. None of them has a graph.

    A loss that ``wants_input`` gets ``h`` instead of the image.
    autocast: makes the context that forwards run in. scaler: this module's gradient scaler, for float16; a
    step whose gradients overflow leaves this module unchanged, and no other.
    clip_grad: the module's gradients are scaled down to this norm where theirs is larger.
    share: weight of this batch's losses, where it is a part of a larger batch. update: step and free the
    gradients; otherwise they accumulate.
    optimizer: None for a frozen module, which only runs forward.
    check: raise FloatingPointError for a loss that is not finite, before the module is updated; this waits
    for the device.

    Each term of the local loss is back-propagated into the gradient of the output alone; its graph is gone
    before the next term's is built. Then the module is back-propagated once, the optimizer steps, gradients
    are freed. No other place calls backward() for a network (`studies.probes` does, for probes of a frozen
    one).

    Lifetimes, apart from parameters, optimizer state and the batch (image, label), which stay:
    - h, the input: until the step ends, when the caller replaces it by the output;
    - the module's activations: from its forward to the backward of the block that made them;
    - a term's activations: within its turn, before those of the next term exist;
    - the output's gradient: from the first term's backward until the module's last operation has used it;
    - gradients of parameters: from the backward that makes them to the optimizer's step in this call;
    - the output: it is returned. Nothing else of a finished module is left but its metrics, 0-d tensors.
    """
    if optimizer is None:
        with torch.no_grad(), autocast():
            return stage(h), {}
    version = h._version if local_loss.wants_input else 0
    with autocast(), _watched(stage, local_loss) as inside:
        out = stage(h)
    if local_loss.wants_input:
        if h._version != version:
            what = "the local loss wants the module's input, and the module writes into it"
            raise ValueError(f"local_step: {what}: cut at another place")
        image = h
    leaf, leaves = out.detach().requires_grad_(), _leaves(inside)
    local_loss.outputs = leaves
    metrics: Metrics = {}
    terms = local_loss.on_map(leaf, image, label)
    try:
        while True:
            with autocast():  # around each term's forward alone
                term = next(terms, None)
            if term is None:
                break
            metrics[term.name] = term.loss.detach()
            if term.correct is not None:
                metrics[f"{term.name}_correct"] = term.correct
            if check and not math.isfinite(value := term.loss.item()):
                raise FloatingPointError(f"{term.name.replace('_', '-')} loss: {value}")
            weight = term.weight * share
            loss = term.loss if weight == 1 else term.loss * weight
            (loss if scaler is None else scaler.scale(loss)).backward()
            del term, loss  # before the generator goes on, or this graph would outlive the next term's making
    finally:
        local_loss.outputs = {}
    grad, leaf.grad = [leaf.grad], None
    reached = [name for name, t in leaves.items() if t.grad is not None and inside[name][0].requires_grad]
    tensors, gradients = [inside[name][0] for name in reached], [leaves[name].grad for name in reached]
    del inside, leaves
    if out.requires_grad:  # not where the classifier alone is trained, on frozen blocks
        torch.autograd.backward([GradientOf.apply(out, grad), *tensors], [None, *gradients])
    if update:
        update_module(local_loss, optimizer, scaler, clip_grad)
    return leaf.detach(), metrics


@contextlib.contextmanager
def _watched(stage: nn.Module, local_loss: LocalLoss) -> Iterator[dict[str, tuple[torch.Tensor, int]]]:
    """Yield what will hold the output, and its version, of each block that the loss names."""
    found: dict[str, tuple[torch.Tensor, int]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda block, given, output: found.update({name: (output, output._version)})

    with contextlib.ExitStack() as stack:
        for name in local_loss.blocks:
            stack.callback(stage.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield found


def _leaves(inside: dict[str, tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """Return the outputs without graphs. Raises ValueError for one that a later block wrote into."""
    for name, (output, version) in inside.items():
        if output._version != version:
            what = f"the local loss wants the output of {name}, and the block after it writes into it"
            raise ValueError(f"local_step: {what}: name another block")
    return {name: output.detach().requires_grad_() for name, (output, _) in inside.items()}


def update_module(
    local_loss: LocalLoss, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None,
    clip_grad: float | None = None,
) -> None:
    """Step, free the gradients, and tell the loss. clip_grad: the largest norm of all gradients together."""
    if clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        every = (p for group in optimizer.param_groups for p in group["params"])
        nn.utils.clip_grad_norm_(every, clip_grad, foreach=True)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        local_loss.after_step()


class GradientOf(torch.autograd.Function):
    """A scalar whose gradient with respect to ``out`` is the only tensor in ``grad``, a list that it empties.

    out.backward(gradient) would hold the gradient, as large as the output, until the whole module is done.
    """

    @staticmethod
    def forward(ctx, out, grad):
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.grad.pop(), None
