"""Fresh probes on the features of a frozen network: how much they tell of the image and the label.

Each block gets three probes, trained on the training images and measured on the test images:

- the decoder (`Decoder`): reconstruction loss, in nats a pixel and channel;
- the classifier (`AuxClassifier`, 1c2f, or the deeper `ResidualClassifier`): cross entropy of the label, in
  nats;
- the linear probe: global average pooling, standardisation, one linear layer: accuracy.

docs/analysis.md explains which bounds these are. The estimators are the paper's (Wang et al. 2021, section
3). The numbers are predictive V-information (Xu et al. 2020, "A Theory of Usable Information under
Computational Constraints").
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
    """Settings of the probes. Results compare only under the same settings.

    depths: number of blocks to probe, spread evenly, with the first and the last; at most all. epochs: passes
    over the training images. batch_size: images a step. lr: Adam's rate, which falls linearly to 0. seed: of
    the probes' first weights, the order of the images, and the held-back images that choose the epoch.
    validation: share of the training images that is held back.
    classifier: "1c2f", the authors' auxiliary classifier, or "residual", which finds more
    (`ResidualClassifier`).
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

    Standardisation is a BatchNorm without weights. The classifier stays linear in the pooled features, and
    its training does not depend on their scale, which differs from block to block.
    """

    def __init__(self, channels: int, class_num: int):
        super().__init__()
        self.pool, self.standardize = GlobalAveragePool(), nn.BatchNorm1d(channels, affine=False)
        self.fc = nn.Linear(channels, class_num)

    def loss_and_correct(self, h: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean cross entropy and number of right rows. h: (N, C, height, width); label: (N,)."""
        rows = self.standardize(self.pool(h))
        weight, bias = self.fc.weight, self.fc.bias
        loss, correct = ops.linear_cross_entropy(rows, weight, label, bias=bias, return_correct=True)
        return loss, correct


class ResidualClassifier(nn.Module):
    """Three residual blocks, global average pooling, a linear layer, cross entropy.

    The first block keeps the width; the others double it and halve the map until there are 64 channels. A
    single convolution cannot read all that early features hold. With this probe I(h, y) depends less on the
    depth.
    """

    def __init__(self, channels: int, class_num: int):
        super().__init__()
        blocks, width = [BasicBlock(channels, channels, 1)], channels
        for _ in range(2):
            blocks.append(BasicBlock(width, 2 * width, 2) if width < 64 else BasicBlock(width, width, 1))
            width = 2 * width if width < 64 else width
        self.blocks, self.pool = nn.Sequential(*blocks), GlobalAveragePool()
        self.fc = nn.Linear(width, class_num)

    def loss_and_correct(self, h: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `LinearProbe.loss_and_correct` returns."""
        rows = self.pool(self.blocks(h))
        weight, bias = self.fc.weight, self.fc.bias
        loss, correct = ops.linear_cross_entropy(rows, weight, label, bias=bias, return_correct=True)
        return loss, correct


class Probes(nn.Module):
    """The three probes of one block. channels: of its features. classifier: as in `ProbeSettings`."""

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

    def terms(
        self, h: torch.Tensor, image: torch.Tensor, label: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Yield (probe, mean loss, number of right labels or None) one by one. image: normalised."""
        yield "decoder", self.decoder(h, image), None
        yield "classifier", *self.classifier.loss_and_correct(h, label)
        yield "linear", *self.linear.loss_and_correct(h, label)


def baseline(train: Split, test: Split) -> dict[str, float]:
    """Return what is known of test images without features, in nats; uint8 images (N, 3, H, W), labels (N,).

    constant: reconstruction loss of the training images' mean, pixel by pixel. Half a white and half a black
    image are added, so that no pixel costs infinitely much.
    floor: the loss of the images themselves, the least possible: the binary entropy of their pixels.
    label_entropy: H(y) of the test labels.
    """
    p = (train.images.sum(0, dtype=torch.float64) / 255 + 0.5) / (len(train) + 1)
    mean = test.images.sum(0, dtype=torch.float64) / 255 / len(test)
    constant = -(mean * p.log() + (1 - mean) * (1 - p).log()).mean()
    x = torch.arange(256, dtype=torch.float64, device=p.device) / 255
    counts = sum(part.flatten().bincount(minlength=256) for part in test.images.split(1000))
    floor = -((torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)) * counts).sum() / counts.sum()
    share = test.labels.bincount().double() / len(test)
    label_entropy = -torch.xlogy(share, share).sum()
    return {"constant": constant.item(), "floor": floor.item(), "label_entropy": label_entropy.item()}


