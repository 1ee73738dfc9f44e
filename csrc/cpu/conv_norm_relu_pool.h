// A 3x3 convolution, padded by 1 and of stride 1 or 2, before batch norm, ReLU and global average pooling,
// one sample at a time.
//
// A sample lies channels last, with a border of zero pixels. An output pixel is then the sum over taps and
// channels of a number of x times a row of weights. The gradient of an input pixel is such a sum over the
// gradients of z. The gradient of the weights is the sum over pixels of a number of x times a row of z's
// gradient.
//
// With stride 1, Winograd's F(2x2, 3x3) (Lavin and Gray, 2016) takes 4 products an output in place of 9. For
// tiles of 2x2 outputs and 4x4 inputs x,
//     out = A^T [sum over channels of (G w G^T) * (B^T x B)] A
// whose 16 products a channel are 16 matrix products, (tiles, C) by (C, K). The gradients are the transpose,
// with dm = A dout A^T:
//     dx = B [sum over channels of (G w G^T) * dm] B^T        dw = G^T [sum over tiles of dm * (B^T x B)] G
#pragma once

#include "norm_relu_pool.h"

namespace infopro::INFOPRO_ISA {

constexpr int TILE_PIXELS = INFOPRO_MR == 12 ? 8 : 4;  // times VECTORS accumulators

constexpr int CELLS = 16;  // products of a Winograd tile

// to[0..4) = G times w[0..3), both `row` apart.
INLINE void spread_taps(const double* w, int64_t row, double* to, int64_t to_row) {
  const double ends = w[0] + w[2 * row], middle = w[row];
  to[0] = w[0], to[to_row] = (ends + middle) / 2, to[2 * to_row] = (ends - middle) / 2,
  to[3 * to_row] = w[2 * row];
}

// w[0..3) = G^T times v[0..4).
INLINE void gather_taps(const double* v, int64_t row, double* w, int64_t w_row) {
  const double sum = (v[row] + v[2 * row]) / 2;
  w[0] = v[0] + sum, w[w_row] = (v[row] - v[2 * row]) / 2, w[2 * w_row] = sum + v[3 * row];
}

// The layout of a thread's scratch; channels in whole vectors, x and z with a border.
template <class T> struct ConvScratch {
  int64_t C, K, x_row, z_row;  // channels of x and of z; elements of a row of pixels
  int64_t across, tiles;       // Winograd tiles in a row and in all; 0 with stride 2
  T *x, *z, *dx;  // (h + 2, w + 2, C), one row or column more if h or w is odd; (H + 2, W + 2, K); (h, w, C)
  T *in, *out;    // (CELLS, tiles, C), (CELLS, tiles, K)
  T* end;

  ConvScratch(const ConvPool<T>& d, T* memory) {
    constexpr int width = Simd<T>::width;
    C = round_up(d.C, width);
    K = round_up(d.K, width);
    across = d.stride == 1 ? (d.W + 1) / 2 : 0;
    tiles = across * ((d.H + 1) / 2);
    x_row = (d.w + 2 + d.w % 2) * C;  // tiles reach one pixel further if a side is odd
    z_row = (d.W + 2) * K;
    auto take = [&](int64_t n) { T* p = memory; memory += round_up(n, width); return p; };
    x = take((d.h + 2 + d.h % 2) * x_row);
    z = take((d.H + 2) * z_row);
    dx = take(d.stride == 1 ? 0 : d.h * d.w * C);
    in = take(CELLS * tiles * C);
    out = take(CELLS * tiles * K);
    end = memory;
  }
};

template <class T> int64_t conv_pool_scratch(const ConvPool<T>& d) {
  ConvScratch<T> s(d, nullptr);
  return s.end - (T*)nullptr;
}

// Weights of a pair of channels: the taps, or the cells of Winograd's transform.
template <class T> INLINE int64_t rows_of_weights(const ConvPool<T>& d) { return d.stride == 1 ? CELLS : 9; }

// Elements of the packed weights, forward or backward, and of a thread's part of their gradient.
template <class T> int64_t conv_pool_weights(const ConvPool<T>& d) {
  const ConvScratch<T> s(d, nullptr);
  return rows_of_weights(d) * (d.C * s.K > d.K * s.C ? d.C * s.K : d.K * s.C);
}

// Pack weight (K, C, 3, 3), of T, as [tap or cell][C][K in whole vectors], and for backward as [tap or
// cell][K][C in whole vectors]. Either may be null; both start as zeros.
template <class T>
void conv_pool_pack(const ConvPool<T>& d, const Maps& weight, T* packed, T* packed_backward) {
  const ConvScratch<T> s(d, nullptr);
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t c = 0; c < d.C; c++) {
      const T* from = (const T*)weight.data + k * weight.n + c * weight.c;
      double taps[9], rows[12], cells[CELLS];
      for (int t = 0; t < 9; t++) taps[t] = double(from[t / 3 * weight.y + t % 3 * weight.x]);
      if (d.stride == 1) {
        for (int j = 0; j < 3; j++) spread_taps(taps + j, 3, rows + j, 3);
        for (int i = 0; i < 4; i++) spread_taps(rows + 3 * i, 1, cells + 4 * i, 1);
      }
      const double* all = d.stride == 1 ? cells : taps;
      for (int64_t t = 0; t < rows_of_weights(d); t++) {
        if (packed) packed[(t * d.C + c) * s.K + k] = T(all[t]);
        if (packed_backward) packed_backward[(t * d.K + k) * s.C + c] = T(all[t]);
      }
    }
}

