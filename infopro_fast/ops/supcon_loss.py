"""Supervised contrastive loss (Khosla et al. 2020, eq. 2, L_out), as in InfoPro, without the M x M matrix.

    z_i = x_i / |x_i|,   s_ij = z_i . z_j / T,   l_i = log sum_{j != i} exp s_ij
    loss_i = -1/|P(i)| sum_{j in P(i)} (s_ij - l_i),   P(i) = {j != i : y_j = y_i};   0 where P(i) is empty
    loss = mean over all M = N * views anchors

The authors' code (networks/losses.py, class SupConLoss) keeps three M x M maps. The kernels tile over pairs
and keep x and three numbers a row, 1/|x_i|, l_i and |P(i)|; backward recomputes the tiles.
"""

from __future__ import annotations

import math
import numbers

import torch

from .dispatch import check_floating, compute_dtype, define_kernels, first_order, no_autocast, resolve

OP = "supcon_loss"
REDUCTIONS = ("mean", "sum", "none")
NORM_EPS = 1e-12  # a row no longer than this has no direction: it counts as zero, with a zero gradient


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
    """Return the supervised contrastive loss over all pairs of the batch; every view is an anchor.

    Args:
        features: (N, D) or (N, views, D), float32, float64, bfloat16 or float16, any strides.
        labels: (N,), integers.
        temperature: T > 0.
        base_temperature: multiply the loss by temperature / base_temperature; the authors' SupConLoss has
            0.07. None: no factor.
        normalize: divide each row by its Euclidean norm first. A row of norm <= 1e-12 counts as zero.
        reduction: "mean" over all anchors, in which one without a positive counts 0, as in the authors' code;
            "sum"; or "none", a loss for each anchor, in the shape of ``features`` without D.
        impl: "auto", "reference", "cpu" or "triton". A named implementation runs or raises.

    Returns:
        float64 for float64 features, else float32, as is the arithmetic. A single anchor gives 0, and so does
        an empty batch.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.

    The kernels keep for backward the inputs and 3 M numbers.
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


def supcon_loss_ref(features, labels, *, temperature=0.07, normalize=True, mask=None):
    """The specification, in plain torch: a loss for each anchor (M,); arguments as in `supcon_loss`.

    mask: None or (N, N), in place of labels: the weight of sample j as a positive of sample i.
    """
    rows, labels = _anchors(features, labels)
    with no_autocast(features.device):
        z = rows.to(compute_dtype(rows))
        if normalize:
            norm = torch.linalg.vector_norm(z.detach(), dim=1, keepdim=True)
            alive = ~(norm <= NORM_EPS)  # a nan reaches the loss
            z = torch.where(alive, z, torch.zeros_like(z).detach())
            safe = torch.where(alive, z, torch.ones_like(z).detach())
            z = z / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        logits = (z @ z.T) / temperature
        if mask is None:
            positives = labels[:, None] == labels
        else:
            views = len(rows) // max(1, len(mask))
            positives = mask.repeat_interleave(views, 0).repeat_interleave(views, 1)
        positives = torch.where(itself, 0, positives).to(z.dtype)
        count = positives.sum(1)
        # logsumexp of an empty row is -inf with nan gradients: a lone anchor keeps itself, and gives 0 below.
        kept = logits.masked_fill(itself & (len(rows) > 1), -torch.inf)
        log_prob = logits - kept.logsumexp(1, keepdim=True) if len(rows) else logits
        chosen = torch.where(positives != 0, positives * log_prob, 0)
        return -chosen.sum(1) / torch.where(count == 0, 1, count)


def _anchors(features, labels):
    """Return the anchors as rows (M, D), and their labels (M,)."""
    if features.dim() == 2:
        return features, labels
    return features.flatten(0, 1), labels.repeat_interleave(features.shape[1])


def _check(features, labels, temperature, base_temperature, reduction):
    check_floating(OP, {"features": features})
    if features.dim() not in (2, 3) or features.shape[-1] == 0:
        got: object = tuple(features.shape)
        raise ValueError(f"{OP}: features: expected (N, D) or (N, views, D), D > 0, got {got}")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"{OP}: labels: expected an integer tensor, got {got}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{OP}: labels: expected ({features.shape[0]},), got {tuple(labels.shape)}")
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if name == "base_temperature" and value is None:
            continue
        is_number = isinstance(value, numbers.Real)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"{OP}: {name}: expected a positive finite number, got {value!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")


# ------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(features, labels, temperature, normalize):
    M, dtype = features.shape[0], compute_dtype(features)
    return features.new_empty((M,), dtype=dtype), features.new_empty((3, M), dtype=dtype)


def _backward_fake(grad, features, labels, saved, temperature, normalize):
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


_FORWARD = define_kernels(
    "supcon_loss_forward(Tensor features, Tensor labels, float temperature, bool normalize) "
    "-> (Tensor loss, Tensor saved)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "supcon_loss_backward(Tensor grad, Tensor features, Tensor labels, Tensor saved, float temperature, "
    "bool normalize) -> Tensor",
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
