// What the threads of a block do with a tile of a chain decoder's stage, for three channels o of z, phase by
// phase:
//
//     mix       T[9 o + 3 dy + dx] = sum_c W[o, c, dy, dx] a[c]                 a = relu(batch norm(x)), or x
//     logits    z[o](Y, X) = b[o] + sum_taps R(T[tap])(Y + dy - 1, X + dx - 1)  R: the resize, 0 outside
//     collect   dT[tap] = R^T (dz[o], shifted by the tap)
//     inputs    da[c] = sum_taps W dT, through ReLU; the sums of da and of da times the normalised x; dx
//     weights   dW[o, c, dy, dx] = sum over pixels of dT a
//
// The last stage runs them one after the other. Other stages take `inputs` in parts
// (chain_stage_kernels.cuh).
#pragma once

#include "chain_stage_plan.cuh"
#include "pixel.cuh"
#include "sums.cuh"

namespace infopro::gpu::chain {

// What chain_prepare_kernel writes.
struct Prepared {
  float* weight;                  // (groups, C padded to STEP, W_ROW): 27 numbers 9 o + tap of each channel
  float* norm;                    // (C padded to STEP, 4): center, scale, shift, 1 / standard deviation
  float* bias;                    // (K), padded to whole groups
  Cell *rows, *columns;           // (H), (W)
  int *first_row, *first_column;  // (h + 1), (w + 1): see first_at
};

struct Call {
  Shape s;
  Plan p;
  Prepared w;
  Maps x;
  bool norm;  // relu((x - center) scale + shift) is convolved
  // for the last stage
  Target target;
  Pixel pixel;
  float pixel_weight;     // 1 / (3 N H W)
  const float* upstream;  // the gradient of the loss; null in forward

  __host__ __device__ int tiles() const { return s.N * p.tiles(); }
};

// A tile's pixels along an axis, first and number: its own, of z or in backward of x; of z and of x that it
// needs.
struct Reach {
  int own, owned, out, outs, low, lows;

  DEVICE Reach(const Line& line, const Cell* cells, const int* first, int start, int most, bool backward) {
    own = start;
    owned = smaller(most, (backward ? line.in : line.out) - start);
    out = own, outs = owned;
    if (backward) {
      const int from = first[larger(own - (line.mixes() ? 1 : 0), 0)], to = first[own + owned];
      out = larger(from - 1, 0);
      outs = smaller(to + 1, line.out) - out;
    }
    low = cells[larger(out - 1, 0)].low;
    lows = high(cells[smaller(out + outs, line.out - 1)]) - low + 1;
  }
};

struct Tile {
  int64_t n;
  Reach y, x;

  DEVICE Tile(const Call& d, int index, bool backward)
      : n(index / d.p.tiles()), y(d.s.rows, d.w.rows, d.w.first_row,
                                  index % d.p.tiles() / d.p.tiles_x * d.p.tile_h, d.p.tile_h, backward),
        x(d.s.columns, d.w.columns, d.w.first_column, index % d.p.tiles_x * d.p.tile_w, d.p.tile_w,
          backward) {}
};

// Shared memory. rows[r], columns[r]: the cells of resized row y.out - 1 + r, `low` counted from y.low on.
struct Shared {
  float* taps;       // T; in backward later dT, and behind it a of the last stage
  float* gradients;  // of z; later the warps' shares of dW
  float* held;       // not in the last stage: moments of z, or a and da (C, pixels), C padded to GROUP
  float *weight, *norm;
  Cell *rows, *columns;
  float* sums;      // forward: of warps, as double; backward: (WARPS, sums_row)
  float* d_weight;  // last stage: (3, C, 9), of the block's tiles so far

