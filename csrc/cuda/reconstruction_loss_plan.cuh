// The plan of the decoder's kernels: which tile of an image a block takes at a time, and what it keeps in
// shared memory.
//
// A block owns a tile of the image: the whole image if that is at most 32 x 32 and fits. It holds all K
// channels of z there, with a border of one pixel for the second convolution. All else lies in three regions
// that the phases reuse:
//     taps     low resolution: nine 1x1 convolutions of `group` hidden channels, or their gradient
//     scratch  staged features and weights; rows of the resize of `part` hidden channels
//     late     staged features and their gradient in backward; the memory of z if group = K
// The gradient of the logits lies over taps and scratch while those are idle.
#pragma once

#include "reconstruction_loss_norm.cuh"
#include "resize.cuh"

namespace infopro::gpu {

constexpr int SEGMENTS = 4;               // of a tile's rows, in the gradient of W2
constexpr int HIDDEN = 6;                 // hidden channels of a thread's tile in the direct convolution
constexpr int W2_ROW = 28, TAP_ROW = 12;  // 27 and 9 weights, padded to whole float4

struct Shape {
  int N, C, K, h, w, H, W;
  bool nearest;
};

__host__ __device__ inline Resize mode_of(bool nearest) {
  return nearest ? Resize::nearest : Resize::corners;
}

struct Plan {
  bool low_resolution;  // mix channels at the size of the features, then resize; else resize, then convolve
  int tile_h, tile_w, tiles_y, tiles_x;   // most owned pixels of a tile; tiles of an image
  int pitch, plane;                       // of z: one pixel around the tile, rows up to whole strips of 4
  int wide_pitch, wide_plane;             // of the logits' gradient and resized features: two pixels around
  int low_h, low_w, pixels;               // most features of a tile; pixels: one channel of them, padded
  int group, part, chunk, late_channels;  // hidden channels, hidden channels, channels, channels at a time
  int expanded_pitch;
  int taps, scratch, late;                // floats of the regions
  int shared;                             // bytes; 0 if no tile fits

