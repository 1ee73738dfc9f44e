"""Networks in local modules: backbones, chains, splits, auxiliary nets and local losses."""

from .auglocal import AugmentedHead
from .decoder import ChainDecoder, Decoder
from .families import ARCHS, CIFAR10_MEAN, CIFAR10_STD
from .heads import AuxClassifier, DGLHead, SupConLoss
from .imagenet import StridedHead
from .infopro_l import FeatureDecoder, InfoProL
from .local_loss import LOCAL_LOSSES, Classifier, HeadLoss, InfoPro, LocalLoss, Place, Term
from .network import LocalNetwork, Stage, unwrapped
from .segmentation import IGNORE, DenseHead, PixelClassifier, Tap
from .sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

__all__ = [
    "ARCHS", "CIFAR10_MEAN", "CIFAR10_STD", "IGNORE", "LOCAL_LOSSES", "AugmentedHead", "AuxClassifier",
    "ChainDecoder", "Classifier", "DGLHead", "Decoder", "DenseHead", "FeatureDecoder", "HeadLoss",
    "InfoPro", "InfoProL", "LocalLoss", "LocalNetwork", "PixelClassifier", "Place", "Stage",
    "StridedHead", "SupConLoss", "SyncBatchNorm", "Tap", "Term", "convert_sync_batch_norm",
    "unwrapped",
]
