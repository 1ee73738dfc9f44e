"""A pipeline of local modules: each process trains some of them on what the one before sends, and waits for nobody behind it.

No gradient comes back, so that a module works on the next batch while the following ones are at this one: no bubbles, no stale
weights, no micro-batches. A module sees the same inputs and updates in the same order as in one process, and ends with the same bits.

Of every batch there go on: features (detached), label, the image as far as a later module reconstructs it, the metrics of the modules
so far, and what all are to do after this batch. At most ``in_flight`` batches are on their way between two processes: a sender waits
for its oldest one (back-pressure), a receiver has asked for the next ones before it works on this one, so that copies go on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SPEC, REQUEST, METRICS, LABEL, IMAGE, FEATURES = range(1, 7)  # tags
REQUESTS = (None, "save", "stop")

Waiting = Callable[[], contextlib.AbstractContextManager]


class Packet(NamedTuple):
    """One batch on its way. request: one of REQUESTS; image: None where no later module needs it."""

    request: str | None
    metrics: dict[str, torch.Tensor]
    label: torch.Tensor
    image: torch.Tensor | None
    features: torch.Tensor


class Sender:
    """To the process ``to``. wire: dtype that features are rounded to on their way, None: as they are. bytes: sent so far."""

    def __init__(self, to: int, in_flight: int, wire: torch.dtype | None, waiting: Waiting = contextlib.nullcontext):
        self.to, self.in_flight, self.wire, self.waiting = to, in_flight, wire, waiting
        self.bytes = 0
        self._flying: deque[tuple[list[dist.Work], list[torch.Tensor]]] = deque()
        self._described = False

    def begin(self) -> None:
        """The next packet is the first of an epoch or an evaluation, and is described to the receiver."""
        self._described = False

    def send(self, packet: Packet) -> None:
        """Send a packet off; waits while ``in_flight`` older ones are on their way."""
        features = packet.features if self.wire is None else packet.features.to(self.wire)
        if not self._described:
            self._describe(packet, features)
        tensors = [(REQUEST, torch.tensor([REQUESTS.index(packet.request)]))]
        if packet.metrics:
            tensors.append((METRICS, torch.stack([value.double() for value in packet.metrics.values()])))
        tensors.append((LABEL, packet.label.contiguous()))
        if packet.image is not None:
            tensors.append((IMAGE, packet.image.contiguous()))
        tensors.append((FEATURES, _in_memory_order(features)[0]))
        while len(self._flying) >= self.in_flight:
            self._land()
        works = [dist.isend(t, self.to, tag=tag) for tag, t in tensors]
        self.bytes += sum(t.numel() * t.element_size() for _, t in tensors)
        self._flying.append((works, [t for _, t in tensors]))  # alive until they have arrived

    def flush(self) -> None:
        """Wait for all that is on its way."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        works, _ = self._flying[0]
        with self.waiting():
            for work in works:
                work.wait()
        self._flying.popleft()

    def _describe(self, packet: Packet, features: torch.Tensor) -> None:
        on_wire, order = _in_memory_order(features)
        spec = {
            "metrics": list(packet.metrics), "label": _described(packet.label), "features": _described(on_wire), "order": order,
            "dtype": _name(packet.features.dtype), "image": None if packet.image is None else _described(packet.image),
        }  # fmt: skip
        content = torch.frombuffer(bytearray(json.dumps(spec).encode()), dtype=torch.uint8)
        with self.waiting():
            dist.send(torch.tensor([len(content)]), self.to, tag=SPEC)
            dist.send(content, self.to, tag=SPEC)
        self._described = True


class Receiver:
    """From the process ``source``, to tensors on ``device``; asks for up to ``in_flight`` packets ahead."""

    def __init__(self, source: int, in_flight: int, device: torch.device, waiting: Waiting = contextlib.nullcontext):
        self.source, self.in_flight, self.device, self.waiting = source, in_flight, device, waiting

    def receive(self, counts: Sequence[int]) -> Iterator[Packet]:
        """The packets of an epoch or an evaluation: of ``counts`` images each."""
        if not counts:
            return
        spec = self._spec()
        asked: deque[tuple[list[dist.Work], dict[int, torch.Tensor]]] = deque()
        left = deque(counts)
        while left or asked:
            while left and len(asked) <= self.in_flight:
                asked.append(self._ask(spec, left.popleft()))
            works, tensors = asked.popleft()
            with self.waiting():
                for work in works:
                    work.wait()
            yield _unpacked(spec, tensors)

    def _spec(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        with self.waiting():
            dist.recv(length, self.source, tag=SPEC)
            content = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(content, self.source, tag=SPEC)
        return json.loads(content.numpy().tobytes())

    def _ask(self, spec: dict[str, Any], count: int) -> tuple[list[dist.Work], dict[int, torch.Tensor]]:
        tensors = {REQUEST: torch.zeros(1, dtype=torch.int64)}
        if spec["metrics"]:
            tensors[METRICS] = torch.empty(len(spec["metrics"]), dtype=torch.float64, device=self.device)
        for tag, name in ((LABEL, "label"), (IMAGE, "image"), (FEATURES, "features")):
            if spec[name] is not None:
                shape, dtype = spec[name]
                tensors[tag] = torch.empty((count, *shape), dtype=getattr(torch, dtype), device=self.device)
        return [dist.irecv(t, self.source, tag=tag) for tag, t in tensors.items()], tensors


def _unpacked(spec: dict[str, Any], tensors: dict[int, torch.Tensor]) -> Packet:
    features = tensors[FEATURES].to(getattr(torch, spec["dtype"]))
    if spec["order"] == "channels_last":
        features = features.permute(0, 3, 1, 2)
    metrics = dict(zip(spec["metrics"], tensors[METRICS].unbind())) if spec["metrics"] else {}
    return Packet(REQUESTS[tensors[REQUEST].item()], metrics, tensors[LABEL], tensors.get(IMAGE), features)


def _in_memory_order(t: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The same elements as a contiguous tensor, without a copy where t is channels_last, whose layout the receiver restores."""
    if t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1), "channels_last"
    return t.contiguous(), "contiguous"


def _described(t: torch.Tensor) -> tuple[list[int], str]:
    """Shape of one image's part, and dtype."""
    return list(t.shape[1:]), _name(t.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
