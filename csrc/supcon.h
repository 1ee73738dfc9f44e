// The supervised contrastive loss on tiles of similarities, the other samples down, nr anchors across the lanes: every
// reduction over the others is element by element, and the tile is at once a packed operand of the next product.
#pragma once

#include "gemm.h"

namespace infopro {
namespace INFOPRO_ISA {

// Give the pairs of an anchor with itself the similarity `value`; others are first.., anchors anchor..
template <class T>
INLINE void set_self(T* s, int64_t others, int64_t first, int64_t anchor, T value) {
  for (int64_t i = 0; i < NR<T>; i++) {
    int64_t other = anchor + i - first;
    if (other >= 0 && other < others) s[other * NR<T> + i] = value;
  }
}

// Take `others` more samples into each anchor's running maximum of scale s, sum of exp(scale s - maximum), sum and number of
// positives. bound: 0, or a bound of scale s so near that no sum underflows: then `best` has to hold it, and is not searched for.
template <class T>
void supcon_forward(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels,
                    const label<T>* anchor_labels, T* best, T* sum, T* positive, T* count) {
  using lanes = typename Simd<T>::mask;
  set_self<T>(s, others, first, anchor, -T(__builtin_huge_val()));
  for (int j = 0; j < NR<T>; j += Simd<T>::width) {
    vec<T> before = load<T>(best + j), top = before, pos = {}, num = load<T>(count + j), total = {}, zero = {};
    vec<T> one = splat<T>(T(1));
    lanes mine, itself;
    __builtin_memcpy(&mine, anchor_labels + j, sizeof mine);
    for (int i = 0; i < Simd<T>::width; i++) itself[i] = label<T>(anchor + j + i - first);
    for (int64_t o = 0; o < others; o++) {
      vec<T> v = load<T>(s + o * NR<T> + j) * scale;
      if (bound > T(0))
        total += exp<T>(v - bound);
      else
        top = v > top ? v : top;
      lanes alike = (mine == labels[o]) & (itself != label<T>(o));
      pos += alike ? v : zero;
      num += alike ? one : zero;
    }
    if (!(bound > T(0)))
      for (int64_t o = 0; o < others; o++) total += exp<T>(load<T>(s + o * NR<T> + j) * scale - top);
    store<T>(best + j, top);
    store<T>(sum + j, load<T>(sum + j) * exp<T>(before - top) + total);
    store<T>(positive + j, load<T>(positive + j) + pos);
    store<T>(count + j, num);
  }
}

// s becomes what z_other is weighted with in d loss / d z_anchor: scale (push_i exp(scale s - lse_i) - pull_i [alike] + the same of
// the other), 0 for the pair of an anchor with itself; pull = g / |P| and push = g, both 0 without positives.
// bound: 0, or a bound of scale s so near every lse that exp(bound - lse) is finite, which push then comes multiplied with: one
// exponential serves both.
template <class T>
void supcon_backward(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels, const T* lse,
                     const T* pull, const T* push, const label<T>* anchor_labels, const T* anchor_lse, const T* anchor_pull,
                     const T* anchor_push) {
  using lanes = typename Simd<T>::mask;
  for (int j = 0; j < NR<T>; j += Simd<T>::width) {
    vec<T> l = load<T>(anchor_lse + j), g = load<T>(anchor_push + j), p = load<T>(anchor_pull + j), zero = {};
    lanes mine;
    __builtin_memcpy(&mine, anchor_labels + j, sizeof mine);
    for (int64_t o = 0; o < others; o++) {
      vec<T> v = load<T>(s + o * NR<T> + j) * scale, w;
      lanes alike = mine == labels[o];
      if (bound > T(0))
        w = (g + push[o]) * exp<T>(v - bound);
      else
        w = g * exp<T>(v - l) + push[o] * exp<T>(v - lse[o]);
      w -= alike ? p + pull[o] : zero;
      store<T>(s + o * NR<T> + j, w * scale);
    }
  }
  set_self<T>(s, others, first, anchor, T(0));
}

}  // namespace INFOPRO_ISA
}  // namespace infopro