  DEVICE Shared(const Call& d, float* memory, bool backward) {
    auto take = [&](int n) { float* p = memory; memory += n; return p; };
    taps = take(d.p.taps);
    gradients = take(d.p.gradients);
    held = take(d.p.held);
    weight = take(d.s.padded() * W_ROW);
    norm = take(d.s.padded() * 4);
    rows = reinterpret_cast<Cell*>(take(round_up(2 * (d.p.out_h + 2 + d.p.out_w + 2), 4)));
    columns = rows + d.p.out_h + 2;
    sums = take(backward ? WARPS * sums_row(d) : 4 * WARPS);
    d_weight = memory;
  }

  DEVICE static int sums_row(const Call& d) { return round_up(2 * d.s.C + OUTPUTS, 4); }
};

DEVICE void load_weight(const Call& d, const Shared& s, int group) {
  const int n = d.s.padded() * W_ROW;
  for (int i = threadIdx.x; i < n; i += THREADS) s.weight[i] = d.w.weight[int64_t(group) * n + i];
}

DEVICE void load_norm(const Call& d, const Shared& s) {
  for (int i = threadIdx.x; i < d.s.padded() * 4; i += THREADS) s.norm[i] = d.w.norm[i];
}

DEVICE void load_cells(const Call& d, const Shared& s, const Tile& t) {
  const int backwards = THREADS - 1 - int(threadIdx.x);
  load_axis<THREADS>(d.w.rows, d.s.rows.out, t.y.out - 1, t.y.outs + 2, t.y.low, s.rows, threadIdx.x);
  load_axis<THREADS>(d.w.columns, d.s.columns.out, t.x.out - 1, t.x.outs + 2, t.x.low, s.columns, backwards);
}

DEVICE void load_weights(const float* row, float (&w)[W_ROW]) {
  UNROLL_ALL for (int i = 0; i < W_ROW; i += 4) {
    const float4 v = load4(row + i);
    w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
  }
}

// The normalised x before its ReLU; norm: as in Prepared.
DEVICE float normalised(float x, float4 norm) { return fmaf(x - norm.x, norm.y, norm.z); }

// taps[pixel * TAPS + tap] = T of every pixel of x that the tile needs. A thread takes two pixels, which
// share the reads of a channel's 28 weights.
DEVICE void mix(const Call& d, const Shared& s, const Tile& t) {
  const int pixels = t.y.lows * t.x.lows, half = ceil_div(pixels, 2);
  for (int unit = threadIdx.x; unit < half; unit += THREADS) {
    const int pixel[2] = {unit, smaller(unit + half, pixels - 1)};
    int64_t from[2];
    float acc[2][TAPS] = {};
    UNROLL_ALL for (int i = 0; i < 2; i++) from[i] =
        t.n * d.x.n + (t.y.low + pixel[i] / t.x.lows) * d.x.y + (t.x.low + pixel[i] % t.x.lows) * d.x.x;
    UNROLL(1) for (int c0 = 0; c0 < d.s.C; c0 += STEP) {
      float a[STEP][2];
      UNROLL_ALL for (int j = 0; j < STEP; j++) UNROLL_ALL for (int i = 0; i < 2; i++) a[j][i] =
          c0 + j < d.s.C ? load(d.x.data, d.x.dtype, from[i] + (c0 + j) * d.x.c) : 0.0f;
      UNROLL_ALL for (int j = 0; j < STEP; j++) {
        const float4 norm = load4(s.norm + 4 * (c0 + j));
        float w[W_ROW];
        load_weights(s.weight + (c0 + j) * W_ROW, w);
        UNROLL_ALL for (int i = 0; i < 2; i++) {
          const float value = d.norm ? relu(normalised(a[j][i], norm)) : a[j][i];
          UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) acc[i][tap] += w[tap] * value;
        }
      }
    }
    UNROLL_ALL for (int i = 0; i < 2; i++)
      if (i == 0 || unit + half < pixels)  // an odd last pixel is another thread's
        UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) s.taps[pixel[i] * TAPS + tap] = acc[i][tap];
  }
}

