"""The local step: the released code's gradients, one module at a time, and nothing more than that."""

from __future__ import annotations

import copy
import functools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infopro_fast
from infopro_fast import ops
from infopro_fast.modules import CIFAR10_MEAN, CIFAR10_STD, InfoPro, LocalLoss, Term
from infopro_fast.trainer import check_finite, released_sgd
from tests import compare, golden

IMAGE, LABEL = (
    torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
    torch.tensor([0, 1, 2, 0, 1, 1]),
)


class Recorder(torch.optim.Optimizer):
    """Updates nothing and remembers the gradients it was given, by parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})
        self.seen: dict[nn.Parameter, list[torch.Tensor]] = {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.seen.setdefault(p, []).append(p.grad.clone())


def recorded_gradients(trainer) -> dict[nn.Parameter, list[torch.Tensor]]:
    return {p: grads for optimizer in trainer.optimizers for p, grads in optimizer.seen.items()}


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


# --------------------------------------------------------------------------------------------------------
# Against the released code


@pytest.mark.parametrize(
    "case", golden.cases("train_step"), ids=lambda c: f"{c['arch']}-{c['modules']}-{c['loss_mode']}"
)
def test_golden(case, impl):
    loss = "contrast" if case["loss_mode"] == "contrast" else "softmax"
    net = infopro_fast.build(
        case["arch"],
        case["modules"],
        loss,
        case["lambdas"],
        case["balanced"],
        image_size=case["image_size"],
        impl=impl,
    ).double()
    golden.fill_parameters(net.released_state_dict())
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    image = (golden.image(case["batch"], case["image_size"], case["image_size"]) - mean) / std
    label = golden.labels(case["batch"], 10)

    # The released code runs nets of weight 0 too. Here they do not run in a step, so their values are asked
    # of a copy.
    expected = dict(case["local_losses"])
    idle = _run_idle_nets(copy.deepcopy(net), image, label)
    logits = copy.deepcopy(net)(image)
    trainer = infopro_fast.LocalTrainer(net, Recorder)
    metrics = trainer.step(image, label)

    compare.assert_golden("logits", logits, case["logits"])
    compare.assert_golden("loss", metrics["loss"], case["loss"])
    for k, (cut, local_loss) in enumerate(zip(net.cuts, net.local_losses), 1):
        suffix = f"{cut[0]}_{cut[1]}"
        for name, term in (
            (f"decoder_{suffix}", "reconstruction"),
            (f"aux_classifier_{suffix}", local_loss.task),
        ):
            found = idle["losses"].get(name)
            assert (f"module{k}/{term}" in metrics) == (found is None)
            compare.assert_golden(
                name, metrics[f"module{k}/{term}"] if found is None else found, expected[name]
            )

    gradients, seen = recorded_gradients(trainer), 0
    for prefix, module in net.released_modules():
        for name, p in module.named_parameters():
            digest = case["grads"][prefix + name]
            if p in gradients:
                (gradient,) = gradients[p]
                compare.assert_golden(prefix + name, gradient, digest)
                seen += 1
            else:
                assert (
                    prefix.startswith(("decoder", "aux_classifier")) and prefix.rstrip(".") in idle["losses"]
                )
                assert digest == [0, 0]
    assert seen == len(gradients) and all(p.grad is None for p in net.parameters())
    buffers = {name: tensor for name, tensor in net.released_state_dict().items()} | idle["buffers"]
    for name, digest in case["buffers"].items():
        compare.assert_golden(name, buffers[name], digest)


@torch.no_grad()
def _run_idle_nets(net, image, label) -> dict[str, dict[str, torch.Tensor]]:
    """Losses and buffers of the nets of weight 0, run once on the features they would have seen."""
    losses, buffers, h = {}, {}, image
    for cut, stage, local_loss in zip(net.cuts, net.stages, net.local_losses):
        h = stage(h)
        nets = local_loss.released_nets(*cut)
        for (prefix, module), weight, target in zip(
            nets.items(),
            (local_loss.reconstruction_weight, local_loss.task_weight),
            (image, label),
            strict=True,
        ):
            if weight == 0:
                losses[prefix.rstrip(".")] = module(h, target)
                buffers |= {prefix + name: buffer for name, buffer in module.named_buffers()}
    return {"losses": losses, "buffers": buffers}


def _plain_step(net, optimizer, image, label):
    """Textbook end-to-end training."""
    h = image
    for stage in net.stages:
        h = stage(h)
    fc = net.classifier.fc
    loss = ops.linear_cross_entropy(net.classifier.pool(h), fc.weight, label, bias=fc.bias, impl="reference")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_one_module_is_end_to_end_training_bit_for_bit():
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", modules=1, impl="reference")
    plain = copy.deepcopy(net)
    trainer, optimizer = infopro_fast.LocalTrainer(net, _sgd), _sgd(plain.parameters())
    for _ in range(3):
        assert torch.equal(trainer.step(IMAGE, LABEL)["loss"], _plain_step(plain, optimizer, IMAGE, LABEL))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_loss_and_count_are_the_networks_own():
    net = infopro_fast.build("resnet20", modules=3).double()
    image = IMAGE.double()
    logits = copy.deepcopy(net)(image)
    metrics = infopro_fast.LocalTrainer(net, Recorder).step(image, LABEL)
    compare.assert_close(metrics["loss"], F.cross_entropy(logits, LABEL))
    assert metrics["correct"].item() == (logits.argmax(1) == LABEL).sum().item()


@pytest.mark.parametrize("local_loss", ("softmax", "greedy"))
def test_class_probabilities(local_loss):
    """Mixed as by MixUp: every loss is torch's; of one-hot rows, the step with labels."""
    net = infopro_fast.build("resnet20", 2, local_loss)
    mixed = 0.3 * F.one_hot(LABEL, 10) + 0.7 * F.one_hot(LABEL.flip(0), 10)
    plain = copy.deepcopy(net).train()
    stage, loss = plain.stages[0], plain.local_losses[0]
    wanted = {
        f"module1/{local_loss}": F.cross_entropy(loss.aux_classifier.head(stage(IMAGE)), mixed),
        "loss": F.cross_entropy(copy.deepcopy(net).train()(IMAGE), mixed),
    }
    metrics = infopro_fast.LocalTrainer(copy.deepcopy(net), _sgd).step(IMAGE, mixed)
    for name, value in wanted.items():
        compare.assert_close(metrics[name], value.detach().double(), what=name)
    nets = copy.deepcopy(net), copy.deepcopy(net)
    of_rows = infopro_fast.LocalTrainer(nets[0], _sgd).step(IMAGE, F.one_hot(LABEL, 10).float())
    of_labels = infopro_fast.LocalTrainer(nets[1], _sgd).step(IMAGE, LABEL)
    assert of_rows.keys() == of_labels.keys() and of_rows["correct"] == of_labels["correct"]
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label, got", (
    (torch.rand(5, 10), r"class probabilities \(6, 10\), got \(5, 10\)"),
    (torch.rand(6, 9), r"class probabilities \(6, 10\), got \(6, 9\)"),
    (torch.rand(6, 10) - 1, "probabilities of at least 0, got -0"),
    (torch.full((6, 10), torch.nan), "probabilities of at least 0, got nan"),
))
def test_class_probabilities_that_do_not_fit(label, got):
    trainer = infopro_fast.LocalTrainer(infopro_fast.build("resnet20", 2, "softmax"), _sgd)
    with pytest.raises(ValueError, match=f"step: label: expected {got}"):
        trainer.step(IMAGE, label)


