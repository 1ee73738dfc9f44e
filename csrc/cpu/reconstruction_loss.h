// The decoder of reconstruction_loss, one sample at a time in a thread's scratch: no map of the batch is ever written.
//
// Sweeps over the batch: statistics of z (training only); loss, with the sums that the gradients of gamma, beta, W2 and b2
// and batch norm's backward need; backward, which recomputes z, a and the logits and finds the gradients of h and W1.
//
// z at low resolution. With u = resize(h) and z = conv3x3(u) + b,
//     T[tap][k] = sum_c W[k][c][tap] h[c]                          (9 K, h w)     1x1 convolutions
//     E[k][dy][i][X] = sum_dx columns(T[dy, dx][k][i])(X + dx - 1)   (K, 3, h, W)   zero outside the resized row
//     z[k][Y][X] = b[k] + sum_dy rows(E[k][dy])(Y + dy - 1)[X]                      zero outside the resized map
// which is exact, borders included; backward is the transpose of each line.
#pragma once

#include "batch_norm.h"
#include "convert.h"
#include "winograd.h"

namespace infopro {
namespace INFOPRO_ISA {

// Where the parts of a thread's scratch lie.
template <class T>
struct Scratch {
  Plane<T> plane;
  Strips<T> strips;
  int64_t pixels, row, features_pitch;  // of low resolution: a padded map, a padded row of W, a row of transposed features
  T *h, *z, *a, *g, *image, *taps, *expanded, *h_rows, *line;
  T *spread_h, *spread_z, *products, *pixel_rows;  // of Winograd's convolutions
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
};

template <class T>
int64_t decoder_scratch(const Decoder<T>& d) {
  Scratch<T> s(d, nullptr);
  return s.end - (T*)nullptr;
}

template <class T>
int64_t decoder_w1_partial(const Decoder<T>& d) {
  if (d.low_resolution) return 9 * d.K * round_up(d.C, Simd<T>::width);
  return d.winograd ? 3 * POINTS * d.K * round_up(d.C, Simd<T>::width) : 9 * d.K * d.C * Simd<T>::width;
}

template <class T>
int64_t decoder_w2_partial(const Decoder<T>& d) {
  return 27 * d.K * Simd<T>::width;
}

template <class T>
void decoder_pack(const Decoder<T>& d, const T* w1, const T* w2, T* w1_packed, T* w1_backward, T* w2_packed, T* w2_backward) {
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
  pack_taps(K, 3, 9, w2_backward, [&](int64_t k, int64_t o, int tap) { return w2[(o * K + k) * 9 + 8 - tap]; });
}

// ---- the resize along x, shifted by each dx, and its transpose ----
//
// Two forms of each, chosen when the tables are made. Banded: a matrix [dx][j][X], or [dx][X][j] for the transpose, whose rows are
// broadcast against, from the first to the last that is not all zero in a vector. Shuffled, where a vector holds what its outputs
// take: for each output vector, entries of (lanes to take, weights), 2 of one input vector, or as many as needed of two.

template <class T>
int64_t decoder_expand_size(const Decoder<T>& d) {
  constexpr int width = Simd<T>::width;
  const int64_t W = round_up(d.W, width), w = round_up(d.w, width);
  int64_t banded = 3 * d.w * W, shuffled = 3 * W * 4, banded_backward = 3 * d.W * w, shuffled_backward = 3 * w * 2 * d.W;
  int64_t forward = banded > shuffled ? banded : shuffled, backward = banded_backward > shuffled_backward ? banded_backward : shuffled_backward;
  return forward > backward ? forward : backward;
}

template <class T>
int64_t decoder_band_size(const Decoder<T>& d) {
  constexpr int width = Simd<T>::width;
  return 6 * round_up(d.W > d.w ? d.W : d.w, width) / width;
}

// band: for each vector of the matrix's rows, the first and one past the last row that is not all zero there.
template <class T>
INLINE void find_band(const T* matrix, int64_t rows, int64_t row, int32_t* band) {
  for (int64_t v = 0; v < row; v += Simd<T>::width, band += 2) {
    band[0] = band[1] = 0;
    for (int64_t r = 0; r < rows; r++)
      for (int lane = 0; lane < Simd<T>::width; lane++)
        if (matrix[r * row + v + lane] != T(0)) {
          if (band[1] == 0) band[0] = int32_t(r);
          band[1] = int32_t(r + 1);
        }
  }
}

// The banded matrices.
template <class T>
INLINE void make_matrices(const Decoder<T>& d, int dx, T* forward, T* backward) {
  constexpr int width = Simd<T>::width;
  const int64_t W = round_up(d.W, width), w = round_up(d.w, width);
  for (int64_t i = 0; i < d.w * W; i++) forward[i] = 0;
  for (int64_t i = 0; i < d.W * w; i++) backward[i] = 0;
  for (int64_t X = 0; X < d.W; X++) {
    int64_t from = X + dx - 1;
    if (from < 0 || from >= d.W) continue;
    int64_t j[2] = {d.columns.low[from], d.columns.high[from]};
    double weight[2] = {d.columns.low_weight[from], d.columns.high_weight[from]};
    for (int q = 0; q < 2; q++) {
      forward[j[q] * W + X] += T(weight[q]);
      backward[X * w + j[q]] += T(weight[q]);
    }
  }
}

template <class T>
INLINE void put_entry(T* entry, int lane, int64_t take, T weight) {
  label<T> index = label<T>(take);
  __builtin_memcpy(entry + lane, &index, sizeof index);
  entry[Simd<T>::width + lane] = weight;
}

// Entries of one dx from its banded matrix `matrix` (rows, row): for each vector, at most `most` rows that are not zero in a lane, the
// first of them `limit` or more rows behind base[0] in no lane. False where that does not fit. base: (base, entries) of each vector.
template <class T>
INLINE bool make_entries(const T* matrix, int64_t rows, int64_t row, int64_t most, int64_t limit, bool from_base, T* entries, int32_t* base) {
  constexpr int width = Simd<T>::width;
  for (int64_t v = 0; v < row; v += width, entries += most * 2 * width, base += 2) {
    const int32_t first = from_base ? base[0] : 0;
    int32_t used = 0;
    for (int64_t e = 0; e < most; e++)
      for (int lane = 0; lane < width; lane++) put_entry(entries + e * 2 * width, lane, 0, T(0));
    for (int lane = 0; lane < width; lane++) {
      int32_t n = 0;
      for (int64_t r = 0; r < rows; r++) {
        T weight = matrix[r * row + v + lane];
        if (weight == T(0)) continue;
        if (n == most || r - first >= limit) return false;
        put_entry(entries + n++ * 2 * width, lane, r - first, weight);
      }
      used = n > used ? n : used;
    }
    base[0] = first;
    base[1] = used;
  }
  return true;
}

// Fills the tables; returns 1 where the resize, plus 2 where its transpose, is in the shuffled form.
template <class T>
int decoder_expand(const Decoder<T>& d, T* expand, T* expand_backward, int32_t* band, int32_t* band_backward, T* memory) {
  constexpr int width = Simd<T>::width;
  constexpr bool shuffles = INFOPRO_BYTES > 16;  // SSE2 has no shuffle by variable lanes
  const int64_t W = round_up(d.W, width), w = round_up(d.w, width), half = decoder_expand_size(d) / 3;
  T *forward = memory, *backward = memory + 3 * half;
  bool forward_fits = shuffles, backward_fits = shuffles && d.W <= 2 * width;
  for (int dx = 0; dx < 3; dx++) {
    make_matrices(d, dx, forward + dx * half, backward + dx * half);
    find_band<T>(forward + dx * half, d.w, W, band + dx * 2 * (W / width));
    find_band<T>(backward + dx * half, d.W, w, band_backward + dx * 2 * (w / width));
  }
  for (int dx = 0; dx < 3 && forward_fits; dx++)
    forward_fits = make_entries<T>(forward + dx * half, d.w, W, 2, width, true, expand + dx * W * 4, band + dx * 2 * (W / width));
  const int64_t most = d.W / 2;  // more of them are no faster than the band
  for (int dx = 0; dx < 3 && backward_fits; dx++)
    backward_fits = make_entries<T>(backward + dx * half, d.W, w, most, 2 * width, false, expand_backward + dx * w * 2 * most,
                                    band_backward + dx * 2 * (w / width));
  for (int dx = 0; dx < 3; dx++) {
    if (!forward_fits) {
      __builtin_memcpy(expand + dx * d.w * W, forward + dx * half, sizeof(T) * d.w * W);
      find_band<T>(forward + dx * half, d.w, W, band + dx * 2 * (W / width));
    }
    if (!backward_fits) {
      __builtin_memcpy(expand_backward + dx * d.W * w, backward + dx * half, sizeof(T) * d.W * w);
      find_band<T>(backward + dx * half, d.W, w, band_backward + dx * 2 * (w / width));
    }
  }
  return (forward_fits ? 1 : 0) + (backward_fits ? 2 : 0);
}

template <class T>
INLINE typename Simd<T>::mask load_lanes(const T* p) {
  typename Simd<T>::mask lanes;
  __builtin_memcpy(&lanes, p, sizeof lanes);
  return lanes;
}

template <class T>
INLINE void expand_columns_banded(const Decoder<T>& d, const Scratch<T>& s, int64_t k, int64_t dy, T* to) {
  constexpr int width = Simd<T>::width;
  const int64_t W = round_up(d.W, width), vectors = W / width;
  for (int64_t v = 0; v < vectors; v++)
    for (int64_t dx = 0; dx < 3; dx++) {
      const T* from = s.taps + ((dy * 3 + dx) * d.K + k) * s.pixels;
      const T* matrix = d.expand + dx * d.w * W + v * width;
      const int32_t* band = d.band + (dx * vectors + v) * 2;
      if (dx == 0)
        row_product<1, false>(d.h, from, d.w, matrix, W, band[0], band[1], to + v * width, s.row);
      else
        row_product<1, true>(d.h, from, d.w, matrix, W, band[0], band[1], to + v * width, s.row);
    }
}

template <class T>
INLINE void expand_columns_shuffled(const Decoder<T>& d, const Scratch<T>& s, int64_t v, T* expanded) {
  constexpr int width = Simd<T>::width;
  const int64_t W = round_up(d.W, width), vectors = W / width, step = d.K * s.pixels;
  typename Simd<T>::mask first[3], second[3];
  vec<T> first_weight[3], second_weight[3];
  int64_t base[3];
  for (int dx = 0; dx < 3; dx++) {
    const T* entries = d.expand + dx * W * 4 + v * 4 * width;
    base[dx] = dx * step + d.band[(dx * vectors + v) * 2];
    first[dx] = load_lanes(entries);
    first_weight[dx] = load<T>(entries + width);
    second[dx] = load_lanes(entries + 2 * width);
    second_weight[dx] = load<T>(entries + 3 * width);
  }
  for (int64_t dy = 0; dy < 3; dy++)
    for (int64_t k = 0; k < d.K; k++) {
      const T* from = s.taps + (dy * 3 * d.K + k) * s.pixels;
      T* to = expanded + (k * 3 + dy) * d.h * s.row;
      for (int64_t i = 0; i < d.h; i++, from += d.w, to += s.row) {
        vec<T> sum = {}, other = {};
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; dx++) {
          vec<T> x = load<T>(from + base[dx]);
          sum += __builtin_shuffle(x, first[dx]) * first_weight[dx];
          other += __builtin_shuffle(x, second[dx]) * second_weight[dx];
        }
        store<T>(to, sum + other);
      }
    }
}

template <class T>
INLINE void expand_columns(const Decoder<T>& d, const Scratch<T>& s) {
  constexpr int width = Simd<T>::width;
  if (d.shuffled & 1) {
    for (int64_t v = 0; v < round_up(d.W, width) / width; v++) expand_columns_shuffled(d, s, v, s.expanded + v * width);
    return;
  }
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < 3; dy++) expand_columns_banded(d, s, k, dy, s.expanded + (k * 3 + dy) * d.h * s.row);
}

