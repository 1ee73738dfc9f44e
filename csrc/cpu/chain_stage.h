// One stage of a chain decoder, a band of rows at a time: batch norm and ReLU of the previous stage's map,
// resize, convolution.
//
// Neither the rectified map nor the resized one is ever whole. With a = relu(norm(x)) and R the resize,
//     T[dy, dx][k] = sum_c W[k][c][dy, dx] a[c]                     1x1 convolutions of x: a matrix product
//     E[k][dy][i][X] = sum_dx columns(T[dy, dx][k][i])(X + dx - 1)  as wide as z, 0 outside the resized row
//     z[k][Y][X] = b[k] + sum_dy rows(E[k][dy])(Y + dy - 1)[X]      0 outside the resized map
// (reconstruction_loss.h has the algebra). T is computed for `chunk` rows of x at a time, which stay in the
// cache. Backward is the transpose of each line. A resize and its shift by dx along a row are one banded
// matrix, stored as blocks: a vector of columns, and the rows that are not all zero there.
#pragma once

#include "gemm.h"
#include "maps.h"
#include "pixel.h"
#include "resize_rows.h"

namespace infopro::INFOPRO_ISA {

// The layout of a thread's scratch.
template <class T> struct ChainScratch {
  int64_t taps_rows, pitch, row;  // side^2 K; a padded row of a chunk's pixels; a padded row of z
  T *a, *da, *taps, *packed_a, *packed_b, *expanded, *dz, *line, *end;

  ChainScratch(const ChainStage<T>& d, T* memory) {
    constexpr int64_t width = Simd<T>::width;
    const int64_t pixels = d.chunk * d.w;
    taps_rows = d.side * d.side * d.K;
    pitch = round_up(pixels, NR<T>) + width;
    row = round_up(d.W, width);
    const int64_t most = d.C > taps_rows ? d.C : taps_rows;
    auto take = [&](int64_t n) { T* p = memory; memory += round_up(n, 64 / int64_t(sizeof(T))); return p; };
    a = take(d.C * pitch);
    da = take(round_up(d.C, MR) * pitch);
    taps = take(round_up(taps_rows, MR) * pitch);
    packed_a = take(round_up(most, MR) * pixels);
    const int64_t panels = round_up(pixels, NR<T>) * most, columns = round_up(most, NR<T>) * pixels;
    packed_b = take(panels > columns ? panels : columns);
    expanded = take(d.plain ? 0 : d.K * d.side * d.in_rows * row);
    dz = take(d.plain ? 0 : d.K * d.out_rows * row);
    line = take(row + 3 * round_up(d.H, width));
    end = memory;
  }
};

template <class T> int64_t chain_scratch(const ChainStage<T>& d) {
  ChainScratch<T> s(d, nullptr);
  return s.end - (T*)nullptr;
}

// The gradient of the weights is (side^2 K, C) or its transpose, in whole register tiles.
template <class T> INLINE void weight_shape(const ChainStage<T>& d, int64_t& rows, int64_t& columns) {
  const int64_t taps = d.side * d.side * d.K;
  rows = round_up(d.weight_of_inputs ? d.C : taps, MR);
  columns = round_up(d.weight_of_inputs ? taps : d.C, NR<T>);
}

template <class T> int64_t chain_weight_partial(const ChainStage<T>& d) {
  int64_t rows, columns;
  weight_shape(d, rows, columns);
  return rows * columns;
}

template <class T> void chain_weight_reduce(const ChainStage<T>& d, const T* partial, T* d_weight) {
  int64_t rows, columns;
  weight_shape(d, rows, columns);
  const int64_t taps = d.side * d.side;
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t c = 0; c < d.C; c++)
      for (int64_t t = 0; t < taps; t++)
        d_weight[(k * d.C + c) * taps + t] +=
            d.weight_of_inputs ? partial[c * columns + t * d.K + k] : partial[(t * d.K + k) * columns + c];
}

// ---- the resize along x, shifted by each dx, and its transpose, as blocks ----

// For each dx and each vector of columns: the first row that is not zero, one past the last, and where the
// block lies.
template <class T> int64_t chain_bands(const ChainStage<T>& d, bool gather) {
  return d.side * 3 * (round_up(gather ? d.w : d.W, Simd<T>::width) / Simd<T>::width);
}

