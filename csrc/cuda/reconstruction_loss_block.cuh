// What the threads of a block share: the call, the current tile, and the layout of shared memory.
#pragma once

#include "pixel.cuh"
#include "reconstruction_loss_norm.cuh"
#include "reconstruction_loss_plan.cuh"

namespace infopro::gpu {

// Parameters as float32, in the order that the kernels read them. decoder_prepare_kernel writes all but
// `norm`.
struct Parameters {
  // (C, K or more, 12): nine taps for each pair of channels, zeros behind K. For the direct convolution a
  // float4 holds a column of three taps.
  float* w1_by_channel;
  float* w1_by_tap;      // (9 K, round_up(C, 4)): row 9 k + tap; zeros behind C
  float* w2;             // (K, 28): 9 o + tap
  float* b2;             // (4)
  float* norm;           // (6, K), see Norm; by decoder_norm_kernel or decoder_norm_backward_kernel
  Cell *rows, *columns;  // (H), (W)
};

// A call, as kernels read it.
struct Call {
  Shape s;
  Plan p;
  Parameters w;
  Maps features;
  Target target;
  Pixel pixel;
  float pixel_weight;     // 1 / (3 N H W)
  const float* upstream;  // the gradient of the loss, or null: 1

  __host__ __device__ int tiles() const { return s.N * p.tiles(); }
  __host__ __device__ int hidden_rows() const { return p.low_resolution ? s.K : round_up(s.K, HIDDEN); }
};

// A tile of sample n. Position (1, 1) of its planes is pixel (y0, x0), the first of h x w owned pixels.
// `rows` x `columns` positions from (top, left) on lie in the image. The tile reads low_h x low_w features
// from (low_y, low_x) on.
struct Tile {
  int64_t n;
  int y0, x0, h, w, top, left, rows, columns, low_y, low_x, low_h, low_w;

  DEVICE Tile(const Call& d, int index) {
    const int tile = index % d.p.tiles();
    n = index / d.p.tiles();
    y0 = tile / d.p.tiles_x * d.p.tile_h, x0 = tile % d.p.tiles_x * d.p.tile_w;
    h = smaller(d.p.tile_h, d.s.H - y0), w = smaller(d.p.tile_w, d.s.W - x0);
    top = y0 == 0, left = x0 == 0;
    rows = smaller(y0 + h + 1, d.s.H) - (y0 - 1 + top),
    columns = smaller(x0 + w + 1, d.s.W) - (x0 - 1 + left);
    low_y = d.w.rows[larger(y0 - 2, 0)].low, low_x = d.w.columns[larger(x0 - 2, 0)].low;
    low_h = high(d.w.rows[smaller(y0 + h + 1, d.s.H - 1)]) - low_y + 1;
    low_w = high(d.w.columns[smaller(x0 + w + 1, d.s.W - 1)]) - low_x + 1;
  }

  DEVICE int quads() const { return ceil_div(low_h * low_w, 4); }  // of a staged channel
};

// Shared memory. rows[r] and columns[c] are the cells of resized row y0 - 2 + r and column x0 - 2 + c, with
// `low` counted from the tile's features on.
struct Shared {
  float *z, *taps, *scratch, *late, *w2, *norm, *sums;
  Cell *rows, *columns;
  int *row_range, *column_range;

  DEVICE Shared(const Call& d, float* memory) {
    auto take = [&](int n) { float* p = memory; memory += n; return p; };
    z = take(d.s.K * d.p.plane);
    taps = take(d.p.taps);
    scratch = take(d.p.scratch);
    late = take(d.p.late);
    if (d.p.late == 0) late = z;
    w2 = take(round_up(d.s.K * W2_ROW + 6 * d.s.K, 4));
    norm = w2 + d.s.K * W2_ROW;
    rows = reinterpret_cast<Cell*>(
        take(round_up(2 * (d.p.tile_h + 4 + d.p.tile_w + 4) + 2 * (d.p.low_h + d.p.low_w), 4)));
    columns = rows + d.p.tile_h + 4;
    row_range = reinterpret_cast<int*>(columns + d.p.tile_w + 4);
    column_range = row_range + 2 * d.p.low_h;
    sums = memory;
  }

  DEVICE float* logits(const Call& d) const { return d.p.low_resolution ? taps : scratch; }
  DEVICE float* w2_sums(const Call& d) const { return logits(d) + 3 * d.p.wide_plane; }
  DEVICE int sums_row(const Call& d) const { return round_up(2 * d.s.K + 4, 4); }
};

// Load the second convolution's weights and the norm's coefficients, once for all tiles of a block.
DEVICE void load_constants(const Call& d, const Shared& s) {
  for (int i = threadIdx.x; i < d.s.K * W2_ROW; i += THREADS) s.w2[i] = d.w.w2[i];
  for (int i = threadIdx.x; i < 6 * d.s.K; i += THREADS) s.norm[i] = d.w.norm[i];
}


DEVICE void load_cells(const Call& d, const Shared& s, const Tile& t) {
  load_axis<THREADS>(d.w.rows, d.s.H, t.y0 - 2, t.h + 4, t.low_y, s.rows, threadIdx.x);
  load_axis<THREADS>(d.w.columns, d.s.W, t.x0 - 2, t.w + 4, t.low_x, s.columns,
                     THREADS - 1 - int(threadIdx.x));
}

// Set the planes of z outside the image.
template <class F> DEVICE void fill_border(const Call& d, const Shared& s, const Tile& t, F value) {
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

// The gradient of a 3x3 convolution's weights, sums[input][t = 9 o + tap] = sum of gradient[o] * input
// shifted by the tap, over rows [first, last). Each lane of the warp takes a column. input(i, y, dx) and
// gradient(o, y) give 0 if a lane has no column.
template <class I, class G>
DEVICE void correlate(int first, int last, I input, G gradient, float (&sums)[2][WARP]) {
  UNROLL_ALL for (int i = 0; i < 2; i++)
    UNROLL_ALL for (int t = 0; t < WARP; t++) sums[i][t] = 0.0f;
  if (first >= last) return;
  float window[2][3][3];
  UNROLL_ALL for (int i = 0; i < 2; i++) UNROLL_ALL for (int x = 0; x < 3; x++)
      window[i][1][x] = input(i, first - 1, x),
      window[i][2][x] = input(i, first, x);
  UNROLL(1) for (int y = first; y < last; y++) {
    float g[3];
    UNROLL_ALL for (int o = 0; o < 3; o++) g[o] = gradient(o, y);
    UNROLL_ALL for (int i = 0; i < 2; i++)
      UNROLL_ALL for (int x = 0; x < 3; x++) {
        window[i][0][x] = window[i][1][x], window[i][1][x] = window[i][2][x];
        window[i][2][x] = input(i, y + 1, x);
      }
      UNROLL_ALL for (int i = 0; i < 2; i++) UNROLL_ALL for (int o = 0; o < 3; o++)
          UNROLL_ALL for (int tap = 0; tap < 9; tap++) sums[i][9 * o + tap] +=
          g[o] * window[i][tap / 3][tap % 3];
  }
}

}  // namespace infopro::gpu
