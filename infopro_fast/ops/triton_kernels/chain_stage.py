"""Triton kernels of a stage of a chain decoder (`reconstruction_loss_chain`): z_prev (N, C, h, w), weight (K, C, 1 or 3, 1 or 3), z (N, K, H, W).

    a  = relu(gamma x + beta),  x = (z_prev - mean) / std       _activation_kernel, or the features as they are
    z  = conv(resize(a)) + bias                                 `triton_kernels.upsample_conv3x3`; 1x1 without resize: one product, torch.bmm
    dz = gamma / std (dy - mean dy - x mean(dy x))              _normalised_gradient_kernel
    da = conv^T(resize^T(dz)), dW                               as z
    dy_prev = da where a > 0; its sum, and that times x         _rectify_kernel, in place of da

a, dz and the convolution's own maps are made for as many samples at a time as stay in a GPU's second cache, so that none of them is ever
whole in memory; z's statistics and the last line are passes over the whole batch. Bytes a sample beside what `triton_kernels.upsample_conv3x3`
counts: 8 C h w for a and 4 K H W for the statistics; in backward 12 K H W for dz, 8 C h w for a and 12 C h w for dy.

Transient: a chunk of a, of dz and of the taps, up to 32 MiB each or those of a sample. z is float32, and so is all arithmetic but for a
product of features and weights that both have the same 16 bits, which float32 holds exactly, too; in TF32 where torch allows that for
matmuls. Deterministic: sums are of fixed blocks, added up in one order.
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import upsample_conv3x3 as conv3x3
from .target import Compilation, compilation, launched

BLOCK = 1024  # pixels of a map that a program takes

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: each program has one block of one map


@triton.jit
def _block_of_map(HW, BLOCK: tl.constexpr):
    """This program's map and block, and the pixels of it, in the map and from the first number of all."""
    blocks = tl.cdiv(HW, BLOCK)
    program = tl.program_id(0)
    plane, block = program // blocks, program % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    return plane, block, pixel, plane.to(tl.int64) * HW + pixel


@triton.jit
def _norm_of(mean, var, gamma, beta, c, eps, AFFINE: tl.constexpr):
    """(mean, 1 / standard deviation, gamma, beta) of channel c, float32."""
    centre = tl.load(mean + c).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.load(var + c).to(tl.float32) + eps)
    if AFFINE:
        return centre, inverse, tl.load(gamma + c).to(tl.float32), tl.load(beta + c).to(tl.float32)
    else:
        return centre, inverse, centre * 0 + 1, centre * 0


@launched
def _activation_kernel(z, mean, var, gamma, beta, out, C, HW, eps, AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """a of z (n, C, HW)."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, beta, plane % C, eps, AFFINE)
    y = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse * scale + shift
    tl.store(out + at, tl.where(y <= 0, 0.0, y), mask=pixel < HW)  # nan stays


@launched
def _normalised_gradient_kernel(
    dy, z, mean, var, gamma, mean_dy, out, C, HW, eps, AFFINE: tl.constexpr, BATCH_STATISTICS: tl.constexpr, BLOCK: tl.constexpr
):
    """dz from dy, both (n, C, HW); mean_dy (2, C): the means of dy and of dy x, which the batch's statistics take away."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    c = plane % C
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, gamma, c, eps, AFFINE)
    g = tl.load(dy + at, mask=pixel < HW, other=0.0)
    if BATCH_STATISTICS:
        x = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse
        g -= tl.load(mean_dy + c) + x * tl.load(mean_dy + C + c)
    tl.store(out + at, g * (scale * inverse), mask=pixel < HW)


