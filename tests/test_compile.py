"""Every op under torch.compile(fullgraph=True): eager's values and gradients, for any batch size."""

from __future__ import annotations

import copy

import pytest
import torch

from infopro_fast import ops
from tests import compare, op_cases
from tests.op_cases import gradients

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(op: str):
    """Return a module with a layer in front of the op, its loss, and a function that makes n inputs."""
    torch.manual_seed(0)
    first = torch.nn.Linear(6, 5 if op.startswith(("supcon_loss", "linear_cross_entropy")) else 30)
    if op.startswith("reconstruction_loss"):
        up = torch.nn.Upsample((7, 8), mode="bilinear", align_corners=True)
        stages = ((None, 1, 4), (op_cases.doubled("nearest"), 3, 6))
        decoder = (
            op_cases.make_chain(5, stages, up) if "chain" in op else op_cases.make_decoder(5, 7)
        ).float()

        def loss(x, y, impl):
            h = first(x).view(-1, 5, 2, 3)
            return (
                ops.reconstruction_loss(
                    h, y, decoder, image_mean=(0.4, 0.5, 0.6), image_std=(0.3, 0.2, 0.1), impl=impl
                )
                * 2
            )

        def inputs(n):
            return torch.randn(n, 6), torch.randn(n, 3, 7, 8)

        modules = torch.nn.ModuleList([first, decoder])
    elif op == "supcon_loss":

        def loss(x, y, impl):
            return ops.supcon_loss(first(x).view(len(x), 1, 5), y, reduction="none", impl=impl).square().sum()

        def inputs(n):
            return torch.randn(n, 6), torch.arange(n) % 3

        modules = torch.nn.ModuleList([first])
    elif op == "upsample_conv3x3":
        last = torch.nn.Conv2d(5, 4, 3)

        def loss(x, y, impl):
            return (
                ops.upsample_conv3x3(
                    first(x).view(-1, 5, 2, 3), last.weight, last.bias, y.shape[-2:], impl=impl
                )
                * y
            ).mean()

        def inputs(n):
            return torch.randn(n, 6), torch.randn(n, 4, 5, 7)

        modules = torch.nn.ModuleList([first, last])
    elif op == "norm_relu_pool":
        bn = torch.nn.BatchNorm2d(5)

        def loss(x, y, impl):
            return (ops.norm_relu_pool(first(x).view(-1, 5, 2, 3), bn, impl=impl) * y).sum()

        def inputs(n):
            return torch.randn(n, 6), torch.randn(n, 5)

        modules = torch.nn.ModuleList([first, bn])
    elif op == "upsample_cross_entropy":

        def loss(x, y, impl):
            logits = first(x).view(-1, 5, 2, 3)
            value, confusion = ops.upsample_cross_entropy(
                logits, y, ignore_index=255, return_confusion=True, impl=impl
            )
            return value + 0.1 * confusion.diag().sum()

        def inputs(n):
            target = torch.arange(n * 9 * 17, dtype=torch.uint8).view(n, 9, 17) % 5
            target[:, ::3, ::2] = 255
            return torch.randn(n, 6), target

        modules = torch.nn.ModuleList([first])
    else:
        last = torch.nn.Linear(5, 7)

        def loss(x, y, impl):
            value, correct = ops.linear_cross_entropy(
                first(x), last.weight, y, bias=last.bias, label_smoothing=0.1, return_correct=True, impl=impl
            )
            return value + 0.1 * correct

        def inputs(n):
            target = torch.arange(n) % 7
            target[::3] = -100
            return torch.randn(n, 6), torch.rand(n, 7) if op.endswith("soft") else target

        modules = torch.nn.ModuleList([first, last])
    return modules, loss, inputs


ZERO = {
    "1.0.bias": "0",
    "1.4.bias": "4",
}  # biases in front of a batch norm: the layer they are of, in the decoder


def run(modules, loss, x, y, impl):
    """Return loss, gradients and buffers of one call; the modules end as they were."""
    before = copy.deepcopy(modules.state_dict())
    x = x.clone().requires_grad_()
    value = loss(x, y, impl)
    names = {"x": x} | dict(modules.named_parameters())
    found = gradients(value, names) | {"loss": value.detach()}
    found |= {k: b.clone() for k, b in modules.named_buffers()}
    modules.load_state_dict(before)
    return found


def assert_compiled_is_eager(op, impl, backend, sizes, **options):
    modules, loss, inputs = network(op)
    compiled = torch.compile(loss, fullgraph=True, backend=backend, **options)
    for n in sizes:
        x, y = inputs(n)
        eager, found = run(modules, loss, x, y, impl), run(modules, compiled, x, y, impl)
        assert found.keys() == eager.keys()
        for name, t in found.items():
            # The gradient of the bias in front of a batch norm is 0: rounding, on the scale of the weight's
            # beside it.
            scale = eager[f"1.{place}.weight"].abs().max().item() if (place := ZERO.get(name)) else None
            if t.is_floating_point():
                compare.assert_close(
                    t, eager[name].double(), scale=scale, what=f"{op} {impl} {backend} batch {n}: {name}"
                )
            else:
                compare.assert_same(t, eager[name], name)


@pytest.mark.parametrize("op", op_cases.FORMS)
@pytest.mark.fast(7)
def test_captured_in_one_graph(op, impl):
    assert_compiled_is_eager(
        op, impl, "aot_eager", sizes=(6, 9, 13)
    )  # the second makes the compiler take the batch as a symbol


@pytest.mark.parametrize("op", op_cases.FORMS)
@pytest.mark.fast(2)
def test_compiled_by_inductor(op, cpu):
    """A graph of any batch from the start. The reference would only test inductor's own code."""
    assert_compiled_is_eager(op, cpu, "inductor", sizes=(6, 13), dynamic=True)


def test_all_rows_ignored(impl):
    """The loss is 0, not what memory held; a later batch with rows that count reuses the graph."""
    modules, loss, inputs = network("linear_cross_entropy")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = inputs(8)
    for target in (torch.full_like(y, -100), y, torch.full_like(y, -100)):
        eager, found = run(modules, loss, x, target, impl), run(modules, compiled, x, target, impl)
        for name, t in found.items():
            compare.assert_close(t, eager[name].double(), what=name)
        assert (found["loss"] == 0) == (target == -100).all()


def test_batch_norm_modes_recompile(impl):
    """Each mode has its own graph; the running statistics move in training only."""
    modules, loss, inputs = network("reconstruction_loss")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = inputs(6)
    for training in (True, False, True):
        modules.train(training)
        eager, found = run(modules, loss, x, y, impl), run(modules, compiled, x, y, impl)
        for name in ("loss", "x", "1.1.running_mean", "1.1.running_var"):
            compare.assert_close(found[name], eager[name].double(), what=name)


def test_export(cpu):
    """torch.export sees one opaque op."""

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return ops.supcon_loss(x, y, impl="cpu")

    x, y = torch.randn(6, 4), torch.arange(6) % 2
    program = torch.export.export(Loss(), (x, y))
    forward = torch.ops.infopro_fast.supcon_loss_forward.default
    assert [n.target for n in program.graph.nodes if "infopro_fast" in str(n.target)] == [forward]
    compare.assert_same(program.module()(x, y), Loss()(x, y))
