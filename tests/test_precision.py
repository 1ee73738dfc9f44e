"""Autocast, a gradient scaler a module, and what needs a GPU and says so where there is none."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import infopro_fast
from infopro_fast.data.prefetch import prefetch
from infopro_fast.errors import ConfigError
from infopro_fast.modules import Stage
from infopro_fast.modules.segmentation import PixelClassifier, Tap, dense_head
from infopro_fast.trainer import released_sgd
from infopro_fast.trainer.cuda_graph import WARM_UP, GraphedStep, with_tensor_learning_rates
from infopro_fast.trainer.settings.config import TrainConfig
from tests import compare

AMP = (torch.bfloat16, torch.float16)


def _batch(N=16):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 3, 32, 32, generator=generator), torch.randint(10, (N,), generator=generator)


def _trainer(modules=3, **options):
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", modules, "contrast", cuts=[(1, 1), (2, 1)], lambdas=(5, 0.5, 0.5, 1))
    return infopro_fast.LocalTrainer(net, released_sgd(lr=0.02), **options)


@pytest.mark.parametrize("amp", AMP)
@pytest.mark.fast(1)
def test_autocast_rounds_activations_and_nothing_that_stays(amp):
    plain, rounded = _trainer(), _trainer(amp=amp)
    image, label = _batch()
    start, seen = _parameters(plain), []
    for stage in rounded.net.stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    expected, found = plain.step(image, label), rounded.step(image, label)
    assert seen == [amp] * 3
    assert all(p.dtype == torch.float32 for p in rounded.net.parameters())
    for name, value in expected.items():
        if value.is_floating_point():
            assert found[name].dtype == torch.float32
            assert compare.relative_error(found[name], value) < 0.05, name
    off = compare.relative_error(_parameters(rounded) - start, _parameters(plain) - start)
    assert 1e-4 < off < 0.2, f"rounding shows, but the update is the same: off by {off}"


def _parameters(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()]).clone()


# --------------------------------------------------------------------------------------------------------
# Networks with ChainDecoder, StridedHead, DenseHead and Tap


def _segmenter():
    return infopro_fast.build("fcn_resnet20", 3, "softmax", lambdas=(1, 1, 1, 1), image_size=32)


def _segmenter_with_tap():
    """A second head inside the last module, as DeepLab's FCN head."""
    net = infopro_fast.build("fcn_resnet20", 2, "softmax", lambdas=(1, 1, 1, 1), image_size=32)
    blocks, tap = list(net.stages[1].named_children()), Tap()
    net.stages[1] = Stage(OrderedDict([*blocks[:-1], ("tap", tap), blocks[-1]]))
    net.local_losses[1] = PixelClassifier(net.classifier.head, 11, (tap, dense_head(64, 16, 11), 0.4))
    return net.to(memory_format=torch.channels_last)


def _classifier():
    """torchvision's ResNet with one block a stage."""
    models = pytest.importorskip("torchvision.models")
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return infopro_fast.build(
        net, cuts=["layer1", "layer3"], local_loss="softmax", lambdas=(1, 1, 1, 1), image_size=64
    )


NETS = {"segmenter": _segmenter, "tap": _segmenter_with_tap, "classifier": _classifier}


def _without_dropout(name):
    """Return a network with the seed's weights, without dropout, whose numbers depend on the dtype."""
    torch.manual_seed(0)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return net


def _batch_for(net, N=8):
    generator = torch.Generator().manual_seed(5)
    size = 32 if net.classifier.dense else 64
    image = torch.randn(N, 3, size, size, generator=generator)
    return image, torch.randint(5, (N, size, size) if net.classifier.dense else (N,), generator=generator)


