// The first convolution as it stands, and its transpose, for features that are not enlarged. Shared memory
// holds the resized map of a few channels at a time.
#pragma once

#include "reconstruction_loss_taps.cuh"

namespace infopro::gpu {

// staged[channel] = resized channels [first, first + channels), wide planes whose rest is zero already. A
// warp takes a row.
DEVICE void stage_resized(const Call& d, const Shared& s, const Tile& t, int first, int channels,
                          float* staged) {
  const Maps& m = d.features;
  const int top = larger(2 - t.y0, 0), left = larger(2 - t.x0, 0);
  const int rows = smaller(t.h + 4, d.s.H - t.y0 + 2) - top, right = smaller(t.w + 4, d.s.W - t.x0 + 2);
  const bool resize = d.s.h != d.s.H || d.s.w != d.s.W;
  const int64_t origin = t.n * m.n + t.low_y * m.y + t.low_x * m.x;
  for (int unit = threadIdx.x / WARP; unit < channels * rows; unit += WARPS) {
    const int c = unit / rows, y = unit % rows + top;
    const int64_t from = origin + (first + c) * m.c;
    float* to = staged + c * d.p.wide_plane + y * d.p.wide_pitch;
    const Cell row = s.rows[y];
    for (int x = left + threadIdx.x % WARP; x < right; x += WARP) {
      const Cell column = s.columns[x];
      const int64_t at = from + row.low * m.y + column.low * m.x;
      float value = load(m.data, m.dtype, at);
      if (resize) {
        const int64_t down = row.weight > 0.0f ? m.y : 0, aside = column.weight > 0.0f ? m.x : 0;
        value = (1.0f - column.weight) * value + column.weight * load(m.data, m.dtype, at + aside);
        const float below = (1.0f - column.weight) * load(m.data, m.dtype, at + down) +
                            column.weight * load(m.data, m.dtype, at + down + aside);
        value = (1.0f - row.weight) * value + row.weight * below;
      }
      to[x] = value;
    }
  }
}

DEVICE void clear(float* p, int floats) {
  for (int i = threadIdx.x; i < floats / 4; i += THREADS) store4(p + 4 * i, {0.0f, 0.0f, 0.0f, 0.0f});
}

// A thread's tile: 8 pixels of a column, 6 hidden channels. For a channel of the features that is 432
// multiply-adds on 30 reads, in which a warp's threads lie side by side, and 18 16-byte reads of weights,
// which the warp reads together.
DEVICE void first_convolution_direct(const Call& d, const Shared& s, const Tile& t) {
  constexpr int STRIP = 8;
  const int strips = ceil_div(t.rows, STRIP), hidden = d.hidden_rows(),
            units = hidden / HIDDEN * strips * t.columns;
  float *staged = s.scratch, *weights = s.scratch + d.p.chunk * d.p.wide_plane;
  __syncthreads();
  clear(staged, d.p.chunk * d.p.wide_plane);
  for (int first = 0; first < units; first += THREADS) {
    const int unit = first + threadIdx.x, x = unit % t.columns + t.left,
              y = unit / t.columns % strips * STRIP + t.top;
    const int k0 = unit < units ? unit / t.columns / strips * HIDDEN : 0;
    float acc[HIDDEN][STRIP];
    UNROLL_ALL for (int k = 0; k < HIDDEN; k++) UNROLL_ALL for (int i = 0; i < STRIP; i++) acc[k][i] =
        k0 + k < d.s.K ? s.norm[START * d.s.K + k0 + k] : 0.0f;
    for (int c0 = 0; c0 < d.s.C; c0 += d.p.chunk) {
      const int channels = smaller(d.p.chunk, d.s.C - c0);
      __syncthreads();
      stage_resized(d, s, t, c0, channels, staged);
      for (int i = threadIdx.x; i < channels * hidden * (TAP_ROW / 4); i += THREADS)
        store4(weights + 4 * i, load4(d.w.w1_by_channel + int64_t(c0) * hidden * TAP_ROW + 4 * i));
      __syncthreads();
      if (unit >= units) continue;
      UNROLL(1) for (int c = 0; c < channels; c++) {
        const float *u = staged + c * d.p.wide_plane + y * d.p.wide_pitch + x,
                    *w = weights + (c * hidden + k0) * TAP_ROW;
        UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
          float column[STRIP + 2];
          UNROLL_ALL for (int i = 0; i < STRIP + 2; i++) column[i] = u[i * d.p.wide_pitch + dx];
          UNROLL_ALL for (int k = 0; k < HIDDEN; k++) {
            const float4 tap = load4(w + k * TAP_ROW + 4 * dx);
            UNROLL_ALL for (int i = 0; i < STRIP; i++) acc[k][i] +=
                tap.x * column[i] + tap.y * column[i + 1] + tap.z * column[i + 2];
          }
        }
      }
    }
    if (unit < units)
      UNROLL_ALL for (int k = 0; k < HIDDEN; k++)
          UNROLL_ALL for (int i = 0; i < STRIP; i++) if (k0 + k < d.s.K && y + i < t.top + t.rows)
              s.z[(k0 + k) * d.p.plane + (y + i) * d.p.pitch + x] = acc[k][i];
  }
  __syncthreads();
}

