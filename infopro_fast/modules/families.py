"""Networks before they are cut: their blocks, their end, and the auxiliary nets of their modules."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from infopro_fast.named_functions import is_named

from . import auglocal, backbones, chain, cityscapes, densenet, imagenet, named, segmentation
from .backbones import Unit
from .decoder import ChainDecoder, Decoder
from .heads import AuxClassifier, DGLHead
from .infopro_l import FeatureDecoder, InfoProL
from .local_loss import Classifier, HeadLoss, InfoPro, LocalLoss, Place

PUBLISHED = "published"
CIFAR10_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR10_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
SMALL = {"fcn_resnet20": 3}  # blocks a stage
ARCHS = (*backbones.BLOCKS, *densenet.ARCHS, *imagenet.ARCHS, *cityscapes.ARCHS, *SMALL)


@dataclass(frozen=True)
class Family:
    """A network before it is cut.

    units: its blocks. make_end: from the blocks of the last module to the network's own loss.
    impl: of the ops of heads and of the network's loss. decoder_impl: of `ops.reconstruction_loss`.
    cifar: has the small auxiliary nets of the CIFAR networks. dense: every pixel has a label.
    ours: `build` draws its weights. reasons: why it cannot be cut at other places, by name.
    """

    name: str
    units: list[Unit]
    make_end: Callable[[Sequence[Unit]], LocalLoss]
    num_classes: int
    image_size: tuple[int, int]
    image_mean: Sequence[float] | None
    image_std: Sequence[float] | None
    label_smoothing: float
    impl: str
    decoder_impl: str
    cifar: bool = False
    dense: bool = False
    ours: bool = True
    reasons: dict[str, str] = field(default_factory=dict)
    infopro: Callable[..., InfoPro] = InfoPro

    def size(self, unit: Unit) -> tuple[int, int]:
        """Return (h, w) of a block's output."""
        if unit.size != (0, 0):
            return unit.size
        return math.ceil(self.image_size[0] / unit.downscale), math.ceil(self.image_size[1] / unit.downscale)

    def places(self, ends: Sequence[int]) -> list[Place]:
        """Return the places of the modules that end with these units."""
        found, given = [], (3, self.image_size)
        for module, end in enumerate(ends):
            output = self.units[end].channels, self.size(self.units[end])
            about = (module, len(ends) + 1, *output, *given, self.image_size, self.num_classes, end)
            after = self.units[end + 1 : [*ends, len(self.units) - 1][module + 1] + 1]
            found.append(Place(*about, tuple(unit.block for unit in after)))
            given = output
        return found

    def local_loss(
        self, name: str, place: Place, weights: tuple[float, float], *, net_config: str | None, widen: float,
        feature_dim: int, aux_depth: int,
    ) -> LocalLoss:
        """Return the loss ``name`` of the local module at ``place``. weights: of reconstruction and task."""
        unit = self.units[place.end]
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "impl": self.impl}
        if name == "dgl":
            return HeadLoss("dgl", DGLHead(unit.channels, max(place.size), self.num_classes, **options))
        if name == "auglocal":
            depth = auglocal.aux_depths(aux_depth, place.modules)[place.module]
            blocks = [self.units[i] for i in auglocal.sampled_blocks(place.end, len(self.units), depth)]
            head = auglocal.AugmentedHead(unit.channels, unit.downscale, blocks, self.num_classes, **options)
            return HeadLoss("auglocal", head)
        head = self._head(name, unit, net_config, widen, feature_dim)
        if name == "greedy":
            return HeadLoss("greedy", head)
        if name == "infopro_l":
            given = (place.input_channels, place.input_size)
            return InfoProL(FeatureDecoder(place.channels, *given, widen, impl=self.impl), head, *weights)
        decoder = self._decoder(unit, widen)
        if self.infopro is InfoPro:
            return InfoPro(decoder, head, *weights)
        return self.infopro(decoder, head, *weights, alone=place.modules == 2)

    def _head(self, name: str, unit: Unit, net_config: str | None, widen: float, feature_dim: int):
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "impl": self.impl}
        if self.dense:
            return segmentation.DenseHead(unit.channels, self.num_classes, **options)
        mode = "contrast" if name == "contrast" else "cross_entropy"
        if self.cifar:
            config = net_config or ("0c1f" if name == "greedy" else "1c2f")
            return AuxClassifier(unit.channels, config, mode, self.num_classes, widen, feature_dim, **options)
        size = self.size(unit)
        return imagenet.StridedHead(unit.channels, size, self.num_classes, mode, feature_dim, **options)

    def _decoder(self, unit: Unit, widen: float):
        options: dict[str, Any] = {"image_mean": self.image_mean, "image_std": self.image_std}
        options["impl"] = self.decoder_impl
        if self.cifar:
            return Decoder(unit.channels, self.image_size[0], widen=widen, **options)
        return ChainDecoder(unit.channels, self.size(unit), self.image_size, **options)