@pytest.mark.parametrize("amp", AMP)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.fast(1)
def test_autocast_of_larger_networks(name, amp):
    """Losses and updates equal float32's to rounding; outputs are rounded, losses and weights are not."""
    plain, rounded = (
        infopro_fast.LocalTrainer(_without_dropout(name), released_sgd(lr=0.02), amp=a) for a in (None, amp)
    )
    image, label = _batch_for(plain.net)
    seen = []
    for stage in rounded.net.stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = [_parameters_of(plain, k) for k in range(len(plain.optimizers))]
    expected, found = plain.step(image, label), rounded.step(image, label)
    assert seen == [amp] * len(before) and found.keys() == expected.keys()
    assert all(p.dtype == torch.float32 for p in rounded.net.parameters())
    eps = torch.finfo(amp).eps
    for term, value in expected.items():
        if not term.endswith("correct"):
            assert found[term].dtype == torch.float32
            assert compare.relative_error(found[term], value) < compare.AMP_LOSS * eps, term
    for k, start in enumerate(before):
        off = compare.relative_error(_parameters_of(rounded, k) - start, _parameters_of(plain, k) - start)
        assert 0.1 * eps < off < compare.AMP_UPDATE * math.sqrt(eps), (
            f"module {k + 1}: off by {off / math.sqrt(eps)} roots of epsilon"
        )


def _parameters_of(trainer, module: int) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for group in trainer.optimizers[module].param_groups for p in group["params"]]
    ).clone()


@pytest.mark.parametrize("name", NETS)
def test_weights_are_channels_last_and_the_numbers_those_of_contiguous_ones(name):
    """In float64, where the order of sums matters less than the tolerance; after a step, too."""
    net, other = (_without_dropout(name).double() for _ in range(2))
    if name == "classifier":  # a network of one's own keeps its format
        net.to(memory_format=torch.channels_last)
    other.to(memory_format=torch.contiguous_format)
    trainers = [infopro_fast.LocalTrainer(n, released_sgd(lr=0.02)) for n in (net, other)]
    image, label = _batch_for(net, N=4)
    expected, found = (trainer.step(image.double(), label) for trainer in reversed(trainers))
    for n, memory_format in ((net, torch.channels_last), (other, torch.contiguous_format)):
        weights = [
            m.weight
            for m in n.modules()
            if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1 and m.kernel_size != (1, 1)
        ]
        assert len(weights) > 10
        for weight in weights:
            assert weight.is_contiguous(memory_format=memory_format) and weight.is_contiguous() == (
                n is other
            )
    for term, value in expected.items():
        compare.assert_close(found[term].double(), value.double(), what=term)
    for (key, p), q in zip(net.state_dict().items(), other.state_dict().values()):
        compare.assert_close(p.double(), q.double(), scale=max(1.0, q.abs().max().item()), what=key)


# --------------------------------------------------------------------------------------------------------


def test_autocast_is_off_outside_the_forwards():
    trainer = _trainer(amp=torch.bfloat16)
    inside = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            inside.append(torch.is_autocast_enabled("cpu"))
            return super().step(closure)

    trainer.optimizers = [Watching(o.param_groups[0]["params"], lr=0.01) for o in trainer.optimizers]
    image, label = _batch()
    label_hook = []
    next(iter(trainer.net.stages[0].parameters())).register_hook(
        lambda g: label_hook.append(torch.is_autocast_enabled("cpu"))
    )
    trainer.step(image, label)
    assert inside == [False] * 3 and label_hook == [False]


@pytest.mark.slow
def test_float16_gradients_that_overflow_leave_their_own_module_alone():
    trainer = _trainer(amp=torch.float16)
    image, label = _batch()
    trainer.step(image, label)
    before = copy.deepcopy(trainer.net.state_dict())
    scales = [scaler.get_scale() for scaler in trainer.scalers]
    weight = next(iter(trainer.net.stages[1].parameters()))
    hook = weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    trainer.step(image, label)
    hook.remove()
    after = dict(trainer.net.named_parameters())
    changed = [
        any(not torch.equal(before[n], p) for n, p in after.items() if n.startswith(f"stages.{k}."))
        for k in range(3)
    ]
    assert changed == [True, False, True]
    assert [scaler.get_scale() for scaler in trainer.scalers] == [scales[0], scales[1] / 2, scales[2]]


def test_float16_small_gradients_survive_by_scaling():
    """Divided by 2^16 and more they would be 0 in float16."""
    image, label = _batch()
    trainer = _trainer(amp=torch.float16)
    for local_loss in trainer.net.local_losses[:-1]:
        local_loss.reconstruction_weight, local_loss.task_weight = 1e-7, 0.0
    first = next(iter(trainer.net.stages[0].parameters()))
    seen = []
    first.register_hook(lambda g: seen.append(g.abs().max().item() / trainer.scalers[0].get_scale()))
    trainer.step(image, label)
    assert 0 < seen[0] < 2.0**-24, "smaller than float16's smallest number, and not lost"


