// The plan of a chain decoder's stage: x (N, C, h, w), resized to (H, W), convolved to z (N, K, H, W). In the
// last stage K is 3 and z are the logits of the image's pixels.
//
// A block takes a tile at a time, of z in forward and of x in backward, so that no two blocks write to one
// place. It also reads, or computes, a border that its neighbours share:
//     forward    pixels of z in the tile -> x under them and one pixel around
//     backward   x of the tile -> all pixels of z that depend on it -> for their logits, as in forward
// Three channels of z are computed at a time. T holds 27 numbers for each pixel of x, one for each of their
// taps, in shared memory pixel by pixel. 27 is odd, so neither a warp's pixels nor a pixel's taps meet in a
// bank, and the compiler knows the place of a tap.
#pragma once

#include "resize.cuh"

namespace infopro::gpu::chain {

constexpr int THREADS = 256, WARPS = THREADS / WARP;  // with two blocks, 128 registers a thread
constexpr int OUTPUTS = 3, TAPS = 9 * OUTPUTS;        // channels of z at a time; numbers 9 o + 3 dy + dx of T
constexpr int W_ROW = 28;                             // TAPS, padded to whole float4
constexpr int STEP = 4;                               // channels that are loaded together
constexpr int GROUP = 12;                             // channels whose gradients are computed together
constexpr int MOST_CHANNELS = 64, MOST_OUTPUTS = 16;  // of x and z: with more, cuBLAS does the work better
constexpr int MOST_ENLARGED = 16;                     // along an axis: more does not fit every device

// A resize along one axis. factor: as in `place`.
struct Line {
  int in, out;
  Resize mode;
  double factor;

  __host__ __device__ bool same() const { return in == out; }
  // Whether a pixel mixes two pixels of x.
  __host__ __device__ bool mixes() const { return in != out && mode != Resize::nearest; }
  __host__ __device__ Cell at(int p) const { return cell(in, out, p, mode, factor); }
  __host__ __device__ int first(int low) const { return first_at(in, out, low, mode, factor); }
  // Pixels of x that a step of one resized pixel moves by.
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
  bool last, backward;  // the z of the last stage are never written
};

struct Plan {
  int tile_h, tile_w, tiles_y, tiles_x;  // most pixels of a tile: of z, or in backward of x
  int low_h, low_w, out_h, out_w;        // most pixels of x and of z that a tile needs
  int strips;                            // of the rows of z, a thread for each
  int tile_strips;                       // backward: of the tile's rows
  int taps, gradients, held;             // floats of the regions: see Shared
  int pixels;                            // backward: of the tile, padded
  int shared;                            // bytes; 0 if no tile fits

