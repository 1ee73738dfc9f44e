// linear_cross_entropy on the CPU, tiled over rows and classes. Tiles hold classes down and nr rows of the batch across
// the lanes; operands are packed a chunk at a time and shared by the threads.
//
// Extra memory, in numbers: forward ROWS D + CLASSES D, backward 2 ROWS D + 2 CLASSES D + ROWS CLASSES + ROWS D, and a tile a thread.
#include <algorithm>
#include <cmath>

#include "ops_cpu.h"

namespace infopro {
namespace {

constexpr const char* OP = "linear_cross_entropy";
constexpr int64_t ROWS = 1024, CLASSES = 768;  // a chunk; multiples of every nr and mr
constexpr int64_t GROUPS = 4;                  // groups of nr rows that a thread takes at once, to use a block of classes again

template <class T>
constexpr Dtype dtype() {
  return std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;
}

Matrix from_row(Matrix m, int64_t row, size_t element) {
  return {static_cast<const char*>(m.data) + row * m.row * int64_t(element), m.dtype, m.row, m.column};
}

// What both directions need of the arguments: numbers a class, and the targets, padded to whole groups.
template <class T>
struct Batch {
  const Kernels<T>& kernel = kernels<T>();
  int64_t N, D, C, padded;
  Matrix input, weight;
  size_t input_size, weight_size;
  Buffer<T> bias, class_weight;
  bool has_bias, weighted;
  Buffer<label<T>> target, kept;
  double weight_sum;

  Batch(const Tensor& x, const Tensor& w, const Tensor& target_, const OptionalTensor& bias_, const OptionalTensor& class_weight_,
        int64_t ignore_index)
      : N(x.size(0)), D(x.size(1)), C(w.size(0)), padded(ceil_div(N, kernel.nr) * kernel.nr), input(matrix(OP, "input", x)),
        weight(matrix(OP, "weight", w)), input_size(x.element_size()), weight_size(w.element_size()),
        bias(numbers<T>(OP, "bias", bias_, C, T(0))), class_weight(numbers<T>(OP, "class_weight", class_weight_, C, T(1))),
        has_bias(bias_.has_value()), weighted(class_weight_.has_value()), target(padded), kept(padded), weight_sum(0) {
    Tensor wide = torch::stable::contiguous(torch::stable::to(target_, ScalarType::Long));
    const int64_t* y = static_cast<const int64_t*>(wide.const_data_ptr());
    for (int64_t i = 0; i < padded; i++) {
      kept[i] = i < N && y[i] != ignore_index;
      target[i] = kept[i] ? label<T>(y[i]) : label<T>(-1);
      STD_TORCH_CHECK(!kept[i] || (y[i] >= 0 && y[i] < C), OP, ": target: expected classes in [0, ", C, ") or ignore_index ", ignore_index,
                      ", got ", y[i], " in row ", i);
    }
    for (int64_t c = 0; c < C; c++) weight_sum += double(class_weight[c]);
  }

  const T* bias_from(int64_t c) const { return has_bias ? bias.get() + c : nullptr; }
  const T* class_weight_from(int64_t c) const { return weighted ? class_weight.get() + c : nullptr; }
  double weight_of_target(int64_t i) const { return double(class_weight[target[i]]); }

  // rows row..row+n as right operand (D, n)
  void pack_rows(int64_t row, int64_t n, T* packed) const {
    share(ceil_div(n, kernel.nr), threads(), [&](int64_t first, int64_t last, int64_t) {
      int64_t at = first * kernel.nr;
      kernel.pack_b(from_row(input, row + at, input_size).transposed(), D, std::min(n, last * kernel.nr) - at, D, packed + at * D);
    });
  }