// use(o, y, x, z, fetch(o, y, x)) for every pixel of the tile and each of three channels from `channel` on; y
// and x are counted from t.y.out and t.x.out on. Then end(unit) for a thread's strip. A thread goes down a
// column of a strip of rows for one channel. It keeps two rows of T, expanded along x, for as long as cells
// lie between them. Each row is fetched one row ahead.
template <class Fetch, class Use, class End>
DEVICE void logits(const Call& d, const Shared& s, const Tile& t, int channel, Fetch fetch, Use use,
                   End end) {
  const bool mixed_rows = d.s.rows.mixes(), mixed_columns = d.s.columns.mixes();
  const int width = t.x.outs, strip = ceil_div(t.y.outs, d.p.strips), pitch = t.x.lows * TAPS;
  for (int unit = threadIdx.x; unit < OUTPUTS * width * d.p.strips; unit += THREADS) {
    const int x = unit % width, o = unit / width % OUTPUTS, y0 = unit / width / OUTPUTS * strip,
              y1 = smaller(y0 + strip, t.y.outs);
    if (y0 >= y1) continue;
    const float *near[3], *far[3];
    float near_weight[3], far_weight[3];
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const Cell c = s.columns[x + dx];
      const bool inside = c.low >= 0;
      near[dx] = s.taps + 9 * o + (inside ? c.low * TAPS : 0);
      far[dx] = near[dx] + (inside && c.weight > 0.0f ? TAPS : 0);
      near_weight[dx] = inside ? 1.0f - c.weight : 0.0f;
      far_weight[dx] = inside ? c.weight : 0.0f;
    }
    auto expand = [&](int row, float(&to)[3]) {
      UNROLL_ALL for (int dy = 0; dy < 3; dy++) {
        to[dy] = 0.0f;
        UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
          to[dy] += near_weight[dx] * near[dx][row * pitch + 3 * dy + dx];
          if (mixed_columns) to[dy] += far_weight[dx] * far[dx][row * pitch + 3 * dy + dx];
        }
      }
    };
    const float bias = d.w.bias[channel + o];
    float below[3] = {}, above[3] = {};
    float before = 0.0f, line = 0.0f;  // z of rows r - 1 and r so far
    int held = -2;
    float fetched = fetch(o, y0, x);
    UNROLL(1) for (int r = y0; r < y1 + 2; r++) {  // rows of the resized map, from t.y.out - 1 on
      const Cell c = s.rows[r];
      float row[3] = {};
      if (c.low >= 0) {
        if (c.low != held) {
          if (mixed_rows && c.low == held + 1) {
            UNROLL_ALL for (int dy = 0; dy < 3; dy++) below[dy] = above[dy];
          } else {
            expand(c.low, below);
          }
          if (mixed_rows) expand(smaller(c.low + 1, t.y.lows - 1), above);
          held = c.low;
        }
        UNROLL_ALL for (int dy = 0; dy < 3; dy++) row[dy] =
            mixed_rows ? (1.0f - c.weight) * below[dy] + c.weight * above[dy] : below[dy];
      }
      const float done = before + row[2];
      before = line + row[1];
      line = bias + row[0];
      if (r < y0 + 2) continue;
      const float given = fetched;
      if (r - 1 < y1) fetched = fetch(o, r - 1, x);
      use(o, r - 2, x, done, given);
    }
    end(unit);
  }
}

// ---- backward ----

// Columns of the resized map that read one column of x, at a time: as many as a doubled map has.
constexpr int TAKERS = 5;

