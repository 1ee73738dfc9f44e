"""The paper's larger networks: published cuts, the authors' names and layers, any boundary, taps."""

from __future__ import annotations

import copy
import functools
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast import planning
from infopro_fast.memory import measure_step
from infopro_fast.modules import LocalNetwork, Stage, cityscapes, densenet, split
from infopro_fast.modules.decoder import ChainDecoder
from infopro_fast.modules.families import ARCHS, SMALL, family
from infopro_fast.modules.imagenet import StridedHead
from infopro_fast.modules.segmentation import IGNORE, PixelClassifier, Tap, pixel_loss
from tests import compare, golden

torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).resolve().parents[1]
TERMS = ("reconstruction", "softmax", "softmax_correct")


def meta(*args, **kwargs):
    """Build on the meta device, for shapes and names alone."""
    with torch.device("meta"):
        return infopro_fast.build(*args, impl="reference", **kwargs)


def shapes(net) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in net.released_state_dict().items()}


@pytest.mark.parametrize(
    "arch, ends", [("resnet101", "layer2.0."), ("resnet152", "layer2.5."), ("resnext101_32x8d", "layer2.2.")]
)
@pytest.mark.fast(1)
def test_imagenet_networks_as_released(arch, ends):
    """The published cut, torchvision's names, and the authors' names of decoder and head."""
    net = meta(arch, 2, "softmax")
    assert dict(net.released_modules())[ends] is net.stages[0][-1] and net.cuts == split.PUBLISHED[arch, 2]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)().state_dict()
    own = shapes(net)
    backbone = {name: shape for name, shape in own.items() if not name.startswith(("decoder.", "head."))}
    assert backbone == {name: tuple(t.shape) for name, t in theirs.items()}
    weights = {
        name: shape
        for name, shape in own.items()
        if name.startswith(("decoder.", "head.")) and name.endswith("weight")
    }
    assert weights == {
        "decoder.decoder.0.weight": (128, 512, 1, 1), "decoder.decoder.1.weight": (128,),
        "decoder.decoder.4.weight": (32, 128, 3, 3), "decoder.decoder.5.weight": (32,),
        "decoder.decoder.8.weight": (12, 32, 3, 3), "decoder.decoder.9.weight": (12,),
        "decoder.decoder.12.weight": (3, 12, 3, 3),
        "head.0.weight": (128, 512, 1, 1), "head.1.weight": (128,),
        "head.3.weight": (256, 128, 3, 3), "head.4.weight": (256,),
        "head.6.weight": (512, 256, 3, 3), "head.7.weight": (512,),
        "head.9.weight": (2048, 512, 1, 1), "head.10.weight": (2048,),
        "head.14.weight": (1000, 2048),
    }
    assert "decoder.decoder.0.bias" in own and "head.0.bias" not in own and "head.14.bias" in own
    loss = net.local_losses[0]
    assert (loss.reconstruction_weight, loss.task_weight) == (5, 1 if arch == "resnet152" else 0.75)
    released = {
        f"module.{name}": torch.empty(shape, device="meta") for name, shape in own.items()
    }  # DDP's names
    net.load_released_state_dict(released)


