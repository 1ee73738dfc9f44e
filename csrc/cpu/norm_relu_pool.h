// Batch norm, ReLU and global average pooling, one sample at a time: the normalised map is never written.
#pragma once

#include "batch_norm.h"
#include "maps.h"

namespace infopro::INFOPRO_ISA {

template <class T> int64_t norm_pool_row(int64_t pixels) { return round_up(pixels, Simd<T>::width); }

template <class T> INLINE void set_tail(T* row, int64_t pixels, T value) {
  for (int64_t p = pixels; p < norm_pool_row<T>(pixels); p++) row[p] = value;
}

// Whether a sample of x can be read in place as rows: of T, without gaps, in whole vectors.
template <class T> INLINE bool in_place(const NormPool<T>& d, const Maps& x) {
  return x.dtype == dtype_as<T> && x.x == 1 && x.y == d.w && x.c == d.h * d.w &&
         d.h * d.w % Simd<T>::width == 0;
}

// Sample n as rows (C, pixels), padded to whole vectors with arbitrary numbers: in x itself if it lies so,
// else copied to `rows`.
template <class T> INLINE T* read_sample(const NormPool<T>& d, int64_t n, T* rows) {
  if (in_place(d, d.x)) return (T*)d.x.data + n * d.x.n;
  read_maps<T>(d.x, n, d.C, d.h, d.w, rows, norm_pool_row<T>(d.h * d.w), d.w);
  return rows;
}

// ---- channels last: pixel after pixel, in vectors of channels ----

// Whether x is channels last, of T, with the channels in whole vectors.
template <class T> INLINE bool channels_last(const NormPool<T>& d, const Maps& x) {
  return x.dtype == dtype_as<T> && x.c == 1 && x.x == d.C && x.y == d.w * d.C && d.C % Simd<T>::width == 0;
}

constexpr int64_t PIXELS_APART = 16;  // adding the sums of so many pixels rounds less than one long sum

// Mean of each of C channels, and the sum of squared deviations from it. Pixels are `pitch` apart, C rounded
// up to whole vectors.
template <class T>
INLINE void pixel_statistics(const T* rows, int64_t pixels, int64_t pitch, int64_t C, double* mean,
                             double* squares) {
  constexpr int width = Simd<T>::width;
  for (int64_t c = 0; c < C; c += width, rows += width) {
    vec<T> total = {}, square = {}, rest = {};
    for (int64_t first = 0; first < pixels; first += PIXELS_APART) {
      vec<T> part = {};
      for (int64_t p = first; p < pixels && p < first + PIXELS_APART; p++) part += load<T>(rows + p * pitch);
      total += part;
    }
    vec<T> center = total / T(pixels);
    for (int64_t first = 0; first < pixels; first += PIXELS_APART) {
      vec<T> part = {}, left = {};
      for (int64_t p = first; p < pixels && p < first + PIXELS_APART; p++) {
        vec<T> deviation = load<T>(rows + p * pitch) - center;
        part += deviation * deviation;
        left += deviation;
      }
      square += part;
      rest += left;
    }
    for (int i = 0; i < width && c + i < C; i++) {  // the center was rounded: see channel_statistics
      double left = double(rest[i]) / double(pixels);
      mean[c + i] = double(center[i]) + left;
      squares[c + i] = double(square[i]) - left * left * double(pixels);
    }
  }
}

// The gradient in `left` channels of a pixel, from c on: scale (g [y > 0] - mean_dy - xhat mean_dy_xhat) with
// g = upstream / pixels. d has the center, inverse_std, scale and shift of NormPool.
template <class T> struct PixelGradient {
  vec<T> center, scale, shift, g, mean, slope;

  template <class D>
  INLINE PixelGradient(const D& d, int64_t c, int left, int64_t pixels, const T* upstream, const T* mean_dy,
                       const T* mean_dy_xhat) {
    auto some = [&](const T* p) {
      return left < Simd<T>::width ? load_first<T>(p + c, left) : load<T>(p + c);
    };
    center = some(d.center), scale = some(d.scale), shift = some(d.shift), mean = some(mean_dy);
    slope = some(mean_dy_xhat) * some(d.inverse_std);
    g = some(upstream) / T(pixels);
  }

  INLINE vec<T> operator()(vec<T> x) const {
    vec<T> deviation = x - center, y = deviation * scale + shift, zero = {};
    return ((y > zero ? g : zero) - mean - deviation * slope) * scale;
  }
};

// norm_pool_forward for channels last.
template <class T>
INLINE void pixel_pool(const NormPool<T>& d, const T* rows, T* pooled, T* positive, T* positive_xhat) {
  const int64_t pixels = d.h * d.w;
  for (int64_t c = 0; c < d.C; c += Simd<T>::width, rows += Simd<T>::width) {
    vec<T> center = load<T>(d.center + c), scale = load<T>(d.scale + c), shift = load<T>(d.shift + c);
    vec<T> total = {}, count = {}, deviations = {}, zero = {}, one = splat<T>(T(1));
    for (int64_t first = 0; first < pixels; first += PIXELS_APART) {
      vec<T> part = {}, part_deviations = {};
      for (int64_t p = first; p < pixels && p < first + PIXELS_APART; p++) {
        vec<T> deviation = load<T>(rows + p * d.C) - center, y = deviation * scale + shift;
        part += y < zero ? zero : y;  // nan stays nan
        count += y > zero ? one : zero;
        part_deviations += y > zero ? deviation : zero;
      }
      total += part;
      deviations += part_deviations;
    }
    store<T>(pooled + c, total / T(pixels));
    store<T>(positive + c, count);
    store<T>(positive_xhat + c, deviations * load<T>(d.inverse_std + c));
  }
}

// ---- the kernels ----

template <class T>
void norm_pool_statistics(const NormPool<T>& d, int64_t n, T* rows, double* mean, double* squares) {
  if (channels_last(d, d.x))
    return pixel_statistics((const T*)d.x.data + n * d.x.n, d.h * d.w, d.C, d.C, mean, squares);
  rows = read_sample(d, n, rows);
  const int64_t pixels = d.h * d.w;
  for (int64_t c = 0; c < d.C; c++) {
    T* row = rows + c * norm_pool_row<T>(pixels);
    channel_statistics(
        row, pixels, pixels, [&](T value) { set_tail(row, pixels, value); }, mean[c], squares[c]);
  }
}

// pooled[c] = mean of relu(y), y = (x - center) scale + shift. For backward: how many y are positive, and the
// sum of xhat = (x - center) inverse_std over them.
template <class T>
void norm_pool_forward(const NormPool<T>& d, int64_t n, T* rows, T* pooled, T* positive, T* positive_xhat) {
  if (channels_last(d, d.x))
    return pixel_pool(d, (const T*)d.x.data + n * d.x.n, pooled, positive, positive_xhat);
  const int64_t pixels = d.h * d.w, pitch = norm_pool_row<T>(pixels);
  const T* from = read_sample(d, n, rows);
  for (int64_t c = 0; c < d.C; c++) {
    const T* row = from + c * pitch;
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

// The gradient in x: scale (g [y > 0] - mean_dy - xhat mean_dy_xhat) with g = upstream[c] / pixels. In eval
// mode the means are zero.
template <class T>
void norm_pool_backward(const NormPool<T>& d, int64_t n, T* rows, const T* upstream, const T* mean_dy,
                        const T* mean_dy_xhat, const Maps& dx) {
  const int64_t pixels = d.h * d.w, pitch = norm_pool_row<T>(pixels);
  if (channels_last(d, d.x) && channels_last(d, dx)) {
    const T* from = (const T*)d.x.data + n * d.x.n;
    T* to = (T*)dx.data + n * dx.n;
    for (int64_t c = 0; c < d.C; c += Simd<T>::width) {
      const PixelGradient<T> gradient(d, c, Simd<T>::width, pixels, upstream, mean_dy, mean_dy_xhat);
      for (int64_t p = 0; p < pixels; p++) store<T>(to + p * d.C + c, gradient(load<T>(from + p * d.C + c)));
    }
    return;
  }
  T *from = read_sample(d, n, rows), *to = in_place(d, dx) ? (T*)dx.data + n * dx.n : rows;
  for (int64_t c = 0; c < d.C; c++) {
    T *row = from + c * pitch, *out = to + c * pitch;
    T center = d.center[c], scale = d.scale[c], shift = d.shift[c], mean = mean_dy[c],
      slope = mean_dy_xhat[c] * d.inverse_std[c];
    vec<T> zero = {}, g = splat<T>(upstream[c] / T(pixels));
    set_tail(row, pixels, center);
    for (int64_t p = 0; p < pixels; p += Simd<T>::width) {
      vec<T> deviation = load<T>(row + p) - center, y = deviation * scale + shift;
      store<T>(out + p, ((y > zero ? g : zero) - mean - deviation * slope) * scale);
    }
  }
  if (to == rows) write_maps<T>(dx, n, d.C, d.h, d.w, rows, pitch, d.w);
}

}  // namespace infopro::INFOPRO_ISA
