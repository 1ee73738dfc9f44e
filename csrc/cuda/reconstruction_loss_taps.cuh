// The first convolution at low resolution, and its transpose. With u = resize(h) and z = conv3x3(u) + b,
//     T[tap][k] = sum_c W[k][c][tap] h[c]                            1x1 convolutions
//     E[k][dy][i][X] = sum_dx columns(T[dy, dx][k][i])(X + dx - 1)   zero outside the resized row
//     z[k][Y][X] = b[k] + sum_dy rows(E[k][dy])(Y + dy - 1)[X]       zero outside the resized map
// which is exact, borders included. Backward is the transpose of each line.
#pragma once

#include "reconstruction_loss_block.cuh"

namespace infopro::gpu {

// staged[channel][pixel] = features of channels [first, first + channels), padded with zeros to whole float4.
DEVICE void stage_features(const Call& d, const Tile& t, int first, int channels, float* staged) {
  const Maps& m = d.features;
  const int quads = t.quads(), pixels = t.low_h * t.low_w;
  const int64_t origin = t.n * m.n + t.low_y * m.y + t.low_x * m.x;
  const bool flat = m.x == 1 && (t.low_w == m.y || t.low_h == 1);
  const bool aligned = flat && m.dtype == Dtype::f32 && pixels % 4 == 0 && m.c % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(static_cast<const float*>(m.data) + origin) % 16 == 0;
  const bool channels_last = m.c == 1 && m.x > 1;  // neighbouring threads read neighbouring numbers
  for (int i = threadIdx.x; i < channels * quads; i += THREADS) {
    const int c = channels_last ? i % channels : i / quads, q = channels_last ? i / channels : i % quads;
    float* to = staged + c * d.p.pixels + 4 * q;
    const int64_t from = origin + (first + c) * m.c;
    if (aligned) {
      store4(to, __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(m.data) + from) + q));
      continue;
    }
    UNROLL_ALL for (int j = 0; j < 4; j++) {
      const int pixel = 4 * q + j;
      const int64_t offset =
          flat ? int64_t(pixel) : int64_t(pixel / t.low_w) * m.y + int64_t(pixel % t.low_w) * m.x;
      to[j] = pixel < pixels ? load(m.data, m.dtype, from + offset) : 0.0f;
    }
  }
}

// T of hidden channels [k0, k0 + hidden). A thread's tile: nine taps of one hidden channel, four pixels. For
// a channel of the features that is 36 multiply-adds on four 16-byte reads of shared memory. Three of them
// are weights, which half a warp reads together.
DEVICE void mix_channels(const Call& d, const Shared& s, const Tile& t, int k0, int hidden) {
  const int quads = t.quads(), units = hidden * quads, row = hidden * TAP_ROW;
  float *staged = s.scratch, *weights = s.scratch + d.p.chunk * d.p.pixels;
  for (int first = 0; first < units; first += THREADS) {
    const int unit = first + threadIdx.x, k = unit / quads, q = unit % quads;
    float acc[9][4] = {};
    for (int c0 = 0; c0 < d.s.C; c0 += d.p.chunk) {
      const int channels = smaller(d.p.chunk, d.s.C - c0);
      __syncthreads();
      stage_features(d, t, c0, channels, staged);
      for (int i = threadIdx.x; i < channels * hidden * (TAP_ROW / 4); i += THREADS) {
        const int c = i / (hidden * (TAP_ROW / 4)), j = i % (hidden * (TAP_ROW / 4));
        store4(weights + 4 * i,
               load4(d.w.w1_by_channel + int64_t((c0 + c) * d.hidden_rows() + k0) * TAP_ROW + 4 * j));
      }
      __syncthreads();
      if (unit >= units) continue;
      const float *x = staged + 4 * q, *w = weights + k * TAP_ROW;
      UNROLL(2) for (int c = 0; c < channels; c++, x += d.p.pixels, w += row) {
        const float4 v = load4(x), a = load4(w), b = load4(w + 4);
        const float tap[9] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, w[8]};
        UNROLL_ALL for (int i = 0; i < 9; i++) {
          acc[i][0] += tap[i] * v.x;
          acc[i][1] += tap[i] * v.y;
          acc[i][2] += tap[i] * v.z;
          acc[i][3] += tap[i] * v.w;
        }
      }
    }
    if (unit < units)
      UNROLL_ALL for (int i = 0; i < 9; i++)
          store4(s.taps + (9 * k + i) * d.p.pixels + 4 * q, {acc[i][0], acc[i][1], acc[i][2], acc[i][3]});
  }
}

