// Softmax cross entropy on tiles of logits: classes down, nr rows of the batch across the lanes. Reductions
// over classes are then element by element.
#pragma once

#include "gemm.h"

namespace infopro::INFOPRO_ISA {

// Add `classes` more logits to each lane's running state: the maximum `best`, the sum of exp(x - best), the
// weighted sum of x (by `parts`, laid out as x, or if smooth by class_weight), the logit at the target, and
// the first class with the maximum.
template <class T>
void softmax_update(const T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight,
                    const T* parts, bool smooth, const label<T>* target, T* best, T* sum, T* weighted,
                    T* at_target, label<T>* argmax) {
  using lanes = typename Simd<T>::mask;
  for (int j = 0; j < NR<T>; j += Simd<T>::width) {
    vec<T> before = load<T>(best + j), top = before, at = load<T>(at_target + j),
           total = load<T>(weighted + j);
    lanes wanted, arg;
    __builtin_memcpy(&wanted, target + j, sizeof wanted);
    __builtin_memcpy(&arg, argmax + j, sizeof arg);
    for (int64_t c = 0; c < classes; c++) {
      vec<T> v = load<T>(x + c * NR<T> + j) + (bias ? bias[c] : T(0));
      lanes index = label<T>(first + c) - lanes{};
      lanes better = v > top;
      top = better ? v : top;
      arg = better ? index : arg;
      at = index == wanted ? v : at;
      if (parts)
        total += v * load<T>(parts + c * NR<T> + j);
      else if (smooth)
        total += v * (class_weight ? class_weight[c] : T(1));
    }
    // If all logits so far are -inf, subtract nothing; the first other logit then scales their sum by 0.
    vec<T> s = {}, base = top == -T(__builtin_huge_val()) ? vec<T>{} : top;
    for (int64_t c = 0; c < classes; c++)
      s += exp<T>(load<T>(x + c * NR<T> + j) + (bias ? bias[c] : T(0)) - base);
    store<T>(best + j, top);
    store<T>(sum + j, load<T>(sum + j) * exp<T>(before - base) + s);
    store<T>(weighted + j, total);
    store<T>(at_target + j, at);
    __builtin_memcpy(argmax + j, &arg, sizeof arg);
  }
}

// Overwrite x with d loss / d x = probability exp(x - lse) - smoothing w_c - (at_target if c is the target),
// w_c: from `parts`, laid out as x, or class_weight; 0 in lanes that are not kept.
template <class T>
void softmax_gradient(T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight,
                      const T* parts, const label<T>* target, const T* lse, const T* probability,
                      const T* smoothing, const T* at_target, const label<T>* kept) {
  using lanes = typename Simd<T>::mask;
  for (int j = 0; j < NR<T>; j += Simd<T>::width) {
    vec<T> l = load<T>(lse + j), p = load<T>(probability + j), e = load<T>(smoothing + j),
           at = load<T>(at_target + j), zero = {};
    lanes wanted, keep;
    __builtin_memcpy(&wanted, target + j, sizeof wanted);
    __builtin_memcpy(&keep, kept + j, sizeof keep);
    for (int64_t c = 0; c < classes; c++) {
      vec<T> v = load<T>(x + c * NR<T> + j) + (bias ? bias[c] : T(0));
      v = p * exp<T>(v - l);
      v -= e * (parts ? load<T>(parts + c * NR<T> + j) : splat<T>(class_weight ? class_weight[c] : T(1)));
      lanes index = label<T>(first + c) - lanes{};
      v -= index == wanted ? at : zero;
      store<T>(x + c * NR<T> + j, keep != 0 ? v : zero);
    }
  }
}

template <class T> void lane_sums(const T* x, int64_t rows, int64_t panels, int64_t panel, T* sums) {
  for (int64_t r = 0; r < rows; r++) {
    vec<T> s = {};
    for (int64_t q = 0; q < panels; q++)
      for (int j = 0; j < NR<T>; j += Simd<T>::width) s += load<T>(x + q * panel + r * NR<T> + j);
    sums[r] += infopro::INFOPRO_ISA::sum<T>(s);
  }
}

}  // namespace infopro::INFOPRO_ISA
