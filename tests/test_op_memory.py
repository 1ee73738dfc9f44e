"""Memory of the kernels: bytes kept for backward, and the peak of forward and backward in a new process.

The same measure of plain torch is the control: it must find the maps that plain torch is known to keep.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory, shapes, workloads
from infopro_fast import ops
from tests import op_cases

KIB, MIB = 2**10, 2**20
NOISE = MIB // 2  # the resident set counts pages, and a thread's arrive in batches


# ------------------------------------------------------------------------------------------------------------
# Kept for backward, by the formulas of the docstrings


def kept(case: op_cases.Case, impl: str, dtype: torch.dtype) -> int:
    inputs = case.inputs(dtype)
    f = case.function(impl)
    return memory.saved_bytes(lambda: f(inputs), inputs.values())


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", (True, False))
def test_reconstruction_loss_keeps_numbers_per_channel(training, dtype, cpu):
    K, size = 12, 8 if dtype == torch.float64 else 4
    decoder = op_cases.make_decoder(16, K).to(dtype).train(training)
    features, image = (
        torch.randn(8, 16, 8, 8, dtype=dtype, requires_grad=True), torch.rand(8, 3, 32, 32, dtype=dtype)
    )
    beside = [features, image, *decoder.parameters(), *decoder.buffers()]
    for options in (
        {}, dict(loss="l1", interpolate_mode="nearest"),
        dict(image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.2)),
    ):
        found = memory.saved_bytes(
            lambda options=options: ops.reconstruction_loss(features, image, decoder, impl=cpu, **options),
            beside,
        )
        assert 0 < found <= size * (4 * K + 27 * K + 3), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", (True, False))
def test_a_chain_decoder_keeps_the_maps_in_front_of_its_batch_norms(training, dtype, cpu):
    N, h, w, size = 4, 6, 5, 8 if dtype == torch.float64 else 4
    decoder = (
        op_cases.make_chain(16, ((None, 1, 12), (op_cases.doubled(), 3, 8)), op_cases.doubled())
        .to(dtype)
        .train(training)
    )
    features, image = (
        torch.randn(N, 16, h, w, dtype=dtype, requires_grad=True),
        torch.rand(N, 3, 4 * h, 4 * w, dtype=dtype),
    )
    beside = [features, image, *decoder.parameters(), *decoder.buffers()]
    found = memory.saved_bytes(lambda: ops.reconstruction_loss(features, image, decoder, impl=cpu), beside)
    assert found == size * (N * 12 * h * w + N * 8 * 4 * h * w + 2 * (12 + 8))


@pytest.mark.parametrize("stride, side", [(1, 12), (2, 6)])
def test_norm_relu_pool_behind_a_convolution_keeps_its_output_and_a_few_numbers(stride, side, cpu):
    N, K = 16, 24
    conv, bn = torch.nn.Conv2d(4, K, 3, stride=stride, padding=1, bias=False), torch.nn.BatchNorm2d(K)
    x = torch.randn(N, 4, 12, 12, requires_grad=True)
    found = memory.saved_bytes(
        lambda: ops.norm_relu_pool(x, bn, conv=conv, impl=cpu), [x, conv.weight, *bn.parameters()]
    )
    assert found == 4 * (N * K * side * side + 2 * N * K + 2 * K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsample_conv3x3_keeps_its_inputs_alone(dtype, cpu):
    assert kept(op_cases.up_conv(h=8, w=8, H=16, W=16), cpu, dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", (None, 2))
def test_supcon_loss_keeps_three_numbers_an_anchor(views, dtype, cpu):
    N, size = 200, 8 if dtype == torch.float64 else 4
    M = N * (views or 1)
    labels = 8 * M if views else 0  # one label an anchor, where a row of several has one
    for reduction in ("mean", "sum", "none"):
        assert (
            0
            < kept(op_cases.supcon(N, 16, views, 10, reduction=reduction), cpu, dtype)
            <= 3 * size * M + labels
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_keeps_a_number_a_row(dtype, cpu):
    N, size = 200, 8 if dtype == torch.float64 else 4
    for reduction in ("sum", "none", "mean"):
        divisor = 8 if reduction == "mean" else 0
        assert 0 < kept(op_cases.linear_ce(N, 16, 100, reduction=reduction), cpu, dtype) <= size * N + divisor


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsample_cross_entropy_keeps_a_number_a_pixel_at_most(dtype, cpu):
    """Its gradient, where one has no more numbers than there are pixels, and what it was divided by; else
    nothing but that."""
    size, divisor = 8 if dtype == torch.float64 else 4, 8
    for h, w, reduction, numbers in (
        (3, 4, "mean", 120), (3, 4, "sum", 120), (6, 8, "mean", 0), (3, 4, "none", 0)
    ):
        found = kept(op_cases.upsample_ce(2, 5, h, w, 10, 19, reduction=reduction), cpu, dtype)
        assert size * numbers <= found <= size * numbers + divisor and numbers <= 2 * 10 * 19


@pytest.mark.parametrize("make", op_cases.SMALL.values(), ids=op_cases.SMALL)
def test_nothing_is_kept_where_nothing_requires_grad(make, cpu):
    case = make()
    inputs, f = case.inputs(grad=()), case.function(cpu)
    assert memory.saved_bytes(lambda: f(inputs), inputs.values()) == 0


def test_plain_torch_keeps_its_maps():
    """The measure sees nearly three resized maps and five of K channels; three N x N maps."""
    shape = shapes.DecoderShape(8, 64, 8, 32)
    workload = workloads.decoder("eager", shape)
    assert memory.saved_bytes(workload.forward, workload.inputs) > shape.resized_bytes()
    shape = shapes.SupConShape(500)
    workload = workloads.supcon("eager", shape)
    assert memory.saved_bytes(workload.forward, workload.inputs) >= 3 * shape.pairs_bytes()


# ------------------------------------------------------------------------------------------------------------
# The peak, at the paper's shapes


def transient(op: str, shape, small, method: str = workloads.OURS, direction: str = "both") -> int:
    """Return the bytes above the results at the highest point of the call."""
    found = memory.peak_bytes(
        "benchmarks.workloads:for_peak",
        op=op,
        method=method,
        shape=list(shape),
        small=list(small),
        direction=direction,
    )
    return found["peak"] - found["returned"]


@pytest.mark.memory
@pytest.mark.parametrize("shape", shapes.DECODER, ids=workloads.label)
@pytest.mark.fast(1)
def test_reconstruction_loss_never_forms_the_resized_map(shape, cpu):
    small = shape._replace(N=4)
    assert transient("reconstruction_loss", shape, small) < shape.resized_bytes() / 4
    assert transient("reconstruction_loss", shape, small, direction="forward") < shape.resized_bytes() / 4


@pytest.mark.memory
def test_reconstruction_loss_needs_no_more_for_a_larger_batch(cpu):
    shape = shapes.DecoderShape(128, 64, 8, 32)
    small = shape._replace(N=4)
    once, four = (transient("reconstruction_loss", shape._replace(N=n), small) for n in (128, 512))
    assert four < once + shape.resized_bytes() / 16 + NOISE


@pytest.mark.memory
def test_a_chain_decoder_needs_a_third_of_eager_at_most(cpu):
    shape = shapes.ChainShape(4, 512, 28)
    eager, ours = (
        transient("chain_decoder", shape, shapes.ChainShape(1, 16, 7), method)
        for method in ("eager", workloads.OURS)
    )
    assert eager > 3 * shape.resized_bytes()  # the control: the measure sees what eager is known to hold
    assert ours < eager / 3


@pytest.mark.memory
def test_upsample_conv3x3_never_forms_the_resized_map(cpu):
    shape = shapes.UpsampleConvShape(8, 128, 64, 8)
    found = transient("upsample_conv3x3", shape, shape._replace(N=1, h=4), direction="forward")
    assert found < shape.resized_bytes() / 4


@pytest.mark.memory
def test_supcon_loss_has_no_square_buffer(cpu):
    """Backward's memory follows from its buffers.

    It has the rows four times (as they are, and packed three ways) and a gradient for each of two threads. A
    thread has a tile of 768 x 32 and two of D x 32; a row has eight numbers.
    """
    shape = shapes.SupConShape(4096)
    inputs_again, tiles, numbers = 4 * shape.N * shape.D, 2 * 4 * 32 * (768 + 2 * shape.D), 8 * 4 * shape.N
    found = transient("supcon_loss", shape, shapes.SupConShape(256))
    assert found < shape.pairs_bytes() / 4 and found < 6 * inputs_again + tiles + numbers + NOISE


@pytest.mark.memory
def test_supcon_loss_grows_with_the_batch_not_its_square(cpu):
    small = shapes.SupConShape(256)
    once, twice = (transient("supcon_loss", shapes.SupConShape(n), small) for n in (4096, 8192))
    assert twice < 2 * once + 2 * NOISE


@pytest.mark.memory
def test_linear_cross_entropy_needs_a_quarter_of_the_logits_at_most(cpu):
    shape = shapes.LinearShape(4096, 1024, 10000)
    assert (
        transient("linear_cross_entropy", shape, shapes.LinearShape(64, 1024, 100))
        <= shape.logits_bytes() / 4
    )


@pytest.mark.memory
@pytest.mark.parametrize("shape", (*shapes.DENSE, shapes.DENSE_LARGER[0]), ids=workloads.label)
def test_upsample_cross_entropy_needs_a_number_a_pixel_at_most(shape, cpu):
    """Both if forward keeps the gradient and if backward finds it."""
    found = transient("upsample_cross_entropy", shape, shape._replace(N=1, h=8, w=16, H=64, W=128))
    assert found <= shape.pixel_bytes()


@pytest.mark.memory
def test_the_peak_of_plain_torch_is_seen():
    """A control: the peak shows the maps and logits that plain torch holds."""
    decoder, pairs, logits = (
        shapes.DecoderShape(128, 64, 8, 32), shapes.SupConShape(2048), shapes.LinearShape(1024, 64, 10000)
    )
    assert transient("reconstruction_loss", decoder, decoder._replace(N=4), "eager") > decoder.resized_bytes()
    assert transient("supcon_loss", pairs, shapes.SupConShape(256), "eager") > 3 * pairs.pairs_bytes()
    assert (
        transient("linear_cross_entropy", logits, shapes.LinearShape(64, 64, 100), "eager")
        > 2 * logits.logits_bytes()
    )
    dense = shapes.DenseShape(1, 19, 64, 64, 512, 512)
    assert (
        transient("upsample_cross_entropy", dense, dense._replace(h=8, w=8, H=64, W=64), "eager")
        > 2 * dense.C * dense.pixel_bytes()
    )