// R rows of one vector of the transpose, shuffled: rows of `from` are two vectors.
template <int R, class T>
INLINE void gather_tile(const T* from, int64_t from_row, const T* entries, int64_t n, T* to, int64_t to_row) {
  constexpr int width = Simd<T>::width;
  vec<T> acc[R], low[R], high[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    acc[r] = vec<T>{};
    low[r] = load<T>(from + r * from_row);
    high[r] = load<T>(from + r * from_row + width);
  }
  for (; n; n--, entries += 2 * width) {
    typename Simd<T>::mask lanes = load_lanes(entries);
    vec<T> weight = load<T>(entries + width);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) acc[r] += __builtin_shuffle(low[r], high[r], lanes) * weight;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store<T>(to + r * to_row, acc[r]);
}

// taps becomes the transpose of expand_columns.
template <class T>
INLINE void gather_columns(const Decoder<T>& d, const Scratch<T>& s) {
  constexpr int width = Simd<T>::width;
  const int64_t w = round_up(d.w, width), vectors = w / width;
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < 3; dy++)
      for (int64_t dx = 0; dx < 3; dx++) {
        const T* from = s.expanded + (k * 3 + dy) * d.h * s.row;
        T* to = s.taps + ((dy * 3 + dx) * d.K + k) * s.pixels;
        const int32_t* band = d.band_backward + dx * vectors * 2;
        // From the last vector of the rows to the first: what a row's last vector writes over the next row's start is written again.
        for (int64_t v = vectors - 1; v >= 0; v--) {
          if (d.shuffled & 2) {
            const int64_t most = d.W / 2;
            const T* entries = d.expand_backward + dx * w * 2 * most + v * most * 2 * width;
            int64_t i = 0;
            for (; i + 4 <= d.h; i += 4) gather_tile<4>(from + i * s.row, s.row, entries, band[2 * v + 1], to + i * d.w + v * width, d.w);
            for (; i < d.h; i++) gather_tile<1>(from + i * s.row, s.row, entries, band[2 * v + 1], to + i * d.w + v * width, d.w);
          } else {
            const T* matrix = d.expand_backward + dx * d.W * w;
            row_product<1, false>(d.h, from, s.row, matrix + v * width, w, band[2 * v], band[2 * v + 1], to + v * width, d.w);
          }
        }
      }
}