  __host__ __device__ int tiles() const { return tiles_y * tiles_x; }
};

namespace planning {

// Most features along an axis that a tile reads: under its pixels and two more at either side.
inline int low_extent(int in, int out, int tile, Resize mode) {
  int most = 0;
  for (int first = 0; first < out; first += tile) {
    int last = smaller(first + tile + 1, out - 1);
    most = larger(most, high(cell(in, out, last, mode)) - cell(in, out, larger(first - 2, 0), mode).low + 1);
  }
  return most;
}

// Multiply-adds of z either way: nine 1x1 convolutions and the expansion, or the resize and a 3x3
// convolution.
inline bool prefers_low_resolution(const Shape& s) {
  if (s.h == s.H && s.w == s.W) return false;
  double pixels = double(s.H) * s.W, mixing = 9.0 * s.K * s.C;
  return mixing * s.h * s.w + s.K * pixels * (6 + 18.0 * s.h / s.H) < mixing * pixels + 4.0 * s.C * pixels;
}

// Weights, coefficients, cells, ranges, sums of warps.
inline int fixed_floats(const Shape& s, const Plan& p) {
  return round_up(s.K * W2_ROW + 6 * s.K, 4) +
         round_up(2 * (p.tile_h + 4 + p.tile_w + 4) + 2 * (p.low_h + p.low_w), 4) +
         WARPS * round_up(2 * s.K + 4, 4);
}

// The gradient of the logits and the segments' sums of the gradient of W2, over taps and scratch.
inline int logit_floats(const Shape& s, const Plan& p) { return 3 * p.wide_plane + SEGMENTS * 27 * s.K; }

inline void set_tiles(const Shape& s, Plan& p, int tiles_y, int tiles_x) {
  p.tile_h = ceil_div(s.H, tiles_y), p.tile_w = ceil_div(s.W, tiles_x);
  p.tiles_y = ceil_div(s.H, p.tile_h), p.tiles_x = ceil_div(s.W, p.tile_w);
  p.pitch = p.tile_w + 2;
  p.plane = round_up(p.pitch * (round_up(p.tile_h, 4) + 2), 4);
  p.wide_pitch = p.tile_w + 4;
  p.wide_plane = round_up(p.wide_pitch * (1 + round_up(p.tiles_y == 1 ? p.tile_h : p.tile_h + 2, 8) + 2), 4);
  p.low_h = low_extent(s.h, s.H, p.tile_h, mode_of(s.nearest));
  p.low_w = low_extent(s.w, s.W, p.tile_w, mode_of(s.nearest));
  p.pixels = 4 * (ceil_div(p.low_h * p.low_w, 4) | 1);  // an odd number of float4, against bank conflicts
  p.expanded_pitch = (p.tile_w + 2) | 1;
}

// Set the sizes of the regions at low resolution. Return false if `group` hidden channels and `scratch`
// floats do not fit.
inline bool fit_taps(const Shape& s, Plan& p, int group, int scratch, int floats) {
  const int expanded = 3 * p.low_h * p.expanded_pitch, z = s.K * p.plane;
  p.group = group;
  p.taps = 9 * group * p.pixels;
  const bool lent = group == s.K && z >= 4 * p.pixels;
  const int least_late = lent ? 0 : 4 * p.pixels, left = floats - z - p.taps - least_late;
  int least = larger(larger(expanded, 9 * 4), p.pixels + group * TAP_ROW);
  least = round_up(larger(least, logit_floats(s, p) - p.taps), 4);
  p.scratch = larger(least, scratch);
  if (left < p.scratch) return false;
  p.late = lent ? 0 : smaller(round_up(s.C, 4) * p.pixels, (left - p.scratch + least_late) / 4 * 4);
  p.late_channels = smaller(round_up(s.C, 4), (lent ? z : p.late) / p.pixels / 4 * 4);
  while (p.late_channels > 4 && 9 * p.late_channels > p.scratch) p.late_channels -= 4;
  p.part = larger(1, smaller(group, p.scratch / expanded));
  p.chunk = smaller(s.C, p.scratch / (p.pixels + group * TAP_ROW));
  return true;
}

// Share of the threads that have something to do.
inline double busy(int units) { return double(units) / double(round_up(larger(units, 1), THREADS)); }

// Cost of a plan at low resolution, without what is the same for all plans of one tile: instructions of
// threads in forward and backward, as the loops are written. A barrier costs what a block could do in the 300
// cycles that it and the next load take.
inline double cost_of_taps(const Shape& s, const Plan& p) {
  constexpr double BARRIER = 300 * 64;
  const int quads = p.pixels / 4, groups = ceil_div(s.K, p.group), parts = ceil_div(p.group, p.part),
            blocks = ceil_div(s.C, p.late_channels);
  const double product = 9.0 * s.K * s.C * p.pixels;
  const double mixing = 3 * product / busy(p.group * quads);
  const double gradients =
      product / busy(p.group * ceil_div(p.late_channels, 4)) + product / busy(p.late_channels / 4 * quads);
  const double gathers = groups == 1 ? 1 : 1 + blocks;  // the gradient of a single group is kept
  const double gather = s.K * (3.0 * p.tile_h * p.tile_w * 4 + 9.0 * p.low_h * p.tile_w * 8);
  const double stages = 3.0 * groups * (ceil_div(p.group * quads, THREADS) * ceil_div(s.C, p.chunk) + parts);
  const double together = larger(1, smaller(p.group, p.scratch / (9 * p.late_channels)));
  const double barriers =
      2 * (stages + gathers * groups * parts + groups * blocks * (1 + p.group / together));
  return mixing + gradients + gathers * gather + BARRIER * barriers;
}

// Choose the cheapest split of the hidden channels and of the memory. Return its cost, or 0 if none fits.
inline double choose_taps(const Shape& s, Plan& p, int floats) {
  double best = 0;
  Plan tried = p;
  for (int groups = 1, last = 0; groups <= s.K; groups++) {
    const int group = ceil_div(s.K, groups);
    if (group == last) continue;
    last = group;
    for (int scratch = 0; scratch <= 8192; scratch += 1024) {
      if (!fit_taps(s, tried, group, scratch, floats)) break;
      const double cost = cost_of_taps(s, tried);
      if (best == 0 || cost < best) best = cost, p = tried;
    }
  }
  return best;
}

inline bool fit_direct(const Shape& s, Plan& p, int floats) {
  const int z = s.K * p.plane, channel = p.wide_plane + round_up(s.K, HIDDEN) * TAP_ROW;
  int least = round_up(larger(larger(2 * channel, 4 * p.wide_plane), logit_floats(s, p)), 4),
      left = (floats - z) / 4 * 4;
  if (left < least) return false;
  p.group = p.part = p.taps = p.late = 0;
  p.scratch = larger(least, smaller(left, round_up(larger(2, s.C) * channel, 4)));
  p.chunk = smaller(s.C, p.scratch / channel);
  if (p.chunk > 1) p.chunk -= p.chunk % 2;  // the gradient of W1 takes pairs
  p.late_channels = smaller(round_up(s.C, 4), p.scratch / p.wide_plane / 4 * 4);
  return true;
}

// Choose the cheapest plan in so many bytes. Return its cost, or 0 if none fits.
inline double choose(const Shape& s, Plan& p, int bytes) {
  const int fixed = fixed_floats(s, p), floats = bytes / 4 - fixed;
  const double cost = p.low_resolution ? choose_taps(s, p, floats) : fit_direct(s, p, floats);
  p.shared = cost > 0 ? 4 * (s.K * p.plane + p.taps + p.scratch + p.late + fixed) : 0;
  return cost;
}

}  // namespace planning

// The plan of a call; shared = 0 if no tile fits the device. Two blocks share a multiprocessor unless that is
// much dearer: one computes while the other waits for memory or a barrier.
inline Plan make_plan(const Shape& s, const Device& device) {
  constexpr double ALONE = 1.6;  // the loss of a block that is alone on a multiprocessor
  Plan p = {};
  p.low_resolution = planning::prefers_low_resolution(s);
  // CUDA reserves 1 KB of each block's shared memory.
  const int half = smaller(device.shared_per_multiprocessor / 2 - 1024, device.shared_per_block);
  // 30 and its borders are 32.
  int tiles_y = s.H <= 32 ? 1 : ceil_div(s.H, 30), tiles_x = s.W <= 32 ? 1 : ceil_div(s.W, 30);
  for (;;) {
    planning::set_tiles(s, p, tiles_y, tiles_x);
    Plan alone = p;
    const double shared = planning::choose(s, p, half),
                 whole = planning::choose(s, alone, device.shared_per_block);
    if (shared > 0 && shared <= ALONE * whole) return p;
    if (whole > 0) return alone;
    if (p.tile_h == 1 && p.tile_w == 1) break;
    if (p.tile_h >= p.tile_w)
      tiles_y = ceil_div(s.H, ceil_div(p.tile_h, 2));
    else
      tiles_x = ceil_div(s.W, ceil_div(p.tile_w, 2));
  }
  p.shared = 0;
  return p;
}

inline int blocks_per_multiprocessor(const Plan& p, const Device& device) {
  return larger(1, smaller(2, device.shared_per_multiprocessor / (p.shared + 1024)));
}

}  // namespace infopro::gpu
