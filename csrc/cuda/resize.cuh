// Where a resize takes its samples, along one axis: the cells that csrc/resize.h tabulates for the CPU, one at a time.
#pragma once

#include <cmath>

#include "../resize.h"
#include "numbers.cuh"

namespace infopro::gpu {

// Row (or column) p of the resized map: (1 - weight) in[low] + weight in[low + 1]. low is -1 outside the map.
struct Cell {
  int low;
  float weight;
};

// factor: the scale_factor that `out` came from, 0 where it was given as a size; corners take no notice of it.
__host__ __device__ inline Cell cell(int in, int out, int p, Resize mode, double factor = 0) {
  if (in == out) return {p, 0.0f};
  if (mode == Resize::nearest) {  // as F.interpolate: a float32 scale
    const float scale = factor > 0 ? float(1.0 / factor) : float(in) / float(out);
    return {smaller(int(floorf(float(p) * scale)), in - 1), 0.0f};
  }
  double source = 0.0;
  if (mode == Resize::centers) {
    source = (double(p) + 0.5) * (factor > 0 ? 1.0 / factor : double(in) / double(out)) - 0.5;
    source = source > 0.0 ? source : 0.0;
  } else if (out > 1) {
    source = double(in - 1) * double(p) / double(out - 1);
  }
  const int low = smaller(int(source), in - 1);
  const double weight = source - double(low);
  return {low, low + 1 < in ? float(weight < 1.0 ? weight : 1.0) : 0.0f};
}

__host__ __device__ inline int high(Cell c) { return c.low + (c.weight > 0.0f ? 1 : 0); }

// The first p whose cell lies at `low` or behind it; `out` where there is none.
__host__ __device__ inline int first_at(int in, int out, int low, Resize mode, double factor) {
  int before = 0, from = out;  // every p below `before` lies before `low`, every one from `from` on does not
  while (before < from) {
    const int p = before + (from - before) / 2;
    if (cell(in, out, p, mode, factor).low < low)
      before = p + 1;
    else
      from = p;
  }
  return from;
}

}  // namespace infopro::gpu
