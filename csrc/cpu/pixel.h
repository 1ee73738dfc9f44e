// The loss of the pixels of a row of an image, and its gradient in their logits.
#pragma once

#include <limits>

#include "convert.h"
#include "simd.h"

namespace infopro::INFOPRO_ISA {

// The gradient of the loss in the logits x. Set the loss too; a bce loss only if needs_loss.
template <class T>
INLINE vec<T> pixel_gradient(Pixel kind, vec<T> x, vec<T> target, bool needs_loss, vec<T>& loss) {
  vec<T> zero = {}, one = splat<T>(T(1));
  vec<T> e = exp<T>(-abs<T>(x));
  vec<T> q = one / (one + e), sigmoid = x < zero ? e * q : q;
  vec<T> error = sigmoid - target;
  if (kind == Pixel::bce) {
    if (needs_loss) loss = (x < zero ? zero : x) - x * target + log1p<T>(e);
    return error;
  }
  vec<T> slope = e * q * q;  // sigmoid (1 - sigmoid)
  if (kind == Pixel::mse) {
    loss = error * error;
    return error * slope * T(2);
  }
  loss = abs<T>(error);
  return error > zero ? slope : error < zero ? -slope : error;  // the last: zero or nan
}

// Replace the W logits of row y of channel o of sample n's image by the gradient of the loss in them. Return
// the sum of their losses. memory: W numbers.
template <class T>
INLINE double pixel_row(const PixelLoss<T>& d, int64_t n, int64_t o, int64_t y, int64_t W, bool needs_loss,
                        T* memory, T* row) {
  read_row<T>(memory, d.image.data, d.image.dtype, n * d.image.n + o * d.image.c + y * d.image.y, d.image.x,
              W);
  vec<T> total = {}, zero = {}, one = splat<T>(T(1));
  vec<T> slack = splat<T>(T(d.restore ? RESTORED_SLACK : IMAGE_SLACK));
  vec<T> outside = splat<T>(std::numeric_limits<T>::quiet_NaN());  // `refuse_image` then finds the range
  over<T>(W, [&](int64_t x, int count) {
    vec<T> given = load_some<T>(memory + x, count), loss = {};
    if (d.restore) given = given * d.image_std[o] + d.image_mean[o];
    vec<T> target = given < zero ? zero : given > one ? one : given;
    target = abs<T>(given - target) > slack ? outside : target;
    vec<T> gradient = pixel_gradient<T>(d.pixel, load_some<T>(row + x, count), target, needs_loss, loss);
    store_some<T>(row + x, gradient * d.pixel_weight, count);
    for (int i = count; i < Simd<T>::width; i++) loss[i] = 0;
    total += loss;
  });
  return double(sum<T>(total));
}

}  // namespace infopro::INFOPRO_ISA