// partial (K, C, 9) += the gradient of z times the resized features. A warp takes two channels and three
// hidden channels.
DEVICE void first_weight_direct(const Call& d, const Shared& s, const Tile& t, bool add, float* partial) {
  const int lane = threadIdx.x % WARP, triples = ceil_div(d.s.K, 3);
  __syncthreads();
  clear(s.scratch, d.p.chunk * d.p.wide_plane);
  for (int c0 = 0; c0 < d.s.C; c0 += d.p.chunk) {
    const int channels = smaller(d.p.chunk, d.s.C - c0);
    __syncthreads();
    stage_resized(d, s, t, c0, channels, s.scratch);
    __syncthreads();
    for (int unit = threadIdx.x / WARP; unit < ceil_div(channels, 2) * triples; unit += WARPS) {
      const int c = 2 * (unit / triples), k = 3 * (unit % triples);
      const bool has_column = lane < t.columns;  // there are at most as many columns as lanes
      const int x = t.left + smaller(lane, t.columns - 1);
      const float* u[2] = {s.scratch + c * d.p.wide_plane + x,
                           s.scratch + smaller(c + 1, channels - 1) * d.p.wide_plane + x};
      const float* z = s.z + x;
      float sums[2][WARP];
      correlate(
          t.top, t.top + t.rows, [&](int i, int y, int dx) { return u[i][(y + 1) * d.p.wide_pitch + dx]; },
          [&](int o, int y) {
            return has_column ? z[smaller(k + o, d.s.K - 1) * d.p.plane + y * d.p.pitch] : 0.0f;
          },
          sums);
      const float one = transposed_sum(sums[0]), two = transposed_sum(sums[1]);
      if (lane >= 27 || k + lane / 9 >= d.s.K) continue;
      float* to = partial + (int64_t(k + lane / 9) * d.s.C + c0 + c) * 9 + lane % 9;
      to[0] = add ? to[0] + one : one;
      if (c + 1 < channels) to[9] = add ? to[9] + two : two;
    }
  }
}

