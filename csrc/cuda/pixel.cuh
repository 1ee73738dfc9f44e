// The loss of a pixel of the image: its target, restored from a normalised image, and the gradient in its
// logit.
#pragma once

#include "numbers.cuh"

namespace infopro::gpu {

// The image (N, 3, H, W), in [0, 1].
struct Target {
  Maps maps;
  bool restore;  // the target is image * std + mean
  float mean[3], std[3];

  // restore: three means and three standard deviations, or null
  static Target of(const Maps& maps, const double* restore) {
    Target t = {maps, restore != nullptr, {}, {}};
    for (int i = 0; i < 3 && restore; i++) t.mean[i] = float(restore[i]), t.std[i] = float(restore[3 + i]);
    return t;
  }

  // Target of channel o. offset: elements to the sample, row and column
  DEVICE float at(int o, int64_t offset) const {
    float v = load(maps.data, maps.dtype, o * maps.c + offset);
    if (restore) v = v * std[o] + mean[o];
    const float inside = v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v;
    return fabsf(v - inside) > float(restore ? RESTORED_SLACK : IMAGE_SLACK) ? NAN : inside;
  }
};

struct LossAndGradient {
  float loss, gradient;
};

// Loss of a pixel and its gradient in the logit x. bce: max(x, 0) - x target + log(1 + exp(-|x|)).
DEVICE LossAndGradient pixel_loss(Pixel kind, float x, float target) {
  const float e = expf(-fabsf(x)), q = 1.0f / (1.0f + e), error = (x < 0.0f ? e * q : q) - target;
  if (kind == Pixel::bce) return {(x < 0.0f ? 0.0f : x) - x * target + log1pf(e), error};
  const float slope = e * q * q;  // sigmoid (1 - sigmoid)
  if (kind == Pixel::mse) return {error * error, 2.0f * error * slope};
  return {fabsf(error), error > 0.0f ? slope : error < 0.0f ? -slope : error};  // the last: zero or nan
}

}  // namespace infopro::gpu
