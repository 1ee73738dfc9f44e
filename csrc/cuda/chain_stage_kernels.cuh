// The kernels of a chain decoder's stages in front of the last, three channels of z at a time. Forward writes
// z and the moments of each tile. Backward computes the gradient of z from the gradient behind its batch norm
// as it reads it, and adds up the gradient of a over the channels of z.
#pragma once

#include "chain_stage_loss.cuh"

namespace infopro::gpu::chain {

// The batch norm behind a stage. With means over the batch the gradient of z is (dy - mean_dy - x mean_dy_x)
// scale, x = (z - center) / std; else dy scale.
struct Outer {
  const float *dy, *z;       // (N, K, H, W)
  Numbers mean, var, gamma;  // (K)
  const float* mean_dy;      // (2, K): of dy and of dy x; or null
  double eps;
  float* coefficients;       // (K, OUTER), by chain_outer_kernel: center, 1 / std, scale, mean_dy, mean_dy_x
};

constexpr int OUTER = 5;

__global__ void __launch_bounds__(THREADS) chain_outer_kernel(Outer outer, int K) {
  for (int k = threadIdx.x; k < K; k += THREADS) {
    float* to = outer.coefficients + OUTER * k;
    to[0] = outer.mean[k];
    to[1] = float(1.0 / sqrt(double(outer.var[k]) + outer.eps));
    to[2] = outer.gamma[k] * to[1];
    to[3] = outer.mean_dy ? outer.mean_dy[k] : 0.0f;
    to[4] = outer.mean_dy ? outer.mean_dy[K + k] : 0.0f;
  }
}

// ---- forward ----

// The moments of channels from `channel` on, mean and sum of squared deviations from it, from held (unit, 3)
// of the strips: the first value, and the sums of the deviations from it and of their squares. A warp takes a
// channel.
DEVICE void tile_moments(const Call& d, const Shared& s, const Tile& t, int channel, double* to) {
  const int o = threadIdx.x / WARP, lane = threadIdx.x % WARP, width = t.x.outs,
            rows = ceil_div(t.y.outs, d.p.strips);
  if (o >= OUTPUTS || channel + o >= d.s.K) return;
  auto add = [&](auto value) {
    double sum = 0.0;
    for (int i = lane; i < width * d.p.strips; i += WARP) {
      const int count = smaller(rows, t.y.outs - i / width * rows),
                unit = (i / width * OUTPUTS + o) * width + i % width;
      if (count <= 0) continue;
      const double deviation = double(s.held[3 * unit + 1]) / count;
      sum += value(double(count), s.held[3 * unit] + deviation,
                   s.held[3 * unit + 2] - count * deviation * deviation);
    }
    return warp_sum(sum);
  };
  const double mean =
      add([](double count, double mean, double) { return count * mean; }) / (double(width) * t.y.outs);
  const double squares = add([=](double count, double own, double squares) {
    return squares + count * (own - mean) * (own - mean);
  });
  if (lane == 0) to[2 * (channel + o)] = mean, to[2 * (channel + o) + 1] = squares;
}

// z (N, K, H, W); moments (tiles, K, 2).
__global__ void __launch_bounds__(THREADS, 2) chain_stage_kernel(Call d, float* z, double* moments) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory), false);
  const int K = d.s.K, H = d.s.rows.out, W = d.s.columns.out;
  load_norm(d, s);
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile, false);
    for (int channel = 0; channel < K; channel += OUTPUTS) {
      __syncthreads();  // the last three channels, and the last tile, are no longer needed
      if (channel == 0) load_cells(d, s, t);
      load_weight(d, s, channel / OUTPUTS);
      __syncthreads();
      mix(d, s, t);
      __syncthreads();
      float first = 0.0f, sum = 0.0f, squares = 0.0f;  // of a strip; sums of deviations from the first
      int count = 0;
      auto use = [&](int o, int y, int x, float value, float) {
        first = count == 0 ? value : first;
        const float deviation = value - first;
        sum += deviation, squares += deviation * deviation, count++;
        if (channel + o < K) z[((t.n * K + channel + o) * H + t.y.out + y) * W + t.x.out + x] = value;
      };
      auto end = [&](int unit) {
        s.held[3 * unit] = first, s.held[3 * unit + 1] = sum, s.held[3 * unit + 2] = squares;
        sum = squares = 0.0f, count = 0;
      };
      logits(d, s, t, channel, [](int, int, int) { return 0.0f; }, use, end);
      __syncthreads();
      tile_moments(d, s, t, channel, moments + int64_t(tile) * 2 * K);
    }
  }
}

