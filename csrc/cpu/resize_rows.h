// The resize along y with its shifts by each dy, and its transpose, for the decoder and for a chain's stages.
#pragma once

#include "taps.h"

namespace infopro::INFOPRO_ISA {

// How row Y of z mixes rows of E (SIDE, in_rows, pitch), whose row 0 is row `first` of the features: two rows
// for each dy, with weight 0 if Y + dy lies outside the resized map.
template <int SIDE, class T> struct RowMix {
  int64_t row[2 * SIDE];
  vec<T> weight[2 * SIDE];

  INLINE RowMix(const Axis& rows, int64_t Y, int64_t first, int64_t in_rows, int64_t pitch) {
    for (int64_t dy = 0; dy < SIDE; dy++) {
      const int64_t y = Y + dy - SIDE / 2;
      const bool inside = y >= 0 && y < rows.out;
      row[2 * dy] = (dy * in_rows + (inside ? rows.low[y] - first : 0)) * pitch;
      row[2 * dy + 1] = (dy * in_rows + (inside ? rows.high[y] - first : 0)) * pitch;
      weight[2 * dy] = splat<T>(inside ? T(rows.low_weight[y]) : T(0));
      weight[2 * dy + 1] = splat<T>(inside ? T(rows.high_weight[y]) : T(0));
    }
  }

  // bias + a vector of the mix. from: E of a channel, at the column of the vector.
  INLINE vec<T> operator()(const T* from, T bias) const {
    vec<T> even = splat<T>(bias), odd = {};
    UNROLL(3) for (int q = 0; q < 2 * SIDE; q += 2) {
      even += load<T>(from + row[q]) * weight[q];
      odd += load<T>(from + row[q + 1]) * weight[q + 1];
    }
    return even + odd;
  }
};

// The transpose: the rows of z that read row i of E, for rising i. row_of(Y): where row Y of z lies.
template <class T> struct RowTakers {
  T* weights;         // of the rows of z
  int64_t* rows;      // and where they lie
  int64_t count = 0;
  int64_t first = 0;  // the first resized row whose high row is not above i

  // memory: 3 rows.out numbers, rows.out rounded up to whole vectors
  INLINE RowTakers(const Axis& axis, T* memory)
      : weights(memory), rows((int64_t*)(memory + round_up(axis.out, Simd<T>::width))) {}

  INLINE void move_to(const Axis& axis, int64_t i) {
    while (first < axis.out && axis.high[first] < i) first++;
  }

  template <class F>
  INLINE void find(const Axis& axis, int64_t i, int64_t shift, F row_of) {
    count = 0;
    for (int64_t y = first; y < axis.out && axis.low[y] <= i; y++) {
      const int64_t Y = y - shift;
      if (Y < 0 || Y >= axis.out) continue;
      const double low = axis.low[y] == i ? axis.low_weight[y] : 0,
                   high = axis.high[y] == i ? axis.high_weight[y] : 0;
      weights[count] = T(low + high);
      rows[count++] = row_of(Y);
    }
  }

  // to[0..W) = their weighted sum, in whole vectors
  INLINE void gather(const T* from, int64_t W, T* to) const {
    constexpr int width = Simd<T>::width;
    int64_t X = 0;
    for (; X + width < W; X += 2 * width) {
      vec<T> left = {}, right = {};
      for (int64_t e = 0; e < count; e++) {
        vec<T> weight = splat<T>(weights[e]);
        left += load<T>(from + rows[e] + X) * weight;
        right += load<T>(from + rows[e] + X + width) * weight;
      }
      store<T>(to + X, left);
      store<T>(to + X + width, right);
    }
    for (; X < W; X += width) {
      vec<T> total = {};
      for (int64_t e = 0; e < count; e++) total += load<T>(from + rows[e] + X) * weights[e];
      store<T>(to + X, total);
    }
  }
};

}  // namespace infopro::INFOPRO_ISA
