"""The floor under each kernel: bytes it must move, multiply-adds it must do, and the time of both on a GPU.

    python -m benchmarks.floors              print the table
    python -m benchmarks.floors --write      write it to docs/floors.md

A tensor that does not fit on the chip is read once for every sweep over the batch that the mathematics force;
batch norm's statistics force one. Outputs are written once, and sums of a few numbers are free. Arithmetic is
that of the cheapest exact form that we know, with recomputation, since nothing is kept. Elementwise work
(exponentials, resizing weights) counts where an op has no or few products of matrices, and says so. float32
products cost the cheaper of the float32 units and, where the op's kernels can, three products of float16 or
TF32 parts on tensor cores, which are as exact. No kernel can be faster than `Floor.seconds`; reports print
times as its multiples.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import typing

from benchmarks import shapes
from infopro_fast import figure
from infopro_fast.whole_files import replace_file

DOCUMENT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "floors.md"


@dataclasses.dataclass(frozen=True)
class Device:
    """Dense peak rates of a GPU by its data sheet. bandwidth: bytes/s; the others: operations/s."""

    name: str
    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float

    def rate(self, precision: str) -> float:
        return self.bfloat16 if precision == "float16" else getattr(self, precision)


DEVICES = {
    "H100": Device("H100 SXM5 80 GB", 3350e9, 66.9e12, 494.7e12, 989.4e12),
    "H200": Device("H200 SXM5 141 GB", 4800e9, 66.9e12, 494.7e12, 989.4e12),
    "A100": Device("A100 SXM4 80 GB", 2039e9, 19.5e12, 156e12, 312e12),
    "RTX 4090": Device("GeForce RTX 4090", 1008e9, 82.6e12, 82.6e12, 165.2e12),
}
SHOWN = {key: device for key, device in DEVICES.items() if key != "H200"}  # in tables


def find(name: str) -> Device | None:
    """Return the device that torch calls ``name``, or None if its rates are unknown."""
    return next((device for key, device in DEVICES.items() if key in name), None)


PRODUCTS = 3  # high by high, high by low, low by high: low by low is below float32's last bit


@dataclasses.dataclass(frozen=True)
class Floor:
    """Bytes and arithmetic of a kernel.

    bytes: to and from memory. macs: multiply-adds of matrix products or convolutions. elementwise: others, in
        float32.
    parts: "float16" or "tf32" if a float32 product can be `PRODUCTS` of two such parts of each operand, "" if
        not.
    """

    bytes: float
    macs: float
    elementwise: float = 0
    parts: str = ""

    def __add__(self, other: Floor) -> Floor:
        sums = self.bytes + other.bytes, self.macs + other.macs, self.elementwise + other.elementwise
        return Floor(*sums, parts=self.parts or other.parts)

    def arithmetic_seconds(self, device: Device, precision: str = "float32") -> float:
        elementwise = 2 * self.elementwise / device.float32
        if precision != "float32":
            return max(2 * self.macs / device.rate(precision), elementwise)
        on_units = 2 * self.macs / device.float32 + elementwise  # one kind of units does both
        if not self.parts:
            return on_units
        return min(on_units, max(PRODUCTS * 2 * self.macs / device.rate(self.parts), elementwise))

    def seconds(self, device: Device, precision: str = "float32") -> float:
        """Return the time of the slower of memory and arithmetic, as if they overlapped perfectly."""
        return max(self.bytes / device.bandwidth, self.arithmetic_seconds(device, precision))

    def bound(self, device: Device, precision: str = "float32") -> str:
        by_memory = self.bytes / device.bandwidth > self.arithmetic_seconds(device, precision)
        return "memory" if by_memory else "arithmetic"


# ------------------------------------------------------------------------------------------------------------
# Formulas. `size`: bytes of an element.


def decoder_z(s: shapes.DecoderShape) -> tuple[float, float]:
    """Return the multiply-adds of z of a sample: mixing channels, and expanding to the image's size one way.

    z is a 3x3 convolution, or nine 1x1 convolutions at the features' size and an expansion, which costs 6 for
    each number of z in y and 6 for each number of the three E in x: K H W (6 + 18 h / H).
    """
    direct = 9 * s.K * s.C * s.H**2
    mix, expand = 9 * s.K * s.C * s.h**2, s.K * s.H**2 * (6 + 18 * s.h / s.H)
    return (mix, expand) if s.h != s.H and mix + expand < direct else (direct, 0)


def decoder_forward(s: shapes.DecoderShape, size: int = 4) -> Floor:
    """Two sweeps: statistics; the loss, with the second convolution's sums for gradients and batch norm."""
    mix, expand = decoder_z(s)
    second = 27 * s.K * s.H**2  # multiply-adds of the second convolution, and of each of its gradients
    moved = 2 * s.C * s.h**2 + 3 * s.H**2
    return Floor(s.N * moved * size, s.N * (2 * (mix + expand) + 3 * second))


