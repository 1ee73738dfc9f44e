"""Bilinear resize + cross entropy of a dense prediction, without the full-size logits:
F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target, ...).

    x_nc(Y, X) = sum over the two source rows y and the two source columns x next to (Y, X) of weight_y weight_x logits_nc(y, x)
    l = log sum_c exp x_c
    loss = (1 - e) w_t (l - x_t) + e / C sum_c w_c (l - x_c)         at every pixel; e: label smoothing, w: class weight, t: its target
    loss = sum of these / sum w_t   over the pixels that are not ignored

Plain torch keeps the resized logits, the logarithms of their softmax and the gradients of both (C numbers a pixel each). The kernels
resize a few pixels at a time, and take what they find there back to the source at once. On the CPU, where the loss is one number, its
gradient is found in the same pass, but for the upstream gradient's factor: C h w numbers a sample, kept where those are no more than
H W. Else backward goes over everything anew, and nothing is kept. (CPU time of 2 samples with 19 classes, 64x128 to 512x1024: forward
alone 7.5 ms, with the gradient 9.8; with a backward that starts from nothing 16.1, from which a log-sum-exp a pixel would save little:
the exponentials are to be taken again.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import compute_dtype, define_kernels, first_order, no_autocast, resolve
from .linear_cross_entropy import REDUCTIONS, reduce_rows
from .resize import fits

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
    """Cross entropy of logits that are resized to the target's size.

    logits: (N, C, h, w), float32, float64, bfloat16 or float16, any strides.
    target: (N, H, W), uint8, int8, int16, int32 or int64, any strides, in [0, C) or ``ignore_index``; read as it is. On the CPU a label
        out of range raises (RuntimeError from the kernels, IndexError from the reference); on a GPU the kernels take its pixel as ignored.
    align_corners: as in F.interpolate (the released InfoPro code has True).
    class_weight: (C,) floating, or None (torch's ``weight``); it gets no gradient.
    reduction: "mean" (divided by the sum of the targets' class weights), "sum" or "none" (N, H, W). Where every pixel is ignored
        "mean" is 0 with zero gradients, where torch gives nan.
    return_confusion: also return the confusion matrix, (C, C) int64: pixels that are not ignored by their target (row) and the class of
        their largest logit (column; the first of equal logits).
    impl: "auto", "reference", "cpu" or "triton"; one that is named runs or raises. Triton's kernels take 2 H h and 2 W w below 2^31.

    Returns float64 for float64 logits, else float32 (arithmetic too).
    Kept for backward beside the inputs: on the CPU nothing, or C h w numbers a sample where those are at most H W; by Triton H W numbers.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    _check(logits, target, class_weight, reduction, label_smoothing)
    on_gpu = impl == "triton" or logits.device.type == "cuda"
    limitation = {"triton": _triton_limitation(logits, target)} if on_gpu else None
    chosen = resolve(OP, impl, {"logits": logits, "target": target, "class_weight": class_weight}, limitation)
    if chosen == "reference":
        loss, confusion = upsample_cross_entropy_ref(
            logits, target, align_corners=align_corners, ignore_index=ignore_index, class_weight=class_weight,
            label_smoothing=label_smoothing, reduction=reduction, return_confusion=return_confusion,
        )  # fmt: skip
    else:
        options = (bool(align_corners), ignore_index, float(label_smoothing), REDUCTIONS.index(reduction))
        needs_grad = torch.is_grad_enabled() and logits.requires_grad  # inside, ctx.needs_input_grad is True under no_grad too
        keep = _what_to_keep(chosen, logits, target, reduction) if needs_grad else "nothing"
        options += (KEEP.index(keep),)
        loss, confusion = _UpsampleCrossEntropy.apply(logits, target, class_weight, options, bool(return_confusion), chosen)
    return (loss, confusion) if return_confusion else loss


def _triton_limitation(logits: torch.Tensor, target: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot take these shapes, None if they can: positions between source pixels and programs have 32 bits."""
    (N, C, h, w), (H, W) = logits.shape, target.shape[1:]
    # A program has 32 pixels of a row or more; in backward 16 classes of 32 source pixels.
    programs = max(N * H * -(-W // 32), N * -(-C // 16) * h * -(-w // 32))
    if fits(h, w, H, W) and programs < 2**30:
        return None
    return f"logits {tuple(logits.shape)} and target {tuple(target.shape)} need more than 32 bits to count in"


def upsample_cross_entropy_ref(
    logits, target, *, align_corners=False, ignore_index=-100, class_weight=None, label_smoothing=0.0, reduction="mean",
    return_confusion=False,
):  # fmt: skip
    """The specification, in plain torch: (loss, confusion or None), arguments as in `upsample_cross_entropy`."""
    dtype, target = compute_dtype(logits), target.long()
    with no_autocast(logits.device):
        resized = F.interpolate(logits.to(dtype), target.shape[-2:], mode="bilinear", align_corners=bool(align_corners))
        weights = None if class_weight is None else class_weight.to(dtype)
        pixels = F.cross_entropy(resized, target, weights, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    confusion = _confusion(resized.detach(), target, ignore_index) if return_confusion else None
    return reduce_rows(pixels, target, class_weight, ignore_index, reduction), confusion


def _confusion(resized, target, ignore_index):
    C = resized.shape[1]
    kept = target != ignore_index
    pair = torch.where(kept, target * C + resized.argmax(1), 0).flatten()
    return torch.zeros(C * C, dtype=torch.int64, device=pair.device).scatter_add_(0, pair, kept.flatten().long()).view(C, C)


def _check(logits, target, class_weight, reduction, label_smoothing):
    for name, t in (("logits", logits), ("class_weight", class_weight)):
        if t is None and name == "class_weight":
            continue
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            raise TypeError(f"{OP}: {name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if not isinstance(target, torch.Tensor) or target.dtype not in INTEGERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
        raise TypeError(f"{OP}: target: expected a tensor of {names}, got {getattr(target, 'dtype', type(target).__name__)}")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"{OP}: logits: expected (N, C, h, w), C, h, w > 0, got {tuple(logits.shape)}")
    N, C = logits.shape[:2]
    if target.dim() != 3 or target.shape[0] != N or 0 in target.shape[1:]:
        raise ValueError(f"{OP}: target: expected ({N}, H, W), H, W > 0, got {tuple(target.shape)}")
    if class_weight is not None and tuple(class_weight.shape) != (C,):
        raise ValueError(f"{OP}: class_weight: expected {(C,)}, got {tuple(class_weight.shape)}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(f"{OP}: class_weight: expected a tensor that does not require grad, it gets no gradient")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing: expected in [0, 1], got {label_smoothing}")


# ---------------------------------------------------------------------------------------------------------------------
# The fused path


def _forward_fake(logits, target, class_weight, align_corners, ignore_index, label_smoothing, reduction, keep, needs_confusion):
    dtype, C = compute_dtype(logits), logits.shape[1]
    shapes = {"nothing": (0,), "lse": target.shape, "gradient": logits.shape}
    loss = logits.new_empty(target.shape if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    kept = logits.new_empty(shapes[KEEP[keep]], dtype=dtype)
    divisor = logits.new_empty((), dtype=torch.float64)
    return loss, kept, divisor, logits.new_empty((C, C) if needs_confusion else (0,), dtype=torch.int64)


def _backward_fake(
    grad, logits, target, class_weight, kept, divisor, align_corners, ignore_index, label_smoothing, reduction, keep
):  # fmt: skip
    return torch.empty_like(logits)


_FORWARD = define_kernels(
    "upsample_cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, bool align_corners, int ignore_index, "
    "float label_smoothing, int reduction, int keep, bool needs_confusion) -> (Tensor loss, Tensor kept, Tensor divisor, Tensor confusion)",
    _forward_fake,
)
_BACKWARD = define_kernels(
    "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight, Tensor kept, Tensor divisor, "
    "bool align_corners, int ignore_index, float label_smoothing, int reduction, int keep) -> Tensor",
    _backward_fake,
)


def _what_to_keep(impl, logits, target, reduction) -> str:
    if impl != "cpu":
        return "lse"  # a GPU's programs own source pixels in backward, and would each have to go over all classes twice
    _, C, h, w = logits.shape
    H, W = target.shape[1:]
    return "gradient" if reduction != "none" and C * h * w <= H * W else "nothing"


class _UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, class_weight, options, needs_confusion, impl):
        loss, kept, divisor, confusion = _FORWARD[impl](logits, target, class_weight, *options, needs_confusion)
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
