"""Bilinear resize and cross entropy of a dense prediction without the full-size logits.

F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target, ...), that is, at a pixel
of target t, with label smoothing e and class weights w:

    x_c = sum over the two rows y and the two columns x around it of weight_y weight_x logits_c(y, x)
    l = log sum_c exp x_c
    loss = (1 - e) w_t (l - x_t) + e / C sum_c w_c (l - x_c)

and the mean is the sum over the pixels that are not ignored, divided by their sum of w_t.

Plain torch keeps the resized logits, the logarithms of their softmax and the gradients of both, C numbers a
pixel each. The kernels resize a few pixels at a time and take their gradients back to the source at once. On
the CPU, if the loss is one number, forward also finds the gradient up to the upstream factor: C h w numbers a
sample, which it keeps if they are at most H W. Otherwise backward starts afresh, and nothing is kept. A
log-sum-exp a pixel would save backward little, since most of its time goes into the exponentials.
CPU time of 2 samples with 19 classes, 64x128 to 512x1024: 7.5 ms for forward alone, 9.8 ms if it also finds
the gradient, 16.1 ms with a backward that starts afresh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import check_floating, compute_dtype, define_kernels, first_order, no_autocast, resolve
from .linear_cross_entropy import REDUCTIONS, check_options, reduce_rows

OP = "upsample_cross_entropy"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KEEP = ("nothing", "lse", "gradient")  # what forward keeps for backward beside its inputs


def upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_confusion: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of logits that are resized to the target's size.

    Args:
        logits: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
        target: (N, H, W), uint8, int8, int16, int32 or int64, any strides, in [0, C) or ``ignore_index``. It
            is not copied. The GPU kernels ignore a pixel whose label is out of range.
        align_corners: as in torch.nn.functional.interpolate; the authors' code has True.
        ignore_index, label_smoothing: as in torch.nn.functional.cross_entropy.
        class_weight: (C,), floating, or None: the ``weight`` of torch's loss. It gets no gradient.
        reduction: "mean" (divided by the sum of the targets' class weights), "mean_all" (by the number of all
            pixels, ignored ones too, as in the authors' DeepLab), "sum", or "none", (N, H, W). If every
            pixel is ignored, a mean is 0 with zero gradients, where torch gives nan.
        return_confusion: return also the confusion matrix, (C, C), int64. It counts the pixels that are not
            ignored by target (row) and class of the largest logit (column), the first of equal logits.
        impl: "auto", "reference", "cpu" or "triton". A named implementation runs or raises. Triton's kernels
            need 2 H h and 2 W w below 2^31.

    Returns:
        The loss, float64 for float64 logits, else float32, as is the arithmetic.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        ValueError from the CPU kernels, IndexError from the reference on the CPU: a label is out of range.

    Beside the inputs, Triton's kernels keep H W numbers a sample for backward. Those for the CPU keep
    nothing, or C h w numbers a sample if that is at most H W.
    """
    _check(logits, target, class_weight)
    check_options(OP, class_weight, reduction, label_smoothing, (*REDUCTIONS, "mean_all"))
    divisor = max(1, target.numel()) if reduction == "mean_all" else None
    reduction = "sum" if divisor else reduction
    on_gpu = impl == "triton" or logits.device.type == "cuda"
    limitation = {"triton": _triton_limitation(logits, target)} if on_gpu else None
    chosen = resolve(OP, impl, {"logits": logits, "target": target, "class_weight": class_weight}, limitation)
    if chosen == "reference":
        loss, confusion = upsample_cross_entropy_ref(
            logits, target, align_corners=align_corners, ignore_index=ignore_index,
            class_weight=class_weight, label_smoothing=label_smoothing, reduction=reduction,
            return_confusion=return_confusion,
        )
    else:
        # Inside, ctx.needs_input_grad is True under no_grad too.
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        keep = _what_to_keep(chosen, logits, target, reduction) if needs_grad else "nothing"
        options = (
            bool(align_corners), ignore_index, float(label_smoothing), REDUCTIONS.index(reduction),
            KEEP.index(keep),
        )
        loss, confusion = _UpsampleCrossEntropy.apply(
            logits, target, class_weight, options, bool(return_confusion), chosen
        )
    loss = loss / divisor if divisor else loss
    return (loss, confusion) if return_confusion else loss