// E of `hidden` hidden channels from `k` of the group on. A thread owns a column, so that its weights stay in
// registers. The threads of a warp lie side by side along X and read the same few numbers of a row of T.
DEVICE void expand_columns(const Call& d, const Shared& s, const Tile& t, int k, int hidden) {
  const int step = d.s.nearest ? 0 : 1;
  for (int unit = threadIdx.x; unit < hidden * 3 * t.columns; unit += THREADS) {
    const int x = unit % t.columns + t.left, r = unit / t.columns;  // r: 3 k + dy
    const float *low[3], *high[3];
    float a[3], b[3];
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const Cell c = s.columns[x + dx];
      const float* row = s.taps + (9 * k + 3 * r + dx) * d.p.pixels;
      low[dx] = row + larger(c.low, 0);
      high[dx] = row + smaller(larger(c.low, 0) + step, t.low_w - 1);
      a[dx] = c.low < 0 ? 0.0f : 1.0f - c.weight;
      b[dx] = c.weight;
    }
    float* to = s.scratch + r * t.low_h * d.p.expanded_pitch + x;
    for (int i = 0; i < t.low_h; i++, to += d.p.expanded_pitch) {
      float even = 0.0f, odd = 0.0f;
      UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
        even += a[dx] * low[dx][i * t.low_w];
        odd += b[dx] * high[dx][i * t.low_w];
      }
      *to = even + odd;
    }
  }
}

// z of `hidden` hidden channels from k0 on. A thread walks down a column and reads each row of E once, not at
// every pixel.
DEVICE void expand_rows(const Call& d, const Shared& s, const Tile& t, int k0, int hidden) {
  constexpr int STRIP = 8;
  const int strips = ceil_div(t.rows, STRIP), step = d.s.nearest ? 0 : 1;
  for (int unit = threadIdx.x; unit < hidden * strips * t.columns; unit += THREADS) {
    const int x = unit % t.columns + t.left, strip = unit / t.columns % strips, k = unit / t.columns / strips;
    const float* from = s.scratch + 3 * k * t.low_h * d.p.expanded_pitch + x;
    const float start = s.norm[START * d.s.K + k0 + k];
    float low[3] = {}, high[3] = {};
    int at[3] = {-1, -1, -1};
    const int first = t.top + strip * STRIP, last = smaller(first + STRIP, t.top + t.rows);
    float* to = s.z + (k0 + k) * d.p.plane + x;
    for (int y = first; y < last; y++) {
      float sum = 0.0f;
      UNROLL_ALL for (int dy = 0; dy < 3; dy++) {
        const Cell c = s.rows[y + dy];
        if (c.low < 0) continue;
        if (c.low != at[dy]) {
          const float* row = from + dy * t.low_h * d.p.expanded_pitch;
          low[dy] = row[c.low * d.p.expanded_pitch];
          high[dy] = row[smaller(c.low + step, t.low_h - 1) * d.p.expanded_pitch];
          at[dy] = c.low;
        }
        sum += (1.0f - c.weight) * low[dy] + c.weight * high[dy];
      }
      to[y * d.p.pitch] = start + sum;
    }
  }
}

DEVICE void first_convolution_taps(const Call& d, const Shared& s, const Tile& t) {
  for (int k0 = 0; k0 < d.s.K; k0 += d.p.group) {
    const int hidden = smaller(d.p.group, d.s.K - k0);
    mix_channels(d, s, t, k0, hidden);
    for (int k = 0; k < hidden; k += d.p.part) {
      __syncthreads();  // T is whole, or the last part of E is read
      expand_columns(d, s, t, k, smaller(d.p.part, hidden - k));
      __syncthreads();
      expand_rows(d, s, t, k0 + k, smaller(d.p.part, hidden - k));
    }
  }
  __syncthreads();
}

// The transpose of expand_rows. A thread walks down z, keeps the two rows of E that the current row adds to,
// and writes a row of E when the walk has passed it.
DEVICE void gather_rows(const Call& d, const Shared& s, const Tile& t, int k0, int hidden) {
  for (int unit = threadIdx.x; unit < hidden * 3 * t.columns; unit += THREADS) {
    const int x = unit % t.columns + t.left, r = unit / t.columns, dy = r % 3;
    const float* from = s.z + (k0 + r / 3) * d.p.plane + x;
    float* to = s.scratch + r * t.low_h * d.p.expanded_pitch + x;
    float low = 0.0f, high = 0.0f;
    int row = 0;
    for (int y = t.top; y < t.top + t.rows; y++) {
      const Cell c = s.rows[y + dy];
      if (c.low < 0) continue;
      for (; row < c.low; row++, low = high, high = 0.0f) to[row * d.p.expanded_pitch] = low;
      const float v = from[y * d.p.pitch];
      low += (1.0f - c.weight) * v;
      high += c.weight * v;
    }
    for (; row < t.low_h; row++, low = high, high = 0.0f) to[row * d.p.expanded_pitch] = low;
  }
}