@pytest.mark.parametrize(
    "recompute, chosen", [("none", "auto"), ("none", "reference"), ("norm", "auto"), ("block", "auto")]
)
def test_the_lean_step_is_the_plain_one_bit_for_bit(recompute, chosen):
    """The plain step: one loss and one backward a module, one optimizer over everything at the end."""
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 4, lambdas=(2, 0.5, 1, 1), impl=chosen)
    plain = copy.deepcopy(net)
    lean = infopro_fast.LocalTrainer(copy.deepcopy(net), _sgd)
    for stage in lean.net.stages:
        stage.recompute = recompute
    optimizer = _sgd(
        [*plain.stages.parameters(), *(p for loss in plain.local_losses for p in loss.trained_parameters())]
    )
    for _ in range(2):
        metrics, h = lean.step(IMAGE, LABEL), IMAGE
        for stage, local_loss in zip(plain.stages, plain.local_losses):
            h = stage(h)
            loss = sum(term.weight * term.loss for term in local_loss.terms(h, IMAGE, LABEL))
            loss.backward()
            h = h.detach()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(metrics["loss"], loss.detach())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, lean.net.state_dict()[name]), name


# --------------------------------------------------------------------------------------------------------
# Isolation


def _infopro(local_loss) -> InfoPro:
    assert isinstance(local_loss, InfoPro)
    return local_loss


