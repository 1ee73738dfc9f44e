"""The same losses as a user of plain torch runs them: the released formulation, layer by layer, written here from its description.

`ReorderedDecoder` is our algebra in plain torch, for a compiler to fuse: it shows what the reordering gives without kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ReleasedDecoder(nn.Module):
    """Resize, then conv3x3 - batch norm - ReLU - conv3x3 - sigmoid, then BCE: everything in between is kept for backward."""

    def __init__(self, C: int, image_size: int, K: int = 12):
        super().__init__()
        self.image_size = image_size
        self.decoder = nn.Sequential(
            nn.Conv2d(C, K, 3, padding=1), nn.BatchNorm2d(K), nn.ReLU(), nn.Conv2d(K, 3, 3, padding=1), nn.Sigmoid()
        )  # fmt: skip
        self.bce = nn.BCELoss()

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        size = [self.image_size, self.image_size]
        return self.bce(self.decoder(F.interpolate(features, size=size, mode="bilinear", align_corners=True)), image)


class ReleasedChain(nn.Module):
    """The released ImageNet decoder: conv1x1 to 128, then three times double and conv3x3, to 32, 12 and 3 channels; then BCE."""

    def __init__(self, C: int):
        super().__init__()
        double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(C, 128, 1), nn.BatchNorm2d(128), nn.ReLU(), double,
            nn.Conv2d(128, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), double,
            nn.Conv2d(32, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), double,
            nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip
        self.bce = nn.BCELoss()

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.bce(self.decoder(features), image)


class ReorderedDecoder(ReleasedDecoder):
    """The first convolution as nine 1x1 convolutions at the size of h, whose results are resized, shifted and added."""

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        conv1, norm, relu, conv2, _ = self.decoder
        K, C = conv1.weight.shape[:2]
        H = self.image_size
        taps = conv1.weight.permute(2, 3, 0, 1).reshape(9 * K, C, 1, 1)
        low = F.interpolate(F.conv2d(features, taps), size=[H, H], mode="bilinear", align_corners=True).unflatten(1, (3, 3, K))
        padded = F.pad(low, (1, 1, 1, 1))
        z = sum(padded[:, dy, dx, :, dy : dy + H, dx : dx + H] for dy in range(3) for dx in range(3)) + conv1.bias[:, None, None]
        return F.binary_cross_entropy_with_logits(conv2(relu(norm(z))), image)


def upsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return F.conv2d(doubled, weight, bias, padding=1)


def released_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """One view, all anchors: a mask of equal labels, logits less the row's maximum, masks without the diagonal."""
    z = F.normalize(features, dim=1)
    labels = labels.view(-1, 1)
    mask = torch.eq(labels, labels.T).float()
    logits = torch.div(z @ z.T, temperature)
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask).fill_diagonal_(0)
    mask = mask * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    positives = mask.sum(1)
    positives = torch.where(positives < 1e-6, torch.ones_like(positives), positives)
    return -((mask * log_prob).sum(1) / positives).mean()


def short_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """The same in the fewest N x N maps that plain torch allows."""
    z = F.normalize(features, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = z @ z.T / temperature
    positives = (labels[:, None] == labels) & ~itself
    count = positives.sum(1)
    chosen = torch.where(positives, logits, 0).sum(1)
    denominator = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    return -((chosen - count * denominator) / count.clamp(min=1)).mean()


def cross_entropy(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def resized_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=True), target, ignore_index=255)


def norm_relu_pool(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    return F.relu(bn(x)).mean((2, 3))


def conv_norm_relu_pool(x: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> torch.Tensor:
    return norm_relu_pool(conv(x), bn)


class ReleasedHead(nn.Module):
    """1c2f: conv3x3 - batch norm - ReLU - pool - linear - ReLU - linear, then the contrastive loss or cross entropy."""

    def __init__(self, C: int, contrast: bool, classes: int = 10, feature_dim: int = 128):
        super().__init__()
        width, stride = {16: (32, 2), 32: (64, 2), 64: (64, 1)}[C]
        self.contrast = contrast
        self.head = nn.Sequential(
            nn.Conv2d(C, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, feature_dim), nn.ReLU(), nn.Linear(feature_dim, feature_dim if contrast else classes),
        )  # fmt: skip

    def forward(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = self.head(features)
        return released_supcon(output, label) if self.contrast else F.cross_entropy(output, label)


class ReleasedTraining(nn.Module):
    """The released step on a network of `infopro_fast`: both auxiliary nets of every module are built and run, whatever their weight,
    the image is restored at every boundary, all gradients are kept until one optimizer has stepped."""

    def __init__(self, net, make_optimizer, mean, std, image_size: int = 32):
        super().__init__()
        self.net = net
        channels = [self._channels(stage) for stage in net.stages[:-1]]
        self.decoders = nn.ModuleList(ReleasedDecoder(C, image_size) for C in channels)
        self.heads = nn.ModuleList(ReleasedHead(C, contrast=True) for C in channels)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        trained = [*net.stages.parameters(), *net.classifier.parameters(), *self.decoders.parameters(), *self.heads.parameters()]
        self.optimizer = make_optimizer(trained)

    @staticmethod
    def _channels(stage: nn.Module) -> int:
        return [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features

    def step(self, image: torch.Tensor, label: torch.Tensor, lambdas: list[tuple[float, float]]) -> float:
        self.optimizer.zero_grad()
        x = image
        for stage, decoder, head, (l1, l2) in zip(self.net.stages, self.decoders, self.heads, lambdas, strict=False):
            x = stage(x)
            restored = (image * self.std + self.mean).clamp(0, 1)
            (l1 * decoder(x, restored) + l2 * head(x, label)).backward()
            x = x.detach()
        loss = F.cross_entropy(self.net.classifier(self.net.stages[-1](x)), label)
        loss.backward()
        self.optimizer.step()
        return loss.item()
