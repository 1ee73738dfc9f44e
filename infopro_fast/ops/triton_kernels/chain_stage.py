"""Triton kernels of a stage of a chain decoder: z_prev (N, C, h, w), weight (K, C, 1 or 3, 1 or 3), z (N, K,
H, W).

    a  = relu(gamma x + beta),  x = (z_prev - mean) / std       activation_kernel; the first stage: features
    z  = conv(resize(a)) + bias                                 `upsample_conv3x3`, or torch.bmm if pointwise
    dz = gamma / std (dy - mean dy - x mean(dy x))              normalised_gradient_kernel
    da = conv^T(resize^T(dz)), dW                               as z
    dy_prev = da where a > 0; sums of it and of it times x      rectify_kernel, in place of da

a, dz and the convolution's maps exist only for chunks of samples that fit a GPU's second cache. z's
statistics and the last line are passes over the whole batch. Bytes a sample, beside those of
`upsample_conv3x3`: forward 8 C h w for a and 4 K H W for the statistics; backward 12 K H W for dz, 8 C h w
for a and 12 C h w for dy.

Transient: a chunk each of a, dz and the taps, up to 32 MiB or one sample each. z and all arithmetic are
float32. Features and weights that both have the same 16 bits are multiplied as they are, which is exact in
float32; other products use TF32 where torch allows it. Deterministic: sums of fixed blocks in a fixed order.
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import upsample_conv3x3 as conv3x3
from .target import launched

BLOCK = 1024  # pixels of a map that a program takes

# Kernels: each program has one block of one map


@triton.jit
def _block_of_map(HW, BLOCK):
    """This program's map and block, its pixels in the map, and their offsets in the tensor."""
    blocks = tl.cdiv(HW, BLOCK)
    program = tl.program_id(0)
    plane, block = program // blocks, program % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    return plane, block, pixel, plane.to(tl.int64) * HW + pixel


@triton.jit
def _norm_of(mean, var, gamma, beta, c, eps, AFFINE):
    """(mean, 1 / standard deviation, gamma, beta) of channel c, float32."""
    centre = tl.load(mean + c).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.load(var + c).to(tl.float32) + eps)
    if AFFINE:
        return centre, inverse, tl.load(gamma + c).to(tl.float32), tl.load(beta + c).to(tl.float32)
    else:
        return centre, inverse, centre * 0 + 1, centre * 0


