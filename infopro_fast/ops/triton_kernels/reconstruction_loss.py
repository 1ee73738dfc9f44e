"""Triton kernels of `reconstruction_loss`: three sweeps over the batch, one launch each.

No map of the whole batch is ever written. A program takes one item at a time. An item is a sample, or a strip
of its rows where there are fewer samples than programs or the maps are large. Between the phases of an item,
its maps lie in the program's own scratch memory, which is small enough to stay in the caches. A barrier makes
them visible to all of the program's threads.

With resized features:

    T[tap, k] = W1[tap, k, :] h                       tl.dot
    E[dy, k]  = T expanded in x, shifted by dx
    z[k]      = E expanded in y, shifted by dy, + b1

Without a resize:

    z = conv3x3(h) + b1                               tl.dot over taps and channels

With both:

    statistics:  count, mean, squares of z            per item, merged in float64 by a second kernel
    x = (z - mean) / std;  a = relu(gamma x + beta);  s = conv3x3(a) + b2;  loss and g = d loss / d s
    loss:        da = conv3x3^T(g), sums of dy, dy x  tl.dot with the 27 shifted values of g around a pixel
                 dW2 = g a^T                          tl.dot with the same
    backward:    dz = batch norm's backward of da

Then the backward of resized features, and without a resize:

    dE = y-expansion^T dz, dT = x-expansion^T dE
    dh = W1^T dT, dW1 = dT h^T                        tl.dot
    dh = conv3x3^T(dz), dW1 = dz u^T                  tl.dot, without a resize

Cost of a sample where the scratch memory stays in the caches; e is the number of bytes of a feature, and a
pixel value has 4:

    sweep        bytes of DRAM         multiply-adds
    statistics   e C h w               P = 9 K C h w + K (18 h W + 6 H W); without a resize P = 9 K C H W
    loss         e C h w + 12 H W      P + 81 K H W: 27 K H W each for s, dW2 and da
    backward     2 e C h w + 12 H W    2 P + 54 K H W + 9 K C h w; the second P is for dT, by the transposes

Every program also writes its partial sums: 4 (29 K + 4) bytes after the loss, 36 K C after the backward. A
strip recomputes the rows around it: two rows of the image on each side for the loss, about three more than
the resize's ratio for the backward.

Transient memory: programs x `Plan.scratch` x 4 bytes, and the partial sums. The former is at most
`scratch_budget`: a quarter of the resized map, or 32 MiB. Kept for backward: the inputs and 31 K + 3 numbers,
as on the CPU.

Each phase is a function that is not inlined. A program then needs the registers of its largest phase, 128 a
thread. Inlined, the values that all phases share would be live over the whole item, and registers would
spill. For the same reason the number of strips is an argument that is never specialised.

Deterministic: each program adds up its items in order, and a second kernel adds up the programs in order. The
number of programs depends on shape and device alone.
"""

from __future__ import annotations

import contextlib
import typing

import torch
import triton
import triton.language as tl

from .pixel import load_target, pixel_loss
from .reconstruction_loss_plan import Plan, Shape, plan
from .target import INTERPRETED, capability, compilation, dot_precision, launched, multiprocessors, spread

_INTERPRETED = tl.constexpr(INTERPRETED)

# Triton 3.6 puts a product of widened 16-bit numbers on Blackwell's tensor cores, which a function of its own
# cannot use, and fails: there the launcher widens before the launch.
WIDEN_BEFORE = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 8)


# --------------------------------------------------------------------------------------------------------
# The resize of one axis. `source` and `first_output` of reconstruction_loss_plan.py say the same in Python.


@triton.jit
def _source(p, IN: tl.constexpr, OUT: tl.constexpr, NEAREST: tl.constexpr):
    """Return the two inputs that output p (inside 0..OUT) takes, and the weight of the second.

    Positions are exact integers, never rounded.
    """
    if NEAREST:
        # F.interpolate has a float32 scale
        low = tl.minimum((p.to(tl.float32) * (IN / OUT)).to(tl.int32), IN - 1)
        return low, low, low.to(tl.float32) * 0
    LAST: tl.constexpr = OUT - 1 if OUT > 1 else 1
    low = p * (IN - 1) // LAST
    rest = (p * (IN - 1) - low * LAST).to(tl.float32)
    weight = rest * (1 / LAST)
    # rest / LAST to half a unit in the last place; a division would call a function
    weight += (rest - weight * LAST) * (1 / LAST)
    return low, tl.minimum(low + 1, IN - 1), weight