// The taps of a row of pixels: the first pixel that each reads, and its rows of weights.
template <class T> struct Taps {
  int n = 0;
  const T *from[9], *weight[9];

  INLINE void add(const T* f, const T* w) { from[n] = f, weight[n++] = w; }
};

// out[r * out_step ...] in V vectors = sum over taps and c < depth of from[tap][r * step + c] weight[tap][c *
// row ...], for r < R.
template <int R, int V, class T>
INLINE void pixel_tile(const Taps<T>& taps, int64_t first, int64_t step, int64_t depth, int64_t row,
                       int64_t column, T* out, int64_t out_step) {
  vec<T> acc[R][V];
  UNROLL(8) for (int r = 0; r < R; r++)
    UNROLL(2) for (int v = 0; v < V; v++) acc[r][v] = vec<T>{};
  for (int t = 0; t < taps.n; t++) {
    const T *from = taps.from[t] + first * step, *weight = taps.weight[t] + column;
    for (int64_t c = 0; c < depth; c++, weight += row) {
      vec<T> w[V];
      UNROLL(2) for (int v = 0; v < V; v++) {
        w[v] = load<T>(weight + v * Simd<T>::width);
        hold(w[v]);
      }
      UNROLL(8) for (int r = 0; r < R; r++) {
        vec<T> x = splat<T>(from[r * step + c]);
        UNROLL(2) for (int v = 0; v < V; v++) acc[r][v] += x * w[v];
      }
    }
  }
  UNROLL(8)
  for (int r = 0; r < R; r++) UNROLL(2) for (int v = 0; v < V; v++)
      store<T>(out + (first + r) * out_step + column + v * Simd<T>::width, acc[r][v]);
}

template <int V, class T>
INLINE void pixel_columns(const Taps<T>& taps, int64_t pixels, int64_t step, int64_t depth, int64_t row,
                          int64_t column, T* out, int64_t out_step) {
  int64_t p = 0;
  for (; p + TILE_PIXELS <= pixels; p += TILE_PIXELS)
    pixel_tile<TILE_PIXELS, V>(taps, p, step, depth, row, column, out, out_step);
  for (; p + 2 <= pixels; p += 2) pixel_tile<2, V>(taps, p, step, depth, row, column, out, out_step);
  if (p < pixels) pixel_tile<1, V>(taps, p, step, depth, row, column, out, out_step);
}

