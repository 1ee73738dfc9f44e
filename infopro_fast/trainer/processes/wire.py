"""A pipeline of local modules: each process trains some of them on what the process before sends.

No gradient comes back, so nobody waits for a later module: no bubbles, no stale weights, no micro-batches.
Each module sees the same inputs and updates in the same order as in one process, and ends with the same bits.

At most ``in_flight`` batches are on their way between two processes. A sender waits for its oldest one. A
receiver has asked for the next ones before it works on the current one, so that copies overlap computation.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..checkpoint import is_channels_last

SPEC, REQUEST, METRICS, LABEL, IMAGE, FEATURES = range(1, 7)  # tags
REQUESTS = (None, "save", "stop")

Waiting = Callable[[], contextlib.AbstractContextManager]


class Packet(NamedTuple):
    """One batch on its way. image: None where no later module needs it. request: one of REQUESTS."""

    features: torch.Tensor
    image: torch.Tensor | None
    label: torch.Tensor
    metrics: dict[str, torch.Tensor] = {}  # of the modules so far
    request: str | None = None  # what all processes do after this batch


class Sender:
    """Sends packets to the process ``to``.

    in_flight: most packets on their way. wire: dtype that features are rounded to, or None. bytes: sent so
    far.
    """

    def __init__(
        self, to: int, in_flight: int, wire: torch.dtype | None, waiting: Waiting = contextlib.nullcontext
    ):
        self.to, self.in_flight, self.wire, self.waiting = to, in_flight, wire, waiting
        self.bytes = 0
        self.flying: deque[tuple[list[dist.Work], list[torch.Tensor]]] = deque()  # what is on its way
        self._described = False

    def begin(self) -> None:
        """Begin an epoch or an evaluation: its first packet is described to the receiver."""
        self._described = False

    def send(self, packet: Packet) -> None:
        """Send a packet; waits while ``in_flight`` older ones are on their way."""
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
        while len(self.flying) >= self.in_flight:
            self._land()
        works = [dist.isend(t, self.to, tag=tag) for tag, t in tensors]
        self.bytes += sum(t.numel() * t.element_size() for _, t in tensors)
        self.flying.append((works, [t for _, t in tensors]))  # kept alive until they have arrived

    def flush(self) -> None:
        """Wait until all packets have arrived."""
        while self.flying:
            self._land()

    def _land(self) -> None:
        works, _ = self.flying[0]
        with self.waiting():
            for work in works:
                work.wait()
        self.flying.popleft()

    def _describe(self, packet: Packet, features: torch.Tensor) -> None:
        on_wire, order = _in_memory_order(features)
        spec = {
            "metrics": list(packet.metrics), "label": _described(packet.label),
            "image": None if packet.image is None else _described(packet.image),
            "features": _described(on_wire), "order": order, "dtype": _name(packet.features.dtype),
        }
        content = torch.frombuffer(bytearray(json.dumps(spec).encode()), dtype=torch.uint8)
        with self.waiting():
            dist.send(torch.tensor([len(content)]), self.to, tag=SPEC)
            dist.send(content, self.to, tag=SPEC)
        self._described = True


class Receiver:
    """Receives packets from the process ``source`` on ``device``; asks for up to ``in_flight`` ahead."""

    def __init__(
        self, source: int, in_flight: int, device: torch.device, waiting: Waiting = contextlib.nullcontext
    ):
        self.source, self.in_flight, self.device, self.waiting = source, in_flight, device, waiting

    def receive(self, counts: Sequence[int]) -> Iterator[Packet]:
        """Yield the packets of an epoch or an evaluation, of ``counts`` images each."""
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
    request = REQUESTS[int(tensors[REQUEST])]
    return Packet(features, tensors.get(IMAGE), tensors[LABEL], metrics, request)


def _in_memory_order(t: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return t's elements as a contiguous tensor, and their order; channels_last is not copied."""
    if is_channels_last(t):
        return t.permute(0, 2, 3, 1), "channels_last"
    return t.contiguous(), "contiguous"


def _described(t: torch.Tensor) -> tuple[list[int], str]:
    """Return the shape of one image's part, and the dtype."""
    return list(t.shape[1:]), _name(t.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