  // classes c..c+n as left operand (n, D)
  void pack_classes(int64_t c, int64_t n, T* packed) const {
    share(ceil_div(n, kernel.mr), threads(), [&](int64_t first, int64_t last, int64_t) {
      int64_t at = first * kernel.mr;
      kernel.pack_a(from_row(weight, c + at, weight_size), std::min(n, last * kernel.mr) - at, D, D, packed + at * D);
    });
  }
};

// work(first group, groups, worker) over `groups` groups, at most GROUPS at once.
template <class F>
void share_groups(int64_t groups, const F& work) {
  share(groups, threads(), [&](int64_t first, int64_t last, int64_t worker) {
    for (int64_t group = first; group < last; group += GROUPS) work(group, std::min(GROUPS, last - group), worker);
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                                           const OptionalTensor& class_weight, int64_t ignore_index, double smoothing) {
  Batch<T> b(input, weight, target, bias, class_weight, ignore_index);
  const Kernels<T>& kernel = b.kernel;
  const int64_t N = b.N, D = b.D, C = b.C, nr = kernel.nr;
  Tensor loss = empty({N}, scalar_type<T>), lse = empty({N}, scalar_type<T>), correct = empty({}, ScalarType::Long);
  Buffer<T> best(b.padded), sum(b.padded), weighted(b.padded), at_target(b.padded);
  Buffer<label<T>> argmax(b.padded);
  best.fill(-T(INFINITY), b.padded);
  for (auto* v : {&sum, &weighted, &at_target}) v->fill(T(0), b.padded);
  argmax.fill(-1, b.padded);
  const int64_t row_chunk = std::min(ROWS, b.padded), class_chunk = std::min(CLASSES, C);
  Buffer<T> rows(row_chunk * D), classes(ceil_div(class_chunk, kernel.mr) * kernel.mr * D), tiles(threads() * GROUPS * class_chunk * nr);
  for (int64_t row = 0; row < N; row += ROWS) {
    const int64_t n = std::min(ROWS, N - row);
    b.pack_rows(row, n, rows.get());
    for (int64_t c = 0; c < C; c += CLASSES) {
      const int64_t m = std::min(CLASSES, C - c);
      b.pack_classes(c, m, classes.get());
      share_groups(ceil_div(n, nr), [&](int64_t group, int64_t groups, int64_t worker) {
        T* x = tiles.get() + worker * GROUPS * class_chunk * nr;
        kernel.gemm(m, groups * nr, D, classes.get(), D, rows.get() + group * nr * D, D, x, nr, m * nr, false);
        for (int64_t g = 0; g < groups; g++) {
          int64_t at = row + (group + g) * nr;
          kernel.softmax_update(x + g * m * nr, m, c, b.bias_from(c), b.class_weight_from(c), smoothing > 0, b.target.get() + at, best.get() + at,
                                sum.get() + at, weighted.get() + at, at_target.get() + at, argmax.get() + at);
        }
      });
    }
  }
  int64_t hits = 0;
  for (int64_t i = 0; i < N; i++) {
    double l = double(best[i]) + std::log(double(sum[i]));
    pointer<T>(lse)[i] = T(l);
    double value = 0;
    if (b.kept[i]) {
      value = (1 - smoothing) * b.weight_of_target(i) * (l - double(at_target[i]));
      if (smoothing > 0) value += smoothing / double(C) * (b.weight_sum * l - double(weighted[i]));
      hits += argmax[i] == b.target[i];
    }
    pointer<T>(loss)[i] = T(value);
  }
  *pointer<int64_t>(correct) = hits;
  return {loss, lse, correct};
}

// Buffers and steps of the backward sweep over row chunks and, within them, class chunks.
template <class T>
struct Backward {
  const Batch<T>& b;
  const Kernels<T>& kernel = b.kernel;
  const int64_t nr = kernel.nr, mr = kernel.mr, row_chunk = std::min(ROWS, b.padded), class_chunk = std::min(CLASSES, b.C);
  const int64_t class_space = ceil_div(class_chunk, mr) * mr, input_space = ceil_div(b.D, nr) * nr, left_space = ceil_div(b.D, mr) * mr;
  Buffer<T> probability, smooth, at_target, lse;     // (padded), the numbers of softmax_gradient
  Buffer<T> rows, classes, gradient;                 // x^T and w packed, and d loss / d logits, (groups, classes, nr)
  Buffer<T> classes_transposed, d_rows;              // w^T packed, and d input^T (groups, D, nr)
  Buffer<T> rows_right, left;                        // x packed, and a thread's part of the gradient packed, for d weight

  Backward(const Batch<T>& batch, bool needs_input, bool needs_weight)
      : b(batch), probability(b.padded), smooth(b.padded), at_target(b.padded), lse(b.padded), rows(row_chunk * b.D),
        classes(class_space * b.D), gradient(row_chunk * class_chunk), classes_transposed(needs_input ? left_space * class_chunk : 0),
        d_rows(needs_input ? row_chunk * b.D : 0), rows_right(needs_weight ? row_chunk * input_space : 0),
        left(needs_weight ? threads() * 8 * mr * row_chunk : 0) {}

  void set_rows(const T* upstream, const T* log_sum, double smoothing) {
    for (int64_t i = 0; i < b.padded; i++) {
      double g = i < b.N && b.kept[i] ? double(upstream[i]) : 0, w = i < b.N && b.kept[i] ? b.weight_of_target(i) : 0;
      at_target[i] = T(g * (1 - smoothing) * w);
      smooth[i] = T(g * smoothing / double(b.C));
      probability[i] = T(g * ((1 - smoothing) * w + smoothing / double(b.C) * b.weight_sum));
      lse[i] = i < b.N ? log_sum[i] : T(0);
    }
  }

  // The gradient in the logits of n rows and m classes, and what it adds to d input^T.
  void rows_step(int64_t row, int64_t n, int64_t c, int64_t m, bool needs_input) {
    share_groups(ceil_div(n, nr), [&](int64_t group, int64_t groups, int64_t) {
      T* x = gradient.get() + group * m * nr;
      kernel.gemm(m, groups * nr, b.D, classes.get(), b.D, rows.get() + group * nr * b.D, b.D, x, nr, m * nr, false);
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = row + (group + g) * nr;
        kernel.softmax_gradient(x + g * m * nr, m, c, b.bias_from(c), b.class_weight_from(c), b.target.get() + at, lse.get() + at,
                                probability.get() + at, smooth.get() + at, at_target.get() + at, b.kept.get() + at);
      }
      if (needs_input)
        kernel.gemm(b.D, groups * nr, m, classes_transposed.get(), m, x, m, d_rows.get() + group * nr * b.D, nr, b.D * nr, c > 0);
    });
  }

  // d weight (m classes from c) += gradient^T x, and d bias += its sums.
  void classes_step(int64_t n, int64_t c, int64_t m, T* d_weight, T* d_bias, bool first) {
    const int64_t groups = ceil_div(n, nr);
    share(ceil_div(m, mr), threads(), [&](int64_t begin, int64_t end, int64_t worker) {
      T* packed = left.get() + worker * 8 * mr * row_chunk;
      for (int64_t block = begin; block < end; block += 8) {
        const int64_t at = block * mr, count = std::min(m, std::min(end, block + 8) * mr) - at;
        kernel.lane_sums(gradient.get() + at * nr, count, groups, m * nr, d_bias + c + at);
        if (!d_weight) continue;
        for (int64_t g = 0; g < groups; g++)
          kernel.pack_a(Matrix{gradient.get() + g * m * nr + at * nr, dtype<T>(), nr, 1}, count, std::min(nr, n - g * nr), n,
                        packed + g * nr * mr);
        kernel.gemm(count, b.D, n, packed, n, rows_right.get(), n, d_weight + (c + at) * b.D, b.D, nr, !first);
      }
    });
  }

  void pack_right(int64_t row, int64_t n) {
    share(ceil_div(b.D, nr), threads(), [&](int64_t first, int64_t last, int64_t) {
      Matrix x = from_row(b.input, row, b.input_size);
      x.data = static_cast<const char*>(x.data) + first * nr * x.column * int64_t(b.input_size);
      kernel.pack_b(x, n, std::min(b.D, last * nr) - first * nr, n, rows_right.get() + first * nr * n);
    });
  }

  void pack_transposed(int64_t c, int64_t m) {
    share(ceil_div(b.D, mr), threads(), [&](int64_t first, int64_t last, int64_t) {
      Matrix w = from_row(b.weight, c, b.weight_size);
      w.data = static_cast<const char*>(w.data) + first * mr * w.column * int64_t(b.weight_size);
      kernel.pack_a(w.transposed(), std::min(b.D, last * mr) - first * mr, m, m, classes_transposed.get() + first * mr * m);
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& target,
                                            const OptionalTensor& bias, const OptionalTensor& class_weight, const Tensor& lse,
                                            int64_t ignore_index, double smoothing, bool needs_input, bool needs_weight) {
  Batch<T> b(input, weight, target, bias, class_weight, ignore_index);
  const int64_t N = b.N, D = b.D, C = b.C;
  std::vector<int64_t> none = {0}, input_shape = {N, D}, weight_shape = {C, D};
  Tensor g_input = empty(needs_input ? input_shape : none, scalar_type<T>), g_weight = empty(needs_weight ? weight_shape : none, scalar_type<T>);
  Tensor g_bias = empty({C}, scalar_type<T>);
  T *d_input = pointer<T>(g_input), *d_weight = needs_weight ? pointer<T>(g_weight) : nullptr, *d_bias = pointer<T>(g_bias);
  std::fill(d_bias, d_bias + C, T(0));
  if (N == 0 || D == 0) {
    if (needs_weight) std::fill(d_weight, d_weight + C * D, T(0));
    if (N == 0) return {g_input, g_weight, g_bias};
  }
  Backward<T> s(b, needs_input, needs_weight);
  s.set_rows(numbers<T>(OP, "grad", grad, N, T(0)).get(), pointer<T>(lse), smoothing);
  for (int64_t row = 0; row < N; row += ROWS) {
    const int64_t n = std::min(ROWS, N - row);
    b.pack_rows(row, n, s.rows.get());
    if (needs_weight) s.pack_right(row, n);
    for (int64_t c = 0; c < C; c += CLASSES) {
      const int64_t m = std::min(CLASSES, C - c);
      b.pack_classes(c, m, s.classes.get());
      if (needs_input) s.pack_transposed(c, m);
      s.rows_step(row, n, c, m, needs_input);
      s.classes_step(n, c, m, d_weight, d_bias, row == 0);
    }
    if (!needs_input) continue;
    share(ceil_div(n, s.nr), threads(), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t g = first; g < last; g++)
        s.kernel.write_lanes(s.d_rows.get() + g * s.nr * D, std::min(s.nr, n - g * s.nr), D,
                             Matrix{d_input + (row + g * s.nr) * D, dtype<T>(), D, 1});
    });
  }
  return {g_input, g_weight, g_bias};
}

bool in_double(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return is_double(input) || is_double(weight) || is_double(bias);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward_cpu(Tensor input, Tensor weight, Tensor target, OptionalTensor bias,
                                                                    OptionalTensor class_weight, int64_t ignore_index, double label_smoothing) {
  auto run = in_double(input, weight, bias) ? forward<double> : forward<float>;
  return run(input, weight, target, bias, class_weight, ignore_index, label_smoothing);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(Tensor grad, Tensor input, Tensor weight, Tensor target,
                                                                     OptionalTensor bias, OptionalTensor class_weight, Tensor lse,
                                                                     int64_t ignore_index, double label_smoothing, bool needs_input,
                                                                     bool needs_weight) {
  auto run = in_double(input, weight, bias) ? backward<double> : backward<float>;
  return run(grad, input, weight, target, bias, class_weight, lse, ignore_index, label_smoothing, needs_input, needs_weight);
}

}  // namespace infopro
