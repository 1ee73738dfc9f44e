// What the threads of a block share: the call, the tile at hand, and where the parts of shared memory lie.
#pragma once

#include "pixel.cuh"
#include "reconstruction_loss_plan.cuh"
#include "sums.cuh"

namespace infopro::gpu {

// Parameters as float32, in the order that the kernels read them; written by decoder_prepare_kernel.
struct Parameters {
  float* w1_by_channel;  // (C, K or more, 12): for a channel and a hidden channel its nine taps, where the convolution is direct a
                         // column of three in each float4; zeros behind K
  float* w1_by_tap;      // (9 K, round_up(C, 4)): row 9 k + tap; zeros behind C
  float* w2;             // (K, 28): 9 o + tap
  float *b1, *b2;        // (K), (4)
  float *gamma, *beta;   // (K)
  float* norm;           // (6, K), see Norm; written by decoder_norm_kernel or decoder_norm_backward_kernel
  Cell *rows, *columns;  // (H), (W)
};

// dev = z - center is what the planes hold, y = dev scale + shift the normalised map, a = relu(y).
enum Norm { START, SCALE, SHIFT, INVERSE_STD, MEAN_DY, SLOPE };  // START: b1 - center, or b1 while there is no center yet

// Everything a kernel needs to know of a call.
struct Call {
  Shape s;
  Plan p;
  Parameters w;
  Maps features;
  Target target;
  Pixel pixel;
  float pixel_weight;              // 1 / (3 N H W)
  const float* upstream;           // the gradient of the loss, or null: 1

  __host__ __device__ int tiles() const { return s.N * p.tiles(); }
  __host__ __device__ int hidden_rows() const { return p.low_resolution ? s.K : round_up(s.K, HIDDEN); }
};

// A tile of sample n. Plane position (1, 1) is pixel (y0, x0), the first of h x w owned ones; `rows` x `columns` positions from
// (top, left) on lie in the image. features: low_h x low_w from (low_y, low_x) on.
struct Tile {
  int64_t n;
  int y0, x0, h, w, top, left, rows, columns, low_y, low_x, low_h, low_w;

  __device__ __forceinline__ Tile(const Call& d, int index) {
    const int tile = index % d.p.tiles();
    n = index / d.p.tiles();
    y0 = tile / d.p.tiles_x * d.p.tile_h, x0 = tile % d.p.tiles_x * d.p.tile_w;
    h = smaller(d.p.tile_h, d.s.H - y0), w = smaller(d.p.tile_w, d.s.W - x0);
    top = y0 == 0, left = x0 == 0;
    rows = smaller(y0 + h + 1, d.s.H) - (y0 - 1 + top), columns = smaller(x0 + w + 1, d.s.W) - (x0 - 1 + left);
    low_y = d.w.rows[larger(y0 - 2, 0)].low, low_x = d.w.columns[larger(x0 - 2, 0)].low;
    low_h = high(d.w.rows[smaller(y0 + h + 1, d.s.H - 1)]) - low_y + 1;
    low_w = high(d.w.columns[smaller(x0 + w + 1, d.s.W - 1)]) - low_x + 1;
  }

  __device__ __forceinline__ int quads() const { return ceil_div(low_h * low_w, 4); }  // of a staged channel
};

// Shared memory. rows[r], columns[c]: the cells of resized row y0 - 2 + r, column x0 - 2 + c, `low` counted from the tile's features on.
struct Shared {
  float *z, *taps, *scratch, *late, *w2, *norm, *sums;
  Cell *rows, *columns;
  int *row_range, *column_range;

  __device__ __forceinline__ Shared(const Call& d, float* memory) {
    auto take = [&](int n) { float* p = memory; memory += n; return p; };
    z = take(d.s.K * d.p.plane);
    taps = take(d.p.taps);
    scratch = take(d.p.scratch);
    late = take(d.p.late);
    if (d.p.late == 0) late = z;
    w2 = take(round_up(d.s.K * W2_ROW + 6 * d.s.K, 4));
    norm = w2 + d.s.K * W2_ROW;
    rows = reinterpret_cast<Cell*>(take(round_up(2 * (d.p.tile_h + 4 + d.p.tile_w + 4) + 2 * (d.p.low_h + d.p.low_w), 4)));
    columns = rows + d.p.tile_h + 4;
    row_range = reinterpret_cast<int*>(columns + d.p.tile_w + 4);
    column_range = row_range + 2 * d.p.low_h;
    sums = memory;
  }

