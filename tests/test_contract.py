"""What every op promises: each clause is a test of all ops and all implementations."""

from __future__ import annotations

import concurrent.futures
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from infopro_fast import ops
from tests import compare, op_cases
from tests.op_cases import FORMS, SMALL, Case, Tensors, gradients, upstream

# Ops with four-dimensional inputs
MAPS = (
    "reconstruction_loss", "reconstruction_loss, chain", "norm_relu_pool", "upsample_cross_entropy",
    "upsample_conv3x3",
)
OTHERS = [(op, layout) for op in FORMS for layout in op_cases.LAYOUTS if layout != "channels_last"]
CHANNELS_LAST = [(op, "channels_last") for op in MAPS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=FORMS)
def case(request) -> Case:
    return FORMS[request.param]()


def results(case: Case, impl: str, inputs: Tensors | None = None) -> Tensors:
    """Return loss and gradients by name, of fresh float64 inputs if none are given."""
    inputs = case.inputs() if inputs is None else inputs
    loss = case.function(impl)(inputs)
    return {"loss": loss.detach()} | gradients(loss, inputs)


def assert_all_close(found: Tensors, expected: Tensors, case: Case) -> None:
    """Each tensor of ``found`` is close to its namesake in ``expected``, which has all gradients."""
    for name, t in found.items():
        scale = expected[case.zero.get(name, name)].abs().max().item() * case.condition
        compare.assert_close(t, expected[name].double(), scale=scale, what=name)


def test_every_op_has_a_case():
    assert set(SMALL) == set(ops.OPS)


# ------------------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(case, impl, dtype):
    op_cases.check(case, impl, dtype)