@triton.jit
def _first_output(i, IN: tl.constexpr, OUT: tl.constexpr, NEAREST: tl.constexpr):
    """No output before this one takes input i."""
    if NEAREST:
        return tl.maximum(i * OUT // IN - 1, 0)
    if IN == 1:
        return i * 0
    return tl.where(i > 0, tl.maximum(i - 1, 0) * (OUT - 1) // (IN - 1) + 1, 0)


@triton.jit
def _inside(p, SIZE: tl.constexpr):
    return (p >= 0) & (p < SIZE)


@triton.jit
def _shifted_source(p, IN: tl.constexpr, OUT: tl.constexpr, NEAREST: tl.constexpr):
    """`_source` with both weights, which are 0 where p lies outside the resized map."""
    low, high, weight = _source(tl.minimum(tl.maximum(p, 0), OUT - 1), IN, OUT, NEAREST)
    inside = _inside(p, OUT)
    return low, high, tl.where(inside, 1 - weight, 0.0), tl.where(inside, weight, 0.0)


@triton.jit
def _write_table(
    table, IN: tl.constexpr, OUT: tl.constexpr, COUNT: tl.constexpr, NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The resize's transpose: table[i, t] = weight of input i in output first_output(i) + t, t < COUNT."""
    for e0 in range(0, IN * COUNT, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        i = e // COUNT
        p = _first_output(i, IN, OUT, NEAREST) + e % COUNT
        low, high, low_weight, high_weight = _shifted_source(p, IN, OUT, NEAREST)
        weight = tl.where(low == i, low_weight, 0.0) + tl.where(high == i, high_weight, 0.0)
        tl.store(table + e, weight, mask=e < IN * COUNT)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 accumulation; 16-bit operands stay so where both are, which is exact."""
    WIDEN: tl.constexpr = PRECISION == "widened" or a.dtype != b.dtype
    if _INTERPRETED:  # which computes garbage from bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif WIDEN:
        return tl.dot(
            a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32" if PRECISION == "tf32" else "ieee"
        )
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


# --------------------------------------------------------------------------------------------------------
# z


@triton.jit(noinline=True)
def _write_taps(
    features, s_c, s_y, s_x, w_taps, taps, t0, t1, C: tl.constexpr, w: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):
    """taps[tap * K + k][p] = sum over c of W1 features, at the pixels of the feature rows t0..t1."""
    count = (t1 - t0) * w
    for p0 in range(0, count, P):
        p = p0 + tl.arange(0, P)
        at = (t0 + p // w) * s_y + p % w * s_x
        for m0 in range(0, 9 * K, M):
            m = m0 + tl.arange(0, M)
            acc = tl.zeros((M, P), tl.float32)
            for c0 in range(0, C, D):
                c = c0 + tl.arange(0, D)
                valid = (m[:, None] < 9 * K) & (c[None, :] < C)
                weight = tl.load(w_taps + m[:, None] * C + c[None, :], mask=valid, other=0.0)
                valid = (c[:, None] < C) & (p[None, :] < count)
                x = tl.load(features + c[:, None] * s_c + at[None, :], mask=valid, other=0.0)
                acc = _dot(weight, x, acc, PRECISION)
            tl.store(
                taps + m[:, None] * TP + p[None, :], acc, mask=(m[:, None] < 9 * K) & (p[None, :] < count)
            )


@triton.jit(noinline=True)
def _write_expanded(
    taps, expanded, rows, w: tl.constexpr, W: tl.constexpr, K: tl.constexpr, TP: tl.constexpr,
    EP: tl.constexpr, NEAREST: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
):
    """expanded[dy * K + k][i, X] = sum over dx of taps[dy, dx, k][i], resized in x, at X + dx - 1."""
    for e0 in range(0, rows * W, B):
        e = e0 + tl.arange(0, B)
        i, X = e // W, e % W
        low0, high0, wl0, wh0 = _shifted_source(X - 1, w, W, NEAREST)
        low1, high1, wl1, wh1 = _shifted_source(X, w, W, NEAREST)
        low2, high2, wl2, wh2 = _shifted_source(X + 1, w, W, NEAREST)
        for q0 in range(0, 3 * K, KB):
            q = q0 + tl.arange(0, KB)
            mask = (q[:, None] < 3 * K) & (e[None, :] < rows * W)
            at = taps + (q // K * (3 * K) + q % K)[:, None] * TP + (i * w)[None, :]
            acc = wl0[None, :] * tl.load(at + low0[None, :], mask=mask, other=0.0)
            acc += wl1[None, :] * tl.load(at + K * TP + low1[None, :], mask=mask, other=0.0)
            acc += wl2[None, :] * tl.load(at + 2 * K * TP + low2[None, :], mask=mask, other=0.0)
            if not NEAREST:
                acc += wh0[None, :] * tl.load(at + high0[None, :], mask=mask, other=0.0)
                acc += wh1[None, :] * tl.load(at + K * TP + high1[None, :], mask=mask, other=0.0)
                acc += wh2[None, :] * tl.load(at + 2 * K * TP + high2[None, :], mask=mask, other=0.0)
            tl.store(expanded + q[:, None] * EP + e[None, :], acc, mask=mask)


@triton.jit(noinline=True)
def _write_rows(
    expanded, b1, x, a0, a1, t0, h: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    EP: tl.constexpr, XP: tl.constexpr, NEAREST: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
):
    """x[k][Y - a0, X] = z for the rows a0..a1 of the image.

    z = b1 + sum over dy of expanded[dy, k], resized in y, at Y + dy - 1.
    """
    count = (a1 - a0) * W
    for p0 in range(0, count, B):
        p = p0 + tl.arange(0, B)
        Y, X = a0 + p // W, p % W
        low0, high0, wl0, wh0 = _shifted_source(Y - 1, h, H, NEAREST)
        low1, high1, wl1, wh1 = _shifted_source(Y, h, H, NEAREST)
        low2, high2, wl2, wh2 = _shifted_source(Y + 1, h, H, NEAREST)
        low0, high0 = (low0 - t0) * W + X, (high0 - t0) * W + X
        low1, high1 = (low1 - t0) * W + X, (high1 - t0) * W + X
        low2, high2 = (low2 - t0) * W + X, (high2 - t0) * W + X
        for k0 in range(0, K, KB):
            k = k0 + tl.arange(0, KB)
            mask = (k[:, None] < K) & (p[None, :] < count)
            at = expanded + k[:, None] * EP
            acc = wl0[None, :] * tl.load(at + low0[None, :], mask=mask, other=0.0)
            acc += wl1[None, :] * tl.load(at + K * EP + low1[None, :], mask=mask, other=0.0)
            acc += wl2[None, :] * tl.load(at + 2 * K * EP + low2[None, :], mask=mask, other=0.0)
            if not NEAREST:
                acc += wh0[None, :] * tl.load(at + high0[None, :], mask=mask, other=0.0)
                acc += wh1[None, :] * tl.load(at + K * EP + high1[None, :], mask=mask, other=0.0)
                acc += wh2[None, :] * tl.load(at + 2 * K * EP + high2[None, :], mask=mask, other=0.0)
            if b1 is not None:
                acc += tl.load(b1 + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
            tl.store(x + k[:, None] * XP + p[None, :], acc, mask=mask)


@triton.jit(noinline=True)
def _write_convolved(
    features, s_c, s_y, s_x, w_taps, b1, x, a0, a1, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, XP: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, KT: tl.constexpr,
    D: tl.constexpr,
):
    """x[k][Y - a0, X] = z = conv3x3(features) + b1, where the features have the image's size."""
    count = (a1 - a0) * W
    for p0 in range(0, count, P):
        p = p0 + tl.arange(0, P)
        Y, X = a0 + p // W, p % W
        for k0 in range(0, K, KT):
            k = k0 + tl.arange(0, KT)
            acc = tl.zeros((P, KT), tl.float32)
            for step in range(0, 9 * ((C + D - 1) // D)):
                tap, c = step % 9, step // 9 * D + tl.arange(0, D)
                y, xx = Y + tap // 3 - 1, X + tap % 3 - 1
                inside = (p < count) & _inside(y, H) & _inside(xx, W)
                mask = inside[:, None] & (c[None, :] < C)
                u = tl.load(features + (y * s_y + xx * s_x)[:, None] + c[None, :] * s_c, mask=mask, other=0.0)
                at = (tap * K + k)[None, :] * C + c[:, None]
                weight = tl.load(w_taps + at, mask=(k[None, :] < K) & (c[:, None] < C), other=0.0)
                acc = _dot(u, weight, acc, PRECISION)
            if b1 is not None:
                acc += tl.load(b1 + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            tl.store(x + k[None, :] * XP + p[:, None], acc, mask=(k[None, :] < K) & (p[:, None] < count))


@triton.jit
def _write_pre_norm(
    features, s_c, s_y, s_x, w_taps, b1, x, low, a0, a1, C: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, RESIZE: tl.constexpr, NEAREST: tl.constexpr,
    AR: tl.constexpr, TR: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, PC: tl.constexpr, KT: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
):
    """x[k][Y - a0, X] = z for the rows a0..a1 of the image; low: scratch for 9 K TR w + 3 K TR W numbers."""
    if RESIZE:
        t0, _, _ = _source(tl.maximum(a0 - 1, 0), h, H, NEAREST)
        _, t1, _ = _source(tl.minimum(a1, H - 1), h, H, NEAREST)
        t1 += 1
        expanded = low + 9 * K * TR * w
        _write_taps(features, s_c, s_y, s_x, w_taps, low, t0, t1, C, w, K, TR * w, PRECISION, M, P, D)
        tl.debug_barrier()
        _write_expanded(low, expanded, t1 - t0, w, W, K, TR * w, TR * W, NEAREST, KB, B)
        tl.debug_barrier()
        _write_rows(expanded, b1, x, a0, a1, t0, h, H, W, K, TR * W, AR * W, NEAREST, KB, B)
    else:
        _write_convolved(
            features, s_c, s_y, s_x, w_taps, b1, x, a0, a1, C, H, W, K, AR * W, PRECISION, PC, KT, D
        )
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------------------
# From z to the gradient in the logits


@triton.jit
def _write_norm(norm, mean, var, gamma, beta, eps, K: tl.constexpr, KP: tl.constexpr):
    """norm (4, K): mean, 1 / std, gamma and beta of each channel."""
    k = tl.arange(0, KP)
    valid = k < K
    variance = tl.load(var + k, mask=valid, other=1.0)
    scale = tl.zeros((KP,), tl.float32) + 1
    shift = tl.zeros((KP,), tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + k, mask=valid, other=0.0).to(tl.float32)
        shift = tl.load(beta + k, mask=valid, other=0.0).to(tl.float32)
    tl.store(norm + k, tl.load(mean + k, mask=valid, other=0.0), mask=valid)
    tl.store(norm + K + k, tl.rsqrt(variance + eps), mask=valid)
    tl.store(norm + 2 * K + k, scale, mask=valid)
    tl.store(norm + 3 * K + k, shift, mask=valid)


@triton.jit(noinline=True)
def _write_activation(
    x, a, norm, a0, a1, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, XP: tl.constexpr, AP: tl.constexpr,
    B: tl.constexpr,
):
    """x becomes (z - mean) / std; a = relu(gamma x + beta).

    a is a plane with a border of zeros: rows a0 - 1..a1 + 1 of W + 2.
    """
    count = (a1 - a0 + 2) * (W + 2)
    for p0 in range(0, count, B):
        p = p0 + tl.arange(0, B)
        row, X = p // (W + 2) - 1, p % (W + 2) - 1
        inside = (row >= 0) & (row < a1 - a0) & _inside(X, W)
        for k in range(K):
            at = x + k * XP + row * W + X
            normalized = (tl.load(at, mask=inside, other=0.0) - tl.load(norm + k)) * tl.load(norm + K + k)
            tl.store(at, normalized, mask=inside)
            y = normalized * tl.load(norm + 2 * K + k) + tl.load(norm + 3 * K + k)
            tl.store(
                a + k * AP + (row + 1) * (W + 2) + X + 1, tl.where(inside & (y > 0), y, 0.0), mask=p < count
            )


@triton.jit
def _fill_zero(to, count, B: tl.constexpr):
    for e0 in range(0, count, B):
        e = e0 + tl.arange(0, B)
        tl.store(to + e, tl.zeros((B,), tl.float32), mask=e < count)


@triton.jit
def _add(to, value, fresh):
    """to += value; what is there counts unless `fresh`."""
    tl.store(to, value + tl.load(to, mask=fresh == 0, other=0.0))


@triton.jit(noinline=True)
def _write_gradient(
    a, g, image, i_c, i_y, i_x, w2, b2, weight, m0, m1, m2, d0, d1, d2, sums, fresh, a0, g0, g1, y0, y1,
    W: tl.constexpr, K: tl.constexpr, AP: tl.constexpr, GP: tl.constexpr, RESTORE: tl.constexpr,
    LOSS: tl.constexpr, SUMS: tl.constexpr, B: tl.constexpr,
):
    """g[o] = weight * d loss / d s, a plane with a border of zeros.

    If SUMS, the sums of g and of the loss over the rows y0..y1 are added to sums (4).
    """
    PITCH: tl.constexpr = W + 2
    count = (g1 - g0) * W
    total = tl.zeros((B,), tl.float32)
    total0 = tl.zeros((B,), tl.float32)
    total1 = tl.zeros((B,), tl.float32)
    total2 = tl.zeros((B,), tl.float32)
    for p0 in range(0, count, B):
        p = p0 + tl.arange(0, B)
        Y, X = g0 + p // W, p % W
        mask = p < count
        at = a + (Y - a0) * PITCH + X
        s0 = tl.zeros((B,), tl.float32)
        s1 = tl.zeros((B,), tl.float32)
        s2 = tl.zeros((B,), tl.float32)
        if b2 is not None:
            s0 += tl.load(b2).to(tl.float32)
            s1 += tl.load(b2 + 1).to(tl.float32)
            s2 += tl.load(b2 + 2).to(tl.float32)
        for k in range(K):
            for tap in tl.static_range(9):
                value = tl.load(at + k * AP + tap // 3 * PITCH + tap % 3, mask=mask, other=0.0)
                s0 += value * tl.load(w2 + k * 9 + tap).to(tl.float32)
                s1 += value * tl.load(w2 + (K + k) * 9 + tap).to(tl.float32)
                s2 += value * tl.load(w2 + (2 * K + k) * 9 + tap).to(tl.float32)
        pixel = Y * i_y + X * i_x
        loss0, gradient0 = pixel_loss(s0, load_target(image, pixel, mask, m0, d0, RESTORE), LOSS)
        loss1, gradient1 = pixel_loss(s1, load_target(image, pixel + i_c, mask, m1, d1, RESTORE), LOSS)
        loss2, gradient2 = pixel_loss(s2, load_target(image, pixel + 2 * i_c, mask, m2, d2, RESTORE), LOSS)
        to = g + (Y - g0 + 1) * PITCH + X + 1
        tl.store(to, gradient0 * weight, mask=mask)
        tl.store(to + GP, gradient1 * weight, mask=mask)
        tl.store(to + 2 * GP, gradient2 * weight, mask=mask)
        if SUMS:
            own = mask & (Y >= y0) & (Y < y1)
            total += tl.where(own, loss0 + loss1 + loss2, 0.0)
            total0 += tl.where(own, gradient0, 0.0)
            total1 += tl.where(own, gradient1, 0.0)
            total2 += tl.where(own, gradient2, 0.0)
    if SUMS:
        _add(sums, tl.sum(total0, 0) * weight, fresh)
        _add(sums + 1, tl.sum(total1, 0) * weight, fresh)
        _add(sums + 2, tl.sum(total2, 0) * weight, fresh)
        _add(sums + 3, tl.sum(total, 0), fresh)


@triton.jit
def _around(g, p, count, first, g0, W: tl.constexpr, GP: tl.constexpr):
    """Return (P, 32): g[o] where the tap meets the pixel, in column o * 9 + tap; the rest is 0.

    The pixels p are those of the rows from `first` on.
    """
    q = tl.arange(0, 32)
    at = (first + p // W - g0 + 1) * (W + 2) + p % W + 1
    off = q // 9 * GP - (q % 9 // 3 - 1) * (W + 2) - (q % 3 - 1)  # q % 9 % 3 is q % 3
    return tl.load(g + at[:, None] + off[None, :], mask=(p[:, None] < count) & (q[None, :] < 27), other=0.0)


@triton.jit
def _weights_around(w2, k, K: tl.constexpr):
    """(32, KT): w2[o, k, tap] in row o * 9 + tap."""
    q = tl.arange(0, 32)
    at = (q // 9 * K)[:, None] * 9 + k[None, :] * 9 + (q % 9)[:, None]
    return tl.load(w2 + at, mask=(q[:, None] < 27) & (k[None, :] < K), other=0.0).to(tl.float32)


@triton.jit(noinline=True)
def _add_sums(
    x, a, g, w2, partial, fresh, a0, g0, y0, y1, W: tl.constexpr, K: tl.constexpr, XP: tl.constexpr,
    AP: tl.constexpr, GP: tl.constexpr, KT: tl.constexpr, P: tl.constexpr,
):
    """partial += d gamma (K), d beta (K), d w2 (3, K, 9) over the rows y0..y1; fresh: starts from 0."""
    count = (y1 - y0) * W
    q = tl.arange(0, 32)
    for k0 in range(0, K, KT):
        k = k0 + tl.arange(0, KT)
        weight = _weights_around(w2, k, K)
        d_w2 = tl.zeros((32, KT), tl.float32)
        d_beta = tl.zeros((P, KT), tl.float32)
        d_gamma = tl.zeros((P, KT), tl.float32)
        for p0 in range(0, count, P):
            p = p0 + tl.arange(0, P)
            mask = (p[:, None] < count) & (k[None, :] < K)
            Y, X = y0 + p // W, p % W
            around = _around(g, p, count, y0, g0, W, GP)
            activation = tl.load(
                a + ((Y - a0 + 1) * (W + 2) + X + 1)[:, None] + k[None, :] * AP, mask=mask, other=0.0
            )
            normalized = tl.load(x + ((Y - a0) * W + X)[:, None] + k[None, :] * XP, mask=mask, other=0.0)
            dy = _dot(around, weight, tl.zeros((P, KT), tl.float32), "ieee")
            dy = tl.where(activation > 0, dy, 0.0)
            d_beta += dy
            d_gamma += dy * normalized
            d_w2 = _dot(tl.trans(around), activation, d_w2, "ieee")
        kept = (k < K) & spread(fresh == 0, k)
        to = partial + k
        tl.store(to, tl.sum(d_gamma, 0) + tl.load(to, mask=kept, other=0.0), mask=k < K)
        tl.store(to + K, tl.sum(d_beta, 0) + tl.load(to + K, mask=kept, other=0.0), mask=k < K)
        to_w2 = partial + 2 * K + (q // 9 * K)[:, None] * 9 + k[None, :] * 9 + (q % 9)[:, None]
        valid = (q[:, None] < 27) & (k[None, :] < K)
        tl.store(to_w2, d_w2 + tl.load(to_w2, mask=valid & spread(fresh == 0, valid), other=0.0), mask=valid)


# --------------------------------------------------------------------------------------------------------
# From the gradient in the logits to those of the features and W1


@triton.jit(noinline=True)
def _write_norm_backward(
    x, a, g, w2, to, t_row, t_plane, t_origin, norm, d_gamma, d_beta, scale_sums, a0, g0, r0, r1,
    W: tl.constexpr, K: tl.constexpr, XP: tl.constexpr, AP: tl.constexpr, GP: tl.constexpr, KT: tl.constexpr,
    P: tl.constexpr,
):
    """to = gradient in z of the rows r0..r1, in the place of x or of a.

    scale_sums: upstream / count, 0 in eval mode.
    """
    count = (r1 - r0) * W
    for k0 in range(0, K, KT):
        k = k0 + tl.arange(0, KT)
        weight = _weights_around(w2, k, K)
        scale = tl.load(norm + K + k, mask=k < K, other=0.0)
        scale *= tl.load(norm + 2 * K + k, mask=k < K, other=0.0)
        mean_dy = tl.load(d_beta + k, mask=k < K, other=0.0) * scale_sums
        mean_dy_x = tl.load(d_gamma + k, mask=k < K, other=0.0) * scale_sums
        for p0 in range(0, count, P):
            p = p0 + tl.arange(0, P)
            mask = (p[:, None] < count) & (k[None, :] < K)
            Y, X = r0 + p // W, p % W
            activation = tl.load(
                a + ((Y - a0 + 1) * (W + 2) + X + 1)[:, None] + k[None, :] * AP, mask=mask, other=0.0
            )
            normalized = tl.load(x + ((Y - a0) * W + X)[:, None] + k[None, :] * XP, mask=mask, other=0.0)
            dy = _dot(_around(g, p, count, r0, g0, W, GP), weight, tl.zeros((P, KT), tl.float32), "ieee")
            dy = tl.where(activation > 0, dy, 0.0)
            dz = (dy - mean_dy[None, :] - normalized * mean_dy_x[None, :]) * scale[None, :]
            tl.store(to + t_origin + ((Y - a0) * t_row + X)[:, None] + k[None, :] * t_plane, dz, mask=mask)


@triton.jit(noinline=True)
def _gather_rows(
    dz, table, d_expanded, i0, i1, a0, h: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    XP: tl.constexpr, EP: tl.constexpr, COUNT: tl.constexpr, NEAREST: tl.constexpr, KB: tl.constexpr,
    B: tl.constexpr,
):
    """The transpose of `_write_rows`, for the feature rows i0..i1."""
    count = (i1 - i0) * W
    for e0 in range(0, count, B):
        e = e0 + tl.arange(0, B)
        i, X = i0 + e // W, e % W
        first = _first_output(i, h, H, NEAREST)
        for q0 in range(0, 3 * K, KB):
            q = q0 + tl.arange(0, KB)
            dy = q // K - 1
            mask = (q[:, None] < 3 * K) & (e[None, :] < count)
            acc = tl.zeros((KB, B), tl.float32)
            for t in range(COUNT):
                Y = (first + t)[None, :] - dy[:, None]
                weight = tl.load(
                    tl.broadcast_to(table + (i * COUNT + t)[None, :], (KB, B)), mask=mask, other=0.0
                )
                valid = mask & _inside(Y, H) & (weight != 0)
                acc += weight * tl.load(
                    dz + (q % K * XP)[:, None] + (Y - a0) * W + X[None, :], mask=valid, other=0.0
                )
            tl.store(d_expanded + q[:, None] * EP + e[None, :], acc, mask=mask)


@triton.jit(noinline=True)
def _gather_columns(
    d_expanded, table, d_taps, rows, w: tl.constexpr, W: tl.constexpr, K: tl.constexpr, EP: tl.constexpr,
    TP: tl.constexpr, COUNT: tl.constexpr, NEAREST: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
):
    """The transpose of `_write_expanded`."""
    count = rows * w
    for e0 in range(0, count, B):
        e = e0 + tl.arange(0, B)
        i, j = e // w, e % w
        first = _first_output(j, w, W, NEAREST)
        for m0 in range(0, 9 * K, KB):
            m = m0 + tl.arange(0, KB)  # tap * K + k
            dx = m // K % 3 - 1
            mask = (m[:, None] < 9 * K) & (e[None, :] < count)
            at = d_expanded + (m // (3 * K) * K + m % K)[:, None] * EP + (i * W)[None, :]
            acc = tl.zeros((KB, B), tl.float32)
            for t in range(COUNT):
                X = (first + t)[None, :] - dx[:, None]
                weight = tl.load(
                    tl.broadcast_to(table + (j * COUNT + t)[None, :], (KB, B)), mask=mask, other=0.0
                )
                acc += weight * tl.load(at + X, mask=mask & _inside(X, W) & (weight != 0), other=0.0)
            tl.store(d_taps + m[:, None] * TP + e[None, :], acc, mask=mask)


@triton.jit(noinline=True)
def _write_features_from_taps(
    d_taps, w_taps, d_features, s_c, s_y, s_x, i0, i1, C: tl.constexpr, w: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):
    """d features = W1^T d taps, of the feature rows i0..i1."""
    count = (i1 - i0) * w
    for p0 in range(0, count, P):
        p = p0 + tl.arange(0, P)
        for c0 in range(0, C, M):
            c = c0 + tl.arange(0, M)
            acc = tl.zeros((M, P), tl.float32)
            for m0 in range(0, 9 * K, D):
                m = m0 + tl.arange(0, D)
                valid = (m[None, :] < 9 * K) & (c[:, None] < C)
                weight = tl.load(w_taps + m[None, :] * C + c[:, None], mask=valid, other=0.0)
                valid = (m[:, None] < 9 * K) & (p[None, :] < count)
                x = tl.load(d_taps + m[:, None] * TP + p[None, :], mask=valid, other=0.0)
                acc = _dot(weight, x, acc, PRECISION)
            to = d_features + c[:, None] * s_c + ((i0 + p // w) * s_y + p % w * s_x)[None, :]
            tl.store(to, acc, mask=(c[:, None] < C) & (p[None, :] < count))


@triton.jit(noinline=True)
def _add_w1_from_taps(
    d_taps, features, s_c, s_y, s_x, partial, fresh, i0, i1, C: tl.constexpr, w: tl.constexpr,
    K: tl.constexpr, TP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):
    """partial[tap * K + k][c] += d taps features^T over the feature rows i0..i1."""
    count = (i1 - i0) * w
    for m0 in range(0, 9 * K, M):
        m = m0 + tl.arange(0, M)
        for c0 in range(0, C, N):
            c = c0 + tl.arange(0, N)
            acc = tl.zeros((M, N), tl.float32)
            for p0 in range(0, count, D):
                p = p0 + tl.arange(0, D)
                valid = (m[:, None] < 9 * K) & (p[None, :] < count)
                x = tl.load(d_taps + m[:, None] * TP + p[None, :], mask=valid, other=0.0)
                at = ((i0 + p // w) * s_y + p % w * s_x)[:, None] + c[None, :] * s_c
                valid = (p[:, None] < count) & (c[None, :] < C)
                acc = _dot(x, tl.load(features + at, mask=valid, other=0.0), acc, PRECISION)
            mask = (m[:, None] < 9 * K) & (c[None, :] < C)
            to = partial + m[:, None] * C + c[None, :]
            tl.store(to, acc + tl.load(to, mask=mask & spread(fresh == 0, mask), other=0.0), mask=mask)


@triton.jit(noinline=True)
def _write_features_convolved(
    dz, w_taps, d_features, s_c, s_y, s_x, i0, i1, a0, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    AP: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, N: tl.constexpr, KT: tl.constexpr,
):
    """d features = conv3x3^T(dz) of the rows i0..i1, without a resize; dz has a border of zeros."""
    count = (i1 - i0) * W
    for p0 in range(0, count, P):
        p = p0 + tl.arange(0, P)
        Y, X = i0 + p // W, p % W
        at = (Y - a0 + 1) * (W + 2) + X + 1
        for c0 in range(0, C, N):
            c = c0 + tl.arange(0, N)
            acc = tl.zeros((P, N), tl.float32)
            for step in range(0, 9 * ((K + KT - 1) // KT)):
                tap, k = step % 9, step // 9 * KT + tl.arange(0, KT)
                off = at - (tap // 3 - 1) * (W + 2) - (tap % 3 - 1)
                valid = (p[:, None] < count) & (k[None, :] < K)
                x = tl.load(dz + off[:, None] + k[None, :] * AP, mask=valid, other=0.0)
                valid = (k[:, None] < K) & (c[None, :] < C)
                weight = tl.load(w_taps + (tap * K + k)[:, None] * C + c[None, :], mask=valid, other=0.0)
                acc = _dot(x, weight, acc, PRECISION)
            to = d_features + (Y * s_y + X * s_x)[:, None] + c[None, :] * s_c
            tl.store(to, acc, mask=(p[:, None] < count) & (c[None, :] < C))


@triton.jit(noinline=True)
def _add_w1_convolved(
    dz, features, s_c, s_y, s_x, partial, fresh, i0, i1, a0, C: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, AP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr,
):
    """partial[tap * K + k][c] += sum of the features times dz where the tap carries them.

    The sum runs over the pixels of the rows i0..i1.
    """
    count = (i1 - i0) * W
    for m0 in range(0, 9 * K, M):
        m = m0 + tl.arange(0, M)
        tap = m // K
        to_tap = m % K * AP - (tap // 3 - 1) * (W + 2) - (tap % 3 - 1)
        for c0 in range(0, C, N):
            c = c0 + tl.arange(0, N)
            acc = tl.zeros((M, N), tl.float32)
            for p0 in range(0, count, D):
                p = p0 + tl.arange(0, D)
                Y, X = i0 + p // W, p % W
                at = to_tap[:, None] + ((Y - a0 + 1) * (W + 2) + X + 1)[None, :]
                x = tl.load(dz + at, mask=(m[:, None] < 9 * K) & (p[None, :] < count), other=0.0)
                u = features + (Y * s_y + X * s_x)[:, None] + c[None, :] * s_c
                acc = _dot(
                    x, tl.load(u, mask=(p[:, None] < count) & (c[None, :] < C), other=0.0), acc, PRECISION
                )
            mask = (m[:, None] < 9 * K) & (c[None, :] < C)
            to = partial + m[:, None] * C + c[None, :]
            tl.store(to, acc + tl.load(to, mask=mask & spread(fresh == 0, mask), other=0.0), mask=mask)


# --------------------------------------------------------------------------------------------------------
# The sweeps


@launched(do_not_specialize=["strips"])
def statistics_kernel(
    scratch, items, strips, features, s_n, s_c, s_y, s_x, w_taps, b1, means, squares, C: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    NEAREST: tl.constexpr, ROWS: tl.constexpr, AR: tl.constexpr, TR: tl.constexpr, SCRATCH: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, PC: tl.constexpr,
    KT: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
):
    """means, squares (K, items), float64: of z over an item, the squares about its mean."""
    x = scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    for i in range(tl.program_id(0), items, tl.num_programs(0)):
        item = tl.program_id(0) * 0 + i  # a tensor in the interpreter too
        y0 = item % strips * ROWS
        y1 = tl.minimum(y0 + ROWS, H)
        sample = features + (item // strips).to(tl.int64) * s_n
        _write_pre_norm(
            sample, s_c, s_y, s_x, w_taps, b1, x, x + K * AR * W, y0, y1, C, h, w, H, W, K, h != H or w != W,
            NEAREST, AR, TR, PRECISION, M, P, D, PC, KT, KB, B,
        )
        count = (y1 - y0) * W
        for k0 in range(0, K, KB):
            k = k0 + tl.arange(0, KB)
            total = tl.zeros((KB, B), tl.float32)
            for p0 in range(0, count, B):
                p = p0 + tl.arange(0, B)
                valid = (k[:, None] < K) & (p[None, :] < count)
                total += tl.load(x + k[:, None] * (AR * W) + p[None, :], mask=valid, other=0.0)
            center = tl.sum(total, 1) / count
            square = tl.zeros((KB, B), tl.float32)
            rest = tl.zeros((KB, B), tl.float32)
            for p0 in range(0, count, B):
                p = p0 + tl.arange(0, B)
                mask = (k[:, None] < K) & (p[None, :] < count)
                z = tl.load(x + k[:, None] * (AR * W) + p[None, :], mask=mask, other=0.0)
                off = tl.where(mask, z - center[:, None], 0.0)
                square += off * off
                rest += off
            # the center was rounded: what the deviations leave over corrects it and the sum of squares
            left = tl.sum(rest, 1).to(tl.float64) / count
            to = k * items + item
            tl.store(means + to, center.to(tl.float64) + left, mask=k < K)
            tl.store(squares + to, tl.sum(square, 1).to(tl.float64) - left * left * count, mask=k < K)
        tl.debug_barrier()


@launched
def merge_statistics_kernel(
    means, squares, saved, items, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    B: tl.constexpr,
):
    """saved[k], saved[K + k] = mean and biased variance of channel k, which is the program's."""
    STRIPS: tl.constexpr = (H + ROWS - 1) // ROWS
    k = tl.program_id(0)
    pixels = items.to(tl.float64) / STRIPS * (H * W)
    total = tl.zeros((B,), tl.float64)
    for i0 in range(0, items, B):
        i = i0 + tl.arange(0, B)
        count = tl.minimum(H - i % STRIPS * ROWS, ROWS) * W
        total += tl.load(means + k * items + i, mask=i < items, other=0.0) * count
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros((B,), tl.float64)
    for i0 in range(0, items, B):
        i = i0 + tl.arange(0, B)
        count = tl.minimum(H - i % STRIPS * ROWS, ROWS) * W
        off = tl.load(means + k * items + i, mask=i < items, other=0.0) - mean
        total += tl.where(
            i < items, tl.load(squares + k * items + i, mask=i < items, other=0.0) + off * off * count, 0.0
        )
    tl.store(saved + k, mean.to(tl.float32))
    tl.store(saved + K + k, (tl.sum(total, 0) / pixels).to(tl.float32))


@launched(do_not_specialize=["strips"])
def loss_kernel(
    scratch, items, strips, features, s_n, s_c, s_y, s_x, image, i_n, i_c, i_y, i_x, w_taps, b1, gamma, beta,
    w2, b2, mean, var, partial, eps, weight, m0, m1, m2, d0, d1, d2, C: tl.constexpr, h: tl.constexpr,
    w: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, NEAREST: tl.constexpr,
    RESTORE: tl.constexpr, LOSS: tl.constexpr, NEEDS_GRAD: tl.constexpr, ROWS: tl.constexpr, AR: tl.constexpr,
    GR: tl.constexpr, TR: tl.constexpr, SCRATCH: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, PC: tl.constexpr, PS: tl.constexpr, KP: tl.constexpr, KT: tl.constexpr,
    KB: tl.constexpr, B: tl.constexpr, BS: tl.constexpr,
):
    """partial (programs, 29 K + 4): the sum of the loss, after d gamma, d beta, d w2, d b2 of the mean loss.

    The gradients are written if NEEDS_GRAD.
    """
    XP: tl.constexpr = AR * W
    AP: tl.constexpr = (AR + 2) * (W + 2)
    GP: tl.constexpr = (GR + 2) * (W + 2)
    program = tl.program_id(0)
    x = scratch + program.to(tl.int64) * SCRATCH
    g = x + K * XP
    norm = g + 3 * GP
    a = norm + 4 * K
    mine = partial + program * (29 * K + 4)
    _write_norm(norm, mean, var, gamma, beta, eps, K, KP)
    for i in range(program, items, tl.num_programs(0)):
        item = program * 0 + i  # a tensor in the interpreter too
        y0 = item % strips * ROWS
        y1 = tl.minimum(y0 + ROWS, H)
        g0, g1 = tl.maximum(y0 - 1, 0), tl.minimum(y1 + 1, H)
        a0, a1 = tl.maximum(y0 - 2, 0), tl.minimum(y1 + 2, H)
        n = (item // strips).to(tl.int64)
        _write_pre_norm(
            features + n * s_n, s_c, s_y, s_x, w_taps, b1, x, a, a0, a1, C, h, w, H, W, K, h != H or w != W,
            NEAREST, AR, TR, PRECISION, M, P, D, PC, KT, KB, B,
        )
        _write_activation(x, a, norm, a0, a1, H, W, K, XP, AP, BS)
        _fill_zero(g, 3 * GP, BS)
        tl.debug_barrier()
        fresh = item == program
        _write_gradient(
            a, g, image + n * i_n, i_c, i_y, i_x, w2, b2, weight, m0, m1, m2, d0, d1, d2, mine + 29 * K,
            fresh, a0, g0, g1, y0, y1, W, K, AP, GP, RESTORE, LOSS, True, BS,
        )
        tl.debug_barrier()
        if NEEDS_GRAD:
            _add_sums(x, a, g, w2, mine, fresh, a0, g0, y0, y1, W, K, XP, AP, GP, KT, PS)
            tl.debug_barrier()


@launched
def reduce_sums_kernel(
    partial, saved, loss, programs, weight, K: tl.constexpr, NEEDS_GRAD: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr,
):
    """saved[2 K..] and the loss from the partial sums of `loss_kernel`."""
    ROW: tl.constexpr = 29 * K + 4
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((R, N), tl.float64)
    for r0 in range(0, programs, R):
        r = r0 + tl.arange(0, R)
        valid = (r[:, None] < programs) & (column[None, :] < ROW)
        if not NEEDS_GRAD:
            valid = valid & (column[None, :] == ROW - 1)
        total += tl.load(partial + r[:, None] * ROW + column[None, :], mask=valid, other=0.0)
    found = tl.sum(total, 0)
    tl.store(saved + 2 * K + column, found.to(tl.float32), mask=column < ROW - 1)
    tl.store(loss + column * 0, (found * weight).to(tl.float32), mask=column == ROW - 1)


@launched(do_not_specialize=["strips"])
def backward_kernel(
    scratch, items, strips, features, s_n, s_c, s_y, s_x, image, i_n, i_c, i_y, i_x, w_taps, b1, gamma, beta,
    w2, b2, saved, grad, d_features, f_n, f_c, f_y, f_x, partial, eps, weight, scale_sums, m0, m1, m2, d0, d1,
    d2, C: tl.constexpr, h: tl.constexpr, w: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    NEAREST: tl.constexpr, RESTORE: tl.constexpr, LOSS: tl.constexpr, NEEDS_FEATURES: tl.constexpr,
    NEEDS_W1: tl.constexpr, ROWS: tl.constexpr, AR: tl.constexpr, GR: tl.constexpr, TR: tl.constexpr,
    NY: tl.constexpr, NX: tl.constexpr, SCRATCH: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, PC: tl.constexpr, PS: tl.constexpr, MW: tl.constexpr, NW: tl.constexpr,
    NC: tl.constexpr, DC: tl.constexpr, KP: tl.constexpr, KT: tl.constexpr, KB: tl.constexpr, B: tl.constexpr,
    BS: tl.constexpr, BG: tl.constexpr, KG: tl.constexpr,
):
    """d features, and partial (programs, 9 K, C): d W1 in order (tap, k, c).

    An item is a strip of ROWS feature rows.
    """
    RESIZE: tl.constexpr = h != H or w != W
    XP: tl.constexpr = AR * W
    AP: tl.constexpr = (AR + 2) * (W + 2)
    GP: tl.constexpr = (GR + 2) * (W + 2)
    TP: tl.constexpr = ROWS * w
    program = tl.program_id(0)
    x = scratch + program.to(tl.int64) * SCRATCH
    g = x + K * XP
    norm = g + 3 * GP
    rows_table = norm + 4 * K
    columns_table = rows_table + h * NY
    a = columns_table + w * NX
    mine = partial + program.to(tl.int64) * (9 * K * C)
    d_gamma, d_beta = saved + 2 * K, saved + 3 * K
    upstream = tl.load(grad).to(tl.float32)
    weight = weight * upstream
    _write_norm(norm, saved, saved + K, gamma, beta, eps, K, KP)
    if RESIZE:
        _write_table(rows_table, h, H, NY, NEAREST, BS)
        _write_table(columns_table, w, W, NX, NEAREST, BS)
    for i in range(program, items, tl.num_programs(0)):
        item = program * 0 + i  # a tensor in the interpreter too
        i0 = item % strips * ROWS
        i1 = tl.minimum(i0 + ROWS, h)
        y0, y1 = i0, i1
        if RESIZE:
            y0 = _first_output(i0, h, H, NEAREST)
            y1 = tl.minimum(_first_output(i1 - 1, h, H, NEAREST) + NY, H)
        r0, r1 = tl.maximum(y0 - 1, 0), tl.minimum(y1 + 1, H)
        g0, g1 = tl.maximum(y0 - 2, 0), tl.minimum(y1 + 2, H)
        a0, a1 = tl.maximum(y0 - 3, 0), tl.minimum(y1 + 3, H)
        n = (item // strips).to(tl.int64)
        fresh = item == program
        sample = features + n * s_n
        _write_pre_norm(
            sample, s_c, s_y, s_x, w_taps, b1, x, a, a0, a1, C, h, w, H, W, K, RESIZE, NEAREST, AR, TR,
            PRECISION, M, P, D, PC, KT, KB, B,
        )
        _write_activation(x, a, norm, a0, a1, H, W, K, XP, AP, BS)
        _fill_zero(g, 3 * GP, BS)
        tl.debug_barrier()
        _write_gradient(
            a, g, image + n * i_n, i_c, i_y, i_x, w2, b2, weight, m0, m1, m2, d0, d1, d2, g, False, a0, g0,
            g1, y0, y1, W, K, AP, GP, RESTORE, LOSS, False, BS,
        )
        tl.debug_barrier()
        if RESIZE:
            _write_norm_backward(
                x, a, g, w2, x, W, XP, 0, norm, d_gamma, d_beta, scale_sums * upstream, a0, g0, r0, r1, W, K,
                XP, AP, GP, KT, PS,
            )
            tl.debug_barrier()
            d_taps = a + 3 * K * ROWS * W
            _gather_rows(x, rows_table, a, i0, i1, a0, h, H, W, K, XP, ROWS * W, NY, NEAREST, KB, B)
            tl.debug_barrier()
            _gather_columns(a, columns_table, d_taps, i1 - i0, w, W, K, ROWS * W, TP, NX, NEAREST, KG, BG)
            tl.debug_barrier()
            if NEEDS_FEATURES:
                to = d_features + n * f_n
                _write_features_from_taps(
                    d_taps, w_taps, to, f_c, f_y, f_x, i0, i1, C, w, K, TP, PRECISION, NC, P, D
                )
            if NEEDS_W1:
                _add_w1_from_taps(
                    d_taps, sample, s_c, s_y, s_x, mine, fresh, i0, i1, C, w, K, TP, PRECISION, MW, NW, D
                )
        else:
            _write_norm_backward(
                x, a, g, w2, a, W + 2, AP, W + 3, norm, d_gamma, d_beta, scale_sums * upstream, a0, g0, r0,
                r1, W, K, XP, AP, GP, KT, PS,
            )
            tl.debug_barrier()
            if NEEDS_FEATURES:
                to = d_features + n * f_n
                _write_features_convolved(
                    a, w_taps, to, f_c, f_y, f_x, i0, i1, a0, C, W, K, AP, PRECISION, PC, NC, KT
                )
            if NEEDS_W1:
                _add_w1_convolved(
                    a, sample, s_c, s_y, s_x, mine, fresh, i0, i1, a0, C, W, K, AP, PRECISION, MW, NW, DC
                )
        tl.debug_barrier()


@launched
def reduce_w1_kernel(
    partial, d_w1, programs, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):
    """d W1 (K, C, 3, 3) from the partial sums of `backward_kernel`."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((R, N), tl.float32)
    for r0 in range(0, programs, R):
        r = r0 + tl.arange(0, R)
        at = r.to(tl.int64)[:, None] * (9 * K * C) + column[None, :]
        total += tl.load(
            partial + at, mask=(r[:, None] < programs) & (column[None, :] < 9 * K * C), other=0.0
        )
    to = column % (K * C) * 9 + column // (K * C)
    tl.store(d_w1 + to, tl.sum(total, 0), mask=column < 9 * K * C)


# --------------------------------------------------------------------------------------------------------
# Tiles, all chosen before launch


class Tiles(typing.NamedTuple):
    """Sizes of tiles, powers of two: of the products (rows, columns, depth) and of what is not a product."""

    # taps and hidden channels (9 K), times P pixels of the features; times NW channels of the features: d W1
    M: int
    P: int
    D: int  # depth of a product
    PC: int  # pixels of the image, times KT hidden channels: the first convolution without resize
    PS: int  # pixels of the image, times KT hidden channels: second convolution backward
    MW: int
    NW: int
    NC: int  # channels of the features: d features
    DC: int  # depth, in pixels, of d W1 without resize
    KP: int  # all hidden channels
    KT: int  # hidden channels in a product
    KB: int  # hidden channels (or with dy) times B pixels: resizes
    B: int
    BS: int  # pixels of the second convolution and of the norm
    BG: int  # pixels of the features, times KG hidden channels and taps: the last transpose
    KG: int
    num_warps: int
    per_sm: int  # programs that run on a multiprocessor at a time


TILES_OF = {
    "statistics": ("M", "P", "D", "PC", "KT", "KB", "B"),
    "loss": ("M", "P", "D", "PC", "PS", "KP", "KT", "KB", "B", "BS"),
    "backward": ("M", "P", "D", "PC", "PS", "MW", "NW", "NC", "DC", "KP", "KT", "KB", "B", "BS", "BG", "KG"),
}


def _power_of_two(n: int, low: int, high: int) -> int:
    return min(max(low, 1 << max(n - 1, 0).bit_length()), high)


def choose_tiles(cc: int, shape: Shape, precision: str) -> Tiles:
    """Return the sizes of tiles.

    Two programs of eight warps fill a multiprocessor, at 128 registers a thread and half its shared memory.
    """
    KP, channels = _power_of_two(shape.K, 1, 2**20), _power_of_two(shape.C, 16, 64)
    pixels = _power_of_two(shape.h * shape.w, 16, 64)
    taps = _power_of_two(9 * shape.K, 64, 128)
    if INTERPRETED:  # where a tile costs the same whatever its size
        return Tiles(
            M=taps, P=64, D=channels, PC=512, PS=512, MW=taps, NW=channels, NC=channels, DC=256, KP=KP, KT=16,
            KB=32, B=256, BS=1024, BG=64, KG=128, num_warps=4, per_sm=1,
        )
    multiply_add = precision != "tf32"  # then all of a product's depth is in registers at a time
    second = 128 if cc in SMALL_SHARED_MEMORY or shape.K > 16 else 256
    return Tiles(
        M=taps, P=pixels, D=16 if multiply_add or not shape.resize else 32, PC=256, PS=second,
        MW=64 if shape.resize else taps, NW=channels, NC=channels,
        DC=64 if multiply_add and shape.C <= 16 else 16, KP=KP, KT=16, KB=4, B=256, BS=1024, BG=64, KG=16,
        num_warps=8, per_sm=2,
    )


def choose_precision(cc: int, allow_tf32: bool) -> str:
    """Return the products' precision: "tf32", "ieee", or "widened", which first makes both operands float32.

    A function that is not inlined cannot use Blackwell's tensor cores, because tensor memory belongs to a
    kernel. These products are too small to pay for a kernel that holds the registers of all phases. tf32x3
    needs no fewer instructions than multiply-adds at these sizes.
    """
    return "widened" if cc >= 100 else "tf32" if allow_tf32 else "ieee"


SMALL_SHARED_MEMORY = (86, 89, 120)  # 100 KiB a multiprocessor


# --------------------------------------------------------------------------------------------------------
# Launchers: the arguments of the ops' schemas


def _near(t: torch.Tensor) -> torch.Tensor:
    """t, or a contiguous copy where offsets within a sample need more than 32 bits."""
    far = sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:])) >= 2**31 - 2**20
    return t.contiguous() if far else t


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _constants(sweep: str, shape: Shape, cut: Plan, tiles: Tiles, precision: str) -> dict[str, typing.Any]:
    """What a sweep is compiled for, but for what the caller asks of it."""
    N, C, h, w, H, W, K, nearest = shape
    found = dict(
        C=C, h=h, w=w, H=H, W=W, K=K, NEAREST=nearest, ROWS=cut.rows, AR=cut.activation_rows, TR=cut.tap_rows
    )
    found |= dict(SCRATCH=cut.scratch, PRECISION=precision)
    if sweep != "statistics":
        found |= dict(GR=cut.gradient_rows)
    if sweep == "backward":
        found |= dict(NY=cut.row_outputs, NX=cut.column_outputs)
    return found | {name: getattr(tiles, name) for name in TILES_OF[sweep]}


def new_scratch(numbers: int, device: torch.device) -> torch.Tensor:
    return torch.empty(numbers, dtype=torch.float32, device=device)


class _Call:
    """What the launches of one call share."""

    def __init__(self, features, image, w1, mode, restore):
        self.shape = Shape(*features.shape, *image.shape[2:], w1.shape[0], mode == 1)
        self.device = features.device
        cc = capability(features.device)
        self.precision = choose_precision(cc, dot_precision(torch.float32, cc) == "tf32")
        self.tiles = choose_tiles(cc, self.shape, self.precision)
        self.places = self.tiles.per_sm * multiprocessors(features.device)
        self.restore = restore or [0.0] * 6
        if WIDEN_BEFORE and self.precision == "widened":
            features, w1 = features.float(), w1.float()
        self.features, self.image = _near(features), _near(image)
        self.w_taps = w1.permute(2, 3, 0, 1).contiguous()  # (3, 3, K, C)

    def launch(self, kernel, sweep: str, cut: Plan, *args, **flags):
        scratch = new_scratch(cut.programs * cut.scratch, self.device)
        kernel[(cut.programs,)](
            scratch, self.shape.N * cut.strips, cut.strips, self.features, *self.features.stride(), *args,
            **_constants(sweep, self.shape, cut, self.tiles, self.precision), **flags,
            num_warps=self.tiles.num_warps, num_stages=1,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def forward(
    features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss,
    needs_grad,
):
    """`reconstruction_loss_forward` on CUDA tensors, or any in the interpreter.

    A map that spans 2^31 elements is copied first.
    """
    K, restored = w1.shape[0], bool(restore)
    if features.shape[0] == 0:
        return tuple(features.new_zeros(size, dtype=torch.float32) for size in ((), 31 * K + 3))
    with _guard(features.device):
        call = _Call(features, image, w1, mode, restore)
        b1, gamma, beta, w2, b2 = _contiguous(b1, gamma, beta, w2, b2)
        running_mean, running_var = _contiguous(running_mean, running_var)
        value, saved = call.empty(), call.empty(31 * K + 3)
        mean, var = saved[:K], saved[K : 2 * K]
        if running_mean is None:
            _statistics(call, b1, saved)
        else:
            mean.copy_(running_mean)
            var.copy_(running_var)
        cut = plan(call.shape, "loss", call.places)
        partial = call.empty(cut.programs, 29 * K + 4)
        weight = 1.0 / (3 * image.shape[0] * image.shape[2] * image.shape[3])
        call.launch(
            loss_kernel, "loss", cut, call.image, *call.image.stride(), call.w_taps, b1, gamma, beta, w2, b2,
            mean, var, partial, eps, weight, *call.restore, RESTORE=restored, LOSS=loss,
            NEEDS_GRAD=needs_grad,
        )
        reduce_sums_kernel[(triton.cdiv(29 * K + 4, 32),)](
            partial, saved, value, cut.programs, weight, K=K, NEEDS_GRAD=needs_grad, R=32, N=32
        )
    return value, saved


def _statistics(call: _Call, b1: torch.Tensor | None, saved: torch.Tensor) -> None:
    """saved[: 2 K] = mean and biased variance of z over the batch."""
    cut = plan(call.shape, "statistics", call.places)
    K, items = call.shape.K, call.shape.N * cut.strips
    means, squares = call.empty(K, items, dtype=torch.float64), call.empty(K, items, dtype=torch.float64)
    call.launch(statistics_kernel, "statistics", cut, call.w_taps, b1, means, squares)
    merge_statistics_kernel[(K,)](
        means, squares, saved, items, H=call.shape.H, W=call.shape.W, K=K, ROWS=cut.rows, B=1024
    )


def backward(
    grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics, eps, mode, loss,
    needs_features, needs_w1,
):
    """`reconstruction_loss_backward`, as `forward`; the gradient of the features has their strides."""
    K, restored = w1.shape[0], bool(restore)
    d_features = torch.empty_like(features) if needs_features else features.new_empty(0)
    d_w1 = torch.empty(w1.shape if needs_w1 else (0,), dtype=torch.float32, device=w1.device)
    if batch_statistics:  # a constant added to z changes nothing: the gradient of b1 is exactly 0
        d_b1 = torch.zeros(K, dtype=torch.float32, device=w1.device)
    else:
        scale = (saved[K : 2 * K] + eps).rsqrt()
        d_b1 = saved[3 * K : 4 * K] * (scale if gamma is None else scale * gamma) * grad.float()
    if features.shape[0] == 0:
        return d_features, d_w1.zero_(), d_b1
    if not (needs_features or needs_w1):
        return d_features, d_w1, d_b1
    with _guard(features.device):
        call = _Call(features, image, w1, mode, restore)
        b1, gamma, beta, w2, b2, grad = _contiguous(b1, gamma, beta, w2, b2, grad)
        cut = plan(call.shape, "backward", call.places)
        shape = call.shape
        counted = shape.N * shape.H * shape.W
        scale_sums = 1.0 / counted if batch_statistics else 0.0
        partial = call.empty(cut.programs if needs_w1 else 0, w1.numel())
        call.launch(
            backward_kernel, "backward", cut, call.image, *call.image.stride(), call.w_taps, b1, gamma, beta,
            w2, b2, saved, grad, d_features, *(d_features.stride() if needs_features else (0, 0, 0, 0)),
            partial, eps, 1.0 / (3 * counted), scale_sums, *call.restore, RESTORE=restored, LOSS=loss,
            NEEDS_FEATURES=needs_features, NEEDS_W1=needs_w1,
        )
        if needs_w1:
            reduce_w1_kernel[(triton.cdiv(w1.numel(), 64),)](
                partial, d_w1, cut.programs, C=shape.C, K=K, R=32, N=64
            )
    return d_features, d_w1, d_b1


def _guard(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------------
# Ahead of time

_KERNELS = {"statistics": statistics_kernel, "loss": loss_kernel, "backward": backward_kernel}
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 188}
_FLOATS = {"eps", "weight", "scale_sums", "m0", "m1", "m2", "d0", "d1", "d2"}
_POINTERS = {"scratch", "image", "b1", "gamma", "beta", "w2", "b2", "mean", "var", "partial", "saved", "grad"}
_CIFAR = [(16, 32, 32), (32, 16, 32), (64, 8, 32)]  # channels, size of the features, of the image: the stages


def configurations(cc: int) -> typing.Iterator[tuple]:
    """Every kernel as it is compiled for the paper's stages, batch 1024 of CIFAR-10 and 128 of STL-10."""
    shapes = [Shape(1024, C, h, h, H, H, 12, False) for C, h, H in _CIFAR]
    float32, tf32 = choose_precision(cc, False), choose_precision(cc, True)
    for sweep in _KERNELS:
        for shape in shapes:
            yield _compilation(cc, sweep, shape, float32)
        yield _compilation(cc, sweep, shapes[2], float32, "*bf16")
        if tf32 != float32:
            yield _compilation(cc, sweep, shapes[2], tf32)
    if tf32 != float32:
        yield _compilation(cc, "backward", shapes[0], tf32)
    yield _compilation(cc, "loss", Shape(128, 64, 24, 24, 96, 96, 24, True), float32, "*fp16")
    yield _compilation(cc, "backward", Shape(128, 64, 24, 24, 96, 96, 12, False), float32)
    yield from _small_compilations()


def _compilation(cc: int, sweep: str, shape: Shape, precision: str, dtype: str = "*fp32") -> tuple:
    """dtype: of the features and of W1."""
    kernel, chosen = _KERNELS[sweep], choose_tiles(cc, shape, precision)
    constants = _constants(
        sweep, shape, plan(shape, sweep, chosen.per_sm * _PROCESSORS[cc]), chosen, precision
    )
    flags = {} if sweep == "statistics" else dict(RESTORE=True, LOSS=0)
    if sweep == "loss":
        flags |= dict(NEEDS_GRAD=True)
    elif sweep == "backward":
        flags |= dict(NEEDS_FEATURES=True, NEEDS_W1=True)
    types = dict.fromkeys(_POINTERS, "*fp32") | dict.fromkeys(_FLOATS, "fp32")
    read = "*fp32" if WIDEN_BEFORE and precision == "widened" else dtype
    types |= dict(means="*fp64", squares="*fp64", features=read, w_taps=read, d_features=dtype)
    tensor_cores = precision == "tf32" or (precision == "ieee" and dtype != "*fp32")
    integers = dict.fromkeys(kernel.arg_names, "i32") | types
    unaligned = [name for name, kind in integers.items() if kind[0] != "*"]
    return compilation(kernel, integers, constants | flags, unaligned, chosen.num_warps, 1, tensor_cores)


def _small_compilations() -> typing.Iterator[tuple]:
    """The kernels that add up what programs found."""
    cases = [
        (merge_statistics_kernel, dict(means="*fp64", squares="*fp64", saved="*fp32"),
         dict(H=32, W=32, K=12, ROWS=32, B=1024)),
        (reduce_sums_kernel, dict(partial="*fp32", saved="*fp32", loss="*fp32", weight="fp32"),
         dict(K=12, NEEDS_GRAD=True, R=32, N=32)),
        (reduce_w1_kernel, dict(partial="*fp32", d_w1="*fp32"), dict(C=64, K=12, R=32, N=64)),
    ]
    for kernel, types, constants in cases:
        integers = {name: "i32" for name in ("items", "programs")}
        yield compilation(kernel, integers | types, constants, integers)
