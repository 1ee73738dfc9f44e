"""Networks in local modules: backbones, chains, splits, auxiliary nets and local losses."""

from .decoder import ChainDecoder, Decoder
from .families import ARCHS, CIFAR10_MEAN, CIFAR10_STD
from .heads import AuxClassifier, DGLHead, SupConLoss
from .imagenet import StridedHead
from .local_loss import LOCAL_LOSSES, Classifier, HeadLoss, InfoPro, LocalLoss, Term
from .network import LocalNetwork, Stage, build
from .segmentation import IGNORE, DenseHead, PixelClassifier, Tap
from .sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

__all__ = [
    "ARCHS",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "IGNORE",
    "LOCAL_LOSSES",
    "AuxClassifier",
    "ChainDecoder",
    "Classifier",
    "DGLHead",
    "Decoder",
    "DenseHead",
    "HeadLoss",
    "InfoPro",
    "LocalLoss",
    "LocalNetwork",
    "PixelClassifier",
    "Stage",
    "StridedHead",
    "SupConLoss",
    "SyncBatchNorm",
    "Tap",
    "Term",
    "build",
    "convert_sync_batch_norm",
]