// Block k: mean and biased variance of channel k, to statistics[k] and statistics[K + k], in float64 from the
// tiles' moments (Chan, Golub & LeVeque 1983).
__global__ void __launch_bounds__(THREADS)
    chain_statistics_kernel(Call d, const double* moments, float* statistics) {
  const int k = blockIdx.x, K = d.s.K, H = d.s.rows.out, W = d.s.columns.out;
  __shared__ double memory[THREADS];
  auto add = [&](auto value) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < d.tiles(); i += THREADS) {
      const int y = i % d.p.tiles() / d.p.tiles_x * d.p.tile_h, x = i % d.p.tiles_x * d.p.tile_w;
      const double* m = moments + (int64_t(i) * K + k) * 2;
      sum += value(double(smaller(d.p.tile_h, H - y)) * smaller(d.p.tile_w, W - x), m[0], m[1]);
    }
    return block_sum<THREADS>(sum, memory);
  };
  const double count = double(d.s.N) * H * W;
  const double mean = add([](double pixels, double mean, double) { return pixels * mean; }) / count;
  const double squares = add([=](double pixels, double own, double squares) {
    return squares + pixels * (own - mean) * (own - mean);
  });
  if (threadIdx.x == 0) statistics[k] = float(mean), statistics[K + k] = float(squares / count);
}

// ---- backward ----

// gradients[(o * y.outs + row) * x.outs + column] = the gradient of three channels of the tile's z.
DEVICE void load_gradients(const Call& d, const Shared& s, const Tile& t, const Outer& outer, int channel) {
  const int width = t.x.outs, pixels = t.y.outs * width, H = d.s.rows.out, W = d.s.columns.out;
  for (int i = threadIdx.x; i < OUTPUTS * pixels; i += THREADS) {
    const int o = i / pixels, y = i % pixels / width, x = i % width, k = channel + o;
    float g = 0.0f;
    if (k < d.s.K) {
      const float* coefficients = outer.coefficients + OUTER * k;
      const int64_t at = ((t.n * d.s.K + k) * H + t.y.out + y) * W + t.x.out + x;
      g = __ldg(outer.dy + at);
      if (outer.mean_dy)
        g -= coefficients[3] + (__ldg(outer.z + at) - coefficients[0]) * coefficients[1] * coefficients[4];
      g *= coefficients[2];
    }
    s.gradients[i] = g;
  }
}

// a (C, pixels) of the tile, with zeros behind its pixels and channels; da (C, pixels) = 0.
DEVICE void load_inputs(const Call& d, const Shared& s, const Tile& t, float* a, float* da) {
  const int owned = t.y.owned * t.x.owned, pixels = d.p.pixels;
  for (int i = threadIdx.x; i < round_up(d.s.C, GROUP) * pixels; i += THREADS) {
    const int c = i / pixels, pixel = i % pixels;
    float value = 0.0f;
    if (c < d.s.C && pixel < owned) {
      const int y = t.y.own + pixel / t.x.owned, x = t.x.own + pixel % t.x.owned;
      value = load(d.x.data, d.x.dtype, t.n * d.x.n + c * d.x.c + y * d.x.y + x * d.x.x);
      if (d.norm) value = relu(normalised(value, load4(s.norm + 4 * c)));
    }
    a[i] = value, da[i] = 0.0f;
  }
}

