// Small convolutions on flat maps: the arithmetic of the decoder kernels.
//
// A plane holds a map (H, W) in rows of W + 1, so that one column of zeros is the right border of a row and
// the left border of the next. A row of zeros lies above and below. Element (y, x) is at origin + y (W + 1) +
// x; the origin is on a vector boundary. A 3x3 tap is then a constant offset, and a convolution runs over the
// plane as one array.
#pragma once

#include "simd.h"

namespace infopro::INFOPRO_ISA {

constexpr int ACCUMULATORS = INFOPRO_MR * 2;  // vector registers left for sums
constexpr int MAX_VECTORS = 8;

INLINE int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Memory that will be read soon, prefetched in small steps during other work: the hardware prefetcher does
// not see where the next sample begins.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  int64_t step = 0;  // bytes

  Ahead() {}
  // Prefetch all of it in `times` steps.
  Ahead(const void* from, int64_t bytes, int64_t times)
      : next((const char*)from), end((const char*)from + bytes),
        step(round_up(bytes / (times > 0 ? times : 1) + 1, 64)) {}

  INLINE void some() {
    const char* stop = end - next < step ? end : next + step;
    for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <class T> struct Plane {
  int64_t H, W, pitch, origin, span, size;

  Plane(int64_t H, int64_t W)
      : H(H), W(W), pitch(W + 1), origin(round_up(W + 2, Simd<T>::width)), span(H * (W + 1)),
        size(round_up(origin + span + W + 2, Simd<T>::width) + MAX_VECTORS * Simd<T>::width) {}

  INLINE int64_t tap(int t) const { return (t / 3 - 1) * pitch + (t % 3 - 1); }

  // Set what is not the map, from its first element on: the column between rows, and a border behind the last
  // row.
  INLINE void set_border(T* plane, T value) const {
    for (int64_t y = 0; y < H; y++) plane[origin + y * pitch + W] = value;
    int64_t tail = pitch + 1 < Simd<T>::width ? int64_t(Simd<T>::width) : pitch + 1;
    for (int64_t i = 0; i < tail; i++) plane[origin + span + i] = value;
  }
};

// Channels that are computed together: the largest block that divides `channels` and keeps the registers
// busy.
INLINE int block_of(int64_t channels) {
  constexpr int widest = INFOPRO_MR;  // 12 or 6
  if (channels % widest == 0) return widest;
  if (widest == 12 && channels % 8 == 0) return 8;
  if (channels >= widest) return widest;
  return channels >= 6 ? 6 : channels >= 4 ? 4 : channels >= 3 ? 3 : 1;
}

// packed: for each block of outputs [input][tap][block], from weight(output, input, tap).
template <class T, class F>
INLINE void pack_taps(int64_t outputs, int64_t inputs, int taps, T* packed, F weight) {
  for (int64_t o = 0; o < outputs;) {
    int block = block_of(outputs - o);
    for (int64_t i = 0; i < inputs; i++)
      for (int t = 0; t < taps; t++)
        for (int b = 0; b < block; b++) *packed++ = weight(o + b, i, t);
    o += block;
  }
}

// out[b][p] = bias[b] + sum over inputs and taps of packed[input][tap][b] in[input][p + offset[tap]], p in V
// vectors
template <int B, int V, int TAPS, class T>
INLINE void tap_tile(const T* packed, const T* in, int64_t in_plane, int64_t inputs, const int64_t* offset,
                     const T* bias, T* out, int64_t out_plane) {
  vec<T> acc[B][V];
  UNROLL(12) for (int b = 0; b < B; b++)
    UNROLL(8) for (int v = 0; v < V; v++) acc[b][v] = splat<T>(bias ? bias[b] : T(0));
  for (int64_t i = 0; i < inputs; i++, in += in_plane)
    for (int t = 0; t < TAPS; t++, packed += B) {
      const T* from = in + offset[t];
      vec<T> x[V];
      UNROLL(8) for (int v = 0; v < V; v++) {
        x[v] = load<T>(from + v * Simd<T>::width);
        hold(x[v]);
      }
      UNROLL(12) for (int b = 0; b < B; b++) {
        vec<T> w = splat<T>(packed[b]);
        UNROLL(8) for (int v = 0; v < V; v++) acc[b][v] += w * x[v];
      }
    }
  UNROLL(12) for (int b = 0; b < B; b++)
    UNROLL(8) for (int v = 0; v < V; v++) store<T>(out + b * out_plane + v * Simd<T>::width, acc[b][v]);
}

template <int B, int TAPS, class T>
void tap_block(const T* packed, const T* in, int64_t in_plane, int64_t inputs, const int64_t* offset,
               const T* bias, T* out, int64_t out_plane, int64_t span, Ahead& ahead) {
  constexpr int V = ACCUMULATORS / B < MAX_VECTORS ? ACCUMULATORS / B : MAX_VECTORS;
  constexpr int width = Simd<T>::width;
  int64_t p = 0;
  for (; p + (V - 1) * width < span; p += V * width) {
    ahead.some();
    tap_tile<B, V, TAPS>(packed, in + p, in_plane, inputs, offset, bias, out + p, out_plane);
  }
  for (; p < span; p += width)
    tap_tile<B, 1, TAPS>(packed, in + p, in_plane, inputs, offset, bias, out + p, out_plane);
}

// How often `convolve` prefetches.
template <class T> INLINE int64_t convolve_tiles(int64_t outputs, int64_t span) {
  return outputs * span / (ACCUMULATORS * Simd<T>::width);
}

// All outputs at positions 0..span. `in` and `out` point at the origins of planes.
template <int TAPS, class T>
void convolve(int64_t outputs, const T* packed, const T* in, int64_t in_plane, int64_t inputs,
              const int64_t* offset, const T* bias, T* out, int64_t out_plane, int64_t span,
              Ahead ahead = {}) {
  while (outputs > 0) {
    int block = block_of(outputs);
    switch (block) {
#if INFOPRO_MR == 12
      case 12:
        tap_block<12, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
        break;
      case 8:
        tap_block<8, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
        break;
#endif
      case 6:
        tap_block<6, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
        break;
      case 4:
        tap_block<4, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
        break;
      case 3:
        tap_block<3, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
        break;
      default: tap_block<1, TAPS>(packed, in, in_plane, inputs, offset, bias, out, out_plane, span, ahead);
    }
    outputs -= block;
    packed += inputs * TAPS * block;
    out += block * out_plane;
    if (bias) bias += block;
  }
}

// lanes[output][input][tap][width] += products of g[output] and in[input] shifted by the tap, position p in
// lane p mod width. g must be zero outside the map.
template <int G, int TAPS, class T>
INLINE void weight_gradient_block(const T* g, int64_t g_plane, const T* in, const int64_t* offset,
                                  int64_t span, T* lanes, int64_t lane_step) {
  vec<T> acc[G][TAPS];
  UNROLL(3) for (int o = 0; o < G; o++)
    UNROLL(9) for (int t = 0; t < TAPS; t++) acc[o][t] = vec<T>{};
  for (int64_t p = 0; p < span; p += Simd<T>::width) {
    vec<T> gv[G];
    UNROLL(3) for (int o = 0; o < G; o++) {
      gv[o] = load<T>(g + o * g_plane + p);
      hold(gv[o]);
    }
    UNROLL(9) for (int t = 0; t < TAPS; t++) {
      vec<T> x = load<T>(in + p + offset[t]);
      hold(x);
      UNROLL(3) for (int o = 0; o < G; o++) acc[o][t] += gv[o] * x;
    }
  }
  UNROLL(3) for (int o = 0; o < G; o++)
    UNROLL(9) for (int t = 0; t < TAPS; t++) {
      T* to = lanes + o * lane_step + t * Simd<T>::width;
      store<T>(to, load<T>(to) + acc[o][t]);  // adding a sample's own sum at the end rounds less
    }
}

template <int TAPS, class T>
void weight_gradient(const T* g, int64_t g_plane, int64_t outputs, const T* in, int64_t in_plane,
                     int64_t inputs, const int64_t* offset, int64_t span, T* lanes) {
  constexpr int G = INFOPRO_MR == 12 ? 3 : 1;  // 27 accumulators, or 9 where there are 16 registers
  const int64_t step = inputs * TAPS * Simd<T>::width;
  int64_t o = 0;
  for (; o + G <= outputs; o += G)
    for (int64_t i = 0; i < inputs; i++)
      weight_gradient_block<G, TAPS>(g + o * g_plane, g_plane, in + i * in_plane, offset, span,
                                     lanes + o * step + i * TAPS * Simd<T>::width, step);
  for (; o < outputs; o++)
    for (int64_t i = 0; i < inputs; i++)
      weight_gradient_block<1, TAPS>(g + o * g_plane, g_plane, in + i * in_plane, offset, span,
                                     lanes + o * step + i * TAPS * Simd<T>::width, step);
}

// c[r][0..V vectors) (+)= sum over q in [from, to) of a[r * a_row + q] b[q * b_row ...]: a is broadcast, b in
// vectors.
template <int R, int V, bool ADD, class T>
INLINE void row_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t from, int64_t to, T* c,
                     int64_t c_row) {
  vec<T> acc[R][V];
  UNROLL(8) for (int r = 0; r < R; r++)
    UNROLL(4) for (int v = 0; v < V; v++) acc[r][v] = vec<T>{};
  for (int64_t q = from; q < to; q++) {
    vec<T> x[V];
    UNROLL(4) for (int v = 0; v < V; v++) {
      x[v] = load<T>(b + q * b_row + v * Simd<T>::width);
      hold(x[v]);
    }
    UNROLL(8) for (int r = 0; r < R; r++) {
      vec<T> s = splat<T>(a[r * a_row + q]);
      UNROLL(4) for (int v = 0; v < V; v++) acc[r][v] += s * x[v];
    }
  }
  UNROLL(8) for (int r = 0; r < R; r++)
    UNROLL(4) for (int v = 0; v < V; v++) {
      T* to = c + r * c_row + v * Simd<T>::width;
      store<T>(to, ADD ? load<T>(to) + acc[r][v] : acc[r][v]);
    }
}

template <int V, bool ADD, class T>
void row_product(int64_t rows, const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t from, int64_t to,
                 T* c, int64_t c_row) {
  constexpr int R = ACCUMULATORS / V < 8 ? ACCUMULATORS / V : 8;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    row_tile<R, V, ADD>(a + r * a_row, a_row, b, b_row, from, to, c + r * c_row, c_row);
  for (; r < rows; r++) row_tile<1, V, ADD>(a + r * a_row, a_row, b, b_row, from, to, c + r * c_row, c_row);
}

}  // namespace infopro::INFOPRO_ISA