def decoder_backward(s: shapes.DecoderShape, size: int = 4) -> Floor:
    """One sweep: z, logits and z's gradient again; its transposed expansion; gradients of features and W1."""
    mix, expand = decoder_z(s)
    second = 27 * s.K * s.H**2
    moved = 2 * s.C * s.h**2 + 3 * s.H**2  # features in, their gradient out; image
    return Floor(s.N * moved * size, s.N * (3 * mix + 2 * expand + 2 * second))


def supcon_forward(s: shapes.SupConShape, size: int = 4) -> Floor:
    """Half of the symmetric N x N products."""
    return Floor(2 * s.N * s.D * size, s.N * (s.N + 1) / 2 * s.D, parts="float16")


def supcon_backward(s: shapes.SupConShape, size: int = 4) -> Floor:
    """That half again, then each coefficient times a row for both of its samples."""
    return Floor(3 * s.N * s.D * size, s.N * (s.N + 1) / 2 * s.D + s.N**2 * s.D, parts="float16")


def linear_forward(s: shapes.LinearShape, size: int = 4) -> Floor:
    """The logits."""
    return Floor((s.N + s.C) * s.D * size, s.N * s.C * s.D)


def linear_backward(s: shapes.LinearShape, size: int = 4) -> Floor:
    """The logits again, and the gradients of input and weight."""
    return Floor(2 * (s.N + s.C) * s.D * size, 3 * s.N * s.C * s.D)


def pool_forward(s: shapes.PoolShape, size: int = 4) -> Floor:
    """Statistics, then the normalised map's mean."""
    return Floor(2 * s.N * s.C * s.h**2 * size, 0)


def pool_backward(s: shapes.PoolShape, size: int = 4) -> Floor:
    return Floor(2 * s.N * s.C * s.h**2 * size, 0)


# Multiply-adds in the time of one: a multiprocessor has 16 units for it, and 64 (A100) or 128 float32 units.
EXPONENTIAL = 4
LABEL = 8  # bytes of an int64


def dense_forward(s: shapes.DenseShape, size: int = 4) -> Floor:
    """Every logit, resized along y (rows as they are) and then along x, once through an exponential."""
    each = s.C * s.H * (2 * s.w + (2 + EXPONENTIAL) * s.W)
    return Floor(s.N * (s.C * s.h * s.w * size + s.H * s.W * LABEL), 0, s.N * each)


def dense_backward(s: shapes.DenseShape, size: int = 4) -> Floor:
    """That again, and the transposed resize of every logit's gradient."""
    again = dense_forward(s, size)
    transposed = s.C * s.H * (2 * s.w + 2 * s.W)
    return Floor(again.bytes + s.N * s.C * s.h * s.w * size, 0, again.elementwise + s.N * transposed)


def upsample_conv_forward(s: shapes.UpsampleConvShape, size: int = 4) -> Floor:
    """Nine 1x1 convolutions at the size of x, and the expansion to twice that: K H W (6 + 18 h / H)."""
    moved = s.N * (s.C * s.h**2 + s.K * (2 * s.h) ** 2) + 9 * s.K * s.C
    return Floor(moved * size, s.N * 9 * s.K * s.C * s.h**2, s.N * s.K * (2 * s.h) ** 2 * (6 + 9))


def upsample_conv_backward(s: shapes.UpsampleConvShape, size: int = 4) -> Floor:
    """The transposed expansion; the products for the gradients of x and of the weights."""
    moved = s.N * (2 * s.C * s.h**2 + s.K * (2 * s.h) ** 2) + 18 * s.K * s.C
    forward = upsample_conv_forward(s, size)
    return Floor(moved * size, 2 * forward.macs, forward.elementwise)


def _chain_parts(s: shapes.ChainShape) -> tuple[int, float, list[Floor]]:
    """Return the numbers of all z, the 1x1 convolution's multiply-adds, and the three others' floors."""
    layers = ((128, s.h, 32), (32, 2 * s.h, 12), (12, 4 * s.h, 3))
    convolutions = [shapes.UpsampleConvShape(s.N, C, side, K) for C, side, K in layers]
    hidden = s.N * (128 * s.h**2 + 32 * (2 * s.h) ** 2 + 12 * (4 * s.h) ** 2)
    return hidden, s.N * 128 * s.C * s.h**2, [upsample_conv_forward(c) for c in convolutions]


def chain_forward(s: shapes.ChainShape, size: int = 4) -> Floor:
    """Each z is written, and read once its statistics are known; the logits stay on the chip."""
    hidden, first, others = _chain_parts(s)
    moved = s.N * (s.C * s.h**2 + 3 * (8 * s.h) ** 2)
    products, expansions = first + sum(f.macs for f in others), sum(f.elementwise for f in others)
    return Floor(moved * size + 8 * hidden, products, expansions)


