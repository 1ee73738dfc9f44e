"""Decoder, AuxClassifier, SupConLoss and DGLHead: the authors' values and names, and clear errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infopro_fast import ops
from infopro_fast.modules import AuxClassifier, Decoder, DGLHead, SupConLoss
from infopro_fast.modules.heads import CONFIGS
from tests import compare, golden


def _id(case: dict) -> str:
    return "-".join(
        str(case[k]) for k in ("channels", "h_size", "mode", "widen", "net_config", "loss_mode") if k in case
    )


def _results(
    module: nn.Module, case: dict, target: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return loss, gradients and running statistics of one step on the golden inputs, by golden name."""
    golden.fill_parameters(module.to(dtype).state_dict())
    h = (
        golden.features(case["batch"], case["channels"], case["h_size"], case["h_size"])
        .to(dtype)
        .requires_grad_()
    )
    loss = module(h, target)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    statistics = {
        name: buffer for name, buffer in module.named_buffers() if not name.endswith("num_batches_tracked")
    }
    assert gradients.keys() == case["grads"].keys() and statistics.keys() == case["buffers"].keys()
    return {"loss": loss.detach(), "h": h.grad, **gradients, **statistics}


def _terms(module: AuxClassifier, case: dict, target: torch.Tensor) -> dict[str, float]:
    """Return the sums of magnitudes behind gradients that are sums over rows and positions."""
    golden.fill_parameters(module.double().state_dict())
    found: dict[str, float] = {}

    def watch(name, layer):
        def on_grad(grad):
            size = grad.abs().sum([d for d in range(grad.dim()) if d != 1]).norm().item()
            found.update((f"{name}.{p}", size) for p, value in layer.named_parameters() if value.dim() == 1)

        layer.register_forward_hook(lambda _layer, _inputs, out: out.register_hook(on_grad) and None)

    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.BatchNorm2d)):
            watch(name, layer)
    out = module.head(
        golden.features(case["batch"], case["channels"], case["h_size"], case["h_size"])
    )  # layer by layer
    loss = (
        ops.supcon_loss(out, target, impl="reference")
        if case["loss_mode"] == "contrast"
        else F.cross_entropy(out, target)
    )
    loss.backward()
    return found


def _check_golden(make, case: dict, target: torch.Tensor, impl: str, dtype: torch.dtype) -> None:
    """make(impl): the case's module. Only kernels are tested in float32: the reference is plain torch."""
    found, plain, terms = _results(make(impl), case, target, dtype), {}, {}
    if dtype == torch.float32:
        plain = _results(make("reference"), case, target, dtype)
        terms = _terms(make("reference"), case, target) if case["op"] == "aux_classifier" else {}
    expected = {"h": case["grad_h"], **case["grads"], **case["buffers"]}
    compare.assert_golden("loss", found["loss"], case["loss"], dtype)
    for name, digest in expected.items():
        compare.assert_golden(
            name, found[name], digest, dtype, plain=plain.get(name), terms=terms.get(name, 0.0)
        )


@pytest.mark.parametrize("case", golden.cases("cifar_decoder"), ids=_id)
def test_decoder_golden(case, impl):
    _check_decoder(case, impl, torch.float64)


@pytest.mark.parametrize("case", golden.cases("cifar_decoder"), ids=_id)
def test_decoder_golden_float32(case, cpu):
    _check_decoder(case, cpu, torch.float32)


def _check_decoder(case, impl, dtype):
    def make(impl):
        return Decoder(
            case["channels"],
            case["image_size"],
            interpolate_mode=case["mode"],
            widen=case["widen"],
            impl=impl,
        )

    image = golden.image(case["batch"], case["image_size"], case["image_size"])
    _check_golden(make, case, image.to(dtype), impl, dtype)


@pytest.mark.parametrize("case", golden.cases("aux_classifier"), ids=_id)
def test_aux_classifier_golden(case, impl):
    _check_aux_classifier(case, impl, torch.float64)


@pytest.mark.parametrize("case", golden.cases("aux_classifier"), ids=_id)
def test_aux_classifier_golden_float32(case, cpu):
    _check_aux_classifier(case, cpu, torch.float32)


def _check_aux_classifier(case, impl, dtype):
    def make(impl):
        return AuxClassifier(
            case["channels"],
            case["net_config"],
            case["loss_mode"],
            case["class_num"],
            1,
            case["feature_dim"],
            impl=impl,
        )

    _check_golden(make, case, golden.labels(case["batch"], case["class_num"]), impl, dtype)


def test_decoder_restores_a_normalised_image():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    image, h = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 6, 4, 4, dtype=torch.float64)
    plain = Decoder(6, 8, impl="reference").double()
    restoring = Decoder(6, 8, image_mean=mean, image_std=std, impl="reference").double()
    restoring.load_state_dict(plain.state_dict())
    normalised = (image - image.new_tensor(mean).view(1, 3, 1, 1)) / image.new_tensor(std).view(1, 3, 1, 1)
    compare.assert_close(restoring(h, normalised), plain(h, image).detach())


