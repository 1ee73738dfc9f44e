"""Fresh probes on the features of a frozen network: how much of the image and of the label they still hold.

Three probes a block, each trained to its own loss on the training images and measured on the test images:

- the decoder (`Decoder`): reconstruction loss, in nats a pixel and channel;
- the classifier (`AuxClassifier`, 1c2f, or the deeper `ResidualClassifier`): cross entropy of the label, in nats;
- the linear probe: global average pooling, standardisation, one linear layer: accuracy.

What these bound, and with what right, is in docs/analysis.md. The estimators are the paper's (Wang et al. 2021, section 3: a decoder of
minimal reconstruction loss for I(h, x), a classifier's cross entropy for I(h, y)); the numbers are predictive V-information
(Xu et al. 2020, "A Theory of Usable Information under Computational Constraints").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from infopro_fast import ops
from infopro_fast.data import ImageSet, Split, normalize
from infopro_fast.data.image_set import epoch_seed
from infopro_fast.errors import ConfigError
from infopro_fast.modules import AuxClassifier, Decoder, LocalNetwork
from infopro_fast.modules.backbones import BasicBlock, initialize
from infopro_fast.modules.heads import GlobalAveragePool
from infopro_fast.trainer.schedule import one_cycle

PROBES = ("decoder", "classifier", "linear")
CLASSIFIERS = ("1c2f", "residual")


@dataclass(frozen=True)
class ProbeSettings:
    """How the probes are made and trained; numbers of runs compare only under the same settings.

    depths: blocks that are probed, spread evenly, the first and the last among them; more than there are: every block.
    epochs: passes over the training images. batch_size: images a step. lr: Adam's rate, which falls linearly to 0.
    seed: of the probes' first weights, the order of the images, and which of them are held back to choose the epoch.
    validation: share of the training images that is held back. classifier: "1c2f", the released auxiliary classifier, or "residual",
    a deeper one, which finds more (`ResidualClassifier`).
    """

    depths: int = 8
    epochs: int = 5
    batch_size: int = 128
    lr: float = 1e-2
    seed: int = 0
    validation: float = 0.1
    classifier: str = "1c2f"

    def __post_init__(self):
        for name, least in (("depths", 1), ("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: expected a positive number, got {self.lr}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation: expected a share between 0 and 1, got {self.validation}")
        if self.classifier not in CLASSIFIERS:
            raise ConfigError(f"classifier: expected one of {CLASSIFIERS}, got {self.classifier!r}")


DEFAULT = ProbeSettings()


class LinearProbe(nn.Module):
    """Global average pooling, standardisation, a linear layer, cross entropy.

    Standardisation (BatchNorm without weights: batch statistics in training, running ones in eval mode) leaves the classifier a linear
    one of the pooled features, but lets its training not depend on their scale, which differs from block to block.
    """

    def __init__(self, channels: int, class_num: int):
        super().__init__()
        self.pool, self.standardize, self.fc = GlobalAveragePool(), nn.BatchNorm1d(channels, affine=False), nn.Linear(channels, class_num)

    def loss_and_correct(self, h: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy and number of right rows. h: (N, channels, height, width); label: (N,) integers."""
        rows = self.standardize(self.pool(h))
        return ops.linear_cross_entropy(rows, self.fc.weight, label, bias=self.fc.bias, return_correct=True)


class ResidualClassifier(nn.Module):
    """Three residual blocks, global average pooling, a linear layer, cross entropy: what a network behind these features might find.

    The first block keeps the width; the others double it and halve the map until there are 64 channels. Features of early blocks hold
    what no single convolution can read; so probed, a curve of I(h, y) depends less on how far the network has come with its work.
    """

    def __init__(self, channels: int, class_num: int):
        super().__init__()
        blocks, width = [BasicBlock(channels, channels, 1)], channels
        for _ in range(2):
            blocks.append(BasicBlock(width, 2 * width, 2) if width < 64 else BasicBlock(width, width, 1))
            width = 2 * width if width < 64 else width
        self.blocks, self.pool, self.fc = nn.Sequential(*blocks), GlobalAveragePool(), nn.Linear(width, class_num)

    def loss_and_correct(self, h: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `LinearProbe.loss_and_correct`."""
        return ops.linear_cross_entropy(self.pool(self.blocks(h)), self.fc.weight, label, bias=self.fc.bias, return_correct=True)


class Probes(nn.Module):
    """The three probes of one block. channels: of its features. classifier: as in `ProbeSettings`. The images come normalised."""

    def __init__(
        self, channels: int, image_size: int, class_num: int, image_mean: Sequence[float],
        image_std: Sequence[float], classifier: str = "1c2f",
    ):
        super().__init__()
        self.decoder = Decoder(channels, image_size, image_mean=image_mean, image_std=image_std)
        if classifier == "residual":
            self.classifier = ResidualClassifier(channels, class_num)
        else:
            self.classifier = AuxClassifier(channels, classifier, "cross_entropy", class_num)
        self.linear = LinearProbe(channels, class_num)
        initialize(self)

    def terms(self, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """(probe, mean loss, number of right labels or None), one after the other: each graph can go before the next is there."""
        yield "decoder", self.decoder(h, image), None
        yield "classifier", *self.classifier.loss_and_correct(h, label)
        yield "linear", *self.linear.loss_and_correct(h, label)


# ---------------------------------------------------------------------------------------------------------------------
# What needs no features


def baseline(train: Split, test: Split) -> dict[str, float]:
    """What is known of a test image without its features, in nats; uint8 images (N, 3, H, W), labels (N,).

    constant: reconstruction loss of the best constant image, the training images' mean pixel by pixel (with half a white and half a
    black image more, so that a pixel that is always black costs little and not infinitely much where it is not).
    floor: of the images themselves, the least there is: a pixel that is neither black nor white has a binary entropy.
    label_entropy: H(y) of the test labels.
    """
    p = (train.images.sum(0, dtype=torch.float64) / 255 + 0.5) / (len(train) + 1)
    mean = test.images.sum(0, dtype=torch.float64) / 255 / len(test)
    constant = -(mean * p.log() + (1 - mean) * (1 - p).log()).mean()
    x = torch.arange(256, dtype=torch.float64, device=p.device) / 255
    counts = sum(part.flatten().bincount(minlength=256) for part in test.images.split(1000))
    floor = -((torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)) * counts).sum() / counts.sum()
    share = test.labels.bincount().double() / len(test)
    return {"constant": constant.item(), "floor": floor.item(), "label_entropy": -torch.xlogy(share, share).sum().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Features of the frozen network


def block_names(net: LocalNetwork) -> list[str]:
    """Names of the network's blocks in order, "stem", "layer1_0", ..."""
    return [name for stage in net.stages for name, _ in stage.named_children()]


