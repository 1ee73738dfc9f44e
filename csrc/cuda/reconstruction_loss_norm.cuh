// Batch norm's coefficients from the moments of z, and sums over the blocks' partial results.
#pragma once

#include "sums.cuh"

namespace infopro::gpu {

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// Rows of the norm's coefficients. The planes hold dev = z - center. y = dev scale + shift is the normalised
// map, a = relu(y). START is b1 - center, or b1 while there is no center yet.
enum Norm { START, SCALE, SHIFT, INVERSE_STD, MEAN_DY, SLOPE };

struct GivenParameters {
  Numbers w1, b1, gamma, beta, w2, b2;
};

// d gamma, d beta, d W2, d b2, loss
__host__ __device__ inline int sums_columns(int K) { return 29 * K + 4; }

struct NormCall {
  int K, row;    // hidden channels; numbers of a row of `norm`, zeros behind K
  Numbers b1, gamma, beta;
  float* norm;   // (6, row)
  double pixels; // N H W

  DEVICE float& at(Norm what, int k) const { return norm[what * row + k]; }

  DEVICE void set(int k, float mean, float var, double eps) const {
    const float inverse_std = float(1.0 / sqrt(double(var) + eps));
    at(START, k) = b1[k] - mean;
    at(SCALE, k) = gamma[k] * inverse_std;
    at(SHIFT, k) = beta[k];
    at(INVERSE_STD, k) = inverse_std;
  }

  DEVICE void clear(int k) const {
    for (int what = START; what <= SLOPE; what++) norm[what * row + k] = 0.0f;
  }
};

// Block k: mean and biased variance of channel k, to saved[k] and saved[K + k], and the coefficients of the
// norm. They are given, or computed in float64 from moments (rows, K, 3): count, mean, sum of squared
// deviations (Chan, Golub & LeVeque 1983).
__global__ void __launch_bounds__(THREADS)
    decoder_norm_kernel(NormCall d, Numbers running_mean, Numbers running_var, const double* moments,
        int rows,
                        double eps, float* saved) {
  __shared__ double memory[THREADS];
  const int k = blockIdx.x;
  if (k >= d.K) {
    if (threadIdx.x == 0) d.clear(k);
    return;
  }
  float mean, var;
  if (running_mean.data) {
    mean = running_mean[k], var = running_var[k];
  } else {
    auto row = [&](int i) { return moments + (int64_t(i) * d.K + k) * 3; };
    double sum = 0;
    for (int i = threadIdx.x; i < rows; i += THREADS) sum += row(i)[0] * row(i)[1];
    const double center = block_sum<THREADS>(sum, memory) / d.pixels;
    double squares = 0;
    for (int i = threadIdx.x; i < rows; i += THREADS)
      squares += row(i)[2] + row(i)[0] * (row(i)[1] - center) * (row(i)[1] - center);
    squares = block_sum<THREADS>(squares, memory);
    mean = float(center), var = float(squares / d.pixels);
  }
  if (threadIdx.x != 0) return;
  saved[k] = mean, saved[d.K + k] = var;
  d.set(k, mean, var, eps);
}

// The coefficients of the norm and of its backward from what forward saved, and the gradient of b1. With
// batch statistics that is 0: a constant added to z changes nothing. unit: the upstream gradient of a pixel's
// loss in the units of the gradients that the next kernel sums, or 0: *upstream / pixels.
__global__ void __launch_bounds__(THREADS)
    decoder_norm_backward_kernel(NormCall d, const float* upstream, const float* saved, bool batch_statistics,
                                 double unit, double eps, float* d_b1) {
  const int K = d.K;
  const double share = !batch_statistics ? 0.0 : unit != 0 ? unit : double(*upstream) / d.pixels;
  for (int k = threadIdx.x; k < d.row; k += THREADS) {
    if (k >= K) {
      d.clear(k);
      continue;
    }
    d.set(k, saved[k], saved[K + k], eps);
    const float d_gamma = saved[2 * K + k], d_beta = saved[3 * K + k];
    d.at(MEAN_DY, k) = float(d_beta * share);
    d.at(SLOPE, k) = d.at(INVERSE_STD, k) * float(d_gamma * share);
    d_b1[k] = batch_statistics ? 0.0f : d.at(SCALE, k) * d_beta * *upstream;
  }
}

// to[column] = sum over the rows of partial (rows, columns), in float64. Unless `last` is null, the last
// column goes there, times last_factor; then the others are set to 0 unless `all`.
__global__ void __launch_bounds__(SUM_COLUMNS* SUM_ROWS)
    reduce_rows_kernel(const float* partial, int rows, int columns, float* to, float* last,
                       double last_factor, bool all) {
  const int column = blockIdx.x * SUM_COLUMNS + threadIdx.x;
  const double sum = column_sum(partial, rows, columns, all ? -1 : columns - 1);
  if (threadIdx.x >= SUM_COLUMNS || column >= columns) return;
  if (last && column == columns - 1)
    *last = float(sum * last_factor);
  else
    to[column] = float(sum);
}

}  // namespace infopro::gpu
