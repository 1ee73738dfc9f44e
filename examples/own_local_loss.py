"""A local loss of your own: the label, and the brightness of the image."""

import torch
from torch import nn

import infopro_fast
from infopro_fast.modules import LocalLoss, Place, Term


class LabelAndBrightness(LocalLoss):
    """Cross entropy of the label, and a prediction of the image's mean brightness."""

    def __init__(self, place: Place):
        super().__init__()
        self.label = nn.Linear(place.channels, place.num_classes)
        self.brightness = nn.Linear(place.channels, 1)

    def terms(self, features, image, label):
        logits = self.label(features.mean((2, 3)))
        yield Term("task", 1.0, nn.functional.cross_entropy(logits, label), (logits.argmax(1) == label).sum())
        found = self.brightness(features.mean((2, 3)))[:, 0]
        yield Term("brightness", 0.1, nn.functional.mse_loss(found, image.mean((1, 2, 3))), None)

    def trained_parameters(self):
        return list(self.parameters())

    def released_nets(self, stage, block):
        return {f"own_{stage}_{block}.": self}


torch.manual_seed(0)
net = infopro_fast.build("resnet20", modules=3, local_loss=LabelAndBrightness, image_size=16)
trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
image, label = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
for _ in range(5):
    metrics = trainer.step(image, label)
print({name: round(value.item(), 3) for name, value in metrics.items()})