def test_no_gradient_crosses_a_boundary():
    """A later module's weights, loss weight and labels have no effect on an earlier module."""
    recorded = []
    for scale in (1, 7):
        torch.manual_seed(0)
        net = infopro_fast.build("resnet20", 4, lambdas=(1, 1, 1, 1), impl="reference").double()
        for local_loss in list(net.local_losses)[1:-1]:
            _infopro(local_loss).reconstruction_weight *= scale
        with torch.no_grad():
            net.classifier.fc.weight.mul_(scale)
        trainer = infopro_fast.LocalTrainer(net, Recorder)
        trainer.step(IMAGE.double(), LABEL)
        gradients = recorded_gradients(trainer)
        first = [*net.stages[0].parameters(), *net.local_losses[0].parameters()]
        recorded.append(
            ([gradients[p][0] for p in first], [gradients[p][0] for p in net.stages[1].parameters()])
        )
    assert all(torch.equal(a, b) for a, b in zip(recorded[0][0], recorded[1][0]))
    assert not any(torch.equal(a, b) for a, b in zip(recorded[0][1], recorded[1][1]))


def test_each_module_has_exactly_its_own_gradients():
    net = infopro_fast.build("resnet20", 4, lambdas=(1, 1, 1, 1)).double()
    trainer = infopro_fast.LocalTrainer(net, Recorder)
    trainer.step(IMAGE.double(), LABEL)
    for stage, local_loss, optimizer in zip(net.stages, net.local_losses, trainer.optimizers):
        assert set(optimizer.seen) == {*stage.parameters(), *local_loss.parameters()}
        assert all(len(grads) == 1 for grads in optimizer.seen.values())