def chain_backward(s: shapes.ChainShape, size: int = 4) -> Floor:
    """The logits again. Each z is read for its ReLU and the next weight's gradient, then for its batch norm.

    The first pass writes dy; the second, once the sums of dy are known, reads it.
    """
    hidden, first, others = _chain_parts(s)
    moved = s.N * (2 * s.C * s.h**2 + 3 * (8 * s.h) ** 2)
    products, expansions = 2 * (first + sum(f.macs for f in others)), sum(f.elementwise for f in others)
    return Floor(moved * size + 16 * hidden, products + others[-1].macs, expansions + others[-1].elementwise)


# ------------------------------------------------------------------------------------------------------------
# The last stages of the authors' ImageNet and Cityscapes decoders: 12 channels, doubled, to 3 logits a pixel;
# and 32, doubled, to 12. What their two implementations move and compute gives impl="auto" its order.

LAST_CHANNELS = (12, 3)
LAST_TILE = {"forward": (48, 28), "backward": (16, 16)}  # of CUDA C++ on an A100: chain_stage_plan.cuh
STAGE_CHANNELS = (32, 12)
STAGE_TILE = {"forward": (28, 28), "backward": (28, 4)}


def stage_floor(h: int, w: int, direction: str, last: bool) -> Floor:
    """Floor of a sample, float32: z read, the next z written, or with the last stage the image read.

    In backward both are read, and dy is read and written; the last stage computes the logits again.
    """
    (C, K), pixels = LAST_CHANNELS if last else STAGE_CHANNELS, h * w
    products, expansion = 9 * C * K * pixels, K * 4 * pixels * (6 + 9)
    if direction == "forward":
        return Floor(4 * (C + 4 * K) * pixels, products, expansion)
    if last:
        return Floor(4 * (2 * C + 4 * K) * pixels, 3 * products, 2 * expansion)
    return Floor(4 * (2 * C + 8 * K) * pixels, 2 * products, expansion)


def stage_triton(h: int, w: int, direction: str, last: bool) -> Floor:
    """Every map that a kernel reads or writes. The second cache may hold some, so this is the most.

    z read; a and T (9 K numbers a pixel of z) written and read by the product; the next z written, and read
    for its statistics. The last stage writes and reads the logits, and reads the image.
    In backward dz of dy and z, written and read; dT written and read by two products; a of z, written and
    read; da, and with z dy in place of it. The last stage repeats its forward before; ds takes the place of
    the logits, and is read for its sums and for dT.
    """
    (C, K), found = LAST_CHANNELS if last else STAGE_CHANNELS, stage_floor(h, w, direction, last)
    moved = 3 * C + 18 * K + (12 * K if last else 8 * K)
    if direction == "backward":
        moved = (moved + 12 * K if last else 16 * K) + 27 * K + 3 * C + 4 * C
    return Floor(4 * moved * h * w, found.macs, found.elementwise)


def stage_cuda(h: int, w: int, direction: str, last: bool) -> Floor:
    """Tile by tile: z with a border, and the next z, three channels at a time, or the image.

    Every tile that needs the logits and T of a border computes them again. For each three channels z is read
    again from the caches; it is counted as if it were not there. In backward the last stage reads the image
    with a border and z twice; the stage before reads z once for a and once for dy, and T has no border.
    """
    (C, K), tiles = (LAST_CHANNELS, LAST_TILE) if last else (STAGE_CHANNELS, STAGE_TILE)
    (rows, columns), found = tiles[direction], stage_floor(h, w, direction, last)
    if direction == "forward":
        again = (rows / 2 + 3) * (columns / 2 + 3) / (rows * columns / 4)
        return Floor(4 * (C * again * K / 3 + 4 * K) * h * w, found.macs * again, found.elementwise)
    around = (2 * rows + 6) * (2 * columns + 6) / (4 * rows * columns)
    if not last:
        return Floor(4 * (3 * C + 8 * K * around) * h * w, found.macs, found.elementwise * around)
    again = (rows + 6) * (columns + 6) / (rows * columns)
    moved = C * again + 4 * K * around + 2 * C
    return Floor(4 * moved * h * w, found.macs * (again + 2) / 3, found.elementwise * around)


GPU_DECODER = tuple(shape._replace(N=1024) for shape in shapes.DECODER)
GPU_CHAIN = tuple(shape._replace(N=64) for shape in shapes.CHAIN)
GPU_SUPCON = (shapes.SupConShape(1024), shapes.SupConShape(8192), shapes.SupConShape(65536))
GPU_DENSE = (*shapes.DENSE, shapes.DENSE_LARGER[1])
GPU_UPSAMPLE_CONV = (*shapes.UPSAMPLE_CONV, shapes.UPSAMPLE_CONV[0]._replace(N=64))
GPU_LINEAR = (shapes.LinearShape(1024, 128, 10), shapes.LinearShape(4096, 1024, 10000))

