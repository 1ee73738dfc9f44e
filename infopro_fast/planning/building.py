"""`build`: a network in local modules, cut as told, as published, or as planned."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from infopro_fast.modules import (
    LOCAL_LOSSES,
    LocalLoss,
    LocalNetwork,
    Place,
    backbones,
    norm_recompute,
    split,
)
from infopro_fast.modules.families import PUBLISHED, Family, family
from infopro_fast.modules.network import RECOMPUTE, assemble
from infopro_fast.ops.dispatch import IMPLEMENTATIONS
from infopro_fast.plan_file import Plan, parse_bytes
from infopro_fast.published import WEIGHTED, default_lambdas

from .chains import Source
from .planner import MeasuredChain, fitting


def build(
    arch: str | nn.Module = "resnet32", modules: int | None = None,
    local_loss: str | Callable[[Place], LocalLoss] | None = None, lambdas: Sequence[float] | None = None,
    balanced: bool = False, num_classes: int | None = None, image_size: int | tuple[int, int] | None = None,
    image_mean: Sequence[float] | str | None = PUBLISHED, image_std: Sequence[float] | str | None = PUBLISHED,
    *, cuts: Sequence[Sequence[int] | str] | None = None, plan: Plan | str | Path | None = None,
    budget: int | str | None = None, batch_size: int | None = None,
    arch_args: Mapping[str, Any] | None = None, net_config: str | None = None, widen: float = 1,
    feature_dim: int = 128, aux_depth: int | None = None, label_smoothing: float = 0.0,
    pixel_reduction: str = "mean", recompute: str = "none", impl: str = "auto",
) -> LocalNetwork:
    """Return a network in local modules, with auxiliary nets that are initialised as in the authors' code.

    arch: a CIFAR ResNet ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110") or
        "densenet_bc_100_12"; torchvision's "resnet18", ..., "resnet152", "resnext50_32x4d" or
        "resnext101_32x8d"; "deeplabv3_resnet101" (or 50); "fcn_resnet20", a small segmentation network. A
        classifier made by another package: "torchvision:NAME", "timm:NAME" or "package.module:function", with
        its own initial weights. Or a classifier of your own: an nn.Module whose forward is a chain
        (`chain.trace`), such as nn.Sequential or a vision transformer (docs/tokens.md). Its layers are used,
        not copied, and keep their weights and memory format.
    arch_args: keyword arguments of the function that makes the network, for a name with a colon.
    modules: number K of local modules; 1 is end-to-end training. None: one more than there are ``cuts``;
        without cuts 1 for local_loss="none", 4 for the CIFAR networks, 2 for the others.
    local_loss: "contrast" or "softmax" (InfoPro: reconstruction and a supervised contrastive or cross-entropy
        term), "greedy" (cross entropy of a head alone), "dgl" (Decoupled Greedy Learning, `DGLHead`),
        "infopro_l" (reconstruction of the module's input and softmax, `InfoProL`), "auglocal" (a head of the
        network's blocks, `AugmentedHead`; CIFAR ResNets) or "none" (K = 1). Segmentation takes "softmax",
        "greedy" and "none". None: "softmax" for segmentation, else "contrast". Or a function from a `Place`
        to a loss of your own, called for every module but the last (docs/local_losses.md).
    lambdas: weights (reconstruction, task) of InfoPro or infopro_l for the first local module, then for the
        last; linear in between. None: the published ones (`published.default_lambdas`). A term of weight 0
        does not run.
    balanced: cut so that the largest module takes as little memory as possible: by the published split
        (InfoPro*) where there is one, else by `plan` for ``batch_size`` images.
    plan: a `Plan` or its file, in place of modules, cuts and recompute.
    budget: bytes, or a text like "8GiB", that a step of ``batch_size`` images may take with everything
        (`plan`): the fewest ``modules`` that fit.
    batch_size: for budget and balanced. None: 128 for the CIFAR networks, 32 for others.
    num_classes: None: 10; 1000 for ImageNet's networks, 19 for DeepLab, those of your own network.
    image_size: height and width, one number if they are equal. None: 32, 224, (512, 1024) or 48.
    image_mean, image_std: three numbers each: the normalisation of the network's input (in units of [0, 1]),
        which the reconstruction undoes. None, None: images in [0, 1]. "published": CIFAR-10's for the CIFAR
        networks, ImageNet's for the others.
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
    known = (None, *LOCAL_LOSSES)
    if isinstance(local_loss, nn.Module) or (not callable(local_loss) and local_loss not in known):
        expected = f"one of {LOCAL_LOSSES} or a function that makes one"
        raise ValueError(f"build: local_loss: expected {expected}, got {local_loss!r}")
    about: dict[str, Any] = {"image_size": image_size, "num_classes": num_classes, "arch_args": arch_args}
    about |= {"image_mean": image_mean, "image_std": image_std}
    shared: dict[str, Any] = {"label_smoothing": label_smoothing, "impl": impl}
    shared["pixel_reduction"] = pixel_reduction
    found = family(arch, **about, **shared)
    if pixel_reduction != "mean" and not (found.dense and pixel_reduction == "mean_all"):
        expected = "'mean', for segmentation 'mean' or 'mean_all'"
        raise ValueError(f"build: pixel_reduction: expected {expected}, got {pixel_reduction!r}")
    local_loss = local_loss or ("softmax" if found.dense else "contrast")
    nets: dict[str, Any] = {"net_config": net_config, "widen": widen, "feature_dim": feature_dim}
    nets["aux_depth"] = aux_depth
    _check_choices(plan, cuts, balanced, budget, modules, local_loss, batch_size)
    if plan is not None:
        cuts, recompute = _from_plan(plan, found, recompute)
    elif budget is not None or (balanced and not split.has_balanced(found.name, found.image_size, modules)):
        planned = {"local_loss": local_loss, "options": nets, **about}
        cuts = _planned_cuts(arch, found, modules, budget, batch_size, recompute, planned)
        balanced = False
    modules = _number_of_modules(modules, local_loss, cuts, 4 if found.cifar else 2)
    _check(found, local_loss, lambdas, modules, recompute, label_smoothing, impl)
    _check_auxiliary(found, local_loss, **{name: nets[name] for name in AUXILIARY})
    _check_aux_depth(found, local_loss, aux_depth)
    units = found.units
    positions = [unit.position for unit in units]
    if modules > len(units) and found.reasons:
        some = list(found.reasons.items())[:4]
        why = "; ".join(f"not after {name}, since {reason}" for name, reason in some)
        most = f"{found.name} can be cut into {len(units)} at most"
        raise ValueError(f"build: modules: {most}, got {modules}: {why}")
    published: dict[str, Any] = {"balanced": balanced, "image_size": found.image_size[0]}
    if lambdas is None:  # the published weights belong to the published splits
        lambdas = default_lambdas(found.name if cuts is None else "", modules, local_loss, **published)
    if cuts is None:
        cuts = split.split(found.name, positions, modules, **published)
    else:
        labels = [unit.label for unit in units]
        cuts = split.check_cuts(found.name, positions, cuts, modules, labels, found.reasons)
    return assemble(found, cuts, local_loss, lambdas, recompute=recompute, **nets)


def _from_plan(plan: Plan | str | Path, found: Family, recompute: str) -> tuple[Sequence[split.Cut], str]:
    """Return the cuts and what to recompute. Raises ValueError for a plan of another network."""
    plan = plan if isinstance(plan, Plan) else Plan.read(Path(plan))
    for name, own, planned in (
        ("arch", found.name, plan.arch), ("image_size", found.image_size, plan.image_size),
    ):  # fmt: skip
        if own != planned:
            raise ValueError(f"build: plan: expected one for {name} {own}, got {planned}")
    if recompute not in ("none", plan.recompute):
        raise ValueError(f"build: plan, recompute: the plan has {plan.recompute!r}, got {recompute!r}")
    return plan.cuts, plan.recompute


def _planned_cuts(
    arch: str | nn.Module, found: Family, modules: int | None, budget: int | str | None,
    batch_size: int | None, recompute: str, source: dict[str, Any],
) -> Sequence[split.Cut]:
    batch_size = batch_size or (128 if found.cifar else 32)
    chain = MeasuredChain(Source(arch, **source), batch_size, recompute, timed=False)
    size = parse_bytes(budget) if isinstance(budget, str) else budget
    if modules is None and size is None:
        modules = 4 if found.cifar else 2
    return fitting(chain, modules, size, "peak").cuts


def _check_choices(plan, cuts, balanced, budget, modules, local_loss, batch_size) -> None:
    """Check what says where to cut."""
    ways = {"cuts": cuts is not None, "plan": plan is not None, "balanced": bool(balanced)}
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise ValueError(f"build: {', '.join(given)}: expected one or the other, got {len(given)}")
    if budget is not None and (cuts is not None or plan is not None):
        raise ValueError(f"build: budget, {given[0]}: expected one or the other, got both")
    if plan is not None and modules is not None:
        raise ValueError(f"build: plan, modules: the plan has its number of modules, got {modules}")
    if cuts is not None and (isinstance(cuts, str) or not hasattr(cuts, "__len__")):
        raise ValueError(f"build: cuts: expected a list of (stage, block) pairs or names, got {cuts!r}")
    if modules is not None and not hasattr(type(modules), "__index__"):
        raise ValueError(f"build: modules: expected an integer, got {modules!r}")
    if local_loss == "none" and budget is not None:
        raise ValueError("build: budget: local_loss='none' trains end to end, there is nothing to cut")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"build: batch_size: expected at least 1, got {batch_size}")


def _number_of_modules(modules: int | None, local_loss, cuts, default: int) -> int:
    modules = None if modules is None else operator.index(modules)
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


AUXILIARY = {"net_config": None, "widen": 1, "feature_dim": 128}  # settings and their defaults


def _check_auxiliary(found: Family, local_loss, **given) -> None:
    """Check the settings of the auxiliary nets of InfoPro and greedy."""
    for name, value in given.items():
        if value == AUXILIARY[name]:
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