// taps[pixel * TAPS + tap] = dT of the tile's own pixels, from gradients[(o * y.outs + row) * x.outs +
// column] of z. A thread takes a column of x, a column of the window and a channel of z. It goes down the
// rows of the gradient. Each adds to at most two rows of each dT, whose sums the thread keeps.
DEVICE void collect(const Call& d, const Shared& s, const Tile& t) {
  const Line &rows = d.s.rows, &columns = d.s.columns;
  const int width = t.x.owned, strip = ceil_div(t.y.owned, d.p.tile_strips);
  for (int unit = threadIdx.x; unit < width * (TAPS / 3) * d.p.tile_strips; unit += THREADS) {
    const int x = unit % width, dx = unit / width % 3, o = unit / width / 3 % OUTPUTS,
              i0 = unit / width / (TAPS / 3) * strip;
    const int i1 = smaller(i0 + strip, t.y.owned);
    if (i0 >= i1) continue;
    float* to = s.taps + x * TAPS + 9 * o + dx;
    for (int i = i0; i < i1; i++)
      UNROLL_ALL for (int dy = 0; dy < 3; dy++) to[i * width * TAPS + 3 * dy] = 0.0f;
    const int p0 = d.w.first_row[larger(t.y.own + i0 - (rows.mixes() ? 1 : 0), 0)],
              p1 = d.w.first_row[t.y.own + i1];
    const int y0 = larger(p0 - 1, 0) - t.y.out, y1 = smaller(p1 + 1, rows.out) - t.y.out;
    const int q1 = d.w.first_column[t.x.own + x + 1];
    for (int q = d.w.first_column[larger(t.x.own + x - (columns.mixes() ? 1 : 0), 0)]; q < q1; q += TAKERS) {
      float weight[TAKERS];
      int at[TAKERS];
      UNROLL_ALL for (int j = 0; j < TAKERS; j++) {
        const int column = q + j - dx + 1 - t.x.out;  // of the gradient
        const bool taken = q + j < q1 && column >= 0 && column < t.x.outs;
        const Cell c = s.columns[taken ? q + j + 1 - t.x.out : 0];
        at[j] = taken ? column : 0;
        weight[j] = !taken ? 0.0f : c.low + t.x.low == t.x.own + x ? 1.0f - c.weight : c.weight;
      }
      float sum[3] = {}, next[3] = {};
      int held[3] = {-2, -2, -2};  // `sum` belongs to this row of x, `next` to the one below
      auto put = [&](int dy, int low, float value) {
        const int i = low + t.y.low - t.y.own;
        if (i >= i0 && i < i1) to[i * width * TAPS + 3 * dy] += value;
      };
      UNROLL(1) for (int y = y0; y < y1; y++) {
        const float* from = s.gradients + (o * t.y.outs + y) * t.x.outs;
        float given = 0.0f;
        UNROLL_ALL for (int j = 0; j < TAKERS; j++) given += weight[j] * from[at[j]];
        UNROLL_ALL for (int dy = 0; dy < 3; dy++) {
          const Cell c = s.rows[y + dy];
          if (c.low < 0) continue;
          if (c.low != held[dy]) {
            const bool follows = c.low == held[dy] + 1;
            put(dy, held[dy], sum[dy]);
            if (!follows) put(dy, held[dy] + 1, next[dy]);
            sum[dy] = follows ? next[dy] : 0.0f, next[dy] = 0.0f, held[dy] = c.low;
          }
          sum[dy] += (1.0f - c.weight) * given;
          next[dy] += c.weight * given;
        }
      }
      UNROLL_ALL for (int dy = 0; dy < 3; dy++) put(dy, held[dy], sum[dy]), put(dy, held[dy] + 1, next[dy]);
    }
  }
}

// sums (warp, c) and (warp, C + c) += a warp's sums, of which lanes 2 j and 2 j + 1 hold those of channel c0
// + j.
DEVICE void add_norm_sums(const Call& d, const Shared& s, int c0, float (&sums)[WARP]) {
  const float sum = transposed_sum(sums);
  const int lane = threadIdx.x % WARP, c = c0 + lane / 2;
  if (lane >= 2 * GROUP || c >= d.s.C) return;
  s.sums[threadIdx.x / WARP * Shared::sums_row(d) + lane % 2 * d.s.C + c] += sum;
}