KERNELS: dict[str, tuple[typing.Callable, typing.Callable, tuple]] = {
    "reconstruction_loss": (decoder_forward, decoder_backward, GPU_DECODER),
    "chain_decoder": (chain_forward, chain_backward, GPU_CHAIN),
    "supcon_loss": (supcon_forward, supcon_backward, GPU_SUPCON),
    "linear_cross_entropy": (linear_forward, linear_backward, GPU_LINEAR),
    "norm_relu_pool": (pool_forward, pool_backward, shapes.POOL),
    "upsample_cross_entropy": (dense_forward, dense_backward, GPU_DENSE),
    "upsample_conv3x3": (upsample_conv_forward, upsample_conv_backward, GPU_UPSAMPLE_CONV),
}


def floor(op: str, shape: typing.NamedTuple, direction: str = "both", size: int = 4) -> Floor:
    """direction: "forward", "backward" or "both"."""
    forward, backward, _ = KERNELS[op]
    found = {"forward": (forward,), "backward": (backward,), "both": (forward, backward)}[direction]
    total = Floor(0, 0)
    for part in found:
        total = total + part(shape, size)
    return total


# ------------------------------------------------------------------------------------------------------------


def table() -> str:
    from benchmarks.workloads import label

    head = [f"{d} {p}, us" for d in SHOWN for p in ("float32", "tf32")]
    rows = []
    for op, (_, _, over) in KERNELS.items():
        for shape, direction in itertools.product(over, ("forward", "backward")):
            found = floor(op, shape, direction)
            times = [_time(found, device, p) for device in SHOWN.values() for p in ("float32", "tf32")]
            rows.append((op, label(shape), direction, *_counts(found), *times))
    return figure.markdown(["op", "shape", "direction", "MB", "Gmac", *head], rows)


def _time(found: Floor, device: Device, precision: str = "float32") -> str:
    return f"{1e6 * found.seconds(device, precision):.1f} {found.bound(device, precision)[0]}"


def _counts(found: Floor) -> tuple[str, str]:
    return f"{found.bytes / 1e6:.1f}", f"{(found.macs + found.elementwise) / 1e9:.2f}"


def stages_table() -> str:
    """The last two stages of a chain decoder for 64 images of ImageNet."""
    head, rows = ["stage", "direction", "implementation", "MB", "Gmac", *(f"{d}, us" for d in SHOWN)], []
    counts = {"floor": stage_floor, "CUDA C++": stage_cuda, "Triton and cuBLAS": stage_triton}
    for stage, side in (("last", 112), ("in front of it", 56)):
        for direction, (name, count) in itertools.product(("forward", "backward"), counts.items()):
            one = count(side, side, direction, stage == "last")
            found = Floor(64 * one.bytes, 64 * one.macs, 64 * one.elementwise)
            times = [_time(found, device) for device in SHOWN.values()]
            rows.append((stage, direction, name, *_counts(found), *times))
    return figure.markdown(head, rows)


DOCUMENT_TEXT = """# The floor under each kernel

Written by `python -m benchmarks.floors --write`; `benchmarks/floors.py` has the formulas and says what they
count. m: bound by memory; a: bound by arithmetic. float32 inputs and outputs; tf32: products on tensor
cores. Under float32 the products of supcon_loss are three of float16 parts, which are as exact, on a GPU
that is faster so.

{floors}

## The last two stages of a chain decoder, by implementation

Of 64 images, float32: 12 channels of 112x112, doubled, to the logits and the loss; and 32 of 56x56,
doubled, to those 12. The time is that of the slower of memory and arithmetic: of one kernel a direction in
CUDA C++, of all of Triton's as if they were one, and as if no map stayed in the second cache. Nothing here
is measured.

The first two stages, 512 channels to 128 and those to 32, are products of matrices above all, and left to
cuBLAS: the second has 11 times the multiply-adds of the third a pixel of z, of which CUDA C++ would do 1.3
times as many, in float32 alone.

{stages}

Peak rates, from the vendors' data sheets (dense):

{rates}
"""


def document() -> str:
    head = ("GPU", "GB/s", "float32 TFLOP/s", "TF32 TFLOP/s", "bfloat16 TFLOP/s")
    rates = [
        (d.name, f"{d.bandwidth / 1e9:.0f}", *(f"{r / 1e12:.1f}" for r in (d.float32, d.tf32, d.bfloat16)))
        for d in DEVICES.values()
    ]
    return DOCUMENT_TEXT.format(floors=table(), stages=stages_table(), rates=figure.markdown(head, rates))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    if parser.parse_args().write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        replace_file(DOCUMENT, document().encode())
    else:
        print(document())


if __name__ == "__main__":
    main()
