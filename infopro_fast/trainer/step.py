"""The local step: each module is updated right after its own forward, and hands on features without a graph.

The authors' code calls backward() inside the network's forward, and one optimizer updates everything at the
end. The updates here are the same, since each parameter has a single loss. Only one module's activations, one
auxiliary net's and one module's gradients are alive at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from infopro_fast.modules import AuxClassifier, LocalLoss, LocalNetwork

from .cuda_graph import GraphedStep, with_tensor_learning_rates
from .evaluation import evaluate
from .processes.reduction import CommHook, GradientReduction, all_reduce, gather_rows

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
    """Update one module from its input ``h``; return its output and metrics. None of them has a graph.

    A loss that ``wants_input`` gets ``h`` instead of the image.
    autocast: makes the context that forwards run in. scaler: this module's gradient scaler, for float16; a
    step whose gradients overflow leaves this module unchanged, and no other.
    share: weight of this batch's losses, where it is a part of a larger batch. update: step and free the
    gradients; otherwise they accumulate.

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
    version = h._version if local_loss.wants_input else 0
    with autocast():
        out = stage(h)
    if local_loss.wants_input:
        if h._version != version:
            what = "the local loss wants the module's input, and the module writes into it"
            raise ValueError(f"local_step: {what}: cut at another place")
        image = h
    leaf = out.detach().requires_grad_()
    metrics: Metrics = {}
    terms = local_loss.on_map(leaf, image, label)
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
        del term, loss  # before the generator goes on, or this graph would outlive the next term's making
    grad, leaf.grad = [leaf.grad], None
    GradientOf.apply(out, grad).backward()
    if update:
        _update(optimizer, scaler)
    return leaf.detach(), metrics


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Step, and free the gradients."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)


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


