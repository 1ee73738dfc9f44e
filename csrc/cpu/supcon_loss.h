// The supervised contrastive loss on tiles of similarities: the other samples down, nr anchors across the
// lanes. Reductions over the others are then element by element, and a tile is a packed operand of the next
// product.
#pragma once

#include "gemm.h"
#include "taps.h"

namespace infopro::INFOPRO_ISA {

// Set the similarity of each anchor with itself. Others are numbered from `first` on, anchors from `anchor`
// on.
template <class T> INLINE void set_self(T* s, int64_t others, int64_t first, int64_t anchor, T value) {
  for (int64_t i = 0; i < NR<T>; i++) {
    int64_t other = anchor + i - first;
    if (other >= 0 && other < others) s[other * NR<T> + i] = value;
  }
}

// Add `others` more samples to each anchor's running maximum of scale s, sum of exp(scale s - maximum), and
// sum of its positives. bound: 0, or an upper bound of scale s so near that no sum underflows; `best` must
// then hold it.
template <class T> void supcon_forward(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound,
                    const label<T>* labels, const label<T>* anchor_labels, T* best, T* sum, T* positive) {
  using lanes = typename Simd<T>::mask;
  set_self<T>(s, others, first, anchor, -T(__builtin_huge_val()));
  for (int j = 0; j < NR<T>; j += Simd<T>::width) {
    vec<T> before = load<T>(best + j), top = before, pos = {}, total = {}, zero = {};
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
    }
    if (!(bound > T(0)))
      for (int64_t o = 0; o < others; o++) total += exp<T>(load<T>(s + o * NR<T> + j) * scale - top);
    store<T>(best + j, top);
    store<T>(sum + j, load<T>(sum + j) * exp<T>(before - top) + total);
    store<T>(positive + j, load<T>(positive + j) + pos);
  }
}

// The same with a bound, for others that are no anchors of the group. Each pair counts for both its samples.
template <class T>
void supcon_forward_both(const T* s, int64_t others, T scale, T bound, const label<T>* labels,
                         const label<T>* anchor_labels, T* sum, T* positive, T* other_sum,
                         T* other_positive) {
  using lanes = typename Simd<T>::mask;
  constexpr int width = Simd<T>::width;
  vec<T> total[VECTORS] = {}, pos[VECTORS] = {}, zero = {};
  lanes mine[VECTORS];
  __builtin_memcpy(mine, anchor_labels, sizeof mine);
  for (int64_t o0 = 0; o0 < others; o0 += width) {
    const int n = others - o0 < width ? int(others - o0) : width;
    vec<T> row[width], row_pos[width];
    for (int i = 0; i < width; i++) row[i] = row_pos[i] = zero;
    for (int i = 0; i < n; i++)
      UNROLL(2) for (int q = 0; q < VECTORS; q++) {
        vec<T> v = load<T>(s + (o0 + i) * NR<T> + q * width) * scale, e = exp<T>(v - bound),
               p = mine[q] == labels[o0 + i] ? v : zero;
        total[q] += e;
        pos[q] += p;
        row[i] += e;
        row_pos[i] += p;
      }
    vec<T> e = sums<T>(row), p = sums<T>(row_pos);
    if (n == width) {
      store<T>(other_sum + o0, load<T>(other_sum + o0) + e);
      store<T>(other_positive + o0, load<T>(other_positive + o0) + p);
    } else {
      for (int i = 0; i < n; i++) other_sum[o0 + i] += e[i], other_positive[o0 + i] += p[i];
    }
  }
  for (int q = 0; q < VECTORS; q++) {
    store<T>(sum + q * width, load<T>(sum + q * width) + total[q]);
    store<T>(positive + q * width, load<T>(positive + q * width) + pos[q]);
  }
}

// Overwrite s with the weight of z_other in d loss / d z_anchor: scale (push_i exp(scale s - lse_i) - pull_i
// [alike] + the same of the other), and 0 for an anchor with itself. pull = g / |P| and push = g, both 0
// without positives. bound: 0, or an upper bound of scale s so near every lse that exp(bound - lse) is
// finite. push then contains that factor, and one exponential serves both samples.
template <class T> void supcon_backward(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound,
                     const label<T>* labels, const T* lse, const T* pull, const T* push,
                     const label<T>* anchor_labels, const T* anchor_lse, const T* anchor_pull,
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

// to (others, pitch) += s (others, nr) z (nr, pitch): what one group of anchors adds to the others. pitch:
// whole vectors.
template <class T> void supcon_others(const T* s, int64_t others, const T* z, int64_t pitch, T* to) {
  constexpr int V = INFOPRO_MR == 12 ? 4 : 2, width = Simd<T>::width;
  int64_t c = 0;
  for (; c + V * width <= pitch; c += V * width)
    row_product<V, true>(others, s, NR<T>, z + c, pitch, 0, NR<T>, to + c, pitch);
  for (; c < pitch; c += width) row_product<1, true>(others, s, NR<T>, z + c, pitch, 0, NR<T>, to + c, pitch);
}

}  // namespace infopro::INFOPRO_ISA
