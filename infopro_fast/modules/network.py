"""A network cut into local modules, each with its local loss. `build` makes one, the trainer trains it."""

from __future__ import annotations

import contextlib
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from infopro_fast.ops.dispatch import IMPLEMENTATIONS
from infopro_fast.published import AUX_DEPTH, WEIGHTED, default_lambdas

from . import backbones, norm_recompute, split
from .chain import Joined
from .families import PUBLISHED, Family, family
from .local_loss import LOCAL_LOSSES, LocalLoss, Place, interpolate_lambdas
from .segmentation import Tap

RECOMPUTE = ("none", "norm", "block", "sqrt")


class Stage(nn.Sequential):
    """The blocks of one local module.

    recompute: what backward computes again. "norm": each convolution's normalised input, of which the map
    before the norm is kept (`norm_recompute`); "block": each block, from its input; "sqrt": segments of
    sqrt(blocks) blocks (Chen et al. 2016). Running statistics move once a step, in the first forward.
    Gradients are the same bits as with "none", where torch's kernels are deterministic.
    random: blocks may draw random numbers (dropout), so a second forward must draw the same ones.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module], recompute: str = "none", random: bool = False):
        super().__init__(blocks)
        if recompute not in RECOMPUTE:
            raise ValueError(f"Stage: recompute: expected one of {RECOMPUTE}, got {recompute!r}")
        self.recompute, self.random = recompute, random

    def segments(self) -> list[nn.Module]:
        """Return the parts that are run again as one: blocks, or for "sqrt" several blocks in a row."""
        size = max(1, round(math.sqrt(len(self)))) if self.recompute == "sqrt" else 1
        found: list[list[nn.Module]] = []
        for block in self:
            alone = isinstance(block, Tap) or (found and isinstance(found[-1][-1], Tap))
            if not found or alone or len(found[-1]) == size:
                found.append([])
            found[-1].append(block)
        return [blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks) for blocks in found]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if self.recompute == "norm":
            for block in self:
                x = norm_recompute.run_block(block, x)
            return x
        for segment in self.segments():
            if isinstance(segment, Tap):  # keeps no map and must run once
                x = segment(x)
                continue

            def contexts(segment=segment):
                return contextlib.nullcontext(), self.second_forward(segment)

            x = run_checkpointed(
                segment, x, use_reentrant=False, preserve_rng_state=self.random, context_fn=contexts
            )
        return x

    def second_forward(self, segment: nn.Module) -> contextlib.AbstractContextManager:
        """Return the context in which backward runs a segment again."""
        return _statistics_kept(segment)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch norms move copies of their running statistics, which are dropped at the end."""
    own = [(module, dict(module.named_buffers(recurse=False))) for module in block.modules()]
    for module, buffers in own:
        for name, buffer in buffers.items():
            setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in own:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