def block_names(net: LocalNetwork) -> list[str]:
    """Return the names of the network's blocks in order: "stem", "layer1_0", ..."""
    return [name for stage in net.stages for name, _ in stage.named_children()]


def spread(blocks: int, depths: int) -> list[int]:
    """Return ``depths`` indices below ``blocks``, evenly spread from first to last (of one: the last)."""
    if depths >= blocks:
        return list(range(blocks))
    if depths == 1:
        return [blocks - 1]
    return [round(i * (blocks - 1) / (depths - 1)) for i in range(depths)]


def features(net: LocalNetwork, image: torch.Tensor, at: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the outputs of the blocks ``at`` (ascending indices), without a graph, from one forward.

    Each is yielded before the next block runs, so that only one of them need be alive.
    """
    wanted = set(at)
    for index, block in enumerate(block for stage in net.stages for block in stage):
        if index > max(wanted):
            return
        with torch.no_grad():  # around the block alone: the caller may need a graph between two blocks
            image = block(image)
        if index in wanted:
            yield image


@dataclass
class _Best:
    """A probe's lowest validation loss so far, and its state there."""

    loss: float = math.inf
    epoch: int = 0
    state: dict[str, torch.Tensor] | None = None


class Training:
    """The probes of one frozen network, during their training."""

    def __init__(self, net: LocalNetwork, images: ImageSet, settings: ProbeSettings):
        self.net, self.images, self.settings = net, images, settings
        self.dtype = next(net.parameters()).dtype
        names = block_names(net)
        self.at = spread(len(names), settings.depths)
        self.names = [names[i] for i in self.at]
        held = max(1, round(settings.validation * len(images.train)))
        if len(images.train) - held < 2:
            raise ConfigError(f"{images.name}: expected at least 3 training images, got {len(images.train)}")
        generator = torch.Generator().manual_seed(epoch_seed(settings.seed, -1))
        order = torch.randperm(len(images.train), generator=generator).to(images.device)
        self.held, self.kept = order[:held], order[held:]
        torch.manual_seed(settings.seed)
        self.probes = [self._make(h) for h in features(net, self.image(images.train.images[:2]), self.at)]
        self.best = [{name: _Best() for name in PROBES} for _ in self.at]
        parameters = [p for probes in self.probes for p in probes.parameters()]
        # Adam treats every parameter alone, so one optimizer for all probes equals one for each.
        self.optimizer = torch.optim.Adam(parameters, settings.lr, fused=True)

    def image(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 images as the network's input."""
        return normalize(images, self.images.mean, self.images.std, self.dtype)

    def _make(self, h: torch.Tensor) -> Probes:
        if h.dim() != 4:
            raise ConfigError(f"expected blocks that give maps (N, C, h, w), got {tuple(h.shape)}")
        of_images = (self.images.image_size, self.images.num_classes, self.images.mean, self.images.std)
        probes = Probes(h.shape[1], *of_images, self.settings.classifier)
        return probes.to(h.device, h.dtype).to(memory_format=torch.channels_last)

    def train_epoch(self, epoch: int) -> None:
        """Pass once over the images that are not held back, in whole batches (or one smaller batch)."""
        settings, split = self.settings, self.images.train
        size = min(settings.batch_size, len(self.kept))
        steps = len(self.kept) // size
        generator = torch.Generator().manual_seed(epoch_seed(settings.seed, epoch))
        order = self.kept[torch.randperm(len(self.kept), generator=generator).to(self.kept.device)]
        for probes in self.probes:
            probes.train()
        for step in range(steps):
            here = order[step * size : (step + 1) * size]
            image, label = self.image(split.images[here]), split.labels[here]
            lr = one_cycle(epoch * steps + step, settings.epochs * steps, settings.lr, warmup_steps=0)
            self.optimizer.param_groups[0]["lr"] = lr
            for probes, h in zip(self.probes, features(self.net, image, self.at)):
                for _, loss, _ in probes.terms(h, image, label):
                    loss.backward()  # the features have no graph: this reaches the probes alone
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def measure(self, split: Split) -> list[dict[str, dict[str, float]]]:
        """Return {"loss": mean, "accuracy": share of right labels, not of decoders}, by block and probe."""
        for probes in self.probes:
            probes.eval()
        sums = torch.zeros(len(self.at), len(PROBES), 2, dtype=torch.float64, device=split.images.device)
        size = self.settings.batch_size
        for images, label in zip(split.images.split(size), split.labels.split(size)):
            image = self.image(images)
            for total, probes, h in zip(sums, self.probes, features(self.net, image, self.at)):
                for row, (_, loss, correct) in zip(total, probes.terms(h, image, label)):
                    row[0] += loss.double() * len(label)
                    row[1] += 0 if correct is None else correct
        means = (sums / len(split)).tolist()
        names = [("loss",) if probe == "decoder" else ("loss", "accuracy") for probe in PROBES]
        return [{probe: dict(zip(n, row)) for probe, n, row in zip(PROBES, names, rows)} for rows in means]

    def validate(self, epoch: int) -> list[dict[str, dict[str, float]]]:
        """Measure on the held-back images, and keep each probe that is better than before."""
        train = self.images.train
        found = self.measure(Split(train.images[self.held], train.labels[self.held]))
        for name, probes, rows, best in zip(self.names, self.probes, found, self.best):
            for probe in PROBES:
                loss = rows[probe]["loss"]
                if not math.isfinite(loss):
                    what = f"loss is {loss} in epoch {epoch + 1}"
                    raise FloatingPointError(f"{probe} probe of {name}: {what}; a smaller lr may help")
                if loss < best[probe].loss:
                    state = copy.deepcopy(getattr(probes, probe).state_dict())
                    best[probe] = _Best(loss, epoch + 1, state)
        return found

    def take_best(self) -> None:
        for probes, best in zip(self.probes, self.best):
            for probe in PROBES:
                getattr(probes, probe).load_state_dict(best[probe].state)


def probe_network(
    net: LocalNetwork, images: ImageSet, settings: ProbeSettings = DEFAULT,
    progress: Callable[[int, list[dict[str, dict[str, float]]]], None] = lambda epoch, found: None,
) -> list[dict]:
    """Train fresh probes on the frozen network's features, and measure each at its best epoch on the test
    images.

    net: a `LocalNetwork` whose blocks return maps. It runs in eval mode and is not changed.
    images: on the network's device; they are not augmented.
    progress: called after every epoch with its number, from 1, and the results on the held-back images.

    All probes share the batches and their forwards, and do not influence each other. The result is a function
    of (weights, images, settings) and, in its last digits, of machine and threads. torch's generators move.

    Returns a dict for each probed block: "block" (name), "depth" (number of blocks up to it), "channels",
    "size" (h, w), and, on the test images, - "reconstruction": the decoder's loss, nats a pixel and channel;
    "pixel_information": `baseline`'s "constant" minus this loss;
    - "classifier_loss", nats; "label_information": H(y) - classifier_loss, nats; "label_information_bits";
      "classifier_accuracy"; "linear_accuracy"; "linear_loss";
    - "best_epoch": of each probe.
    An information below 0 means that a probe does worse than without features.

    Raises ConfigError for a network or images that cannot be probed, FloatingPointError naming probe and
    block for a loss that is not finite.
    """
    was_training, known = net.training, baseline(images.train, images.test)
    net.eval()
    try:
        training = Training(net, images, settings)
        for epoch in range(settings.epochs):
            training.train_epoch(epoch)
            progress(epoch + 1, training.validate(epoch))
        training.take_best()
        measured = training.measure(images.test)
        image = training.image(images.test.images[:1])
        sizes = [tuple(h.shape[1:]) for h in features(net, image, training.at)]
    finally:
        net.train(was_training)
    found = []
    for index, name, (channels, *size), rows, best in zip(
        training.at, training.names, sizes, measured, training.best
    ):
        reconstruction, classifier, linear = (rows[probe] for probe in PROBES)
        label_information = known["label_entropy"] - classifier["loss"]
        found.append({
            "block": name, "depth": index + 1, "channels": channels, "size": size,
            "reconstruction": reconstruction["loss"],
            "pixel_information": known["constant"] - reconstruction["loss"],
            "classifier_loss": classifier["loss"],
            "label_information": label_information, "label_information_bits": label_information / math.log(2),
            "classifier_accuracy": classifier["accuracy"],
            "linear_accuracy": linear["accuracy"], "linear_loss": linear["loss"],
            "best_epoch": {probe: best[probe].epoch for probe in PROBES},
        })
    return found
