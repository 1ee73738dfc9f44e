"""Fused losses for locally supervised learning: each has a plain-torch reference and kernels
(`available`)."""

from .dispatch import OPS, available, cpu_isa, has_kernels
from .linear_cross_entropy import linear_cross_entropy
from .norm_relu_pool import norm_relu_pool
from .reconstruction_loss import reconstruction_loss
from .supcon_loss import supcon_loss
from .upsample_conv3x3 import upsample_conv3x3
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "OPS", "available", "cpu_isa", "has_kernels", "linear_cross_entropy", "norm_relu_pool",
    "reconstruction_loss", "supcon_loss", "upsample_conv3x3", "upsample_cross_entropy",
]
