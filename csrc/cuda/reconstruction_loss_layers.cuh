// What follows the first convolution, on the planes of a tile: statistics; norm, ReLU, second convolution and
// the loss of a pixel; the gradients of all of them.
#pragma once

#include "reconstruction_loss_direct.cuh"

namespace infopro::gpu {

// moments (K, 3): count and mean of the tile's own z, and the sum of squared deviations. A warp takes a
// channel at a time.
DEVICE void tile_moments(const Call& d, const Shared& s, const Tile& t, double* moments) {
  const int lane = threadIdx.x % WARP, count = t.h * t.w;
  for (int k = threadIdx.x / WARP; k < d.s.K; k += WARPS) {
    const float* z = s.z + k * d.p.plane + d.p.pitch + 1;
    float sum = 0.0f;
    for (int x = lane; x < t.w; x += WARP)
      for (int y = 0; y < t.h; y++) sum += z[y * d.p.pitch + x];
    const float center = warp_sum(sum) / float(count);
    float squares = 0.0f, rest = 0.0f;
    for (int x = lane; x < t.w; x += WARP)
      for (int y = 0; y < t.h; y++) {
        const float deviation = z[y * d.p.pitch + x] - center;
        squares += deviation * deviation;
        rest += deviation;
      }
    squares = warp_sum(squares);
    const double left = double(warp_sum(rest)) / count;  // the center was rounded: this corrects both
    if (lane == 0) {
      moments[3 * k] = count, moments[3 * k + 1] = double(center) + left;
      moments[3 * k + 2] = double(squares) - left * left * count;
    }
  }
}

// With these, a is 0 at a border of `border_value`. For gamma = 0 the scale acts as 0 on any finite z.
DEVICE float border_scale(float scale) { return scale == 0.0f ? 1.17549435e-38f : scale; }
DEVICE float border_value(float scale) { return border_scale(scale) > 0.0f ? -INFINITY : INFINITY; }

DEVICE float target_of(const Call& d, const Tile& t, int o, int y, int x) {
  const Maps& m = d.target.maps;
  return d.target.at(o, t.n * m.n + (t.y0 + y) * m.y + (t.x0 + x) * m.x);
}

// The gradient of the logits, on three wide planes whose rest is zero already. sums += the thread's loss, and
// its share of the gradient of b2. A thread's tile: 4 pixels of a column, all three outputs. Norm and ReLU
// are recomputed at each of the 18 reads of a hidden channel: a second copy of the planes would cost more, as
// fewer blocks would fit.
DEVICE void logits(const Call& d, const Shared& s, const Tile& t, float weight, float (&sums)[4]) {
  constexpr int STRIP = 4;
  const int strips = ceil_div(t.h, STRIP), K = d.s.K;
  float* g = s.logits(d);
  for (int unit = threadIdx.x; unit < strips * t.w; unit += THREADS) {
    const int x = unit % t.w, y = unit / t.w * STRIP;
    float target[3][STRIP], acc[3][STRIP];
    UNROLL_ALL for (int o = 0; o < 3; o++)
      UNROLL_ALL for (int i = 0; i < STRIP; i++) {
        target[o][i] = y + i < t.h ? target_of(d, t, o, y + i, x) : 0.0f;
        acc[o][i] = d.w.b2[o];
      }
    UNROLL(1) for (int k = 0; k < K; k++) {
      const float* z = s.z + k * d.p.plane + y * d.p.pitch + x;
      const float scale = border_scale(s.norm[SCALE * K + k]), shift = s.norm[SHIFT * K + k];
      float a[STRIP + 2][3], w[W2_ROW];
      UNROLL_ALL for (int i = 0; i < STRIP + 2; i++)
        UNROLL_ALL for (int j = 0; j < 3; j++) a[i][j] = relu(fmaf(z[i * d.p.pitch + j], scale, shift));
      UNROLL_ALL for (int i = 0; i < W2_ROW; i += 4) {
        const float4 v = load4(s.w2 + k * W2_ROW + i);
        w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
      }
      UNROLL_ALL for (int o = 0; o < 3; o++)
        UNROLL_ALL for (int i = 0; i < STRIP; i++)
          UNROLL_ALL for (int tap = 0; tap < 9; tap++) acc[o][i] += w[9 * o + tap] * a[i + tap / 3][tap % 3];
    }
    UNROLL_ALL for (int o = 0; o < 3; o++)
      UNROLL_ALL for (int i = 0; i < STRIP; i++) {
        if (y + i >= t.h) continue;
        const LossAndGradient pixel = pixel_loss(d.pixel, acc[o][i], target[o][i]);
        const float gradient = pixel.gradient * weight;
        sums[0] += pixel.loss;
        sums[1 + o] += gradient;
        g[o * d.p.wide_plane + (y + i + 2) * d.p.wide_pitch + x + 2] = gradient;
      }
  }
}

// use(k, y, x, dev, da) at every position of the planes inside the image; da is the gradient in a from the
// tile's own pixels. Whole warps call each(k) after each hidden channel. A thread's tile: 4 pixels of a
// column, whose 54 gradients stay in registers.
template <class F, class E>
DEVICE void hidden_gradient(const Call& d, const Shared& s, const Tile& t, F use, E each) {
  constexpr int STRIP = 4;
  const int strips = ceil_div(t.rows, STRIP), units = strips * t.columns;
  const float* gradient = s.logits(d);
  for (int first = 0; first < units; first += THREADS) {
    const int unit = smaller(first + int(threadIdx.x), units - 1), x = unit % t.columns + t.left,
              y = unit / t.columns * STRIP + t.top;
    float g[3][STRIP + 2][3];
    UNROLL_ALL for (int o = 0; o < 3; o++) UNROLL_ALL for (int i = 0; i < STRIP + 2; i++)
        UNROLL_ALL for (int j = 0; j < 3; j++) g[o][i][j] =
            gradient[o * d.p.wide_plane + (y + i) * d.p.wide_pitch + x + j];
    UNROLL(1) for (int k = 0; k < d.s.K; k++) {
      float da[STRIP] = {};
      UNROLL_ALL for (int q = 0; q < W2_ROW; q += 4) {
        const float4 v = load4(s.w2 + k * W2_ROW + q);
        const float w[4] = {v.x, v.y, v.z, v.w};
        UNROLL_ALL for (int j = 0; j < 4; j++) {
          const int o = (q + j) / 9, tap = (q + j) % 9;
          if (o > 2) continue;
          UNROLL_ALL for (int i = 0; i < STRIP; i++) da[i] += w[j] * g[o][i + 2 - tap / 3][2 - tap % 3];
        }
      }
      if (first + int(threadIdx.x) < units)
        UNROLL_ALL for (int i = 0; i < STRIP; i++)
          if (y + i < t.top + t.rows) use(k, y + i, x, s.z[k * d.p.plane + (y + i) * d.p.pitch + x], da[i]);
      each(k);
    }
  }
}

// sums (warp, 2 k and 2 k + 1) += the warp's sums for the gradients of beta and gamma.
DEVICE void norm_sums(const Call& d, const Shared& s, const Tile& t) {
  const int K = d.s.K, lane = threadIdx.x % WARP;
  float* mine = s.sums + threadIdx.x / WARP * s.sums_row(d);
  float sum = 0.0f, product = 0.0f;
  hidden_gradient(
      d, s, t,
      [&](int k, int, int, float dev, float da) {
        const float g = fmaf(dev, s.norm[SCALE * K + k], s.norm[SHIFT * K + k]) > 0.0f ? da : 0.0f;
        sum += g;
        product += g * (dev * s.norm[INVERSE_STD * K + k]);
      },
      [&](int k) {  // half of the lanes add up each sum
        const bool upper = lane >= WARP / 2;
        float v = (upper ? product : sum) + __shfl_xor_sync(ALL_LANES, upper ? sum : product, WARP / 2);
        UNROLL_ALL for (int step = WARP / 4; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
        if (lane % (WARP / 2) == 0) mine[2 * k + upper] += v;
        sum = product = 0.0f;
      });
}

// Overwrite z with its gradient, scale (dy - mean_dy - dev slope). Only the tile's own pixels get the last
// two terms, so that tiles add up.
DEVICE void norm_backward(const Call& d, const Shared& s, const Tile& t) {
  const int K = d.s.K;
  hidden_gradient(
      d, s, t,
      [&](int k, int y, int x, float dev, float da) {
        const float scale = s.norm[SCALE * K + k];
        float g = fmaf(dev, scale, s.norm[SHIFT * K + k]) > 0.0f ? da : 0.0f;
        if (y >= 1 && y <= t.h && x >= 1 && x <= t.w)
          g = g - s.norm[MEAN_DY * K + k] - dev * s.norm[SLOPE * K + k];
        s.z[k * d.p.plane + y * d.p.pitch + x] = g * scale;
      },
      [](int) {});
}

// w2_sums (segment, 3, K, 9) = the tile's gradient of W2. A warp takes two hidden channels and a segment of
// the rows.
DEVICE void second_weight(const Call& d, const Shared& s, const Tile& t) {
  const int lane = threadIdx.x % WARP, K = d.s.K, rows = ceil_div(t.h, SEGMENTS);
  const float* g = s.logits(d) + 2 * d.p.wide_pitch + 2;
  for (int unit = threadIdx.x / WARP; unit < ceil_div(K, 2) * SEGMENTS; unit += WARPS) {
    const int segment = unit % SEGMENTS, k = unit / SEGMENTS * 2, other = smaller(k + 1, K - 1);
    const int first = segment * rows, last = smaller(first + rows, t.h), x = smaller(lane, t.w - 1);
    const float scale[2] = {border_scale(s.norm[SCALE * K + k]), border_scale(s.norm[SCALE * K + other])};
    const float shift[2] = {s.norm[SHIFT * K + k], s.norm[SHIFT * K + other]};
    const float *z0 = s.z + k * d.p.plane + x, *z1 = s.z + other * d.p.plane + x;
    float sums[2][WARP];
    correlate(
        first, last,
        [&](int i, int y, int dx) {
          return relu(fmaf((i ? z1 : z0)[(y + 1) * d.p.pitch + dx], scale[i], shift[i]));
        },
        [&](int o, int y) { return lane < t.w ? g[o * d.p.wide_plane + y * d.p.wide_pitch + x] : 0.0f; },
        sums);
    const float one = transposed_sum(sums[0]), two = transposed_sum(sums[1]);
    if (lane < 27) {
      float* to = s.w2_sums(d) + ((segment * 3 + lane / 9) * K + k) * 9 + lane % 9;
      to[0] = one;
      if (k + 1 < K) to[9] = two;
    }
  }
}

}  // namespace infopro::gpu