LONG = {
    "reconstruction_loss": lambda: op_cases.reconstruction(N=24, C=64, h=8, w=8, H=32, W=32, K=12),
    "supcon_loss": lambda: op_cases.supcon(N=2048, D=128, views=None, classes=10, reduction="mean"),
    "linear_cross_entropy": lambda: op_cases.linear_ce(
        N=2048, D=128, C=1000, ignored=0, class_weight=False, reduction="mean"
    ),
    "norm_relu_pool": lambda: op_cases.norm_pool(N=128, C=32, h=16, w=16),
    "reconstruction_loss, chain": lambda: op_cases.chain(
        N=8, C=96, h=14, w=14, stages=((None, 1, 64), (op_cases.doubled(), 3, 24))
    ),
    "upsample_conv3x3": lambda: op_cases.up_conv(N=8, C=64, h=16, w=16, H=32, W=32, K=32),
    "upsample_cross_entropy": lambda: op_cases.upsample_ce(
        N=2, C=19, h=32, w=64, H=256, W=512, class_weight=False, reduction="mean"
    ),
    "linear_cross_entropy, many classes": lambda: op_cases.linear_ce(
        N=200, D=128, C=10000, ignored=0, reduction="mean"
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_sums_as_long_as_in_use(name, isa):
    """Thousands of terms, added up one by one in float32, would lose more than plain torch loses."""
    op_cases.check(LONG[name](), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(case, isa, dtype):
    op_cases.check(case, "cpu", dtype)


def leaves(case: Case, impl: str):
    """Return the loss as a function of the differentiable inputs, and these inputs."""
    inputs, f = case.inputs(), case.function(impl)

    def loss(*given):
        return f(inputs | dict(zip(case.differentiable, given, strict=True)))

    return loss, [inputs[k] for k in case.differentiable]


TWICE = op_cases.doubled()
# gradcheck calls an op for every number of its inputs and results: cases as small as possible.
TINY = {
    "reconstruction_loss": lambda: op_cases.reconstruction(N=2, C=2, h=2, w=3, H=3, W=4, K=2),
    "reconstruction_loss, chain": lambda: op_cases.chain(
        N=2, C=2, h=2, w=2, stages=((None, 1, 2), (TWICE, 3, 2)), size=(4, 4)
    ),
    "supcon_loss": lambda: op_cases.supcon(N=4, D=3, classes=2),
    "linear_cross_entropy": lambda: op_cases.linear_ce(N=5, D=3, C=4, ignored=1),
    "linear_cross_entropy, soft": lambda: op_cases.linear_ce(N=5, D=3, C=4, soft=True),
    "norm_relu_pool": lambda: op_cases.norm_pool(N=2, C=2, h=2, w=3),
    "upsample_cross_entropy": lambda: op_cases.upsample_ce(N=1, C=3, h=2, w=3, H=3, W=5),
    "upsample_conv3x3": lambda: op_cases.up_conv(N=1, C=2, h=2, w=3, H=3, W=5, K=2),
}


@pytest.mark.parametrize("op", FORMS)
def test_gradcheck(op, impl):
    """torch differentiates the reference, so random directions are enough there."""
    assert torch.autograd.gradcheck(
        *leaves(TINY[op](), impl), atol=1e-6, rtol=1e-5, fast_mode=impl == "reference"
    )


def test_second_derivative_is_right_or_refused(case, impl):
    if impl == "reference":
        assert torch.autograd.gradgradcheck(*leaves(case, impl), atol=1e-6, rtol=1e-5, fast_mode=True)
    else:
        inputs = case.inputs()
        first = gradients(case.function(impl)(inputs), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first.values()) + sum(
            inputs[k].sum() for k in case.differentiable
        )
        with pytest.raises(
            RuntimeError, match=f"^{case.op}: the kernels have no second derivative; impl='reference' has"
        ):
            penalty.backward()


def test_gradient_is_linear_in_the_upstream_gradient(case, impl):
    inputs = case.inputs()
    loss = case.function(impl)(inputs)
    assert all(
        not g.any() for g in gradients(loss, inputs, torch.zeros_like(loss), retain_graph=True).values()
    )
    once = gradients(loss, inputs, retain_graph=True)
    thrice = gradients(loss, inputs, -3 * upstream(loss))
    assert_all_close(thrice, {k: -3 * g for k, g in once.items()}, case)


@pytest.mark.parametrize("stride", (0, 2))
def test_strided_upstream_gradient(case, impl, stride):
    inputs = case.inputs()
    loss = case.function(impl)(inputs)
    grad = (
        loss.new_tensor(0.7).expand(loss.shape)
        if stride == 0
        else op_cases.relayout(upstream(loss), "step")[0].detach()
    )
    assert loss.dim() == 0 or not grad.is_contiguous()
    dense = gradients(loss, inputs, grad.contiguous(), retain_graph=True)
    for name, g in gradients(loss, inputs, grad).items():
        if impl == "reference":  # torch's own convolution adds in another order
            compare.assert_close(
                g, dense[name], scale=dense[case.zero.get(name, name)].abs().max().item(), what=name
            )
        else:
            compare.assert_same(g, dense[name], name)


def test_retain_graph_twice(case, impl):
    inputs = case.inputs()
    loss = case.function(impl)(inputs)
    first = gradients(loss, inputs, retain_graph=True)
    kept = {k: g.clone() for k, g in first.items()}
    second = gradients(loss, inputs)
    for name in kept:
        compare.assert_same(first[name], kept[name], f"first gradient of {name}, after the second backward")
        compare.assert_same(second[name], kept[name], f"second gradient of {name}")
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, inputs)


def test_inside_a_checkpoint(case, impl):
    """Backward reads what it saved once, since a checkpoint computes it again for one reading."""
    expected, inputs = results(case, impl), case.inputs()
    loss = checkpoint(lambda: case.function(impl)(inputs), use_reentrant=False)
    assert_all_close({"loss": loss.detach()} | gradients(loss, inputs), expected, case)


def test_saved_on_the_cpu(case, impl):
    expected, inputs = results(case, impl), case.inputs()
    with torch.autograd.graph.save_on_cpu():
        loss = case.function(impl)(inputs)
    assert_all_close({"loss": loss.detach()} | gradients(loss, inputs), expected, case)


def test_gradients_accumulate(case, impl):
    single, inputs, f = results(case, impl), case.inputs(), case.function(impl)
    for _ in range(2):
        loss = f(inputs)
        loss.backward(upstream(loss))
    assert_all_close(
        {k: inputs[k].grad for k in case.differentiable}, {k: 2 * g for k, g in single.items()}, case
    )


def test_each_subset_of_inputs_requiring_grad(case, impl):
    """The reference, which autograd handles, needs only single inputs and all but one."""
    everything, number = results(case, impl), len(case.differentiable)
    for n in range(1, number + 1):
        if (
            number > 8 and 2 < n < number - 1 or impl == "reference" and 1 < n < number - 1
        ):  # there are thousands: test the ends
            continue
        for subset in itertools.combinations(case.differentiable, n):
            found = results(case, impl, case.inputs(grad=subset))
            assert set(found) == {"loss", *subset}
            assert_all_close(found, everything, case)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_grad(case, impl, mode):
    expected = results(case, impl)["loss"]
    with mode():
        loss = case.function(impl)(case.inputs(grad=()))
    assert not loss.requires_grad
    compare.assert_close(loss.clone(), expected.double(), what="loss")


def test_auto_is_one_of_them(case, request):
    """impl="auto" gives the bits of one of the implementations that can run."""
    names = [k for k, reason in ops.available(case.op, "cpu").items() if reason is None]
    found = results(case, "auto")
    assert any(all(torch.equal(found[k], t) for k, t in results(case, name).items()) for name in names)


# ------------------------------------------------------------------------------------------------------------
# Precision


def test_autocast(case, impl):
    """Autocast does not change a loss, whose arithmetic is at least float32."""
    expected = results(case, impl, case.inputs(torch.float32))
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.function(impl)(inputs)
    compare.assert_same(loss.detach(), expected["loss"], "loss")
    for name, g in gradients(loss, inputs).items():
        compare.assert_same(g, expected[name], name)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16))
