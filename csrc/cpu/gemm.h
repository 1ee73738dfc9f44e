// c = a b of packed operands, in one thread, after Goto & van de Geijn (2008): a register tile of MR x NR
// accumulators, a panel of b (depth KC) in the L1 cache, a block of a in the L2 cache.
#pragma once

#include "../kernels.h"
#include "convert.h"
#include "simd.h"

namespace infopro::INFOPRO_ISA {

constexpr int MR = INFOPRO_MR, VECTORS = 2;
template <class T> constexpr int NR = VECTORS * Simd<T>::width;
constexpr int64_t KC = 256, MC = 16 * MR;

// packed[panel][k][r] = m(panel * R + r, k), zero behind the last row.
template <int R, class T, class S>
INLINE void pack_panels(const S* m, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t depth,
                        T* packed) {
  for (int64_t first = 0; first < rows; first += R, packed += depth * R) {
    int64_t present = rows - first < R ? rows - first : R;
    const S* from = m + first * row;
    if (present == R && row == 1) {
      for (int64_t k = 0; k < columns; k++)
        for (int r = 0; r < R; r++) packed[k * R + r] = widen<T>(from[k * column + r]);
      continue;
    }
    if constexpr (__is_same(T, S)) {
      if (present == R && column == 1) {
        if constexpr (R < Simd<T>::width)
          transpose_panel<R>(from, row, columns, packed);
        else
          transpose<T>(from, row, R, columns, packed, R);
        continue;
      }
    }
    for (int r = 0; r < R; r++)
      for (int64_t k = 0; k < columns; k++)
        packed[k * R + r] = r < present ? widen<T>(from[r * row + k * column]) : T(0);
  }
}

template <int R, class T>
INLINE void pack(Matrix m, int64_t rows, int64_t columns, int64_t depth, T* packed) {
  typed(m.data, m.dtype,
        [&](auto* data) { pack_panels<R>(data, m.row, m.column, rows, columns, depth, packed); });
}

template <class T> void pack_a(Matrix a, int64_t m, int64_t k, int64_t depth, T* packed) {
  pack<MR>(a, m, k, depth, packed);
}

template <class T> void pack_b(Matrix b, int64_t k, int64_t n, int64_t depth, T* packed) {
  pack<NR<T>>(b.transposed(), n, k, depth, packed);
}

// One register tile: c[MR][NR] (+)= sum_k a[k][MR] b[k][NR]. Adding the sums of blocks of k rounds less than
// one long sum.
template <class T> INLINE void tile(int64_t k, const T* a, const T* b, T* c, int64_t ldc, bool accumulate) {
  vec<T> acc[MR][VECTORS];
  UNROLL(16) for (int i = 0; i < MR; i++)
    UNROLL(2) for (int j = 0; j < VECTORS; j++) acc[i][j] = vec<T>{};
  for (; k; k--, a += MR, b += NR<T>) {
    vec<T> b0 = load<T>(b), b1 = load<T>(b + Simd<T>::width);
    UNROLL(16) for (int i = 0; i < MR; i++) {
      vec<T> s = splat<T>(a[i]);
      acc[i][0] += s * b0;
      acc[i][1] += s * b1;
    }
  }
  UNROLL(16) for (int i = 0; i < MR; i++)
    UNROLL(2) for (int j = 0; j < VECTORS; j++) {
      T* to = c + i * ldc + j * Simd<T>::width;
      store<T>(to, accumulate ? load<T>(to) + acc[i][j] : acc[i][j]);
    }
}

// A tile that reaches over the edge of c, through a buffer.
template <class T>
void edge_tile(int64_t k, const T* a, const T* b, T* c, int64_t ldc, bool accumulate, int64_t rows,
               int64_t columns) {
  T buffer[MR * NR<T>];
  tile<T>(k, a, b, buffer, NR<T>, false);
  for (int64_t i = 0; i < rows; i++) {
    const T* from = buffer + i * NR<T>;
    T* to = c + i * ldc;
    int64_t j = 0;
    for (; j + Simd<T>::width <= columns; j += Simd<T>::width) {
      vec<T> v = load<T>(from + j);
      store<T>(to + j, accumulate ? v + load<T>(to + j) : v);
    }
    for (; j < columns; j++) to[j] = from[j] + (accumulate ? to[j] : T(0));
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_depth, const T* b, int64_t b_depth, T* c,
          int64_t ldc, int64_t c_panel, bool accumulate) {
  for (int64_t k0 = 0; k0 < k; k0 += KC) {
    int64_t depth = k - k0 < KC ? k - k0 : KC;
    bool add = accumulate || k0 > 0;
    for (int64_t m0 = 0; m0 < m; m0 += MC)
      for (int64_t j = 0; j < n; j += NR<T>)
        for (int64_t i = m0; i < m && i < m0 + MC; i += MR) {
          const T *ap = a + i * a_depth + k0 * MR, *bp = b + j * b_depth + k0 * NR<T>;
          T* cp = c + i * ldc + j / NR<T> * c_panel;
          if (i + MR <= m && j + NR<T> <= n)
            tile<T>(depth, ap, bp, cp, ldc, add);
          else
            edge_tile<T>(depth, ap, bp, cp, ldc, add, m - i < MR ? m - i : MR, n - j < NR<T> ? n - j : NR<T>);
        }
  }
}

template <class T> void write_lanes(const T* from, int64_t rows, int64_t columns, Matrix to) {
  constexpr int64_t chunk = 64;
  T block[NR<T> * chunk];
  for (int64_t c0 = 0; c0 < columns; c0 += chunk) {
    int64_t n = columns - c0 < chunk ? columns - c0 : chunk;
    transpose<T>(from + c0 * NR<T>, NR<T>, n, rows, block, chunk);
    for (int64_t r = 0; r < rows; r++)
      write_row<T>((void*)to.data, block + r * chunk, to.dtype, r * to.row + c0 * to.column, to.column, n);
  }
}

}  // namespace infopro::INFOPRO_ISA