// A row of outputs, `pixels` pixels of `row` channels (whole vectors), out_step apart, from pixels `step`
// apart.
template <class T>
void pixel_row(const Taps<T>& taps, int64_t pixels, int64_t step, int64_t depth, int64_t row, T* out,
               int64_t out_step) {
  constexpr int width = Simd<T>::width;
  int64_t column = 0;
  for (; column + VECTORS * width <= row; column += VECTORS * width)
    pixel_columns<VECTORS>(taps, pixels, step, depth, row, column, out, out_step);
  if (column < row) pixel_columns<1>(taps, pixels, step, depth, row, column, out, out_step);
}

template <class T> INLINE void clear_pixels(const ConvPool<T>& d, const ConvScratch<T>& s) {
  for (T* p = s.x; p < s.x + (d.h + 2 + d.h % 2) * s.x_row; p++) *p = T(0);
}

// Whether a row of maps lies as the scratch holds it.
template <class T> INLINE bool whole_pixels(const ConvPool<T>& d, const ConvScratch<T>& s, const Maps& m) {
  return d.C == s.C && m.c == 1 && m.x == d.C;
}

// Read sample n of x, with any strides, into s.x inside its border, which stays zero.
template <class T> INLINE void read_pixels(const ConvPool<T>& d, const ConvScratch<T>& s, int64_t n) {
  for (int64_t y = 0; y < d.h; y++) {
    const T* from = (const T*)d.x.data + n * d.x.n + y * d.x.y;
    T* to = s.x + (y + 1) * s.x_row + s.C;
    if (whole_pixels(d, s, d.x))
      for (int64_t i = 0; i < d.w * s.C; i++) to[i] = from[i];
    else if (d.x.x == 1)
      transpose(from, d.x.c, d.C, d.w, to, s.C);
    else
      for (int64_t x = 0; x < d.w; x++)
        for (int64_t c = 0; c < d.C; c++) to[x * s.C + c] = from[x * d.x.x + c * d.x.c];
  }
}

// Write the gradient in sample n of x from rows of pixels `row` apart.
template <class T>
INLINE void write_pixels(const ConvPool<T>& d, const ConvScratch<T>& s, int64_t n, const T* from,
                         int64_t row) {
  for (int64_t y = 0; y < d.h; y++, from += row) {
    T* to = (T*)d.dx.data + n * d.dx.n + y * d.dx.y;
    if (whole_pixels(d, s, d.dx))
      for (int64_t i = 0; i < d.w * s.C; i++) to[i] = from[i];
    else if (d.dx.x == 1)
      transpose(from, s.C, d.w, d.C, to, d.dx.c);
    else
      for (int64_t x = 0; x < d.w; x++)
        for (int64_t c = 0; c < d.C; c++) to[x * d.dx.x + c * d.dx.c] = from[x * s.C + c];
  }
}

// ---- Winograd's transforms, of vectors of channels ----

// v = B^T v B.
template <class T> INLINE void spread_square(vec<T> v[4][4]) {
  UNROLL(4) for (int j = 0; j < 4; j++) {
    vec<T> p1 = v[1][j], p2 = v[2][j];
    v[0][j] -= p2, v[3][j] = p1 - v[3][j];
    v[1][j] = p1 + p2, v[2][j] = p2 - p1;
  }
  UNROLL(4) for (int i = 0; i < 4; i++) {
    vec<T> p1 = v[i][1], p2 = v[i][2];
    v[i][0] -= p2, v[i][3] = p1 - v[i][3];
    v[i][1] = p1 + p2, v[i][2] = p2 - p1;
  }
}

