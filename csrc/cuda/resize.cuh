// A place of a resize as kernels hold it, with a float32 weight, and the inverse: who reads an element.
#pragma once

#include "../resize.h"
#include "numbers.cuh"

namespace infopro::gpu {

// Row (or column) p of the resized map: (1 - weight) in[low] + weight in[low + 1]. low is -1 outside the map.
struct Cell {
  int low;
  float weight;
};

__host__ __device__ inline Cell cell(int in, int out, int p, Resize mode, double factor = 0) {
  const Place at = place(in, out, p, mode, factor);
  return {at.low, at.high > at.low ? float(at.weight) : 0.0f};
}

__host__ __device__ inline int high(Cell c) { return c.low + (c.weight > 0.0f ? 1 : 0); }

// to[i] = cell first + i of the table, for i < n, with `low` counted from `low` on. A thread takes every
// THREADS-th.
template <int THREADS> DEVICE void load_axis(const Cell* table, int out, int first, int n, int low, Cell* to,
                                          int thread) {
  for (int i = thread; i < n; i += THREADS) {
    const int p = first + i;
    const bool inside = p >= 0 && p < out;
    Cell c = inside ? table[p] : Cell{-1, 0.0f};
    if (inside) c.low -= low;
    to[i] = c;
  }
}

// The first p whose cell lies at `low` or behind it; `out` if there is none.
__host__ __device__ inline int first_at(int in, int out, int low, Resize mode, double factor) {
  int before = 0, from = out;  // all p < before have cells in front of `low`, all p >= from do not
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