def _triton_limitation(logits: torch.Tensor, target: torch.Tensor) -> str | None:
    """Return why the Triton kernels cannot count these shapes in 32 bits, None if they can."""
    (N, C, h, w), (H, W) = logits.shape, target.shape[1:]
    # A program takes at least 32 pixels of a row; in backward, 16 classes of 32 source pixels.
    programs = max(N * H * -(-W // 32), N * -(-C // 16) * h * -(-w // 32))
    if max((2 * H + 1) * h, (2 * W + 1) * w) < 2**31 and programs < 2**30:
        return None
    return f"logits {tuple(logits.shape)} and target {tuple(target.shape)} need more than 32 bits to count in"


def upsample_cross_entropy_ref(
    logits, target, *, align_corners, ignore_index, class_weight, label_smoothing, reduction, return_confusion
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification, in plain torch: (loss, confusion or None); arguments as in the op."""
    dtype, target = compute_dtype(logits), target.long()
    with no_autocast(logits.device):
        size, corners = target.shape[-2:], bool(align_corners)
        resized = F.interpolate(logits.to(dtype), size, mode="bilinear", align_corners=corners)
        weights = None if class_weight is None else class_weight.to(dtype)
        options = dict(ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        pixels = F.cross_entropy(resized, target, weights, **options)
    confusion = _confusion(resized.detach(), target, ignore_index) if return_confusion else None
    return reduce_rows(pixels, target, class_weight, ignore_index, reduction), confusion


def _confusion(resized, target, ignore_index):
    C = resized.shape[1]
    kept = target != ignore_index
    pair = torch.where(kept, target * C + resized.argmax(1), 0).flatten()
    counts = torch.zeros(C * C, dtype=torch.int64, device=pair.device)
    return counts.scatter_add_(0, pair, kept.flatten().long()).view(C, C)


def _check(logits, target, class_weight):
    check_floating(OP, {"logits": logits} | ({} if class_weight is None else {"class_weight": class_weight}))
    if not isinstance(target, torch.Tensor) or target.dtype not in INTEGERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
        got = getattr(target, "dtype", type(target).__name__)
        raise TypeError(f"{OP}: target: expected a tensor of {names}, got {got}")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"{OP}: logits: expected (N, C, h, w), C, h, w > 0, got {tuple(logits.shape)}")
    N, C = logits.shape[:2]
    if target.dim() != 3 or target.shape[0] != N or 0 in target.shape[1:]:
        raise ValueError(f"{OP}: target: expected ({N}, H, W), H, W > 0, got {tuple(target.shape)}")
    if class_weight is not None and tuple(class_weight.shape) != (C,):
        raise ValueError(f"{OP}: class_weight: expected {(C,)}, got {tuple(class_weight.shape)}")


# ------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(
    logits, target, class_weight, align_corners, ignore_index, label_smoothing, reduction, keep,
    needs_confusion,
):
    dtype, C = compute_dtype(logits), logits.shape[1]
    shapes = {"nothing": (0,), "lse": target.shape, "gradient": logits.shape}
    loss = logits.new_empty(target.shape if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    kept = logits.new_empty(shapes[KEEP[keep]], dtype=dtype)
    divisor = logits.new_empty((), dtype=torch.float64)
    return loss, kept, divisor, logits.new_empty((C, C) if needs_confusion else (0,), dtype=torch.int64)


def _backward_fake(
    grad, logits, target, class_weight, kept, divisor, align_corners, ignore_index, label_smoothing,
    reduction, keep,
):
    return torch.empty_like(logits)


_FORWARD = define_kernels(
    "upsample_cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, bool align_corners, "
    "int ignore_index, float label_smoothing, int reduction, int keep, bool needs_confusion) "
    "-> (Tensor loss, Tensor kept, Tensor divisor, Tensor confusion)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, "
    "Tensor kept, Tensor divisor, bool align_corners, int ignore_index, float label_smoothing, "
    "int reduction, int keep) -> Tensor",
    _backward_fake,
)


def _what_to_keep(impl, logits, target, reduction) -> str:
    if impl != "cpu":
        return "lse"  # each program of backward owns source pixels, and would go over all classes twice
    _, C, h, w = logits.shape
    H, W = target.shape[1:]
    return "gradient" if reduction != "none" and C * h * w <= H * W else "nothing"


class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, class_weight, options, needs_confusion, impl):
        found = _FORWARD[impl](logits, target, class_weight, *options, needs_confusion)
        loss, kept, divisor, confusion = found
        ctx.save_for_backward(logits, target, class_weight, kept, divisor)
        ctx.options = options
        ctx.impl = impl
        ctx.mark_non_differentiable(confusion)
        return loss, confusion

    @staticmethod
    def backward(ctx, grad, _confusion):
        logits, target, class_weight, kept, divisor = ctx.saved_tensors
        with torch.no_grad():
            d_logits = _BACKWARD[ctx.impl](grad, logits, target, class_weight, kept, divisor, *ctx.options)
        return first_order(OP, (logits, grad), (d_logits, None, None, None, None, None))
