"""Small ImageNet training in the style of the authors' code: two local modules, plain torch.

README shows a change of its loss lines. `test_large_networks.test_diff_of_a_released_style_script` makes it
and runs both.

    python imagenet.py --steps 5 --dtype float32 --out state.pt
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, SIZE, BATCH = 10, 48, 8


def conv_norm_relu(inplanes, planes, kernel, stride=1, bias=False):
    conv = nn.Conv2d(inplanes, planes, kernel, stride, kernel // 2, bias=bias)
    return conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)


def double():
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


def in_unit_range(image):
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (image * std + mean).clamp(0, 1)


class LocalResNet(nn.Module):
    """A ResNet-18 whose first module ends after the first block of layer2.

    The features have 128 channels and an eighth of the image's size.
    """

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet18(num_classes=CLASSES)
        self.first = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2[0])
        self.rest = nn.Sequential(net.layer2[1], net.layer3, net.layer4, net.avgpool, nn.Flatten(), net.fc)
        self.decoder = nn.Sequential(
            *conv_norm_relu(128, 64, 1, bias=True), double(), *conv_norm_relu(64, 32, 3, bias=True), double(),
            *conv_norm_relu(32, 12, 3, bias=True), double(), nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid(),
        )
        self.head = nn.Sequential(
            *conv_norm_relu(128, 32, 1), *conv_norm_relu(32, 64, 3, stride=2), *conv_norm_relu(64, 256, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, CLASSES),
        )

    def first_module(self, image, target):
        """Return the features for the next module, detached, and the local loss."""
        x = self.first(image)
        restored = in_unit_range(image)  # undoes the normalisation
        recons = F.binary_cross_entropy(self.decoder(x), restored)
        task = F.cross_entropy(self.head(x), target)
        return x.detach(), 5 * recons + 0.75 * task

    def second_module(self, x, target):
        return F.cross_entropy(self.rest(x), target)


def batches(steps, dtype):
    """Yield normalised noisy images, each class in a colour of its own, and their classes."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(CLASSES, 3, 1, 1, generator=generator)
    for _ in range(steps):
        target = torch.randint(CLASSES, (BATCH,), generator=generator)
        image = (colours[target] + torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)) / 2
        yield torchvision.transforms.functional.normalize(image.to(dtype), MEAN, STD), target


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", help="where to save the state_dict after the last step")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = LocalResNet().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for step, (image, target) in enumerate(batches(options.steps, dtype)):
        optimizer.zero_grad()
        x, local_loss = model.first_module(image, target)
        local_loss.backward()
        loss = model.second_module(x, target)
        loss.backward()
        optimizer.step()
        print(f"step {step}: local loss {local_loss.item():.12f}, loss {loss.item():.12f}")
    if options.out:
        torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
