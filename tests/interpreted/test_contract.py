"""What every op promises (tests/test_contract.py), for Triton: one case for each set of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infopro_fast.ops import triton_kernels
from tests import compare
from tests.op_cases import FORMS, SMALL, chain, check, gradients, upstream

OPS = pytest.mark.parametrize("op", sorted(FORMS))
# A program of the interpreter takes milliseconds, and these promises do not depend on sizes.
ODD = torch.nn.Upsample((3, 5), mode="bilinear", align_corners=True)
CASES = FORMS | {
    "reconstruction_loss, chain": lambda: chain(N=2, C=3, h=2, w=2, stages=((None, 1, 3), (ODD, 3, 2)))
}
# opaque ops that do not have the op's name
PARTS = dict.fromkeys(("reconstruction_loss", "reconstruction_loss, chain"), ("chain_stage", "chain_loss"))


def results(op, inputs):
    loss = CASES[op]().function("triton")(inputs)
    return {"loss": loss.detach()} | gradients(loss, inputs)


def raw_calls(op):
    """(overload, arguments) of the opaque ops behind an op, as autograd calls them."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "infopro_fast":
                calls.append(
                    (func, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args))
                )
            return func(*args, **(kwargs or {}))

    with Record():
        results(op, CASES[op]().inputs(torch.float32))
    return calls


@OPS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.fast(7)
def test_loss_and_gradients(op, dtype):
    check(FORMS[op](), "triton", dtype)


@OPS
@pytest.mark.fast(1)
def test_opaque_ops(op):
    """They are the Triton ones, pass opcheck, and give nobody else's memory."""
    calls = raw_calls(op)
    parts = PARTS.get(op, (FORMS[op]().op,))
    names = {f"{part}_{direction}_triton" for part in parts for direction in ("forward", "backward")}
    assert {f.overloadpacket.__name__ for f, _ in calls} == names and (op in PARTS or len(calls) == 2)
    for overload, args in calls:
        torch.library.opcheck(overload, args)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = overload(*args)
        out = (out,) if isinstance(out, torch.Tensor) else out
        storages = [
            t.untyped_storage().data_ptr() for t in (*args, *out) if isinstance(t, torch.Tensor) and t.numel()
        ]
        assert len(set(storages)) == len(storages), overload
        for a, b in zip(args, before, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), f"{overload} wrote into an argument"


@OPS
@pytest.mark.fast(3)
def test_autocast_changes_nothing(op):
    expected = results(op, CASES[op]().inputs(torch.float32))
    inputs = CASES[op]().inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(op, inputs)
    for name, t in found.items():
        compare.assert_same(t, expected[name], name)


@OPS
@pytest.mark.fast(3)
def test_twice_through_one_graph(op):
    inputs = CASES[op]().inputs(torch.float32)
    loss = CASES[op]().function("triton")(inputs)
    first = gradients(loss, inputs, retain_graph=True)
    for name, g in gradients(loss, inputs).items():
        compare.assert_same(g, first[name], name)


@OPS
@pytest.mark.fast(3)
def test_the_upstream_gradient_may_be_a_view(op):
    inputs = CASES[op]().inputs(torch.float32)
    loss = CASES[op]().function("triton")(inputs)
    grad = upstream(loss)
    expected = gradients(loss, inputs, grad, retain_graph=True)
    strided = torch.stack((grad, grad + 1), -1)[..., 0]
    for name, g in gradients(loss, inputs, strided).items():
        compare.assert_same(g, expected[name], name)


@OPS
@pytest.mark.fast(2)
def test_one_gradient_at_a_time(op):
    case = CASES[op]()
    everything = results(op, case.inputs(torch.float32))
    for name in case.differentiable:
        alone = results(op, case.inputs(torch.float32, grad=(name,)))
        scale = everything[case.zero.get(name, name)].abs().max().item()
        compare.assert_close(alone[name], everything[name].double(), scale=scale, what=name)


@OPS
@pytest.mark.fast(3)
def test_no_second_derivative(op):
    inputs = CASES[op]().inputs(torch.float32)
    found = gradients(CASES[op]().function("triton")(inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.split(',')[0]}: the kernels have no second derivative"):
        next(iter(found.values())).sum().backward()


class _Items(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense", "nonzero", "masked_select", "unique", "item"
        ), f"{name} synchronises with the host"
        return func(*args, **(kwargs or {}))


@OPS
@pytest.mark.fast(3)
def test_no_value_is_read_back_to_the_host(op):
    inputs, call = CASES[op]().inputs(torch.float32), CASES[op]().function("triton")
    grad = upstream(call(inputs))
    with _Items():
        gradients(call(inputs), inputs, grad)


@OPS
@pytest.mark.fast(3)
def test_captured_by_a_compiler(op):
    torch._dynamo.reset()
    call = CASES[op]().function("triton")
    if op.startswith("reconstruction_loss") or op == "norm_relu_pool":
        pytest.skip("its case swaps parameters, which no tracer follows; tests/test_compile.py compiles it")
    inputs = CASES[op]().inputs(torch.float32)
    expected = results(op, inputs)
    loss = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs)
    found = {"loss": loss.detach()} | gradients(loss, inputs)
    for name, t in found.items():
        compare.assert_same(t, expected[name], name)


def test_every_op_with_triton_kernels_has_a_case_here():
    folder = Path(triton_kernels.__file__).parent
    found = {file.stem for file in folder.glob("*.py") if "\ndef forward(" in file.read_text()}
    assert found and found <= set(SMALL).union(*PARTS.values())
