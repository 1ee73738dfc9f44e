"""A CIFAR ResNet cut into local modules, each with its local loss: what the trainer trains. `build` makes one."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from . import backbones, split
from .decoder import Decoder
from .heads import AuxClassifier, DGLHead
from .local_loss import DEFAULT_LAMBDAS, LOCAL_LOSSES, Classifier, HeadLoss, InfoPro, LocalLoss, default_lambdas, interpolate_lambdas

CIFAR10_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR10_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


RECOMPUTE = ("none", "block", "sqrt")


class Stage(nn.Sequential):
    """The blocks of one local module.

    recompute: "none"; "block": keep only each block's input for backward and run the block again there; "sqrt": the same for
    segments of about sqrt(blocks) blocks (Chen et al. 2016), fewer inputs for a larger segment. Batch norms' running statistics
    move once a step, in the first forward. Gradients are those of "none" bit for bit, where torch's kernels repeat theirs.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module], recompute: str = "none"):
        super().__init__(blocks)
        if recompute not in RECOMPUTE:
            raise ValueError(f"Stage: recompute: expected one of {RECOMPUTE}, got {recompute!r}")
        self.recompute = recompute

    def segments(self) -> list[nn.Module]:
        """What is run again as one: a block, or for "sqrt" several in a row."""
        size = max(1, round(math.sqrt(len(self)))) if self.recompute == "sqrt" else 1
        blocks = list(self)
        return [blocks[i] if size == 1 else nn.Sequential(*blocks[i : i + size]) for i in range(0, len(blocks), size)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        for segment in self.segments():
            x = run_checkpointed(
                segment, x, use_reentrant=False, preserve_rng_state=False,  # no block draws random numbers
                context_fn=lambda segment=segment: (contextlib.nullcontext(), self.second_forward(segment)),
            )  # fmt: skip
        return x

    def second_forward(self, segment: nn.Module) -> contextlib.AbstractContextManager:
        """The context in which backward runs a segment again."""
        return _statistics_kept(segment)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """For a second forward of the same batch: batch norms move copies of their running statistics, which are then dropped."""
    own = [(module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


class LocalNetwork(nn.Module):
    """K local modules: ``stages[k]`` are the blocks of module k, ``local_losses[k]`` is what trains it.

    The last local loss is ``classifier``, the network's own (pooling, linear layer, cross entropy). ``cuts`` are the
    (stage, block) each module but the last ends with. Calling the network gives logits; auxiliary nets are not used.
    """

    def __init__(self, stages: Sequence[Stage], local_losses: Sequence[LocalLoss], cuts: Sequence[split.Cut], prefixes: Sequence[str]):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.local_losses = nn.ModuleList(local_losses)
        self.cuts = tuple(cuts)
        self._prefixes = tuple(prefixes)  # of the released names, one a block

    @property
    def classifier(self) -> Classifier:
        return self.local_losses[-1]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, image_size, image_size)."""
        for stage in self.stages:
            image = stage(image)
        return self.classifier(image)

    def released_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix, module) such that prefix + the name inside the module is the released name; backbone first, then auxiliary nets."""
        yield from zip(self._prefixes, (block for stage in self.stages for block in stage))
        yield "", self.classifier
        for end, local_loss in zip(self.cuts, self.local_losses):
            yield from local_loss.released_nets(*end).items()

    def released_state_dict(self) -> dict[str, torch.Tensor]:
        """`state_dict` by the names of the released code, auxiliary nets included; the tensors are the network's own."""
        return {prefix + name: tensor for prefix, module in self.released_modules() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def load_released_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a state_dict of the released code (also one of its nn.DataParallel, whose names begin with "module.").

        Strict: ValueError names the missing and unexpected keys and the shapes that differ, before anything is copied.
        """
        if state and all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        own = self.released_state_dict()
        problems = [f"missing {_listed(own.keys() - state.keys())}"] if own.keys() - state.keys() else []
        problems += [f"unexpected {_listed(state.keys() - own.keys())}"] if state.keys() - own.keys() else []
        for name in sorted(own.keys() & state.keys()):
            if own[name].shape != state[name].shape:
                problems.append(f"{name}: expected {tuple(own[name].shape)}, got {tuple(state[name].shape)}")
        if problems:
            raise ValueError("load_released_state_dict: " + "; ".join(problems))
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _listed(names) -> str:
    return ", ".join(sorted(names))


def build(
    arch: str = "resnet32",
    modules: int | None = None,
    local_loss: str = "contrast",
    lambdas: Sequence[float] | None = None,
    balanced: bool = False,
    num_classes: int = 10,
    image_size: int = 32,
    image_mean: Sequence[float] | None = CIFAR10_MEAN,
    image_std: Sequence[float] | None = CIFAR10_STD,
    *,
    cuts: Sequence[Sequence[int]] | None = None,
    net_config: str | None = None,
    widen: float = 1,
    feature_dim: int = 128,
    recompute: str = "none",
    impl: str = "auto",
) -> LocalNetwork:
    """A CIFAR ResNet in local modules, initialised as released.

    arch: "resnet20", "resnet32", "resnet44", "resnet56" or "resnet110".
    modules: number K of local modules; 1 is end-to-end training. None: one more than there are ``cuts``, else 1 for
        local_loss="none" and 4 for the others.
    local_loss: "contrast" or "softmax" (InfoPro: reconstruction and a supervised contrastive or cross-entropy term), "greedy"
        (greedy supervised learning: cross entropy of pooling and a linear layer), "dgl" (Decoupled Greedy Learning, `DGLHead`),
        "none" (K = 1).
    lambdas: InfoPro's weights (reconstruction, task) of the first local module, then of the last; linear in between. None: the
        published ones (`local_loss.default_lambdas`). A term of weight exactly 0 is not run.
    balanced: the released memory-balanced split (InfoPro*) in place of the equal one. num_classes: classes.
    image_size: height and width of the images. image_mean, image_std: three numbers each, the normalisation of the images the
        network is given (in units of [0, 1]), which the reconstruction undoes; None, None: images in [0, 1].
    cuts: last (stage, block) of each module but the last, (0, 0) being the stem; in place of a published split.
    net_config, widen, feature_dim: of the auxiliary nets (`AuxClassifier`, `Decoder`); net_config None: "1c2f", for greedy "0c1f".
    recompute: "none"; "block": keep each residual block's input alone and run the block again in backward (gradient
        checkpointing inside every module); "sqrt": the same for segments of sqrt(blocks) blocks (Chen et al. 2016).
    impl: implementation of the losses, as in the ops.

    Raises ValueError naming the argument for unknown names, splits that do not exist and arguments that contradict each other.
    """
    units = backbones.units(arch)
    positions = [unit.position for unit in units]
    modules = _number_of_modules(modules, local_loss, cuts, balanced)
    _check(local_loss, lambdas, modules, num_classes, image_size, image_mean, image_std, net_config, recompute)
    if lambdas is None:
        published = cuts is None
        lambdas = default_lambdas(arch, modules, local_loss, balanced=balanced, image_size=image_size) if published else DEFAULT_LAMBDAS
    if cuts is None:
        cuts = split.split(arch, positions, modules, balanced=balanced, image_size=image_size)
    else:
        cuts = split.check_cuts(arch, positions, cuts, modules)

    def make_loss(module: int, unit: backbones.Unit) -> LocalLoss:
        C = unit.channels
        if local_loss == "dgl":
            return HeadLoss("dgl", DGLHead(C, math.ceil(image_size / unit.downscale), num_classes, impl=impl))
        mode = "contrast" if local_loss == "contrast" else "cross_entropy"
        config = net_config or ("0c1f" if local_loss == "greedy" else "1c2f")
        head = AuxClassifier(C, config, mode, num_classes, widen, feature_dim, impl=impl)
        if local_loss == "greedy":
            return HeadLoss("greedy", head)
        weights = interpolate_lambdas(lambdas, module, modules)
        if weights == (0, 0):
            raise ValueError(f"build: lambdas: {tuple(lambdas)} leave local module {module + 1} of {modules} without any loss")
        return InfoPro(Decoder(C, image_size, widen=widen, image_mean=image_mean, image_std=image_std, impl=impl), head, *weights)

    losses = [make_loss(module, units[positions.index(cut)]) for module, cut in enumerate(cuts)]
    losses.append(Classifier(units[-1].channels, num_classes, impl=impl))
    starts = [0, *(positions.index(cut) + 1 for cut in cuts), len(units)]
    stages = [Stage(OrderedDict((unit.name, unit.block) for unit in units[a:b]), recompute) for a, b in zip(starts, starts[1:])]
    net = LocalNetwork(stages, losses, cuts, [unit.released_prefix for unit in units])
    backbones.initialize(net)
    # Convolutions follow their weights' memory format, and batch norms and convolutions are faster in this one: on a CPU (EPYC,
    # 128 images, K = 1) a step takes three quarters of the time.
    return net.to(memory_format=torch.channels_last)


def _number_of_modules(modules: int | None, local_loss: str, cuts, balanced: bool) -> int:
    if local_loss not in LOCAL_LOSSES:
        raise ValueError(f"build: local_loss: expected one of {LOCAL_LOSSES}, got {local_loss!r}")
    if cuts is not None and balanced:
        raise ValueError("build: cuts, balanced: expected one or the other, a split is either given or taken from the balanced table")
    if modules is None:
        modules = len(cuts) + 1 if cuts is not None else 1 if local_loss == "none" else 4
    if local_loss == "none" and modules != 1:
        raise ValueError(f"build: local_loss='none' trains end to end: expected modules=1, got {modules}")
    return modules


def _check(local_loss, lambdas, modules, num_classes, image_size, image_mean, image_std, net_config, recompute):
    infopro = local_loss in ("contrast", "softmax")
    if lambdas is not None:
        if len(lambdas) != 4 or not all(math.isfinite(v) and v >= 0 for v in lambdas):
            raise ValueError(f"build: lambdas: expected 4 numbers of at least 0 (reconstruction and task, first and last), got {lambdas}")
        if any(lambdas) and not infopro:
            raise ValueError(f"build: lambdas: local_loss={local_loss!r} has no weights, got {tuple(lambdas)}")
        if any(lambdas) and modules == 1:
            raise ValueError(f"build: lambdas: modules=1 has no local loss to weigh, got {tuple(lambdas)}")
    if net_config is not None and local_loss in ("dgl", "none"):
        raise ValueError(f"build: net_config: local_loss={local_loss!r} has no such head, got {net_config!r}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"build: recompute: expected one of {RECOMPUTE}, got {recompute!r}")
    if num_classes < 1:
        raise ValueError(f"build: num_classes: expected at least 1, got {num_classes}")
    if image_size < 4:
        raise ValueError(f"build: image_size: expected at least 4 (the network divides it by 4), got {image_size}")
    if (image_mean is None) != (image_std is None):
        raise ValueError(f"build: image_mean, image_std: expected both or neither, got {image_mean}, {image_std}")
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if value is not None and len(value) != 3:
            raise ValueError(f"build: {name}: expected 3 numbers, got {value}")