def test_decoder_refuses_an_image_of_another_size():
    with pytest.raises(ValueError, match=r"Decoder: image: expected \(N, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        Decoder(16, 32)(torch.zeros(2, 16, 8, 8), torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("widen, hidden", [(1, 12), (2, 24), (0.5, 6)])
def test_decoder_widen(widen, hidden):
    state = Decoder(16, 32, widen=widen).state_dict()
    assert state["decoder.0.weight"].shape == (hidden, 16, 3, 3) and state["decoder.3.weight"].shape == (
        3,
        hidden,
        3,
        3,
    )


@pytest.mark.parametrize("net_config", CONFIGS)
@pytest.mark.parametrize(
    "inplanes, out", [(16, (32, 2)), (32, (64, 2)), (64, (64, 1)), (7, (14, 2)), (96, (96, 1))]
)
def test_aux_classifier_takes_any_inplanes(net_config, inplanes, out):
    module = AuxClassifier(
        inplanes, net_config, "cross_entropy", class_num=5, widen=2, feature_dim=24, impl="reference"
    )
    convs = [layer for layer in module.head if isinstance(layer, nn.Conv2d)]
    linears = [layer for layer in module.head if isinstance(layer, nn.Linear)]
    assert (len(convs), len(linears)) == (int(net_config[0]), int(net_config[2]))
    if convs:
        assert (convs[0].out_channels, convs[0].stride[0]) == (2 * out[0], out[1])
    assert linears[-1].out_features == 5 and all(layer.out_features == 48 for layer in linears[:-1])
    assert module(torch.randn(3, inplanes, 6, 5), torch.tensor([0, 1, 4])).isfinite()


def test_aux_classifier_counts_correct_in_the_same_pass(impl):
    module = AuxClassifier(16, loss_mode="cross_entropy", impl=impl)
    h, target = torch.randn(20, 16, 8, 8), torch.randint(0, 10, (20,))
    with torch.no_grad():
        loss, correct = module.loss_and_correct(h, target)
        logits = module.head(h)
    assert correct.dtype == torch.int64 and correct.item() == (logits.argmax(1) == target).sum().item()
    compare.assert_close(loss, F.cross_entropy(logits.double(), target))
    assert AuxClassifier(16).loss_and_correct(h, target)[1] is None


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"net_config": "3c1f"}, "net_config: expected one of"),
        ({"loss_mode": "l2"}, "loss_mode: expected one of"),
        ({"widen": 0}, "widen: expected a positive"),
        ({"class_num": 0}, "class_num: expected at least 1"),
    ],
)
def test_aux_classifier_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"AuxClassifier: {message}"):
        AuxClassifier(16, **kwargs)


def test_no_feature_dim_where_there_are_no_features():
    """The authors' command line has 0 as its default."""
    with_default, without = (AuxClassifier(16, "1c1f", "cross_entropy", feature_dim=n) for n in (128, 0))
    assert [p.shape for p in without.parameters()] == [p.shape for p in with_default.parameters()]
    for wrong in (dict(loss_mode="contrast"), dict(net_config="1c2f", loss_mode="cross_entropy")):
        with pytest.raises(ValueError, match="AuxClassifier: feature_dim: expected at least 1, got 0"):
            AuxClassifier(16, feature_dim=0, **({"net_config": "1c1f"} | wrong))


# ------------------------------------------------------------------------------------------------------------
# SupConLoss: against the formula of Khosla et al. written out pair by pair


def _pairwise_supcon(z: torch.Tensor, labels, temperature: float) -> torch.Tensor:
    """Return the loss by definition, anchor by anchor. z: (N, views, D); labels: N comparable values."""
    rows = [(z[n, v], labels[n]) for n in range(z.shape[0]) for v in range(z.shape[1])]
    losses = []
    for i, (a, label) in enumerate(rows):
        scores = torch.stack([a @ b / temperature for j, (b, _) in enumerate(rows) if j != i])
        positive = torch.tensor([other == label for j, (_, other) in enumerate(rows) if j != i])
        log_prob = scores - scores.logsumexp(0)
        losses.append(-log_prob[positive].mean() if positive.any() else scores.sum() * 0)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("labels", [None, (0, 1, 0, 2, 1)])
def test_supcon_loss_is_the_definition(views, labels, impl):
    z = F.normalize(torch.randn(5, views, 6, dtype=torch.float64), dim=2)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    criterion = SupConLoss(temperature=0.2, base_temperature=0.1, impl=impl)
    loss = criterion(ours, labels if labels is None else torch.tensor(labels))
    expected = 2 * _pairwise_supcon(theirs, labels or range(5), 0.2)
    compare.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    compare.assert_close(ours.grad, theirs.grad, scale=max(1.0, theirs.grad.abs().max().item()))