@pytest.mark.slow
def test_scalers_are_part_of_the_state():
    trainer, other = _trainer(amp=torch.float16), _trainer(amp=torch.float16)
    trainer.step(*_batch())
    trainer.scalers[1].update(128.0)
    state = copy.deepcopy(trainer.state_dict())
    other.load_state_dict(state)
    assert other.scalers[1].get_scale() == 128.0
    with pytest.raises(ValueError, match="gradient scalers"):
        _trainer().load_state_dict(state)
    with pytest.raises(ValueError, match="gradient scalers"):
        other.load_state_dict(_trainer().state_dict())


def test_evaluate_runs_under_autocast():
    trainer = _trainer(amp=torch.bfloat16)
    seen = []
    trainer.net.stages[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.evaluate([_batch()])
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"amp": torch.float64}, "amp: expected torch.bfloat16, torch.float16 or None, got torch.float64"),
        ({"cuda_graph": True}, "cuda_graph: expected the network on a CUDA device, got cpu"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _trainer(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"amp": "float16", "cuda_graph": True}, "amp float16 and cuda_graph"),
        ({"amp": "bfloat16", "dtype": "float64"}, "amp bfloat16 and dtype float64"),
        ({"tf32": True, "device": "cpu"}, "tf32 and device cpu"),
        ({"cuda_graph": True, "device": "cpu"}, "cuda_graph and device cpu"),
        ({"impl": "triton", "device": "cpu"}, "impl triton and device cpu"),
        ({"amp": "half"}, "amp: expected one of"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_auto_device_that_is_the_cpu_refuses_what_only_a_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="cuda_graph and device cpu"):
        TrainConfig(cuda_graph=True).resolved()


def test_prefetch_on_the_cpu_hands_batches_through():
    batches = [(torch.arange(3) + i, torch.tensor(i)) for i in range(4)]
    for (a, b), (c, d) in zip(prefetch(batches, "cpu"), batches, strict=True):
        assert a is c and b is d


def test_a_graph_is_captured_on_the_device_of_its_batch(monkeypatch):
    """Not on the current device, in a run with --device cuda:1. All but that is left out of torch.cuda."""
    current, steps, captures = [0], [], []

    @contextlib.contextmanager
    def on(device):
        current.append(torch.device(device).index)
        yield
        current.pop()

    @contextlib.contextmanager
    def capture(graph, stream):
        captures.append((current[-1], stream.device.index))
        with on(stream.device):
            yield

    def make_stream(device):
        return SimpleNamespace(device=torch.device(device), wait_stream=lambda other: None)

    fakes = {
        "device": on, "stream": lambda stream: on(stream.device), "Stream": make_stream,
        "current_stream": make_stream, "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(image, label):
        steps.append(current[-1])
        return {"loss": image.sum()}

    graphed = GraphedStep(step)
    with FakeTensorMode():
        image, label = torch.empty(2, 3, device="cuda:1"), torch.empty(2, device="cuda:1")
        for _ in range(WARM_UP + 2):
            assert list(graphed(image, label)) == ["loss"]
    assert steps == [1] * (WARM_UP + 1) and captures == [(1, 1)] and current == [0]


def test_learning_rate_as_a_tensor_is_the_same_rate():
    """What a captured step reads; on the CPU the same code runs without the graph."""
    image, label = _batch()
    plain, other = _trainer(), _trainer()
    with_tensor_learning_rates(other.optimizers, torch.device("cpu"))
    for trainer in (plain, other):
        for lr in (0.02, 0.005):
            trainer.set_learning_rate(lr)
            trainer.step(image, label)
    for p, q in zip(plain.net.parameters(), other.net.parameters()):
        compare.assert_close(q.detach(), p.detach().double(), what="a parameter")
    assert all(
        type(g["lr"]) is float for state in other.state_dict()["optimizers"] for g in state["param_groups"]
    )
