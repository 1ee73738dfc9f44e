"""Run the CUDA kernels of reconstruction_loss, compiled by g++, on the host as the torch ops of a GPU.

`build` compiles csrc/cuda/*.cuh with cuda_host.h in place of the CUDA runtime. `Kernels` (the CIFAR decoder)
and `ChainKernels` (a chain decoder's stages) call the launchers in the object through ctypes. `register`
gives the ops `infopro_fast::reconstruction_loss_*_cuda` and `chain_*_cuda` an implementation for CPU tensors,
which calls `current`. Stages without CUDA C++ kernels run the CPU kernels in place of Triton's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import typing

import torch

from infopro_fast.ops import dispatch, reconstruction_loss_single

FOLDER = os.path.dirname(os.path.abspath(__file__))
CSRC = os.path.join(os.path.dirname(os.path.dirname(FOLDER)), "csrc")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # infopro::Dtype


def build(path: str, *flags: str, csrc: str = CSRC, source: str = "decoder_host.cpp") -> str:
    """Compile ``source``, decoder_host.cpp or chain_host.cpp, with the kernels in ``csrc`` into ``path``."""
    source = os.path.join(FOLDER, source)
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    command = (
        "g++", "-std=c++17", "-O1", *warnings, "-fPIC", "-shared", *flags, "-include",
        f"{FOLDER}/cuda_host.h", f"-I{csrc}",
    )
    done = subprocess.run([*command, source, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return path


class Device(typing.NamedTuple):
    """Limits to plan for. With few multiprocessors, blocks take several tiles, as in a large batch."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


H100 = Device(132, 227 * 1024, 228 * 1024)
A100 = Device(108, 163 * 1024, 164 * 1024)
RTX4090 = Device(128, 99 * 1024, 100 * 1024)
TWO_BLOCKS = Device(2, 99 * 1024, 24 * 1024)


class Plan(typing.NamedTuple):
    """Plan of reconstruction_loss_plan.cuh; samples of a backward launch; blocks together; bytes."""

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


_LIMITS = ("multiprocessors", "shared_per_block", "shared_per_multiprocessor", "seed")
_ARRAYS = ("features", "image", "w1", "b1", "gamma", "beta", "w2", "b2", "running_mean", "running_var")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "K", "h", "w", "H", "W", "nearest", "loss",
            "precision")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in _LIMITS),
        *((name, _Array) for name in _ARRAYS),
        ("restore", ctypes.POINTER(ctypes.c_double)),
    ]


def _array(t: torch.Tensor | None) -> _Array:
    if t is None:
        return _Array(None, 0)
    return _Array(t.data_ptr(), _DTYPES[t.dtype], (ctypes.c_int64 * 4)(*(t.stride() if t.dim() == 4 else ())))


