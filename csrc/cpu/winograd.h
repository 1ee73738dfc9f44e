// 3x3 convolutions with half the multiplications: Winograd's F(4, 3) down the columns (Lavin and Gray, 2016),
// plain taps along the rows.
//
// Four rows of outputs are a strip. With the points 0, 1, -1, 2, -2 and infinity
//     out (4 rows) = A^T sum over inputs and dx of [(G w[dy = 0..2][dx]) * (B^T in (6 rows))(x + dx - 1)]
// so each of the 6 transformed rows of a strip is convolved along x alone. That takes 18 multiplications for
// 4 outputs of 9 taps in place of 36, at 2.4 times the rounding of the direct sum (measured, 48 inputs:
// 3.2e-7 against 1.3e-7). The gradient of the weights is the transpose:
//     dw[dy][dx] = G^T sum over strips of [(A dout (4 rows)) * (B^T in)(x + dx - 1)]
//
// A transformed map is 6 planes for each channel. The strips of a plane follow each other like the rows of a
// Plane: W columns and one of zeros.
#pragma once

#include "taps.h"

namespace infopro::INFOPRO_ISA {

constexpr int ROWS = 4, POINTS = 6;  // outputs of a strip; products of a transformed column of taps

// G, by rows.
constexpr double TAP_TRANSFORM[POINTS][3] = {
    {1.0 / 4, 0, 0}, {-1.0 / 6, -1.0 / 6, -1.0 / 6}, {-1.0 / 6, 1.0 / 6, -1.0 / 6},
    {1.0 / 24, 1.0 / 12, 1.0 / 6}, {1.0 / 24, -1.0 / 12, 1.0 / 6}, {0, 0, 1}};

template <class T> struct Strips {
  int64_t number, W, pitch, origin, span, size;  // size of one of the 6 planes of a channel

  explicit Strips(const Plane<T>& p)
      : number(p.H / ROWS), W(p.W), pitch(p.pitch), origin(Simd<T>::width), span(number * pitch),
        size(round_up(origin + span + Simd<T>::width, Simd<T>::width)) {}

  INLINE void set_border(T* plane) const {
    for (int64_t i = 0; i < number; i++) plane[origin + i * pitch + W] = T(0);
    store<T>(plane + origin + span, vec<T>{});
  }
};

// to (6 planes of strips) = B^T of a plane whose borders are zero.
template <class T> INLINE void spread(const Plane<T>& p, const Strips<T>& s, const T* plane, T* to) {
  for (int64_t i = 0; i < s.number; i++) {
    const T* from = plane + p.origin + (i * ROWS - 1) * p.pitch;
    T* out = to + s.origin + i * s.pitch;
    // What the last vector writes beyond the strip is written again, or set to 0 as its border.
    for (int64_t x = 0; x < s.W; x += Simd<T>::width) {
      vec<T> d[POINTS];
      UNROLL(6) for (int j = 0; j < POINTS; j++) d[j] = load<T>(from + j * p.pitch + x);
      vec<T> even = d[4] - T(4) * d[2], odd = d[3] - T(4) * d[1], far_even = d[4] - d[2],
             far_odd = T(2) * (d[3] - d[1]);
      store<T>(out + x, T(4) * d[0] - T(5) * d[2] + d[4]);
      store<T>(out + s.size + x, even + odd);
      store<T>(out + 2 * s.size + x, even - odd);
      store<T>(out + 3 * s.size + x, far_even + far_odd);
      store<T>(out + 4 * s.size + x, far_even - far_odd);
      store<T>(out + 5 * s.size + x, T(4) * d[1] - T(5) * d[3] + d[5]);
    }
  }
  for (int f = 0; f < POINTS; f++) s.set_border(to + f * s.size);
}

// to (6 planes of strips) = A of a plane, the gradient of the outputs.
template <class T> INLINE void spread_gradient(const Plane<T>& p, const Strips<T>& s, const T* plane, T* to) {
  for (int64_t i = 0; i < s.number; i++) {
    const T* from = plane + p.origin + i * ROWS * p.pitch;
    T* out = to + s.origin + i * s.pitch;
    for (int64_t x = 0; x < s.W; x += Simd<T>::width) {
      vec<T> g[ROWS];
      UNROLL(4) for (int j = 0; j < ROWS; j++) g[j] = load<T>(from + j * p.pitch + x);
      vec<T> even = g[0] + g[2], odd = g[1] + g[3], far_even = g[0] + T(4) * g[2],
             far_odd = T(2) * g[1] + T(8) * g[3];
      store<T>(out + x, g[0]);
      store<T>(out + s.size + x, even + odd);
      store<T>(out + 2 * s.size + x, even - odd);
      store<T>(out + 3 * s.size + x, far_even + far_odd);
      store<T>(out + 4 * s.size + x, far_even - far_odd);
      store<T>(out + 5 * s.size + x, g[3]);
    }
  }
  for (int f = 0; f < POINTS; f++) s.set_border(to + f * s.size);
}

// plane = bias + A^T of 6 planes of strips. The borders are not set.
template <class T>
INLINE void collect(const Plane<T>& p, const Strips<T>& s, const T* from, T bias, T* plane) {
  for (int64_t i = 0; i < s.number; i++) {
    const T* in = from + s.origin + i * s.pitch;
    T* out = plane + p.origin + i * ROWS * p.pitch;
    // From the last vector to the first: what a row's last vector writes over the next row is written again.
    for (int64_t x = round_up(s.W, Simd<T>::width) - Simd<T>::width; x >= 0; x -= Simd<T>::width) {
      vec<T> m[POINTS];
      UNROLL(6) for (int f = 0; f < POINTS; f++) m[f] = load<T>(in + f * s.size + x);
      vec<T> even = m[1] + m[2], odd = m[1] - m[2], far_even = m[3] + m[4], far_odd = m[3] - m[4];
      store<T>(out + x, m[0] + even + far_even + bias);
      store<T>(out + p.pitch + x, odd + T(2) * far_odd + bias);
      store<T>(out + 2 * p.pitch + x, even + T(4) * far_even + bias);
      store<T>(out + 3 * p.pitch + x, odd + T(8) * far_odd + m[5] + bias);
    }
  }
}

// packed: the taps for convolve<3> of each point, from weight(output, input, tap of 9).
template <class T, class F> INLINE void pack_winograd(int64_t outputs, int64_t inputs, T* packed, F weight) {
  for (int f = 0; f < POINTS; f++, packed += 3 * outputs * inputs)
    pack_taps(outputs, inputs, 3, packed, [&](int64_t o, int64_t i, int dx) {
      double sum = 0;
      for (int dy = 0; dy < 3; dy++) sum += TAP_TRANSFORM[f][dy] * double(weight(o, i, dy * 3 + dx));
      return T(sum);
    });
}

// out = planes of the convolution of transformed inputs. products: 6 planes of strips for each output.
template <class T>
INLINE void convolve_winograd(const Plane<T>& p, const Strips<T>& s, int64_t outputs, const T* packed,
                              const T* in, int64_t inputs, const T* bias, T* products, T* out,
                              Ahead ahead = {}) {
  const int64_t along[3] = {-1, 0, 1};
  for (int f = 0; f < POINTS; f++)
    convolve<3>(outputs, packed + f * 3 * outputs * inputs, in + f * s.size + s.origin, POINTS * s.size,
                inputs, along, (const T*)nullptr, products + f * s.size + s.origin, POINTS * s.size, s.span,
                f == 0 ? ahead : Ahead{});
  for (int64_t o = 0; o < outputs; o++)
    collect(p, s, products + o * POINTS * s.size, bias ? bias[o] : T(0), out + o * p.size);
}

// to (span + 2, pitch) = one point's numbers, pixel by pixel with the channels together. The first and last
// row are zero.
template <class T>
INLINE void pixel_rows(const Strips<T>& s, const T* in, int64_t channels, T* to, int64_t pitch) {
  for (int64_t c = 0; c < pitch; c++) to[c] = to[(s.span + 1) * pitch + c] = T(0);
  transpose(in + s.origin, POINTS * s.size, channels, s.span, to + pitch, pitch);
}

// sums[tap][r][lanes] += sum over q of g[r][q] rows[q + tap - 1], for a vector of channels; `rows` points at
// row 0.
template <int R, class T>
INLINE void row_taps_tile(const T* g, int64_t g_row, const T* rows, int64_t pitch, int64_t n, T* sums,
                          int64_t sums_row, int64_t sums_tap) {
  vec<T> acc[R][3];
  UNROLL(6) for (int r = 0; r < R; r++)
    UNROLL(3) for (int t = 0; t < 3; t++) acc[r][t] = vec<T>{};
  for (int64_t q = 0; q < n; q++, rows += pitch) {
    vec<T> x[3];
    UNROLL(3) for (int t = 0; t < 3; t++) {
      x[t] = load<T>(rows + (t - 1) * pitch);
      hold(x[t]);
    }
    UNROLL(6) for (int r = 0; r < R; r++) {
      vec<T> factor = splat<T>(g[r * g_row + q]);
      hold(factor);
      UNROLL(3) for (int t = 0; t < 3; t++) acc[r][t] += factor * x[t];
    }
  }
  UNROLL(6) for (int r = 0; r < R; r++)
    UNROLL(3) for (int t = 0; t < 3; t++) {
      T* to = sums + t * sums_tap + r * sums_row;
      store<T>(to, load<T>(to) + acc[r][t]);
    }
}

// sums [tap][g_rows][pitch] += products of transformed gradients g and the pixel rows of one point.
template <class T>
INLINE void weight_rows(const Strips<T>& s, const T* g, int64_t g_row, int64_t g_rows, const T* rows,
                        int64_t pitch, T* sums) {
  constexpr int R = INFOPRO_MR == 12 ? 6 : 3;  // 18 accumulators, or 9 where there are 16 registers
  constexpr int64_t block = 64;  // pixels: adding the sums of blocks rounds less than one long sum
  for (int64_t q = 0; q < s.span; q += block) {
    const int64_t n = s.span - q < block ? s.span - q : block;
    for (int64_t c = 0; c < pitch; c += Simd<T>::width) {
      int64_t r = 0;
      for (; r + R <= g_rows; r += R)
        row_taps_tile<R>(g + r * g_row + q, g_row, rows + q * pitch + c, pitch, n, sums + r * pitch + c,
                         pitch, g_rows * pitch);
      for (; r < g_rows; r++)
        row_taps_tile<1>(g + r * g_row + q, g_row, rows + q * pitch + c, pitch, n, sums + r * pitch + c,
                         pitch, g_rows * pitch);
    }
  }
}

}  // namespace infopro::INFOPRO_ISA
