// Resize tables of one axis, as torch.nn.functional.interpolate places its samples.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace infopro {

enum class Resize : int { corners, nearest, centers };  // bilinear with align_corners=True; nearest; bilinear with align_corners=False

struct AxisTable {
  std::vector<int32_t> low, high;
  std::vector<double> low_weight, high_weight;

  // factor: the scale_factor that `out` came from, 0 where it was given as a size; corners take no notice of it.
  AxisTable(int64_t in, int64_t out, Resize mode, double factor = 0) : low(out), high(out), low_weight(out, 1.0), high_weight(out, 0.0) {
    const double step = factor > 0 ? 1.0 / factor : double(in) / double(out);
    for (int64_t p = 0; p < out; p++) {
      if (in == out) {  // whatever the factor
        low[p] = high[p] = int32_t(p);
        continue;
      }
      if (mode == Resize::nearest) {  // torch's scale is a float32, whatever the dtype
        // On the CPU it takes an output of twice the size from the sizes, whatever the factor.
        float scale = factor > 0 && out != 2 * in ? float(1.0 / factor) : float(in) / float(out);
        int64_t source = int64_t(std::floor(float(p) * scale));
        low[p] = high[p] = int32_t(std::min(source, in - 1));
        continue;
      }
      double source = 0;
      if (mode == Resize::centers)
        source = std::max(0.0, (double(p) + 0.5) * step - 0.5);
      else if (out > 1)
        source = double(in - 1) * double(p) / double(out - 1);
      int64_t floor = std::min(int64_t(source), in - 1);
      low[p] = int32_t(floor);
      high[p] = int32_t(std::min(floor + 1, in - 1));
      high_weight[p] = std::min(source - double(floor), 1.0);
      low_weight[p] = 1.0 - high_weight[p];
    }
  }

  Axis view(int64_t in) const { return {in, int64_t(low.size()), low.data(), high.data(), low_weight.data(), high_weight.data()}; }
};

}  // namespace infopro