template <class T> int64_t chain_table(const ChainStage<T>& d, bool gather, T* table, int32_t* band) {
  constexpr int64_t width = Simd<T>::width;
  const int64_t vectors = round_up(gather ? d.w : d.W, width) / width;
  int64_t size = 0;
  auto entries = [&](int dx, auto entry) {  // entry(row, column, weight) for every number of the matrix
    for (int64_t X = 0; X < d.W; X++) {
      const int64_t from = X + dx - d.side / 2;
      if (from < 0 || from >= d.W) continue;
      const int64_t j[2] = {d.columns.low[from], d.columns.high[from]};
      const double weight[2] = {d.columns.low_weight[from], d.columns.high_weight[from]};
      for (int q = 0; q < 2; q++)
        if (weight[q] != 0) entry(gather ? X : j[q], gather ? j[q] : X, weight[q]);
    }
  };
  for (int dx = 0; dx < d.side; dx++, band += 3 * vectors) {
    for (int64_t v = 0; v < vectors; v++) band[3 * v] = band[3 * v + 1] = 0;
    entries(dx, [&](int64_t row, int64_t column, double) {
      int32_t* own = band + column / width * 3;
      if (own[1] == 0 || row < own[0]) own[0] = int32_t(row);
      if (row >= own[1]) own[1] = int32_t(row + 1);
    });
    for (int64_t v = 0; v < vectors; v++) {
      band[3 * v + 2] = int32_t(size);
      size += (band[3 * v + 1] - band[3 * v]) * width;
    }
    if (!table) continue;
    for (int64_t i = band[2]; i < size; i++) table[i] = 0;
    entries(dx, [&](int64_t row, int64_t column, double weight) {
      const int32_t* own = band + column / width * 3;
      table[own[2] + (row - own[0]) * width + column % width] += T(weight);
    });
  }
  return size;
}

// to (+)= rows of `from` times the block of vector v
template <bool ADD, class T>
INLINE void block_product(int64_t rows, const T* from, int64_t from_row, const T* table, const int32_t* band,
                          T* to, int64_t to_row) {
  constexpr int64_t width = Simd<T>::width;
  row_product<1, ADD>(rows, from + band[0], from_row, table + band[2], width, 0, band[1] - band[0], to,
                      to_row);
}

// ---- rows of x ----

// The maps from row r on.
INLINE Maps from_row(Maps m, int64_t r) {
  m.data = (char*)m.data + r * m.y * size_of(m.dtype);
  return m;
}

// Rows r0..r1 of sample n, normalised and rectified if the stage has a norm, as a matrix (C, pixels).
template <class T>
INLINE Matrix rectified(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t n, int64_t r0, int64_t r1) {
  const int64_t pixels = (r1 - r0) * d.w;
  if (d.norm) {
    const T* from = (const T*)d.x.data + n * d.C * d.h * d.w + r0 * d.w;
    for (int64_t c = 0; c < d.C; c++, from += d.h * d.w) {
      const T center = d.center[c], scale = d.scale[c], shift = d.shift[c];
      T* to = s.a + c * s.pitch;
      vec<T> zero = {};
      over<T>(pixels, [&](int64_t p, int count) {
        vec<T> y = (load_some<T>(from + p, count) - center) * scale + shift;
        store<T>(to + p, y < zero ? zero : y);  // nan stays nan
      });
    }
    return {s.a, dtype_as<T>, s.pitch, 1};
  }
  Maps part = from_row(d.x, r0);
  if (part.y == d.w * part.x)
    return {(char*)part.data + n * part.n * size_of(part.dtype), part.dtype, part.c, part.x};
  read_maps<T>(part, n, d.C, r1 - r0, d.w, s.a, s.pitch, d.w);
  return {s.a, dtype_as<T>, s.pitch, 1};
}

// ---- forward ----

// Compute rows r0..r1 of `expanded` from `taps`. Row 0 of `expanded` belongs to row `first` of x.
template <class T>
INLINE void chain_expand_columns(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t r0, int64_t r1,
                                 int64_t first) {
  constexpr int64_t width = Simd<T>::width;
  const int64_t vectors = s.row / width;
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < d.side; dy++) {
      T* to = s.expanded + ((k * d.side + dy) * d.in_rows + r0 - first) * s.row;
      for (int64_t v = 0; v < vectors; v++)
        for (int64_t dx = 0; dx < d.side; dx++) {
          const T* from = s.taps + ((dy * d.side + dx) * d.K + k) * s.pitch;
          const int32_t* band = d.expand_band + (dx * vectors + v) * 3;
          if (dx == 0)
            block_product<false>(r1 - r0, from, d.w, d.expand, band, to + v * width, s.row);
          else
            block_product<true>(r1 - r0, from, d.w, d.expand, band, to + v * width, s.row);
        }
    }
}