def test_supcon_loss_takes_features_as_they_are():
    z = torch.randn(4, 2, 3, dtype=torch.float64)  # not of length 1
    labels = torch.tensor([[0], [1], [0], [1]])
    loss = SupConLoss(1.0, base_temperature=1.0, impl="reference")
    compare.assert_close(loss(z, labels), _pairwise_supcon(z, labels.flatten().tolist(), 1.0))
    compare.assert_close(
        loss(z, labels, temperature=0.5), 0.5 * _pairwise_supcon(z, labels.flatten().tolist(), 0.5)
    )
    compare.assert_close(loss(z.view(4, 2, 3, 1), labels), loss(z, labels))


def test_supcon_loss_in_the_authors_order(impl):
    """Their losses.py has (contrast_mode, base_temperature) and (features, labels, temperature, mask)."""
    z = F.normalize(torch.randn(5, 2, 6, dtype=torch.float64), dim=2)
    labels = torch.tensor([0, 1, 0, 2, 1])
    expected = 2 * _pairwise_supcon(z, labels.tolist(), 0.2)
    for criterion in (SupConLoss("all", 0.1, impl=impl), SupConLoss(base_temperature=0.1, impl=impl)):
        compare.assert_close(criterion(z, labels, 0.2), expected)
        compare.assert_close(criterion(z, labels, 0.2, None), expected)
        compare.assert_close(criterion(z, labels[:, None].double() - 1.5, None, 0.2), expected)
    signs = torch.tensor([0.0, 1.0, -0.0, 2.0, 1.0])
    compare.assert_close(SupConLoss("all", 0.1, impl=impl)(z, signs, 0.2), expected)


@pytest.mark.parametrize("mode", ("all", "one"))
def test_supcon_loss_of_a_mask_and_of_the_first_views(mode):
    """SupContrast's own lines, in which the anchors are all views or the first."""
    z = F.normalize(torch.randn(5, 3, 6, dtype=torch.float64), dim=2)
    labels = torch.tensor([0, 1, 0, 2, 1])
    mask = (labels[:, None] == labels).double()
    uneven = torch.rand(5, 5, dtype=torch.float64) * mask
    for given, weights in ((dict(labels=labels), mask), (dict(mask=mask), mask), (dict(mask=uneven), uneven)):
        rows = torch.cat(z.unbind(1))
        anchors, count = (rows, 3) if mode == "all" else (z[:, 0], 1)
        logits = anchors @ rows.T / 0.2
        others = 1 - torch.eye(15, dtype=torch.float64)[: len(anchors)]
        positives = weights.repeat(count, 3) * others
        log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        expected = -(0.2 / 0.1) * ((positives * log_prob).sum(1) / positives.sum(1)).mean()
        compare.assert_close(SupConLoss(0.2, mode, 0.1)(z, **given), expected)


def test_supcon_loss_errors():
    z = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="SupConLoss: contrast_mode: expected 'all' or 'one', got 'few'"):
        SupConLoss(contrast_mode="few")
    with pytest.raises(ValueError, match=r"SupConLoss: mask: expected \(4, 4\), got \(3, 3\)"):
        SupConLoss()(z, mask=torch.eye(3))
    with pytest.raises(ValueError, match="SupConLoss: labels, mask: expected one or the other, got both"):
        SupConLoss()(z, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="SupConLoss: mask: impl='cpu' takes labels alone"):
        SupConLoss(impl="cpu")(z, mask=torch.eye(4))
    with pytest.raises(ValueError, match=r"SupConLoss: features: expected \(N, views, ...\), got \(4, 3\)"):
        SupConLoss()(z[:, 0])
    with pytest.raises(ValueError, match="SupConLoss: labels: expected"):
        SupConLoss()(z, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="SupConLoss: temperature"):
        SupConLoss(temperature=0)


# ------------------------------------------------------------------------------------------------------------
# DGLHead: against its layers written out


def test_dgl_head_is_the_published_one(impl):
    torch.manual_seed(1)
    head = DGLHead(8, 10, class_num=4, impl=impl).double()
    p = dict(head.named_parameters())
    h, target = torch.randn(6, 8, 10, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])

    def norm(x, weight, bias):
        shape = [1, -1] + [1] * (x.dim() - 2)
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)

    x = F.adaptive_avg_pool2d(h, 3)  # ceil(10 / 4)
    for i in (1, 4, 7):
        assert f"head.{i}.bias" not in p
        x = norm(
            F.conv2d(x, p[f"head.{i}.weight"]), p[f"head.{i + 1}.weight"], p[f"head.{i + 1}.bias"]
        ).relu()
    x = F.adaptive_avg_pool2d(x, 2).flatten(1)
    for i in (12, 15, 18):
        x = norm(
            F.linear(x, p[f"head.{i}.weight"], p[f"head.{i}.bias"]),
            p[f"head.{i + 1}.weight"],
            p[f"head.{i + 1}.bias"],
        ).relu()
    logits = F.linear(x, p["head.21.weight"], p["head.21.bias"])
    loss, correct = head.loss_and_correct(h, target)
    compare.assert_close(loss, F.cross_entropy(logits, target))
    assert correct.item() == (logits.argmax(1) == target).sum().item() and len(p) == 3 * 3 + 3 * 4 + 2