// The transpose of expand_columns, into `taps`. A thread walks along a row; the odd pitch of the rows spreads
// a warp over the banks.
DEVICE void gather_columns(const Call& d, const Shared& s, const Tile& t, int k, int hidden) {
  for (int unit = threadIdx.x; unit < hidden * 9 * t.low_h; unit += THREADS) {
    const int i = unit % t.low_h, m = unit / t.low_h, dx = m % 3;  // m: 9 k + 3 dy + dx
    const float* from = s.scratch + (m / 3 * t.low_h + i) * d.p.expanded_pitch;
    float* to = s.taps + (9 * k + m) * d.p.pixels + i * t.low_w;
    float low = 0.0f, high = 0.0f;
    int column = 0;
    for (int x = t.left; x < t.left + t.columns; x++) {
      const Cell c = s.columns[x + dx];
      if (c.low < 0) continue;
      for (; column < c.low; column++, low = high, high = 0.0f) to[column] = low;
      const float v = from[x];
      low += (1.0f - c.weight) * v;
      high += c.weight * v;
    }
    for (; column < t.low_w; column++, low = high, high = 0.0f) to[column] = low;
    if (i == t.low_h - 1)
      for (int pad = t.low_w; i * t.low_w + pad < 4 * t.quads(); pad++) to[pad] = 0.0f;
  }
}

// The gradient of T for hidden channels [k0, k0 + hidden), from the gradient of z.
DEVICE void gather(const Call& d, const Shared& s, const Tile& t, int k0, int hidden) {
  for (int k = 0; k < hidden; k += d.p.part) {
    __syncthreads();
    gather_rows(d, s, t, k0 + k, smaller(d.p.part, hidden - k));
    __syncthreads();
    gather_columns(d, s, t, k, smaller(d.p.part, hidden - k));
  }
  __syncthreads();
}

// partial (K, C, 9) += the gradient of T times the features. A thread's tile: nine taps of a hidden channel,
// four channels `quarter` apart, so that a warp's reads start in different banks.
DEVICE void first_weight_taps(const Call& d, const Shared& s, const Tile& t, int k0, int hidden, bool add,
                              float* partial) {
  for (int c0 = 0; c0 < d.s.C; c0 += d.p.late_channels) {
    const int channels = smaller(d.p.late_channels, d.s.C - c0), quarter = ceil_div(channels, 4);
    __syncthreads();
    stage_features(d, t, c0, channels, s.late);
    __syncthreads();
    for (int unit = threadIdx.x; unit < hidden * quarter; unit += THREADS) {
      const int c = unit % quarter, k = unit / quarter;
      const float *g = s.taps + 9 * k * d.p.pixels, *x[4];
      UNROLL_ALL for (int j = 0; j < 4; j++) x[j] =
          s.late + smaller(c + j * quarter, channels - 1) * d.p.pixels;
      float acc[9][4] = {};
      for (int q = 0; q < 4 * t.quads(); q += 4) {
        float4 v[4];
        UNROLL_ALL for (int j = 0; j < 4; j++) v[j] = load4(x[j] + q);
        UNROLL_ALL for (int i = 0; i < 9; i++) {
          const float4 u = load4(g + i * d.p.pixels + q);
          UNROLL_ALL for (int j = 0; j < 4; j++) acc[i][j] +=
              u.x * v[j].x + u.y * v[j].y + u.z * v[j].z + u.w * v[j].w;
        }
      }
      UNROLL_ALL for (int j = 0; j < 4; j++) {
        if (c + j * quarter >= channels) continue;
        float* to = partial + (int64_t(k0 + k) * d.s.C + c0 + c + j * quarter) * 9;
        UNROLL_ALL for (int i = 0; i < 9; i++) to[i] = add ? to[i] + acc[i][j] : acc[i][j];
      }
    }
  }
}

