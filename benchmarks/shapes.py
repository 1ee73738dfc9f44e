"""The shapes of the paper: what each op is given in the published runs. Sizes in elements."""

from __future__ import annotations

import typing


class DecoderShape(typing.NamedTuple):
    """h (N, C, h, h) decoded to images (N, 3, H, H) through K hidden channels."""

    N: int
    C: int
    h: int
    H: int
    K: int = 12

    def resized_bytes(self) -> int:
        """float32 bytes of the resized map (N, C, H, H), which the fused op never forms."""
        return 4 * self.N * self.C * self.H**2


class ChainShape(typing.NamedTuple):
    """h (N, C, h, h) through the authors' ImageNet decoder, doubled three times, to (N, 3, 8 h, 8 h)."""

    N: int
    C: int
    h: int

    def resized_bytes(self) -> int:
        """float32 bytes of the first resized map (N, 128, 2 h, 2 h); the others are as large or nearly."""
        return 4 * self.N * 128 * (2 * self.h) ** 2


class UpsampleConvShape(typing.NamedTuple):
    """x (N, C, h, h), doubled and convolved to K channels, as in a U-Net's or a GAN's decoder."""

    N: int
    C: int
    h: int
    K: int

    def resized_bytes(self) -> int:
        return 4 * self.N * self.C * (2 * self.h) ** 2


class SupConShape(typing.NamedTuple):
    """N anchors of dimension D, `classes` labels."""

    N: int
    D: int = 128
    classes: int = 10

    def pairs_bytes(self) -> int:
        """float32 bytes of one N x N map."""
        return 4 * self.N**2


class LinearShape(typing.NamedTuple):
    """input (N, D), weight (C, D)."""

    N: int
    D: int
    C: int

    def logits_bytes(self) -> int:
        """float32 bytes of the logits (N, C)."""
        return 4 * self.N * self.C


class DenseShape(typing.NamedTuple):
    """Logits (N, C, h, w) for labels (N, H, W)."""

    N: int
    C: int
    h: int
    w: int
    H: int
    W: int

    def pixel_bytes(self) -> int:
        """float32 bytes of one number a pixel."""
        return 4 * self.N * self.H * self.W


class PoolShape(typing.NamedTuple):
    """Maps (N, C, h, h), each normalised, rectified and averaged."""

    N: int
    C: int
    h: int


class HeadShape(typing.NamedTuple):
    """Features (N, C, h, h) of a head whose first convolution, 3x3, has K outputs and this stride."""

    N: int
    C: int
    h: int
    K: int
    stride: int


# The stages of ResNet-32/110 on CIFAR-10 and SVHN. STL-10: 96x96, batch 32 for eager's memory (paper: 128).
DECODER = (DecoderShape(128, 16, 32, 32), DecoderShape(128, 32, 16, 32), DecoderShape(128, 64, 8, 32))
_STL10 = (DecoderShape(32, 16, 96, 96), DecoderShape(32, 32, 48, 96), DecoderShape(32, 64, 24, 96))
DECODER_LARGER = (DecoderShape(1024, 64, 8, 32), *_STL10)
DECODER_PLOT = tuple(DecoderShape(n, 64, 8, 32) for n in (8, 32, 128, 512, 2048))

# ImageNet at 224 x 224, a batch of 8; in a U-Net, a doubling from 32 x 32.
CHAIN = (ChainShape(8, 512, 28),)
UPSAMPLE_CONV = (UpsampleConvShape(8, 128, 32, 64),)

# Batch 128 (STL-10) and 1024 (CIFAR-10, SVHN), feature_dim 128; 4096 where N x N maps hurt.
SUPCON = (SupConShape(1024), SupConShape(4096))
SUPCON_LARGER = (SupConShape(128), SupConShape(1024, classes=100))
SUPCON_PLOT = tuple(SupConShape(n) for n in (128, 256, 512, 1024, 2048, 4096, 8192))

# A head of the authors' networks (feature_dim 128, 10 classes); many classes; the local head of ImageNet.
LINEAR = (LinearShape(4096, 1024, 10000), LinearShape(1024, 128, 10))
LINEAR_LARGER = (LinearShape(1024, 64, 10), LinearShape(4096, 64, 1000), LinearShape(1024, 2048, 1000))
LINEAR_PLOT = tuple(LinearShape(1024, 256, c) for c in (10, 100, 1000, 10000, 30000))

# DeepLabV3 on Cityscapes: stride 8, crops of 512x1024, 2 a GPU. Larger: stride 4; ADE20K's 150 classes.
DENSE = (DenseShape(2, 19, 64, 128, 512, 1024),)
DENSE_LARGER = (DenseShape(2, 19, 128, 256, 512, 1024), DenseShape(2, 150, 64, 64, 512, 512))
DENSE_PLOT = tuple(DenseShape(2, c, 64, 64, 512, 512) for c in (2, 8, 19, 60, 150))

# What a local head of ResNet-32 pools: after its strided convolution, or in the last stage.
POOL = (PoolShape(1024, 32, 16), PoolShape(1024, 64, 8))

# The authors' heads of its three stages, the convolution with them.
HEAD = (HeadShape(128, 16, 32, 32, 2), HeadShape(128, 32, 16, 64, 2), HeadShape(128, 64, 8, 64, 1))

# ResNet-32 at batch 128: {K: (reconstruction and task weights of the first module, and of the last but one)}.
TRAIN_STEP = {1: (0, 0, 0, 0), 4: (6, 0, 1, 2), 16: (5, 0.05, 0.2, 0.5)}
TRAIN_BATCH = 128