// da += W^T dT. A thread takes a pixel, and a share of the channels if there are more threads than pixels.
DEVICE void add_inputs(const Call& d, const Shared& s, const Tile& t, float* da) {
  const int owned = t.y.owned * t.x.owned, parts = larger(1, THREADS / owned), share = ceil_div(d.s.C, parts);
  for (int unit = threadIdx.x; unit < owned * parts; unit += THREADS) {
    const int pixel = unit % owned, c0 = unit / owned * share;
    float g[TAPS];
    UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) g[tap] = s.taps[pixel * TAPS + tap];
    UNROLL(2) for (int c = c0; c < smaller(c0 + share, d.s.C); c++) {
      float w[W_ROW], sum = 0.0f;
      load_weights(s.weight + c * W_ROW, w);
      UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) sum += w[tap] * g[tap];
      da[c * d.p.pixels + pixel] += sum;
    }
  }
}

// dx of channels [c0, c0 + GROUP), or the gradient of the batch norm's output and its sums, as in `inputs`.
DEVICE void write_inputs(const Call& d, const Shared& s, const Tile& t, int c0, const float* da, Maps d_x) {
  const int owned = t.y.owned * t.x.owned;
  float sums[WARP] = {};
  UNROLL(1) for (int pixel = threadIdx.x; pixel < owned; pixel += THREADS) {
    const int y = t.y.own + pixel / t.x.owned, x = t.x.own + pixel % t.x.owned;
    const int64_t from = t.n * d.x.n + y * d.x.y + x * d.x.x, to = t.n * d_x.n + y * d_x.y + x * d_x.x;
    UNROLL_ALL for (int j = 0; j < GROUP; j++) {
      const int c = c0 + j;
      if (c >= d.s.C) continue;
      float g = da[c * d.p.pixels + pixel];
      if (d.norm) {
        const float raw = load(d.x.data, d.x.dtype, from + c * d.x.c);
        const float4 norm = load4(s.norm + 4 * c);
        g = normalised(raw, norm) <= 0.0f ? 0.0f : g;
        sums[2 * j] += g;
        sums[2 * j + 1] += g * ((raw - norm.x) * norm.w);
      }
      store(d_x.data, d_x.dtype, to + c * d_x.c, g);
    }
  }
  if (d.norm) add_norm_sums(d, s, c0, sums);
}

// partial (blocks, sums_columns); d_x if needs_x.
__global__ void __launch_bounds__(THREADS, 2)
    chain_stage_gradient_kernel(Call d, Outer outer, bool needs_x, bool needs_weight, Maps d_x,
                                float* partial) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory), true);
  const int C = d.s.C, K = d.s.K;
  float *a = s.held, *da = a + round_up(C, GROUP) * d.p.pixels,
        *row = partial + int64_t(blockIdx.x) * sums_columns(d.s, false);
  load_norm(d, s);
  for (int i = threadIdx.x; i < WARPS * Shared::sums_row(d); i += THREADS) s.sums[i] = 0.0f;
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile, true);
    __syncthreads();
    load_cells(d, s, t);
    load_inputs(d, s, t, a, da);
    for (int channel = 0; channel < K; channel += OUTPUTS) {
      __syncthreads();  // the last three channels are no longer needed
      load_weight(d, s, channel / OUTPUTS);
      load_gradients(d, s, t, outer, channel);
      __syncthreads();
      collect(d, s, t);
      __syncthreads();
      if (needs_x) add_inputs(d, s, t, da);
      for (int c0 = 0; c0 < C && needs_weight; c0 += GROUP) {
        weights(d, s, t, a + c0 * d.p.pixels, s.gradients);
        __syncthreads();
        add_weights(d, channel, c0, s.gradients, row + 2 * C, tile == int(blockIdx.x));
        __syncthreads();
      }
    }
    __syncthreads();  // da is whole
    for (int c0 = 0; c0 < C && needs_x; c0 += GROUP) write_inputs(d, s, t, c0, da, d_x);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * C; i += THREADS)
    row[i] = sum_of_warps<WARPS>(s.sums, Shared::sums_row(d), i);
}

}  // namespace infopro::gpu::chain