def test_the_step_of_a_large_network_takes_shapes_alone():
    for arch, size in (("resnet50", 64), ("resnext50_32x4d", 96)):
        net = meta(arch, 4, "softmax", lambdas=(1, 1, 1, 1), image_size=size)
        trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
        metrics = trainer.step(
            torch.zeros(2, 3, size, size, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
        )
        assert list(metrics) == [
            *(f"module{k}/{term}" for k in (1, 2, 3) for term in TERMS), "loss", "correct",
        ]
        names = set(shapes(net))
        assert any(name.startswith("decoder_") for name in names) and not any(
            name.startswith("decoder.") for name in names
        )


def saved_bytes(arch: str, batch_size: int, size: tuple[int, int], modules: int) -> list[int]:
    """Return what autograd keeps for each module of the published split, from a step without values."""
    local_loss = "none" if modules == 1 else "softmax"
    with planning.FakeTensorMode(allow_non_fake_inputs=True):
        net = planning.build_fake(lambda: infopro_fast.build(arch, modules, local_loss, image_size=size))
        trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
        batch = planning.fake_batch(batch_size, size, size if net.classifier.dense else ())
        return [module.saved for module in measure_step(trainer, *batch).modules]


@pytest.mark.parametrize(
    "arch, batch_size, size, bar",
    [("resnet101", 4, (224, 224), 0.62), ("deeplabv3_resnet101", 1, (512, 1024), 0.55)],
)
@pytest.mark.fast(1)
def test_saved_bytes(arch, batch_size, size, bar):
    """At the paper's sizes K = 2 keeps at most 62 % (ResNet-101) or 55 % (DeepLabV3) of end to end."""
    (whole,) = saved_bytes(arch, batch_size, size, 1)
    local = saved_bytes(arch, batch_size, size, 2)
    assert len(local) == 2 and 0 < min(local) and max(local) <= bar * whole, (local, whole)


EVERYWHERE = {
    "resnet50": 64,
    "resnet101": 64,
    "resnext101_32x8d": 64,
    "densenet_bc_100_12": 32,
    "deeplabv3_resnet101": (64, 128),
}


@functools.cache
def places(arch) -> list[tuple[tuple[int, int], int, tuple[int, int]]]:
    """(stage, block), channels and size of the output of every unit that a module can end with."""
    options = dict(image_mean=None, image_std=None, label_smoothing=0.0, impl="reference")
    with torch.device("meta"):
        found = family(arch, None, EVERYWHERE[arch], **options)
    ends = (
        [unit.position for unit in found.units].index((3, 22))
        if arch in cityscapes.ARCHS
        else len(found.units) - 1
    )
    return [(unit.position, unit.channels, found.size(unit)) for unit in found.units[:ends]]


def step_of_shapes(arch, cuts) -> tuple[LocalNetwork, list[str], list[torch.Size]]:
    """Return a network, and from a step on the meta device the metrics' names and the outputs' shapes."""
    size = EVERYWHERE[arch]
    H, W = size if isinstance(size, tuple) else (size, size)
    net = meta(arch, cuts=cuts, local_loss="softmax", lambdas=(1, 1, 1, 1), image_size=size)
    found = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, args, out: found.append(out.shape))
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
    label = torch.zeros(2, *((H, W) if net.classifier.dense else ()), dtype=torch.long, device="meta")
    return net, list(trainer.step(torch.zeros(2, 3, H, W, device="meta"), label)), found


def check_shapes(arch, boundaries) -> None:
    """Cut at these boundaries: every module trains, and the auxiliary nets fit its output."""
    net, metrics, shapes_found = step_of_shapes(arch, [position for position, _, _ in boundaries])
    assert metrics == [
        *(f"module{k}/{name}" for k in range(1, len(boundaries) + 1) for name in TERMS),
        "loss",
        "correct",
    ]
    for (position, channels, size), shape, local_loss in zip(boundaries, shapes_found, net.local_losses):
        assert shape == (2, channels, *size), position
        if isinstance(local_loss.decoder, ChainDecoder):
            size = EVERYWHERE[arch] if isinstance(EVERYWHERE[arch], tuple) else (EVERYWHERE[arch],) * 2
            assert local_loss.decoder.decoder(torch.empty(shape, device="meta")).shape == (2, 3, *size), (
                position
            )
    assert len(shapes(net)) == len(net.state_dict())  # no two tensors under one name


@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.slow
def test_every_boundary_at_once(arch):
    """As many modules as there are blocks, DeepLab's up to the one whose output its auxiliary head reads."""
    check_shapes(arch, places(arch))


STAGES = {
    arch: 4 if arch in (*densenet.ARCHS, *cityscapes.ARCHS) else 5 for arch in EVERYWHERE
}  # that a module can end in


