"""``infopro-fast info --check``: every op, by every implementation that runs here, against float64.

A case is run twice, forward and backward. Its loss and gradients must be those of the reference in float64,
for the same rounded inputs, and the same bits both times.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from infopro_fast import ops
from infopro_fast.errors import CheckError

Call = Callable[[nn.Module, dict[str, torch.Tensor], str], torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16)
CONVOLUTIONS = ("reconstruction_loss", "upsample_conv3x3")  # torch's own multiply in TF32 on a GPU


class Case(NamedTuple):
    """A call of an op. tensors: by name, float64 ones are differentiated; layers: its parameters, too."""

    op: str
    shape: str
    call: Call
    tensors: dict[str, torch.Tensor]
    layers: nn.Module = nn.Sequential()


class Row(NamedTuple):
    """What was found of a case.

    error: the largest, as a part of the largest number of the loss or that gradient. seconds: of the second
    run. wrong: why the row is not right, or nothing.
    """

    op: str
    shape: str
    implementation: str
    dtype: str
    error: float
    bound: float
    seconds: float
    wrong: str


def cases() -> Iterator[Case]:
    """Yield a usual and an odd shape of every op, and each form that has kernels of its own."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def labels(shape: tuple[int, ...], C: int) -> torch.Tensor:
        return torch.randint(C, shape, generator=random)

    for N, C, h, H in ((8, 16, 32, 32), (8, 64, 8, 32), (3, 5, 7, 10)):
        x = {"features": draw(N, C, h, h), "image": draw(N, 3, H, H).sigmoid()}
        yield Case("reconstruction_loss", f"({N}, {C}, {h}, {h}) to {H}", _reconstruction, x, _decoder(C))
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    x = {"features": draw(2, 13, 9, 7), "image": draw(2, 3, 36, 28).sigmoid()}
    yield Case("reconstruction_loss", "chain, (2, 13, 9, 7) to (36, 28)", _reconstruction, x, nn.Sequential(
        double, *_conv_norm_relu(13, 8), double, nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid()
    ))
    for N, D, classes in ((256, 128, 10), (33, 20, 3)):
        x = {"features": draw(N, D), "labels": labels((N,), classes)}
        yield Case("supcon_loss", f"({N}, {D})", _supcon, x)
    for N, D, C in ((256, 128, 10), (33, 65, 1000)):
        x = {"input": draw(N, D), "weight": draw(C, D) / D**0.5, "bias": draw(C)}
        hard, soft = {"target": labels((N,), C)}, {"probabilities": draw(N, C).softmax(1)}
        yield Case("linear_cross_entropy", f"({N}, {D}), {C} classes", _linear, x | hard)
        yield Case("linear_cross_entropy", f"({N}, {D}), {C} probabilities", _linear, x | soft)
    for N, C, h in ((32, 64, 8), (3, 5, 7)):
        x = {"x": draw(N, C, h, h)}
        yield Case("norm_relu_pool", f"({N}, {C}, {h}, {h})", _pool, x, nn.BatchNorm2d(C))
    for N, C, h, w, H, W in ((2, 19, 16, 32, 128, 256), (1, 3, 3, 5, 7, 11)):
        x = {"logits": draw(N, C, h, w), "target": labels((N, H, W), C)}
        yield Case("upsample_cross_entropy", f"({N}, {C}, {h}, {w}) to ({H}, {W})", _pixels, x)
    for N, C, h, K, H in ((2, 32, 16, 16, 32), (1, 3, 5, 2, 8)):
        x = {"x": draw(N, C, h, h), "weight": draw(K, C, 3, 3) / (3 * C**0.5), "bias": draw(K)}
        call = functools.partial(_convolution, H)
        yield Case("upsample_conv3x3", f"({N}, {C}, {h}, {h}) to {K} of {H}", call, x)


