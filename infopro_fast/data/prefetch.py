"""Batches made on the CPU, copied to a GPU ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def prefetch(batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device | str) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same batches on ``device``. To a GPU each is copied from pinned memory, on a stream of its own, one batch ahead.

    Nothing waits for the device. Tensors that are already there are handed through.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield tuple(t.to(device) for t in batch)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = tuple(t if t.device.type == "cuda" else t.pin_memory().to(device, non_blocking=True) for t in batch)
        if ahead is not None:
            yield _received(ahead)
        ahead = copied, stream.record_event()
    if ahead is not None:
        yield _received(ahead)


def _received(ahead: tuple[tuple[torch.Tensor, ...], torch.cuda.Event]) -> tuple[torch.Tensor, ...]:
    """A batch for the current stream, once its copy is done."""
    batch, done = ahead
    for t in batch:
        current = torch.cuda.current_stream(t.device)
        current.wait_event(done)
        t.record_stream(current)  # its memory is not given away before the current stream is through with it
    return batch