@pytest.mark.parametrize(
    "arch, stage", [(arch, stage) for arch in EVERYWHERE for stage in range(STAGES[arch])]
)
@pytest.mark.fast(3)
def test_two_modules_at_boundaries(arch, stage):
    """K = 2 at every boundary of ResNet-50, and at the first and last of each stage of the others."""
    here = [place for place in places(arch) if place[0][0] == stage]
    for boundary in here if arch == "resnet50" else here[:1] + here[1:][-1:]:
        check_shapes(arch, [boundary])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9, 16, 32])
@pytest.mark.parametrize("channels", [3, 64])
def test_auxiliary_nets_fit_any_boundary(size, channels):
    """Any width and size of features: the decoder ends at the image's size, the head in the classes."""
    features = torch.randn(2, channels, size, 2 * size)
    image, label = torch.rand(2, 3, 32, 64), torch.tensor([0, 1])
    decoder = ChainDecoder(channels, (size, 2 * size), (32, 64))
    assert decoder.decoder(features).shape == image.shape
    assert decoder(features, image).dim() == 0
    if size > 1:
        head = StridedHead(channels, (size, 2 * size), 5)
        loss, correct = head.loss_and_correct(features, label)
        assert loss.dim() == 0 and 0 <= correct <= 2 and head.head[-1].out_features == 5


@pytest.mark.parametrize("case", golden.cases("chain_decoder"), ids=lambda case: case["kind"])
def test_chain_decoder_is_the_released_one(case):
    """Loss, gradients and running statistics equal those of the authors' decoders."""
    channels, (h, w), N = case["channels"], case["h_size"], case["batch"]
    decoder = ChainDecoder(channels, (h, w), (8 * h, 8 * w)).double()
    golden.fill_parameters(decoder.decoder.state_dict())
    features = golden.features(N, channels, h, w).requires_grad_()
    loss = decoder(features, golden.image(N, 8 * h, 8 * w))
    loss.backward()
    compare.assert_golden("loss", loss, case["loss"])
    compare.assert_golden("h", features.grad, case["grad_h"])
    for name, p in decoder.decoder.named_parameters():
        compare.assert_golden(name, p.grad, case["grads"][name])
    for name, buffer in decoder.decoder.named_buffers():
        if not name.endswith("num_batches_tracked"):
            compare.assert_golden(name, buffer, case["buffers"][name])


@pytest.mark.parametrize(
    "case",
    golden.cases("upsample_cross_entropy"),
    ids=lambda case: f"{case['classes']}-{case['align_corners']}",
)
def test_pixel_loss_is_the_released_one(case):
    N, C, (h, w), (H, W) = case["batch"], case["classes"], case["h_size"], case["size"]
    logits = golden.wave((N, C, h, w), 31, 3.0).requires_grad_()
    label = golden.labels(N * H * W, C).clone()
    label[:: case["ignore_every"]] = IGNORE
    loss, _ = pixel_loss(logits, label.view(N, H, W), align_corners=case["align_corners"])
    loss.backward()
    compare.assert_golden("loss", loss, case["loss"])
    compare.assert_golden("logits", logits.grad, case["grad"])