// scratch (channel, wide plane) = du for `channels` channels from c0 on. A thread's tile: 4 channels, 4
// pixels of a column.
DEVICE void resized_gradient(const Call& d, const Shared& s, const Tile& t, int c0, int channels) {
  constexpr int STRIP = 4;
  const int top = larger(2 - t.y0, 0), left = larger(2 - t.x0, 0);
  const int rows = smaller(t.h + 4, d.s.H - t.y0 + 2) - top,
            columns = smaller(t.w + 4, d.s.W - t.x0 + 2) - left;
  const int strips = ceil_div(rows, STRIP), padded = round_up(d.s.C, 4),
            units = ceil_div(channels, 4) * strips * columns;
  for (int unit = threadIdx.x; unit < units; unit += THREADS) {
    const int x = unit % columns + left, y = unit / columns % strips * STRIP + top,
              c = unit / columns / strips * 4;
    float acc[4][STRIP] = {};
    int rows_in = 0, columns_in = 0;  // a bit for each row and column of the window inside the planes of z
    UNROLL_ALL for (int i = 0; i < STRIP + 2; i++) rows_in |=
        int(unsigned(y + i - 2 - t.top) < unsigned(t.rows)) << i;
    UNROLL_ALL for (int j = 0; j < 3; j++) columns_in |=
        int(unsigned(x + j - 2 - t.left) < unsigned(t.columns)) << j;
    UNROLL(1) for (int k = 0; k < d.s.K; k++) {
      // Planes of z start one row and column later than wide planes.
      const int at = k * d.p.plane + (y - 2) * d.p.pitch + x - 2;
      float window[STRIP + 2][3];
      UNROLL_ALL for (int i = 0; i < STRIP + 2; i++) UNROLL_ALL for (int j = 0; j < 3; j++) window[i][j] =
          (rows_in >> i & 1) && (columns_in >> j & 1) ? s.z[at + i * d.p.pitch + j] : 0.0f;
      const float* w = d.w.w1_by_tap + int64_t(9 * k) * padded + c0 + c;
      UNROLL_ALL for (int tap = 0; tap < 9;
                      tap++) {  // the window backwards: u at q adds to z at q - (dy - 1, dx - 1)
        const float4 v = __ldg(reinterpret_cast<const float4*>(w + tap * padded));
        UNROLL_ALL for (int i = 0; i < STRIP; i++) {
          const float g = window[i + 2 - tap / 3][2 - tap % 3];
          acc[0][i] += v.x * g;
          acc[1][i] += v.y * g;
          acc[2][i] += v.z * g;
          acc[3][i] += v.w * g;
        }
      }
    }
    UNROLL_ALL for (int j = 0; j < 4; j++)
        UNROLL_ALL for (int i = 0; i < STRIP; i++) if (c + j < channels && y + i < top + rows)
            s.scratch[(c + j) * d.p.wide_plane + (y + i) * d.p.wide_pitch + x] = acc[j][i];
  }
}

// range[2 i], range[2 i + 1]: the first and one past the last cell that reads feature i < n.
DEVICE void find_ranges(const Cell* cells, int count, int n, int* range, int thread) {
  for (int i = thread; i < n; i += THREADS) {
    int first = 0, last = 0;
    for (int p = 0; p < count; p++)
      if (cells[p].low >= 0 && (cells[p].low == i || high(cells[p]) == i)) {
        if (last == 0) first = p;
        last = p + 1;
      }
    range[2 * i] = first, range[2 * i + 1] = last;
  }
}

DEVICE float share(Cell c, int i) { return c.low == i ? 1.0f - c.weight : c.weight; }

DEVICE void first_backward_direct(const Call& d, const Shared& s, const Tile& t, bool add, float* w1_partial,
                                  const Maps& to, float* part, bool needs_features) {
  if (w1_partial) first_weight_direct(d, s, t, add, w1_partial);
  if (!needs_features) return;
  find_ranges(s.rows, t.h + 4, t.low_h, s.row_range, threadIdx.x);
  find_ranges(s.columns, t.w + 4, t.low_w, s.column_range, THREADS - 1 - int(threadIdx.x));
  for (int c0 = 0; c0 < d.s.C; c0 += d.p.late_channels) {
    const int channels = smaller(d.p.late_channels, d.s.C - c0), pixels = t.low_h * t.low_w;
    __syncthreads();
    resized_gradient(d, s, t, c0, channels);
    __syncthreads();
    const bool channels_last = to.c == 1 && to.x > 1;
    for (int unit = threadIdx.x; unit < channels * pixels; unit += THREADS) {
      const int c = channels_last ? unit % channels : unit / pixels,
                pixel = channels_last ? unit / channels : unit % pixels;
      const int i = pixel / t.low_w, j = pixel % t.low_w;
      float sum = 0.0f;
      for (int y = s.row_range[2 * i]; y < s.row_range[2 * i + 1]; y++) {
        float line = 0.0f;
        for (int x = s.column_range[2 * j]; x < s.column_range[2 * j + 1]; x++)
          line += share(s.columns[x], j) * s.scratch[c * d.p.wide_plane + y * d.p.wide_pitch + x];
        sum += share(s.rows[y], i) * line;
      }
      write_feature_gradient(d, t, to, part, c0 + c, i, j, sum);
    }
  }
}

}  // namespace infopro::gpu
