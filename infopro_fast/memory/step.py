"""Memory of one training step, module by module."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator

import torch

from infopro_fast.modules import LocalNetwork, Stage
from infopro_fast.modules.local_step import local_step
from infopro_fast.planning.live import OPTIMIZER, Bytes, LiveBytes, nbytes
from infopro_fast.trainer.step import LocalTrainer


class ModuleMemory(typing.NamedTuple):
    """Bytes of one local module.

    parameters: of the module and of its auxiliary networks that run. optimizer: the state of its optimizer.
    input: the map from the module before it; 0 for the first, whose batch is counted in `StepMemory`.
    saved: the most that autograd keeps at any time of the module's step, each storage once, the input
        included. Parameters, buffers and the batch are not counted.
    peak: alive at the highest point of its step, beyond parameters, buffers, the batch and all optimizers'
        state.
    measured_peak: the same from the allocator of a GPU, or None.
    """

    parameters: int
    optimizer: int
    input: int
    saved: int
    peak: Bytes
    measured_peak: int | None = None


class StepMemory(typing.NamedTuple):
    """Bytes of a whole step: of the modules in order, and those that are always there."""

    modules: tuple[ModuleMemory, ...]
    parameters: int  # and buffers, also of networks that never run
    optimizer: int
    batch: int

    @property
    def largest(self) -> ModuleMemory:
        """The module with the highest peak."""
        return max(self.modules, key=lambda module: module.measured_peak or module.peak.total)

    @property
    def saved(self) -> int:
        return max(module.saved for module in self.modules)

    @property
    def peak(self) -> int:
        """Highest point of the step beyond the model, its optimizer's state and the batch."""
        return max(module.measured_peak or module.peak.total for module in self.modules)

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.peak


def measure_step(trainer: LocalTrainer, image: torch.Tensor, label: torch.Tensor) -> StepMemory:
    """Measure every module in a step of ``trainer``, after a first step if its optimizers have no state.

    image: (N, 3, H, W). label: (N,). Both on any device; on the meta device or under a `FakeTensorMode`
    nothing runs. On a GPU the peaks come from its allocator as well.
    """
    net = trainer.net
    kept = [{} if optimizer is None else optimizer.state for optimizer in trainer.optimizers]
    if not any(kept):
        trainer.step(image, label)
    net.train()
    states = [nbytes(_tensors(state)) for state in kept]
    live = LiveBytes([*net.parameters(), *net.buffers(), image, label])
    live.hold(OPTIMIZER, [t for state in kept for t in _tensors(state)])
    found, h = [], image.detach()
    with live, live.watch_gradients(net.parameters()), recomputed_is_saved(net, live):
        modules = zip(net.stages, net.local_losses, trainer.optimizers, trainer.scalers, states)
        for stage, local_loss, optimizer, scaler, state in modules:
            live.reset()
            allocated = _start(image.device)
            given = 0 if h.untyped_storage()._cdata == image.untyped_storage()._cdata else nbytes([h])
            how: dict[str, typing.Any] = dict(autocast=trainer.autocast, scaler=scaler)
            h, _ = local_step(stage, local_loss, optimizer, h, image, label, **how)
            peak = live.peak._replace(optimizer=live.peak.optimizer - sum(states))
            measured = None
            if allocated is not None:
                measured = torch.cuda.max_memory_allocated(image.device) - allocated + given
            parameters = nbytes([*stage.parameters(), *local_loss.trained_parameters()])
            found.append(ModuleMemory(parameters, state, given, live.most_saved, peak, measured))
    loaded = nbytes([*net.parameters(), *net.buffers()])
    return StepMemory(tuple(found), loaded, sum(states), nbytes([image, label]))


def _start(device: torch.device) -> int | None:
    """Reset a GPU's peak and return the bytes allocated now, from which it is counted; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def recomputed_is_saved(net: LocalNetwork, live: LiveBytes) -> Iterator[None]:
    """Count maps that a second forward leaves for backward as saved."""
    stages = [stage for stage in net.stages if isinstance(stage, Stage)]

    def counted(stage: typing.Any, own):
        @contextlib.contextmanager
        def second_forward(segment):
            with live.keeping(), own(segment):
                yield

        stage.second_forward = second_forward

    for stage in stages:
        counted(stage, stage.second_forward)
    try:
        yield
    finally:
        for stage in stages:
            del stage.second_forward


def _tensors(state) -> list[torch.Tensor]:
    return [t for entry in state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