class Kernels:
    """The launchers in a compiled object. device: limits to plan for; seed: order of warps and lanes."""

    def __init__(self, path: str, device: Device = TWO_BLOCKS, seed: int = 0):
        self.library = ctypes.CDLL(path)
        for name in ("decoder_forward", "decoder_backward", "product"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.decoder_switches.restype = self.library.decoder_conflicts.restype = ctypes.c_int64
        self.device, self.seed = device, seed

    def forward(
        self, features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode,
        loss, needs_grad, precision,
    ):
        statistics = dict(running_mean=running_mean, running_var=running_var)
        parameters = self._contiguous(w1=w1, b1=b1, gamma=gamma, beta=beta, w2=w2, b2=b2, **statistics)
        call = self._call(features, image, parameters, restore, eps, mode, loss, precision)
        size = reconstruction_loss_single.saved_numbers(features, image, len(w1), needs_grad, precision)
        value, saved = torch.full((), torch.nan), torch.full((size,), torch.nan)
        self._check(
            self.library.decoder_forward(
                ctypes.byref(call), ctypes.c_int64(needs_grad), _pointer(value), _pointer(saved)
            )
        )
        return value, saved

    def backward(self, grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics,
                 eps, mode, loss, needs_features, needs_w1, precision):
        parameters = self._contiguous(w1=w1, b1=b1, gamma=gamma, beta=beta, w2=w2, b2=b2)
        call = self._call(features, image, parameters, restore, eps, mode, loss, precision)
        grad, saved = grad.contiguous(), saved.contiguous()
        d_features = torch.full_like(features, torch.nan) if needs_features else features.new_empty((0,))
        d_w1, d_b1 = (
            torch.full(tuple(w1.shape) if needs_w1 else (0,), torch.nan),
            torch.full((w1.shape[0],), torch.nan),
        )
        arguments = (
            _pointer(grad), _pointer(saved), ctypes.c_int64(batch_statistics),
            ctypes.byref(_array(d_features if needs_features else None)),
            _pointer(d_w1) if needs_w1 else None, _pointer(d_b1),
        )
        self._check(self.library.decoder_backward(ctypes.byref(call), *arguments))
        return d_features, d_w1, d_b1

    def plan(self, N, C, h, w, H, W, K, nearest=False, precision=0) -> Plan:
        call = _Call(N=N, C=C, K=K, h=h, w=w, H=H, W=W, nearest=nearest, precision=precision,
            **self.device._asdict())
        numbers = (ctypes.c_int64 * len(Plan._fields))()
        self.library.decoder_plan(ctypes.byref(call), numbers)
        return Plan(*numbers)

    def product(self, precision: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
        """c += a b by one instruction of a warp: fragments (32, words) as lanes hold them."""
        self._check(self.library.product(ctypes.c_int64(precision), _pointer(a), _pointer(b), _pointer(c)))

    def conflicts(self) -> int:
        """Return the most wavefronts over the fewest possible, of shared memory since the last call."""
        return self.library.decoder_conflicts()

    def _contiguous(self, **parameters):
        return {name: t if t is None else t.contiguous() for name, t in parameters.items()}

    def _call(self, features, image, parameters, restore, eps, mode, loss, precision) -> _Call:
        (N, C, h, w), (H, W), K = features.shape, image.shape[-2:], parameters["w1"].shape[0]
        numbers = dict(
            N=N, C=C, K=K, h=h, w=w, H=H, W=W, nearest=mode, loss=loss, precision=precision, eps=eps,
            seed=self.seed, **self.device._asdict(),
        )
        arrays = {name: _array(t) for name, t in {"features": features, "image": image, **parameters}.items()}
        call = _Call(**numbers, **arrays)
        if restore:
            call.restore = (ctypes.c_double * 6)(*restore)
        return call

    def _check(self, error: bytes | None):
        if error:
            raise RuntimeError(error.decode())


class ChainPlan(typing.NamedTuple):
    """Plan of chain_stage_plan.cuh for one direction; blocks on a multiprocessor; bytes."""

    tiles: int
    tile_h: int
    tile_w: int
    low_h: int
    low_w: int
    out_h: int
    out_w: int
    strips: int
    tile_strips: int
    shared: int
    blocks: int
    bytes: int


class _ChainCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "K", "h", "w", "H", "W", "mode", "loss")),
        *((name, ctypes.c_double) for name in ("eps", "factor_y", "factor_x")),
        *((name, ctypes.c_int64) for name in _LIMITS),
        *((name, _Array) for name in ("x", "image", "weight", "bias", "mean", "var", "gamma", "beta")),
        ("restore", ctypes.POINTER(ctypes.c_double)),
    ]


class _Outer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dy", "z", "mean_dy")),
        *((name, _Array) for name in ("mean", "var", "gamma")),
        ("eps", ctypes.c_double),
    ]


