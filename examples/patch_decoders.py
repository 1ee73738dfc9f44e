"""Patch-wise auxiliary nets (in the manner of HPFF): one decoder and head for each quarter of a map."""

import torch
from torch import nn

import infopro_fast
from infopro_fast import ops
from infopro_fast.modules import LocalLoss, Place, Term


def quarters(x):
    """(N, C, h, w) to (4 N, C, h / 2, w / 2)."""
    return torch.cat([part for half in x.chunk(2, 2) for part in half.chunk(2, 3)])


class Patches(LocalLoss):
    def __init__(self, place: Place):
        super().__init__()
        hidden = nn.Conv2d(place.channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.decoder = nn.Sequential(*hidden, nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid())
        self.fc = nn.Linear(place.channels, place.num_classes)

    def terms(self, features, image, label):
        parts, images = quarters(features), quarters(image)
        yield Term("reconstruction", 1.0, ops.reconstruction_loss(parts, images, self.decoder), None)
        rows, labels = parts.mean((2, 3)), label.repeat(4)
        options = {"bias": self.fc.bias, "return_correct": True}
        yield Term("task", 1.0, *ops.linear_cross_entropy(rows, self.fc.weight, labels, **options))

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {f"patches_{stage}_{block}.": self}


torch.manual_seed(0)
net = infopro_fast.build("resnet20", modules=3, local_loss=Patches, image_size=16)
trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
image, label = torch.rand(32, 3, 16, 16), torch.arange(32) % 10  # images in [0, 1]
for _ in range(5):
    metrics = trainer.step(image, label)
print({name: round(value.item(), 3) for name, value in metrics.items()})
