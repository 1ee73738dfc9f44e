"""Batches made on the CPU and copied to a GPU before they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Tensors = tuple[torch.Tensor, ...]


def prefetch(batches: Iterable[Tensors], device: torch.device | str) -> Iterator[Tensors]:
    """Yield the same batches on ``device``.

    Copies to a GPU go from pinned memory through a second stream, one batch ahead. Nothing waits for the
    device. Tensors that are there already are yielded as they are.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield tuple(t.to(device) for t in batch)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = tuple(
                t if t.device.type == "cuda" else t.pin_memory().to(device, non_blocking=True) for t in batch
            )
        if ahead is not None:
            yield _received(ahead)
        ahead = copied, stream.record_event()
    if ahead is not None:
        yield _received(ahead)


def _received(ahead: tuple[Tensors, torch.cuda.Event]) -> Tensors:
    """Return a batch for use on the current stream, which waits for the copy."""
    batch, done = ahead
    for t in batch:
        current = torch.cuda.current_stream(t.device)
        current.wait_event(done)
        t.record_stream(current)  # the allocator must not reuse its memory before this stream is done
    return batch
