// supcon_loss on the CPU. Anchors in groups of nr across the lanes; for each group the other samples in chunks:
// a tile of similarities, reduced (forward) or turned into weights and multiplied with the samples (backward).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops_cpu.h"

namespace infopro {
namespace {

constexpr const char* OP = "supcon_loss";
constexpr int64_t CHUNK = 768;  // others a tile, a multiple of every mr

// Labels as numbers that fit a lane: themselves from the smallest on, or where they are too far apart, by their order.
template <class T>
Buffer<label<T>> dense_labels(const Tensor& labels, int64_t padded) {
  Tensor wide = torch::stable::contiguous(torch::stable::to(labels, ScalarType::Long));
  const int64_t* y = static_cast<const int64_t*>(wide.const_data_ptr());
  const int64_t M = wide.numel();
  Buffer<label<T>> dense(padded);
  dense.fill(-1, padded);
  if (M == 0) return dense;
  const auto [smallest, largest] = std::minmax_element(y, y + M);
  if (uint64_t(*largest) - uint64_t(*smallest) < (uint64_t(1) << 31)) {
    for (int64_t i = 0; i < M; i++) dense[i] = label<T>(y[i] - *smallest);
    return dense;
  }
  std::vector<int64_t> known(y, y + M);
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  for (int64_t i = 0; i < M; i++) dense[i] = label<T>(std::lower_bound(known.begin(), known.end(), y[i]) - known.begin());
  return dense;
}

// a . b in float64, in eight sums side by side.
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int64_t i = 0; i < 8; i++) sums[i] += double(a[k + i]) * double(b[k + i]);
  for (; k < n; k++) sums[0] += double(a[k]) * double(b[k]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The rows z, normalised where asked for and packed for the tiles; inverse norms (0 for a row without direction).
template <class T>
struct Rows {
  const Kernels<T>& kernel = kernels<T>();
  int64_t M, D, groups, padded;
  Buffer<T> z, inverse_norm, as_a, as_b;
  Buffer<label<T>> labels;

  Rows(const Tensor& features, const Tensor& labels_, bool normalize)
      : M(features.size(0)), D(features.size(1)), groups(ceil_div(M, kernel.nr)), padded(groups * kernel.nr), z(M * D), inverse_norm(M),
        as_a(ceil_div(M, kernel.mr) * kernel.mr * D), as_b(padded * D), labels(dense_labels<T>(labels_, padded)) {
    Matrix from = matrix(OP, "features", features);
    share(groups, threads(), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first * kernel.nr; i < std::min(M, last * kernel.nr); i++) {
        T* row = z.get() + i * D;
        kernel.read_row(row, from.data, from.dtype, i * from.row, from.column, D);
        inverse_norm[i] = T(1);
        if (!normalize) continue;
        double norm = std::sqrt(dot(row, row, D));
        inverse_norm[i] = norm <= 1e-12 ? T(0) : T(1.0 / norm);  // nan stays nan
        for (int64_t k = 0; k < D; k++) row[k] *= inverse_norm[i];
      }
      int64_t anchor = first * kernel.nr, n = std::min(M, last * kernel.nr) - anchor;
      kernel.pack_b(Matrix{z.get() + anchor * D, dtype(), D, 1}.transposed(), D, n, D, as_b.get() + anchor * D);
    });
    const int64_t panels = ceil_div(M, kernel.mr);
    share(panels, threads(), [&](int64_t first, int64_t last, int64_t) {
      int64_t row = first * kernel.mr;
      kernel.pack_a(Matrix{z.get() + row * D, dtype(), D, 1}, std::min(M, last * kernel.mr) - row, D, D, as_a.get() + row * D);
    });
  }

  static constexpr Dtype dtype() { return std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32; }

  // s[other][lane] of the others first..first+n and one group of anchors
  void similarities(int64_t first, int64_t n, int64_t group, T* s) const {
    kernel.gemm(n, kernel.nr, D, as_a.get() + first * D, D, as_b.get() + group * kernel.nr * D, D, s, kernel.nr, kernel.nr, false);
  }
};

// A bound of similarities over T that every row's log-sum-exp is within exp's range of: 1 / T, for rows of length one (lse is then
// at least -1 / T) where T is not tiny. 0 where there is none.
template <class T>
T similarity_bound(double temperature, bool normalize) {
  return normalize && temperature >= 0.05 ? T(1.0 / temperature) : T(0);
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& features, const Tensor& labels, double temperature, bool normalize) {
  const int64_t M = features.size(0);
  Tensor loss = empty({M}, scalar_type<T>), saved = empty({3, M}, scalar_type<T>);
  T *value = pointer<T>(loss), *inverse_norm = pointer<T>(saved), *lse = inverse_norm + M, *count = lse + M;
  if (M == 0) return {loss, saved};
  Rows<T> rows(features, labels, normalize);
  const Kernels<T>& kernel = rows.kernel;
  const T bound = similarity_bound<T>(temperature, normalize);
  const int64_t nr = kernel.nr, workers = std::min(threads(), rows.groups);
  Buffer<T> tiles(workers * CHUNK * nr);
  share(rows.groups, workers, [&](int64_t first_group, int64_t last_group, int64_t worker) {
    std::vector<T> best(nr), sum(nr), positive(nr), number(nr);
    T* s = tiles.get() + worker * CHUNK * nr;
    for (int64_t group = first_group; group < last_group; group++) {
      const int64_t anchor = group * nr;
      std::fill(best.begin(), best.end(), bound > T(0) ? bound : -T(INFINITY));
      for (auto* v : {&sum, &positive, &number}) std::fill(v->begin(), v->end(), T(0));
      for (int64_t other = 0; other < M; other += CHUNK) {
        int64_t n = std::min(CHUNK, M - other);
        rows.similarities(other, n, group, s);
        kernel.supcon_forward(s, n, other, anchor, T(1.0 / temperature), bound, rows.labels.get() + other, rows.labels.get() + anchor, best.data(),
                              sum.data(), positive.data(), number.data());
      }
      for (int64_t i = 0; i < nr && anchor + i < M; i++) {
        lse[anchor + i] = M > 1 ? T(double(best[i]) + std::log(double(sum[i]))) : T(0);
        value[anchor + i] = number[i] > 0 ? lse[anchor + i] - positive[i] / number[i] : T(0);
        count[anchor + i] = number[i];
      }
    }
  });
  std::copy(rows.inverse_norm.get(), rows.inverse_norm.get() + M, inverse_norm);
  return {loss, saved};
}

