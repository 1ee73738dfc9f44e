// The kernels of a chain decoder's last stage: one sweep over the tiles in each direction, by as many blocks
// as the device holds at a time. Neither the resized map nor the logits leave a block. Also, for every stage,
// the kernels that prepare parameters and tables and that add up the results of blocks.
#pragma once

#include "chain_stage_block.cuh"

namespace infopro::gpu::chain {

struct Given {
  Numbers weight, bias;             // (K, C, 3, 3), (K)
  Numbers mean, var, gamma, beta;   // (C)
  double eps;
};

__global__ void __launch_bounds__(THREADS) chain_prepare_kernel(Call d, Given given) {
  const int C = d.s.C, K = d.s.K, padded = d.s.padded(), groups = d.s.groups();
  const int first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
  for (int i = first; i < groups * padded * W_ROW; i += step) {
    const int tap = i % W_ROW, c = i / W_ROW % padded, k = i / W_ROW / padded * OUTPUTS + tap / 9;
    d.w.weight[i] = c < C && tap < TAPS && k < K ? given.weight[(int64_t(k) * C + c) * 9 + tap % 9] : 0.0f;
  }
  for (int c = first; c < padded; c += step) {
    float4 norm = {0.0f, 0.0f, 0.0f, 0.0f};
    if (c < C && d.norm) {
      const float inverse_std = float(1.0 / sqrt(double(given.var[c]) + given.eps));
      norm = {given.mean[c], given.gamma[c] * inverse_std, given.beta[c], inverse_std};
    }
    store4(d.w.norm + 4 * c, norm);
  }
  for (int k = first; k < groups * OUTPUTS; k += step) d.w.bias[k] = k < K ? given.bias[k] : 0.0f;
  const Line &rows = d.s.rows, &columns = d.s.columns;
  for (int y = first; y < rows.out; y += step) d.w.rows[y] = rows.at(y);
  for (int x = first; x < columns.out; x += step) d.w.columns[x] = columns.at(x);
  for (int y = first; y <= rows.in; y += step) d.w.first_row[y] = y < rows.in ? rows.first(y) : rows.out;
  for (int x = first; x <= columns.in; x += step)
    d.w.first_column[x] = x < columns.in ? columns.first(x) : columns.out;
}

// Load the tile's cells and compute its T.
DEVICE void start_tile(const Call& d, const Shared& s, const Tile& t) {
  __syncthreads();  // the constants are loaded; the last tile is no longer needed
  load_cells(d, s, t);
  mix(d, s, t);
  __syncthreads();
}

DEVICE auto target_of(const Call& d, const Tile& t) {
  return [&d, origin = t.n * d.target.maps.n, top = t.y.out, left = t.x.out](int o, int y, int x) {
    return d.target.at(o, origin + (top + y) * d.target.maps.y + (left + x) * d.target.maps.x);
  };
}

// partial (blocks) = the sum of the losses of their tiles' pixels.
__global__ void __launch_bounds__(THREADS, 2) chain_loss_kernel(Call d, double* partial) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory), false);
  load_weight(d, s, 0);
  load_norm(d, s);
  double total = 0.0;
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile, false);
    start_tile(d, s, t);
    float sum = 0.0f;
    auto use = [&](int, int, int, float logit, float target) {
      sum += pixel_loss(d.pixel, logit, target).loss;
    };
    logits(d, s, t, 0, target_of(d, t), use, [](int) {});
    total += sum;
  }
  total = warp_sum(total);
  double* of_warps = reinterpret_cast<double*>(s.sums);
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < WARPS; warp++) total += of_warps[warp];
  partial[blockIdx.x] = total;
}

// The sums of a block in backward: (2, C) of dy, (K, C, 9) dW, in the last stage (3) db.
__host__ __device__ inline int sums_columns(const Shape& s, bool last) {
  return 2 * s.C + 9 * s.K * s.C + (last ? OUTPUTS : 0);
}

DEVICE void write_sums(const Call& d, const Shared& s, float* to) {
  const int C = d.s.C;
  auto of_warps = [&](int column) { return sum_of_warps<WARPS>(s.sums, Shared::sums_row(d), column); };
  for (int i = threadIdx.x; i < sums_columns(d.s, true); i += THREADS)
    to[i] = i < 2 * C ? of_warps(i) : i < 2 * C + TAPS * C ? s.d_weight[i - 2 * C] : of_warps(i - TAPS * C);
}

