// How the work of a chain decoder's stage is cut up: x (N, C, h, w), resized to (H, W), convolved to z (N, K, H, W); of the last stage, K is
// 3 and z the logits of the image's pixels.
//
// A block takes a tile at a time: in forward of z, in backward of x, so that whatever it adds up is its own, and no two blocks write to one
// place. Around its tile it needs a border of the other, of which neighbours read, or compute, the same again:
//     forward    pixels of z in the tile -> x under them and one pixel around
//     backward   x of the tile -> pixels of z that it takes part in, in any way; their logits: -> x under them and one pixel around
// Three channels of z are made at a time. T, the 27 numbers that their taps make of a pixel of x, lies in shared memory pixel by pixel: 27
// is odd, so that neither a warp's pixels nor a pixel's taps meet in a bank, and the place of a tap is known to the compiler.
#pragma once

#include "resize.cuh"

namespace infopro::gpu::chain {

constexpr int THREADS = 256, WARPS = THREADS / WARP;  // of two blocks, 128 registers each
constexpr int OUTPUTS = 3, TAPS = 9 * OUTPUTS;        // channels of z at a time, and of T: 9 o + 3 dy + dx
constexpr int W_ROW = 28;                             // TAPS, padded to whole float4
constexpr int STEP = 4;                               // channels that are loaded together
constexpr int GROUP = 12;                             // channels whose gradients are found together
constexpr int MOST_CHANNELS = 64, MOST_OUTPUTS = 16;  // of x and z: with more, products of matrices are most of the work, for cuBLAS
constexpr int MOST_ENLARGED = 16;                     // along an axis: so much fits the shared memory of every device

// A resize along one axis. factor: see cell.
struct Line {
  int in, out;
  Resize mode;
  double factor;

  __host__ __device__ bool same() const { return in == out; }
  __host__ __device__ bool mixes() const { return in != out && mode != Resize::nearest; }  // two pixels of x to one
  __host__ __device__ Cell at(int p) const { return cell(in, out, p, mode, factor); }
  __host__ __device__ int first(int low) const { return first_at(in, out, low, mode, factor); }
  // Pixels of x to one of the image, as cells move.
  double ratio() const {
    if (same()) return 1.0;
    if (mode == Resize::corners) return out > 1 ? double(in - 1) / double(out - 1) : 0.0;
    return factor > 0 ? 1.0 / factor : double(in) / double(out);
  }
};

struct Shape {
  int N, C, K;
  Line rows, columns;

  __host__ __device__ int groups() const { return (K + OUTPUTS - 1) / OUTPUTS; }
  __host__ __device__ int padded() const { return round_up(C, STEP); }
};

struct Kind {
  bool last, backward;  // the last stage, whose z are never written
};

struct Plan {
  int tile_h, tile_w, tiles_y, tiles_x;  // pixels of a tile, at most: of z, or in backward of x
  int low_h, low_w, out_h, out_w;        // pixels of x and of z that a tile needs, at most
  int strips;                            // that the rows of z are cut into, a thread for each
  int tile_strips;                       // backward: and those of the tile
  int taps, gradients, held;             // floats of the regions: see Shared
  int pixels;                            // backward: of the tile, padded
  int shared;                            // bytes