@launched
def _rectify_kernel(dy, z, mean, var, gamma, beta, sums, blocks_of_all, C, HW, eps, AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """dy = da where a > 0, in place; sums (2, blocks of all maps): of dy, and of dy x."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, beta, plane % C, eps, AFFINE)
    x = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse
    g = tl.where(x * scale + shift <= 0, 0.0, tl.load(dy + at, mask=pixel < HW, other=0.0))
    tl.store(dy + at, g, mask=pixel < HW)
    tl.store(sums + tl.program_id(0), tl.sum(g))
    tl.store(sums + blocks_of_all + tl.program_id(0), tl.sum(tl.where(pixel < HW, g * x, 0.0)))


# ---------------------------------------------------------------------------------------------------------------------
# What a convolution reads: maps that are made when samples are asked for


class Norm(typing.NamedTuple):
    """Batch norm as a stage's op is given it; gamma and beta contiguous, or None."""

    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """mean, var, gamma, beta, as kernels take them where there is no affine part, too."""
        return self.mean, self.var, *((self.mean, self.var) if self.gamma is None else (self.gamma, self.beta))


def norm_of(mean, var, gamma, beta, eps) -> Norm | None:
    """None where x is a decoder's features, which nothing normalises."""
    if mean is None:
        return None
    return Norm(mean.contiguous(), var.contiguous(), *(None if t is None else t.contiguous() for t in (gamma, beta)), eps)


class _Made:
    """A tensor (N, C, H, W), float32, of which only the samples that are asked for exist."""

    dtype = torch.float32

    def __init__(self, like: torch.Tensor):
        self.shape, self.device = like.shape, like.device

    def numel(self) -> int:
        return self.shape.numel()


class Activation(_Made):
    """relu(norm(z))."""

    def __init__(self, z: torch.Tensor, norm: Norm):
        super().__init__(z)
        self.z, self.norm = z.contiguous(), norm

    def __getitem__(self, samples: slice) -> torch.Tensor:
        z = self.z[samples]
        out = torch.empty_like(z)
        C, HW = z.shape[1], z.shape[2] * z.shape[3]
        if out.numel():
            _activation_kernel[_grid(z)](z, *self.norm.pointers, out, C, HW, self.norm.eps, self.norm.gamma is not None, BLOCK)
        return out


class _NormalisedGradient(_Made):
    """The gradient of z, from that of its batch norm."""

    def __init__(self, dy: torch.Tensor, z: torch.Tensor, norm: Norm, mean_dy: torch.Tensor | None):
        super().__init__(z)
        self.dy, self.z, self.norm, self.mean_dy = dy.contiguous(), z.contiguous(), norm, mean_dy

    def __getitem__(self, samples: slice) -> torch.Tensor:
        dy, z = self.dy[samples], self.z[samples]
        out = torch.empty_like(z)
        of_batch = self.mean_dy is not None
        mean, var, gamma, _ = self.norm.pointers
        if out.numel():
            _normalised_gradient_kernel[_grid(z)](
                dy, z, mean, var, gamma, self.mean_dy.contiguous() if of_batch else mean, out, z.shape[1], z.shape[2] * z.shape[3],
                self.norm.eps, self.norm.gamma is not None, of_batch, BLOCK,
            )  # fmt: skip
        return out


def _grid(z: torch.Tensor) -> tuple[int]:
    return (z.shape[0] * z.shape[1] * triton.cdiv(z.shape[2] * z.shape[3], BLOCK),)


def rectify(da: torch.Tensor, z: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Make da the gradient of the batch norm's output, in place; its sums over pixels, and those of it times x: (2, C)."""
    N, C, HW = z.shape[0], z.shape[1], z.shape[2] * z.shape[3]
    (blocks,) = _grid(z)
    sums = torch.empty((2, blocks), dtype=torch.float32, device=z.device)
    if blocks:
        _rectify_kernel[(blocks,)](da, z.contiguous(), *norm.pointers, sums, blocks, C, HW, norm.eps, norm.gamma is not None, BLOCK)
    return sums.view(2, N, C, -1).sum((1, 3)) if blocks else sums.new_zeros(2, C)


# ---------------------------------------------------------------------------------------------------------------------
# The convolution of a stage


def convolve(x: torch.Tensor | Activation, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int, mode: int) -> torch.Tensor:
    """z (N, K, H, W), float32, contiguous."""
    (h, w), side = x.shape[2:], weight.shape[-1]
    if side == 1 and (h, w) == (H, W):
        return conv3x3.pointwise(x, weight, bias)
    return conv3x3.convolve(x, _three_by_three(weight), bias, H, W, _resize(h, w, H, W, mode), torch.float32)


def gradients(
    grad: torch.Tensor | _NormalisedGradient, x: torch.Tensor | Activation, weight: torch.Tensor, mode: int, needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Those of x (float32, or the features' dtype and strides) and of the weight (float32); nothing (0,) where not needed."""
    (h, w), (H, W), side = x.shape[2:], grad.shape[2:], weight.shape[-1]
    like = x.z if isinstance(x, Activation) else x
    g_x = torch.empty_like(like) if needs_x else like.new_empty((0,))
    if grad.numel() == 0 or not (needs_x or needs_weight):
        return g_x, torch.zeros(weight.shape if needs_weight else (0,), dtype=torch.float32, device=like.device)
    into, weight = g_x if needs_x else None, weight.float()  # products of float32 numbers: the gradient of a mean underflows in float16
    if side == 1 and (h, w) == (H, W):
        found = conv3x3.pointwise_gradients(grad, x, weight, into, needs_weight)
    else:
        found = conv3x3.write_gradients(grad, x, _three_by_three(weight), _resize(h, w, H, W, mode), into, needs_weight)
        found = found[:, :, 1:2, 1:2].contiguous() if found is not None and side == 1 else found
    return g_x, found if needs_weight else like.new_empty((0,), dtype=torch.float32)


def _three_by_three(weight: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution behind a resize, which no released decoder has, as the middle of a 3x3 one."""
    return weight if weight.shape[-1] == 3 else F.pad(weight, (1, 1, 1, 1))


def _resize(h: int, w: int, H: int, W: int, mode: int) -> int:
    """The mode; nearest, which reads one pixel for one, where nothing is resized."""
    return 1 if (h, w) == (H, W) else mode


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: the arguments of the ops' schemas. Resizes by factors are those that give whole sizes, so that sizes say all.


def forward(x, mean, var, gamma, beta, eps, weight, bias, H, W, mode, factors, in_f64):
    """`chain_stage_forward`: z, and mean and biased variance (2, K) of its channels."""
    norm = norm_of(mean, var, gamma, beta, eps)
    z = convolve(x if norm is None else Activation(x, norm), weight, bias, H, W, mode)
    if z.numel() == 0:
        return z, z.new_zeros((2, weight.shape[0]))
    variance, average = torch.var_mean(z, (0, 2, 3), correction=0)
    return z, torch.stack([average, variance])


def backward(
    dy, z, z_mean, z_var, z_gamma, z_eps, mean_dy, x, mean, var, gamma, beta, eps, weight, mode, factors, needs_x, needs_weight
):  # fmt: skip
    """`chain_stage_backward`: of x the gradient (of its batch norm, if it has one), its sums (2, C), and the weight's gradient."""
    outer = norm_of(z_mean, z_var, z_gamma, z_gamma, z_eps)
    return through(_NormalisedGradient(dy, z, outer, mean_dy), x, norm_of(mean, var, gamma, beta, eps), weight, mode, needs_x, needs_weight)


def through(grad, x, norm, weight, mode, needs_x, needs_weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from the gradient of the convolution's output."""
    g_x, g_weight = gradients(grad, x if norm is None else Activation(x, norm), weight, mode, needs_x, needs_weight)
    sums = rectify(g_x, x, norm) if norm is not None and needs_x else g_x.new_zeros((2, x.shape[1]), dtype=torch.float32)
    return g_x, sums, g_weight


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled, for tests that compile it ahead of time


def configurations(cc: int) -> typing.Iterator[Compilation]:
    """Every kernel, with and without an affine part, whose parameters may be of 16 bits; of one channel."""
    for parameters, affine, fixed in (("*fp32", True, {}), ("*bf16", True, {}), ("*fp32", False, {"C": 1, "HW": 1})):
        for kernel in (_activation_kernel, _normalised_gradient_kernel, _rectify_kernel):
            chosen = {"AFFINE": affine, "BATCH_STATISTICS": affine, "BLOCK": BLOCK} | fixed
            types = {"blocks_of_all": "i32", "eps": "fp32", "gamma": parameters, "beta": parameters}
            yield compilation(kernel, types, chosen)