  __device__ __forceinline__ float* logits(const Call& d) const { return d.p.low_resolution ? taps : scratch; }
  __device__ __forceinline__ float* w2_sums(const Call& d) const { return logits(d) + 3 * d.p.wide_plane; }
  __device__ __forceinline__ int sums_row(const Call& d) const { return round_up(2 * d.s.K + 4, 4); }
};

// Weights of the second convolution and coefficients of the norm, once for all tiles of a block.
__device__ __forceinline__ void load_constants(const Call& d, const Shared& s) {
  for (int i = threadIdx.x; i < d.s.K * W2_ROW; i += THREADS) s.w2[i] = d.w.w2[i];
  for (int i = threadIdx.x; i < 6 * d.s.K; i += THREADS) s.norm[i] = d.w.norm[i];
}

__device__ __forceinline__ void load_axis(const Cell* table, int out, int first, int n, int low, Cell* to, int thread) {
  for (int i = thread; i < n; i += THREADS) {
    const int p = first + i;
    const bool inside = p >= 0 && p < out;
    Cell c = inside ? table[p] : Cell{-1, 0.0f};
    if (inside) c.low -= low;
    to[i] = c;
  }
}

__device__ __forceinline__ void load_cells(const Call& d, const Shared& s, const Tile& t) {
  load_axis(d.w.rows, d.s.H, t.y0 - 2, t.h + 4, t.low_y, s.rows, threadIdx.x);
  load_axis(d.w.columns, d.s.W, t.x0 - 2, t.w + 4, t.low_x, s.columns, THREADS - 1 - int(threadIdx.x));
}

// Set what of the planes of z lies outside the image.
template <class F>
__device__ __forceinline__ void fill_border(const Call& d, const Shared& s, const Tile& t, F value) {
  const int rows = d.p.plane / d.p.pitch;
  for (int unit = threadIdx.x; unit < d.s.K * rows; unit += THREADS) {
    const int k = unit / rows, y = unit % rows;
    const bool outside = y < t.top || y >= t.top + t.rows;
    float* row = s.z + k * d.p.plane + y * d.p.pitch;
    const float fill = value(k);
    for (int x = 0; x < t.left; x++) row[x] = fill;
    for (int x = outside ? t.left : t.left + t.columns; x < d.p.pitch; x++) row[x] = fill;
  }
}

// sums[t] of inputs 0 and 1 += gradient[o] * input shifted by the tap: the gradient of a 3x3 convolution's weights, t = 9 o + tap, over
// rows [first, last) of the calling warp's columns, one a lane. input(i, y, dx) and gradient(o, y) give 0 where a lane has no column.
template <class I, class G>
__device__ __forceinline__ void correlate(int first, int last, I input, G gradient, float (&sums)[2][WARP]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int t = 0; t < WARP; t++) sums[i][t] = 0.0f;
  if (first >= last) return;
  float window[2][3][3];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int x = 0; x < 3; x++) window[i][1][x] = input(i, first - 1, x), window[i][2][x] = input(i, first, x);
#pragma unroll 1
  for (int y = first; y < last; y++) {
    float g[3];
#pragma unroll
    for (int o = 0; o < 3; o++) g[o] = gradient(o, y);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int x = 0; x < 3; x++) {
        window[i][0][x] = window[i][1][x], window[i][1][x] = window[i][2][x];
        window[i][2][x] = input(i, y + 1, x);
      }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int o = 0; o < 3; o++)
#pragma unroll
        for (int tap = 0; tap < 9; tap++) sums[i][9 * o + tap] += g[o] * window[i][tap / 3][tap % 3];
  }
}

}  // namespace infopro::gpu
