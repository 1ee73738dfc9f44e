// Batch norm, ReLU and global average pooling of maps, one sample at a time: the normalised map is never written.
#pragma once

#include "decoder.h"

namespace infopro {
namespace INFOPRO_ISA {

template <class T>
int64_t norm_pool_row(int64_t pixels) {
  return round_up(pixels, Simd<T>::width);
}

template <class T>
INLINE void set_tail(T* row, int64_t pixels, T value) {
  for (int64_t p = pixels; p < norm_pool_row<T>(pixels); p++) row[p] = value;
}

// Sample n as rows (C, pixels), padded to whole vectors; what is behind a row is arbitrary.
template <class T>
INLINE void read_sample(const NormPool<T>& d, int64_t n, T* rows) {
  read_maps<T>(d.x, n, d.C, d.h, d.w, rows, norm_pool_row<T>(d.h * d.w), d.w);
}

template <class T>
void norm_pool_statistics(const NormPool<T>& d, int64_t n, T* rows, double* mean, double* squares) {
  read_sample(d, n, rows);
  const int64_t pixels = d.h * d.w;
  for (int64_t c = 0; c < d.C; c++) {
    T* row = rows + c * norm_pool_row<T>(pixels);
    channel_statistics(row, pixels, pixels, [&](T value) { set_tail(row, pixels, value); }, mean[c], squares[c]);
  }
}

// pooled[c] = mean of relu(y), y = (x - center) scale + shift. What backward needs of the sample: how many y are positive,
// and the sum of xhat = (x - center) inverse_std over them.
template <class T>
void norm_pool_forward(const NormPool<T>& d, int64_t n, T* rows, T* pooled, T* positive, T* positive_xhat) {
  read_sample(d, n, rows);
  const int64_t pixels = d.h * d.w, pitch = norm_pool_row<T>(pixels);
  for (int64_t c = 0; c < d.C; c++) {
    T* row = rows + c * pitch;
    T center = d.center[c], scale = d.scale[c], shift = d.shift[c];
    vec<T> total = {}, count = {}, deviations = {}, zero = {}, one = splat<T>(T(1));
    int64_t p = 0;
    for (; p + Simd<T>::width <= pixels; p += Simd<T>::width) {
      vec<T> deviation = load<T>(row + p) - center, y = deviation * scale + shift;
      total += y < zero ? zero : y;  // nan stays nan
      count += y > zero ? one : zero;
      deviations += y > zero ? deviation : zero;
    }
    T sums[3] = {sum<T>(total), sum<T>(count), sum<T>(deviations)};
    for (; p < pixels; p++) {
      T deviation = row[p] - center, y = deviation * scale + shift;
      sums[0] += y < T(0) ? T(0) : y;
      sums[1] += y > T(0) ? T(1) : T(0);
      sums[2] += y > T(0) ? deviation : T(0);
    }
    pooled[c] = sums[0] / T(pixels);
    positive[c] = sums[1];
    positive_xhat[c] = sums[2] * d.inverse_std[c];
  }
}

// The gradient in x: scale (g [y > 0] - mean_dy - xhat mean_dy_xhat) with g = upstream[c] / pixels, the means zero in eval mode.
template <class T>
void norm_pool_backward(const NormPool<T>& d, int64_t n, T* rows, const T* upstream, const T* mean_dy, const T* mean_dy_xhat, const Maps& dx) {
  read_sample(d, n, rows);
  const int64_t pixels = d.h * d.w, pitch = norm_pool_row<T>(pixels);
  for (int64_t c = 0; c < d.C; c++) {
    T* row = rows + c * pitch;
    T center = d.center[c], scale = d.scale[c], shift = d.shift[c], mean = mean_dy[c], slope = mean_dy_xhat[c] * d.inverse_std[c];
    vec<T> zero = {}, g = splat<T>(upstream[c] / T(pixels));
    set_tail(row, pixels, center);
    for (int64_t p = 0; p < pixels; p += Simd<T>::width) {
      vec<T> deviation = load<T>(row + p) - center, y = deviation * scale + shift;
      store<T>(row + p, ((y > zero ? g : zero) - mean - deviation * slope) * scale);
    }
  }
  write_maps<T>(dx, n, d.C, d.h, d.w, rows, pitch, d.w);
}

}  // namespace INFOPRO_ISA
}  // namespace infopro