// ---- the resize along y, convolved, and its transpose ----

// rows[q] and weights of the six rows that row Y of z takes of an `expanded` (3, h, row); weight 0 where there is none.
template <class T>
INLINE void expand_rows(const Decoder<T>& d, const Scratch<T>& s) {
  constexpr int width = Simd<T>::width;
  for (int64_t Y = 0; Y < d.H; Y++) {
    int64_t row[6];
    vec<T> weight[6];
    for (int64_t dy = 0; dy < 3; dy++) {
      int64_t y = Y + dy - 1;
      bool inside = y >= 0 && y < d.H;
      row[2 * dy] = (dy * d.h + (inside ? d.rows.low[y] : 0)) * s.row;
      row[2 * dy + 1] = (dy * d.h + (inside ? d.rows.high[y] : 0)) * s.row;
      weight[2 * dy] = splat<T>(inside ? T(d.rows.low_weight[y]) : T(0));
      weight[2 * dy + 1] = splat<T>(inside ? T(d.rows.high_weight[y]) : T(0));
    }
    for (int64_t k = 0; k < d.K; k++) {
      const T* from = s.expanded + k * 3 * d.h * s.row;
      T* to = s.z + k * s.plane.size + s.plane.origin + Y * s.plane.pitch;
      for (int64_t X = 0; X < d.W; X += width) {
        vec<T> even = splat<T>(d.b1[k]), odd = {};
#pragma GCC unroll 3
        for (int q = 0; q < 6; q += 2) {
          even += load<T>(from + row[q] + X) * weight[q];
          odd += load<T>(from + row[q + 1] + X) * weight[q + 1];
        }
        store<T>(to + X, even + odd);
      }
    }
  }
}

