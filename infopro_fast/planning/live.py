"""Bytes alive at any point of a program, by purpose: the measure under everything else here.

A dispatch mode sees every storage that a torch op returns, a finalizer sees its end, and hooks see what
autograd keeps. The program computes nothing more, and nothing at all under a `FakeTensorMode` or on the meta
device. Workspaces that an op allocates and frees inside (convolution libraries, kernels) are not seen.
"""

from __future__ import annotations

import contextlib
import functools
import time
import typing
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kinds of bytes. A storage counts as the first that fits.
LOADED = "loaded"  # parameters, buffers and the batch
GRADIENTS = "gradients"  # of parameters
OPTIMIZER = "optimizer"  # its state
SAVED = "saved"  # kept by autograd for backward
TRANSIENT = "transient"  # everything else

KINDS = (GRADIENTS, OPTIMIZER, SAVED, TRANSIENT)


class Bytes(typing.NamedTuple):
    """Bytes alive at one time, by kind."""

    gradients: int = 0
    optimizer: int = 0
    saved: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class LiveBytes:
    """Context manager that follows every storage from its first op to its end.

    loaded: tensors whose storages are never counted, whoever keeps them.

    now: `Bytes` alive at this time. peak: `Bytes` at the time of the largest total since the last `reset`.
    most_saved: the most that autograd kept at any time since then, each storage once.
    """

    def __init__(self, loaded: Iterable[torch.Tensor] = ()):
        self._size: dict[int, int] = {}  # by address of the storage
        self._kept: dict[int, int] = {}  # how many times autograd holds it
        self._owner: dict[int, str] = {}
        self._now = dict.fromkeys((*KINDS, LOADED), 0)
        self._made = 0  # storages so far, which numbers them
        self._number: dict[int, int] = {}
        self.hold(LOADED, loaded)
        self.reset()

    def __enter__(self) -> LiveBytes:
        self._context = contextlib.ExitStack()
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._context.enter_context(hooks)
        self._context.enter_context(_Watch(self._add))
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()

    @property
    def now(self) -> Bytes:
        return Bytes(*(self._now[kind] for kind in KINDS))

    def reset(self) -> None:
        """Start the peak again from what is alive now."""
        self.peak, self.most_saved = self.now, self._now[SAVED]

    def hold(self, kind: str, tensors: Iterable[torch.Tensor | None]) -> None:
        """Count these tensors' storages as this kind until they end."""
        for t in tensors:
            if t is not None:
                key = self._add(t)
                self._change(key, functools.partial(self._owner.setdefault, key, kind))

    def watch_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
        """Return a context in which the ``.grad`` of these parameters counts as gradients."""
        stack = contextlib.ExitStack()
        for p in parameters:
            hook = p.register_post_accumulate_grad_hook(lambda p: self.hold(GRADIENTS, [p.grad]))
            stack.callback(hook.remove)
        return stack

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Count storages that are made inside and alive at the end as saved.

        Checkpointing keeps the maps of its second forward where no hook of autograd sees them.
        """
        first = self._made
        try:
            yield
        finally:
            for key in [key for key, number in self._number.items() if number >= first]:
                self._change(key, functools.partial(self._owner.setdefault, key, SAVED))

    def _add(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._size:
            self._size[key], self._number[key] = storage.nbytes(), self._made
            self._made += 1
            weakref.finalize(storage, self._end, key)
            self._count(key, 1)
        return key

    def _end(self, key: int) -> None:
        self._count(key, -1)
        for table in (self._size, self._number, self._owner, self._kept):
            table.pop(key, None)

    def _pack(self, t: torch.Tensor) -> _Kept:
        key = self._add(t)
        self._change(key, lambda: self._kept.update({key: self._kept.get(key, 0) + 1}))
        kept = _Kept(t)
        weakref.finalize(kept, self._unpack, key)
        return kept

    def _unpack(self, key: int) -> None:
        if key in self._kept:
            self._change(key, lambda: self._kept.update({key: self._kept[key] - 1}))

    def _change(self, key: int, change: typing.Callable[[], object]) -> None:
        """Change the kind of a storage. The total stays, so only `most_saved` can move."""
        self._now[self._kind(key)] -= self._size[key]
        change()
        self._now[self._kind(key)] += self._size[key]
        self.most_saved = max(self.most_saved, self._now[SAVED]) if hasattr(self, "most_saved") else 0

    def _count(self, key: int, sign: int) -> None:
        self._now[self._kind(key)] += sign * self._size[key]
        if sign > 0 and hasattr(self, "peak") and self.now.total > self.peak.total:
            self.peak = self.now

    def _kind(self, key: int) -> str:
        return self._owner.get(key) or (SAVED if self._kept.get(key) else TRANSIENT)


class _Kept:
    """Stands for a tensor that autograd keeps; it ends when autograd lets go."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class _Watch(TorchDispatchMode):
    def __init__(self, see: typing.Callable[[torch.Tensor], object]):
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(t)
        return out


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of these tensors' storages, each counted once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def saved_bytes(call: typing.Callable[[], object], beside: Iterable[torch.Tensor] = ()) -> int:
    """Return the bytes that the graph of ``call`` keeps, each storage once, without tensors ``beside`` it.

    Compiled code runs as it is, which `LiveBytes` would run uncompiled.
    """
    alive = {t.untyped_storage()._cdata for t in beside}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in alive:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # held until the sum is taken, so that no address is used twice
    total = sum(kept.values())
    del result
    return total


def seconds(call: typing.Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of ``call``, until the device has done its work."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
