// The decoder of reconstruction_loss, one sample at a time in a thread's scratch: no map of the batch is ever
// written.
//
// Sweeps over the batch:
//     statistics   of z, in training only
//     loss         with the sums for the gradients of gamma, beta, W2 and b2 and for batch norm's backward
//     backward     recomputes z, a and the logits, and computes the gradients of h and W1
//
// z at low resolution. With u = resize(h) and z = conv3x3(u) + b,
//     T[tap][k] = sum_c W[k][c][tap] h[c]                           (9 K, h w)    1x1 convolutions
//     E[k][dy][i][X] = sum_dx columns(T[dy, dx][k][i])(X + dx - 1)  (K, 3, h, W)  0 outside the resized row
//     z[k][Y][X] = b[k] + sum_dy rows(E[k][dy])(Y + dy - 1)[X]                    0 outside the resized map
// which is exact, borders included. Backward is the transpose of each line.
#pragma once

#include "batch_norm.h"
#include "maps.h"
#include "pixel.h"
#include "resize_columns.h"
#include "resize_rows.h"
#include "winograd.h"

namespace infopro::INFOPRO_ISA {

// The layout of a thread's scratch.
template <class T> struct Scratch {
  Plane<T> plane;
  Strips<T> strips;
  // Sizes at low resolution: a padded map, a padded row of W pixels, a row of transposed features.
  int64_t pixels, row, features_pitch;
  T *h, *z, *a, *g, *image, *taps, *expanded, *h_rows, *line;
  T *spread_h, *spread_z, *products, *pixel_rows;  // for Winograd's convolutions
  T* end;
  int64_t offset[9];

  Scratch(const Decoder<T>& d, T* memory) : plane(d.H, d.W), strips(plane) {
    constexpr int width = Simd<T>::width;
    pixels = round_up(d.h * d.w, width) + MAX_VECTORS * width;
    row = round_up(d.W, width) + width;
    features_pitch = round_up(d.C, width);
    auto take = [&](int64_t n) { T* p = memory; memory += round_up(n, width); return p; };
    h = take(d.low_resolution ? d.C * pixels : d.C * plane.size);
    z = take(d.K * plane.size);
    a = take(d.K * plane.size);
    g = take(3 * plane.size);
    image = take(d.W + width);
    taps = take(d.low_resolution ? 9 * d.K * pixels : d.resize ? d.C * pixels : 0);
    expanded = take(d.low_resolution ? d.K * 3 * d.h * row : 0);
    h_rows = take(d.low_resolution ? d.h * d.w * features_pitch : d.C * plane.size);
    line = take(d.w + 3 * round_up(d.H, width));
    const int64_t spread = d.winograd ? POINTS * strips.size : 0;
    spread_h = take(d.C * spread);
    spread_z = take(d.K * spread);
    products = take((d.K > d.C ? d.K : d.C) * spread);
    pixel_rows = take(d.winograd ? (strips.span + 2) * features_pitch : 0);
    end = memory;
    for (int t = 0; t < 9; t++) offset[t] = plane.tap(t);
  }

  INLINE TapsAndRows<T> rows() const { return {taps, expanded, pixels, row}; }
};

template <class T> int64_t decoder_scratch(const Decoder<T>& d) {
  Scratch<T> s(d, nullptr);
  return s.end - (T*)nullptr;
}

template <class T> int64_t decoder_w1_partial(const Decoder<T>& d) {
  if (d.low_resolution) return 9 * d.K * round_up(d.C, Simd<T>::width);
  return d.winograd ? 3 * POINTS * d.K * round_up(d.C, Simd<T>::width) : 9 * d.K * d.C * Simd<T>::width;
}

template <class T> int64_t decoder_w2_partial(const Decoder<T>& d) { return 27 * d.K * Simd<T>::width; }

template <class T>
void decoder_pack(const Decoder<T>& d, const T* w1, const T* w2, T* w1_packed, T* w1_backward, T* w2_packed,
                  T* w2_backward) {
  const int64_t C = d.C, K = d.K;
  auto first = [&](int64_t k, int64_t c, int64_t tap) { return w1[(k * C + c) * 9 + tap]; };
  if (d.low_resolution) {  // maps tap * K + k
    pack_taps(9 * K, C, 1, w1_packed, [&](int64_t m, int64_t c, int) { return first(m % K, c, m / K); });
    pack_taps(C, 9 * K, 1, w1_backward, [&](int64_t c, int64_t m, int) { return first(m % K, c, m / K); });
  } else if (d.winograd) {
    pack_winograd(K, C, w1_packed, first);
    pack_winograd(C, K, w1_backward, [&](int64_t c, int64_t k, int tap) { return first(k, c, 8 - tap); });
  } else {
    pack_taps(K, C, 9, w1_packed, first);
    pack_taps(C, K, 9, w1_backward, [&](int64_t c, int64_t k, int tap) { return first(k, c, 8 - tap); });
  }
  pack_taps(3, K, 9, w2_packed, [&](int64_t o, int64_t k, int tap) { return w2[(o * K + k) * 9 + tap]; });
  pack_taps(K, 3, 9, w2_backward,
            [&](int64_t k, int64_t o, int tap) { return w2[(o * K + k) * 9 + 8 - tap]; });
}

// ---- resize, then convolve ----

template <class T> INLINE void resize(const Decoder<T>& d, const Scratch<T>& s, const T* from, T* to) {
  for (int64_t Y = 0; Y < d.H; Y++, to += s.plane.pitch) {
    const T *low = from + d.rows.low[Y] * d.w, *high = from + d.rows.high[Y] * d.w;
    T a = T(d.rows.low_weight[Y]), b = T(d.rows.high_weight[Y]);
    for (int64_t j = 0; j < d.w; j++) s.line[j] = a * low[j] + b * high[j];
    for (int64_t X = 0; X < d.W; X++)
      to[X] = T(d.columns.low_weight[X]) * s.line[d.columns.low[X]] +
              T(d.columns.high_weight[X]) * s.line[d.columns.high[X]];
  }
}

template <class T>
INLINE void resize_backward(const Decoder<T>& d, const Scratch<T>& s, const T* from, T* to) {
  for (int64_t p = 0; p < d.h * d.w; p++) to[p] = 0;
  for (int64_t Y = 0; Y < d.H; Y++, from += s.plane.pitch) {
    for (int64_t j = 0; j < d.w; j++) s.line[j] = 0;
    for (int64_t X = 0; X < d.W; X++) {
      s.line[d.columns.low[X]] += T(d.columns.low_weight[X]) * from[X];
      s.line[d.columns.high[X]] += T(d.columns.high_weight[X]) * from[X];
    }
    T *low = to + d.rows.low[Y] * d.w, *high = to + d.rows.high[Y] * d.w;
    T a = T(d.rows.low_weight[Y]), b = T(d.rows.high_weight[Y]);
    for (int64_t j = 0; j < d.w; j++) low[j] += a * s.line[j];
    for (int64_t j = 0; j < d.w; j++) high[j] += b * s.line[j];
  }
}

// ---- the layers ----

// z from E, and E from the gradient in z.
template <class T> INLINE void expand_rows(const Decoder<T>& d, const Scratch<T>& s) {
  for (int64_t Y = 0; Y < d.H; Y++) {
    const RowMix<3, T> mix(d.rows, Y, 0, d.h, s.row);
    for (int64_t k = 0; k < d.K; k++) {
      const T* from = s.expanded + k * 3 * d.h * s.row;
      T* to = s.z + k * s.plane.size + s.plane.origin + Y * s.plane.pitch;
      for (int64_t X = 0; X < d.W; X += Simd<T>::width) store<T>(to + X, mix(from + X, d.b1[k]));
    }
  }
}

template <class T> INLINE void gather_rows(const Decoder<T>& d, const Scratch<T>& s) {
  RowTakers<T> takers(d.rows, s.line);
  for (int64_t i = 0; i < d.h; i++) {
    takers.move_to(d.rows, i);
    for (int64_t dy = 0; dy < 3; dy++) {
      takers.find(d.rows, i, dy - 1, [&](int64_t Y) { return s.plane.origin + Y * s.plane.pitch; });
      for (int64_t k = 0; k < d.K; k++)
        takers.gather(s.z + k * s.plane.size, d.W, s.expanded + ((k * 3 + dy) * d.h + i) * s.row);
    }
  }
}

// z = conv1(resize(h)) + b1 on its planes. The borders are not set.
template <class T> INLINE void first_convolution(const Decoder<T>& d, const Scratch<T>& s, int64_t n) {
  const Plane<T>& p = s.plane;
  const int64_t zero = 0;
  if (d.low_resolution) {
    read_maps<T>(d.features, n, d.C, d.h, d.w, s.h, s.pixels, d.w);
    convolve<1>(9 * d.K, d.w1, s.h, s.pixels, d.C, &zero, (const T*)nullptr, s.taps, s.pixels, d.h * d.w,
                sample_ahead(d.features, n + 1, d.N, d.C * d.h * d.w, convolve_tiles<T>(9 * d.K, d.h * d.w)));
    expand_columns(d, s.rows());
    expand_rows(d, s);
    return;
  }
  if (d.resize) {
    read_maps<T>(d.features, n, d.C, d.h, d.w, s.taps, s.pixels, d.w);
    for (int64_t c = 0; c < d.C; c++) resize(d, s, s.taps + c * s.pixels, s.h + c * p.size + p.origin);
  } else {
    read_maps<T>(d.features, n, d.C, d.H, d.W, s.h + p.origin, p.size, p.pitch);
  }
  for (int64_t c = 0; c < d.C; c++) p.set_border(s.h + c * p.size, T(0));
  const int64_t span = d.winograd ? s.strips.span : p.span;
  Ahead ahead = sample_ahead(d.features, n + 1, d.N, d.C * d.h * d.w, convolve_tiles<T>(d.K, span));
  if (d.winograd) {
    for (int64_t c = 0; c < d.C; c++)
      spread(p, s.strips, s.h + c * p.size, s.spread_h + c * POINTS * s.strips.size);
    convolve_winograd(p, s.strips, d.K, d.w1, s.spread_h, d.C, d.b1, s.products, s.z, ahead);
    return;
  }
  convolve<9>(d.K, d.w1, s.h + p.origin, p.size, d.C, s.offset, d.b1, s.z + p.origin, p.size, p.span, ahead);
}

// a = relu((z - center) scale + shift), zero outside the map.
template <class T> INLINE void normalize_rectify(const Decoder<T>& d, const Scratch<T>& s) {
  const Plane<T>& p = s.plane;
  for (int64_t k = 0; k < d.K; k++) {
    const T* z = s.z + k * p.size + p.origin;
    T *a = s.a + k * p.size + p.origin, center = d.center[k], scale = d.scale[k], shift = d.shift[k];
    vec<T> zero = {};
    for (int64_t i = 0; i < p.span; i += Simd<T>::width) {
      vec<T> y = (load<T>(z + i) - center) * scale + shift;
      store<T>(a + i, y < zero ? zero : y);  // nan stays nan
    }
    p.set_border(s.a + k * p.size, T(0));
  }
}

// g, which holds the logits, becomes the gradient of the loss in them, zero outside the map. Return the
// sample's loss.
template <class T>
INLINE double pixel_loss(const Decoder<T>& d, const Scratch<T>& s, int64_t n, bool needs_loss) {
  const Plane<T>& p = s.plane;
  double total = 0;
  for (int64_t o = 0; o < 3; o++) {
    T* plane = s.g + o * p.size;
    for (int64_t y = 0; y < d.H; y++)
      total += pixel_row(d, n, o, y, d.W, needs_loss, s.image, plane + p.origin + y * p.pitch);
    p.set_border(plane, T(0));
  }
  return total;
}

template <class T> INLINE void logits(const Decoder<T>& d, const Scratch<T>& s, int64_t n) {
  const Plane<T>& p = s.plane;
  convolve<9>(3, d.w2, s.a + p.origin, p.size, d.K, s.offset, d.b2, s.g + p.origin, p.size, p.span,
              sample_ahead(d.image, n, d.N, 3 * d.H * d.W, convolve_tiles<T>(3, p.span)));
}

// Overwrite a, which is no longer needed, with the gradient in it.
template <class T> INLINE void second_convolution_backward(const Decoder<T>& d, const Scratch<T>& s) {
  const Plane<T>& p = s.plane;
  convolve<9>(d.K, d.w2_backward, s.g + p.origin, p.size, 3, s.offset, (const T*)nullptr, s.a + p.origin,
              p.size, p.span);
  for (int64_t k = 0; k < d.K; k++) p.set_border(s.a + k * p.size, T(0));
}

// partial += the sample's gradient of W1 from the gradient in z. The convolution runs at the image's size.
template <class T> INLINE void first_weight(const Decoder<T>& d, const Scratch<T>& s, T* partial) {
  const Plane<T>& p = s.plane;
  const Strips<T>& t = s.strips;
  if (!d.winograd)
    return weight_gradient<9>(s.z + p.origin, p.size, d.K, s.h + p.origin, p.size, d.C, s.offset, p.span,
                              partial);
  const int64_t step = POINTS * t.size;
  for (int64_t k = 0; k < d.K; k++) spread_gradient(p, t, s.z + k * p.size, s.spread_z + k * step);
  for (int f = 0; f < POINTS; f++) {
    pixel_rows(t, s.spread_h + f * t.size, d.C, s.pixel_rows, s.features_pitch);
    weight_rows(t, s.spread_z + f * t.size + t.origin, step, d.K, s.pixel_rows + s.features_pitch,
                s.features_pitch, partial + f * 3 * d.K * s.features_pitch);
  }
}

// du = the gradient in the resized features, from the gradient in z. The convolution runs at the image's
// size.
template <class T> INLINE void first_convolution_backward(const Decoder<T>& d, const Scratch<T>& s, T* du) {
  const Plane<T>& p = s.plane;
  if (d.winograd) {
    for (int64_t k = 0; k < d.K; k++)
      spread(p, s.strips, s.z + k * p.size, s.spread_z + k * POINTS * s.strips.size);
    return convolve_winograd(p, s.strips, d.C, d.w1_backward, s.spread_z, d.K, (const T*)nullptr, s.products,
                             du);
  }
  convolve<9>(d.C, d.w1_backward, s.z + p.origin, p.size, d.K, s.offset, (const T*)nullptr, du + p.origin,
              p.size, p.span);
}

// ---- the sweeps ----

// mean[k], squares[k]: the mean of the sample's z, and the sum of squared deviations from it.
template <class T>
void decoder_statistics(const Decoder<T>& d, int64_t n, T* scratch, double* mean, double* squares) {
  Scratch<T> s(d, scratch);
  const Plane<T>& p = s.plane;
  first_convolution(d, s, n);
  for (int64_t k = 0; k < d.K; k++) {
    T* plane = s.z + k * p.size;
    channel_statistics(
        plane + p.origin, p.span, d.H * d.W, [&](T value) { p.set_border(plane, value); }, mean[k],
        squares[k]);
  }
}

template <class T>
void decoder_loss(const Decoder<T>& d, int64_t n, bool needs_grad, T* scratch, SampleSums& sums,
                  T* w2_partial) {
  Scratch<T> s(d, scratch);
  const Plane<T>& p = s.plane;
  first_convolution(d, s, n);
  normalize_rectify(d, s);
  logits(d, s, n);
  sums.loss = pixel_loss(d, s, n, true);
  if (!needs_grad) return;
  weight_gradient<9>(s.g + p.origin, p.size, 3, s.a + p.origin, p.size, d.K, s.offset, p.span, w2_partial);
  for (int o = 0; o < 3; o++) {
    vec<T> sum = {};
    for (int64_t i = 0; i < p.span; i += Simd<T>::width) sum += load<T>(s.g + o * p.size + p.origin + i);
    sums.d_b2[o] = double(infopro::INFOPRO_ISA::sum<T>(sum));
  }
  second_convolution_backward(d, s);
  for (int64_t k = 0; k < d.K; k++) {
    const T *z = s.z + k * p.size + p.origin, *dy = s.a + k * p.size + p.origin;
    T center = d.center[k], scale = d.scale[k], shift = d.shift[k], inverse_std = d.inverse_std[k];
    vec<T> sum = {}, product = {}, zero = {};
    p.set_border(s.z + k * p.size, center);
    for (int64_t i = 0; i < p.span; i += Simd<T>::width) {
      vec<T> deviation = load<T>(z + i) - center, y = deviation * scale + shift;
      vec<T> g = y > zero ? load<T>(dy + i) : zero;
      sum += g;
      product += g * (deviation * inverse_std);
    }
    sums.d_beta[k] = double(infopro::INFOPRO_ISA::sum<T>(sum));
    sums.d_gamma[k] = double(infopro::INFOPRO_ISA::sum<T>(product));
  }
}

// Overwrite z with its gradient, scale (dy - mean_dy - xhat mean_dy_xhat), zero outside the map. In eval mode
// the means are zero.
template <class T>
INLINE void norm_backward(const Decoder<T>& d, const Scratch<T>& s, const T* mean_dy, const T* mean_dy_xhat) {
  const Plane<T>& p = s.plane;
  for (int64_t k = 0; k < d.K; k++) {
    T* z = s.z + k * p.size + p.origin;
    const T* dy = s.a + k * p.size + p.origin;
    T center = d.center[k], scale = d.scale[k], shift = d.shift[k],
      slope = d.inverse_std[k] * mean_dy_xhat[k], mean = mean_dy[k];
    vec<T> zero = {};
    for (int64_t i = 0; i < p.span; i += Simd<T>::width) {
      vec<T> deviation = load<T>(z + i) - center, y = deviation * scale + shift;
      vec<T> g = y > zero ? load<T>(dy + i) : zero;
      store<T>(z + i, (g - mean - deviation * slope) * scale);
    }
    p.set_border(s.z + k * p.size, T(0));
  }
}

// partial (9 K, features_pitch) += gradient of the taps times the features, for V vectors of channels at a
// time, from c on. Return the first channel left.
template <int V, class T>
INLINE int64_t weight_columns(const Decoder<T>& d, const Scratch<T>& s, int64_t c, T* partial) {
  for (; c + V * Simd<T>::width <= s.features_pitch; c += V * Simd<T>::width)
    row_product<V, true>(9 * d.K, s.taps, s.pixels, s.h_rows + c, s.features_pitch, 0, d.h * d.w, partial + c,
                         s.features_pitch);
  return c;
}

template <class T>
INLINE void first_weight_low_resolution(const Decoder<T>& d, const Scratch<T>& s, T* partial) {
  transpose(s.h, s.pixels, d.C, d.h * d.w, s.h_rows, s.features_pitch);
  int64_t c = INFOPRO_MR == 12 ? weight_columns<4>(d, s, 0, partial) : 0;
  c = weight_columns<2>(d, s, c, partial);
  weight_columns<1>(d, s, c, partial);
}

template <class T>
void decoder_backward(const Decoder<T>& d, int64_t n, const T* mean_dy, const T* mean_dy_xhat,
                      const Maps* d_features, T* w1_partial, T* scratch) {
  Scratch<T> s(d, scratch);
  const Plane<T>& p = s.plane;
  const int64_t zero = 0;
  first_convolution(d, s, n);
  normalize_rectify(d, s);
  logits(d, s, n);
  pixel_loss(d, s, n, false);
  second_convolution_backward(d, s);
  norm_backward(d, s, mean_dy, mean_dy_xhat);
  if (d.low_resolution) {
    gather_rows(d, s);
    gather_columns(d, s.rows());
    if (w1_partial) first_weight_low_resolution(d, s, w1_partial);
    if (!d_features) return;
    convolve<1>(d.C, d.w1_backward, s.taps, s.pixels, 9 * d.K, &zero, (const T*)nullptr, s.h, s.pixels,
                d.h * d.w);
    write_maps<T>(*d_features, n, d.C, d.h, d.w, s.h, s.pixels, d.w);
    return;
  }
  if (w1_partial) first_weight(d, s, w1_partial);
  if (!d_features) return;
  T* du = s.h_rows;
  first_convolution_backward(d, s, du);
  if (!d.resize) return write_maps<T>(*d_features, n, d.C, d.H, d.W, du + p.origin, p.size, p.pitch);
  for (int64_t c = 0; c < d.C; c++) resize_backward(d, s, du + c * p.size + p.origin, s.taps + c * s.pixels);
  write_maps<T>(*d_features, n, d.C, d.h, d.w, s.taps, s.pixels, d.w);
}

template <class T> void decoder_w1_reduce(const Decoder<T>& d, const T* partial, T* d_w1) {
  constexpr int width = Simd<T>::width;
  const int64_t pitch = round_up(d.C, width);
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t c = 0; c < d.C; c++)
      for (int64_t tap = 0; tap < 9; tap++) {
        T* to = d_w1 + (k * d.C + c) * 9 + tap;
        if (d.winograd) {
          double sum = 0;
          for (int f = 0; f < POINTS; f++)
            sum += TAP_TRANSFORM[f][tap / 3] * double(partial[((f * 3 + tap % 3) * d.K + k) * pitch + c]);
          *to += T(sum);
        } else {
          *to += d.low_resolution ? partial[(tap * d.K + k) * pitch + c]
                                  : sum<T>(load<T>(partial + ((k * d.C + c) * 9 + tap) * width));
        }
      }
}

template <class T> void decoder_w2_reduce(const Decoder<T>& d, const T* partial, T* d_w2) {
  for (int64_t i = 0; i < 27 * d.K; i++) d_w2[i] += sum<T>(load<T>(partial + i * Simd<T>::width));
}

}  // namespace infopro::INFOPRO_ISA
