// The kernels: parameters in the order they are read; three sweeps over the tiles, as batch norm needs its
// statistics in between; and the sums over tiles or blocks, always in the same order.
//
// A sweep runs as many blocks as the device holds at a time; a block strides over the tiles. Nothing of the
// size of z leaves a block.
#pragma once

#include "reconstruction_loss_layers.cuh"

namespace infopro::gpu {

__global__ void __launch_bounds__(THREADS) decoder_prepare_kernel(Call d, GivenParameters given) {
  const int C = d.s.C, K = d.s.K, hidden = d.hidden_rows(), padded = round_up(C, 4);
  const int first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
  for (int i = first; i < C * hidden * TAP_ROW; i += step) {
    const int place = i % TAP_ROW, k = i / TAP_ROW % hidden, c = i / TAP_ROW / hidden;
    const int tap = d.p.low_resolution ? place : place % 4 < 3 ? place % 4 * 3 + place / 4 : 9;
    d.w.w1_by_channel[i] = tap < 9 && k < K ? given.w1[(int64_t(k) * C + c) * 9 + tap] : 0.0f;
  }
  for (int i = first; i < 9 * K * padded; i += step) {
    const int c = i % padded, m = i / padded;
    d.w.w1_by_tap[i] = c < C ? given.w1[(int64_t(m / 9) * C + c) * 9 + m % 9] : 0.0f;
  }
  for (int i = first; i < K * W2_ROW; i += step) {
    const int m = i % W2_ROW, k = i / W2_ROW;
    d.w.w2[i] = m < 27 ? given.w2[(int64_t(m / 9) * K + k) * 9 + m % 9] : 0.0f;
  }
  for (int i = first; i < 6 * K; i += step) d.w.norm[i] = i < K ? given.b1[i] : 0.0f;  // START
  for (int o = first; o < 4; o += step) d.w.b2[o] = o < 3 ? given.b2[o] : 0.0f;
  for (int y = first; y < d.s.H; y += step) d.w.rows[y] = cell(d.s.h, d.s.H, y, mode_of(d.s.nearest));
  for (int x = first; x < d.s.W; x += step) d.w.columns[x] = cell(d.s.w, d.s.W, x, mode_of(d.s.nearest));
}

// ---- sweeps ----

// LOW: Plan::low_resolution as a template parameter, which saves the registers of the other way.
template <bool LOW> DEVICE void first_convolution(const Call& d, const Shared& s, const Tile& t) {
  if constexpr (LOW)
    first_convolution_taps(d, s, t);
  else
    first_convolution_direct(d, s, t);
}

// moments (tiles, K, 3)
template <bool LOW>
__global__ void __launch_bounds__(THREADS, 2) decoder_statistics_kernel(Call d, double* moments) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory));
  load_constants(d, s);
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile);
    __syncthreads();  // the constants are loaded; the last tile's cells and z are no longer needed
    load_cells(d, s, t);
    __syncthreads();
    first_convolution<LOW>(d, s, t);
    tile_moments(d, s, t, moments + int64_t(tile) * d.s.K * 3);
  }
}

// The planes of dev with their border, and the gradient of the logits; complete at the next barrier. again:
// set the border.
template <bool LOW>
DEVICE void forward_tile(const Call& d, const Shared& s, const Tile& t, bool again, float weight,
                         float (&sums)[4]) {
  load_cells(d, s, t);
  if (again) fill_border(d, s, t, [&](int k) { return border_value(s.norm[SCALE * d.s.K + k]); });
  __syncthreads();
  first_convolution<LOW>(d, s, t);
  clear(s.logits(d), 3 * d.p.wide_plane);
  __syncthreads();
  logits(d, s, t, weight, sums);
}