class LocalTrainer:
    """Trains a network in local modules, one optimizer a module; in one process, or as one of several.

    net: from `build`. make_optimizer: called for each module with the list of its parameters: its stage's,
    and those of the auxiliary nets that run (a net of weight 0 has no optimizer).
    amp: torch.bfloat16 or torch.float16: forwards run under autocast, weights keep their dtype; with float16
    each module has a gradient scaler. With a fused optimizer no step waits for the device.
    cuda_graph: after three steps on batches of one shape, capture the step in a CUDA graph and replay it for
    each batch of that shape; other shapes run as before. Learning rates become tensors on the device, so that
    schedules reach the graph. Optimizers must be capturable (fused SGD is; Adam with capturable=True).
    accumulate: split each batch into this many parts, whose gradients add up to one update. Losses that are
    means over images give the whole batch's gradients (for segmentation: if the parts have equally many
    labelled pixels). Batch norms see one part, as a GPU does where several share a batch. The contrastive
    loss compares the images of one part alone, and is weaker. The gradients of all modules stay alive between
    the parts.

    As one of several processes:
    first, modules: ``net`` has the modules from ``first`` (from 0) on, of ``modules`` in all
    (`LocalNetwork.part`).
    group: the processes that train the same modules on other parts of each batch, from equal weights. Batch
    norms see the process's own images, unless they are SyncBatchNorm.
    global_contrast: the contrastive loss sees the images of the whole group.
    comm_hook: called with a flat tensor of gradients and the group, for each module, step and dtype, right
    after the module's backward. It starts the sum over the group, in place. The ``wait()`` of what it returns
    is called after the next module's backward. (As DistributedDataParallel's hooks: to send fewer bytes, or
    to observe.)
    at: called before each module with its name and number of images. waiting: makes the context of waits for
    others.

    Raises ValueError for another amp dtype, and for cuda_graph with float16, off a GPU or among several
    processes.
    """

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        amp: torch.dtype | None = None,
        cuda_graph: bool = False,
        accumulate: int = 1,
        first: int = 0,
        modules: int | None = None,
        group: dist.ProcessGroup | None = None,
        global_contrast: bool = False,
        comm_hook: CommHook = all_reduce,
        at: Callable[[str, int], None] | None = None,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.net, self.amp, self.accumulate = net, amp, accumulate
        self.first, self.modules = first, len(net.stages) if modules is None else modules
        self.group, self.at, self.waiting = group, at, waiting
        self.device = next(net.parameters()).device
        self._check(cuda_graph)
        self.optimizers = [
            make_optimizer([*stage.parameters(), *local_loss.trained_parameters()])
            for stage, local_loss in zip(net.stages, net.local_losses)
        ]
        scaled, kind = amp == torch.float16, self.device.type
        self.scalers = [torch.amp.GradScaler(kind) if scaled else None for _ in self.optimizers]
        self.reductions: list[GradientReduction] | None = None
        if group is not None:
            entries = [optimizer.param_groups for optimizer in self.optimizers]
            parameters = [[p for entry in every for p in entry["params"]] for every in entries]
            self.reductions = [GradientReduction(some, group, comm_hook) for some in parameters]
        if group is not None and global_contrast:
            for module in net.modules():
                if isinstance(module, AuxClassifier) and module.loss_mode == "contrast":
                    module.gather = lambda rows, labels: gather_rows(rows, labels, self._total, group)
        self._total = 0  # images of the batch at hand, of all processes
        self._graphed: GraphedStep | None = None
        if cuda_graph:
            self._prepare_graph()

    def _check(self, cuda_graph: bool) -> None:
        wrong = None
        if self.amp not in (None, torch.bfloat16, torch.float16):
            wrong = f"amp: expected torch.bfloat16, torch.float16 or None, got {self.amp}"
        elif self.accumulate < 1:
            wrong = f"accumulate: expected at least 1, got {self.accumulate}"
        elif cuda_graph and self.device.type != "cuda":
            wrong = f"cuda_graph: expected the network on a CUDA device, got {self.device}"
        elif cuda_graph and self.amp == torch.float16:
            what = "torch.bfloat16 or None, got torch.float16, which is not captured"
            wrong = f"cuda_graph: expected amp {what}"
        elif cuda_graph and (self.group is not None or len(self.net.stages) < self.modules):
            wrong = "cuda_graph: expected the whole network in one process"
        if wrong is not None:
            raise ValueError(f"LocalTrainer: {wrong}")

    def _prepare_graph(self) -> None:
        """Begin without a captured graph: an old one would hold the memory of a replaced optimizer state."""
        self._graphed = GraphedStep(lambda image, label: self._step(image.detach(), image, label)[1])
        with_tensor_learning_rates(self.optimizers, self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that forwards run in."""
        return contextlib.nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def step(self, image: torch.Tensor, label: torch.Tensor, total: int | None = None) -> Metrics:
        """Update every module once, in training mode; return the step's metrics.

        image: (N, 3, H, W), normalised; label: (N,) integers, for segmentation (N, H, W); on the network's
        device.
        total: images of the whole batch, of which ``image`` is this process's part (`data.part_of`); None: N
        times the processes of the group.

        Metrics are 0-d tensors on that device, taken before the update: the unweighted loss of each term as
        "module<k>/<term>" (k from 1), "module<k>/<term>_correct" where the term classifies; and where the
        network ends, its "loss" (mean cross entropy) and "correct" (right predictions; for segmentation N
        times the share of right pixels). Nothing waits for the device.
        """
        return self.step_from(image.detach(), image, label, total)[1]

    def step_from(
        self, h: torch.Tensor, image: torch.Tensor | None, label: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor | None, Metrics]:
        """As `step`, from the features ``h`` that the first module takes; also return the last one's output.

        image: None where no module needs it. Returns no features where the network ends here.
        """
        if not self.net.training:
            self.net.train()
        if self._graphed is not None:
            return None, self._graphed(image, label)
        replicas = 1 if self.group is None else dist.get_world_size(self.group)
        self._total = len(label) * replicas if total is None else total
        return self._step(h, h if image is None else image, label, len(label) * replicas / self._total)

    def _step(
        self, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor, share: float = 1.0
    ) -> tuple[torch.Tensor | None, Metrics]:
        """The whole batch of this process, in ``accumulate`` parts."""
        if self.accumulate == 1:
            return self._part(h, image, label, share)
        parts = list(zip(*(t.chunk(self.accumulate) for t in (h, image, label))))
        total: Metrics = {}
        features = []
        for i, part in enumerate(parts):
            fraction = len(part[-1]) / len(label)
            out, metrics = self._part(part[0], part[1], part[2], share * fraction, update=i == len(parts) - 1)
            features.append(out)
            for name, value in metrics.items():
                value = value if name.endswith("correct") else value * fraction
                total[name] = total[name] + value if name in total else value
        return None if features[0] is None else torch.cat(features), total

    def _part(
        self, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor, share: float, update: bool = True
    ) -> tuple[torch.Tensor | None, Metrics]:
        """One pass through the modules. A module's gradients are reduced while the next module computes."""
        metrics: Metrics = {}
        modules = zip(self.net.stages, self.net.local_losses, self.optimizers, self.scalers)
        reduces = update and self.reductions is not None
        for i, (stage, local_loss, optimizer, scaler) in enumerate(modules):
            number = self.first + i + 1
            if self.at is not None:
                self.at(f"module {number}", len(label))
            h, found = local_step(
                stage, local_loss, optimizer, h, image, label,
                autocast=self.autocast, scaler=scaler, share=share, update=update and not reduces,
            )
            if reduces:
                self.reductions[i].start()
                if i:
                    self._finish(i - 1)
            if number < self.modules:
                metrics.update((f"module{number}/{name}", value) for name, value in found.items())
            else:
                metrics |= {"loss": found["cross_entropy"], "correct": found["cross_entropy_correct"]}
        if reduces:
            self._finish(i)
        return h if number < self.modules else None, metrics

    def _finish(self, i: int) -> None:
        """Update the module here whose gradients are on their way."""
        with self.waiting():
            self.reductions[i].finish()
        _update(self.optimizers[i], self.scalers[i])

    def evaluate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Return `evaluation.evaluate` of the network over batches of (image, label)."""
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
        """Return the states of the optimizers, in the modules' order, and of the gradient scalers, if any."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for state in optimizers:
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])  # the same whether or not there is a graph
        scalers = [scaler.state_dict() for scaler in self.scalers if scaler is not None]
        return {"optimizers": optimizers} | ({"scalers": scalers} if scalers else {})

    def load_state_dict(self, state: dict[str, list[dict]]) -> None:
        """Take a state from `state_dict`. Raises ValueError for another number of modules or scalers."""
        scalers = [scaler for scaler in self.scalers if scaler is not None]
        for what, those in (("optimizers", self.optimizers), ("scalers", scalers)):
            got = len(state.get(what, []))
            if got != len(those):
                name = what.replace("scalers", "gradient scalers")
                raise ValueError(f"LocalTrainer: expected the state of {len(those)} {name}, got {got}")
        for optimizer, own in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(own)
            for p, entry in optimizer.state.items():
                # Fused optimizers walk a parameter and its state side by side in memory: both need the same
                # strides.
                other = {name: v for name, v in entry.items() if _laid_out_otherwise(v, p)}
                entry.update({name: torch.empty_like(p, dtype=v.dtype).copy_(v) for name, v in other.items()})
        for scaler, own in zip(scalers, state.get("scalers", [])):
            scaler.load_state_dict(own)
        if self._graphed is not None:
            self._prepare_graph()


def _laid_out_otherwise(value: object, p: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride()


def check_finite(metrics: Metrics) -> None:
    """Raise FloatingPointError naming module and loss if a metric is not finite; waits for the device."""
    names = [name for name, value in metrics.items() if value.is_floating_point()]
    finite = torch.stack([metrics[name].double() for name in names]).isfinite().tolist()
    for name, fine in zip(names, finite):
        if not fine:
            module, _, term = name.rpartition("/")
            where = "last module, cross-entropy loss"
            if module:
                where = f"module {module.removeprefix('module')}, {term} loss"
            raise FloatingPointError(f"{where}: {metrics[name].item()}")
