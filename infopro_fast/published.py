"""Numbers that the authors published for their losses, and ours where they published none. Needs no torch."""

from __future__ import annotations

Lambdas = tuple[float, float, float, float]

WEIGHTED = ("contrast", "softmax", "infopro_l")  # local losses of a reconstruction and a task, with lambdas

# Weights of the contrastive runs (README of the authors' code), by number of modules: (reconstruction, task)
# of the first local module, then of the last. With 2 modules there is only a first. The key is architecture,
# images and balanced split. Images of side 32 are CIFAR-10's and those of side 96 STL-10's, unless the data
# set is named.
PUBLISHED_LAMBDAS: dict[tuple[str, int | str, bool], dict[int, Lambdas]] = {
    ("resnet32", 32, False): {2: (5, 1, 0, 0), 4: (6, 0, 1, 2), 8: (5, 0, 0, 2), 16: (5, 0.05, 0.2, 0.5)},
    ("resnet110", 32, False): {2: (5, 0.5, 0, 0), 4: (1, 0, 0, 1), 8: (5, 0, 0, 1), 16: (5, 0, 0.5, 1)},
    ("resnet110", 32, True): {2: (5, 0.1, 0, 0), 3: (5, 0, 5, 0.1), 4: (5, 0, 5, 0.1)},
    ("resnet110", 96, False): {
        2: (10, 1, 0, 0), 4: (20, 0.2, 5, 2), 8: (20, 0.2, 5, 1), 16: (20, 0.5, 10, 0.1),
    },
    ("resnet110", 96, True): {2: (20, 1, 0, 0), 3: (20, 0.5, 5, 2), 4: (20, 0.5, 10, 1)},
    ("resnet110", "svhn", False): {
        2: (1.0, 0.1, 0.0, 0.0), 4: (5.0, 0.0, 0.5, 1.0), 8: (5.0, 0.0, 0.5, 2.0), 16: (5.0, 0.2, 0.5, 1.0),
    },
}

# Weights of the ImageNet and Cityscapes runs, which have one local module and the softmax loss.
PUBLISHED_SOFTMAX: dict[str, Lambdas] = {
    "resnet101": (5, 0.75, 0, 0),
    "resnet152": (5, 1, 0, 0),
    "resnext101_32x8d": (5, 0.75, 0, 0),
    "deeplabv3_resnet101": (1.5, 1, 0, 0),
}

# Ours, for what is not published (softmax, other depths and K): reconstruction early, the task late.
DEFAULT_LAMBDAS: Lambdas = (5.0, 0.5, 0.5, 1.0)

# Ours. A fifth of the weights above, because this reconstruction loss falls from 1 to 0, and the cross
# entropy of images ends near its beginning.
INFOPRO_L_LAMBDAS: Lambdas = (1.0, 0.5, 0.1, 1.0)

AUX_DEPTH = 3  # blocks of AugLocal's first auxiliary network, in the authors' script for ResNet-110


def default_lambdas(
    arch: str, modules: int, local_loss: object, *, balanced: bool, image_size: int, dataset: str = ""
) -> Lambdas:
    """Return the published weights of a run, else INFOPRO_L_LAMBDAS or DEFAULT_LAMBDAS."""
    if local_loss == "infopro_l":
        return INFOPRO_L_LAMBDAS
    if local_loss == "softmax" and modules == 2 and arch in PUBLISHED_SOFTMAX:
        return PUBLISHED_SOFTMAX[arch]
    if local_loss != "contrast":
        return DEFAULT_LAMBDAS
    of_images = PUBLISHED_LAMBDAS.get((arch, image_size, balanced), {})
    return PUBLISHED_LAMBDAS.get((arch, dataset, balanced), of_images).get(modules, DEFAULT_LAMBDAS)