def spread(blocks: int, depths: int) -> list[int]:
    """``depths`` of the indices 0 to ``blocks`` - 1, evenly spread, the first and the last among them (of one: the last)."""
    if depths >= blocks:
        return list(range(blocks))
    if depths == 1:
        return [blocks - 1]
    return [round(i * (blocks - 1) / (depths - 1)) for i in range(depths)]


def features(net: LocalNetwork, image: torch.Tensor, at: Sequence[int]) -> Iterator[torch.Tensor]:
    """The outputs of the blocks ``at`` (ascending indices), without a graph, from one forward that stops at the last of them.

    Each is handed out before the next block runs, so that one alone need be alive.
    """
    wanted = set(at)
    for index, block in enumerate(block for stage in net.stages for block in stage):
        if index > max(wanted):
            return
        with torch.no_grad():  # around the block alone: what the caller does between two of them may need a graph
            image = block(image)
        if index in wanted:
            yield image


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring


@dataclass
class _Best:
    """A probe's lowest validation loss so far, and its state there."""

    loss: float = math.inf
    epoch: int = 0
    state: dict[str, torch.Tensor] | None = None


class _Study:
    """The probes of one frozen network while they are trained."""

    def __init__(self, net: LocalNetwork, images: ImageSet, settings: ProbeSettings):
        self.net, self.images, self.settings = net, images, settings
        self.dtype = next(net.parameters()).dtype
        names = block_names(net)
        self.at = spread(len(names), settings.depths)
        self.names = [names[i] for i in self.at]
        held = max(1, round(settings.validation * len(images.train)))
        if len(images.train) - held < 2:
            raise ConfigError(f"{images.name}: expected at least 3 training images, got {len(images.train)}")
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(epoch_seed(settings.seed, -1)))
        order = order.to(images.train.images.device)
        self.held, self.kept = order[:held], order[held:]
        torch.manual_seed(settings.seed)
        self.probes = [self._make(h) for h in features(net, self._image(images.train.images[:2]), self.at)]
        self.best = [{name: _Best() for name in PROBES} for _ in self.at]
        parameters = [p for probes in self.probes for p in probes.parameters()]
        # Adam goes parameter by parameter: one optimizer of all probes is the same as one each.
        self.optimizer = torch.optim.Adam(parameters, settings.lr, fused=True)

    def _image(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(images, self.images.mean, self.images.std, self.dtype)

    def _make(self, h: torch.Tensor) -> Probes:
        if h.dim() != 4:
            raise ConfigError(f"expected blocks that give maps (N, C, h, w), got {tuple(h.shape)}")
        of_images = (self.images.image_size, self.images.num_classes, self.images.mean, self.images.std)
        probes = Probes(h.shape[1], *of_images, self.settings.classifier)
        return probes.to(h.device, h.dtype).to(memory_format=torch.channels_last)

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training images that are not held back, in whole batches (one smaller where there is no whole one)."""
        settings, split = self.settings, self.images.train
        size = min(settings.batch_size, len(self.kept))
        steps = len(self.kept) // size
        generator = torch.Generator().manual_seed(epoch_seed(settings.seed, epoch))
        order = self.kept[torch.randperm(len(self.kept), generator=generator).to(self.kept.device)]
        for probes in self.probes:
            probes.train()
        for step in range(steps):
            here = order[step * size : (step + 1) * size]
            image, label = self._image(split.images[here]), split.labels[here]
            self.optimizer.param_groups[0]["lr"] = one_cycle(epoch * steps + step, settings.epochs * steps, settings.lr, warmup_steps=0)
            for probes, h in zip(self.probes, features(self.net, image, self.at)):
                for _, loss, _ in probes.terms(h, image, label):
                    loss.backward()  # the features have no graph: into the probes' own parameters alone
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def measure(self, split: Split) -> list[dict[str, dict[str, float]]]:
        """Of each block and probe: {"loss": mean over the images, "accuracy": share of right labels (not of the decoder)}."""
        for probes in self.probes:
            probes.eval()
        sums = torch.zeros(len(self.at), len(PROBES), 2, dtype=torch.float64, device=split.images.device)
        for images, label in zip(split.images.split(self.settings.batch_size), split.labels.split(self.settings.batch_size)):
            image = self._image(images)
            for total, probes, h in zip(sums, self.probes, features(self.net, image, self.at)):
                for row, (_, loss, correct) in zip(total, probes.terms(h, image, label)):
                    row[0] += loss.double() * len(label)
                    row[1] += 0 if correct is None else correct
        means = (sums / len(split)).tolist()
        found = [{name: {"loss": loss, "accuracy": share} for name, (loss, share) in zip(PROBES, rows)} for rows in means]
        for rows in found:
            del rows["decoder"]["accuracy"]
        return found

    def validate(self, epoch: int) -> list[dict[str, dict[str, float]]]:
        """Measure on the images held back, and keep each probe that is better than before."""
        found = self.measure(Split(self.images.train.images[self.held], self.images.train.labels[self.held]))
        for name, probes, rows, best in zip(self.names, self.probes, found, self.best):
            for probe in PROBES:
                loss = rows[probe]["loss"]
                if not math.isfinite(loss):
                    raise FloatingPointError(f"{probe} probe of {name}: loss is {loss} in epoch {epoch + 1}; a smaller lr may help")
                if loss < best[probe].loss:
                    best[probe] = _Best(loss, epoch + 1, copy.deepcopy(getattr(probes, probe).state_dict()))
        return found

    def take_best(self) -> None:
        for probes, best in zip(self.probes, self.best):
            for probe in PROBES:
                getattr(probes, probe).load_state_dict(best[probe].state)


def probe_network(
    net: LocalNetwork, images: ImageSet, settings: ProbeSettings = DEFAULT,
    progress: Callable[[int, list[dict[str, dict[str, float]]]], None] = lambda epoch, found: None,
) -> list[dict]:
    """Train fresh probes on the frozen network's features and measure them on the test images, once, each at its best epoch.

    net: any `LocalNetwork` whose blocks give maps; it is put into eval mode for as long as this takes (batch norms with their running
    statistics) and is not changed. images: on the network's device; none is augmented. progress: called after every epoch with
    its number, from 1, and the losses and accuracies on the images held back.

    All probes are trained from the same batches, so from one forward each, and have no influence on each other.
    The result is a function of (weights, images, settings) and, in its last digits, of machine and threads. torch's generators move: fork
    them if that matters.

    Returns a dict for each probed block, the first one first: "block" (name), "depth" (number of blocks up to it), "channels", "size"
    (h, w), and, of the test images,
    - "reconstruction": loss of the decoder, nats a pixel and channel; "pixel_information": how much less that is than `baseline`'s
      "constant";
    - "classifier_loss", nats; "label_information": H(y) - classifier_loss, nats, "label_information_bits"; "classifier_accuracy";
    - "linear_accuracy", "linear_loss";
    - "best_epoch": of each probe.
    Informations are as they come out, below 0 where a probe does worse than knowing nothing.

    Raises ConfigError for a network or images that cannot be probed, FloatingPointError naming probe and block for a loss that is
    not finite.
    """
    training, known = net.training, baseline(images.train, images.test)
    net.eval()
    try:
        study = _Study(net, images, settings)
        for epoch in range(settings.epochs):
            study.train_epoch(epoch)
            progress(epoch + 1, study.validate(epoch))
        study.take_best()
        found = study.measure(images.test)
        sizes = [tuple(h.shape[1:]) for h in features(net, study._image(images.test.images[:1]), study.at)]
    finally:
        net.train(training)
    return [
        {
            "block": name,
            "depth": index + 1,
            "channels": channels,
            "size": size,
            "reconstruction": rows["decoder"]["loss"],
            "pixel_information": known["constant"] - rows["decoder"]["loss"],
            "classifier_loss": rows["classifier"]["loss"],
            "label_information": known["label_entropy"] - rows["classifier"]["loss"],
            "label_information_bits": (known["label_entropy"] - rows["classifier"]["loss"]) / math.log(2),
            "classifier_accuracy": rows["classifier"]["accuracy"],
            "linear_accuracy": rows["linear"]["accuracy"],
            "linear_loss": rows["linear"]["loss"],
            "best_epoch": {probe: best[probe].epoch for probe in PROBES},
        }
        for name, index, (channels, *size), rows, best in zip(study.names, study.at, sizes, found, study.best)
    ]