// For channels [c0, c0 + GROUP): dx, or the gradient of the batch norm's output; its sums and those of it
// times the normalised x, as in add_norm_sums; a[channel * pixels + pixel] for `weights`. Called by whole
// warps.
DEVICE void inputs(const Call& d, const Shared& s, const Tile& t, int c0, bool needs_x, Maps d_x, float* a) {
  const int owned = t.y.owned * t.x.owned;
  float sums[WARP] = {};
  UNROLL(1) for (int pixel = threadIdx.x; pixel < d.p.pixels; pixel += THREADS) {
    const bool inside = pixel < owned;
    const int y = t.y.own + (inside ? pixel / t.x.owned : 0), x = t.x.own + (inside ? pixel % t.x.owned : 0);
    const int64_t from = t.n * d.x.n + y * d.x.y + x * d.x.x, to = t.n * d_x.n + y * d_x.y + x * d_x.x;
    float g[TAPS];
    UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) g[tap] = inside ? s.taps[pixel * TAPS + tap] : 0.0f;
    UNROLL_ALL for (int j = 0; j < GROUP; j++) {
      const int c = c0 + j;
      if (c >= d.s.C) continue;
      const float raw = load(d.x.data, d.x.dtype, from + c * d.x.c);
      const float4 norm = load4(s.norm + 4 * c);
      const float before = d.norm ? normalised(raw, norm) : raw;
      a[j * d.p.pixels + pixel] = !inside ? 0.0f : d.norm ? relu(before) : raw;
      if (!needs_x || !inside) continue;
      float w[W_ROW], da = 0.0f;
      load_weights(s.weight + c * W_ROW, w);
      UNROLL_ALL for (int tap = 0; tap < TAPS; tap++) da += w[tap] * g[tap];
      if (d.norm) {
        da = before <= 0.0f ? 0.0f : da;
        sums[2 * j] += da;
        sums[2 * j + 1] += da * ((raw - norm.x) * norm.w);
      }
      store(d_x.data, d_x.dtype, to + c * d_x.c, da);
    }
  }
  if (needs_x && d.norm) add_norm_sums(d, s, c0, sums);
}

// partial (warp, GROUP, TAPS) = each warp's share of the tile's dW, for the same channels. A lane takes a
// tap. A warp strides over groups of four pixels, whose a all lanes read together.
DEVICE void weights(const Call& d, const Shared& s, const Tile& t, const float* a, float* partial) {
  const int owned = t.y.owned * t.x.owned, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP,
            tap = smaller(lane, TAPS - 1);
  float sums[GROUP] = {};
  UNROLL(1) for (int pixel = 4 * warp; pixel < owned; pixel += 4 * WARPS) {
    float g[4];
    UNROLL_ALL for (int i = 0; i < 4; i++) g[i] = pixel + i < owned ? s.taps[(pixel + i) * TAPS + tap] : 0.0f;
    UNROLL_ALL for (int j = 0; j < GROUP; j++) {
      const float4 v = load4(a + j * d.p.pixels + pixel);
      sums[j] += g[0] * v.x + g[1] * v.y + g[2] * v.z + g[3] * v.w;
    }
  }
  if (lane < TAPS)
    UNROLL_ALL for (int j = 0; j < GROUP; j++) partial[(warp * GROUP + j) * TAPS + tap] = sums[j];
}

// d_weight (K, C, 9), for three channels of z and GROUP of x, += the warps' shares; = if they are the first.
DEVICE void add_weights(const Call& d, int channel, int c0, const float* partial, float* d_weight,
                        bool first) {
  for (int i = threadIdx.x; i < smaller(GROUP, d.s.C - c0) * TAPS; i += THREADS) {
    const int c = c0 + i / TAPS, tap = i % TAPS, k = channel + tap / 9;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += partial[warp * GROUP * TAPS + i];
    if (k >= d.s.K) continue;
    float* to = d_weight + (k * d.s.C + c) * 9 + tap % 9;
    *to = first ? sum : *to + sum;
  }
}

}  // namespace infopro::gpu::chain