template <int SIDE, class T>
INLINE void chain_expand_rows(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t out0, int64_t out1,
                              int64_t first, T* to, int64_t plane, int64_t pitch) {
  constexpr int64_t width = Simd<T>::width;
  for (int64_t Y = out0; Y < out1; Y++) {
    const RowMix<SIDE, T> mix(d.rows, Y, first, d.in_rows, s.row);
    for (int64_t k = 0; k < d.K; k++) {
      const T* from = s.expanded + k * SIDE * d.in_rows * s.row;
      T* out = to + k * plane + (Y - out0) * pitch;
      for (int64_t X = 0; X < d.W;) {
        store_some<T>(out + X, mix(from + X, d.bias[k]), d.W - X < width ? int(d.W - X) : int(width));
        // The last vector of a row ends with the row, and computes what it shares with the one before again.
        X = X + width < d.W && X + 2 * width > d.W ? d.W - width : X + width;
      }
    }
  }
}

// taps = the weights times rows r0..r1.
template <class T>
INLINE void mix(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t n, int64_t r0, int64_t r1) {
  const int64_t pixels = (r1 - r0) * d.w;
  pack_b<T>(rectified(d, s, n, r0, r1), d.C, pixels, d.C, s.packed_b);
  gemm<T>(round_up(s.taps_rows, MR), round_up(pixels, NR<T>), d.C, d.weight, d.C, s.packed_b, d.C, s.taps,
          s.pitch, NR<T>, false);
}

// Rows out0..out1 of z, from rows in0..in1 of x.
template <class T>
INLINE void chain_rows(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t n, int64_t out0,
                       int64_t out1, int64_t in0, int64_t in1, T* to, int64_t plane, int64_t pitch) {
  for (int64_t r0 = in0; r0 < in1; r0 += d.chunk) {
    const int64_t r1 = r0 + d.chunk < in1 ? r0 + d.chunk : in1, pixels = (r1 - r0) * d.w;
    mix(d, s, n, r0, r1);
    if (!d.plain) {
      chain_expand_columns(d, s, r0, r1, in0);
      continue;
    }
    for (int64_t k = 0; k < d.K; k++) {
      const T *from = s.taps + k * s.pitch, bias = d.bias[k];
      T* out = to + k * plane + (r0 - in0) * pitch;
      over<T>(pixels, [&](int64_t p, int count) { store_some<T>(out + p, load<T>(from + p) + bias, count); });
    }
  }
  if (d.plain) return;
  if (d.side == 3)
    chain_expand_rows<3>(d, s, out0, out1, in0, to, plane, pitch);
  else
    chain_expand_rows<1>(d, s, out0, out1, in0, to, plane, pitch);
}

// Mean of n numbers and the sum of their squared deviations from it.
template <class T> INLINE void run_statistics(const T* run, int64_t n, double& mean, double& squares) {
  vec<T> total = {};
  over<T>(n, [&](int64_t p, int count) { total += load_some<T>(run + p, count); });
  const T center = T(double(sum<T>(total)) / double(n));
  vec<T> square = {}, rest = {};
  over<T>(n, [&](int64_t p, int count) {
    vec<T> deviation = load_some<T>(run + p, count) - center;
    for (int i = count; i < Simd<T>::width; i++) deviation[i] = 0;
    square += deviation * deviation;
    rest += deviation;
  });
  const double left = double(sum<T>(rest)) / double(n);  // the center was rounded
  mean = double(center) + left;
  squares = double(sum<T>(square)) - left * left * double(n);
}

template <class T>
void chain_forward(const ChainStage<T>& d, const ChainBand& b, T* scratch, T* z, double* mean,
                   double* squares) {
  ChainScratch<T> s(d, scratch);
  const int64_t plane = d.H * d.W;
  T* to = z + b.n * d.K * plane + b.out0 * d.W;
  chain_rows(d, s, b.n, b.out0, b.out1, b.in0, b.in1, to, plane, d.W);
  for (int64_t k = 0; k < d.K && mean; k++)
    run_statistics(to + k * plane, (b.out1 - b.out0) * d.W, mean[k], squares[k]);
}