@launched
def activation_kernel(z, mean, var, gamma, beta, out, C, HW, eps, AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """a of z (n, C, HW)."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, beta, plane % C, eps, AFFINE)
    y = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse * scale + shift
    tl.store(out + at, tl.where(y <= 0, 0.0, y), mask=pixel < HW)  # nan stays


@launched
def normalised_gradient_kernel(
    dy, z, mean, var, gamma, mean_dy, out, C, HW, eps, AFFINE: tl.constexpr, BATCH_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz from dy, both (n, C, HW). mean_dy (2, C): means of dy and dy x, which batch statistics subtract."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    c = plane % C
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, gamma, c, eps, AFFINE)
    g = tl.load(dy + at, mask=pixel < HW, other=0.0)
    if BATCH_STATISTICS:
        x = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse
        g -= tl.load(mean_dy + c) + x * tl.load(mean_dy + C + c)
    tl.store(out + at, g * (scale * inverse), mask=pixel < HW)


@launched
def rectify_kernel(
    dy, z, mean, var, gamma, beta, sums, blocks_of_all, C, HW, eps, AFFINE: tl.constexpr, BLOCK: tl.constexpr
):
    """dy = da where a > 0, in place; sums (2, blocks of all maps): of dy, and of dy x."""
    plane, block, pixel, at = _block_of_map(HW, BLOCK)
    centre, inverse, scale, shift = _norm_of(mean, var, gamma, beta, plane % C, eps, AFFINE)
    x = (tl.load(z + at, mask=pixel < HW, other=0.0) - centre) * inverse
    g = tl.where(x * scale + shift <= 0, 0.0, tl.load(dy + at, mask=pixel < HW, other=0.0))
    tl.store(dy + at, g, mask=pixel < HW)
    tl.store(sums + tl.program_id(0), tl.sum(g))
    tl.store(sums + blocks_of_all + tl.program_id(0), tl.sum(tl.where(pixel < HW, g * x, 0.0)))


# Inputs of a convolution: maps that are computed when samples are read


class Norm(typing.NamedTuple):
    """Batch norm of a stage; gamma and beta are contiguous, or None."""

    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """mean, var, gamma, beta; without an affine part, pointers that no kernel reads."""
        affine = (self.mean, self.var) if self.gamma is None else (self.gamma, self.beta)
        return self.mean, self.var, *affine


def norm_of(mean, var, gamma, beta, eps) -> Norm | None:
    """Batch norm of a stage's input; None for a decoder's features."""
    if mean is None:
        return None
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    return Norm(mean.contiguous(), var.contiguous(), gamma, beta, eps)


class _Made:
    """A float32 tensor (N, C, H, W) whose samples are computed when a slice is read."""

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
            activation_kernel[_grid(z)](
                z, *self.norm.pointers, out, C, HW, self.norm.eps, self.norm.gamma is not None, BLOCK
            )
        return out


class NormalisedGradient(_Made):
    """The gradient of z, from that of its batch norm's output."""

    def __init__(self, dy: torch.Tensor, z: torch.Tensor, norm: Norm, mean_dy: torch.Tensor | None):
        super().__init__(z)
        self.dy, self.z, self.norm, self.mean_dy = dy.contiguous(), z.contiguous(), norm, mean_dy

    def __getitem__(self, samples: slice) -> torch.Tensor:
        dy, z = self.dy[samples], self.z[samples]
        out = torch.empty_like(z)
        of_batch = self.mean_dy is not None
        mean, var, gamma, _ = self.norm.pointers
        if out.numel():
            normalised_gradient_kernel[_grid(z)](
                dy, z, mean, var, gamma, self.mean_dy.contiguous() if of_batch else mean, out, z.shape[1],
                z.shape[2] * z.shape[3], self.norm.eps, self.norm.gamma is not None, of_batch, BLOCK,
            )
        return out


def _grid(z: torch.Tensor) -> tuple[int]:
    return (z.shape[0] * z.shape[1] * triton.cdiv(z.shape[2] * z.shape[3], BLOCK),)


def rectify(da: torch.Tensor, z: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Turn da into dy, the gradient of the batch norm's output, in place; return its sums, (2, C)."""
    N, C, HW = z.shape[0], z.shape[1], z.shape[2] * z.shape[3]
    (blocks,) = _grid(z)
    sums = torch.empty((2, blocks), dtype=torch.float32, device=z.device)
    if blocks:
        rectify_kernel[(blocks,)](
            da, z.contiguous(), *norm.pointers, sums, blocks, C, HW, norm.eps, norm.gamma is not None, BLOCK
        )
    return sums.view(2, N, C, -1).sum((1, 3)) if blocks else sums.new_zeros(2, C)


# The convolution of a stage


def convolve(
    x: torch.Tensor | Activation, weight: torch.Tensor, bias: torch.Tensor | None, H: int, W: int, mode: int
) -> torch.Tensor:
    """z (N, K, H, W), float32, contiguous."""
    (h, w), side = x.shape[2:], weight.shape[-1]
    if side == 1 and (h, w) == (H, W):
        return conv3x3.pointwise(x, weight, bias)
    return conv3x3.convolve(x, _three_by_three(weight), bias, H, W, _resize(h, w, H, W, mode), torch.float32)


def gradients(
    grad: torch.Tensor | NormalisedGradient, x: torch.Tensor | Activation, weight: torch.Tensor, mode: int,
    needs_x: bool, needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (float32, or like the features) and weight (float32); (0,) where not needed."""
    (h, w), (H, W), side = x.shape[2:], grad.shape[2:], weight.shape[-1]
    like = x.z if isinstance(x, Activation) else x
    g_x = torch.empty_like(like) if needs_x else like.new_empty((0,))
    if grad.numel() == 0 or not (needs_x or needs_weight):
        shape = weight.shape if needs_weight else (0,)
        return g_x, torch.zeros(shape, dtype=torch.float32, device=like.device)
    # products of float32 numbers: the gradient of a mean underflows in float16
    into, weight = g_x if needs_x else None, weight.float()
    if side == 1 and (h, w) == (H, W):
        found = conv3x3.pointwise_gradients(grad, x, weight, into, needs_weight)
    else:
        mode, weight = _resize(h, w, H, W, mode), _three_by_three(weight)
        found = conv3x3.write_gradients(grad, x, weight, mode, into, needs_weight)
        found = found[:, :, 1:2, 1:2].contiguous() if found is not None and side == 1 else found
    return g_x, found if needs_weight else like.new_empty((0,), dtype=torch.float32)


def _three_by_three(weight: torch.Tensor) -> torch.Tensor:
    """The weight as 3x3: a 1x1 behind a resize, which no published decoder has, becomes the middle tap."""
    return weight if weight.shape[-1] == 3 else F.pad(weight, (1, 1, 1, 1))


def _resize(h: int, w: int, H: int, W: int, mode: int) -> int:
    """The mode of the resize; nearest, which copies, where sizes are equal."""
    return 1 if (h, w) == (H, W) else mode


# Launchers, with the arguments of the ops' schemas. ``factors`` is not needed: sizes determine the resize.


def forward(x, mean, var, gamma, beta, eps, weight, bias, H, W, mode, factors, in_f64):
    """`chain_stage_forward`: z, and the mean and biased variance of its channels, (2, K)."""
    norm = norm_of(mean, var, gamma, beta, eps)
    z = convolve(x if norm is None else Activation(x, norm), weight, bias, H, W, mode)
    if z.numel() == 0:
        return z, z.new_zeros((2, weight.shape[0]))
    variance, average = torch.var_mean(z, (0, 2, 3), correction=0)
    return z, torch.stack([average, variance])


def backward(
    dy, z, z_mean, z_var, z_gamma, z_eps, mean_dy, x, mean, var, gamma, beta, eps, weight, mode, factors,
    needs_x, needs_weight,
):
    """`chain_stage_backward`: gradient of x (or its batch norm's output), sums (2, C), g_weight."""
    outer = norm_of(z_mean, z_var, z_gamma, z_gamma, z_eps)
    return through(
        NormalisedGradient(dy, z, outer, mean_dy), x, norm_of(mean, var, gamma, beta, eps), weight, mode,
        needs_x, needs_weight,
    )


def through(grad, x, norm, weight, mode, needs_x, needs_weight) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]:
    """As `backward`, from the gradient of the convolution's output."""
    a = x if norm is None else Activation(x, norm)
    g_x, g_weight = gradients(grad, a, weight, mode, needs_x, needs_weight)
    rectifies = norm is not None and needs_x
    sums = rectify(g_x, x, norm) if rectifies else g_x.new_zeros((2, x.shape[1]), dtype=torch.float32)
    return g_x, sums, g_weight
