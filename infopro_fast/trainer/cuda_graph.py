"""A training step as a CUDA graph, launched at once: its kernels do not wait for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

WARM_UP = 3  # steps before the capture, which compile kernels, make momentum buffers and choose algorithms


class GraphedStep:
    """Runs ``step(image, label)``, captured for the first batch shape that comes `WARM_UP` + 1 times.

    Batches of other shapes run without the graph. The warm-up steps are training steps like all others.
    step: returns 0-d tensors by name, does not wait for the device, and changes its state (weights,
    optimizers, running statistics) in place.
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
        """Run a step on a new stream: allocations and events of the default stream cannot be captured."""
        current, own = torch.cuda.current_stream(image.device), torch.cuda.Stream(image.device)
        own.wait_stream(current)
        with torch.cuda.stream(own):
            metrics = self.step(image, label)
        current.wait_stream(own)
        return metrics

    def _capture(self, image: torch.Tensor, label: torch.Tensor, shape: tuple) -> None:
        self._image, self._label = image.clone(), label.clone()
        # On the batch's device, which need not be the current one; torch's stream for captures stays on the
        # first device.
        with torch.cuda.device(image.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(image.device)):
                metrics = self.step(self._image, self._label)
                self._values = torch.stack([value.double() for value in metrics.values()])
        self._names, self._graph, self._shape = list(metrics), graph, shape


def with_tensor_learning_rates(optimizers: Iterable[torch.optim.Optimizer], device: torch.device) -> None:
    """Make each learning rate a float32 tensor on ``device``, which a captured step reads at each replay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