def patched(source: str, diff: str) -> str:
    """Return ``source`` after ``diff``, whose hunks (separated by @@) must each fit in one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kind) for kind in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_diff_of_a_released_style_script(tmp_path, capsys):
    """README's three lines: the script and what they make of it print the same losses and end in the same
    weights and buffers.

    In float64, where nothing but a wrong formula could part them. In float32 rounding does, step by step, in
    the part of the network that no line was changed in too: there the ops may be as far from the float64 run
    as plain torch is, within the usual factor.
    """
    script = (ROOT / "tests/released_style/imagenet.py").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [sum(line.startswith(sign) for line in diff.splitlines()) for sign in "-+"] == [3, 3]

    def trained(source: str, dtype: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        names = {"__name__": "imagenet"}
        exec(compile(source, "imagenet.py", "exec"), names)
        names["main"](["--steps", "3", "--dtype", dtype, "--out", str(tmp_path / "state.pt")])
        losses = [float(number) for number in re.findall(r"loss (\S+?)(?:,|\n)", capsys.readouterr().out)]
        assert len(losses) == 6
        return torch.tensor(losses, dtype=torch.float64), torch.load(tmp_path / "state.pt")

    (losses, plain), (losses_here, here) = (
        trained(script, "float64"),
        trained(patched(script, diff), "float64"),
    )
    compare.assert_close(losses_here, losses)
    assert list(here) == list(plain) and sum("running_var" in name for name in here) > 20
    for name, value in plain.items():
        compare.assert_close(here[name].double(), value.double())

    def distance(source: str) -> float:
        _, state = trained(source, "float32")
        return (
            sum((state[name].double() - value.double()).square().sum() for name, value in plain.items())
            .sqrt()
            .item()
        )

    assert 0 < distance(patched(script, diff)) <= compare.TIMES_PLAIN * distance(script)


def test_densenet():
    """0.77 M parameters (Huang et al. 2017, DenseNet-BC-100-12); 99 convolutions and the classifier."""
    net = infopro_fast.build("densenet_bc_100_12", 1, "none")
    assert 0.76e6 < sum(p.numel() for p in net.parameters()) < 0.78e6
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 99
    channels = [unit.channels for unit in densenet.units("densenet_bc_100_12")]
    assert channels[0] == 24 and channels[17] == 108 and channels[-1] == 342
    net = infopro_fast.build("densenet_bc_100_12", 4, "contrast", lambdas=(1, 1, 1, 1), image_size=8)
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
    infopro_fast.trainer.check_finite(trainer.step(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))
    assert net.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 10)


# ------------------------------------------------------------------------------------------------------------
# Segmentation


def test_deeplab_as_released():
    """mmsegmentation's names, the FCN head inside the last module, strides and dilations of D8."""
    net = meta("deeplabv3_resnet101", 2, "softmax", image_size=(64, 128))
    assert net.cuts == ((3, 12),)
    own = shapes(net)
    for name, shape in {
        "backbone.stem.0.weight": (32, 3, 3, 3), "backbone.stem.6.weight": (64, 32, 3, 3),
        "backbone.layer3.22.conv2.weight": (256, 256, 3, 3), "decode_head.conv_seg.bias": (19,),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "decode_head.image_pool.1.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.0.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.3.conv.weight": (512, 2048, 3, 3),
        "decode_head.bottleneck.bn.weight": (512,), "auxiliary_head.convs.0.conv.weight": (256, 1024, 3, 3),
        "auxiliary_head.conv_seg.weight": (19, 256, 1, 1), "decoder_inter.0.weight": (128, 1024, 1, 1),
        "decoder_inter.12.bias": (3,),
        "head_inter.0.weight": (512, 1024, 3, 3), "head_inter.4.weight": (19, 512, 1, 1),
    }.items():
        assert own[name] == shape, name
    assert len(own) == len(net.state_dict())
    third, fourth = (
        [m for unit in net.stages[1] for m in unit.modules() if isinstance(m, nn.Conv2d)][i] for i in (1, -2)
    )
    assert third.dilation == (2, 2) and fourth.dilation == (4, 4)
    assert net(torch.zeros(2, 3, 64, 128, device="meta")).shape == (2, 19, 8, 16)
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
    label = torch.zeros(2, 64, 128, dtype=torch.uint8, device="meta")
    metrics = trainer.step(torch.zeros(2, 3, 64, 128, device="meta"), label)
    assert list(metrics) == [
        "module1/reconstruction",
        "module1/softmax",
        "module1/softmax_correct",
        "loss",
        "correct",
    ]


def test_deeplab_keeps_its_auxiliary_head():
    """A cut that leaves the FCN head no block of the last module to train is an error."""
    options = {"local_loss": "softmax", "image_size": (64, 128), "lambdas": (1, 1, 1, 1)}
    assert "auxiliary_head.conv_seg.weight" in shapes(
        meta("deeplabv3_resnet101", cuts=["layer3.21"], **options)
    )
    message = (
        r"modules, cuts: the auxiliary FCN head of deeplabv3_resnet101 reads the output of \(3, 22\), .* got "
    )
    for cut, at in (("layer3.22", r"\(3, 22\)"), ("tap", r"\(3, 23\)"), ("layer4.0", r"\(4, 0\)")):
        with pytest.raises(ValueError, match=message + at):
            meta("deeplabv3_resnet101", cuts=[cut], **options)
    with pytest.raises(ValueError, match=message + r"\(4, 1\)"):
        meta("deeplabv3_resnet101", 35, **options)
    with pytest.raises(ValueError, match=r"deeplabv3_resnet50 reads the output of \(3, 5\), .* got \(3, 5\)"):
        meta("deeplabv3_resnet50", cuts=["layer3.5"], **options)