def test_low_precision_activations_with_float32_parameters(case, impl, low):
    """A network under autocast calls an op with these."""
    first = case.differentiable[0]
    inputs = case.inputs(torch.float32)
    inputs[first] = inputs[first].detach().to(low).requires_grad_()
    found = results(case, impl, inputs)
    exact = op_cases.widened(inputs)
    wanted = case.plain(exact)
    expected = {"loss": wanted.detach()} | gradients(wanted, exact, upstream(found["loss"]).double())
    assert found["loss"].dtype == (low if case.rounded else torch.float32)
    for name in case.differentiable:
        assert found[name].dtype == inputs[name].dtype
    assert_all_close(found, expected, case)


def test_float64_among_float32_is_computed_in_float64(case, impl):
    """One float64 input makes it float64 arithmetic, as type promotion does."""
    inputs = case.inputs(torch.float32)
    first = case.differentiable[0]
    inputs[first] = inputs[first].detach().double().requires_grad_()
    exact = op_cases.widened(inputs)
    found = results(case, impl, inputs)
    assert found["loss"].dtype == torch.float64
    assert_all_close({"loss": found["loss"], first: found[first]}, results(case, impl, exact), case)


# ------------------------------------------------------------------------------------------------------------
# Memory: layouts in, nothing written, nothing shared


@pytest.mark.parametrize("op, layout", OTHERS + CHANNELS_LAST)
def test_strided_inputs(op, impl, layout):
    case = FORMS[op]()
    expected = results(case, impl)
    stored = {k: op_cases.relayout(t, layout)[0] for k, t in case.inputs().items()}
    assert any(not t.is_contiguous() for t in stored.values())
    found = results(case, impl, stored)
    assert_all_close(found, expected, case)
    for name in case.differentiable:
        assert found[name].shape == stored[name].shape


def test_inputs_one_by_one_strided(case, impl):
    expected = results(case, impl)
    for name in case.tensors:
        inputs = case.inputs()
        inputs[name], _ = op_cases.relayout(inputs[name], "step")
        assert_all_close(results(case, impl, inputs), expected, case)