// partial (tiles, sums_columns): without needs_grad only the loss is set.
template <bool LOW>
__global__ void __launch_bounds__(THREADS, 2) decoder_loss_kernel(Call d, bool needs_grad, float* partial) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory));
  const int K = d.s.K, row = s.sums_row(d);
  load_constants(d, s);
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile);
    __syncthreads();
    for (int i = threadIdx.x; i < WARPS * row; i += THREADS) s.sums[i] = 0.0f;
    float sums[4] = {};
    forward_tile<LOW>(d, s, t, tile == int(blockIdx.x) || d.p.tiles() > 1, d.pixel_weight, sums);
    UNROLL_ALL for (int i = 0; i < 4; i++) {
      const float sum = warp_sum(sums[i]);
      if (threadIdx.x % WARP == 0) s.sums[threadIdx.x / WARP * row + 2 * K + i] = sum;
    }
    __syncthreads();
    if (needs_grad) {
      second_weight(d, s, t);
      norm_sums(d, s, t);
      __syncthreads();
    }
    float* to = partial + int64_t(tile) * sums_columns(K);
    auto total = [&](int column) { return sum_of_warps<WARPS>(s.sums, row, column); };
    if (threadIdx.x == 0) to[29 * K + 3] = total(2 * K);
    if (!needs_grad) continue;
    for (int i = threadIdx.x; i < 29 * K + 3; i += THREADS) {
      if (i < 2 * K) {
        to[i] = total(i < K ? 2 * i + 1 : 2 * (i - K));
      } else if (i >= 29 * K) {
        to[i] = total(2 * K + 1 + i - 29 * K);
      } else {
        float sum = 0.0f;
        for (int segment = 0; segment < SEGMENTS; segment++)
          sum += s.w2_sums(d)[segment * 27 * K + i - 2 * K];
        to[i] = sum;
      }
    }
  }
}

// Features that no pixel reads, as the image is smaller, have gradient 0.
DEVICE void clear_unused_features(const Call& d, const Tile& t, const Maps& to) {
  const int rest = d.s.h * d.s.w;
  if (t.low_h == d.s.h && t.low_w == d.s.w) return;
  for (int64_t i = threadIdx.x; i < int64_t(d.s.C) * rest; i += THREADS) {
    const int c = int(i / rest), y = int(i % rest) / d.s.w, x = int(i % rest) % d.s.w;
    if (y >= t.low_h || x >= t.low_w)
      store(to.data, to.dtype, t.n * to.n + c * to.c + y * to.y + x * to.x, 0.0f);
  }
}

// Tiles [first, last). w1_partial (blocks, K, C, 9), added to if `add`, or null. The features' gradient goes
// to d_features, or to parts (last - first, C, pixels) if a sample is several tiles.
template <bool LOW> __global__ void __launch_bounds__(THREADS, 2)
    decoder_backward_kernel(Call d, int first, int last, bool add, float* w1_partial, bool needs_features,
                            Maps d_features, float* parts) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory));
  load_constants(d, s);
  const float weight = d.pixel_weight * (d.upstream ? *d.upstream : 1.0f);
  float* mine = w1_partial ? w1_partial + int64_t(blockIdx.x) * 9 * d.s.K * d.s.C : nullptr;
  for (int tile = first + blockIdx.x; tile < last; tile += gridDim.x) {
    const Tile t(d, tile);
    const bool again = tile != first + int(blockIdx.x);
    __syncthreads();
    float sums[4] = {};
    forward_tile<LOW>(d, s, t, !again || d.p.tiles() > 1 || d.p.late == 0, weight, sums);
    __syncthreads();
    norm_backward(d, s, t);
    __syncthreads();
    float* part = parts ? parts + int64_t(tile - first) * d.s.C * d.p.pixels : nullptr;
    if constexpr (LOW)
      first_backward_taps(d, s, t, add || again, mine, d_features, part, needs_features);
    else
      first_backward_direct(d, s, t, add || again, mine, d_features, part, needs_features);
    if (needs_features && !parts) clear_unused_features(d, t, d_features);
  }
}

// ---- sums over tiles and blocks ----

// The gradient of the features of samples [n0, n0 + samples) from the parts of their tiles.
__global__ void __launch_bounds__(THREADS)
    decoder_overlap_kernel(Call d, int n0, int samples, const float* parts, Maps to) {
  const int64_t pixels = int64_t(d.s.h) * d.s.w, total = samples * d.s.C * pixels;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * THREADS) {
    const int x = int(i % d.s.w), y = int(i / d.s.w % d.s.h), c = int(i / pixels % d.s.C),
              n = int(i / pixels / d.s.C);
    float sum = 0.0f;
    for (int tile = 0; tile < d.p.tiles(); tile++) {
      const Tile t(d, n * d.p.tiles() + tile);
      const int row = y - t.low_y, column = x - t.low_x;
      if (row < 0 || row >= t.low_h || column < 0 || column >= t.low_w) continue;
      sum += parts[(int64_t(n * d.p.tiles() + tile) * d.s.C + c) * d.p.pixels + row * t.low_w + column];
    }
    store(to.data, to.dtype, (n0 + n) * to.n + c * to.c + y * to.y + x * to.x, sum);
  }
}

}  // namespace infopro::gpu
