// The decoder's resize along x with its shifts by each dx, and its transpose.
//
// Each has two forms, chosen when the tables are made. Banded: a matrix [dx][j][X], or [dx][X][j] for the
// transpose; a vector of columns is multiplied by the rows from the first to the last that is not all zero in
// it. Shuffled, if a vector holds the inputs of an output vector: entries of (lanes to take, weights) for
// each output vector, 2 from one input vector, or for the transpose as many as needed from two.
#pragma once

#include "taps.h"

namespace infopro::INFOPRO_ISA {

template <class T> int64_t decoder_expand_size(const Decoder<T>& d) {
  constexpr int width = Simd<T>::width;
  const int64_t W = round_up(d.W, width), w = round_up(d.w, width);
  // banded and shuffled, then the transpose
  const int64_t sizes[4] = {3 * d.w * W, 3 * W * 4, 3 * d.W * w, 3 * w * 2 * d.W};
  int64_t most = 0;
  for (int64_t size : sizes) most = size > most ? size : most;
  return most;
}

template <class T> int64_t decoder_band_size(const Decoder<T>& d) {
  constexpr int width = Simd<T>::width;
  return 6 * round_up(d.W > d.w ? d.W : d.w, width) / width;
}

// band: for each vector of the matrix's columns, the first and one past the last row that is not all zero
// there.
template <class T> INLINE void find_band(const T* matrix, int64_t rows, int64_t row, int32_t* band) {
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

// The banded matrices of one dx.
template <class T> INLINE void make_matrices(const Decoder<T>& d, int dx, T* forward, T* backward) {
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

template <class T> INLINE void put_entry(T* entry, int lane, int64_t take, T weight) {
  label<T> index = label<T>(take);
  __builtin_memcpy(entry + lane, &index, sizeof index);
  entry[Simd<T>::width + lane] = weight;
}

// Make the entries of one dx from its banded matrix (rows, row). base: (base row, number of entries) of each
// vector. Return false if a lane has more than `most` rows that are not zero, or one `limit` or more rows
// behind the base.
template <class T>
INLINE bool make_entries(const T* matrix, int64_t rows, int64_t row, int64_t most, int64_t limit,
                         bool from_base, T* entries, int32_t* base) {
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

// Fill the tables. Return 1 if the resize is shuffled, plus 2 if its transpose is.
template <class T>
int decoder_expand(const Decoder<T>& d, T* expand, T* expand_backward, int32_t* band, int32_t* band_backward,
                   T* memory) {
  constexpr int width = Simd<T>::width;
  constexpr bool shuffles = INFOPRO_BYTES > 16;  // SSE2 has no shuffle by variable lanes
  const int64_t W = round_up(d.W, width), w = round_up(d.w, width), half = decoder_expand_size(d) / 3;
  const int64_t bands = 2 * (W / width), bands_backward = 2 * (w / width);
  const int64_t most = d.W / 2;  // more entries are no faster than the band
  T *forward = memory, *backward = memory + 3 * half;
  bool forward_fits = shuffles, backward_fits = shuffles && d.W <= 2 * width;
  for (int dx = 0; dx < 3; dx++) {
    make_matrices(d, dx, forward + dx * half, backward + dx * half);
    find_band<T>(forward + dx * half, d.w, W, band + dx * bands);
    find_band<T>(backward + dx * half, d.W, w, band_backward + dx * bands_backward);
  }
  for (int dx = 0; dx < 3 && forward_fits; dx++)
    forward_fits = make_entries<T>(forward + dx * half, d.w, W, 2, width, true, expand + dx * W * 4,
                                   band + dx * bands);
  for (int dx = 0; dx < 3 && backward_fits; dx++)
    backward_fits = make_entries<T>(backward + dx * half, d.W, w, most, 2 * width, false,
                                    expand_backward + dx * w * 2 * most, band_backward + dx * bands_backward);
  for (int dx = 0; dx < 3; dx++) {
    if (!forward_fits) {
      __builtin_memcpy(expand + dx * d.w * W, forward + dx * half, sizeof(T) * d.w * W);
      find_band<T>(forward + dx * half, d.w, W, band + dx * bands);
    }
    if (!backward_fits) {
      __builtin_memcpy(expand_backward + dx * d.W * w, backward + dx * half, sizeof(T) * d.W * w);
      find_band<T>(backward + dx * half, d.W, w, band_backward + dx * bands_backward);
    }
  }
  return (forward_fits ? 1 : 0) + (backward_fits ? 2 : 0);
}

template <class T> INLINE typename Simd<T>::mask load_lanes(const T* p) {
  typename Simd<T>::mask lanes;
  __builtin_memcpy(&lanes, p, sizeof lanes);
  return lanes;
}

// T (9 K, pixels), rows [dy][dx][k], and E (K, 3, h, row) of the algebra in reconstruction_loss.h.
template <class T> struct TapsAndRows {
  T *taps, *expanded;
  int64_t pixels, row;
};

template <class T>
INLINE void expand_columns_banded(const Decoder<T>& d, const TapsAndRows<T>& s, int64_t k, int64_t dy,
                                  T* to) {
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
INLINE void expand_columns_shuffled(const Decoder<T>& d, const TapsAndRows<T>& s, int64_t v, T* expanded) {
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
        UNROLL(3) for (int dx = 0; dx < 3; dx++) {
          vec<T> x = load<T>(from + base[dx]);
          sum += __builtin_shuffle(x, first[dx]) * first_weight[dx];
          other += __builtin_shuffle(x, second[dx]) * second_weight[dx];
        }
        store<T>(to, sum + other);
      }
    }
}

// E from T.
template <class T> INLINE void expand_columns(const Decoder<T>& d, const TapsAndRows<T>& s) {
  constexpr int width = Simd<T>::width;
  if (d.shuffled & 1) {
    for (int64_t v = 0; v < round_up(d.W, width) / width; v++)
      expand_columns_shuffled(d, s, v, s.expanded + v * width);
    return;
  }
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < 3; dy++)
      expand_columns_banded(d, s, k, dy, s.expanded + (k * 3 + dy) * d.h * s.row);
}

// R rows of one vector of the transpose, shuffled: rows of `from` are two vectors.
template <int R, class T>
INLINE void gather_tile(const T* from, int64_t from_row, const T* entries, int64_t n, T* to, int64_t to_row) {
  constexpr int width = Simd<T>::width;
  vec<T> acc[R], low[R], high[R];
  UNROLL(4) for (int r = 0; r < R; r++) {
    acc[r] = vec<T>{};
    low[r] = load<T>(from + r * from_row);
    high[r] = load<T>(from + r * from_row + width);
  }
  for (; n; n--, entries += 2 * width) {
    typename Simd<T>::mask lanes = load_lanes(entries);
    vec<T> weight = load<T>(entries + width);
    UNROLL(4) for (int r = 0; r < R; r++) acc[r] += __builtin_shuffle(low[r], high[r], lanes) * weight;
  }
  UNROLL(4) for (int r = 0; r < R; r++) store<T>(to + r * to_row, acc[r]);
}

// T becomes the transpose of expand_columns, of E.
template <class T> INLINE void gather_columns(const Decoder<T>& d, const TapsAndRows<T>& s) {
  constexpr int width = Simd<T>::width;
  const int64_t w = round_up(d.w, width), vectors = w / width, most = d.W / 2;
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < 3; dy++)
      for (int64_t dx = 0; dx < 3; dx++) {
        const T* from = s.expanded + (k * 3 + dy) * d.h * s.row;
        const int32_t* band = d.band_backward + dx * vectors * 2;
        // From the last vector to the first: what a row's last vector writes over the next row is written
        // again.
        for (int64_t v = vectors - 1; v >= 0; v--) {
          T* to = s.taps + ((dy * 3 + dx) * d.K + k) * s.pixels + v * width;
          if (d.shuffled & 2) {
            const T* entries = d.expand_backward + dx * w * 2 * most + v * most * 2 * width;
            const int64_t n = band[2 * v + 1];
            int64_t i = 0;
            for (; i + 4 <= d.h; i += 4)
              gather_tile<4>(from + i * s.row, s.row, entries, n, to + i * d.w, d.w);
            for (; i < d.h; i++) gather_tile<1>(from + i * s.row, s.row, entries, n, to + i * d.w, d.w);
          } else {
            const T* matrix = d.expand_backward + dx * d.W * w + v * width;
            row_product<1, false>(d.h, from, s.row, matrix, w, band[2 * v], band[2 * v + 1], to, d.w);
          }
        }
      }
}

}  // namespace infopro::INFOPRO_ISA
