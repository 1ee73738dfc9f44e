"""Loss of a reconstructed pixel: target and derivative, for every kernel that ends in one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pixel_loss(s, t, LOSS):
    """Loss of a pixel from its logit s and target t, and the derivative in s; nothing overflows or cancels.

    LOSS: index into the losses of `reconstruction_loss`: 0, bce; 1, mse; 2, l1.
    """
    e = tl.exp(-tl.abs(s))
    inverse = 1 / (1 + e)
    small = e * inverse  # sigmoid(-|s|)
    if LOSS == 0:
        log1p = tl.where(e < 0.01, e * (1 - e * (0.5 - e * (1.0 / 3 - e * 0.25))), tl.log(1 + e))
        loss = tl.where(s > 0, s * (1 - t), -s * t) + log1p
        return loss, tl.where(s > 0, (1 - t) - small, small - t)
    off = tl.where(s > 0, (1 - t) - small, small - t)
    slope = small * inverse
    if LOSS == 1:
        return off * off, 2 * off * slope
    return tl.abs(off), tl.where(off > 0, slope, tl.where(off < 0, -slope, 0.0))


@triton.jit
def load_target(image, at, mask, mean, std, RESTORE):
    """Targets in float32, clamped to 0..1, or nan (`image_target`). RESTORE undoes a normalisation."""
    t = tl.load(image + at, mask=mask, other=0.0).to(tl.float32)
    if RESTORE:
        t = t * std + mean
        slack = 1.0
    else:
        slack = 1.0 / 512
    inside = tl.minimum(tl.maximum(t, 0.0), 1.0)
    return tl.where(tl.abs(t - inside) <= slack, inside, float("nan"))