class ChainKernels:
    """The same as `Kernels`, for a chain decoder's stages."""

    def __init__(self, path: str, device: Device = TWO_BLOCKS, seed: int = 0):
        self.library = ctypes.CDLL(path)
        for name in (
            "chain_loss_forward", "chain_loss_backward", "chain_stage_forward", "chain_stage_backward"
        ):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.device, self.seed = device, seed
        self.calls: list[str] = []

    def loss_forward(
        self, x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss, in_f64
    ):
        assert not in_f64
        if not len(x):
            return torch.zeros(())
        kept = self._contiguous(weight, bias, mean, var, gamma, beta)
        call = self._call("loss_forward", x, kept, eps, image.shape, mode, factors, image, restore, loss)
        value = torch.full((), torch.nan)
        self._check(self.library.chain_loss_forward(ctypes.byref(call), _pointer(value)))
        return value

    def loss_backward(
        self, grad, x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss,
        needs_x, needs_weight,
    ):
        found, d_bias = self._gradients(x, mean, weight, needs_x, needs_weight), torch.full((3,), torch.nan)
        if not len(x):
            return *(t.zero_() for t in found), d_bias.zero_()
        kept, grad = self._contiguous(weight, bias, mean, var, gamma, beta), grad.contiguous()
        call = self._call("loss_backward", x, kept, eps, image.shape, mode, factors, image, restore, loss)
        arguments = *_pointers(*found, needs_x, needs_weight), _pointer(d_bias)
        self._check(self.library.chain_loss_backward(ctypes.byref(call), _pointer(grad), *arguments))
        return *found, d_bias

    def stage_forward(self, x, mean, var, gamma, beta, eps, weight, bias, H, W, mode, factors, in_f64):
        assert not in_f64
        z, statistics = (
            torch.full((len(x), len(weight), H, W), torch.nan),
            torch.full((2, len(weight)), torch.nan),
        )
        if not len(x):
            return z, statistics.zero_()
        kept = self._contiguous(weight, bias, mean, var, gamma, beta)
        call = self._call("stage_forward", x, kept, eps, z.shape, mode, factors)
        self._check(self.library.chain_stage_forward(ctypes.byref(call), _pointer(z), _pointer(statistics)))
        return z, statistics

    def stage_backward(self, dy, z, z_mean, z_var, z_gamma, z_eps, mean_dy, x, mean, var, gamma, beta, eps,
                       weight, mode, factors, needs_x, needs_weight):
        found = self._gradients(x, mean, weight, needs_x, needs_weight)
        if not len(x):
            return tuple(t.zero_() for t in found)
        kept = self._contiguous(weight, None, mean, var, gamma, beta)
        dy, z, mean_dy, z_mean, z_var, z_gamma = self._contiguous(dy, z, mean_dy, z_mean, z_var, z_gamma)
        means = None if mean_dy is None else mean_dy.data_ptr()
        outer = _Outer(
            dy.data_ptr(), z.data_ptr(), means, _array(z_mean), _array(z_var), _array(z_gamma), z_eps
        )
        call = self._call("stage_backward", x, kept, eps, dy.shape, mode, factors)
        self._check(
            self.library.chain_stage_backward(
                ctypes.byref(call), ctypes.byref(outer), *_pointers(*found, needs_x, needs_weight)
            )
        )
        return found

    def plan(self, last: bool, backward: bool, N, C, h, w, H, W, K=3, mode=0, factor=0.0) -> ChainPlan:
        call = _ChainCall(
            N=N, C=C, K=K, h=h, w=w, H=H, W=W, mode=mode, factor_y=factor, factor_x=factor,
            **self.device._asdict(),
        )
        numbers = (ctypes.c_int64 * len(ChainPlan._fields))()
        self.library.chain_plan(ctypes.byref(call), ctypes.c_int64(last), ctypes.c_int64(backward), numbers)
        return ChainPlan(*numbers)

    def _contiguous(self, *tensors):
        return [None if t is None else t.contiguous() for t in tensors]

    def _gradients(self, x, mean, weight, needs_x, needs_weight):
        d_x = torch.full_like(x, torch.nan) if mean is None else torch.full(x.shape, torch.nan)
        d_weight = torch.full(tuple(weight.shape) if needs_weight else (0,), torch.nan)
        return d_x if needs_x else x.new_empty((0,)), torch.full((2, x.shape[1]), torch.nan), d_weight

    def _call(
        self, name, x, parameters, eps, out, mode, factors, image=None, restore=(), loss=0
    ) -> _ChainCall:
        self.calls.append(name)
        (N, C, h, w), (H, W) = x.shape, out[2:]
        numbers = dict(N=N, C=C, K=len(parameters[0]), h=h, w=w, H=H, W=W, mode=mode, loss=loss, eps=eps)
        numbers |= dict(zip(("factor_y", "factor_x"), factors or (0.0, 0.0), strict=True))
        names = ("x", "image", "weight", "bias", "mean", "var", "gamma", "beta")
        arrays = {name: _array(t) for name, t in zip(names, (x, image, *parameters), strict=True)}
        call = _ChainCall(**numbers, seed=self.seed, **self.device._asdict(), **arrays)
        if restore:
            call.restore = (ctypes.c_double * 6)(*restore)
        return call

    def _check(self, error: bytes | None):
        if error:
            raise RuntimeError(error.decode())


def _pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _pointers(d_x, sums, d_weight, needs_x, needs_weight):
    """Return the arguments for the results of a chain stage's backward."""
    to = ctypes.byref(_array(d_x if needs_x else None))
    return ctypes.c_int64(needs_x), to, _pointer(sums), _pointer(d_weight) if needs_weight else None


class current:
    """The kernels that the ops call."""

    kernels: Kernels | None = None
    chain: ChainKernels | None = None


def register() -> torch.library.Library:
    """Register the ops for CPU tensors, for as long as the returned library lives."""
    library = torch.library.Library("infopro_fast", "IMPL")
    for direction in ("forward", "backward"):
        library.impl(
            f"reconstruction_loss_{direction}_cuda", functools.partial(_call, "kernels", direction), "CPU"
        )
        for part in ("loss", "stage"):
            library.impl(
                f"chain_{part}_{direction}_cuda", functools.partial(_call, "chain", f"{part}_{direction}"),
                "CPU",
            )
        if not dispatch.INTERPRETED:
            library.impl(
                f"chain_stage_{direction}_triton",
                getattr(torch.ops.infopro_fast, f"chain_stage_{direction}").default, "CPU",
            )
    return library


def _call(held: str, method: str, *args):
    return getattr(getattr(current, held), method)(*args)