  __host__ __device__ int tiles() const { return tiles_y * tiles_x; }
};

namespace planning {

// Pixels of x under `n` successive ones of the resized map and their right neighbours, at most. The last is for the rounding of either end.
inline int low_extent(const Line& line, int n) {
  if (line.same()) return smaller(n, line.in);
  const int steps = smaller(n, line.out) - 1;
  return smaller(line.in, int(steps * line.ratio() + 1e-9) + 3);
}

// Pixels of z that `n` successive ones of x take part in, at most.
inline int out_extent(const Line& line, int n) {
  if (line.same()) return smaller(n + 2, line.out);
  const double ratio = line.ratio(), span = (n + (line.mixes() ? 1 : 0)) / (ratio > 0 ? ratio : 1e-9);
  return span > line.out ? line.out : smaller(line.out, int(span) + 2 + 2);
}

// Steps that the threads go down `strips` strips of rows of `units` columns in, and `around` more to each strip, round after round.
inline int steps_of(int units, int strips, int rows, int around) { return ceil_div(units * strips, THREADS) * (ceil_div(rows, strips) + around); }

inline int fewest_steps(int units, int rows, int around) {
  int best = 1;
  for (int strips = 2; strips <= smaller(rows, 8); strips++)
    if (steps_of(units, strips, rows, around) < steps_of(units, best, rows, around)) best = strips;
  return best;
}

// Of the walk through z and that through its gradients: strips, columns of threads, steps to a strip beyond its own rows.
constexpr int LOGITS_AROUND = 3;
inline int logits_units(const Plan& p) { return OUTPUTS * p.out_w; }
inline int collect_units(const Plan& p) { return TAPS / 3 * p.tile_w; }
inline int collect_around(const Plan& p) { return ceil_div(p.out_h, p.tile_h) + 2; }

inline int fixed_floats(const Shape& s, const Plan& p, Kind kind) {  // weights, norm, cells; sums of the block
  const int cells = round_up(2 * (p.out_h + 2 + p.out_w + 2), 4), weights = kind.last ? round_up(TAPS * s.C, 4) : 0;
  return s.padded() * (W_ROW + 4) + cells + (kind.backward ? weights + WARPS * round_up(2 * s.C + OUTPUTS, 4) : 4 * WARPS);
}

inline Plan plan_of(const Shape& s, Kind kind, int tile_h, int tile_w) {
  Plan p = {};
  const bool backward = kind.backward;
  const Line &y = s.rows, &x = s.columns;
  p.tile_h = tile_h, p.tile_w = tile_w;
  p.tiles_y = ceil_div(backward ? y.in : y.out, tile_h), p.tiles_x = ceil_div(backward ? x.in : x.out, tile_w);
  p.out_h = backward ? out_extent(y, tile_h) : tile_h, p.out_w = backward ? out_extent(x, tile_w) : tile_w;
  p.low_h = low_extent(y, p.out_h + 2), p.low_w = low_extent(x, p.out_w + 2);
  p.strips = fewest_steps(logits_units(p), p.out_h, LOGITS_AROUND);
  p.taps = kind.last || !backward ? TAPS * p.low_h * p.low_w : 0;
  if (!kind.last && !backward) p.held = 3 * logits_units(p) * p.strips;
  if (backward) {
    p.tile_strips = fewest_steps(collect_units(p), p.out_h, collect_around(p));  // of tile_h rows, which out_h stand for
    p.pixels = round_up(tile_h * tile_w, 4);
    const int of_tile = round_up(TAPS * p.pixels, 4);
    p.taps = kind.last ? larger(p.taps, of_tile + GROUP * p.pixels) : of_tile;
    p.gradients = round_up(larger(OUTPUTS * p.out_h * p.out_w, WARPS * TAPS * GROUP), 4);
    p.held = kind.last ? 0 : 2 * round_up(s.C, GROUP) * p.pixels;
  }
  p.taps = round_up(p.taps, 4);
  p.held = round_up(p.held, 4);
  p.shared = 4 * (fixed_floats(s, p, kind) + p.taps + p.gradients + p.held);
  return p;
}

// Instructions of a tile's threads, counted as the loops are written, a multiply-add and a read as one each, and a barrier as what a block
// could have done in the 300 cycles that it and a load behind it take.
inline double cost_of(const Shape& s, const Plan& p, Kind kind) {
  constexpr double BARRIER = 300 * 64;
  const double low = double(p.low_h) * p.low_w, own = double(p.tile_h) * p.tile_w, out = double(p.out_h) * p.out_w;
  const double expanded = s.rows.ratio() < 1.0 ? s.rows.ratio() : 1.0;  // rows of T to a row of z
  const double walk = double(THREADS) * steps_of(logits_units(p), p.strips, p.out_h, LOGITS_AROUND) * (30 + 36 * expanded);
  double cost = 0;
  if (kind.last || !kind.backward) cost += low * s.C * (TAPS + 8) + walk + 3 * BARRIER;
  if (kind.backward) {
    const double collect = double(THREADS) * steps_of(collect_units(p), p.tile_strips, p.out_h, collect_around(p)) * 20;
    cost += collect + own * s.C * (2 * TAPS + 20) + (2 + 3 * ceil_div(s.C, GROUP)) * BARRIER + (kind.last ? 0 : 8 * OUTPUTS * out);
  }
  return s.groups() * cost;
}

}  // namespace planning

inline int blocks_per_multiprocessor(const Plan& p, const Device& device) {
  return larger(1, smaller(2, device.shared_per_multiprocessor / (p.shared + 1024)));  // CUDA keeps 1 KB of each block's
}

// The plan whose last block ends soonest; shared = 0 where none fits the device. One block to a multiprocessor loses what no other fills
// in for while it waits.
inline Plan make_plan(const Shape& s, const Device& device, Kind kind) {
  constexpr double ALONE = 1.6;
  constexpr int SIDES[] = {1, 2, 4, 8, 14, 16, 28, 32, 48, 64};
  Plan best = {};
  double least = 0;
  const int height = kind.backward ? s.rows.in : s.rows.out, width = kind.backward ? s.columns.in : s.columns.out;
  for (const int side_y : SIDES)
    for (const int side_x : SIDES) {
      const Plan p = planning::plan_of(s, kind, smaller(side_y, height), smaller(side_x, width));
      if (p.shared > device.shared_per_block) continue;
      const int blocks = blocks_per_multiprocessor(p, device);
      const double rounds = std::ceil(double(s.N) * p.tiles() / (double(blocks) * device.multiprocessors));
      const double cost = rounds * blocks * (blocks == 1 ? ALONE : 1.0) * planning::cost_of(s, p, kind);
      if (best.shared == 0 || cost < least) best = p, least = cost;
    }
  return best;
}

}  // namespace infopro::gpu::chain