// late (channel, pixel) (+)= W1^T times the gradient of T, for `channels` channels from c0 on. A thread's
// tile: 4 channels, 4 pixels.
DEVICE void features_gradient_taps(const Call& d, const Shared& s, const Tile& t, int c0, int channels,
                                   int k0, int hidden, bool add) {
  const int quads = t.quads(), row = round_up(channels, 4), units = row / 4 * quads;
  const int together = larger(1, smaller(hidden, d.p.scratch / (9 * row)));
  for (int k = 0; k < hidden; k += together) {
    const int taps = 9 * smaller(together, hidden - k);
    __syncthreads();
    for (int i = threadIdx.x; i < taps * (row / 4); i += THREADS) {
      const int m = i / (row / 4), j = i % (row / 4);
      store4(s.scratch + 4 * i,
             load4(d.w.w1_by_tap + int64_t(9 * (k0 + k) + m) * round_up(d.s.C, 4) + c0 + 4 * j));
    }
    __syncthreads();
    for (int unit = threadIdx.x; unit < units; unit += THREADS) {
      const int q = unit % quads, c = 4 * (unit / quads);
      float acc[4][4];
      float* to = s.late + c * d.p.pixels + 4 * q;
      UNROLL_ALL for (int i = 0; i < 4; i++) {
        const float4 v = add || k > 0 ? load4(to + i * d.p.pixels) : float4{0.0f, 0.0f, 0.0f, 0.0f};
        acc[i][0] = v.x, acc[i][1] = v.y, acc[i][2] = v.z, acc[i][3] = v.w;
      }
      const float *g = s.taps + 9 * k * d.p.pixels + 4 * q, *w = s.scratch + c;
      UNROLL(4) for (int m = 0; m < taps; m++, g += d.p.pixels, w += row) {
        const float4 v = load4(g), a = load4(w);
        const float weight[4] = {a.x, a.y, a.z, a.w};
        UNROLL_ALL for (int i = 0; i < 4; i++) {
          acc[i][0] += weight[i] * v.x;
          acc[i][1] += weight[i] * v.y;
          acc[i][2] += weight[i] * v.z;
          acc[i][3] += weight[i] * v.w;
        }
      }
      UNROLL_ALL for (int i = 0; i < 4; i++)
          store4(to + i * d.p.pixels, {acc[i][0], acc[i][1], acc[i][2], acc[i][3]});
    }
  }
}

// Write the gradient of the features in channel c at pixel (i, j) of the tile's features: into the tensor if
// a sample is one tile, else into the tile's part (C, pixels). decoder_overlap_kernel adds up the parts.
DEVICE void write_feature_gradient(const Call& d, const Tile& t, const Maps& to, float* part, int c, int i,
                                   int j, float x) {
  if (part)
    part[int64_t(c) * d.p.pixels + i * t.low_w + j] = x;
  else
    store(to.data, to.dtype, t.n * to.n + c * to.c + (t.low_y + i) * to.y + (t.low_x + j) * to.x, x);
}

// The gradients of W1 (added to the block's partial sums, unless null) and of the features, from the gradient
// of z.
DEVICE void first_backward_taps(const Call& d, const Shared& s, const Tile& t, bool add, float* w1_partial,
                                const Maps& to, float* part, bool needs_features) {
  const bool once = d.p.group == d.s.K;  // then the gradient of T stays after the first gather
  if (w1_partial)
    for (int k0 = 0; k0 < d.s.K; k0 += d.p.group) {
      gather(d, s, t, k0, smaller(d.p.group, d.s.K - k0));
      first_weight_taps(d, s, t, k0, smaller(d.p.group, d.s.K - k0), add, w1_partial);
    }
  if (!needs_features) return;
  for (int c0 = 0; c0 < d.s.C; c0 += d.p.late_channels) {
    const int channels = smaller(d.p.late_channels, d.s.C - c0);
    for (int k0 = 0; k0 < d.s.K; k0 += d.p.group) {
      const int hidden = smaller(d.p.group, d.s.K - k0);
      if (!once || (!w1_partial && c0 == 0)) gather(d, s, t, k0, hidden);
      features_gradient_taps(d, s, t, c0, channels, k0, hidden, k0 > 0);
    }
    __syncthreads();
    const int pixels = t.low_h * t.low_w;
    const bool channels_last = to.c == 1 && to.x > 1;
    for (int i = threadIdx.x; i < channels * pixels; i += THREADS) {
      const int c = channels_last ? i % channels : i / pixels,
                pixel = channels_last ? i / channels : i % pixels;
      write_feature_gradient(d, t, to, part, c0 + c, pixel / t.low_w, pixel % t.low_w,
                             s.late[c * d.p.pixels + pixel]);
    }
  }
}

}  // namespace infopro::gpu
