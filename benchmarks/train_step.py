"""One training step as a workload: ours, ours on the references, and the authors' code in plain torch."""

from __future__ import annotations

import functools
import typing

import torch
from torch.utils.checkpoint import checkpoint

import infopro_fast
from benchmarks import shapes
from infopro_fast.memory.compare import batch
from infopro_fast.memory.released_trainer import ReleasedTrainer
from infopro_fast.planning.released import with_released_losses
from infopro_fast.trainer import released_sgd

METHODS = ("released", "released channels_last", "reference", "ours")
GRAPH = "ours, CUDA graph"


def network(K: int, impl: str, arch: str = "resnet32", balanced: bool = False, recompute: str = "none"):
    if K == 1:
        return infopro_fast.build(arch, modules=1, local_loss="none", impl=impl, recompute=recompute)
    lambdas = shapes.TRAIN_STEP.get(K) if arch == "resnet32" else None
    options = dict(local_loss="contrast", lambdas=lambdas, balanced=balanced, impl=impl, recompute=recompute)
    return infopro_fast.build(arch, K, **options)


def step(
    method: str, K: int, N: int = shapes.TRAIN_BATCH, *, device="cpu", arch="resnet32", balanced=False
) -> typing.Callable[[], object]:
    """Return a call that makes one update of the whole network.

    method: one of METHODS or `GRAPH`; "compile", "compile max-autotune": end to end (K = 1), through
        torch.compile; "checkpoint": end to end, every block recomputed in backward; "released compile" and
        the like: the authors' step, with all stages and auxiliary networks.
    """
    torch.manual_seed(0)
    image, label = batch(N, 32, device)
    make_optimizer = released_sgd(lr=0.1)
    recompute = "block" if method.endswith("checkpoint") else "none"
    released = method.startswith("released")
    net = network(K, "reference" if released or method == "reference" else "auto", arch, balanced, recompute)
    if not released:
        trainer = infopro_fast.LocalTrainer(net.to(device), make_optimizer, cuda_graph=method == GRAPH)
        return _through(method, net.stages, lambda: trainer.step(image, label))
    memory_format = torch.channels_last if method.endswith("channels_last") else torch.contiguous_format
    net = with_released_losses(net).to(device, memory_format=memory_format)
    trainer, image = ReleasedTrainer(net, make_optimizer), image.to(memory_format=memory_format)
    auxiliary = [part for loss in net.local_losses[:-1] for part in (loss.reconstruction, loss.task)]
    if method.endswith("checkpoint"):
        for module in auxiliary:
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return _through(method, [*net.stages, *auxiliary], lambda: trainer.step(image, label))


def _through(
    method: str, modules: typing.Iterable[torch.nn.Module], call: typing.Callable[[], object]
) -> typing.Callable[[], object]:
    """Return the step ``call``, its modules compiled if the method says so."""
    if "compile" not in method:
        return call
    tuned = method.endswith("max-autotune")
    for module in modules:  # for this batch size: a second one in the same process would compile for any
        module.compile(dynamic=False, mode="max-autotune" if tuned else None)

    def step() -> object:
        if tuned:
            torch.compiler.cudagraph_mark_step_begin()
        # K = 16 has a dozen kinds of modules; beyond 8 they would run eagerly.
        with torch._dynamo.config.patch(recompile_limit=64):
            return call()

    return step


def for_peak(method: str, K: int):
    """Target of `memory.peak_bytes`: a step after the first ones of a small batch."""
    call, small = step(method, K), step(method, K, 8)

    def one() -> tuple[torch.Tensor, ...]:
        call()
        return ()

    return one, small
