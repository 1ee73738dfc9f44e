"""Linear layer and cross entropy, fused: no logits.

F.cross_entropy(F.linear(input, weight, bias), target, ...), with label smoothing e and class weights w:

    x_nc = input_n . weight_c + bias_c,   l_n = log sum_c exp x_nc
    loss_n = (1 - e) w_{t_n} (l_n - x_{n t_n}) + e / C sum_c w_c (l_n - x_nc)
    loss = sum loss_n / sum w_{t_n}   over the rows that are not ignored

or, where the target of a row is class probabilities p_nc (of MixUp, CutMix or a teacher),

    loss_n = sum_c ((1 - e) p_nc + e / C) w_c (l_n - x_nc),   loss = sum loss_n / N

Plain torch keeps the logits and their softmax (2 N C numbers). The kernels tile over rows and classes and
keep l_n; backward recomputes the tiles. The same pass counts the rows whose largest logit is the target's,
or that of the most probable class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import check_floating, compute_dtype, define_kernels, first_order, no_autocast, resolve

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
    """Return the cross entropy of a linear classifier.

    Args:
        input, weight: (N, D) and (C, D), float32, float64, bfloat16 or float16, any strides.
        bias: (C,), likewise, or None.
        target: (N,), integers of any dtype in [0, C), or ``ignore_index``; or (N, C), class probabilities,
            floating. They need not add up to 1. Only the reference gives them a gradient.
        class_weight: (C,), floating, or None: the ``weight`` of torch's loss. It gets no gradient.
        ignore_index, label_smoothing: as in torch.nn.functional.cross_entropy. With probabilities no row is
            ignored.
        reduction: "mean" (divided by the sum of the targets' class weights; with probabilities, by N), "sum",
            or "none", (N,). If every row is ignored, "mean" is 0 with zero gradients, where torch gives nan.
        return_correct: return also how many rows, not ignored, have their largest logit at the target, or at
            the most probable class: a 0-d int64 tensor. The first of equals counts, as in argmax.
        impl: "auto", "reference", "cpu" or "triton". A named implementation runs or raises.

    Returns:
        The loss, float64 if any input is float64, else float32, as is the arithmetic.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        ValueError from the CPU kernels, IndexError from the reference on the CPU: a label is out of range.

    The kernels keep for backward the inputs and N numbers.
    """
    _check(input, weight, target, bias, class_weight, ignore_index)
    check_options(OP, class_weight, reduction, label_smoothing)
    tensors = {"input": input, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    limitation = "target requires grad, which the reference alone supports" if target.requires_grad else None
    chosen = resolve(OP, impl, tensors, limitation)
    if chosen == "reference":
        loss, correct = linear_cross_entropy_ref(
            input, weight, target, bias=bias, class_weight=class_weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing,
        )
    else:
        options = (ignore_index, float(label_smoothing), REDUCTIONS.index(reduction))
        loss, correct = _LinearCrossEntropy.apply(input, weight, target, bias, class_weight, options, chosen)
    return (loss, correct) if return_correct else loss


def linear_cross_entropy_ref(
    input, weight, target, *, bias, class_weight, ignore_index, reduction, label_smoothing
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain torch: (loss, correct), arguments as in `linear_cross_entropy`."""
    dtype = compute_dtype(input, weight, bias)
    with no_autocast(input.device):
        logits = F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits_cross_entropy(logits, target, class_weight, ignore_index, reduction, label_smoothing)


def logits_cross_entropy(
    logits, target, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, correct) of logits (N, C), in plain torch; arguments as in `linear_cross_entropy`."""
    logits = logits.to(compute_dtype(logits))
    soft = target.is_floating_point()
    target = target.to(logits.dtype) if soft else target.long()
    with no_autocast(logits.device):
        weights = None if class_weight is None else class_weight.to(logits.dtype)
        options = dict(ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        rows = F.cross_entropy(logits, target, weights, **options)
        classes = target.argmax(1) if soft else target
        correct = ((logits.argmax(1) == classes) & (classes != ignore_index)).sum()
    return reduce_rows(rows, target, class_weight, ignore_index, reduction), correct


def reduce_rows(rows, target, class_weight, ignore_index, reduction):
    """Return the loss of ``rows``, or of pixels, by ``reduction``; a mean over none is 0."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if target.is_floating_point():  # class probabilities
        return rows.sum() / max(1, len(rows))
    target = target.long()  # -100 in an unsigned dtype would be a class
    kept = target != ignore_index
    if class_weight is None:
        total = kept.sum()
        return rows.sum() / total.clamp(min=1)
    total = torch.where(kept, class_weight.detach().to(rows.dtype)[torch.where(kept, target, 0)], 0).sum()
    return rows.sum() / torch.where(total == 0, 1, total)


def _check(input, weight, target, bias, class_weight, ignore_index):
    optional = {name: t for name, t in (("bias", bias), ("class_weight", class_weight)) if t is not None}
    check_floating(OP, {"input": input, "weight": weight} | optional)
    dtype = target.dtype if isinstance(target, torch.Tensor) else None
    if dtype is None or dtype.is_complex or dtype == torch.bool:
        expected = "an integer tensor (N,), or class probabilities (N, C)"
        raise TypeError(f"{OP}: target: expected {expected}, got {dtype or type(target).__name__}")
    if input.dim() != 2 or input.shape[1] == 0:
        raise ValueError(f"{OP}: input: expected (N, D), D > 0, got {tuple(input.shape)}")
    N, D = input.shape
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight: expected (C, {D}) with C > 0, got {tuple(weight.shape)}")
    C = weight.shape[0]
    for name, t in ({"target": target} | optional).items():
        soft = name == "target" and dtype.is_floating_point
        shape = (N, C) if soft else (N,) if name == "target" else (C,)
        if tuple(t.shape) != shape:
            what = f"class probabilities {shape}, or integers ({N},)" if soft else shape
            raise ValueError(f"{OP}: {name}: expected {what}, got {tuple(t.shape)}" + f" of {dtype}" * soft)
    if dtype.is_floating_point and ignore_index >= 0:
        expected = "negative with class probabilities, of which no row is ignored"
        raise ValueError(f"{OP}: ignore_index: expected {expected}, got {ignore_index}")


def check_options(
    op: str, class_weight: torch.Tensor | None, reduction: str, label_smoothing: float,
    reductions: tuple[str, ...] = REDUCTIONS,
) -> None:
    """Raise ValueError that names the option of a cross entropy ``op`` which is not as documented."""
    if class_weight is not None and class_weight.requires_grad:
        expected = "a tensor that does not require grad, it gets no gradient"
        raise ValueError(f"{op}: class_weight: expected {expected}")
    if reduction not in reductions:
        raise ValueError(f"{op}: reduction: expected one of {reductions}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing: expected in [0, 1], got {label_smoothing}")


# ------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(input, weight, target, bias, class_weight, ignore_index, label_smoothing, reduction):
    dtype = compute_dtype(input, weight, bias)
    N = input.shape[0]
    loss = input.new_empty((N,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return loss, input.new_empty((N,), dtype=dtype), input.new_empty((), dtype=torch.int64)


def _backward_fake(
    grad, input, weight, target, bias, class_weight, lse, ignore_index, label_smoothing, reduction,
    needs_input, needs_weight,
):
    dtype = compute_dtype(input, weight, bias)
    g_input = torch.empty(input.shape if needs_input else (0,), dtype=dtype, device=input.device)
    g_weight = torch.empty(weight.shape if needs_weight else (0,), dtype=dtype, device=input.device)
    return g_input, g_weight, input.new_empty((weight.shape[0],), dtype=dtype)


_TENSORS = "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight"
_FORWARD = define_kernels(
    f"linear_cross_entropy_forward({_TENSORS}, int ignore_index, float label_smoothing, int reduction) "
    "-> (Tensor loss, Tensor lse, Tensor correct)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    f"linear_cross_entropy_backward(Tensor grad, {_TENSORS}, Tensor lse, int ignore_index, "
    "float label_smoothing, int reduction, bool needs_input, bool needs_weight) -> (Tensor, Tensor, Tensor)",
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
                g_input.to(input.dtype) if needs[0] else None,
                g_weight.to(weight.dtype) if needs[1] else None, None,
                g_bias.to(bias.dtype) if needs[3] else None, None, None, None,
            )
        return first_order(OP, (input, weight, bias, grad), found)