// v = B v B^T.
template <class T> INLINE void gather_square(vec<T> v[4][4]) {
  UNROLL(4) for (int j = 0; j < 4; j++) {
    vec<T> v0 = v[0][j], v1 = v[1][j], v2 = v[2][j], v3 = v[3][j];
    v[1][j] = v1 - v2 + v3, v[2][j] = v1 + v2 - v0, v[3][j] = -v3;
  }
  UNROLL(4) for (int i = 0; i < 4; i++) {
    vec<T> v0 = v[i][0], v1 = v[i][1], v2 = v[i][2], v3 = v[i][3];
    v[i][1] = v1 - v2 + v3, v[i][2] = v1 + v2 - v0, v[i][3] = -v3;
  }
}

// work(tile, its row, its column) for every tile
template <class T, class F> INLINE void for_tiles(const ConvScratch<T>& s, F work) {
  for (int64_t t = 0, y = 0, x = 0; t < s.tiles; t++) {
    work(t, y, x);
    if (++x == s.across) x = 0, y++;
  }
}

// s.in = B^T x B of every tile of x.
template <class T> INLINE void spread_input(const ConvScratch<T>& s) {
  const int64_t cell = s.tiles * s.C;
  for_tiles(s, [&](int64_t t, int64_t y, int64_t x) {
    for (int64_t c = 0; c < s.C; c += Simd<T>::width) {
      const T* from = s.x + 2 * y * s.x_row + 2 * x * s.C + c;
      T* to = s.in + t * s.C + c;
      vec<T> v[4][4];
      UNROLL(16) for (int i = 0; i < 16; i++) v[i / 4][i % 4] = load<T>(from + i / 4 * s.x_row + i % 4 * s.C);
      spread_square<T>(v);
      UNROLL(16) for (int i = 0; i < 16; i++) store<T>(to + i * cell, v[i / 4][i % 4]);
    }
  });
}

// s.x, inside its border, = the sum of B s.in B^T over the tiles.
template <class T> INLINE void gather_input(const ConvPool<T>& d, const ConvScratch<T>& s) {
  const int64_t cell = s.tiles * s.C;
  clear_pixels(d, s);
  for_tiles(s, [&](int64_t t, int64_t y, int64_t x) {
    for (int64_t c = 0; c < s.C; c += Simd<T>::width) {
      const T* from = s.in + t * s.C + c;
      T* to = s.x + 2 * y * s.x_row + 2 * x * s.C + c;
      vec<T> v[4][4];
      UNROLL(16) for (int i = 0; i < 16; i++) v[i / 4][i % 4] = load<T>(from + i * cell);
      gather_square<T>(v);
      UNROLL(16) for (int i = 0; i < 16; i++) {
        T* at = to + i / 4 * s.x_row + i % 4 * s.C;
        store<T>(at, load<T>(at) + v[i / 4][i % 4]);
      }
    }
  });
}

// z (H, W, K) = A^T s.out A of every tile.
template <class T> INLINE void collect_output(const ConvPool<T>& d, const ConvScratch<T>& s, T* z) {
  const int64_t cell = s.tiles * s.K;
  for_tiles(s, [&](int64_t t, int64_t y, int64_t x) {
    for (int64_t k = 0; k < s.K; k += Simd<T>::width) {
      const T* from = s.out + t * s.K + k;
      vec<T> rows[2][4];
      UNROLL(4) for (int j = 0; j < 4; j++) {
        vec<T> m1 = load<T>(from + (4 + j) * cell), m2 = load<T>(from + (8 + j) * cell);
        rows[0][j] = load<T>(from + j * cell) + m1 + m2;
        rows[1][j] = m1 - m2 - load<T>(from + (12 + j) * cell);
      }
      for (int i = 0; i < 2 && 2 * y + i < d.H; i++) {
        T* to = z + ((2 * y + i) * d.W + 2 * x) * s.K + k;
        store<T>(to, rows[i][0] + rows[i][1] + rows[i][2]);
        if (2 * x + 1 < d.W) store<T>(to + s.K, rows[i][1] - rows[i][2] - rows[i][3]);
      }
    }
  });
}