def test_expanded_inputs(case, impl):
    """All rows are one row (stride 0)."""
    first = case.differentiable[0]
    inputs = case.inputs()
    row = inputs[first].detach()[:1]
    inputs[first] = row.expand(inputs[first].shape).requires_grad_()
    dense = {k: t.detach().contiguous().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    assert inputs[first].stride(0) == 0 and dense[first].stride(0) != 0
    assert_all_close(results(case, impl, inputs), results(case, impl, dense), case)


def test_tensors_with_a_lazy_conjugate_or_negative_bit(case, impl):
    """x.imag of a conjugate is negative in memory only by a flag: its values count, not its bytes."""
    expected, inputs = results(case, impl), case.inputs()
    first = case.differentiable[0]
    flagged = torch.complex(torch.zeros_like(inputs[first]), -inputs[first].detach()).conj().imag
    assert flagged.is_neg() and torch.equal(flagged, inputs[first])
    inputs[first] = flagged.requires_grad_()
    assert_all_close(results(case, impl, inputs), expected, case)


@pytest.mark.parametrize("layout", ("contiguous", "step"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_the_user_is_written(case, impl, layout, dtype):
    stored, bases = {}, {}
    for name, t in case.inputs(dtype).items():
        stored[name], bases[name] = op_cases.relayout(t, layout)
    before = {k: b.detach().clone() for k, b in bases.items()}
    versions = {k: t._version for k, t in stored.items()}
    loss = case.function(impl)(stored)
    grad, grad_base = op_cases.relayout(upstream(loss).detach(), layout)
    grad_before = grad_base.clone()
    value = loss.detach().clone()
    found = gradients(loss, stored, grad, retain_graph=True)
    for g in found.values():
        g.fill_(torch.nan)  # writing to a gradient must not reach what is kept
    again = gradients(loss, stored, grad)
    assert all(torch.isfinite(g).all() for g in again.values())
    for name in stored:
        compare.assert_same(bases[name], before[name], name)
        assert stored[name]._version == versions[name], f"{name} was written in place"
    compare.assert_same(grad_base, grad_before, "upstream gradient")
    compare.assert_same(loss.detach(), value, "loss")


def test_changing_an_input_before_backward_is_noticed(case, cpu):
    """The kernels keep their inputs for backward; autograd notices a change."""
    inputs = case.inputs()
    leaf = inputs[case.differentiable[0]]
    moved = leaf * 1
    loss = case.function(cpu)(inputs | {case.differentiable[0]: moved})
    moved.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ------------------------------------------------------------------------------------------------------------
# Edges


EMPTY = {
    "reconstruction_loss": (lambda: op_cases.reconstruction(N=0), ()),
    "reconstruction_loss, chain": (lambda: op_cases.chain(N=0), ()),
    "upsample_conv3x3": (lambda: op_cases.up_conv(N=0), (0, 6, 9, 7)),
    "supcon_loss": (lambda: op_cases.supcon(N=0), (0, 2)),
    "linear_cross_entropy": (lambda: op_cases.linear_ce(N=0, ignored=0), (0,)),
    "norm_relu_pool": (lambda: op_cases.norm_pool(N=0), (0, 5)),
    "upsample_cross_entropy": (lambda: op_cases.upsample_ce(N=0), (0, 10, 19)),
}


@pytest.mark.parametrize("op", EMPTY)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_empty_batch(op, impl, dtype):
    make, shape = EMPTY[op]
    case = make()
    inputs = case.inputs(dtype)
    loss = case.function(impl)(inputs)
    assert loss.dtype == dtype and loss.shape == shape
    assert not loss.detach().any()
    for name, g in gradients(loss, inputs).items():
        assert g.shape == inputs[name].shape and not g.any(), name


ONE = {
    "reconstruction_loss": lambda: op_cases.reconstruction(N=1),
    "reconstruction_loss, chain": lambda: op_cases.chain(N=1),
    "upsample_conv3x3": lambda: op_cases.up_conv(N=1),
    "supcon_loss": lambda: op_cases.supcon(N=1, views=3),
    "linear_cross_entropy": lambda: op_cases.linear_ce(N=1, ignored=0),
    "norm_relu_pool": lambda: op_cases.norm_pool(N=1),
    "upsample_cross_entropy": lambda: op_cases.upsample_ce(N=1),
}


@pytest.mark.parametrize("op", ONE)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_batch_of_one(op, impl, dtype):
    op_cases.check(ONE[op](), impl, dtype)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_non_finite_input_is_not_hidden(case, impl, bad):
    """Training stops at a non-finite loss, so the loss must become one."""
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs[case.differentiable[0]].view(-1)[0] = bad
    assert not torch.isfinite(case.function(impl)(inputs)).all()


# ------------------------------------------------------------------------------------------------------------
# Determinism and threads


def test_same_bits_twice(case, impl):
    first, second = (results(case, impl, case.inputs(torch.float32)) for _ in range(2))
    for name in first:
        compare.assert_same(first[name], second[name], name)


LARGE = {
    "reconstruction_loss": lambda: op_cases.reconstruction(N=19, C=16, h=8, w=8, H=32, W=32, K=12),
    "reconstruction_loss, chain": lambda: op_cases.chain(
        N=5, C=16, h=17, w=9, stages=((None, 1, 24), (op_cases.doubled(), 3, 12))
    ),
    "upsample_conv3x3": lambda: op_cases.up_conv(N=5, C=16, h=17, w=9, H=41, W=18, K=12),
    "supcon_loss": lambda: op_cases.supcon(N=333, D=65, views=None, classes=10),
    "linear_cross_entropy": lambda: op_cases.linear_ce(N=333, D=65, C=301, ignored=33),
    "norm_relu_pool": lambda: op_cases.norm_pool(N=33, C=64, h=16, w=16),
    "upsample_cross_entropy": lambda: op_cases.upsample_ce(N=2, C=21, h=9, w=14, H=71, W=109),
}


@pytest.mark.parametrize("op", LARGE)
def test_one_thread_and_several(op, impl, threads):
    case, found = LARGE[op](), []
    for n in (1, 2, 3):
        threads(n)
        found.append(results(case, impl))
    for other in found[1:]:
        assert_all_close(other, found[0], case)


@pytest.mark.parametrize("op", LARGE)
def test_several_threads_are_deterministic(op, cpu, threads):
    case = LARGE[op]()
    threads(3)
    first, *rest = (results(case, cpu, case.inputs(torch.float32)) for _ in range(4))
    for other, name in itertools.product(rest, first):
        compare.assert_same(other[name], first[name], name)


@pytest.mark.parametrize("op", LARGE)
def test_calls_from_several_python_threads(op, impl):
    """Calls share no state, so concurrent ones do not disturb each other."""

    def call(_=None) -> Tensors:
        case = LARGE[op]()  # one for each call: a case swaps parameters into its own module
        return results(case, impl, case.inputs(torch.float32))

    alone = call()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(call, range(6)))
    for found in together:
        assert_all_close(found, alone, LARGE[op]())


class _Items(TorchDispatchMode):
    """Fail at a call that would wait for a device: a value read back, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item"), (
            f"{name} synchronises with the host"
        )
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_back_to_the_host(case, impl):
    inputs = case.inputs()
    with _Items():
        loss = case.function(impl)(inputs)
        gradients(loss, inputs)


# ------------------------------------------------------------------------------------------------------------
# torch.library


def raw_calls(op: str, dtype: torch.dtype, impl: str = "cpu"):
    """Return (overload, arguments) of the opaque ops behind an op, as autograd calls them."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "infopro_fast":
                calls.append(
                    (func, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args))
                )
            return func(*args, **(kwargs or {}))

    case = FORMS[op]()
    inputs = case.inputs(dtype)
    with Record():
        gradients(case.function(impl)(inputs), inputs)
    return calls


STAGES = (
    ["chain_stage_forward"] * 2 + ["chain_loss_forward", "chain_loss_backward"] + ["chain_stage_backward"] * 2
)
OPAQUE = {"reconstruction_loss, chain": STAGES}  # forms that are not one opaque op a direction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FORMS)
def test_opcheck(op, cpu, dtype):
    calls = raw_calls(op, dtype)
    assert [f.overloadpacket.__name__ for f, _ in calls] == OPAQUE.get(
        op, [f"{FORMS[op]().op}_{direction}" for direction in ("forward", "backward")]
    )
    for overload, args in calls:
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("op", FORMS)
def test_raw_results_are_nobody_elses(op, cpu):
    """An output of an opaque op is neither an input nor another output."""
    for overload, args in raw_calls(op, torch.float32):
        out = overload(*args)
        out = (out,) if isinstance(out, torch.Tensor) else out
        storages = [
            t.untyped_storage().data_ptr() for t in (*args, *out) if isinstance(t, torch.Tensor) and t.numel()
        ]
        assert len(set(storages)) == len(storages), overload


# ------------------------------------------------------------------------------------------------------------
# Choosing an implementation


def test_unknown_impl(case):
    with pytest.raises(ValueError, match=rf"{case.op}: impl: expected one of .*'auto'.* got 'fast'"):
        case.function("fast")(case.inputs())


def test_a_named_impl_runs_or_raises(case):
    inputs = {k: t.detach().to("meta").requires_grad_(t.requires_grad) for k, t in case.inputs().items()}
    if case.op in ("reconstruction_loss", "norm_relu_pool"):
        pytest.skip("its statistics are on the CPU in this case: see the op's own test")
    with pytest.raises(ValueError, match=rf"{case.op}: impl='cpu' cannot run this call: \w+ is on meta"):
        case.function("cpu")(inputs)
    assert case.function("auto")(inputs).device.type == "meta"


@pytest.mark.parametrize("named", ("auto", "cpu"))
@pytest.mark.parametrize("transform", ("grad", "jvp", "vmap", "forward_ad"))
def test_transforms_name_the_reference(case, cpu, named, transform):
    """Kernels have no rules for them; the reference, plain torch, takes grad and jvp."""
    inputs = case.inputs(grad=())
    first = case.differentiable[0]
    x = inputs[first]

    def run(impl):
        loss = lambda x: case.function(impl)(inputs | {first: x}).sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(loss)(x)
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        if transform == "vmap":
            return torch.func.vmap(loss)(x[None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent

    words = f"^{case.op}: impl='{named}' cannot run under torch.func transforms; impl='reference' can"
    with pytest.raises(ValueError, match=words):
        run(named)
    if transform != "vmap":  # vmap has no rule for a batch norm's running statistics
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(case.function("reference")(inputs | {first: leaf}).sum(), leaf)
        expected = grad if transform == "grad" else grad.sum()
        compare.assert_close(run("reference"), expected, scale=grad.abs().sum().item(), what=transform)


def test_tensors_on_different_devices(case):
    inputs = case.inputs()
    first = case.differentiable[0]
    inputs[first] = inputs[first].detach().to("meta")
    with pytest.raises(ValueError, match=rf"{case.op}: \S+: expected on (meta|cpu) like \w+, got (meta|cpu)"):
        case.function("auto")(inputs)


def test_available_names_every_implementation(case):
    found = ops.available(case.op, "cpu")
    assert found["reference"] is None and "cpu" in found
    assert "not on cuda" in ops.available(case.op, "cuda")["cpu"]


def test_available_of_an_unknown_op():
    with pytest.raises(ValueError, match="available: op: expected one of .*supcon_loss.* got 'softmax'"):
        ops.available("softmax", "cpu")


def test_a_batch_norm_with_a_weight_alone(impl):
    """nn.BatchNorm2d(bias=False) counts as a bias of 0."""
    x, image = torch.rand(3, 4, 5, 5, dtype=torch.float64), torch.rand(3, 3, 5, 5, dtype=torch.float64)
    calls = {
        "decoder": (op_cases.make_decoder(4, 6), 1),
        "chain": (op_cases.make_chain(4, ((None, 1, 6),), torch.nn.Upsample((5, 5))), 1),
        "pool": (torch.nn.BatchNorm2d(4).double(), None),
    }
    for name, (layers, place) in calls.items():
        norm, found = layers if place is None else layers[place], []
        for bias in (torch.nn.Parameter(torch.zeros_like(norm.weight)), None):
            norm.bias = bias
            out = (
                ops.norm_relu_pool(x, norm, impl=impl).sum()
                if place is None
                else ops.reconstruction_loss(x, image, layers, impl=impl)
            )
            found.append((out, *torch.autograd.grad(out, [p for p in layers.parameters() if p is not bias])))
        for a, b in zip(*found, strict=True):
            compare.assert_same(a, b, name)