// expanded becomes the transpose of expand_rows, of the gradient in z.
template <class T>
INLINE void gather_rows(const Decoder<T>& d, const Scratch<T>& s) {
  constexpr int width = Simd<T>::width;
  T* weights = s.line;                                          // of the rows of z that row i of `expanded` takes
  int64_t* rows = (int64_t*)(s.line + round_up(d.H, width));  // and where they are
  int64_t first = 0;                                            // the first y whose high row is not above i
  for (int64_t i = 0; i < d.h; i++) {
    while (first < d.H && d.rows.high[first] < i) first++;
    for (int64_t dy = 0; dy < 3; dy++) {
      int64_t n = 0;
      for (int64_t y = first; y < d.H && d.rows.low[y] <= i; y++) {
        int64_t Y = y - dy + 1;
        if (Y < 0 || Y >= d.H) continue;
        weights[n] = T((d.rows.low[y] == i ? d.rows.low_weight[y] : 0) + (d.rows.high[y] == i ? d.rows.high_weight[y] : 0));
        rows[n++] = s.plane.origin + Y * s.plane.pitch;
      }
      for (int64_t k = 0; k < d.K; k++) {
        const T* from = s.z + k * s.plane.size;
        T* to = s.expanded + ((k * 3 + dy) * d.h + i) * s.row;
        int64_t X = 0;
        for (; X + width < d.W; X += 2 * width) {
          vec<T> left = {}, right = {};
          for (int64_t e = 0; e < n; e++) {
            vec<T> weight = splat<T>(weights[e]);
            left += load<T>(from + rows[e] + X) * weight;
            right += load<T>(from + rows[e] + X + width) * weight;
          }
          store<T>(to + X, left);
          store<T>(to + X + width, right);
        }
        for (; X < d.W; X += width) {
          vec<T> sum = {};
          for (int64_t e = 0; e < n; e++) sum += load<T>(from + rows[e] + X) * weights[e];
          store<T>(to + X, sum);
        }
      }
    }
  }
}

