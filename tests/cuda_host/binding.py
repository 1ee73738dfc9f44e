"""The CUDA kernels of reconstruction_loss, compiled by g++ and run on the host, as the torch ops that they are on a GPU.

`build` compiles csrc/*.cuh with cuda_host.h in place of the CUDA runtime; `Kernels` calls the launchers in the object through ctypes;
`register` gives the ops `infopro_fast::reconstruction_loss_*_cuda` an implementation for CPU tensors, that of `current.kernels`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import typing

import torch

FOLDER = os.path.dirname(os.path.abspath(__file__))
CSRC = os.path.join(os.path.dirname(os.path.dirname(FOLDER)), "csrc")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # infopro::Dtype


def build(path: str, *flags: str, csrc: str = CSRC) -> str:
    """Compile the kernels in ``csrc`` into the shared object ``path``."""
    source = os.path.join(FOLDER, "decoder_host.cpp")
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    command = ("g++", "-std=c++17", "-O1", *warnings, "-fPIC", "-shared", *flags, "-include", f"{FOLDER}/cuda_host.h", f"-I{csrc}")
    done = subprocess.run([*command, source, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return path


class Device(typing.NamedTuple):
    """What the launchers plan for. Few multiprocessors: blocks then take several tiles, as they do on a GPU with a large batch."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


H100 = Device(132, 227 * 1024, 228 * 1024)
A100 = Device(108, 163 * 1024, 164 * 1024)
RTX4090 = Device(128, 99 * 1024, 100 * 1024)
TWO_BLOCKS = Device(2, 99 * 1024, 24 * 1024)


class Plan(typing.NamedTuple):
    """csrc/decoder_plan.cuh's; samples that a launch of backward takes; blocks to a multiprocessor; transient bytes."""

    low_resolution: int
    tiles: int
    tile_h: int
    tile_w: int
    group: int
    part: int
    chunk: int
    late_channels: int
    samples: int
    shared: int
    blocks: int
    forward_bytes: int
    backward_bytes: int


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("strides", ctypes.c_int64 * 4)]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "K", "h", "w", "H", "W", "nearest", "loss")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("multiprocessors", "shared_per_block", "shared_per_multiprocessor", "seed")),
        *((name, _Array) for name in ("features", "image", "w1", "b1", "gamma", "beta", "w2", "b2", "running_mean", "running_var")),
        ("restore", ctypes.POINTER(ctypes.c_double)),
    ]  # fmt: skip


def _array(t: torch.Tensor | None) -> _Array:
    if t is None:
        return _Array(None, 0)
    return _Array(t.data_ptr(), _DTYPES[t.dtype], (ctypes.c_int64 * 4)(*(t.stride() if t.dim() == 4 else ())))


class Kernels:
    """The launchers in a compiled object. device, seed: what the next calls plan for, and the order of warps and lanes."""

    def __init__(self, path: str, device: Device = TWO_BLOCKS, seed: int = 0):
        self.library = ctypes.CDLL(path)
        for name in ("decoder_forward", "decoder_backward"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.decoder_switches.restype = ctypes.c_int64
        self.device, self.seed = device, seed

    def forward(self, features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss, needs_grad):
        statistics = dict(running_mean=running_mean, running_var=running_var)
        parameters = self._contiguous(w1=w1, b1=b1, gamma=gamma, beta=beta, w2=w2, b2=b2, **statistics)
        call = self._call(features, image, parameters, restore, eps, mode, loss)
        value, saved = torch.full((), torch.nan), torch.full((31 * w1.shape[0] + 3,), torch.nan)
        self._check(self.library.decoder_forward(ctypes.byref(call), ctypes.c_int64(needs_grad), _pointer(value), _pointer(saved)))
        return value, saved

    def backward(self, grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics, eps, mode, loss,
                 needs_features, needs_w1):  # fmt: skip
        parameters = self._contiguous(w1=w1, b1=b1, gamma=gamma, beta=beta, w2=w2, b2=b2)
        call = self._call(features, image, parameters, restore, eps, mode, loss)
        grad, saved = grad.contiguous(), saved.contiguous()
        d_features = torch.full_like(features, torch.nan) if needs_features else features.new_empty((0,))
        d_w1, d_b1 = torch.full(tuple(w1.shape) if needs_w1 else (0,), torch.nan), torch.full((w1.shape[0],), torch.nan)
        arguments = (
            _pointer(grad), _pointer(saved), ctypes.c_int64(batch_statistics), ctypes.byref(_array(d_features if needs_features else None)),
            _pointer(d_w1) if needs_w1 else None, _pointer(d_b1),
        )  # fmt: skip
        self._check(self.library.decoder_backward(ctypes.byref(call), *arguments))
        return d_features, d_w1, d_b1

    def plan(self, N, C, h, w, H, W, K, nearest=False) -> Plan:
        call = _Call(N=N, C=C, K=K, h=h, w=w, H=H, W=W, nearest=nearest, **self.device._asdict())
        numbers = (ctypes.c_int64 * len(Plan._fields))()
        self.library.decoder_plan(ctypes.byref(call), numbers)
        return Plan(*numbers)

    def _contiguous(self, **parameters):
        return {name: t if t is None else t.contiguous() for name, t in parameters.items()}

    def _call(self, features, image, parameters, restore, eps, mode, loss) -> _Call:
        (N, C, h, w), (H, W), K = features.shape, image.shape[-2:], parameters["w1"].shape[0]
        numbers = dict(N=N, C=C, K=K, h=h, w=w, H=H, W=W, nearest=mode, loss=loss, eps=eps, seed=self.seed, **self.device._asdict())
        arrays = {name: _array(t) for name, t in {"features": features, "image": image, **parameters}.items()}
        call = _Call(**numbers, **arrays)
        if restore:
            call.restore = (ctypes.c_double * 6)(*restore)
        return call

    def _check(self, error: bytes | None):
        if error:
            raise RuntimeError(error.decode())


def _pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


class current:
    """The kernels that the ops call."""

    kernels: Kernels | None = None


def register() -> torch.library.Library:
    """The ops' implementation for CPU tensors, for as long as what is returned lives."""
    library = torch.library.Library("infopro_fast", "IMPL")
    library.impl("reconstruction_loss_forward_cuda", lambda *args: current.kernels.forward(*args), "CPU")
    library.impl("reconstruction_loss_backward_cuda", lambda *args: current.kernels.backward(*args), "CPU")
    return library
