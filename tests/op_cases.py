"""Cases of every op, each with the plain torch that a user would write, and one way to compare them.

A case holds its tensors in float64. `function` and `plain` map a dict of such tensors, of any dtype and
strides, to the loss.
"""

from __future__ import annotations

import copy
import dataclasses
import typing

import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast import ops
from tests import compare

Tensors = dict[str, torch.Tensor]
Loss = typing.Callable[[Tensors], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op with its inputs, and the same in plain torch.

    tensors: all tensor arguments, float64 if floating. differentiable: those with a gradient. zero: those
    whose exact gradient is 0, each with the one whose gradient sets the scale of rounding. condition: the
    largest logit, to which a loss is rounded. magnified: how much float32 arithmetic magnifies the rounding
    of the inputs. rounded: whether the result is a map in its input's dtype, not a loss in that of the
    arithmetic.
    """

    op: str
    tensors: Tensors
    differentiable: tuple[str, ...]
    function: typing.Callable[[str], Loss]
    plain: Loss
    zero: dict[str, str] = dataclasses.field(default_factory=dict)
    condition: float = 1.0
    magnified: float = 1.0
    rounded: bool = False

    def inputs(
        self,
        dtype: torch.dtype = torch.float64,
        grad: typing.Iterable[str] | None = None,
        device: str = "cpu",
    ) -> Tensors:
        """Return fresh leaves in ``dtype`` on ``device``.

        grad: names of those that require grad; None: all differentiable ones.
        """
        grad = self.differentiable if grad is None else tuple(grad)
        floating = {k: t.is_floating_point() for k, t in self.tensors.items()}
        fresh = {
            k: t.detach().to(device, dtype if floating[k] else t.dtype, copy=True)
            for k, t in self.tensors.items()
        }
        return {k: t.requires_grad_(k in grad) for k, t in fresh.items()}


def upstream(loss: torch.Tensor) -> torch.Tensor:
    """Return a gradient of the loss, different in every element, made on its device without a wait."""
    i = torch.arange(loss.numel(), dtype=torch.float64, device=loss.device)
    return (0.7 + torch.sin(1 + 2.3 * i)).reshape(loss.shape).to(loss)


def gradients(loss: torch.Tensor, inputs: Tensors, grad: torch.Tensor | None = None, **kwargs) -> Tensors:
    """Return the gradient of every input that requires grad, by name."""
    named = {k: t for k, t in inputs.items() if t.requires_grad}
    found = torch.autograd.grad(
        loss, list(named.values()), upstream(loss) if grad is None else grad, **kwargs
    )
    return dict(zip(named, found, strict=True))


def copies(inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Return the same values as fresh contiguous leaves, floating ones in ``dtype`` if one is given."""
    fresh = {}
    for name, t in inputs.items():
        dtype_of_copy = dtype if dtype is not None and t.is_floating_point() else t.dtype
        fresh[name] = t.detach().to(dtype_of_copy, copy=True).contiguous().requires_grad_(t.requires_grad)
    return fresh


def widened(inputs: Tensors) -> Tensors:
    return copies(inputs, torch.float64)


def check(case: Case, impl: str, dtype: torch.dtype, inputs: Tensors | None = None) -> None:
    """Compare the loss and gradients of ``impl``, computed in ``dtype``, with plain torch.

    float64: equal. float32: no further from float64 than twice plain torch's error in float32 (the reference,
    which
    is the specification in float64: close). bfloat16, float16: as exact as float32 arithmetic on the rounded
    inputs, with gradients rounded once.
    """
    inputs = case.inputs(dtype) if inputs is None else inputs
    # Copies: torch's batch norm misreads a weight that is not contiguous (2.14: nan from the memory next to
    # it, in backward).
    exact_inputs = widened(inputs)
    exact = case.plain(exact_inputs)
    loss = case.function(impl)(inputs)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    result = dtype if case.rounded else arithmetic
    assert loss.dtype == result, f"{case.op}: expected a result in {result}, got {loss.dtype}"
    ours, expected = gradients(loss, inputs), gradients(exact, exact_inputs)
    theirs: Tensors = {}
    if dtype == torch.float32 and impl != "reference":
        plain_inputs = copies(inputs)
        plain = case.plain(plain_inputs)
        theirs = {"loss": plain.detach()} | gradients(plain, plain_inputs)
    for name, grad in ours.items():
        assert grad.dtype == inputs[name].dtype, (
            f"{name}: expected a gradient in {inputs[name].dtype}, got {grad.dtype}"
        )
    for name, found in {"loss": loss.detach(), **ours}.items():
        what = f"{case.op} {impl} {dtype}: {name if name == 'loss' else 'gradient of ' + name}"
        wanted = (exact.detach() if name == "loss" else expected[name]).double()
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        if name in case.zero:
            size = expected[case.zero[name]].abs().max().item() * case.magnified
            compare.assert_close(found, torch.zeros_like(wanted), dtype=arithmetic, scale=size, what=what)
        elif theirs:
            worth = case.magnified if name != "loss" else max(1.0, case.condition / size if size else 1.0)
            compare.assert_accurate(found, theirs[name], wanted, scale=worth, what=what)
        else:
            scale = (max(size, case.condition) if name == "loss" else size * case.condition) * case.magnified
            compare.assert_close(
                found, wanted, dtype=result if name == "loss" else found.dtype, scale=scale, what=what
            )


# ------------------------------------------------------------------------------------------------------------
# reconstruction_loss


def make_decoder(C: int, K: int, *, bias: bool = True, **norm) -> nn.Sequential:
    """Return the authors' CIFAR decoder in float64, with asymmetric parameters and statistics."""
    conv1, conv2 = nn.Conv2d(C, K, 3, padding=1, bias=bias), nn.Conv2d(K, 3, 3, padding=1, bias=bias)
    return _drawn(
        nn.Sequential(conv1, nn.BatchNorm2d(K, **norm), nn.ReLU(), conv2, nn.Sigmoid()), seed=C + 7 * K
    )


def make_chain(
    C: int, stages, last: nn.Upsample | None = None, *, bias: bool = True, norm=nn.BatchNorm2d, **options
) -> nn.Sequential:
    """Return a chain decoder, likewise.

    stages: (Upsample or None, side of the convolution, its channels) of each hidden stage. last: the Upsample
    in front of the last convolution.
    """
    layers: list[nn.Module] = []
    widths = [C, *(K for _, _, K in stages)]
    for (upsample, side, K), inputs in zip(stages, widths, strict=False):
        layers += [] if upsample is None else [upsample]
        layers += [nn.Conv2d(inputs, K, side, padding=side // 2, bias=bias), norm(K, **options), nn.ReLU()]
    layers += [] if last is None else [last]
    return _drawn(
        nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1, bias=bias), nn.Sigmoid()),
        seed=sum(widths),
    )


def _drawn(decoder: nn.Sequential, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    scales = {f"{i}.weight" for i, layer in enumerate(decoder) if hasattr(layer, "running_mean")}
    decoder = decoder.double()
    with torch.no_grad():
        for name, t in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if t.is_floating_point():
                t.copy_(
                    torch.randn(t.shape, generator=generator, dtype=torch.float64)
                    / max(1, t[0].numel()) ** 0.5
                )
            if name.endswith("running_var") or name in scales:
                t.abs_().add_(0.5)
    return decoder


def outside(case: Case) -> list[Tensors]:
    """Return float32 inputs of a reconstruction with an image in other units, and with one that has a nan."""
    inputs = case.inputs(torch.float32)
    image = inputs["image"].clone()
    image[0, 1, 0, 0] = torch.nan
    return [inputs | {"image": 255 * inputs["image"]}, inputs | {"image": image}]


class _Reconstruction(nn.Module):
    """The op as a module, so that a decoder's parameters can be passed as tensors."""

    def __init__(self, decoder, call):
        super().__init__()
        self.decoder, self.call = decoder, call

    def forward(self, features, image):
        return self.call(features, image, self.decoder)


def _fresh_statistics(held: dict[str, Tensors], like: torch.Tensor) -> Tensors:
    """Return copies of a norm's buffers in the dtype and on the device of ``like``.

    held: the buffers by type of device, "cpu" at first. Each device gets its own once, so that later calls
    wait for no copy and can be captured.
    """
    if like.device.type not in held:
        held[like.device.type] = {k: b.to(like.device) for k, b in held["cpu"].items()}
    dtypes = {torch.float64: like.dtype}
    return {
        k: b.to(like.device, dtypes.get(b.dtype, b.dtype), copy=True)
        for k, b in held[like.device.type].items()
    }


def plain_reconstruction(
    features, image, decoder, interpolate_mode="bilinear", loss="bce", image_mean=None, image_std=None
):
    """Run the decoder layer by layer; without an Upsample, on features resized to the image."""
    if image_mean is not None:
        mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (image_mean, image_std))
        image = (image * std + mean).clamp(0, 1)
    corners = True if interpolate_mode == "bilinear" else None
    if not any(isinstance(layer, nn.Upsample) for layer in decoder):
        features = F.interpolate(features, image.shape[-2:], mode=interpolate_mode, align_corners=corners)
    output = decoder(features)
    return {"bce": F.binary_cross_entropy, "mse": F.mse_loss, "l1": F.l1_loss}[loss](output, image)


def reconstruction(
    N=3, C=5, h=4, w=3, H=9, W=7, K=7, *, bias=True, training=True, norm=None, magnified=1.0, **options
) -> Case:
    """Return a case of `reconstruction_loss`; options as the op takes them."""
    decoder = make_decoder(C, K, bias=bias, **(norm or {})).train(training)
    return _reconstruction(decoder, (N, C, h, w), (H, W), magnified, options)


def doubled(mode: str = "bilinear", align_corners: bool | None = True) -> nn.Upsample:
    return nn.Upsample(scale_factor=2, mode=mode, align_corners=align_corners if mode == "bilinear" else None)


ODD = nn.Upsample((7, 5), mode="bilinear", align_corners=True)


def chain(
    N=3, C=5, h=4, w=3, stages=((None, 1, 7), (ODD, 3, 4)), last=None, size=None, *, bias=True, training=True,
    norm=None, magnified=None,
    **options,
) -> Case:
    """Return a case of `reconstruction_loss` with a chain decoder. size: (H, W) without an Upsample."""
    last = doubled() if last is None and size is None else last
    decoder = make_chain(C, stages, last, bias=bias, **(norm or {})).train(training)
    with torch.no_grad():
        size = size or copy.deepcopy(decoder).eval()(torch.zeros(1, C, h, w, dtype=torch.float64)).shape[-2:]
    return _reconstruction(decoder, (N, C, h, w), size, magnified, options)


def chain_block_sums(multiprocessors: int, C: int, K: int) -> int:
    """Return the bytes of the partial sums in a stage's backward in CUDA C++, from C to K channels.

    Two blocks a multiprocessor each sum the gradients of the weight, of the batch norm in front and, in the
    last stage, of the bias.
    """
    return 4 * 2 * multiprocessors * (9 * C * K + 2 * C + 3)


def _cancellation(
    decoder: nn.Sequential, features: torch.Tensor, image: torch.Tensor, options: dict
) -> float:
    """Return how far the sums over the batch, the batch norms' gradients, cancel: magnitudes over the sum.

    A batch norm makes the sums of the one in front of it cancel. An ulp of a term is worth this many of the
    result.
    """
    decoder, worst = copy.deepcopy(decoder), [1.0]

    def look(layer, _, upstream):
        shift = (
            layer.running_mean
            if layer.running_mean is not None and not layer.training
            else layer.x.mean((0, 2, 3))
        )
        for terms in (upstream[0], upstream[0] * (layer.x - shift.view(1, -1, 1, 1))):
            worst.append((terms.abs().sum((0, 2, 3)).norm() / terms.sum((0, 2, 3)).norm()).item())

    for layer in decoder:
        if hasattr(layer, "running_mean"):
            layer.register_forward_pre_hook(lambda layer, inputs: setattr(layer, "x", inputs[0].detach()))
            layer.register_full_backward_hook(look)
    if len(features):
        plain_reconstruction(features, image, decoder, **options).backward()
    return max(worst)


def _reconstruction(decoder: nn.Sequential, shape, size, magnified: float | None, options: dict) -> Case:
    (N, C, h, w), (H, W) = shape, size
    generator = torch.Generator().manual_seed(N + 3 * C + 5 * h + 7 * w + 11 * H + 13 * W)
    image = torch.rand(N, 3, H, W, generator=generator, dtype=torch.float64)
    if "image_mean" in options:
        mean, std = (image.new_tensor(options[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
        image = (image - mean) / std
    tensors = {"features": torch.randn(N, C, h, w, generator=generator, dtype=torch.float64), "image": image}
    names = {f"decoder.{k}": t.detach() for k, t in decoder.named_parameters()}
    statistics = {f"decoder.{k}": t for k, t in decoder.named_buffers()}
    first = next(iter(names))
    magnified = _cancellation(decoder, *tensors.values(), options) if magnified is None else magnified

    held = {"cpu": statistics}

    def bind(call) -> Loss:
        module = _Reconstruction(decoder, call)

        def loss(t: Tensors) -> torch.Tensor:
            state = {k: t[k] for k in names} | _fresh_statistics(held, t[first])
            return torch.func.functional_call(module, state, (t["features"], t["image"]))

        return loss

    def function(impl: str) -> Loss:
        return bind(
            lambda features, image, decoder: ops.reconstruction_loss(
                features, image, decoder, impl=impl, **options
            )
        )

    def plain(t: Tensors) -> torch.Tensor:
        return bind(
            lambda features, image, decoder: plain_reconstruction(features, image, decoder, **options)
        )(t)

    zero = {}  # a convolution's bias in front of batch statistics
    for i, layer in enumerate(decoder):
        if (
            hasattr(layer, "running_mean")
            and (layer.training or layer.running_mean is None)
            and decoder[i - 1].bias is not None
        ):
            zero[f"decoder.{i - 1}.bias"] = f"decoder.{i - 1}.weight"
    return Case(
        "reconstruction_loss", tensors | names, ("features", *names), function, plain, zero,
        magnified=magnified,
    )


# ------------------------------------------------------------------------------------------------------------
# upsample_conv3x3


def up_conv(N=3, C=5, h=4, w=3, H=9, W=7, K=6, *, bias=True, mode="bilinear", align_corners=False) -> Case:
    """Return a case of `upsample_conv3x3`."""
    generator = torch.Generator().manual_seed(N + 3 * C + 5 * h + 7 * w + 11 * H + 13 * W + 17 * K)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {"x": draw(N, C, h, w), "weight": draw(K, C, 3, 3) / (9 * C) ** 0.5} | (
        {"bias": draw(K)} if bias else {}
    )
    options = dict(mode=mode, align_corners=align_corners)

    def plain(t: Tensors) -> torch.Tensor:
        resized = F.interpolate(
            t["x"], (H, W), mode=mode, align_corners=align_corners if mode == "bilinear" else None
        )
        return F.conv2d(resized, t["weight"], t.get("bias"), padding=1)

    return Case(
        "upsample_conv3x3", tensors, tuple(tensors),
        lambda impl: lambda t: ops.upsample_conv3x3(
            t["x"], t["weight"], t.get("bias"), (H, W), impl=impl, **options
        ), plain, rounded=True,
    )


# ------------------------------------------------------------------------------------------------------------
# supcon_loss


def plain_supcon(features, labels, temperature=0.07, normalize=True, reduction="mean"):
    """The formula with N x N maps.

    The authors' lines take the logarithm of a sum of exponentials, which underflows to 0 for logits far
    apart: nan at temperature 0.005. Elsewhere tests/golden has their values.
    """
    rows = features if features.dim() == 2 else torch.cat(features.unbind(1))
    views = 1 if features.dim() == 2 else features.shape[1]
    labels = labels.repeat(views)
    rows = F.normalize(rows, dim=1) if normalize else rows
    logits = rows @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    log_prob = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positives = ((labels[:, None] == labels) & ~itself).to(rows.dtype)
    loss = -(positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)
    if reduction == "none":
        return loss if features.dim() == 2 else loss.view(views, -1).T
    return loss.mean() if reduction == "mean" else loss.sum()


def supcon(
    N=6, D=7, views=2, classes=3, *, temperature=0.07, normalize=True, reduction="none", size=1.0
) -> Case:
    """Return a case of `supcon_loss`. views=None: (N, D) features. size: magnitude of the rows."""
    generator = torch.Generator().manual_seed(N + 3 * D + 5 * (views or 0) + 7 * classes)
    shape = (N, D) if views is None else (N, views, D)
    features = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (N,), generator=generator)
    options = dict(temperature=temperature, normalize=normalize, reduction=reduction)
    largest = 1.0 if normalize else features.square().sum(-1).max().item()
    return Case(
        "supcon_loss", {"features": features, "labels": labels}, ("features",),
        lambda impl: lambda t: ops.supcon_loss(t["features"], t["labels"], impl=impl, **options),
        lambda t: plain_supcon(t["features"], t["labels"], **options),
        condition=max(1.0, largest / temperature),
    )


# ------------------------------------------------------------------------------------------------------------
# linear_cross_entropy


def linear_ce(
    N=9,
    D=5,
    C=7,
    *,
    bias=True,
    class_weight=True,
    ignored=2,
    ignore_index=-100,
    label_smoothing=0.1,
    reduction="none",
    size=1.0,
    soft=False,
) -> Case:
    """Return a case of `linear_cross_entropy` with ``ignored`` rows and logits of magnitude ``size``.

    soft: the targets are class probabilities, and no row is ignored.
    """
    generator = torch.Generator().manual_seed(N + 3 * D + 5 * C)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    target = torch.randint(C, (N,), generator=generator)
    target[torch.randperm(N, generator=generator)[:ignored]] = ignore_index
    target = (3 * draw(N, C)).softmax(1) if soft else target
    tensors = {"input": draw(N, D), "weight": size * draw(C, D) / max(1, D) ** 0.5, "target": target}
    tensors |= {"bias": size * draw(C)} if bias else {}
    tensors |= {"class_weight": draw(C).abs() + 0.1} if class_weight else {}
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    logits = F.linear(tensors["input"], tensors["weight"], tensors.get("bias"))

    def function(impl: str) -> Loss:
        return lambda t: ops.linear_cross_entropy(
            t["input"],
            t["weight"],
            t["target"],
            bias=t.get("bias"),
            class_weight=t.get("class_weight"),
            impl=impl,
            **options,
        )

    def plain(t: Tensors) -> torch.Tensor:
        return F.cross_entropy(
            F.linear(t["input"], t["weight"], t.get("bias")), t["target"], t.get("class_weight"), **options
        )

    differentiable = tuple(k for k in ("input", "weight", "bias") if k in tensors)
    largest = logits.abs().max().item() if logits.numel() else 1.0
    return Case("linear_cross_entropy", tensors, differentiable, function, plain, condition=max(1.0, largest))


# ------------------------------------------------------------------------------------------------------------
# upsample_cross_entropy


def upsample_ce(
    N=2, C=5, h=3, w=4, H=10, W=19, *, align_corners=False, class_weight=True, ignored=0.2, ignore_index=-100,
    label_smoothing=0.1,
    reduction="none", size=1.0,
) -> Case:
    """Return a case of `upsample_cross_entropy`.

    ignored: the share of pixels, all if 1. size: magnitude of the logits.
    """
    generator = torch.Generator().manual_seed(N + 3 * C + 5 * h + 7 * w + 11 * H + 13 * W)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    target = torch.randint(C, (N, H, W), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = ignore_index
    if 0 < ignored < 1 and target.numel():
        target.view(-1)[0] = C - 1  # the first pixel counts
    tensors = {"logits": size * draw(N, C, h, w), "target": target}
    tensors |= {"class_weight": draw(C).abs() + 0.1} if class_weight else {}
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)

    def function(impl: str) -> Loss:
        return lambda t: ops.upsample_cross_entropy(
            t["logits"],
            t["target"],
            class_weight=t.get("class_weight"),
            align_corners=align_corners,
            impl=impl,
            **options,
        )

    def plain(t: Tensors) -> torch.Tensor:
        resized = F.interpolate(
            t["logits"], t["target"].shape[-2:], mode="bilinear", align_corners=align_corners
        )
        return F.cross_entropy(resized, t["target"].long(), t.get("class_weight"), **options)

    largest = tensors["logits"].abs().max().item() if tensors["logits"].numel() else 1.0
    return Case("upsample_cross_entropy", tensors, ("logits",), function, plain, condition=max(1.0, largest))


# ------------------------------------------------------------------------------------------------------------
# norm_relu_pool


class _Pooled(nn.Module):
    """The op as a module, for the same reason."""

    def __init__(self, bn, call):
        super().__init__()
        self.bn, self.call = bn, call

    def forward(self, x):
        return self.call(x, self.bn)


def norm_pool(N=3, C=5, h=4, w=3, *, training=True, **norm) -> Case:
    """Return a case of `norm_relu_pool`. norm: options of the BatchNorm2d."""
    generator = torch.Generator().manual_seed(N + 3 * C + 5 * h + 7 * w)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    bn = nn.BatchNorm2d(C, **norm).double().train(training)
    for buffer in (bn.running_mean, bn.running_var):
        if buffer is not None:
            buffer.copy_(draw(C).abs() + 0.3)
    tensors = {"x": draw(N, C, h, w) + draw(C, 1, 1)}
    tensors |= {"weight": draw(C), "bias": draw(C)} if bn.affine else {}
    held = {"cpu": {f"bn.{k}": b for k, b in bn.named_buffers()}}

    def bind(call) -> Loss:
        module = _Pooled(bn, call)

        def result(t: Tensors) -> torch.Tensor:
            state = {f"bn.{k}": t[k] for k in ("weight", "bias") if k in t} | _fresh_statistics(held, t["x"])
            return torch.func.functional_call(module, state, (t["x"],))

        return result

    return Case(
        "norm_relu_pool", tensors, tuple(tensors),
        lambda impl: bind(lambda x, bn: ops.norm_relu_pool(x, bn, impl=impl)),
        bind(lambda x, bn: F.relu(bn(x)).mean((2, 3))), rounded=True,
    )


# ------------------------------------------------------------------------------------------------------------
# Memory layouts: the same values, stored differently

LAYOUTS = ("transposed", "slice", "step", "channels_last")


def relayout(t: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``t`` stored another way, as a leaf, and its storage, nan outside ``t``."""
    dims = tuple(reversed(range(t.dim())))
    with torch.no_grad():
        if layout == "contiguous":
            view = base = t.detach().clone()
        elif layout == "channels_last":
            view = base = (
                t.detach().clone(memory_format=torch.channels_last) if t.dim() == 4 else t.detach().clone()
            )
        elif layout == "transposed":
            view = base = t.detach().permute(dims).clone(memory_format=torch.contiguous_format).permute(dims)
        else:
            step = 2 if layout == "step" else 1
            filler = torch.nan if t.is_floating_point() else 10**6
            base = torch.full([step * n + 3 for n in t.shape], filler, dtype=t.dtype)
            view = base[tuple(slice(1, 1 + step * n, step) for n in t.shape)]
            view.copy_(t)
    return view.requires_grad_(t.requires_grad), base


SMALL = {
    "reconstruction_loss": reconstruction, "supcon_loss": supcon, "linear_cross_entropy": linear_ce,
    "norm_relu_pool": norm_pool,
    "upsample_cross_entropy": upsample_ce, "upsample_conv3x3": up_conv,
}
FORMS = SMALL | {
    "reconstruction_loss, chain": chain,
    "linear_cross_entropy, soft": lambda *sizes, **options: linear_ce(*sizes, **options, soft=True),
}  # forms with kernels of their own, too
