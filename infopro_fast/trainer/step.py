"""Training in local modules: `LocalTrainer`, in one process or as one of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from infopro_fast.modules import AuxClassifier, LocalNetwork
from infopro_fast.modules.local_step import Metrics, local_step, update_module

from .checks import check_batch, check_trainer, has_values
from .cuda_graph import GraphedStep, with_tensor_learning_rates
from .evaluation import evaluate
from .processes.reduction import CommHook, GradientReduction, all_reduce, gather_rows


class LocalTrainer:
    """Trains a network in local modules, one optimizer a module; in one process, or as one of several.

    net: from `build`. make_optimizer: called for each module with the list of its parameters: its stage's,
    and those of the auxiliary nets that run (a net of weight 0 has no optimizer). A module whose stage is
    frozen now (no parameter requires a gradient) has none and only runs forward, batch norms in their mode.
    On a frozen last stage the classifier is trained, unless it is frozen too.
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
    check_finite: look for a nan or an infinity in each step's images, and in each loss before its module is
    updated. It waits for the device, so the default is True on the CPU alone. Gradients are not looked at.

    clip_grad: scale each module's gradients down to this norm where theirs is larger.

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

    Raises TypeError for another net or an optimizer in place of a function, and ValueError for another amp
    dtype, and for cuda_graph with float16 or check_finite, off a GPU or among several processes.
    """

    def __init__(
        self,
        net: LocalNetwork,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        amp: torch.dtype | None = None,
        cuda_graph: bool = False,
        accumulate: int = 1,
        clip_grad: float | None = None,
        check_finite: bool | None = None,
        first: int = 0,
        modules: int | None = None,
        group: dist.ProcessGroup | None = None,
        global_contrast: bool = False,
        comm_hook: CommHook = all_reduce,
        at: Callable[[str, int], None] | None = None,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        check_trainer(net, make_optimizer)
        self.net, self.amp, self.accumulate = net, amp, accumulate
        self.clip_grad = clip_grad
        self.first, self.modules = first, len(net.stages) if modules is None else modules
        self.group, self.at, self.waiting = group, at, waiting
        parameter = next(net.parameters())
        self.device, self.steps = parameter.device, 0
        self.check_finite = has_values(parameter) if check_finite is None else check_finite
        self._check(cuda_graph)
        self.optimizers: list[torch.optim.Optimizer | None] = []
        for number, (stage, local_loss) in enumerate(zip(net.stages, net.local_losses), first + 1):
            own, nets = list(stage.parameters()), local_loss.trained_parameters()
            trained = any(p.requires_grad for p in (own if number < self.modules else [*own, *nets]))
            frozen = bool(own) and not trained
            self.optimizers.append(None if frozen else make_optimizer([*own, *nets]))
        scaled, kind = amp == torch.float16, self.device.type
        self.scalers = [torch.amp.GradScaler(kind) if scaled else None for _ in self.optimizers]
        self.reductions: list[GradientReduction] | None = None
        if group is not None:
            entries = [[] if optimizer is None else optimizer.param_groups for optimizer in self.optimizers]
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
        elif cuda_graph and self.check_finite:
            wrong = "cuda_graph: expected check_finite=False: a captured step cannot look at its losses"
        elif cuda_graph and (self.group is not None or len(self.net.stages) < self.modules):
            wrong = "cuda_graph: expected the whole network in one process"
        if wrong is not None:
            raise ValueError(f"LocalTrainer: {wrong}")

    def _prepare_graph(self) -> None:
        """Begin without a captured graph: an old one would hold the memory of a replaced optimizer state."""
        self._graphed = GraphedStep(lambda image, label: self._step(image.detach(), image, label)[1])
        with_tensor_learning_rates(self._trained(), self.device)

    def _trained(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of the modules that are not frozen."""
        return [optimizer for optimizer in self.optimizers if optimizer is not None]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that forwards run in."""
        return contextlib.nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def step(self, image: torch.Tensor, label: torch.Tensor, total: int | None = None) -> Metrics:
        """Update every module once, in training mode; return the step's metrics.

        image: (N, 3, H, W), normalised; label: (N,) integers, for segmentation (N, H, W), or class
        probabilities (N, classes), as of MixUp, where no loss is contrastive; on the network's device.
        total: images of the whole batch, of which ``image`` is this process's part (`data.part_of`); None: N
        times the processes of the group.

        Metrics are 0-d tensors on that device, taken before the update: the unweighted loss of each term as
        "module<k>/<term>" (k from 1), "module<k>/<term>_correct" where the term classifies; and where the
        network ends, its "loss" (mean cross entropy) and "correct" (right predictions; for segmentation N
        times the share of right pixels). On a GPU nothing waits for the device.

        Raises TypeError or ValueError naming the argument, before anything changes, for images and labels
        that do not fit the network. Raises FloatingPointError for images that are not finite, before anything
        changes; and naming step, module and loss for a loss that is not. Then this module and all later ones
        keep their weights and optimizers, as all do with ``accumulate`` unless it is the last part's loss.
        The running statistics of batch norms up to this module have moved.
        """
        self.steps += 1
        try:
            check_batch(self.net, image, label, amp=self.amp is not None, finite=self.check_finite)
            return self.step_from(image.detach(), image, label, total)[1]
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.steps}, {error}") from None

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
        try:
            return self._step(h, h if image is None else image, label, len(label) * replicas / self._total)
        except BaseException:  # half a step's gradients would be added to the next one's
            for optimizer in self._trained():
                optimizer.zero_grad(set_to_none=True)
            raise

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
            last = number == self.modules
            try:
                h, found = local_step(
                    stage, local_loss, optimizer, h, image, label, autocast=self.autocast, scaler=scaler,
                    share=share, update=update and not reduces, clip_grad=self.clip_grad,
                    check=self.check_finite,
                )
            except FloatingPointError as error:
                where = "last module" if last else f"module {number}"
                raise FloatingPointError(f"{where}, {error}") from None
            if last and optimizer is None:
                with torch.no_grad(), self.autocast():
                    term = next(local_loss.terms(h, image, label))
                found = {"cross_entropy": term.loss, "cross_entropy_correct": term.correct}
            if reduces:
                self.reductions[i].start()
                if i:
                    self._finish(i - 1)
            if not last:
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
        optimizer = self.optimizers[i]
        if optimizer is not None:
            update_module(self.net.local_losses[i], optimizer, self.scalers[i], self.clip_grad)

    def evaluate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Return `evaluation.evaluate` of the network over batches of (image, label)."""
        return evaluate(self.net, batches, autocast=self.autocast)

    def set_learning_rate(self, lr: float) -> None:
        """Give every parameter group of every optimizer this learning rate."""
        for optimizer in self._trained():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def state_dict(self) -> dict[str, list[dict]]:
        """Return the states of the optimizers, in the modules' order, and of the gradient scalers, if any.

        A frozen module has None.
        """
        optimizers = [None if optimizer is None else optimizer.state_dict() for optimizer in self.optimizers]
        for state in filter(None, optimizers):
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])  # the same whether or not there is a graph
        scalers = [scaler.state_dict() for scaler in self.scalers if scaler is not None]
        return {"optimizers": optimizers} | ({"scalers": scalers} if scalers else {})

    def load_state_dict(self, state: dict[str, list[dict]]) -> None:
        """Take a state from `state_dict`.

        Raises ValueError for another number of modules or scalers, and where other modules were frozen.
        """
        scalers = [scaler for scaler in self.scalers if scaler is not None]
        for what, those in (("optimizers", self.optimizers), ("scalers", scalers)):
            got = len(state.get(what, []))
            if got != len(those):
                name = what.replace("scalers", "gradient scalers")
                raise ValueError(f"LocalTrainer: expected the state of {len(those)} {name}, got {got}")
        frozen = [[each is None for each in those] for those in (self.optimizers, state["optimizers"])]
        if frozen[0] != frozen[1]:
            ours, theirs = ([k for k, is_frozen in enumerate(each, 1) if is_frozen] for each in frozen)
            raise ValueError(f"LocalTrainer: expected the state of frozen modules {ours}, got {theirs}")
        for optimizer, own in zip(self.optimizers, state["optimizers"]):
            if optimizer is None:
                continue
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