def test_statistics_move_once_a_step():
    net = infopro_fast.build("resnet20", 4, "softmax", lambdas=(1, 1, 1, 1))
    trainer = infopro_fast.LocalTrainer(net, _sgd)
    for _ in range(3):
        trainer.step(IMAGE, LABEL)
    assert {m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {3}


# --------------------------------------------------------------------------------------------------------
# What is not run, and what is not kept


def test_terms_of_weight_zero_are_not_run(monkeypatch):
    calls = []
    for name, op in (("reconstruction_loss", ops.reconstruction_loss), ("supcon_loss", ops.supcon_loss)):
        monkeypatch.setattr(
            ops, name, lambda *args, _op=op, _name=name, **kw: (calls.append(_name), _op(*args, **kw))[1]
        )
    net = infopro_fast.build("resnet32", 4, lambdas=(6, 0, 0, 2))
    idle = [net.local_losses[0].aux_classifier, net.local_losses[2].decoder]
    before = [copy.deepcopy(module.state_dict()) for module in idle]
    made = []
    trainer = infopro_fast.LocalTrainer(
        net, lambda params: made.append(params) or torch.optim.SGD(params, lr=0.1, weight_decay=0.1)
    )
    metrics = trainer.step(IMAGE, LABEL)
    assert calls == ["reconstruction_loss", "reconstruction_loss", "supcon_loss", "supcon_loss"]
    assert list(metrics) == [
        "module1/reconstruction",
        "module2/reconstruction",
        "module2/contrast",
        "module3/contrast",
        "loss",
        "correct",
    ]
    given = {id(p) for params in made for p in params}
    assert len(made) == 4 and not given & {id(p) for module in idle for p in module.parameters()}
    for module, state in zip(idle, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_each_graph_is_gone_before_the_next_is_built(monkeypatch):
    """When a module starts, nothing is kept for backward; when its auxiliary net does, its blocks are."""
    live = weakref.WeakSet()
    counts = []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            live.add(self)

    def count(where):
        counts.append((where, len(live)))

    net = infopro_fast.build("resnet20", 3, lambdas=(1, 1, 1, 1))
    for stage, local_loss in zip(net.stages, net.local_losses):
        stage.register_forward_pre_hook(lambda *_: count("stage"))
        stage.register_forward_hook(lambda *_: count("stage done"))
        for aux in local_loss.children():
            aux.register_forward_pre_hook(lambda *_: count("auxiliary net"))
    monkeypatch.setattr(
        net.local_losses[0].aux_classifier,
        "loss_and_correct",
        _counting(net.local_losses[0].aux_classifier, count),
    )
    trainer = infopro_fast.LocalTrainer(net, _sgd)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        trainer.step(IMAGE, LABEL)
    stages = [n for where, n in counts if where == "stage"]
    assert stages == [0, 0, 0] and len(live) == 0
    done = None
    checked = 0
    for where, n in counts:
        done = n if where == "stage done" else done
        if where == "auxiliary net":
            assert n == done > 0
            checked += 1
    assert checked >= 3  # two decoders and a head


def _counting(head, count):
    run = type(head).loss_and_correct

    def loss_and_correct(features, target):
        count("auxiliary net")
        return run(head, features, target)

    return loss_and_correct


def test_gradients_are_freed_module_by_module():
    net = infopro_fast.build("resnet20", 4)
    alive = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            alive.append(
                {id(p) for p in net.parameters() if p.grad is not None}
                == {id(p) for p in self.param_groups[0]["params"]}
            )
            return super().step(closure)

    infopro_fast.LocalTrainer(net, lambda params: Counting(params, lr=0.1)).step(IMAGE, LABEL)
    assert alive == [True] * 4 and all(p.grad is None for p in net.parameters())


def test_the_outputs_gradient_is_gone_when_the_first_operation_has_taken_it():
    made: list[weakref.ref] = []
    alive: list[bool] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            found = torch.ones(ctx.shape).contiguous(
                memory_format=torch.channels_last
            )  # as the output: taken as it is, not copied
            made.append(weakref.ref(found.untyped_storage()))
            return found

    class Loss(LocalLoss):
        def terms(self, features, image, label):
            yield Term("probe", 1.0, Probe.apply(features), None)

        def trained_parameters(self):
            return []

    net = infopro_fast.build("resnet20", 2)
    net.local_losses[0] = Loss()

    def watch(module, args, out):
        out.register_hook(lambda grad: alive.append(made[0]() is not None))

    net.stages[0][2].register_forward_hook(watch)
    infopro_fast.LocalTrainer(net, _sgd).step(IMAGE, LABEL)
    assert len(made) == 1 and alive == [False]


def test_the_step_never_waits_for_the_device():
    """Tensors without values raise when one is read: nothing in a step may."""
    for local_loss in ("contrast", "softmax", "greedy", "dgl", "infopro_l", "auglocal"):
        net = infopro_fast.build("resnet20", 4, local_loss, impl="reference").to("meta")
        trainer = infopro_fast.LocalTrainer(net, _sgd)
        metrics = trainer.step(
            torch.zeros(4, 3, 32, 32, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
        )
        assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            check_finite(metrics)


# --------------------------------------------------------------------------------------------------------
# The trainer


def test_double_trains():
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 4).double()
    trainer = infopro_fast.LocalTrainer(net, released_sgd(lr=0.02))
    history = [trainer.step(IMAGE.double(), LABEL) for _ in range(12)]
    assert all(value.dtype == torch.float64 for name, value in history[0].items() if "correct" not in name)
    for name in ("loss", "module1/reconstruction", "module3/contrast"):
        assert history[-1][name] < history[0][name], name


def test_a_local_loss_of_ones_own():
    class Norm(LocalLoss):
        def terms(self, features, image, label):
            yield Term("norm", 0.5, features.square().mean(), None)

        def trained_parameters(self):
            return []

        def released_nets(self, stage, block):
            return {}

    net = infopro_fast.build("resnet20", 2).double()
    net.local_losses[0] = Norm()
    trainer = infopro_fast.LocalTrainer(net, Recorder)
    twin = copy.deepcopy(net.stages[0])
    metrics = trainer.step(IMAGE.double(), LABEL)
    (0.5 * twin(IMAGE.double()).square().mean()).backward()
    gradients = recorded_gradients(trainer)
    for p, q in zip(net.stages[0].parameters(), twin.parameters()):
        compare.assert_close(gradients[p][0], q.grad, scale=max(1e-3, q.grad.abs().max().item()))
    assert list(metrics) == ["module1/norm", "loss", "correct"]


def test_evaluate():
    net = infopro_fast.build("resnet20", 3)
    trainer = infopro_fast.LocalTrainer(net, _sgd)
    for _ in range(3):
        trainer.step(IMAGE, LABEL)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = trainer.evaluate([(IMAGE[:4], LABEL[:4]), (IMAGE[4:], LABEL[4:])])
    assert net.training and all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    net.eval()
    with torch.no_grad():
        logits = net(IMAGE)
    assert found["count"] == 6 and found["accuracy"] == (logits.argmax(1) == LABEL).sum().item() / 6
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, LABEL).item(), rel=1e-5)
    trainer.evaluate([(IMAGE, LABEL)])
    assert not net.training
    with pytest.raises(ValueError, match="evaluate: batches: expected at least one image"):
        trainer.evaluate([])


