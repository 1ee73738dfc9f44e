// supcon_loss on the CPU. Anchors lie in groups of nr across the lanes. Each group meets the other samples in
// chunks: a tile of similarities is reduced (forward), or turned into weights and multiplied by the samples
// (backward).
#include <cstring>

#include "../checks.h"

namespace infopro {
namespace {

constexpr const char* OP = "supcon_loss";
constexpr int64_t CHUNK = 768;  // others in a tile, a multiple of every mr

// Labels as numbers below 4 M + 1024: counted from the smallest label on, or by rank if they are too far
// apart. counts: how many others have each sample's label.
template <class T> Buffer<label<T>> dense_labels(const Tensor& labels, int64_t padded, Buffer<T>& counts) {
  Tensor wide = wide_labels(labels);
  const int64_t* y = static_cast<const int64_t*>(wide.const_data_ptr());
  const int64_t M = wide.numel();
  Buffer<label<T>> dense(padded, -1);
  if (M == 0) return dense;
  const auto [smallest, largest] = std::minmax_element(y, y + M);
  const uint64_t range = uint64_t(*largest) - uint64_t(*smallest);
  std::vector<int64_t> known;
  if (range >= uint64_t(4 * M + 1024)) {
    known.assign(y, y + M);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
  }
  std::vector<int64_t> histogram(known.empty() ? size_t(range) + 1 : known.size());
  for (int64_t i = 0; i < M; i++) {
    dense[i] = label<T>(known.empty() ? y[i] - *smallest
                                      : std::lower_bound(known.begin(), known.end(), y[i]) - known.begin());
    histogram[dense[i]]++;
  }
  for (int64_t i = 0; i < M; i++) counts[i] = T(histogram[dense[i]] - 1);
  return dense;
}

// a . b in float64, in eight sums side by side.
template <class T> double dot(const T* a, const T* b, int64_t n) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int64_t i = 0; i < 8; i++) sums[i] += double(a[k + i]) * double(b[k + i]);
  for (; k < n; k++) sums[0] += double(a[k]) * double(b[k]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The rows z, normalised on request, padded to whole vectors, and packed for the tiles. inverse_norm is 0 for
// a row of zeros.
template <class T> struct Rows {
  const Kernels<T>& kernel = kernels<T>();
  int64_t M, D, pitch, groups, padded;
  Buffer<T> z, inverse_norm, as_a, as_b, count;
  Buffer<label<T>> labels;

  Rows(const Tensor& features, const Tensor& labels_, bool normalize)
      : M(features.size(0)), D(features.size(1)), pitch(ceil_div(D, kernel.width) * kernel.width),
        groups(ceil_div(M, kernel.nr)), padded(groups * kernel.nr), z(padded * pitch), inverse_norm(M),
        as_a(ceil_div(M, kernel.mr) * kernel.mr * D), as_b(padded * D), count(M),
        labels(dense_labels<T>(labels_, padded, count)) {
    Matrix from = matrix(OP, "features", features);
    share(groups, threads(), [&](int64_t first, int64_t last, int64_t) {
      std::fill(z.get() + first * kernel.nr * pitch, z.get() + last * kernel.nr * pitch, T(0));
      for (int64_t i = first * kernel.nr; i < std::min(M, last * kernel.nr); i++) {
        T* row = z.get() + i * pitch;
        kernel.read_row(row, from.data, from.dtype, i * from.row, from.column, D);
        inverse_norm[i] = T(1);
        if (!normalize) continue;
        double norm = std::sqrt(dot(row, row, D));
        inverse_norm[i] = norm <= 1e-12 ? T(0) : T(1.0 / norm);  // nan stays nan
        for (int64_t k = 0; k < D; k++) row[k] *= inverse_norm[i];
      }
      int64_t anchor = first * kernel.nr, n = std::min(M, last * kernel.nr) - anchor;
      kernel.pack_b(as_matrix(anchor).transposed(), D, n, D, as_b.get() + anchor * D);
    });
    const int64_t panels = ceil_div(M, kernel.mr);
    share(panels, threads(), [&](int64_t first, int64_t last, int64_t) {
      int64_t row = first * kernel.mr;
      kernel.pack_a(as_matrix(row), std::min(M, last * kernel.mr) - row, D, D, as_a.get() + row * D);
    });
  }

  Matrix as_matrix(int64_t row, int64_t column = 0) const {
    return {z.get() + row * pitch + column, dtype_as<T>, pitch, 1};
  }

  // The first other of a group's tiles if each pair is taken once: left operands are whole panels.
  int64_t first_other(int64_t group) const { return group * kernel.nr / kernel.mr * kernel.mr; }

  // s[other][lane] = the similarities of others first..first+n and one group of anchors
  void similarities(int64_t first, int64_t n, int64_t group, T* s) const {
    kernel.gemm(n, kernel.nr, D, as_a.get() + first * D, D, as_b.get() + group * kernel.nr * D, D, s,
                kernel.nr, kernel.nr, false);
  }

  // work(group, worker) for every group. With `halves` later groups cost less, so that early ones alternate
  // with late ones.
  template <class F>
  void for_groups(int64_t workers, bool halves, const F& work) const {
    share(groups, workers, [&](int64_t first, int64_t last, int64_t worker) {
      for (int64_t i = first; i < last; i++)
        work(!halves ? i : i % 2 == 0 ? i / 2 : groups - 1 - i / 2, worker);
    });
  }
};

// An upper bound of similarities / temperature within exp's range of every row's log-sum-exp; 0 if there is
// none. For rows of length one it is 1 / temperature, as lse is then at least -1 / temperature, unless the
// temperature is tiny.
template <class T> T similarity_bound(double temperature, bool normalize) {
  return normalize && temperature >= 0.05 ? T(1.0 / temperature) : T(0);
}

// Maxima, sums of exp(s / temperature - maximum), and sums of positives of every anchor. With a bound of the
// similarities every pair is taken once and counts for both its samples; each thread then has its own sums
// for all samples.
template <class T> struct AnchorSums {
  const Rows<T>& rows;
  const Kernels<T>& kernel = rows.kernel;
  const T scale, bound;
  const int64_t nr = kernel.nr, workers = std::min(threads(), rows.groups);
  Buffer<T> tiles, best, sum, positive;

  AnchorSums(const Rows<T>& r, T scale_, T bound_)
      : rows(r), scale(scale_), bound(bound_), tiles(workers * CHUNK * nr),
        best(rows.padded, bound > T(0) ? bound : -T(INFINITY)), sum(parts() * rows.padded, T(0)),
        positive(parts() * rows.padded, T(0)) {
    rows.for_groups(workers, bound > T(0), [&](int64_t group, int64_t worker) { take(group, worker); });
    for (int64_t part = 1; part < parts(); part++)
      for (int64_t i = 0; i < rows.M; i++) {
        sum[i] += sum[part * rows.padded + i];
        positive[i] += positive[part * rows.padded + i];
      }
  }

  int64_t parts() const { return bound > T(0) ? workers : 1; }

  void take(int64_t group, int64_t worker) {
    const int64_t anchor = group * nr;
    T *s = tiles.get() + worker * CHUNK * nr, *sums = sum.get(), *positives = positive.get();
    if (bound > T(0)) sums += worker * rows.padded, positives += worker * rows.padded;
    const label<T>* labels = rows.labels.get();
    for (int64_t other = bound > T(0) ? rows.first_other(group) : 0; other < rows.M; other += CHUNK) {
      const int64_t end = std::min(other + CHUNK, rows.M);
      rows.similarities(other, end - other, group, s);
      // Others in front of the anchors met them earlier. Among the anchors a pair counts once, behind them
      // twice.
      const int64_t begin = bound > T(0) ? std::max(other, anchor) : other;
      const int64_t both = bound > T(0) ? std::min(end, std::max(begin, anchor + nr)) : end;
      kernel.supcon_forward(s + (begin - other) * nr, both - begin, begin, anchor, scale, bound,
                            labels + begin, labels + anchor, best.get() + anchor, sums + anchor,
                            positives + anchor);
      if (both < end)
        kernel.supcon_forward_both(s + (both - other) * nr, end - both, scale, bound, labels + both,
                                   labels + anchor, sums + anchor, positives + anchor, sums + both,
                                   positives + both);
    }
  }
};

template <class T>
Tensors2 forward(const Tensor& features, const Tensor& labels, double temperature, bool normalize) {
  const int64_t M = features.size(0);
  Tensor loss = empty({M}, scalar_type<T>), saved = empty({3, M}, scalar_type<T>);
  T *value = pointer<T>(loss), *inverse_norm = pointer<T>(saved), *lse = inverse_norm + M, *count = lse + M;
  if (M == 0) return {loss, saved};
  Rows<T> rows(features, labels, normalize);
  const AnchorSums<T> found(rows, T(1.0 / temperature), similarity_bound<T>(temperature, normalize));
  for (int64_t i = 0; i < M; i++) {
    lse[i] = M > 1 ? T(double(found.best[i]) + std::log(double(found.sum[i]))) : T(0);
    count[i] = rows.count[i];
    value[i] = count[i] > 0 ? lse[i] - found.positive[i] / count[i] : T(0);
  }
  std::copy(rows.inverse_norm.get(), rows.inverse_norm.get() + M, inverse_norm);
  return {loss, saved};
}

// Turn d loss / d z of a row, z = x / |x|, into d loss / d x = (dz - z (z . dz)) / |x|.
template <class T> void norm_backward(T* dz, const T* z, int64_t D, T inverse_norm, bool normalize) {
  if (!normalize) return;
  const T along = T(dot(dz, z, D));
  for (int64_t k = 0; k < D; k++) dz[k] = (dz[k] - z[k] * along) * inverse_norm;
}

// What supcon_backward reads of a sample.
template <class T> struct Weights {
  Buffer<T> lse, push, pull;

  Weights(int64_t M, int64_t padded, const T* upstream, const T* log_sum, const T* count, T bound)
      : lse(padded), push(padded), pull(padded) {
    for (int64_t i = 0; i < padded; i++) {
      bool counts = i < M && count[i] > 0;
      lse[i] = counts ? log_sum[i] : T(0);
      push[i] = counts ? (bound > T(0) ? T(double(upstream[i]) * std::exp(double(bound) - double(lse[i])))
                                       : upstream[i])
                       : T(0);
      pull[i] = counts ? upstream[i] / count[i] : T(0);
    }
  }
};

constexpr int64_t MOST_PARTS = int64_t(1) << 24;  // numbers of d z to hold so that pairs are taken once

// d z. The tile of a group of anchors and others is multiplied by the others, which gives d z of the anchors.
// If pairs are taken once (`halves`), it is also multiplied by the anchors, which gives the others' share;
// each thread then has its own d z. Otherwise the threads share one, in which each writes the rows of its
// groups.
template <class T> struct Gradient {
  const Rows<T>& rows;
  const Weights<T>& weights;
  const Kernels<T>& kernel = rows.kernel;
  const T scale, bound;
  const int64_t nr = kernel.nr, mr = kernel.mr, M = rows.M, D = rows.D, pitch = rows.pitch,
                workers = std::min(threads(), rows.groups);
  const bool halves = workers * M * pitch <= MOST_PARTS;
  Buffer<T> transposed;  // z^T as left operand
  Buffer<T> tiles, lanes, lines, dz;

  Gradient(const Rows<T>& r, const Weights<T>& w, T scale_, T bound_)
      : rows(r), weights(w), scale(scale_), bound(bound_), transposed(ceil_div(D, mr) * mr * M),
        tiles(workers * CHUNK * nr), lanes(workers * D * nr), lines(workers * nr * pitch),
        dz((halves ? workers : 1) * M * pitch) {
    share(ceil_div(D, mr), threads(), [&](int64_t first, int64_t last, int64_t) {
      kernel.pack_a(rows.as_matrix(0, first * mr).transposed(), std::min(D, last * mr) - first * mr, M, M,
                    transposed.get() + first * mr * M);
    });
    if (halves) share(workers, workers, [&](int64_t first, int64_t last, int64_t) {
      std::fill(dz.get() + first * M * pitch, dz.get() + last * M * pitch, T(0));
    });
    rows.for_groups(workers, halves, [&](int64_t group, int64_t worker) { take(group, worker); });
  }

  void take(int64_t group, int64_t worker) {
    const int64_t anchor = group * nr, anchors = std::min(nr, M - anchor);
    T *s = tiles.get() + worker * CHUNK * nr, *sums = lanes.get() + worker * D * nr,
      *line = lines.get() + worker * nr * pitch;
    T* mine = dz.get() + (halves ? worker * M * pitch : 0);
    const label<T>* labels = rows.labels.get();
    const T *lse = weights.lse.get(), *pull = weights.pull.get(), *push = weights.push.get();
    bool first = true;
    for (int64_t other = halves ? rows.first_other(group) : 0; other < M; other += CHUNK) {
      const int64_t end = std::min(other + CHUNK, M), begin = halves ? std::max(other, anchor) : other;
      if (begin >= end) continue;
      rows.similarities(other, end - other, group, s);
      T* w = s + (begin - other) * nr;
      kernel.supcon_backward(w, end - begin, begin, anchor, scale, bound, labels + begin, lse + begin,
                             pull + begin, push + begin, labels + anchor, lse + anchor, pull + anchor,
                             push + anchor);
      kernel.gemm(D, nr, end - begin, transposed.get() + begin * mr, M, w, end - begin, sums, nr, nr, !first);
      first = false;
      const int64_t behind = std::max(begin, anchor + nr);
      if (halves && behind < end)
        kernel.supcon_others(s + (behind - other) * nr, end - behind, rows.z.get() + anchor * pitch, pitch,
                             mine + behind * pitch);
    }
    kernel.write_lanes(sums, anchors, D, Matrix{line, dtype_as<T>, pitch, 1});
    for (int64_t i = 0; i < anchors; i++)
      for (int64_t k = 0; k < D; k++) {
        T& to = mine[(anchor + i) * pitch + k];
        to = line[i * pitch + k] + (halves ? to : T(0));
      }
  }

  // Row i, with the threads' parts added up.
  T* row(int64_t i) const {
    T* to = dz.get() + i * pitch;
    for (int64_t part = 1; part < (halves ? workers : 1); part++)
      for (int64_t k = 0; k < D; k++) to[k] += to[part * M * pitch + k];
    return to;
  }
};

template <class T>
Tensor backward(const Tensor& grad, const Tensor& features, const Tensor& labels, const Tensor& saved,
                double temperature, bool normalize) {
  const int64_t M = features.size(0), D = features.size(1);
  Tensor g_features = empty({M, D}, features.scalar_type());
  if (M == 0) return g_features;
  const Rows<T> rows(features, labels, normalize);
  const T *inverse_norm = pointer<T>(saved), *log_sum = inverse_norm + M, *count = log_sum + M,
          bound = similarity_bound<T>(temperature, normalize);
  const Buffer<T> upstream = numbers<T>(OP, "grad", grad, M, T(0));
  const Weights<T> weights(M, rows.padded, upstream.get(), log_sum, count, bound);
  const Gradient<T> gradient(rows, weights, T(1.0 / temperature), bound);
  const Matrix to = matrix(OP, "features", g_features);
  share(M, threads(), [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; i++) {
      T* dz = gradient.row(i);
      norm_backward(dz, rows.z.get() + i * rows.pitch, D, inverse_norm[i], normalize);
      rows.kernel.write_row(const_cast<void*>(to.data), dz, to.dtype, i * D, 1, D);
    }
  });
  return g_features;
}

Tensors2 supcon_loss_forward(Tensor features, Tensor labels, double temperature, bool normalize) {
  return (is_double(features) ? forward<double> : forward<float>)(features, labels, temperature, normalize);
}

Tensor supcon_loss_backward(Tensor grad, Tensor features, Tensor labels, Tensor saved, double temperature,
                            bool normalize) {
  return (is_double(features) ? backward<double> : backward<float>)(grad, features, labels, saved,
                                                                    temperature, normalize);
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("supcon_loss_forward", TORCH_BOX(&infopro::supcon_loss_forward));
  m.impl("supcon_loss_backward", TORCH_BOX(&infopro::supcon_loss_backward));
}
