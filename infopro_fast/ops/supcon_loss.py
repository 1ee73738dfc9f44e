"""Supervised contrastive loss (Khosla et al. 2020, eq. 2, L_out) as InfoPro uses it, without the M x M matrix.

    z_i = x_i / |x_i|,   s_ij = z_i . z_j / T,   l_i = log sum_{j != i} exp s_ij
    loss_i = -1/|P(i)| sum_{j in P(i)} (s_ij - l_i),   P(i) = {j != i : y_j = y_i};   0 where P(i) is empty
    loss = mean over all M = N * views anchors

The released code (networks/util.py, class SupConLoss) keeps three M x M maps. The kernels tile over pairs and keep x,
a row's 1/|x_i|, l_i and |P(i)|; backward recomputes the tiles.
"""

from __future__ import annotations

import math
import numbers

import torch

from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve

OP = "supcon_loss"
REDUCTIONS = ("mean", "sum", "none")
NORM_EPS = 1e-12  # a row no longer than this has no direction: it is taken as zero and gets a zero gradient


def supcon_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """Supervised contrastive loss over all pairs of the batch, all views being anchors.

    features: (N, D) or (N, views, D), float32, float64, bfloat16 or float16, any strides.
    labels: (N,) integers.
    temperature: T > 0.
    base_temperature: the loss is multiplied by temperature / base_temperature, as the released SupConLoss does with 0.07;
        None means no factor.
    normalize: divide each row by its Euclidean norm first (rows of norm <= 1e-12 count as zero and get a zero gradient).
    reduction: "mean" over all anchors, those without a positive counting 0 (as released); "sum"; "none", which gives
        one loss an anchor in the shape of ``features`` without D.
    impl: "auto", "reference", "cpu" or "triton"; one that is named runs or raises.

    Returns float64 for float64 features, else float32 (arithmetic too). One anchor, or an empty batch, gives 0.
    Kept for backward by the kernels: the inputs and 3 M numbers.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    _check(features, labels, temperature, base_temperature, reduction)
    chosen = resolve(OP, impl, {"features": features, "labels": labels})
    if chosen == "reference":
        loss = supcon_loss_ref(features, labels, temperature=temperature, normalize=normalize)
    else:
        loss = _SupConLoss.apply(*_anchors(features, labels), float(temperature), normalize, chosen)
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    if reduction == "none":
        return loss.view(features.shape[:-1])
    return loss.sum() / max(1, loss.shape[0]) if reduction == "mean" else loss.sum()


def supcon_loss_ref(features, labels, *, temperature=0.07, normalize=True):
    """The specification, in plain torch: one loss an anchor (M,), arguments as in `supcon_loss`."""
    rows, labels = _anchors(features, labels)
    with no_autocast(features.device):
        z = rows.to(compute_dtype(rows))
        if normalize:
            norm = torch.linalg.vector_norm(z.detach(), dim=1, keepdim=True)
            alive = ~(norm <= NORM_EPS)  # nan stays, to be seen in the loss
            z = torch.where(alive, z, torch.zeros_like(z).detach())
            safe = torch.where(alive, z, torch.ones_like(z).detach())
            z = z / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        logits = (z @ z.T) / temperature
        positives = (labels[:, None] == labels) & ~itself
        count = positives.sum(1)
        # logsumexp over an empty row is -inf with nan gradients: a lone anchor keeps itself, and counts 0 below.
        kept = logits.masked_fill(itself & (len(rows) > 1), -torch.inf)
        log_prob = logits - kept.logsumexp(1, keepdim=True) if len(rows) else logits
        return -torch.where(positives, log_prob, 0).sum(1) / count.clamp(min=1)


def _anchors(features, labels):
    """(N, D) or (N, views, D) and (N,) as rows (M, D) and their labels (M,)."""
    if features.dim() == 2:
        return features, labels
    return features.flatten(0, 1), labels.repeat_interleave(features.shape[1])


def _check(features, labels, temperature, base_temperature, reduction):
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        raise TypeError(f"{OP}: features: expected a floating-point tensor, got {getattr(features, 'dtype', type(features).__name__)}")
    if features.dim() not in (2, 3) or features.shape[-1] == 0:
        raise ValueError(f"{OP}: features: expected (N, D) or (N, views, D), D > 0, got {tuple(features.shape)}")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{OP}: labels: expected an integer tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{OP}: labels: expected ({features.shape[0]},), got {tuple(labels.shape)}")
    for name, value in (("temperature", temperature), ("base_temperature", 1 if base_temperature is None else base_temperature)):
        if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise ValueError(f"{OP}: {name}: expected a positive finite number, got {value!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(features, labels, temperature, normalize):
    M, dtype = features.shape[0], compute_dtype(features)
    return features.new_empty((M,), dtype=dtype), features.new_empty((3, M), dtype=dtype)


def _backward_fake(grad, features, labels, saved, temperature, normalize):
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


_FORWARD = define_kernels(
    "supcon_loss_forward(Tensor features, Tensor labels, float temperature, bool normalize) -> (Tensor loss, Tensor saved)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "supcon_loss_backward(Tensor grad, Tensor features, Tensor labels, Tensor saved, float temperature, bool normalize) -> Tensor",
    _backward_fake,
)


class _SupConLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, labels, temperature, normalize, impl):
        loss, saved = _FORWARD[impl](features, labels, temperature, normalize)
        ctx.save_for_backward(features, labels, saved)
        ctx.options = (temperature, normalize)
        ctx.impl = impl
        return loss

    @staticmethod
    def backward(ctx, grad):
        features, labels, saved = ctx.saved_tensors
        with torch.no_grad():
            g = _BACKWARD[ctx.impl](grad, features, labels, saved, *ctx.options)
        return first_order(OP, (features, grad), (g, None, None, None, None))