// s.out = A dz A^T of every tile of the gradient in z, s.z inside its border.
template <class T> INLINE void spread_output(const ConvScratch<T>& s) {
  const int64_t cell = s.tiles * s.K;
  for_tiles(s, [&](int64_t t, int64_t y, int64_t x) {
    for (int64_t k = 0; k < s.K; k += Simd<T>::width) {
      const T* from = s.z + (2 * y + 1) * s.z_row + (2 * x + 1) * s.K + k;
      T* to = s.out + t * s.K + k;
      vec<T> rows[4][2];
      UNROLL(2) for (int j = 0; j < 2; j++) {
        vec<T> d0 = load<T>(from + j * s.K), d1 = load<T>(from + s.z_row + j * s.K);
        rows[0][j] = d0, rows[1][j] = d0 + d1, rows[2][j] = d0 - d1, rows[3][j] = -d1;
      }
      UNROLL(4) for (int i = 0; i < 4; i++) {
        store<T>(to + 4 * i * cell, rows[i][0]);
        store<T>(to + (4 * i + 1) * cell, rows[i][0] + rows[i][1]);
        store<T>(to + (4 * i + 2) * cell, rows[i][0] - rows[i][1]);
        store<T>(to + (4 * i + 3) * cell, -rows[i][1]);
      }
    }
  });
}

// ---- the sweeps ----

// z (H, W, K) from s.x
template <class T> INLINE void convolve_pixels(const ConvPool<T>& d, const ConvScratch<T>& s, T* z) {
  if (d.stride == 1) {
    spread_input(s);
    for (int f = 0; f < CELLS; f++) {
      Taps<T> cell;
      cell.add(s.in + f * s.tiles * s.C, d.weight + f * d.C * s.K);
      pixel_row(cell, s.tiles, s.C, d.C, s.K, s.out + f * s.tiles * s.K, s.K);
    }
    return collect_output(d, s, z);
  }
  for (int64_t y = 0; y < d.H; y++) {
    Taps<T> taps;
    for (int t = 0; t < 9; t++)
      taps.add(s.x + (2 * y + t / 3) * s.x_row + t % 3 * s.C, d.weight + t * d.C * s.K);
    pixel_row(taps, d.W, 2 * s.C, d.C, s.K, z + y * d.W * s.K, s.K);
  }
}

// z of sample n, channels last. Unless `mean` is null: the mean of each channel, and the sum of squared
// deviations from it.
template <class T>
void conv_pool_forward(const ConvPool<T>& d, int64_t n, T* scratch, double* mean, double* squares) {
  const ConvScratch<T> s(d, scratch);
  read_pixels(d, s, n);
  T *to = d.z + n * d.H * d.W * d.K, *z = d.K == s.K ? to : s.z;
  convolve_pixels(d, s, z);
  if (mean) pixel_statistics(z, d.H * d.W, s.K, d.K, mean, squares);
  for (int64_t p = 0; z != to && p < d.H * d.W; p++)
    for (int64_t k = 0; k < d.K; k++) to[p * d.K + k] = z[p * s.K + k];
}

// s.z = the gradient in z, as in norm_pool_backward, inside a border of zeros.
template <class T>
INLINE void output_gradient(const ConvPool<T>& d, const ConvScratch<T>& s, int64_t n, const T* upstream,
                            const T* mean_dy, const T* mean_dy_xhat) {
  constexpr int width = Simd<T>::width;
  for (int64_t k = 0; k < d.K; k += width) {
    const int left = d.K - k < width ? int(d.K - k) : width;
    const PixelGradient<T> gradient(d, k, left, d.H * d.W, upstream, mean_dy, mean_dy_xhat);
    for (int64_t y = 0; y < d.H; y++) {
      const T* from = d.z + ((n * d.H + y) * d.W) * d.K + k;
      T* to = s.z + (y + 1) * s.z_row + s.K + k;
      for (int64_t x = 0; x < d.W; x++)
        store<T>(to + x * s.K,
                 gradient(left < width ? load_first<T>(from + x * d.K, left) : load<T>(from + x * d.K)));
    }
  }
}