template <class T> double chain_loss(const ChainStage<T>& d, const ChainBand& b, T* scratch) {
  ChainScratch<T> s(d, scratch);
  chain_rows(d, s, b.n, b.out0, b.out1, b.in0, b.in1, s.dz, d.out_rows * s.row, s.row);
  double total = 0;
  for (int64_t o = 0; o < 3; o++)
    for (int64_t Y = b.out0; Y < b.out1; Y++) {
      T* row = s.dz + (o * d.out_rows + Y - b.out0) * s.row;
      total += pixel_row(d, b.n, o, Y, d.W, true, s.line, row);
    }
  return total;
}

// ---- backward ----

// to[0..count) = the gradient in z, from element `at` of sample n's channel k on.
template <class T>
INLINE void gradient_run(const ChainStage<T>& d, int64_t n, int64_t k, int64_t at, int64_t count, T* to) {
  const int64_t offset = (n * d.K + k) * d.H * d.W + at;
  const T* dy = d.dy + offset;
  if (!d.z)
    return over<T>(count,
                   [&](int64_t p, int some) { store_some<T>(to + p, load_some<T>(dy + p, some), some); });
  const T* z = d.z + offset;
  const T mean = d.z_mean[k], center = d.z_center[k], slope = d.z_slope[k], scale = d.z_scale[k];
  over<T>(count, [&](int64_t p, int some) {
    vec<T> deviation = load_some<T>(z + p, some) - center;
    store_some<T>(to + p, (load_some<T>(dy + p, some) - mean - deviation * slope) * scale, some);
  });
}

// s.dz = the gradient in rows out0..out1 of z. d_bias += its sums over the rows that no other band counts.
template <class T>
INLINE void gradient_rows(const ChainStage<T>& d, const ChainScratch<T>& s, const ChainBand& b,
                          double* d_bias) {
  const int64_t plane = d.out_rows * s.row;
  if (d.loss) chain_rows(d, s, b.n, b.out0, b.out1, b.all0, b.all1, s.dz, plane, s.row);
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t Y = b.out0; Y < b.out1; Y++) {
      T* row = s.dz + k * plane + (Y - b.out0) * s.row;
      if (!d.loss) {
        gradient_run(d, b.n, k, Y * d.W, d.W, row);
        continue;
      }
      pixel_row(d, b.n, k, Y, d.W, false, s.line, row);
      if (d.rows.low[Y] < b.in0 || d.rows.low[Y] >= b.in1) continue;
      vec<T> total = {};
      over<T>(d.W, [&](int64_t X, int count) { total += load_some<T>(row + X, count); });
      d_bias[k] += double(sum<T>(total));
    }
}

// Rows in0..in1 of `expanded` = the transpose of chain_expand_rows, of s.dz.
template <class T>
INLINE void chain_gather_rows(const ChainStage<T>& d, const ChainScratch<T>& s, const ChainBand& b) {
  RowTakers<T> takers(d.rows, s.line);
  for (int64_t i = b.in0; i < b.in1; i++) {
    takers.move_to(d.rows, i);
    for (int64_t dy = 0; dy < d.side; dy++) {
      takers.find(d.rows, i, dy - d.side / 2, [&](int64_t Y) { return (Y - b.out0) * s.row; });
      for (int64_t k = 0; k < d.K; k++) {
        T* to = s.expanded + ((k * d.side + dy) * d.in_rows + i - b.in0) * s.row;
        takers.gather(s.dz + k * d.out_rows * s.row, s.row, to);
      }
    }
  }
}

// `taps` of rows r0..r1 = the transpose of chain_expand_columns.
template <class T>
INLINE void chain_gather_columns(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t r0, int64_t r1,
                                 int64_t first) {
  constexpr int64_t width = Simd<T>::width;
  const int64_t vectors = round_up(d.w, width) / width;
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t dy = 0; dy < d.side; dy++)
      for (int64_t dx = 0; dx < d.side; dx++) {
        const T* from = s.expanded + ((k * d.side + dy) * d.in_rows + r0 - first) * s.row;
        T* to = s.taps + ((dy * d.side + dx) * d.K + k) * s.pitch;
        const int32_t* band = d.gather_band + dx * vectors * 3;
        // From the last vector to the first: what a row's last vector writes over the next row is written
        // again.
        for (int64_t v = vectors - 1; v >= 0; v--)
          block_product<false>(r1 - r0, from, s.row, d.gather, band + 3 * v, to + v * width, d.w);
      }
}

