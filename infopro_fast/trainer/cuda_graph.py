"""A training step as a CUDA graph: launched at once, however many kernels it has and however slow Python is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

WARM_UP = 3  # steps before the capture: kernels are compiled, momentum buffers exist, libraries have chosen their algorithms


class GraphedStep:
    """``step(image, label)``, captured for the first shape of batch that comes `WARM_UP` + 1 times; other shapes run as they are.

    step: returns 0-d tensors by name, does not wait for the device, and keeps its state (weights, optimizers, running statistics)
    in tensors that it changes in place. The warm-up steps are training steps like all others.
    """

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]):
        self.step = step
        self._seen: dict[tuple, int] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shape: tuple | None = None

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = (image.shape, image.dtype, image.stride(), label.shape, label.dtype)
        if self._graph is None:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM_UP:
                return self._on_a_stream_of_its_own(image, label)
            self._capture(image, label, shape)
        elif shape != self._shape:
            return self.step(image, label)
        self._image.copy_(image)
        self._label.copy_(label)
        self._graph.replay()
        return dict(zip(self._names, self._values.clone().unbind()))  # the next replay writes over them

    def _on_a_stream_of_its_own(self, image: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is allocated and recorded for the default stream cannot be captured."""
        current, own = torch.cuda.current_stream(image.device), torch.cuda.Stream(image.device)
        own.wait_stream(current)
        with torch.cuda.stream(own):
            metrics = self.step(image, label)
        current.wait_stream(own)
        return metrics

    def _capture(self, image: torch.Tensor, label: torch.Tensor, shape: tuple) -> None:
        self._image, self._label = image.clone(), label.clone()
        # On the batch's device, which need not be the current one: torch's own stream for captures is of whatever device was the first.
        with torch.cuda.device(image.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(image.device)):
                metrics = self.step(self._image, self._label)
                self._values = torch.stack([value.double() for value in metrics.values()])
        self._names, self._graph, self._shape = list(metrics), graph, shape


def with_tensor_learning_rates(optimizers: Iterable[torch.optim.Optimizer], device: torch.device) -> None:
    """Make every learning rate a float32 tensor on ``device``, which a captured step reads each time it is replayed."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
