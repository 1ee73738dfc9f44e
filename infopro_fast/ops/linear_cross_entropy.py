"""Linear layer + cross entropy, without the logits: F.cross_entropy(F.linear(input, weight, bias), target, ...).

    x_nc = input_n . weight_c + bias_c,   l_n = log sum_c exp x_nc
    loss_n = (1 - e) w_{t_n} (l_n - x_{n t_n}) + e / C sum_c w_c (l_n - x_nc)         e: label smoothing, w: class weight
    loss = sum loss_n / sum w_{t_n}   over the rows that are not ignored

Plain torch keeps the logits and their softmax (2 N C numbers). The kernels tile over rows and classes and keep l_n;
backward recomputes the tiles. The number of rows whose largest logit is the target's comes from the same pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_correct: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of a linear classifier.

    input: (N, D); weight: (C, D); bias: (C,) or None; float32, float64, bfloat16 or float16, any strides.
    target: (N,) integers of any dtype in [0, C), or ``ignore_index``. On the CPU a label out of range raises (RuntimeError from the
        kernels, IndexError from the reference).
    class_weight: (C,) floating, or None (torch's ``weight``); it gets no gradient.
    reduction: "mean" (divided by the sum of the targets' class weights), "sum" or "none" (N,). Where every row is
        ignored "mean" is 0 with zero gradients, where torch gives nan.
    return_correct: also return how many rows that are not ignored have their largest logit at the target, a 0-d int64
        tensor (the first of equal logits counts, as in argmax).
    impl: "auto", "reference", "cpu" or "triton"; one that is named runs or raises.

    Returns float64 if any input is float64, else float32 (arithmetic too).
    Kept for backward by the kernels: the inputs and N numbers.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    _check(input, weight, target, bias, class_weight, reduction, label_smoothing)
    tensors = {"input": input, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    chosen = resolve(OP, impl, tensors)
    if chosen == "reference":
        loss, correct = linear_cross_entropy_ref(
            input, weight, target, bias=bias, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    else:
        options = (ignore_index, float(label_smoothing), REDUCTIONS.index(reduction))
        loss, correct = _LinearCrossEntropy.apply(input, weight, target, bias, class_weight, options, chosen)
    return (loss, correct) if return_correct else loss


def linear_cross_entropy_ref(
    input, weight, target, *, bias=None, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """The specification, in plain torch: (loss, correct), arguments as in `linear_cross_entropy`."""
    dtype, target = compute_dtype(input, weight, bias), target.long()
    with no_autocast(input.device):
        logits = F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        weights = None if class_weight is None else class_weight.to(dtype)
        rows = F.cross_entropy(
            logits, target, weights, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
        right = logits.argmax(1) == target if len(logits) else torch.empty_like(target, dtype=torch.bool)
        correct = (right & (target != ignore_index)).sum()
    return reduce_rows(rows, target, class_weight, ignore_index, reduction), correct


def reduce_rows(rows, target, class_weight, ignore_index, reduction):
    """The loss of all ``rows`` by ``reduction``, with 0 for a mean over none."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    target = target.long()  # -100 in an unsigned dtype would be a class
    kept = target != ignore_index
    if class_weight is None:
        total = kept.sum()
        return rows.sum() / total.clamp(min=1)
    total = torch.where(kept, class_weight.detach().to(rows.dtype)[torch.where(kept, target, 0)], 0).sum()
    return rows.sum() / torch.where(total == 0, 1, total)


def _check(input, weight, target, bias, class_weight, reduction, label_smoothing):
    for name, t in (("input", input), ("weight", weight), ("bias", bias), ("class_weight", class_weight)):
        if t is None and name in ("bias", "class_weight"):
            continue
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            raise TypeError(f"{OP}: {name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{OP}: target: expected an integer tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"{OP}: input: expected (N, D), D > 0, got {tuple(input.shape)}")
    N, D = input.shape
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight: expected (C, {D}) with C > 0, got {tuple(weight.shape)}")
    for name, t, shape in (("target", target, (N,)), ("bias", bias, weight.shape[:1]), ("class_weight", class_weight, weight.shape[:1])):
        if t is not None and tuple(t.shape) != tuple(shape):
            raise ValueError(f"{OP}: {name}: expected {tuple(shape)}, got {tuple(t.shape)}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(f"{OP}: class_weight: expected a tensor that does not require grad, it gets no gradient")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing: expected in [0, 1], got {label_smoothing}")


# ---------------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(input, weight, target, bias, class_weight, ignore_index, label_smoothing, reduction):
    dtype = compute_dtype(input, weight, bias)
    N = input.shape[0]
    loss = input.new_empty((N,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return loss, input.new_empty((N,), dtype=dtype), input.new_empty((), dtype=torch.int64)


def _backward_fake(
    grad, input, weight, target, bias, class_weight, lse, ignore_index, label_smoothing, reduction, needs_input, needs_weight
):
    dtype = compute_dtype(input, weight, bias)
    g_input = torch.empty(input.shape if needs_input else (0,), dtype=dtype, device=input.device)
    g_weight = torch.empty(weight.shape if needs_weight else (0,), dtype=dtype, device=input.device)
    return g_input, g_weight, input.new_empty((weight.shape[0],), dtype=dtype)


_FORWARD = define_kernels(
    "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, int reduction) -> (Tensor loss, Tensor lse, Tensor correct)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
    "Tensor lse, int ignore_index, float label_smoothing, int reduction, bool needs_input, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, target, bias, class_weight, options, impl):
        loss, lse, correct = _FORWARD[impl](input, weight, target, bias, class_weight, *options)
        ctx.save_for_backward(input, weight, target, bias, class_weight, lse)
        ctx.options = options
        ctx.impl = impl
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad, _correct):
        input, weight, target, bias, class_weight, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.no_grad():
            g_input, g_weight, g_bias = _BACKWARD[ctx.impl](
                grad, input, weight, target, bias, class_weight, lse, *ctx.options, needs[0], needs[1]
            )
            found = (
                g_input.to(input.dtype) if needs[0] else None, g_weight.to(weight.dtype) if needs[1] else None, None,
                g_bias.to(bias.dtype) if needs[3] else None, None, None, None,
            )  # fmt: skip
        return first_order(OP, (input, weight, bias, grad), found)