  __host__ __device__ int tiles() const { return tiles_y * tiles_x; }
};

namespace planning {

// Most pixels of x that `n` successive pixels of the resized map read, with one more for the rounding at
// either end.
inline int low_extent(const Line& line, int n) {
  if (line.same()) return smaller(n, line.in);
  const int steps = smaller(n, line.out) - 1;
  return smaller(line.in, int(steps * line.ratio() + 1e-9) + 3);
}

// Most pixels of z that depend on `n` successive pixels of x.
inline int out_extent(const Line& line, int n) {
  if (line.same()) return smaller(n + 2, line.out);
  const double ratio = line.ratio(), span = (n + (line.mixes() ? 1 : 0)) / (ratio > 0 ? ratio : 1e-9);
  return span > line.out ? line.out : smaller(line.out, int(span) + 2 + 2);
}

// Steps of the threads down `units` columns whose rows are cut into strips, each with `around` more rows.
inline int steps_of(int units, int strips, int rows, int around) {
  return ceil_div(units * strips, THREADS) * (ceil_div(rows, strips) + around);
}

inline int fewest_steps(int units, int rows, int around) {
  int best = 1;
  for (int strips = 2; strips <= smaller(rows, 8); strips++)
    if (steps_of(units, strips, rows, around) < steps_of(units, best, rows, around)) best = strips;
  return best;
}

// The walks through z and through its gradients: columns of threads, steps of a strip beyond its own rows.
constexpr int LOGITS_AROUND = 3;
inline int logits_units(const Plan& p) { return OUTPUTS * p.out_w; }
inline int collect_units(const Plan& p) { return TAPS / 3 * p.tile_w; }
inline int collect_around(const Plan& p) { return ceil_div(p.out_h, p.tile_h) + 2; }

// Weights, norm, cells; sums of the block.
inline int fixed_floats(const Shape& s, const Plan& p, Kind kind) {
  const int cells = round_up(2 * (p.out_h + 2 + p.out_w + 2), 4),
            weights = kind.last ? round_up(TAPS * s.C, 4) : 0;
  return s.padded() * (W_ROW + 4) + cells +
         (kind.backward ? weights + WARPS * round_up(2 * s.C + OUTPUTS, 4) : 4 * WARPS);
}

inline Plan plan_of(const Shape& s, Kind kind, int tile_h, int tile_w) {
  Plan p = {};
  const bool backward = kind.backward;
  const Line &y = s.rows, &x = s.columns;
  p.tile_h = tile_h, p.tile_w = tile_w;
  p.tiles_y = ceil_div(backward ? y.in : y.out, tile_h),
  p.tiles_x = ceil_div(backward ? x.in : x.out, tile_w);
  p.out_h = backward ? out_extent(y, tile_h) : tile_h, p.out_w = backward ? out_extent(x, tile_w) : tile_w;
  p.low_h = low_extent(y, p.out_h + 2), p.low_w = low_extent(x, p.out_w + 2);
  p.strips = fewest_steps(logits_units(p), p.out_h, LOGITS_AROUND);
  p.taps = kind.last || !backward ? TAPS * p.low_h * p.low_w : 0;
  if (!kind.last && !backward) p.held = 3 * logits_units(p) * p.strips;
  if (backward) {
    // out_h stands for the tile's rows
    p.tile_strips = fewest_steps(collect_units(p), p.out_h, collect_around(p));
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

// Cost of a tile: instructions of its threads, as the loops are written, a multiply-add and a read as one
// each. A barrier costs what a block could do in the 300 cycles that it and the next load take.
inline double cost_of(const Shape& s, const Plan& p, Kind kind) {
  constexpr double BARRIER = 300 * 64;
  const double low = double(p.low_h) * p.low_w, own = double(p.tile_h) * p.tile_w,
               out = double(p.out_h) * p.out_w;
  const double expanded = s.rows.ratio() < 1.0 ? s.rows.ratio() : 1.0;  // rows of T to a row of z
  const double walk =
      double(THREADS) * steps_of(logits_units(p), p.strips, p.out_h, LOGITS_AROUND) * (30 + 36 * expanded);
  double cost = 0;
  if (kind.last || !kind.backward) cost += low * s.C * (TAPS + 8) + walk + 3 * BARRIER;
  if (kind.backward) {
    const double collect =
        double(THREADS) * steps_of(collect_units(p), p.tile_strips, p.out_h, collect_around(p)) * 20;
    cost += collect + own * s.C * (2 * TAPS + 20) + (2 + 3 * ceil_div(s.C, GROUP)) * BARRIER +
            (kind.last ? 0 : 8 * OUTPUTS * out);
  }
  return s.groups() * cost;
}

}  // namespace planning

inline int blocks_per_multiprocessor(const Plan& p, const Device& device) {
  // CUDA reserves 1 KB of each block's shared memory.
  return larger(1, smaller(2, device.shared_per_multiprocessor / (p.shared + 1024)));
}

// The plan whose last block ends soonest; shared = 0 if none fits the device. ALONE: the loss of a block that
// is alone on a multiprocessor, as no other works while it waits.
inline Plan make_plan(const Shape& s, const Device& device, Kind kind) {
  constexpr double ALONE = 1.6;
  constexpr int SIDES[] = {1, 2, 4, 8, 14, 16, 28, 32, 48, 64};
  Plan best = {};
  double least = 0;
  const int height = kind.backward ? s.rows.in : s.rows.out,
            width = kind.backward ? s.columns.in : s.columns.out;
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