// sums[r][V vectors] += sum over `rows` rows of n pixels of x[r] times z; pixels are x_step and z_step apart.
template <int R, int V, class T>
INLINE void weight_tile(const T* x, int64_t x_step, const T* z, int64_t z_step, int64_t rows, int64_t x_row,
                        int64_t z_row, int64_t n, T* sums, int64_t sums_row) {
  vec<T> acc[R][V];
  UNROLL(8) for (int r = 0; r < R; r++)
    UNROLL(2) for (int v = 0; v < V; v++) acc[r][v] = vec<T>{};
  for (int64_t y = 0; y < rows; y++, x += x_row, z += z_row)
    for (int64_t p = 0; p < n; p++) {
      vec<T> g[V];
      UNROLL(2) for (int v = 0; v < V; v++) {
        g[v] = load<T>(z + p * z_step + v * Simd<T>::width);
        hold(g[v]);
      }
      UNROLL(8) for (int r = 0; r < R; r++) {
        vec<T> factor = splat<T>(x[p * x_step + r]);
        UNROLL(2) for (int v = 0; v < V; v++) acc[r][v] += factor * g[v];
      }
    }
  UNROLL(8) for (int r = 0; r < R; r++)
    UNROLL(2) for (int v = 0; v < V; v++) {
      T* to = sums + r * sums_row + v * Simd<T>::width;
      store<T>(to, load<T>(to) + acc[r][v]);
    }
}

// sums [C][K] += the gradient of one tap or cell, over `rows` rows of `n` pixels
template <int V, class T>
INLINE void weight_columns(const ConvPool<T>& d, const ConvScratch<T>& s, const T* x, int64_t x_step,
                           int64_t x_row, const T* z, int64_t rows, int64_t n, T* sums) {
  constexpr int R = TILE_PIXELS;
  int64_t c = 0;
  for (; c + R <= d.C; c += R)
    weight_tile<R, V>(x + c, x_step, z, s.K, rows, x_row, s.z_row, n, sums + c * s.K, s.K);
  for (; c < d.C; c++) weight_tile<1, V>(x + c, x_step, z, s.K, rows, x_row, s.z_row, n, sums + c * s.K, s.K);
}

template <class T>
INLINE void weight_sums(const ConvPool<T>& d, const ConvScratch<T>& s, const T* x, int64_t x_step,
                        int64_t x_row, const T* z, int64_t rows, int64_t n, T* sums) {
  constexpr int width = Simd<T>::width;
  int64_t k = 0;
  for (; k + VECTORS * width <= s.K; k += VECTORS * width)
    weight_columns<VECTORS>(d, s, x, x_step, x_row, z + k, rows, n, sums + k);
  if (k < s.K) weight_columns<1>(d, s, x, x_step, x_row, z + k, rows, n, sums + k);
}

constexpr int64_t TERMS_APART = 64;  // adding the sums of so many terms rounds less than one long sum

// partial [tap or cell][C][K] += the sample's gradient of the weights
template <class T>
INLINE void conv_weight_gradient(const ConvPool<T>& d, const ConvScratch<T>& s, T* partial) {
  if (d.stride == 1) {
    spread_input(s);
    for (int f = 0; f < CELLS; f++)
      for (int64_t t = 0; t < s.tiles; t += TERMS_APART) {
        const int64_t n = s.tiles - t < TERMS_APART ? s.tiles - t : TERMS_APART;
        weight_sums(d, s, s.in + (f * s.tiles + t) * s.C, s.C, 0, s.out + (f * s.tiles + t) * s.K, 1, n,
                    partial + f * d.C * s.K);
      }
    return;
  }
  const int64_t block = TERMS_APART / d.W > 0 ? TERMS_APART / d.W : 1;  // rows
  for (int64_t y = 0; y < d.H; y += block) {
    const int64_t rows = d.H - y < block ? d.H - y : block;
    for (int t = 0; t < 9; t++)
      weight_sums(d, s, s.x + (2 * y + t / 3) * s.x_row + t % 3 * s.C, 2 * s.C, 2 * s.x_row,
                  s.z + (y + 1) * s.z_row + s.K, rows, d.W, partial + t * d.C * s.K);
  }
}