// ---- resize, then convolve ----

template <class T>
INLINE void resize(const Decoder<T>& d, const Scratch<T>& s, const T* from, T* to) {
  for (int64_t Y = 0; Y < d.H; Y++, to += s.plane.pitch) {
    const T *low = from + d.rows.low[Y] * d.w, *high = from + d.rows.high[Y] * d.w;
    T a = T(d.rows.low_weight[Y]), b = T(d.rows.high_weight[Y]);
    for (int64_t j = 0; j < d.w; j++) s.line[j] = a * low[j] + b * high[j];
    for (int64_t X = 0; X < d.W; X++)
      to[X] = T(d.columns.low_weight[X]) * s.line[d.columns.low[X]] + T(d.columns.high_weight[X]) * s.line[d.columns.high[X]];
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

template <class T, class S>
INLINE void read_maps_of(const S* from, const Maps& m, int64_t channels, int64_t rows, int64_t columns, T* to, int64_t plane, int64_t pitch) {
  if constexpr (__is_same(T, S)) {
    if (m.c == 1 && m.x > 1) {  // channels_last
      bool whole = m.y == columns * m.x && pitch == columns;
      for (int64_t y = 0; y < (whole ? 1 : rows); y++)
        transpose(from + y * m.y, m.x, whole ? rows * columns : columns, channels, to + y * pitch, plane);
      return;
    }
  }
  if (m.x == 1 && m.y == columns && pitch == columns) {
    for (int64_t c = 0; c < channels; c++) read_strided(to + c * plane, from + c * m.c, 1, rows * columns);
    return;
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = 0; y < rows; y++) read_strided(to + c * plane + y * pitch, from + c * m.c + y * m.y, m.x, columns);
}

// Sample n of maps of any dtype and strides, as planes.
template <class T>
INLINE void read_maps(const Maps& m, int64_t n, int64_t channels, int64_t rows, int64_t columns, T* to, int64_t plane, int64_t pitch) {
  switch (m.dtype) {
    case Dtype::f32: return read_maps_of((const float*)m.data + n * m.n, m, channels, rows, columns, to, plane, pitch);
    case Dtype::f64: return read_maps_of((const double*)m.data + n * m.n, m, channels, rows, columns, to, plane, pitch);
    case Dtype::bf16: return read_maps_of((const bf16*)m.data + n * m.n, m, channels, rows, columns, to, plane, pitch);
    case Dtype::f16: return read_maps_of((const f16*)m.data + n * m.n, m, channels, rows, columns, to, plane, pitch);
  }
}

template <class T, class S>
INLINE void write_maps_of(S* to, const Maps& m, int64_t channels, int64_t rows, int64_t columns, const T* from, int64_t plane, int64_t pitch) {
  if constexpr (__is_same(T, S)) {
    if (m.c == 1 && m.x > 1) {  // channels_last
      bool whole = m.y == columns * m.x && pitch == columns;
      for (int64_t y = 0; y < (whole ? 1 : rows); y++)
        transpose(from + y * pitch, plane, channels, whole ? rows * columns : columns, to + y * m.y, m.x);
      return;
    }
  }
  if (m.x == 1 && m.y == columns && pitch == columns) {
    for (int64_t c = 0; c < channels; c++) write_strided(to + c * m.c, from + c * plane, 1, rows * columns);
    return;
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = 0; y < rows; y++) write_strided(to + c * m.c + y * m.y, from + c * plane + y * pitch, m.x, columns);
}

template <class T>
INLINE void write_maps(const Maps& m, int64_t n, int64_t channels, int64_t rows, int64_t columns, const T* from, int64_t plane, int64_t pitch) {
  switch (m.dtype) {
    case Dtype::f32: return write_maps_of((float*)m.data + n * m.n, m, channels, rows, columns, from, plane, pitch);
    case Dtype::f64: return write_maps_of((double*)m.data + n * m.n, m, channels, rows, columns, from, plane, pitch);
    case Dtype::bf16: return write_maps_of((bf16*)m.data + n * m.n, m, channels, rows, columns, from, plane, pitch);
    case Dtype::f16: return write_maps_of((f16*)m.data + n * m.n, m, channels, rows, columns, from, plane, pitch);
  }
}

// Sample n of maps that lie in memory without gaps, to be asked for in `times` times; nothing where there is none.
INLINE Ahead sample_ahead(const Maps& m, int64_t n, int64_t samples, int64_t numbers, int64_t times) {
  if (n >= samples || m.n != numbers) return {};
  const int64_t size = m.dtype == Dtype::f64 ? 8 : m.dtype == Dtype::f32 ? 4 : 2;
  return {(const char*)m.data + n * m.n * size, numbers * size, times};
}

// z = conv1(resize(h)) + b1 on its planes; what lies between the rows is arbitrary.
template <class T>
INLINE void first_convolution(const Decoder<T>& d, const Scratch<T>& s, int64_t n) {
  const Plane<T>& p = s.plane;
  const int64_t zero = 0;
  if (d.low_resolution) {
    read_maps<T>(d.features, n, d.C, d.h, d.w, s.h, s.pixels, d.w);
    convolve<1>(9 * d.K, d.w1, s.h, s.pixels, d.C, &zero, (const T*)nullptr, s.taps, s.pixels, d.h * d.w,
                sample_ahead(d.features, n + 1, d.N, d.C * d.h * d.w, convolve_tiles<T>(9 * d.K, d.h * d.w)));
    expand_columns(d, s);
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
    for (int64_t c = 0; c < d.C; c++) spread(p, s.strips, s.h + c * p.size, s.spread_h + c * POINTS * s.strips.size);
    convolve_winograd(p, s.strips, d.K, d.w1, s.spread_h, d.C, d.b1, s.products, s.z, ahead);
    return;
  }
  convolve<9>(d.K, d.w1, s.h + p.origin, p.size, d.C, s.offset, d.b1, s.z + p.origin, p.size, p.span, ahead);
}

// a = relu((z - center) scale + shift), zero outside the map.
template <class T>
INLINE void normalize_rectify(const Decoder<T>& d, const Scratch<T>& s) {
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

// sigmoid(x), and the loss of a pixel where that is asked for.
template <class T>
INLINE vec<T> pixel_gradient(Pixel kind, vec<T> x, vec<T> target, bool needs_loss, vec<T>& loss) {
  vec<T> zero = {}, one = splat<T>(T(1));
  vec<T> e = exp<T>(-abs<T>(x));
  vec<T> q = one / (one + e), sigmoid = x < zero ? e * q : q;
  vec<T> error = sigmoid - target;
  if (kind == Pixel::bce) {
    if (needs_loss) loss = (x < zero ? zero : x) - x * target + log1p<T>(e);
    return error;
  }
  vec<T> slope = e * q * q;  // sigmoid (1 - sigmoid)
  if (kind == Pixel::mse) {
    loss = error * error;
    return error * slope * T(2);
  }
  loss = abs<T>(error);
  return error > zero ? slope : error < zero ? -slope : error;  // error: zero, or nan
}

// g, which holds the logits, becomes the gradient of the loss in them, zero outside the map. Returns the sample's loss.
template <class T>
INLINE double pixel_loss(const Decoder<T>& d, const Scratch<T>& s, int64_t n, bool needs_loss) {
  constexpr int width = Simd<T>::width;
  const Plane<T>& p = s.plane;
  double total = 0;
  T* target = s.image;
  for (int64_t o = 0; o < 3; o++) {
    for (int64_t y = 0; y < d.H; y++) {
      T* g = s.g + o * p.size + p.origin + y * p.pitch;
      read_row<T>(target, d.image.data, d.image.dtype, n * d.image.n + o * d.image.c + y * d.image.y, d.image.x, d.W);
      vec<T> sum = {}, zero = {}, one = splat<T>(T(1));
      for (int64_t x = 0; x < d.W; x += width) {
        int left = int(d.W - x);
        vec<T> t = left < width ? load_first<T>(target + x, left) : load<T>(target + x);
        if (d.restore) {
          t = t * d.image_std[o] + d.image_mean[o];
          t = t < zero ? zero : t > one ? one : t;
        }
        vec<T> loss = {};
        vec<T> gradient = pixel_gradient<T>(d.pixel, load<T>(g + x), t, needs_loss, loss) * d.pixel_weight;
        if (left < width) {
          for (int i = left; i < width; i++) loss[i] = 0;
          store_first<T>(g + x, gradient, left);
        } else {
          store<T>(g + x, gradient);
        }
        sum += loss;
      }
      total += double(infopro::INFOPRO_ISA::sum<T>(sum));
    }
    p.set_border(s.g + o * p.size, T(0));
  }
  return total;
}

template <class T>
INLINE void logits(const Decoder<T>& d, const Scratch<T>& s, int64_t n) {
  const Plane<T>& p = s.plane;
  convolve<9>(3, d.w2, s.a + p.origin, p.size, d.K, s.offset, d.b2, s.g + p.origin, p.size, p.span,
              sample_ahead(d.image, n, d.N, 3 * d.H * d.W, convolve_tiles<T>(3, p.span)));
}

// a, which is no longer needed, becomes the gradient in it.
template <class T>
INLINE void second_convolution_backward(const Decoder<T>& d, const Scratch<T>& s) {
  const Plane<T>& p = s.plane;
  convolve<9>(d.K, d.w2_backward, s.g + p.origin, p.size, 3, s.offset, (const T*)nullptr, s.a + p.origin, p.size, p.span);
  for (int64_t k = 0; k < d.K; k++) p.set_border(s.a + k * p.size, T(0));
}

// partial += the sample's gradient of W1, from that in z, where the convolution is direct.
template <class T>
INLINE void first_weight(const Decoder<T>& d, const Scratch<T>& s, T* partial) {
  const Plane<T>& p = s.plane;
  const Strips<T>& t = s.strips;
  if (!d.winograd) return weight_gradient<9>(s.z + p.origin, p.size, d.K, s.h + p.origin, p.size, d.C, s.offset, p.span, partial);
  const int64_t step = POINTS * t.size;
  for (int64_t k = 0; k < d.K; k++) spread_gradient(p, t, s.z + k * p.size, s.spread_z + k * step);
  for (int f = 0; f < POINTS; f++) {
    pixel_rows(t, s.spread_h + f * t.size, d.C, s.pixel_rows, s.features_pitch);
    weight_rows(t, s.spread_z + f * t.size + t.origin, step, d.K, s.pixel_rows + s.features_pitch, s.features_pitch,
                partial + f * 3 * d.K * s.features_pitch);
  }
}

// du = the gradient in the resized features, from that in z, where the convolution is direct.
template <class T>
INLINE void first_convolution_backward(const Decoder<T>& d, const Scratch<T>& s, T* du) {
  const Plane<T>& p = s.plane;
  if (d.winograd) {
    for (int64_t k = 0; k < d.K; k++) spread(p, s.strips, s.z + k * p.size, s.spread_z + k * POINTS * s.strips.size);
    return convolve_winograd(p, s.strips, d.C, d.w1_backward, s.spread_z, d.K, (const T*)nullptr, s.products, du);
  }
  convolve<9>(d.C, d.w1_backward, s.z + p.origin, p.size, d.K, s.offset, (const T*)nullptr, du + p.origin, p.size, p.span);
}

// ---- the sweeps ----

// mean[k], squares[k]: of the sample's z, the mean and the sum of squared deviations from it.
template <class T>
void decoder_statistics(const Decoder<T>& d, int64_t n, T* scratch, double* mean, double* squares) {
  Scratch<T> s(d, scratch);
  const Plane<T>& p = s.plane;
  first_convolution(d, s, n);
  for (int64_t k = 0; k < d.K; k++) {
    T* plane = s.z + k * p.size;
    channel_statistics(plane + p.origin, p.span, d.H * d.W, [&](T value) { p.set_border(plane, value); }, mean[k], squares[k]);
  }
}

template <class T>
void decoder_loss(const Decoder<T>& d, int64_t n, bool needs_grad, T* scratch, SampleSums& sums, T* w2_partial) {
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

// The gradient in z: scale (dy - mean_dy - xhat mean_dy_xhat), the means zero in eval mode; zero outside the map.
template <class T>
INLINE void norm_backward(const Decoder<T>& d, const Scratch<T>& s, const T* mean_dy, const T* mean_dy_xhat) {
  const Plane<T>& p = s.plane;
  for (int64_t k = 0; k < d.K; k++) {
    T* z = s.z + k * p.size + p.origin;
    const T* dy = s.a + k * p.size + p.origin;
    T center = d.center[k], scale = d.scale[k], shift = d.shift[k], slope = d.inverse_std[k] * mean_dy_xhat[k], mean = mean_dy[k];
    vec<T> zero = {};
    for (int64_t i = 0; i < p.span; i += Simd<T>::width) {
      vec<T> deviation = load<T>(z + i) - center, y = deviation * scale + shift;
      vec<T> g = y > zero ? load<T>(dy + i) : zero;
      store<T>(z + i, (g - mean - deviation * slope) * scale);
    }
    p.set_border(s.z + k * p.size, T(0));
  }
}

// partial (9 K, features_pitch) += gradient of the taps times the features, V vectors of channels from c on at a time
template <int V, class T>
INLINE int64_t weight_columns(const Decoder<T>& d, const Scratch<T>& s, int64_t c, T* partial) {
  for (; c + V * Simd<T>::width <= s.features_pitch; c += V * Simd<T>::width)
    row_product<V, true>(9 * d.K, s.taps, s.pixels, s.h_rows + c, s.features_pitch, 0, d.h * d.w, partial + c, s.features_pitch);
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
void decoder_backward(const Decoder<T>& d, int64_t n, const T* mean_dy, const T* mean_dy_xhat, const Maps* d_features, T* w1_partial,
                      T* scratch) {
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
    gather_columns(d, s);
    if (w1_partial) first_weight_low_resolution(d, s, w1_partial);
    if (!d_features) return;
    convolve<1>(d.C, d.w1_backward, s.taps, s.pixels, 9 * d.K, &zero, (const T*)nullptr, s.h, s.pixels, d.h * d.w);
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

template <class T>
void decoder_w1_reduce(const Decoder<T>& d, const T* partial, T* d_w1) {
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
          *to += d.low_resolution ? partial[(tap * d.K + k) * pitch + c] : sum<T>(load<T>(partial + ((k * d.C + c) * 9 + tap) * width));
        }
      }
}

template <class T>
void decoder_w2_reduce(const Decoder<T>& d, const T* partial, T* d_w2) {
  for (int64_t i = 0; i < 27 * d.K; i++) d_w2[i] += sum<T>(load<T>(partial + i * Simd<T>::width));
}

}  // namespace INFOPRO_ISA
}  // namespace infopro