// The gradient of the tile's logits, complete at the next barrier. bias += its sums over the pixels that no
// other tile counts.
DEVICE void logit_gradients(const Call& d, const Shared& s, const Tile& t, float weight,
                            float (&bias)[OUTPUTS]) {
  const int top = d.w.first_row[t.y.own] - t.y.out, bottom = d.w.first_row[t.y.own + t.y.owned] - t.y.out;
  const int left = d.w.first_column[t.x.own] - t.x.out,
            right = d.w.first_column[t.x.own + t.x.owned] - t.x.out;
  auto use = [&](int o, int y, int x, float logit, float target) {
    const float gradient = pixel_loss(d.pixel, logit, target).gradient * weight;
    s.gradients[(o * t.y.outs + y) * t.x.outs + x] = gradient;
    const float counted = y >= top && y < bottom && x >= left && x < right ? gradient : 0.0f;
    UNROLL_ALL for (int i = 0; i < OUTPUTS; i++) bias[i] += i == o ? counted : 0.0f;
  };
  logits(d, s, t, 0, target_of(d, t), use, [](int) {});
}

// partial (blocks, sums_columns); d_x if needs_x.
__global__ void __launch_bounds__(THREADS, 2)
    chain_gradient_kernel(Call d, bool needs_x, bool needs_weight, Maps d_x, float* partial) {
  INFOPRO_DYNAMIC_SHARED(memory);
  const Shared s(d, reinterpret_cast<float*>(memory), true);
  load_weight(d, s, 0);
  load_norm(d, s);
  for (int i = threadIdx.x; i < TAPS * d.s.C; i += THREADS) s.d_weight[i] = 0.0f;
  for (int i = threadIdx.x; i < WARPS * Shared::sums_row(d); i += THREADS) s.sums[i] = 0.0f;
  const float weight = d.pixel_weight * *d.upstream;
  float* a = s.taps + round_up(TAPS * d.p.pixels, 4);
  float bias[OUTPUTS] = {};
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Tile t(d, tile, true);
    start_tile(d, s, t);
    logit_gradients(d, s, t, weight, bias);
    __syncthreads();
    if (!needs_x && !needs_weight) continue;
    collect(d, s, t);
    __syncthreads();
    for (int c0 = 0; c0 < d.s.C; c0 += GROUP) {
      inputs(d, s, t, c0, needs_x, d_x, a);
      if (!needs_weight) continue;
      __syncthreads();  // a is whole
      weights(d, s, t, a, s.gradients);
      __syncthreads();
      add_weights(d, 0, c0, s.gradients, s.d_weight, tile == int(blockIdx.x));
    }
  }
  UNROLL_ALL for (int o = 0; o < OUTPUTS; o++) {
    const float sum = warp_sum(bias[o]);
    if (threadIdx.x % WARP == 0) s.sums[threadIdx.x / WARP * Shared::sums_row(d) + 2 * d.s.C + o] = sum;
  }
  __syncthreads();
  write_sums(d, s, partial + int64_t(blockIdx.x) * sums_columns(d.s, true));
}

// value = factor times the sum of partial (rows), in float64.
__global__ void __launch_bounds__(SUM_COLUMNS* SUM_ROWS)
    chain_reduce_loss_kernel(const double* partial, int rows, double factor, float* value) {
  const double sum = column_sum(partial, rows, 1, -1);
  if (threadIdx.x == 0) *value = float(factor * sum);
}

// Add up the blocks' partial (rows, columns = sums_columns). d_weight may be null, and d_bias is null except
// in the last stage.
__global__ void __launch_bounds__(SUM_COLUMNS* SUM_ROWS)
    chain_reduce_kernel(const float* partial, int rows, int columns, Shape s, float* sums, float* d_weight,
                        float* d_bias) {
  const int column = blockIdx.x * SUM_COLUMNS + threadIdx.x;
  const double sum = column_sum(partial, rows, columns, -1);
  if (threadIdx.x >= SUM_COLUMNS || column >= columns) return;
  const int tap = column - 2 * s.C, output = tap - 9 * s.K * s.C;
  if (tap < 0)
    sums[column] = float(sum);
  else if (output >= 0)
    d_bias[output] = float(sum);
  else if (d_weight)
    d_weight[tap] = float(sum);
}

}  // namespace infopro::gpu::chain