def family(
    arch: str | nn.Module, num_classes: int | None, image_size: int | tuple[int, int] | None,
    image_mean: Sequence[float] | str | None, image_std: Sequence[float] | str | None, *,
    label_smoothing: float = 0.0, impl: str = "auto", pixel_reduction: str = "mean",
    arch_args: Mapping[str, Any] | None = None,
) -> Family:
    """Return the network of this name, or a user's own. Arguments and errors are those of `build`."""
    own = isinstance(arch, nn.Module) or is_named(arch)
    if not own and arch not in ARCHS:
        expected = f"one of {ARCHS}, {named.FORMS}, or an nn.Module"
        raise ValueError(f"build: arch: expected {expected}, got {arch!r}")
    if arch_args and not is_named(arch):
        raise ValueError(f"build: arch_args: expected arch as {named.FORMS}, got {arch!r}")
    small = not own and (arch in backbones.BLOCKS or arch in densenet.ARCHS)
    size = _image_size(arch, image_size, square=small)
    mean, std = _normalisation(image_mean, image_std, small)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"build: num_classes: expected at least 1, got {num_classes}")
    others = "auto" if impl == "cuda" else impl  # reconstruction_loss alone has CUDA C++ kernels
    common = {
        "image_size": size, "image_mean": mean, "image_std": std, "label_smoothing": label_smoothing,
        "impl": others, "decoder_impl": impl,
    }
    if own or arch in imagenet.ARCHS:
        return _classifier_of_maps(arch, num_classes, arch_args or {}, common)
    if arch in cityscapes.ARCHS or arch in SMALL:
        return _segmenter(arch, num_classes, common, pixel_reduction)
    classes = num_classes or 10
    units = backbones.units(arch) if arch in backbones.BLOCKS else densenet.units(arch)
    tail = Classifier(units[-1].channels, classes, label_smoothing=label_smoothing, impl=others)
    return Family(arch, units, lambda _: tail, classes, cifar=True, **common)


def _classifier_of_maps(
    arch: str | nn.Module, num_classes: int | None, arch_args: Mapping[str, Any], common: dict
) -> Family:
    own = isinstance(arch, nn.Module) or is_named(arch)
    name = type(arch).__name__ if isinstance(arch, nn.Module) else arch
    if isinstance(arch, nn.Module):
        net = arch
    else:
        classes = num_classes or 1000
        net = named.network(arch, num_classes, arch_args) if own else imagenet.network(arch, classes)
    try:
        units, tail, reasons = imagenet.units_and_tail(net, common["image_size"])
    except chain.NotAChain as error:
        raise ValueError(f"build: arch: {name} cannot be split: {error}") from error
    if not tail or len(tail[-1].shape) != 2:
        got = ", ".join(map(str, tail[-1].shape[1:] if tail else (units[-1].channels, *units[-1].size)))
        expected = "a network that ends in class scores (N, classes)"
        raise ValueError(f"build: arch: {name}: expected {expected}, got (N, {got})")
    classes = tail[-1].shape[1]
    if num_classes not in (None, classes):
        advice = "leave num_classes out, or give the network another last layer first"
        raise ValueError(f"build: num_classes: {name} has {classes} classes, got {num_classes}: {advice}")
    end = imagenet.Tail(tail, classes, label_smoothing=common["label_smoothing"], impl=common["impl"])
    kind = InfoPro if own else imagenet.ReleasedNames
    return Family(name, units, lambda _: end, classes, ours=not own, reasons=reasons, infopro=kind, **common)


def _segmenter(arch: str, num_classes: int | None, common: dict, reduction: str) -> Family:
    options = {"label_smoothing": common["label_smoothing"], "impl": common["impl"], "reduction": reduction}
    if arch in SMALL:
        classes = num_classes or 11
        end = segmentation.PixelClassifier(segmentation.dense_head(64, 64, classes), classes, **options)
        units = segmentation.small_units(SMALL[arch])
        return Family(arch, units, lambda _: end, classes, dense=True, **common)
    classes = num_classes or 19
    units, tap = cityscapes.units(arch)

    def make_end(last_module: Sequence[Unit]) -> LocalLoss:
        if not any(unit.block is tap for unit in last_module[1:]):  # the tap's gradient needs earlier blocks
            before = {unit.block: previous.position for previous, unit in zip(units, units[1:])}
            head, inside = f"the auxiliary FCN head of {arch}", "inside the last module"
            reads = f"{head} reads the output of {before[tap]}, {inside}"
            expected = f"expected a last cut before it, got {before[last_module[0].block]}"
            raise ValueError(f"build: modules, cuts: {reads}: {expected}")
        return cityscapes.end(classes, tap, **options)

    kind = cityscapes.CityscapesInfoPro
    return Family(arch, units, make_end, classes, dense=True, infopro=kind, **common)


def _image_size(arch, image_size, square: bool) -> tuple[int, int]:
    if image_size is None:
        large = (512, 1024) if arch in cityscapes.ARCHS else 224
        image_size = 32 if square else 48 if arch in SMALL else large
    try:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        size = tuple(operator.index(side) for side in sides)
    except TypeError as error:
        expected = "an integer, or two (height, width)"
        raise ValueError(f"build: image_size: expected {expected}, got {image_size!r}") from error
    if len(size) != 2 or min(size) < 4:
        raise ValueError(f"build: image_size: expected at least 4, which a network divides, got {image_size}")
    if square and size[0] != size[1]:
        raise ValueError(f"build: image_size: {arch} takes square images, got {size[0]}x{size[1]}")
    return size


def _normalisation(mean, std, small: bool):
    if (mean is None) != (std is None):
        raise ValueError(f"build: image_mean, image_std: expected both or neither, got {mean}, {std}")
    if mean == PUBLISHED:
        mean = CIFAR10_MEAN if small else imagenet.MEAN
    if std == PUBLISHED:
        std = CIFAR10_STD if small else imagenet.STD
    for name, value in (("image_mean", mean), ("image_std", std)):
        if value is not None and (isinstance(value, str) or len(value) != 3):
            raise ValueError(f"build: {name}: expected 3 numbers, None or {PUBLISHED!r}, got {value}")
    return mean, std
