// Statistics of a channel of one sample, for batch norm.
#pragma once

#include "simd.h"

namespace infopro::INFOPRO_ISA {

// Mean of `count` of the numbers row[0..span), and the sum of squared deviations from it; span is rounded up
// to whole vectors. set_rest(value) sets the numbers that do not count.
template <class T, class F>
INLINE void channel_statistics(const T* row, int64_t span, int64_t count, F set_rest, double& mean,
                               double& squares) {
  constexpr int width = Simd<T>::width;
  set_rest(T(0));
  vec<T> total = {};
  for (int64_t i = 0; i < span; i += width) total += load<T>(row + i);
  T center = T(double(sum<T>(total)) / double(count));
  set_rest(center);
  vec<T> square = {}, rest = {};
  for (int64_t i = 0; i < span; i += width) {
    vec<T> deviation = load<T>(row + i) - center;
    square += deviation * deviation;
    rest += deviation;
  }
  // The center was rounded: the sum of the deviations corrects it and the squares.
  double left = double(sum<T>(rest)) / double(count);
  mean = double(center) + left;
  squares = double(sum<T>(square)) - left * left * double(count);
}

}  // namespace infopro::INFOPRO_ISA
