"""A moving average of the next module as auxiliary net (in the manner of MAN, ECCV 2024)."""

import copy

import torch
from torch import nn

import infopro_fast
from infopro_fast.modules import LocalLoss, Place, Term

DECAY = 0.99


class NextModuleAverage(LocalLoss):
    """Cross entropy behind a moving average of the next module's first block, with a bias that is learnt."""

    def __init__(self, place: Place):
        super().__init__()
        self.next = (place.next_blocks[0],)  # in a tuple, so that it stays the next module's
        self.average = copy.deepcopy(place.next_blocks[0]).requires_grad_(False)
        channels = self.average(torch.zeros(2, place.channels, *place.size)).shape[1]
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.fc = nn.Linear(channels, place.num_classes)

    def terms(self, features, image, label):
        logits = self.fc((self.average(features) + self.bias).mean((2, 3)))
        yield Term("task", 1.0, nn.functional.cross_entropy(logits, label), (logits.argmax(1) == label).sum())

    def after_step(self):
        for mine, theirs in zip(self.average.parameters(), self.next[0].parameters(), strict=True):
            mine.lerp_(theirs, 1 - DECAY)

    def trained_parameters(self):
        return [self.bias, *self.fc.parameters()]

    def released_nets(self, stage, block):
        return {f"average_{stage}_{block}.": self}


torch.manual_seed(0)
net = infopro_fast.build("resnet20", modules=3, local_loss=NextModuleAverage, image_size=16)
trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
image, label = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
for _ in range(5):
    metrics = trainer.step(image, label)
print({name: round(value.item(), 3) for name, value in metrics.items()})