// d.dx of sample n. With stride 2, pixels in even rows or columns of x meet other taps than pixels in odd
// ones.
template <class T> INLINE void input_gradient(const ConvPool<T>& d, const ConvScratch<T>& s, int64_t n) {
  if (d.stride == 1) {
    for (int f = 0; f < CELLS; f++) {
      Taps<T> cell;
      cell.add(s.out + f * s.tiles * s.K, d.weight + f * d.K * s.C);
      pixel_row(cell, s.tiles, s.K, d.K, s.C, s.in + f * s.tiles * s.C, s.C);
    }
    gather_input(d, s);
    return write_pixels(d, s, n, s.x + s.x_row + s.C, s.x_row);
  }
  const bool in_place = whole_pixels(d, s, d.dx) && d.dx.y == d.w * s.C;
  T* to = in_place ? (T*)d.dx.data + n * d.dx.n : s.dx;
  for (int64_t y = 0; y < d.h; y++)
    for (int64_t first = 0; first < 2 && first < d.w; first++) {
      Taps<T> taps;
      for (int t = 0; t < 9; t++) {
        const int64_t row = y + 1 - t / 3, column = first + 1 - t % 3;  // of z, times 2
        if (row % 2 || column % 2) continue;
        taps.add(s.z + (row / 2 + 1) * s.z_row + (column / 2 + 1) * s.K, d.weight + t * d.K * s.C);
      }
      pixel_row(taps, (d.w - first + 1) / 2, s.K, d.K, s.C, to + (y * d.w + first) * s.C, 2 * s.C);
    }
  if (!in_place) write_pixels(d, s, n, s.dx, d.w * s.C);
}

template <class T>
void conv_pool_backward(const ConvPool<T>& d, int64_t n, const T* upstream, const T* mean_dy,
                        const T* mean_dy_xhat, T* weight_partial, T* scratch) {
  const ConvScratch<T> s(d, scratch);
  output_gradient(d, s, n, upstream, mean_dy, mean_dy_xhat);
  if (d.stride == 1) spread_output(s);
  if (weight_partial) {
    if (d.stride == 1) clear_pixels(d, s);  // the previous sample's gradient reaches into the border
    read_pixels(d, s, n);
    conv_weight_gradient(d, s, weight_partial);
  }
  if (d.dx.data) input_gradient(d, s, n);
}

template <class T>
void conv_pool_weight_reduce(const ConvPool<T>& d, const T* partial, const Maps& d_weight) {
  const ConvScratch<T> s(d, nullptr);
  for (int64_t k = 0; k < d.K; k++)
    for (int64_t c = 0; c < d.C; c++) {
      const T* from = partial + c * s.K + k;
      const int64_t step = d.C * s.K;
      double taps[9], rows[12], cells[CELLS];
      if (d.stride == 1) {
        for (int f = 0; f < CELLS; f++) cells[f] = double(from[f * step]);
        for (int j = 0; j < 4; j++) gather_taps(cells + j, 4, rows + j, 4);
        for (int i = 0; i < 3; i++) gather_taps(rows + 4 * i, 1, taps + 3 * i, 1);
      } else {
        for (int t = 0; t < 9; t++) taps[t] = double(from[t * step]);
      }
      T* to = (T*)d_weight.data + k * d_weight.n + c * d_weight.c;
      for (int t = 0; t < 9; t++) to[t / 3 * d_weight.y + t % 3 * d_weight.x] += T(taps[t]);
    }
}

}  // namespace infopro::INFOPRO_ISA