class LocalNetwork(nn.Module):
    """K local modules: ``stages[k]`` are the blocks of module k, ``local_losses[k]`` trains it.

    The last loss is ``classifier``, the network's own: pooling, linear layer and cross entropy, or the head
    of a segmentation network. ``cuts`` are the (stage, block) at which all modules but the last end. A call
    returns logits and uses no auxiliary net.
    """

    def __init__(
        self, stages: Sequence[Stage], local_losses: Sequence[LocalLoss], cuts: Sequence[split.Cut],
        prefixes: Sequence[str],
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.local_losses = nn.ModuleList(local_losses)
        self.cuts = tuple(cuts)
        self._prefixes = tuple(prefixes)  # of each block's names in the authors' code

    @property
    def classifier(self) -> LocalLoss:
        return self.local_losses[-1]

    def part(self, span: range) -> LocalNetwork:
        """Return the modules ``span`` (from 0) as a network; blocks and losses are shared with this one."""
        blocks = [len(stage) for stage in self.stages]
        start, stop, own = sum(blocks[: span.start]), sum(blocks[: span.stop]), slice(span.start, span.stop)
        prefixes = self._prefixes[start:stop]
        return LocalNetwork(self.stages[own], self.local_losses[own], self.cuts[own], prefixes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits of normalised images (N, 3, H, W): (N, num_classes), for segmentation (N,
        num_classes, h, w).

        Segmentation's maps are smaller than the image.
        """
        for stage in self.stages:
            image = stage(image)
        return self.classifier(image)

    def released_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (prefix, module): prefix + name in the module is the authors' name. Auxiliary nets last."""
        for prefix, block in zip(self._prefixes, (block for stage in self.stages for block in stage)):
            yield from block.original() if isinstance(block, Joined) else [(prefix, block)]
        yield from self.classifier.released_nets(0, 0).items()
        for end, local_loss in zip(self.cuts, self.local_losses):
            yield from local_loss.released_nets(*end).items()

    def released_state_dict(self) -> dict[str, torch.Tensor]:
        """Return `state_dict` by the authors' names; the tensors are the network's own."""
        states = ((prefix, module.state_dict()) for prefix, module in self.released_modules())
        return {prefix + name: tensor for prefix, state in states for name, tensor in state.items()}

    @torch.no_grad()
    def load_released_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state_dict of the authors' code, or of its nn.DataParallel (names begin with "module.").

        Raises ValueError naming missing and unexpected keys and different shapes, before anything is copied.
        """
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            got = type(state).__name__
            raise ValueError(f"load_released_state_dict: expected tensors by name, got {got}")
        if state and all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        own = self.released_state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        problems = [f"missing {', '.join(missing)}"] if missing else []
        problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        for name in sorted(own.keys() & state.keys()):
            if not isinstance(state[name], torch.Tensor):
                problems.append(f"{name}: expected a tensor, got {type(state[name]).__name__}")
            elif own[name].shape != state[name].shape:
                problems.append(f"{name}: expected {tuple(own[name].shape)}, got {tuple(state[name].shape)}")
        if problems:
            raise ValueError("load_released_state_dict: " + "; ".join(problems))
        for name, tensor in own.items():
            tensor.copy_(state[name])


def build(
    arch: str | nn.Module = "resnet32", modules: int | None = None,
    local_loss: str | Callable[[Place], LocalLoss] = "contrast", lambdas: Sequence[float] | None = None,
    balanced: bool = False, num_classes: int | None = None, image_size: int | tuple[int, int] | None = None,
    image_mean: Sequence[float] | str | None = PUBLISHED, image_std: Sequence[float] | str | None = PUBLISHED,
    *, cuts: Sequence[Sequence[int] | str] | None = None, net_config: str | None = None, widen: float = 1,
    feature_dim: int = 128, aux_depth: int | None = None, label_smoothing: float = 0.0,
    pixel_reduction: str = "mean", recompute: str = "none", impl: str = "auto",
) -> LocalNetwork:
    """Return a network in local modules, with auxiliary nets that are initialised as in the authors' code.

    arch: a CIFAR ResNet ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110") or
        "densenet_bc_100_12"; torchvision's "resnet18", ..., "resnet152", "resnext50_32x4d" or
        "resnext101_32x8d"; "deeplabv3_resnet101" (or 50); "fcn_resnet20", a small segmentation network. Or a
        classifier of your own: an nn.Module whose forward is a chain (`chain.trace`), such as nn.Sequential.
        Its layers are used, not copied, and keep their weights.
    modules: number K of local modules; 1 is end-to-end training. None: one more than there are ``cuts``;
        without cuts 1 for local_loss="none", 4 for the CIFAR networks, 2 for the others.
    local_loss: "contrast" or "softmax" (InfoPro: reconstruction and a supervised contrastive or cross-entropy
        term), "greedy" (cross entropy of a head alone), "dgl" (Decoupled Greedy Learning, `DGLHead`),
        "infopro_l" (reconstruction of the module's input and softmax, `InfoProL`), "auglocal" (a head of the
        network's blocks, `AugmentedHead`; CIFAR ResNets) or "none" (K = 1). Segmentation takes "softmax",
        "greedy" and "none". Or a function from a `Place` to a loss of your own, called for every module but
        the last (docs/local_losses.md).
    lambdas: weights (reconstruction, task) of InfoPro or infopro_l for the first local module, then for the
        last; linear in between. None: the published ones (`published.default_lambdas`). A term of weight 0
        does not run.
    balanced: use the published memory-balanced split (InfoPro*) in place of the equal one. num_classes: None:
    10; 1000 for ImageNet's networks, 19 for DeepLab, those of your own network. image_size: height and width,
    one number if they are equal. None: 32, 224, (512, 1024) or 48. image_mean, image_std: three numbers each:
    the normalisation of the network's input (in units of [0, 1]), which the reconstruction undoes. None,
    None: images in [0, 1]. "published": CIFAR-10's for the CIFAR networks, ImageNet's for the others.
    cuts: last block of each module but the last, in place of a published split: (stage, block), where (0, 0)
        is the stem, or a name like "layer2.0" where the network has names. DeepLab's last module must contain
        the end of the third stage, which the FCN head reads.
    net_config, widen, feature_dim: of the auxiliary nets of the CIFAR networks (`AuxClassifier`, `Decoder`).
        net_config None: "1c2f", for greedy "0c1f". The other networks have `ChainDecoder` and `StridedHead`
        or `DenseHead`. Refused where the loss has no such nets.
    aux_depth: blocks of auglocal's first auxiliary network; later ones have fewer (`auglocal.aux_depths`).
    None: 3. label_smoothing: of every cross entropy.
    pixel_reduction: "mean" or "mean_all": whether the losses of a segmentation network's own heads, the last
        module's, average over labelled pixels or over all, as the authors' DeepLab. Local heads: labelled.
    recompute: what backward computes again to save memory: "norm": each convolution's normalised input
        (residual and dense blocks); "block": each block; "sqrt": segments of sqrt(blocks) blocks (Chen et al.
        2016).
    impl: implementation of the losses, as in the ops. "cuda" applies to the reconstruction; the others then
    use "auto".

    Raises ValueError naming the argument for unknown names, splits that do not exist, contradictions, and
    networks or places that cannot be cut; ImportError where torchvision is missing.
    """
    if isinstance(local_loss, nn.Module) or (not callable(local_loss) and local_loss not in LOCAL_LOSSES):
        expected = f"one of {LOCAL_LOSSES} or a function that makes one"
        raise ValueError(f"build: local_loss: expected {expected}, got {local_loss!r}")
    normalisation = (image_mean, image_std)
    shared: dict[str, Any] = {"label_smoothing": label_smoothing, "impl": impl}
    shared["pixel_reduction"] = pixel_reduction
    found = family(arch, num_classes, image_size, *normalisation, **shared)
    if pixel_reduction != "mean" and not (found.dense and pixel_reduction == "mean_all"):
        expected = "'mean', for segmentation 'mean' or 'mean_all'"
        raise ValueError(f"build: pixel_reduction: expected {expected}, got {pixel_reduction!r}")
    units = found.units
    positions = [unit.position for unit in units]
    modules = _number_of_modules(modules, local_loss, cuts, balanced, 4 if found.cifar else 2)
    _check(found, local_loss, lambdas, modules, recompute, label_smoothing, impl)
    _check_auxiliary(found, local_loss, net_config=net_config, widen=widen, feature_dim=feature_dim)
    _check_aux_depth(found, local_loss, aux_depth)
    if modules > len(units) and found.reasons:
        some = list(found.reasons.items())[:4]
        why = "; ".join(f"not after {name}, since {reason}" for name, reason in some)
        most = f"{found.name} can be cut into {len(units)} at most"
        raise ValueError(f"build: modules: {most}, got {modules}: {why}")
    options: dict[str, Any] = {"balanced": balanced, "image_size": found.image_size[0]}
    if lambdas is None:  # the published weights belong to the published splits
        lambdas = default_lambdas(found.name if cuts is None else "", modules, local_loss, **options)
    if cuts is None:
        cuts = split.split(found.name, positions, modules, **options)
    else:
        labels = [unit.label for unit in units]
        cuts = split.check_cuts(found.name, positions, cuts, modules, labels, found.reasons)

    def make_loss(place: Place) -> LocalLoss:
        if callable(local_loss):
            return _made(local_loss, place)
        weights = interpolate_lambdas(lambdas, place.module, modules)
        if local_loss in WEIGHTED and weights == (0, 0):
            module = f"local module {place.module + 1} of {modules}"
            raise ValueError(f"build: lambdas: {tuple(lambdas)} leave {module} without any loss")
        nets: dict[str, Any] = {"net_config": net_config, "widen": widen, "feature_dim": feature_dim}
        return found.local_loss(local_loss, place, weights, **nets, aux_depth=aux_depth or AUX_DEPTH)

    ends = [positions.index(cut) for cut in cuts]
    losses = [make_loss(place) for place in found.places(ends)]
    starts = [0, *(end + 1 for end in ends), len(units)]
    losses.append(found.make_end(units[starts[-2] :]))
    blocks = [OrderedDict((unit.name, unit.block) for unit in units[a:b]) for a, b in zip(starts, starts[1:])]
    stages = [Stage(some, recompute, random=not found.cifar) for some in blocks]
    net = LocalNetwork(stages, losses, cuts, [unit.released_prefix for unit in units])
    backbones.initialize(net if found.ours else net.local_losses[:-1])
    # Convolutions follow their weights' memory format; they and batch norms are faster in this one, on the
    # CPU too.
    return net.to(memory_format=torch.channels_last)


def _made(make: Callable[[Place], LocalLoss], place: Place) -> LocalLoss:
    """Return a user's own loss."""
    loss = make(place)
    if not isinstance(loss, LocalLoss):
        got = type(loss).__name__
        raise ValueError(f"build: local_loss: expected the function to return a LocalLoss, got {got}")
    return loss


def _number_of_modules(modules: int | None, local_loss, cuts, balanced: bool, default: int) -> int:
    if cuts is not None and balanced:
        raise ValueError("build: cuts, balanced: expected one or the other, got both")
    if cuts is not None and (isinstance(cuts, str) or not hasattr(cuts, "__len__")):
        raise ValueError(f"build: cuts: expected a list of (stage, block) pairs or names, got {cuts!r}")
    try:
        modules = None if modules is None else operator.index(modules)
    except TypeError as error:
        raise ValueError(f"build: modules: expected an integer, got {modules!r}") from error
    if modules is None:
        modules = len(cuts) + 1 if cuts is not None else 1 if local_loss == "none" else default
    if local_loss == "none" and modules != 1:
        raise ValueError(f"build: local_loss='none' trains end to end: expected modules=1, got {modules}")
    return modules


def _check(found: Family, local_loss, lambdas, modules, recompute, label_smoothing, impl) -> None:
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"build: impl: expected one of {('auto', *IMPLEMENTATIONS)}, got {impl!r}")
    if lambdas is not None:
        if len(lambdas) != 4 or not all(math.isfinite(v) and v >= 0 for v in lambdas):
            expected = "4 numbers of at least 0 (reconstruction and task, first and last)"
            raise ValueError(f"build: lambdas: expected {expected}, got {lambdas}")
        weights = tuple(lambdas)
        if any(weights) and local_loss not in WEIGHTED:
            raise ValueError(f"build: lambdas: local_loss={local_loss!r} has no weights, got {weights}")
        if any(weights) and modules == 1:
            raise ValueError(f"build: lambdas: modules=1 has no local loss to weigh, got {weights}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"build: recompute: expected one of {RECOMPUTE}, got {recompute!r}")
    if recompute == "norm" and not any(norm_recompute.has_chain(unit.block) for unit in found.units):
        has = f"knows the blocks of ResNets and DenseNets, and {found.name} has none"
        raise ValueError(f"build: recompute='norm' {has}: expected 'none', 'block' or 'sqrt'")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"build: label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if found.dense and local_loss in ("contrast", "dgl", "infopro_l", "auglocal"):
        expected = "expected 'softmax', 'greedy' or 'none'"
        raise ValueError(f"build: local_loss: {found.name} segments images: {expected}, got {local_loss!r}")


def _check_auxiliary(found: Family, local_loss, **given) -> None:
    """Check the settings of the auxiliary nets of InfoPro and greedy."""
    defaults = {"net_config": None, "widen": 1, "feature_dim": 128}
    for name, value in given.items():
        if value == defaults[name]:
            continue
        if callable(local_loss) or local_loss in ("dgl", "auglocal", "none"):
            what = "head" if name == "net_config" else "net"
            raise ValueError(f"build: {name}: local_loss={local_loss!r} has no such {what}, got {value!r}")
        if not found.cifar and name != "feature_dim":
            nets = f"the auxiliary nets of {found.name}"
            raise ValueError(f"build: {name}: {nets} have no such settings, got {value!r}")


def _check_aux_depth(found: Family, local_loss, aux_depth) -> None:
    if local_loss == "auglocal" and found.name not in backbones.BLOCKS:
        expected = f"expected arch {', '.join(backbones.BLOCKS)}, got {found.name}"
        raise ValueError(f"build: local_loss 'auglocal' takes its blocks from a CIFAR ResNet: {expected}")
    if aux_depth is None:
        return
    if local_loss != "auglocal":
        raise ValueError(f"build: aux_depth: local_loss={local_loss!r} has no such net, got {aux_depth}")
    if not isinstance(aux_depth, int) or isinstance(aux_depth, bool) or aux_depth < 1:
        raise ValueError(f"build: aux_depth: expected an integer of at least 1, got {aux_depth!r}")