def _conv_norm_relu(C: int, K: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(C, K, 3, padding=1), nn.BatchNorm2d(K), nn.ReLU()


def _decoder(C: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm_relu(C, 12), nn.Conv2d(12, 3, 3, padding=1), nn.Sigmoid())


def _squares(out: torch.Tensor) -> torch.Tensor:
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()


def _reconstruction(layers, t, impl):
    return ops.reconstruction_loss(t["features"], t["image"], layers, impl=impl)


def _supcon(_, t, impl):
    return ops.supcon_loss(t["features"], t["labels"], impl=impl)


def _linear(_, t, impl):
    target = t["target"] if "target" in t else t["probabilities"].detach()
    return ops.linear_cross_entropy(t["input"], t["weight"], target, bias=t["bias"], impl=impl)


def _pool(layers, t, impl):
    return _squares(ops.norm_relu_pool(t["x"], layers, impl=impl))


def _convolution(size, _, t, impl):
    return _squares(ops.upsample_conv3x3(t["x"], t["weight"], t["bias"], size, impl=impl))


def _pixels(_, t, impl):
    return ops.upsample_cross_entropy(t["logits"], t["target"], impl=impl)


# ------------------------------------------------------------------------------------------------------------
# Runs


def check() -> Iterator[Row]:
    """Yield a row for each case, implementation of this machine and dtype, as each is found."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for case in cases():
            able = [impl for impl, reason in ops.available(case.op, device).items() if reason is None]
            for dtype in DTYPES:
                exact = _run(case, "reference", "cpu", dtype, torch.float64)
                for impl in able:
                    yield _compared(case, impl, device, dtype, exact)


def _compared(case: Case, impl: str, device: str, dtype: torch.dtype, exact: dict[str, torch.Tensor]) -> Row:
    bound = bound_of(case.op, device, dtype)
    name = str(dtype).removeprefix("torch.")
    row = Row(case.op, case.shape, f"{impl} on {device}", name, torch.nan, bound, torch.nan, "")
    try:
        first = _run(case, impl, device, dtype, dtype)
        start = time.perf_counter()
        second = _run(case, impl, device, dtype, dtype)
        seconds = time.perf_counter() - start
    except Exception as error:  # an op that cannot run is what this looks for
        return row._replace(wrong=f"{type(error).__name__}: {error}".splitlines()[0])
    errors = {}
    for name, e in exact.items():
        off = (first[name] - e).abs().max() / e.abs().max().clamp(min=1e-30)
        errors[name] = off.nan_to_num(torch.inf).item()
    worst = max(errors, key=lambda name: errors[name])
    wrong = "" if errors[worst] <= bound else f"the {worst} is wrong"
    if not wrong and not all(torch.equal(first[name], second[name]) for name in first):
        wrong = "other bits the second time"
    return row._replace(error=errors[worst], seconds=seconds, wrong=wrong)


def bound_of(op: str, device: str, dtype: torch.dtype) -> float:
    """Return how far off a number may be. Those of 16 bits are rounded to 8 bits, and of TF32 to 11."""
    if dtype == torch.bfloat16:
        return 0.05
    tf32 = device == "cuda" and op in CONVOLUTIONS and torch.backends.cudnn.allow_tf32
    return 0.01 if tf32 else 1e-4


def _run(
    case: Case, impl: str, device: str, given: torch.dtype, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return loss and gradients on the CPU in float64. given: what the tensors are rounded to; dtype: theirs.

    Layers are float32, as under autocast.
    """
    layers = copy.deepcopy(case.layers).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    tensors = {
        name: t.to(device, given).to(dtype).requires_grad_() if t.is_floating_point() else t.to(device)
        for name, t in case.tensors.items()
    }
    if "image" in tensors:  # only the reference gives it a gradient
        tensors["image"] = tensors["image"].detach()
    loss = case.call(layers, tensors, impl)
    leaves = {k: t for k, t in tensors.items() if t.requires_grad and k != "probabilities"}
    leaves |= {f"layer {name}": p for name, p in layers.named_parameters()}
    if "reconstruction" in case.op:  # the gradient of a bias in front of a batch norm is 0
        norms = [int(n) for n, m in layers.named_modules() if isinstance(m, nn.BatchNorm2d)]
        leaves = {k: t for k, t in leaves.items() if k not in [f"layer {n - 1}.bias" for n in norms]}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"loss": loss} | {f"gradient of {name}": g for name, g in zip(leaves, grads)}
    return {name: t.detach().cpu().double() for name, t in found.items()}


def show() -> None:
    """Print the rows as they are found. Raises CheckError if one is wrong."""
    torch.manual_seed(0)  # for the layers
    wrong = count = 0
    print(f"{'op':<24}{'shape':<36}{'implementation':<19}{'dtype':<10}{'error':>7} of{'bound':>7}{'ms':>8}")
    for row in check():
        count, wrong = count + 1, wrong + bool(row.wrong)
        numbers = f"{row.error:>7.0e} of{row.bound:>7.0e}{1e3 * row.seconds:>8.2f}  {row.wrong or 'ok'}"
        print(f"{row.op:<24}{row.shape:<36}{row.implementation:<19}{row.dtype:<10}{numbers}", flush=True)
    if wrong:
        raise CheckError(f"info --check: {wrong} of {count} rows are wrong: please report this table")
