// Where a resize takes its samples along one axis, as torch.nn.functional.interpolate places them: the one
// place for the CPU and the CUDA kernels.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

#ifdef __CUDACC__
#define INFOPRO_BOTH __host__ __device__
#else
#define INFOPRO_BOTH
#endif

namespace infopro {

// Bilinear with align_corners=True; nearest; bilinear with align_corners=False.
enum class Resize : int { corners, nearest, centers };

// An element of the resized axis: (1 - weight) in[low] + weight in[high].
struct Place {
  int low, high;
  double weight;
};

// Place of element p. factor: the scale_factor that gave `out`, or 0 if a size was given; `corners` ignores
// it.
INFOPRO_BOTH inline Place place(int in, int out, int p, Resize mode, double factor) {
  if (in == out) return {p, p, 0.0};  // whatever the factor
  if (mode == Resize::nearest) {      // torch's scale is a float32, whatever the dtype
    const float scale = factor > 0 ? float(1.0 / factor) : float(in) / float(out);
    const int low = int(float(p) * scale), nearest = low < in - 1 ? low : in - 1;
    return {nearest, nearest, 0.0};
  }
  double source = 0.0;
  if (mode == Resize::centers) {
    source = (double(p) + 0.5) * (factor > 0 ? 1.0 / factor : double(in) / double(out)) - 0.5;
    source = source > 0.0 ? source : 0.0;
  } else if (out > 1) {
    source = double(in - 1) * double(p) / double(out - 1);
  }
  const int low = int(source) < in - 1 ? int(source) : in - 1;
  const double weight = source - double(low);
  return {low, low + 1 < in ? low + 1 : low, weight < 1.0 ? weight : 1.0};
}

// Place of element p of a bilinear resize to a size, from an exact fraction, so that the weight is rounded
// only once.
inline Place exact_place(int64_t in, int64_t out, int64_t p, bool align_corners) {
  const int64_t unit = align_corners ? std::max<int64_t>(out - 1, 1) : 2 * out;
  const int64_t position =
      align_corners ? (out > 1 ? p * (in - 1) : 0) : std::max<int64_t>((2 * p + 1) * in - out, 0);
  const int64_t low = std::min(position / unit, in - 1);
  return {int(low), int(std::min(low + 1, in - 1)), double(position - low * unit) / double(unit)};
}

// The places of all elements, as tables.
struct AxisTable {
  std::vector<int32_t> low, high;
  std::vector<double> low_weight, high_weight;

  // place_of: the Place of an element
  template <class F>
  AxisTable(int64_t out, F place_of) : low(out), high(out), low_weight(out), high_weight(out) {
    for (int64_t p = 0; p < out; p++) {
      const Place at = place_of(int(p));
      low[p] = at.low, high[p] = at.high;
      low_weight[p] = 1.0 - at.weight, high_weight[p] = at.weight;
    }
  }

  AxisTable(int64_t in, int64_t out, Resize mode, double factor = 0)
      : AxisTable(out, [=](int p) { return place(int(in), int(out), p, mode, factor); }) {}

  Axis view(int64_t in) const {
    return {in, int64_t(low.size()), low.data(), high.data(), low_weight.data(), high_weight.data()};
  }
};

}  // namespace infopro
