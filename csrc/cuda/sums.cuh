// Sums over the lanes of a warp, the threads of a block, or the results of blocks; always in the same order.
#pragma once

#include "numbers.cuh"

namespace infopro::gpu {

template <class T> DEVICE T warp_sum(T x) {
  UNROLL_ALL for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// Sum of column `column` over rows of sums, one row for each warp.
template <int WARPS> DEVICE float sum_of_warps(const float* sums, int row, int column) {
  float sum = 0.0f;
  for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * row + column];
  return sum;
}

// Lane l returns the sum over the lanes of v[l]: 31 shuffles for 32 sums, where each alone would take 5.
template <int STEP = WARP / 2> DEVICE float transposed_sum(float (&v)[WARP]) {
  const bool upper = threadIdx.x & STEP;
  UNROLL_ALL for (int i = 0; i < STEP; i++) {
    const float mine = upper ? v[i + STEP] : v[i], other = upper ? v[i] : v[i + STEP];
    v[i] = mine + __shfl_xor_sync(ALL_LANES, other, STEP);
  }
  if constexpr (STEP > 1) return transposed_sum<STEP / 2>(v);
  return v[0];
}

// Sum over a block of THREADS, a power of two; the same in every thread.
template <int THREADS> DEVICE double block_sum(double x, double* memory) {
  memory[threadIdx.x] = x;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) memory[threadIdx.x] += memory[threadIdx.x + half];
  }
  __syncthreads();
  const double sum = memory[0];
  __syncthreads();
  return sum;
}

constexpr int SUM_COLUMNS = 32, SUM_ROWS = 16;  // threads of a block of a kernel that adds up rows

// Sum of column blockIdx.x * SUM_COLUMNS + threadIdx.x % SUM_COLUMNS of partial (rows, columns), in float64,
// returned in the first SUM_COLUMNS threads of a block of SUM_COLUMNS * SUM_ROWS. only: the one column to add
// up, or -1 for all.
template <class T> DEVICE double column_sum(const T* partial, int rows, int columns, int only) {
  __shared__ double memory[SUM_ROWS][SUM_COLUMNS];
  const int x = threadIdx.x % SUM_COLUMNS, y = threadIdx.x / SUM_COLUMNS,
            column = blockIdx.x * SUM_COLUMNS + x;
  double sum = 0;
  if (column < columns && (only < 0 || column == only))
    UNROLL(8) for (int row = y; row < rows; row += SUM_ROWS) sum += partial[int64_t(row) * columns + column];
  memory[y][x] = sum;
  __syncthreads();
  if (y == 0)
    for (int i = 1; i < SUM_ROWS; i++) sum += memory[i][x];
  return sum;
}

}  // namespace infopro::gpu