@pytest.mark.parametrize("recompute", ["none", "block", "sqrt"])
def test_a_tap_is_end_to_end_training(recompute):
    """Gradients of a chain with a head in its middle: those of the sum of both losses in one graph."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.Conv2d(4, 4, 3, padding=1),
        Tap(),
        nn.Conv2d(4, 5, 1),
    ]
    head = nn.Conv2d(4, 5, 1)
    stage = Stage(OrderedDict((str(i), block) for i, block in enumerate(blocks)), recompute)
    end = PixelClassifier(nn.Identity(), 5, (blocks[2], head, 0.4))
    net = LocalNetwork([stage], [end], [], [""] * 4).double()
    image, label = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randint(5, (2, 16, 16))
    twin, twin_head = copy.deepcopy(nn.Sequential(*blocks)), copy.deepcopy(head)
    middle = twin[1](twin[0](image))
    loss = pixel_loss(twin[3](middle), label, align_corners=False)[0]
    (loss + 0.4 * pixel_loss(twin_head(middle), label, align_corners=False)[0]).backward()
    found: dict[nn.Parameter, torch.Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            found.update((p, p.grad.clone()) for group in self.param_groups for p in group["params"])

    infopro_fast.LocalTrainer(net, lambda params: Recorder(params, lr=0.1)).step(image, label)
    for p, q in zip(
        [*nn.Sequential(*blocks).parameters(), *head.parameters()],
        [*twin.parameters(), *twin_head.parameters()],
        strict=True,
    ):
        compare.assert_close(found[p], q.grad)
    assert blocks[2].leaf is None


def test_pixel_loss():
    """Mean over labelled pixels, share of right ones times N; without labels, zeros and zero gradients."""
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    label = torch.randint(4, (2, 15, 17), dtype=torch.uint8)
    label[0, :4], label[1, :, 3] = IGNORE, IGNORE
    for corners in (True, False):
        loss, correct = pixel_loss(logits, label, align_corners=corners)
        full = F.interpolate(logits, (15, 17), mode="bilinear", align_corners=corners)
        valid = label != IGNORE
        expected = F.cross_entropy(full.permute(0, 2, 3, 1)[valid], label[valid].long())
        compare.assert_close(loss, expected)
        compare.assert_close(
            correct.double(), 2 * (full.argmax(1)[valid] == label[valid]).double().mean(), dtype=torch.float32
        )
    loss, correct = pixel_loss(logits, torch.full((2, 15, 17), IGNORE), align_corners=False)
    loss.backward()
    assert loss == 0 and correct == 0 and (logits.grad == 0).all()


def test_small_segmentation_network():
    net = infopro_fast.build("fcn_resnet20", 3, "softmax", lambdas=(1, 1, 1, 1))
    image, label = torch.randn(2, 3, 64, 64), torch.randint(11, (2, 64, 64), dtype=torch.uint8)
    trainer = infopro_fast.LocalTrainer(net, lambda params: torch.optim.SGD(params, lr=0.1))
    infopro_fast.trainer.check_finite(trainer.step(image, label))
    assert net.eval()(image).shape == (2, 11, 32, 32)
    assert net.stages[-1].layer3_2.conv2.dilation == (2, 2)
    for loss in ("contrast", "dgl"):
        with pytest.raises(
            ValueError, match="fcn_resnet20 segments images: expected 'softmax', 'greedy' or 'none'"
        ):
            infopro_fast.build("fcn_resnet20", 3, loss)
    assert set(SMALL) < set(ARCHS)