def test_a_step_trains_in_training_mode():
    net = infopro_fast.build("resnet20", 2).eval()
    infopro_fast.LocalTrainer(net, _sgd).step(IMAGE, LABEL)
    assert net.training and net.stages[0].stem.bn1.num_batches_tracked == 1


def test_state_resumes_bit_for_bit():
    torch.manual_seed(0)
    net = infopro_fast.build("resnet20", 3)
    trainer = infopro_fast.LocalTrainer(net, _sgd)
    trainer.step(IMAGE, LABEL)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(trainer.state_dict())
    trainer.step(IMAGE, LABEL)
    other = infopro_fast.build("resnet20", 3)
    other.load_state_dict(weights)
    resumed = infopro_fast.LocalTrainer(other, _sgd)
    resumed.load_state_dict(state)
    resumed.step(IMAGE, LABEL)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(ValueError, match="expected the state of 4 optimizers, got 3"):
        infopro_fast.LocalTrainer(infopro_fast.build("resnet20", 4), _sgd).load_state_dict(state)


@pytest.mark.parametrize("fused", [False, True])
def test_state_in_another_memory_format_is_laid_out_like_its_parameter(fused):
    """A checkpoint holds contiguous tensors; fused optimizers need a state with its parameter's strides."""

    def make(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=fused)

    nets = [infopro_fast.build("resnet20", 3) for _ in range(2)]
    trainer = infopro_fast.LocalTrainer(nets[0], make)
    trainer.step(IMAGE, LABEL)
    state = copy.deepcopy(trainer.state_dict())
    for optimizer in state["optimizers"]:
        for entry in optimizer["state"].values():
            entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    nets[1].load_state_dict(nets[0].state_dict())
    resumed = infopro_fast.LocalTrainer(nets[1], make)
    resumed.load_state_dict(state)
    for optimizer in resumed.optimizers:
        for p, entry in optimizer.state.items():
            assert entry["momentum_buffer"].stride() == p.stride()
    for each in (trainer, resumed):
        each.step(IMAGE, LABEL)
    assert all(
        torch.equal(tensor, nets[1].state_dict()[name]) for name, tensor in nets[0].state_dict().items()
    )


def test_fused_sgd_is_plain_sgd():
    """The authors' optimizer as a fused pass over channels_last weights, against torch's loop."""
    nets = []
    for fused in (True, False):
        torch.manual_seed(0)
        nets.append(infopro_fast.build("resnet20", 3, lambdas=(1, 1, 1, 1)).double())
        make = functools.partial(released_sgd(lr=0.05), fused=fused)
        trainer = infopro_fast.LocalTrainer(nets[-1], make)
        for _ in range(3):
            trainer.step(IMAGE.double(), LABEL)
    for name, tensor in nets[0].state_dict().items():
        compare.assert_close(
            tensor.double(),
            nets[1].state_dict()[name].double(),
            scale=max(1.0, tensor.abs().max().item()),
            what=name,
        )


def test_learning_rate():
    trainer = infopro_fast.LocalTrainer(infopro_fast.build("resnet20", 3), released_sgd(lr=1.0))
    trainer.set_learning_rate(0.25)
    assert [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == [0.25] * 3


def _poison_decoder(net):
    net.local_losses[1].decoder.decoder[3].bias.fill_(math.nan)


def _poison_classifier(net):
    net.classifier.fc.bias.fill_(math.inf)


@pytest.mark.parametrize(
    "poison, message",
    [
        (_poison_decoder, "module 2, reconstruction loss: nan"),
        (_poison_classifier, "last module, cross-entropy loss: nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_named(poison, message):
    net = infopro_fast.build("resnet20", 3, lambdas=(1, 1, 1, 1))
    trainer = infopro_fast.LocalTrainer(net, _sgd)
    check_finite(trainer.step(IMAGE, LABEL))
    with torch.no_grad():
        poison(net)
    with pytest.raises(FloatingPointError, match=f"^step 2, {message}"):
        trainer.step(IMAGE, LABEL)
    trainer.check_finite = False
    metrics = trainer.step(IMAGE, LABEL)
    with pytest.raises(FloatingPointError, match=message):
        check_finite(metrics)
