// Cross entropy of logits (N, C, h, w), resized to (H, W), and its gradient, without the resized logits.
//
// The unit of work is a gap: gap (n, y) holds the rows of pixels between the source rows y and y + 1. For a
// vector of pixels along x, both source rows are expanded to tiles (C, width) once in a gap. A row of pixels
// is then a mix of two tiles: all its classes are in the L1 cache, and reductions over them are lane by lane.
// The gradient in the two tiles is summed over the rows of the gap, and then added to the source rows.
#pragma once

#include "../kernels.h"
#include "convert.h"
#include "simd.h"

namespace infopro::INFOPRO_ISA {

template <class T> struct UpsampleScratch {
  static constexpr int width = Simd<T>::width;
  T *low, *high;            // (C, pitch): the source rows of the gap
  T *d_low, *d_high;        // (C, pitch): their gradients
  T *expanded, *gradient;   // (2, C, width): the source rows at a vector of pixels, and the gradient there
  T *tile;                  // (C, width): logits, then their exponentials
  int64_t row = -1;         // n h + y of `low`

  UpsampleScratch(const UpsampleCrossEntropy<T>& d, T* memory) {
    T** rows[] = {&low, &high, &d_low, &d_high};
    for (T** p : rows) *p = memory, memory += d.C * d.pitch;
    for (int64_t i = 0; i < 2 * d.C * d.pitch; i++) low[i] = T(0);  // the padding is read, but not used
    expanded = memory;
    gradient = expanded + 2 * d.C * width;
    tile = gradient + 2 * d.C * width;
  }

  // Read the source rows y and y + 1, or reuse row y from the last gap.
  void move_to(const UpsampleCrossEntropy<T>& d, int64_t n, int64_t y) {
    const bool next = y > 0 && row + 1 == n * d.h + y;
    if (next) {
      T* other = low;
      low = high;
      high = other;
    } else {
      read(d, n, y, low);
    }
    read(d, n, y + 1 < d.h ? y + 1 : y, high);
    row = n * d.h + y;
  }

 private:
  void read(const UpsampleCrossEntropy<T>& d, int64_t n, int64_t y, T* to) {
    const Maps& m = d.logits;
    for (int64_t c = 0; c < d.C; c++)
      read_row(to + c * d.pitch, m.data, m.dtype, n * m.n + c * m.c + y * m.y, m.x, d.w);
  }
};

template <class T> int64_t upsample_scratch(const UpsampleCrossEntropy<T>& d) {
  return d.C * (4 * d.pitch + 5 * Simd<T>::width);
}

// to (C, width) = the source row (C, pitch) at the pixels of vector v.
template <class T>
INLINE void expand_logits(const UpsampleCrossEntropy<T>& d, int64_t v, const T* row, T* to) {
  constexpr int width = Simd<T>::width;
  const label<T>*low = d.low + v * width, *high = d.high + v * width;
  const T *low_weight = d.low_weight + v * width, *high_weight = d.high_weight + v * width;
  row += d.base[v];
  if (INFOPRO_BYTES > 16 && d.chunks == 1) {  // SSE2 has no shuffle by variable lanes
    typename Simd<T>::mask from_low, from_high;
    __builtin_memcpy(&from_low, low, sizeof from_low);
    __builtin_memcpy(&from_high, high, sizeof from_high);
    vec<T> a = load<T>(low_weight), b = load<T>(high_weight);
    for (int64_t c = 0; c < d.C; c++) {
      vec<T> x = load<T>(row + c * d.pitch);
      store<T>(to + c * width, __builtin_shuffle(x, from_low) * a + __builtin_shuffle(x, from_high) * b);
    }
  } else {
    for (int64_t c = 0; c < d.C; c++)
      for (int i = 0; i < width; i++)
        to[c * width + i] =
            row[c * d.pitch + low[i]] * low_weight[i] + row[c * d.pitch + high[i]] * high_weight[i];
  }
}

// The transpose: add the gradient (C, width) at the pixels of vector v to the row.
template <class T>
INLINE void collect_gradient(const UpsampleCrossEntropy<T>& d, int64_t v, const T* gradient, T* row) {
  constexpr int width = Simd<T>::width;
  row += d.base[v];
  for (int64_t chunk = 0; chunk < d.chunks; chunk++, row += width) {
    const T* weights = d.collect + (v * d.chunks + chunk) * width * width;
    vec<T> m[width];
    UNROLL(16) for (int i = 0; i < width; i++) m[i] = load<T>(weights + i * width);
    for (int64_t c = 0; c < d.C; c++) {
      vec<T> even = {}, odd = {};
      UNROLL(16) for (int i = 0; i < width; i += 2) {
        even += m[i] * gradient[c * width + i];
        odd += m[i + 1] * gradient[c * width + i + 1];
      }
      store<T>(row + c * d.pitch, load<T>(row + c * d.pitch) + (even + odd));
    }
  }
}

// The labels of a vector of pixels: -1 if ignored, if there is no pixel, or if the label is no class, which
// sets `bad`.
template <class T, class S>
INLINE void read_label_row(const S* from, int64_t stride, int count, int64_t ignore_index, int64_t C,
                           label<T>* to, bool& bad) {
  int64_t wrong = 0;
  for (int i = 0; i < count; i++) {
    int64_t value = int64_t(from[i * stride]);
    bool kept = value != ignore_index, inside = value >= 0 && value < C;
    wrong |= kept & !inside;
    to[i] = kept & inside ? label<T>(value) : label<T>(-1);
  }
  bad |= wrong != 0;
}

// Return whether any label of the vector is a class.
template <class T>
INLINE bool read_labels(const UpsampleCrossEntropy<T>& d, int64_t n, int64_t Y, int64_t X, int count,
                        label<T>* to, bool& bad) {
  constexpr int width = Simd<T>::width;
  const Labels& t = d.target;
  const int64_t at = n * t.n + Y * t.y + X * t.x;
  const auto read = [&](auto* data) {
    if (t.x == 1 && count == width)
      read_label_row<T>(data + at, 1, width, d.ignore_index, d.C, to, bad);
    else
      read_label_row<T>(data + at, t.x, count, d.ignore_index, d.C, to, bad);
  };
  for (int i = count; i < width; i++) to[i] = -1;
  switch (t.dtype) {
    case Integer::u8: read((const uint8_t*)t.data); break;
    case Integer::i8: read((const int8_t*)t.data); break;
    case Integer::i16: read((const int16_t*)t.data); break;
    case Integer::i32: read((const int32_t*)t.data); break;
    case Integer::i64: read((const int64_t*)t.data); break;
  }
  label<T> any = -1;
  for (int i = 0; i < width; i++) any &= to[i];
  return any != -1;
}

// A vector of pixels of one row, on its way through the steps below.
template <class T> struct Pixels {
  using lanes = typename Simd<T>::mask;
  label<T> target[Simd<T>::width];
  lanes kept;                  // as a selection
  vec<T> weight;               // of the target's class, 0 if not kept
  vec<T> top, at_target, sum;  // the largest logit, the target's logit, the sum of exp(x - top)
  vec<T> deviation;            // with label smoothing: sum over classes of class_weight (x - top)
};

// tile = the logits of a vector of pixels. Set what of `p` needs no exponentials.
template <class T>
INLINE void softmax_step(const UpsampleCrossEntropy<T>& d, int64_t Y, const T* expanded, T* tile,
                         Pixels<T>& p) {
  constexpr int width = Simd<T>::width;
  const vec<T> low = splat<T>(d.row_low_weight[Y]), high = splat<T>(d.row_high_weight[Y]);
  const T* below = expanded + d.C * width;
  vec<T> top = splat<T>(-T(__builtin_huge_val()));
  for (int64_t c = 0; c < d.C; c++) {
    vec<T> x = load<T>(expanded + c * width) * low + load<T>(below + c * width) * high;
    store<T>(tile + c * width, x);
    top = x > top ? x : top;
  }
  T at[width], weight[width];
  for (int i = 0; i < width; i++) {
    const label<T> t = p.target[i];
    at[i] = t < 0 ? T(0) : tile[t * width + i];
    weight[i] = t < 0 ? T(0) : d.class_weight ? d.class_weight[t] : T(1);
  }
  p.at_target = load<T>(at);
  p.weight = load<T>(weight);
  p.top = top;
  p.deviation = vec<T>{};
  if (d.smoothing > 0)
    for (int64_t c = 0; c < d.C; c++)
      p.deviation += (load<T>(tile + c * width) - top) * (d.class_weight ? d.class_weight[c] : T(1));
}

// tile = exp(x - top).
template <class T> INLINE void exponentials_step(const UpsampleCrossEntropy<T>& d, T* tile, Pixels<T>& p) {
  constexpr int width = Simd<T>::width;
  vec<T> sum = {};
  for (int64_t c = 0; c < d.C; c++) {
    vec<T> e = exp<T>(load<T>(tile + c * width) - p.top);
    store<T>(tile + c * width, e);
    sum += e;
  }
  p.sum = sum;
}

// Count the predicted class, the first one with the largest logit.
template <class T> INLINE void count_step(const UpsampleCrossEntropy<T>& d, const T* tile, const Pixels<T>& p,
                       int64_t* confusion, bool shared) {
  constexpr int width = Simd<T>::width;
  using lanes = typename Simd<T>::mask;
  lanes first = {};
  for (int64_t c = d.C - 1; c > 0; c--)
    first = load<T>(tile + c * width) == p.top ? label<T>(c) - lanes{} : first;
  first = load<T>(tile) == p.top ? lanes{} : first;
  label<T> found[width];
  __builtin_memcpy(found, &first, sizeof first);
  for (int i = 0; i < width; i++) {
    if (p.target[i] < 0) continue;
    int64_t* count = confusion + int64_t(p.target[i]) * d.C + found[i];
    if (shared)
      __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    else
      ++*count;
  }
}

template <class T> INLINE vec<T> loss_step(const UpsampleCrossEntropy<T>& d, const Pixels<T>& p) {
  const vec<T> log_sum = log<T>(p.sum), zero = {};
  vec<T> value = p.weight * (p.top - p.at_target + log_sum) * (T(1) - d.smoothing);
  if (d.smoothing > 0) value += (log_sum * d.weight_sum - p.deviation) * (d.smoothing / T(d.C));
  return p.kept != 0 ? value : zero;
}

// gradient (2, C, width) += the weights of the two source rows times d loss / d x, with
//     d loss / d x = g (probability e / sum - smoothing / C w_c - [c is the target] (1 - smoothing) w_t)
template <class T>
INLINE void gradient_step(const UpsampleCrossEntropy<T>& d, int64_t Y, vec<T> g, T* tile, const Pixels<T>& p,
                          T* gradient) {
  constexpr int width = Simd<T>::width;
  const vec<T> low = splat<T>(d.row_low_weight[Y]), high = splat<T>(d.row_high_weight[Y]), zero = {};
  T* below = gradient + d.C * width;
  const vec<T> at = p.weight * (T(1) - d.smoothing), probability = at + d.smoothing / T(d.C) * d.weight_sum;
  T less[width];  // to subtract from the target's e, so that one factor serves all classes
  store<T>(less, probability == zero ? zero : p.sum * at / probability);
  for (int i = 0; i < width; i++)
    if (p.target[i] >= 0) tile[p.target[i] * width + i] -= less[i];
  const vec<T> factor = g * probability / p.sum;
  const auto run = [&](const auto& smooth) {
    for (int64_t c = 0; c < d.C; c++) {
      vec<T> q = load<T>(tile + c * width) * factor - smooth(c);
      q = p.kept != 0 ? q : zero;
      store<T>(gradient + c * width, load<T>(gradient + c * width) + q * low);
      store<T>(below + c * width, load<T>(below + c * width) + q * high);
    }
  };
  const vec<T> smoothing = g * (d.smoothing / T(d.C));
  if (d.smoothing > 0 && d.class_weight)
    run([&](int64_t c) { return smoothing * d.class_weight[c]; });
  else if (d.smoothing > 0)
    run([&](int64_t) { return smoothing; });
  else
    run([&](int64_t) { return zero; });
}

// The upstream gradient of a vector of pixels.
template <class T>
INLINE vec<T> read_upstream(const UpsampleOutputs<T>& to, int64_t n, int64_t Y, int64_t X, int count) {
  const T* from = to.upstream + n * to.upstream_n + Y * to.upstream_y + X * to.upstream_x;
  if (to.upstream_x == 0) return splat<T>(*from);
  if (to.upstream_x == 1 && count == Simd<T>::width) return load<T>(from);
  vec<T> g = {};
  for (int i = 0; i < count; i++) g[i] = from[i * to.upstream_x];
  return g;
}

// The pixels of vector v in all rows of a gap. sums += (loss, weight of the targets)
template <class T> void upsample_vector(const UpsampleCrossEntropy<T>& d, int64_t n, int64_t y, int64_t v,
                     const UpsampleScratch<T>& s, const UpsampleOutputs<T>& to, double* sums, bool& bad) {
  constexpr int width = Simd<T>::width;
  const int64_t X = v * width;
  const int count = d.W - X < width ? int(d.W - X) : width;
  expand_logits(d, v, s.low, s.expanded);
  expand_logits(d, v, s.high, s.expanded + d.C * width);
  if (to.gradient)
    for (int64_t i = 0; i < 2 * d.C * width; i += width) store<T>(s.gradient + i, vec<T>{});
  vec<T> loss = {}, weight = {};
  for (int64_t Y = d.first_row[y]; Y < d.first_row[y + 1]; Y++) {
    Pixels<T> p;
    vec<T> value = {};
    if (read_labels(d, n, Y, X, count, p.target, bad)) {
      __builtin_memcpy(&p.kept, p.target, sizeof p.kept);
      p.kept = p.kept >= 0;
      softmax_step(d, Y, s.expanded, s.tile, p);
      if (to.confusion) count_step(d, s.tile, p, to.confusion, to.shared_confusion);
      exponentials_step(d, s.tile, p);
      if (sums) {
        value = loss_step(d, p);
        loss += value;
        weight += p.weight;
      }
      if (to.gradient) gradient_step(d, Y, read_upstream(to, n, Y, X, count), s.tile, p, s.gradient);
    }
    if (to.loss) {
      T* row = to.loss + (n * d.H + Y) * d.W + X;
      count == width ? store<T>(row, value) : store_first<T>(row, value, count);
    }
  }
  if (sums) {
    sums[0] += double(sum<T>(loss));
    sums[1] += double(sum<T>(weight));
  }
  if (to.gradient) {
    collect_gradient(d, v, s.gradient, s.d_low);
    collect_gradient(d, v, s.gradient + d.C * width, y + 1 < d.h ? s.d_high : s.d_low);
  }
}

// Gaps [first, last), in order. Source row y gets gradients from gap y - 1 and from gap y. If only one of
// them is here, its part goes to `head` (of the first gap, if it is not a map's first) or to `tail` (of the
// last gap, for the next row).
template <class T>
void upsample_gaps(const UpsampleCrossEntropy<T>& d, int64_t first, int64_t last, T* scratch,
                   const UpsampleOutputs<T>& to, T* head, T* tail, bool& bad) {
  UpsampleScratch<T> s(d, scratch);
  const int64_t size = d.C * d.pitch;
  T* above = tail;  // the gradient of source row y from gap y - 1
  for (int64_t gap = first; gap < last; gap++) {
    const int64_t n = gap / d.h, y = gap % d.h;
    if (to.gradient)
      for (int64_t i = 0; i < size; i++) s.d_low[i] = s.d_high[i] = T(0);
    if (to.sums) to.sums[2 * gap] = to.sums[2 * gap + 1] = 0;
    if (d.first_row[y] < d.first_row[y + 1]) {
      s.move_to(d, n, y);
      for (int64_t v = 0; v * Simd<T>::width < d.W; v++)
        upsample_vector(d, n, y, v, s, to, to.sums ? to.sums + 2 * gap : nullptr, bad);
    }
    if (!to.gradient) continue;
    if (y > 0 && gap == first) {
      for (int64_t i = 0; i < size; i++) head[i] = s.d_low[i];
    } else {
      for (int64_t i = 0; i < size && y > 0; i++) s.d_low[i] += above[i];
      const Maps& m = to.d_logits;
      for (int64_t c = 0; c < d.C; c++)
        write_row(m.data, s.d_low + c * d.pitch, m.dtype, n * m.n + c * m.c + y * m.y, m.x, d.w);
    }
    T* free = above;
    above = s.d_high;
    s.d_high = free;
  }
  if (to.gradient && above != tail)
    for (int64_t i = 0; i < size; i++) tail[i] = above[i];
}

}  // namespace infopro::INFOPRO_ISA