// d loss / d x of a row from that in z = x / |x|: (dz - z (z . dz)) / |x|.
template <class T>
void norm_backward(T* dz, const T* z, int64_t D, T inverse_norm, bool normalize) {
  if (!normalize) return;
  const T along = T(dot(dz, z, D));
  for (int64_t k = 0; k < D; k++) dz[k] = (dz[k] - z[k] * along) * inverse_norm;
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& features, const Tensor& labels, const Tensor& saved, double temperature, bool normalize) {
  const int64_t M = features.size(0), D = features.size(1);
  Tensor g_features = empty({M, D}, features.scalar_type());
  if (M == 0 || D == 0) return g_features;
  Rows<T> rows(features, labels, normalize);
  const Kernels<T>& kernel = rows.kernel;
  const int64_t nr = kernel.nr, mr = kernel.mr, workers = std::min(threads(), rows.groups), padded = rows.padded;
  const T *inverse_norm = pointer<T>(saved), *log_sum = inverse_norm + M, *count = log_sum + M;
  Buffer<T> upstream = numbers<T>(OP, "grad", grad, M, T(0)), lse(padded), push(padded), pull(padded);
  const T bound = similarity_bound<T>(temperature, normalize);
  for (int64_t i = 0; i < padded; i++) {
    bool counts = i < M && count[i] > 0;
    lse[i] = counts ? log_sum[i] : T(0);
    push[i] = counts ? (bound > T(0) ? T(double(upstream[i]) * std::exp(double(bound) - double(lse[i]))) : upstream[i]) : T(0);
    pull[i] = counts ? upstream[i] / count[i] : T(0);
  }
  // z^T as left operand: dz^T (D, anchors) = z^T (D, others) times the weights (others, anchors)
  Buffer<T> transposed(ceil_div(D, mr) * mr * M);
  share(ceil_div(D, mr), threads(), [&](int64_t first, int64_t last, int64_t) {
    kernel.pack_a(Matrix{rows.z.get() + first * mr, rows.dtype(), 1, D}, std::min(D, last * mr) - first * mr, M, M, transposed.get() + first * mr * M);
  });
  Buffer<T> tiles(workers * CHUNK * nr), sums(workers * D * nr), rows_of_group(workers * nr * D);
  Matrix to = matrix(OP, "features", g_features);
  share(rows.groups, workers, [&](int64_t first_group, int64_t last_group, int64_t worker) {
    T *s = tiles.get() + worker * CHUNK * nr, *dz = sums.get() + worker * D * nr, *line = rows_of_group.get() + worker * nr * D;
    for (int64_t group = first_group; group < last_group; group++) {
      const int64_t anchor = group * nr;
      for (int64_t other = 0; other < M; other += CHUNK) {
        int64_t n = std::min(CHUNK, M - other);
        rows.similarities(other, n, group, s);
        kernel.supcon_backward(s, n, other, anchor, T(1.0 / temperature), bound, rows.labels.get() + other, lse.get() + other, pull.get() + other,
                               push.get() + other, rows.labels.get() + anchor, lse.get() + anchor, pull.get() + anchor, push.get() + anchor);
        kernel.gemm(D, nr, n, transposed.get() + other * mr, M, s, n, dz, nr, nr, other > 0);
      }
      const int64_t anchors = std::min(nr, M - anchor);
      kernel.write_lanes(dz, anchors, D, Matrix{line, rows.dtype(), D, 1});
      for (int64_t i = 0; i < anchors; i++) {
        norm_backward(line + i * D, rows.z.get() + (anchor + i) * D, D, inverse_norm[anchor + i], normalize);
        kernel.write_row(const_cast<void*>(to.data), line + i * D, to.dtype, (anchor + i) * D, 1, D);
      }
    }
  });
  return g_features;
}

}  // namespace

std::tuple<Tensor, Tensor> supcon_loss_forward_cpu(Tensor features, Tensor labels, double temperature, bool normalize) {
  return (is_double(features) ? forward<double> : forward<float>)(features, labels, temperature, normalize);
}

Tensor supcon_loss_backward_cpu(Tensor grad, Tensor features, Tensor labels, Tensor saved, double temperature, bool normalize) {
  return (is_double(features) ? backward<double> : backward<float>)(grad, features, labels, saved, temperature, normalize);
}

}  // namespace infopro
