"""Fused losses of locally supervised learning. Each runs its plain-torch reference or a compiled kernel (`available`)."""

OPS = (
    "reconstruction_loss", "supcon_loss", "linear_cross_entropy", "norm_relu_pool", "upsample_cross_entropy", "upsample_conv3x3",
)  # fmt: skip

from .dispatch import available, cpu_isa, has_kernels  # noqa: E402
from .linear_cross_entropy import linear_cross_entropy  # noqa: E402
from .norm_relu_pool import norm_relu_pool  # noqa: E402
from .reconstruction_loss import reconstruction_loss  # noqa: E402
from .supcon_loss import supcon_loss  # noqa: E402
from .upsample_conv3x3 import upsample_conv3x3  # noqa: E402
from .upsample_cross_entropy import upsample_cross_entropy  # noqa: E402

__all__ = [
    "OPS", "available", "cpu_isa", "has_kernels", "linear_cross_entropy", "norm_relu_pool", "reconstruction_loss", "supcon_loss",
    "upsample_conv3x3", "upsample_cross_entropy",
]  # fmt: skip