// partial += the gradient of the weights, from `taps` and rows a (C, pixels) of the rectified x.
template <class T>
INLINE void chain_weight(const ChainStage<T>& d, const ChainScratch<T>& s, Matrix a, int64_t pixels,
                         T* partial) {
  int64_t rows, columns;
  weight_shape(d, rows, columns);
  const Matrix taps = {s.taps, dtype_as<T>, s.pitch, 1};
  pack_a<T>(d.weight_of_inputs ? a : taps, d.weight_of_inputs ? d.C : s.taps_rows, pixels, pixels,
            s.packed_a);
  pack_b<T>((d.weight_of_inputs ? taps : a).transposed(), pixels, d.weight_of_inputs ? s.taps_rows : d.C,
            pixels, s.packed_b);
  gemm<T>(rows, columns, pixels, s.packed_a, pixels, s.packed_b, pixels, partial, columns, NR<T>, true);
}

// s.da (C, pixels) = the gradient in the rectified rows.
template <class T>
INLINE void chain_inputs(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t pixels) {
  pack_b<T>({s.taps, dtype_as<T>, s.pitch, 1}, s.taps_rows, pixels, s.taps_rows, s.packed_b);
  gemm<T>(round_up(d.C, MR), round_up(pixels, NR<T>), s.taps_rows, d.weight_backward, s.taps_rows, s.packed_b,
          s.taps_rows, s.da, s.pitch, NR<T>, false);
}

// Write rows r0..r1 of the gradient in the normalised x to a contiguous map; sums (2, C) += dy and dy xhat.
template <class T>
INLINE void mask_inputs(const ChainStage<T>& d, const ChainScratch<T>& s, int64_t n, int64_t r0, int64_t r1,
                        T* dx, double* sums) {
  for (int64_t c = 0; c < d.C; c++) {
    const int64_t offset = (n * d.C + c) * d.h * d.w + r0 * d.w;
    const T *x = (const T*)d.x.data + offset, *da = s.da + c * s.pitch;
    const T center = d.center[c], scale = d.scale[c], shift = d.shift[c];
    vec<T> total = {}, product = {}, zero = {};
    over<T>((r1 - r0) * d.w, [&](int64_t p, int count) {
      vec<T> deviation = load_some<T>(x + p, count) - center, y = deviation * scale + shift;
      vec<T> g = y > zero ? load_some<T>(da + p, count) : zero;
      total += g;
      product += g * deviation;
      store_some<T>(dx + offset + p, g, count);
    });
    sums[c] += double(sum<T>(total));
    sums[d.C + c] += double(sum<T>(product)) * double(d.inverse_std[c]);
  }
}

template <class T>
void chain_backward(const ChainStage<T>& d, const ChainBand& b, T* scratch, const Maps* dx, double* sums,
                    double* d_bias, T* weight_partial) {
  ChainScratch<T> s(d, scratch);
  if (!d.plain) {
    gradient_rows(d, s, b, d_bias);
    chain_gather_rows(d, s, b);
  }
  for (int64_t r0 = b.in0; r0 < b.in1; r0 += d.chunk) {
    const int64_t r1 = r0 + d.chunk < b.in1 ? r0 + d.chunk : b.in1, pixels = (r1 - r0) * d.w;
    if (d.plain)
      for (int64_t k = 0; k < d.K; k++) gradient_run(d, b.n, k, r0 * d.w, pixels, s.taps + k * s.pitch);
    else
      chain_gather_columns(d, s, r0, r1, b.in0);
    if (weight_partial) chain_weight(d, s, rectified(d, s, b.n, r0, r1), pixels, weight_partial);
    if (!dx) continue;
    chain_inputs(d, s, pixels);
    if (d.norm)
      mask_inputs(d, s, b.n, r0, r1, (T*)dx->data, sums);
    else
      write_maps<T>(from_row(*dx, r0), b.n, d.C, r1 - r0, d.w, s.da, s.pitch, d.w);
  }
}

}  // namespace infopro::INFOPRO_ISA
