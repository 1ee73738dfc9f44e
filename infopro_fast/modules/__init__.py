"""Networks in local modules: backbones, splits, auxiliary nets and local losses."""

from .decoder import Decoder
from .heads import AuxClassifier, DGLHead, SupConLoss
from .local_loss import LOCAL_LOSSES, Classifier, HeadLoss, InfoPro, LocalLoss, Term
from .network import CIFAR10_MEAN, CIFAR10_STD, LocalNetwork, Stage, build

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "LOCAL_LOSSES",
    "AuxClassifier",
    "Classifier",
    "DGLHead",
    "Decoder",
    "HeadLoss",
    "InfoPro",
    "LocalLoss",
    "LocalNetwork",
    "Stage",
    "SupConLoss",
    "Term",
    "build",
]
