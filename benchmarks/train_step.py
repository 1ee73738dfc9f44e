"""One training step of ResNet-32 as a workload: ours, ours on the references, and the released formulation in plain torch."""

from __future__ import annotations

import functools
import typing

import torch
from torch.utils.checkpoint import checkpoint

import infopro_fast
from benchmarks import baselines, shapes
from infopro_fast.modules.local_loss import interpolate_lambdas
from infopro_fast.modules.network import CIFAR10_MEAN, CIFAR10_STD
from infopro_fast.published import DEFAULT_LAMBDAS
from infopro_fast.trainer import released_sgd

METHODS = ("released", "released channels_last", "reference", "ours")
GRAPH = "ours, CUDA graph"


def network(K: int, impl: str, arch: str = "resnet32", balanced: bool = False, recompute: str = "none"):
    if K == 1:
        return infopro_fast.build(arch, modules=1, local_loss="none", impl=impl, recompute=recompute)
    lambdas = shapes.TRAIN_STEP.get(K) if arch == "resnet32" else None
    return infopro_fast.build(
        arch, modules=K, local_loss="contrast", lambdas=lambdas, balanced=balanced, impl=impl, recompute=recompute
    )


def batch(N: int = shapes.TRAIN_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    return (torch.rand(N, 3, 32, 32, generator=generator) - mean) / std, torch.randint(10, (N,), generator=generator)


def step(
    method: str, K: int, N: int = shapes.TRAIN_BATCH, *, device: str = "cpu", arch: str = "resnet32", balanced: bool = False
) -> typing.Callable[[], object]:
    """A call that makes one update of the whole network.

    "compile", "compile max-autotune": end to end (K = 1), through torch.compile; "checkpoint": end to end, each block run again in
    backward. "released ..." the same with all modules and auxiliary nets of the released step.
    """
    torch.manual_seed(0)
    image, label = (t.to(device) for t in batch(N))
    make_optimizer = released_sgd(lr=0.1)
    recompute = "block" if method.endswith("checkpoint") else "none"
    if not method.startswith("released"):
        net = network(K, "reference" if method == "reference" else "auto", arch, balanced, recompute).to(device)
        trainer = infopro_fast.LocalTrainer(net, make_optimizer, cuda_graph=method == GRAPH)
        return _through(method, net.stages, lambda: trainer.step(image, label))
    net = network(K, "reference", arch, balanced, recompute)
    memory_format = torch.channels_last if method.endswith("channels_last") else torch.contiguous_format
    released = baselines.ReleasedTraining(net, make_optimizer, CIFAR10_MEAN, CIFAR10_STD).to(device, memory_format=memory_format)
    image = image.to(memory_format=memory_format)
    weights = shapes.TRAIN_STEP[K] if arch == "resnet32" else DEFAULT_LAMBDAS
    lambdas = [interpolate_lambdas(weights, k, K) for k in range(K - 1)]
    auxiliary = [*released.decoders, *released.heads]
    if method.endswith("checkpoint"):
        for module in auxiliary:
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return _through(method, [*net.stages, *auxiliary], lambda: released.step(image, label, lambdas))


def _through(method: str, modules: typing.Iterable[torch.nn.Module], call: typing.Callable[[], object]) -> typing.Callable[[], object]:
    """The step ``call``, its modules compiled if the method says so."""
    if "compile" not in method:
        return call
    tuned = method.endswith("max-autotune")
    for module in modules:  # for this batch size: another one, in the same process, would compile for any
        module.compile(dynamic=False, mode="max-autotune" if tuned else None)

    def step() -> object:
        if tuned:
            torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=64):  # K = 16 has a dozen kinds of modules: more than 8 would run eagerly
            return call()

    return step


def for_peak(method: str, K: int):
    """Target of `memory.peak_bytes`: everything above the resident set at the end of the first steps of a small batch."""
    call, small = step(method, K), step(method, K, 8)

    def one() -> tuple[torch.Tensor, ...]:
        call()
        return ()

    return one, small
