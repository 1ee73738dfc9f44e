"""What `tests/triton_aot.py` compiles: a function for each module of Triton kernels, by the module's name."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import torch

from infopro_fast.ops.triton_kernels import chain_loss as loss_kernels
from infopro_fast.ops.triton_kernels import chain_stage as stage
from infopro_fast.ops.triton_kernels import linear_cross_entropy as linear
from infopro_fast.ops.triton_kernels import norm_relu_pool as pool
from infopro_fast.ops.triton_kernels import resize
from infopro_fast.ops.triton_kernels import supcon_loss as supcon
from infopro_fast.ops.triton_kernels import upsample_conv3x3 as conv
from infopro_fast.ops.triton_kernels import upsample_cross_entropy as dense
from infopro_fast.ops.triton_kernels.target import dot_precision


class Compilation(typing.NamedTuple):
    """A kernel as one of its launches compiles it."""

    kernel: typing.Any
    signature: dict[str, str]  # Triton type of every argument, "constexpr" for those in ``constexprs``
    constexprs: dict[str, typing.Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool  # whether a tl.dot of it is meant for them
    aligned: tuple[str, ...]  # arguments that are multiples of 16 (pointers: addresses), as in most calls


def compilation(
    kernel, types: dict[str, str], constexprs: dict, unaligned: typing.Container[str] = (), warps: int = 4,
    stages: int = 3, tensor_cores: bool = False,
) -> Compilation:
    """Describe a compilation: ``types`` and ``constexprs`` of those of its arguments that the kernel has.

    Other arguments: int32 where the name is that of a size or a stride, float32 pointers else.
    """
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constexprs]
    number = lambda name: name.isupper() or name in ("h", "w") or "stride" in name  # noqa: E731
    signature = {name: types.get(name, "i32" if number(name) else "*fp32") for name in names}
    aligned = tuple(name for name in names if name not in unaligned and signature[name] != "fp32")
    signature |= dict.fromkeys(constexprs, "constexpr")
    return Compilation(kernel, signature, constexprs, warps, stages, tensor_cores, aligned)


def chain_loss(cc: int) -> Iterator[Compilation]:
    """Both kernels with each loss, dtype and layout of the image, and for one pixel."""
    cases = [
        ("fp32", 0, True, {"stride_x": 1}), ("bf16", 1, True, {"stride_o": 1}),
        ("fp16", 2, False, {"W": 1, "HW": 1, "stride_x": 1}),
    ]
    for dtype, loss, restore, fixed in cases:
        for kernel in (loss_kernels.loss_kernel, loss_kernels.gradient_kernel):
            floats = dict.fromkeys(("weight", "m0", "m1", "m2", "d0", "d1", "d2"), "fp32")
            fixed |= {"RESTORE": restore, "LOSS": loss, "BLOCK": loss_kernels.BLOCK}
            yield compilation(kernel, floats | {"image": f"*{dtype}"}, fixed)


def chain_stage(cc: int) -> Iterator[Compilation]:
    """Every kernel with and without an affine part, of 32 and 16 bits, and for one channel."""
    cases = ("*fp32", True, {}), ("*bf16", True, {}), ("*fp32", False, {"C": 1, "HW": 1})
    for parameters, affine, fixed in cases:
        for kernel in (stage.activation_kernel, stage.normalised_gradient_kernel, stage.rectify_kernel):
            chosen = {"AFFINE": affine, "BATCH_STATISTICS": affine, "BLOCK": stage.BLOCK} | fixed
            types = {"blocks_of_all": "i32", "eps": "fp32", "gamma": parameters, "beta": parameters}
            yield compilation(kernel, types, chosen)


def linear_cross_entropy(cc: int) -> Iterator[Compilation]:
    """Every kernel for 10 and 64 classes (InfoPro's heads), 1000, more than a tile holds, and one.

    Labels, and class probabilities for 10 and 10000.
    """
    flags = {"BIAS": True, "WEIGHTED": True, "SMOOTH": True, "UNIT": True, "SOFT": False}
    types = {"ignore_index": "i32", "label_smoothing": "fp32", "target": "*i64", "correct": "*i64"}
    unaligned = ("N", "C", "ignore_index")
    for C, out in ((10, "fp32"), (64, "bf16"), (1000, "bf16"), (10000, "fp32")):
        block_n, block_c = linear.row_tile(C)
        fixed = flags | {"WHOLE": block_c >= C, "BLOCK_N": block_n, "BLOCK_C": block_c}
        for kernel in (linear.forward_kernel, linear.backward_kernel):
            yield compilation(kernel, types | {"out": f"*{out}"}, fixed, unaligned)
            if out == "fp32":
                soft = fixed | {"SOFT": True, "SMOOTH": False}
                yield compilation(kernel, types | {"out": "*fp32", "target": "*fp32"}, soft, unaligned)
    one = {"N": 1, "C": 1, "row_grad_stride": 1}  # integers that are 1 are compiled in
    one |= dict.fromkeys(flags, False) | {"WHOLE": True, "BLOCK_N": 8, "BLOCK_C": 1}
    for kernel in (linear.forward_kernel, linear.backward_kernel):
        yield compilation(kernel, types, one, unaligned)
    rows = {"REDUCE": True, "MEAN_OF": True, "WEIGHTED": True, "BLOCK": linear.ROWS_AT_ONCE}
    for fixed in (rows, rows | {"N": 1}):
        yield compilation(linear.reduce_kernel, types, fixed, unaligned, 8)
    yield compilation(linear.row_gradient_kernel, types, rows, unaligned, 8)


def norm_relu_pool(cc: int) -> Iterator[Compilation]:
    """Every kernel for the paper's maps: 64 channels of 8x8, contiguous and channels_last; 2048 of 7x7."""
    types = {"eps": "fp32"}
    cases = ("fp32", 64, 64, False), ("fp32", 64, 64, True), ("bf16", 64, 64, True), ("fp32", 2048, 49, False)
    for dtype, C, HW, channels_last in cases:
        x = types | {"x": f"*{dtype}", "out": f"*{dtype}"}
        fixed = {"stride_c": 1, "out_stride_c": 1} if channels_last else {"stride_p": 1, "out_stride_p": 1}
        block_c, block_p = pool.choose_tile(C, HW, channels_last)
        tile = {"HW": HW, "AFFINE": True, "BLOCK_C": block_c, "BLOCK_P": block_p}
        yield compilation(pool.pool_kernel, x, fixed | tile)
        batch = fixed | tile | {"BATCH_STATISTICS": True}
        yield compilation(pool.gradient_kernel, x, batch, warps=pool.GRADIENT_WARPS)
    one = {"N": 1, "C": 1, "stride_p": 1, "out_stride_p": 1}  # integers that are 1 are compiled in
    tile = {"HW": 9, "AFFINE": False, "BLOCK_C": 1, "BLOCK_P": 16}
    yield compilation(pool.pool_kernel, types, one | tile)
    batch = one | tile | {"BATCH_STATISTICS": True}
    yield compilation(pool.gradient_kernel, types, batch, warps=pool.GRADIENT_WARPS)
    yield compilation(pool.sums_kernel, types, one | {"HW": 9, "BLOCK_N": 64, "BLOCK_C": 1})
    yield compilation(pool.sums_kernel, types, {"HW": 64, "BLOCK_N": 64, "BLOCK_C": 32})


def _resize_tables() -> Iterator[Compilation]:
    """Both kernels, in every mode."""
    for mode in range(3):
        for kernel, table in ((resize.places_kernel, "low"), (resize.takers_kernel, "first")):
            fixed = {"MODE": mode, "BLOCK": resize.BLOCK}
            yield compilation(kernel, {table: "*i32"}, fixed, ("COUNT_Y", "COUNT_X"))


def supcon_loss(cc: int) -> Iterator[Compilation]:
    """Every kernel for rows of 128 (InfoPro's) and 512 numbers, with and without a bound, split and not."""
    yield from _supcon_small_compilations()
    # what a pass over such rows multiplies, in how many parts
    float32, float16, bfloat16 = ("fp16", 2), ("fp16", 1), ("bf16", 1)
    shapes = (128, True, 1), (128, False, 4), (512, True, 1)
    cases = [(float32, shape) for shape in shapes]
    for rows, shape in [*cases, (bfloat16, shapes[0]), (bfloat16, shapes[2]), (float16, shapes[0])]:
        yield _supcon_pass_compilation(supcon.forward_kernel, cc, *rows, *shape)
        yield _supcon_pass_compilation(supcon.backward_kernel, cc, *rows, *shape)
    for kernel in (supcon.forward_kernel, supcon.backward_kernel):
        # integers that are 1 are compiled in
        yield _supcon_pass_compilation(kernel, cc, *float32, 2, True, 1, M=1)


def _supcon_pass_compilation(
    kernel, cc: int, dtype: str, parts: int, D: int, bounded: bool, splits: int, **fixed
):
    backward = kernel is supcon.backward_kernel
    tiles = supcon.choose_tiles(cc, parts, D, bounded, backward)
    types = {"hi": f"*{dtype}", "lo": f"*{dtype}", "labels": "*i64", "scale": "fp32"}
    constexprs = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_K"), tiles.blocks))
    constexprs |= dict(
        D=D, SCALED=True, FIXED_MAXIMUM=bounded, SPLITS=splits, PARTS=parts, WIDEN=False, **fixed
    )
    return compilation(kernel, types, constexprs, (), tiles.warps, tiles.stages, True)


def _supcon_small_compilations() -> Iterator[Compilation]:
    """The kernels around the two passes, one program a few rows."""
    block_m, block_d = supcon.row_block(128, 1024)
    blocks = {"D": 128, "BLOCK_M": block_m, "BLOCK_D": block_d}
    halves = {"hi": "*fp16", "lo": "*fp16"}
    yield compilation(supcon.split_kernel, halves, blocks | {"NORMALIZE": True, "PARTS": 2})
    yield compilation(supcon.join_kernel, {}, {"SPLITS": 4, "BLOCK_M": 128})
    coefficients = {"SCALED": True, "FIXED_MAXIMUM": True, "BLOCK": 4096}
    yield compilation(supcon.coefficients_kernel, {"scale": "fp32"}, coefficients, ("grad_stride",), 8)
    yield compilation(supcon.finish_kernel, {}, blocks | {"NORMALIZE": True, "SPLITS": 4})


def upsample_conv3x3(cc: int) -> Iterator[Compilation]:
    """Every kernel for maps of 64 channels or more and for one channel (nearest); the tables' kernels."""
    yield from _resize_tables()
    for dtype, mode, channels in (("fp32", 2, 64), ("bf16", 0, 64), ("fp16", 1, 1)):
        ones = {"K": 1} if channels == 1 else {}
        types = dict.fromkeys(("grad", "out", "bias"), f"*{dtype}") | {"low": "*i32", "first": "*i32"}
        for kernel, warps in ((conv.expand_kernel, conv.EXPAND_WARPS), (conv.collect_kernel, 4)):
            block, block_x = conv.choose_tile(channels, 128)
            fixed = ones | {"MODE": mode, "BIAS": True, "ROWS": conv.ROWS, "BLOCK_K": block}
            fixed |= {"BLOCK_X": block_x, "BLOCK_P": block_x}
            yield compilation(kernel, types, fixed, ("COUNT_Y", "COUNT_X"), warps)


def upsample_cross_entropy(cc: int) -> Iterator[Compilation]:
    """Every kernel for 10, 19 (Cityscapes) and 150 classes, with labels of 1, 4 and 8 bytes."""
    plain = dict(ALIGN_CORNERS=False, WEIGHTED=False, SMOOTH=False, EACH=False, KEEP=True, CONFUSION=False)
    everything = dict(ALIGN_CORNERS=True, WEIGHTED=True, SMOOTH=True, EACH=True, KEEP=True, CONFUSION=True)
    for C, logits, target, options, channels_last in (
        (19, "*fp32", "*i64", plain, False),
        (19, "*bf16", "*u8", plain | {"ALIGN_CORNERS": True}, True),
        (10, "*fp16", "*i32", everything, False),
        (150, "*fp32", "*u8", everything, False),
    ):
        tiles = dense.choose_tiles(C)
        types = {"logits": logits, "target": target, "out": logits}
        ones = {"stride_c": 1, "out_stride_c": 1} if channels_last else {"stride_x": 1, "out_stride_x": 1}
        fixed = options | ones | {"target_stride_x": 1, "BLOCK_C": tiles.block_c}
        forward = fixed | {"BLOCK_P": tiles.forward_p}
        yield _dense_compilation(dense.forward_kernel, types, forward, 4, 3, False)
        precision = dot_precision(torch.float32, cc)
        fixed |= {"PRECISION": precision, "BLOCK_P": tiles.backward_p, "BLOCK_W": tiles.block_w}
        options = dense.BACKWARD_WARPS, 2, precision != "ieee"
        yield _dense_compilation(dense.backward_kernel, types, fixed, *options)
    for each, mean in ((False, True), (False, False), (True, False)):
        fixed = {"MEAN_OF": mean, "EACH": each, "BLOCK": 1024}
        yield _dense_compilation(dense.finish_kernel, {}, fixed, 4, 3, False)


def _dense_compilation(kernel, types: dict[str, str], constexprs: dict, *options) -> Compilation:
    fixed = {
        "count": "i32", "ignore_index": "i32", "smoothing": "fp32", "confusion": "*i64", "divisor": "*fp64"
    }
    return compilation(kernel, fixed | types, constexprs, ("C", "ignore_index", "count"), *options)
