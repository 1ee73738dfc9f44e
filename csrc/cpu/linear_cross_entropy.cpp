// linear_cross_entropy on the CPU, tiled over rows and classes. A tile holds classes down and nr rows of the
// batch across the lanes. Operands are packed a chunk at a time and shared by the threads.
//
// Extra memory, in numbers, with chunks of R rows and Q classes: forward (R + Q) D and a tile for each
// thread, backward (3 R + 2 Q) D + R Q and 96 R for each thread. With class probabilities a tile more for
// each thread.
#include "../checks.h"

namespace infopro {
namespace {

constexpr const char* OP = "linear_cross_entropy";
enum class Reduction : int64_t { mean, sum, none };  // as REDUCTIONS in ops/linear_cross_entropy.py

constexpr int64_t CLASSES = 768;  // of a chunk, a multiple of every mr
constexpr int64_t GROUPS = 4;     // groups of nr rows that reuse a block of classes in a thread

// How the threads share the work. Few weights: each thread takes its own rows from end to end, in chunks that
// stay in its cache, with its own sums of d weight. Many weights: all threads work on one chunk of rows after
// the other.
struct Plan {
  bool split_rows;
  int64_t rows;     // of a chunk, a multiple of every nr
  int64_t workers;  // threads on one chunk

  Plan(int64_t C, int64_t D)
      : split_rows(C * D <= 65536), rows(split_rows ? 256 : 1024), workers(split_rows ? 1 : threads()) {}

  // work(first row, last row, worker): one call for all rows, or one in each thread
  template <class F>
  void teams(int64_t N, int64_t nr, const F& work) const {
    share(ceil_div(N, nr), split_rows ? threads() : 1, [&](int64_t first, int64_t last, int64_t worker) {
      work(first * nr, std::min(N, last * nr), worker);
    });
  }
  int64_t team_count(int64_t N, int64_t nr) const {
    return split_rows ? std::min(threads(), ceil_div(N, nr)) : 1;
  }
};

Matrix from_row(Matrix m, int64_t row, size_t element) {
  return {static_cast<const char*>(m.data) + row * m.row * int64_t(element), m.dtype, m.row, m.column};
}

// What both directions need of the arguments. Targets are padded to whole groups. With class probabilities
// the target of a row is its most probable class, and the row's loss sum_c parts_c (l - x_c),
// parts_c = ((1 - e) p_c + e / C) w_c.
template <class T> struct Batch {
  const Kernels<T>& kernel = kernels<T>();
  int64_t N, D, C, padded;
  Matrix input, weight;
  size_t input_size, weight_size;
  Buffer<T> bias, class_weight;
  bool has_bias, weighted;
  Buffer<label<T>> target, kept;
  double weight_sum;  // over all classes
  double target_sum;  // over the targets of the rows that are kept; with probabilities the number of rows
  const bool soft;    // whether the targets are class probabilities, which follow
  const double smoothing;
  Matrix probabilities = {};
  size_t probability_size;
  Buffer<double> part_sum;  // of each row

  Batch(const Tensor& x, const Tensor& w, const Tensor& target_, const OptionalTensor& bias_,
        const OptionalTensor& class_weight_, int64_t ignore_index, double label_smoothing)
      : N(x.size(0)), D(x.size(1)), C(w.size(0)), padded(ceil_div(N, kernel.nr) * kernel.nr),
        input(matrix(OP, "input", x)), weight(matrix(OP, "weight", w)), input_size(x.element_size()),
        weight_size(w.element_size()), bias(numbers<T>(OP, "bias", bias_, C, T(0))),
        class_weight(numbers<T>(OP, "class_weight", class_weight_, C, T(1))), has_bias(bias_.has_value()),
        weighted(class_weight_.has_value()), target(padded), kept(padded), weight_sum(0), target_sum(0),
        soft(target_.dim() == 2), smoothing(label_smoothing), probability_size(target_.element_size()),
        part_sum(soft ? padded : 0) {
    for (int64_t c = 0; c < C; c++) weight_sum += double(class_weight[c]);
    if (soft) {
      probabilities = matrix(OP, "target", target_);
      target_sum = double(N);
      share(padded / kernel.nr, threads(), [&](int64_t first, int64_t last, int64_t) {
        for (int64_t group = first; group < last; group++) read_probabilities(group * kernel.nr);
      });
      return;
    }
    Tensor wide = wide_labels(target_);
    const int64_t* y = static_cast<const int64_t*>(wide.const_data_ptr());
    for (int64_t i = 0; i < padded; i++) {
      kept[i] = i < N && y[i] != ignore_index;
      target[i] = kept[i] ? label<T>(y[i]) : label<T>(-1);
      CHECK(!kept[i] || (y[i] >= 0 && y[i] < C), OP, ": target: expected classes in [0, ", C,
            ") or ignore_index ", ignore_index, ", got ", y[i], " in row ", i);
    }
    for (int64_t i = 0; i < N; i++) target_sum += kept[i] ? weight_of_target(i) : 0;
  }

  // The factor of the sum of the rows' losses.
  double factor(Reduction reduction) const {
    return reduction == Reduction::mean && target_sum != 0 ? 1 / target_sum : 1;
  }
  const T* bias_from(int64_t c) const { return has_bias ? bias.get() + c : nullptr; }
  const T* class_weight_from(int64_t c) const { return weighted ? class_weight.get() + c : nullptr; }
  double weight_of_target(int64_t i) const { return double(class_weight[target[i]]); }

  // to (m, nr) = the probabilities of classes c..c+m in the nr rows from `row`
  void pack_probabilities(int64_t row, int64_t c, int64_t m, T* to) const {
    Matrix from = from_row(probabilities, row, probability_size);
    from.data = static_cast<const char*>(from.data) + c * from.column * int64_t(probability_size);
    kernel.pack_b(from.transposed(), m, std::min<int64_t>(kernel.nr, N - row), m, to);
  }

  // Find target and part_sum of the nr rows from `row`.
  void read_probabilities(int64_t row) {
    const int64_t nr = kernel.nr;
    Buffer<T> p(std::min(CLASSES, C) * nr), best(nr, -T(INFINITY));
    for (int64_t j = 0; j < nr; j++) target[row + j] = kept[row + j] = row + j < N, part_sum[row + j] = 0;
    for (int64_t c0 = 0; c0 < C; c0 += CLASSES) {
      const int64_t m = std::min(CLASSES, C - c0);
      pack_probabilities(row, c0, m, p.get());
      for (int64_t c = 0; c < m; c++)
        for (int64_t j = 0; j < nr; j++) {
          const T value = p[c * nr + j];
          if (value > best[j]) best[j] = value, target[row + j] = label<T>(c0 + c);
          part_sum[row + j] +=
              ((1 - smoothing) * double(value) + smoothing / double(C)) * double(class_weight[c0 + c]);
        }
    }
  }

  // to (m, nr) = the parts of classes c..c+m in the losses of the nr rows from `row`; null without
  // probabilities
  const T* parts(int64_t row, int64_t c0, int64_t m, T* to) const {
    if (!soft) return nullptr;
    pack_probabilities(row, c0, m, to);
    const T own = T(1 - smoothing), even = T(smoothing / double(C));
    for (int64_t c = 0; c < m; c++)
      for (int64_t j = 0; j < kernel.nr; j++)
        to[c * kernel.nr + j] = (own * to[c * kernel.nr + j] + even) * class_weight[c0 + c];
    return to;
  }
  int64_t part_space(int64_t workers) const { return soft ? workers * std::min(CLASSES, C) * kernel.nr : 0; }

  // Pack rows row..row+n as right operand (D, n).
  void pack_rows(int64_t row, int64_t n, T* packed, int64_t workers) const {
    share(ceil_div(n, kernel.nr), workers, [&](int64_t first, int64_t last, int64_t) {
      int64_t at = first * kernel.nr;
      kernel.pack_b(from_row(input, row + at, input_size).transposed(), D, std::min(n, last * kernel.nr) - at,
                    D, packed + at * D);
    });
  }

  // Pack classes c..c+n as left operand (n, D).
  void pack_classes(int64_t c, int64_t n, T* packed, int64_t workers) const {
    share(ceil_div(n, kernel.mr), workers, [&](int64_t first, int64_t last, int64_t) {
      int64_t at = first * kernel.mr;
      kernel.pack_a(from_row(weight, c + at, weight_size), std::min(n, last * kernel.mr) - at, D, D,
                    packed + at * D);
    });
  }
};

// work(first group, groups, worker) over `groups` groups, at most GROUPS at once.
template <class F> void share_groups(int64_t groups, int64_t workers, const F& work) {
  share(groups, workers, [&](int64_t first, int64_t last, int64_t worker) {
    for (int64_t group = first; group < last; group += GROUPS)
      work(group, std::min(GROUPS, last - group), worker);
  });
}

// The running state of every row in forward.
template <class T> struct RowState {
  Buffer<T> best, sum, weighted, at_target;
  Buffer<label<T>> argmax;

  explicit RowState(int64_t n)
      : best(n, -T(INFINITY)), sum(n, T(0)), weighted(n, T(0)), at_target(n, T(0)), argmax(n, -1) {}
};

template <class T>
void forward_rows(const Batch<T>& b, const Plan& plan, int64_t first_row, int64_t last_row, bool smooth,
                  const RowState<T>& state) {
  const Kernels<T>& kernel = b.kernel;
  const int64_t D = b.D, C = b.C, nr = kernel.nr, class_chunk = std::min(CLASSES, C);
  const int64_t row_chunk = ceil_div(std::min(plan.rows, last_row - first_row), nr) * nr;
  Buffer<T> rows(row_chunk * D), classes(ceil_div(class_chunk, kernel.mr) * kernel.mr * D),
      tiles(plan.workers * GROUPS * class_chunk * nr), parts(b.part_space(plan.workers));
  for (int64_t row = first_row; row < last_row; row += plan.rows) {
    const int64_t n = std::min(plan.rows, last_row - row);
    b.pack_rows(row, n, rows.get(), plan.workers);
    for (int64_t c = 0; c < C; c += CLASSES) {
      const int64_t m = std::min(CLASSES, C - c);
      if (C > CLASSES || row == first_row) b.pack_classes(c, m, classes.get(), plan.workers);
      share_groups(ceil_div(n, nr), plan.workers, [&](int64_t group, int64_t groups, int64_t worker) {
        T* x = tiles.get() + worker * GROUPS * class_chunk * nr;
        kernel.gemm(m, groups * nr, D, classes.get(), D, rows.get() + group * nr * D, D, x, nr, m * nr,
                    false);
        for (int64_t g = 0; g < groups; g++) {
          int64_t at = row + (group + g) * nr;
          kernel.softmax_update(x + g * m * nr, m, c, b.bias_from(c), b.class_weight_from(c),
                                b.parts(at, c, m, parts.get() + worker * class_chunk * nr * b.soft),
                                smooth, b.target.get() + at, state.best.get() + at, state.sum.get() + at,
                                state.weighted.get() + at, state.at_target.get() + at,
                                state.argmax.get() + at);
        }
      });
    }
  }
}

template <class T>
Tensors3 forward(const Tensor& input, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                 const OptionalTensor& class_weight, int64_t ignore_index, double smoothing,
                 Reduction reduction) {
  Batch<T> b(input, weight, target, bias, class_weight, ignore_index, smoothing);
  const Plan plan(b.C, b.D);
  const RowState<T> state(b.padded);
  plan.teams(b.N, b.kernel.nr, [&](int64_t first, int64_t last, int64_t) {
    forward_rows(b, plan, first, last, smoothing > 0, state);
  });
  const bool rows = reduction == Reduction::none;
  Tensor loss = empty(rows ? std::vector<int64_t>{b.N} : std::vector<int64_t>{}, scalar_type<T>);
  Tensor lse = empty({b.N}, scalar_type<T>), correct = empty({}, ScalarType::Long);
  int64_t hits = 0;
  double sum = 0;
  for (int64_t i = 0; i < b.N; i++) {
    double l = double(state.best[i]) + std::log(double(state.sum[i]));
    pointer<T>(lse)[i] = T(l);
    double value = 0;
    if (b.soft) {
      value = b.part_sum[i] * l - double(state.weighted[i]);
    } else if (b.kept[i]) {
      value = (1 - smoothing) * b.weight_of_target(i) * (l - double(state.at_target[i]));
      if (smoothing > 0) value += smoothing / double(b.C) * (b.weight_sum * l - double(state.weighted[i]));
    }
    hits += b.kept[i] && state.argmax[i] == b.target[i];
    if (rows) pointer<T>(loss)[i] = T(value);
    sum += value;
  }
  if (!rows) *pointer<T>(loss) = T(sum * b.factor(reduction));
  *pointer<int64_t>(correct) = hits;
  return {loss, lse, correct};
}

// The numbers of a row that softmax_gradient reads.
template <class T> struct RowWeights {
  Buffer<T> probability, smooth, at_target, lse;

  // upstream(i): the gradient of row i's loss
  template <class F>
  RowWeights(const Batch<T>& b, const F& upstream, const T* log_sum)
      : probability(b.padded), smooth(b.padded), at_target(b.padded), lse(b.padded) {
    for (int64_t i = 0; i < b.padded; i++) {
      bool kept = i < b.N && b.kept[i];
      double g = kept ? upstream(i) : 0, w = kept && !b.soft ? (1 - b.smoothing) * b.weight_of_target(i) : 0,
             even = b.soft ? 1 : b.smoothing / double(b.C);
      at_target[i] = T(g * w);
      smooth[i] = T(g * even);
      probability[i] = T(g * (b.soft ? b.part_sum[i] : w + even * b.weight_sum));
      lse[i] = i < b.N ? log_sum[i] : T(0);
    }
  }
};

// The backward sweep of one team over chunks of rows and, within them, of classes: its buffers and steps.
template <class T> struct Backward {
  const Batch<T>& b;
  const RowWeights<T>& weights;
  const Kernels<T>& kernel = b.kernel;
  const int64_t nr = kernel.nr, mr = kernel.mr, workers, row_chunk, class_chunk = std::min(CLASSES, b.C);
  const int64_t class_space = ceil_div(class_chunk, mr) * mr, input_space = ceil_div(b.D, nr) * nr,
                left_space = ceil_div(b.D, mr) * mr;
  Buffer<T> rows, classes, gradient;     // x^T and w packed, and d loss / d logits, (groups, classes, nr)
  Buffer<T> classes_transposed, d_rows;  // w^T packed, and d input^T (groups, D, nr)
  Buffer<T> rows_right, left;            // for d weight: x packed, and a thread's part of the gradient packed
  Buffer<T> parts;                       // a thread's tile of `Batch::parts`
  static constexpr int64_t BLOCK = 8;    // for d weight: panels of mr classes that a thread takes at once

  Backward(const Batch<T>& batch, const RowWeights<T>& row_weights, const Plan& plan, int64_t row_count,
           bool needs_input, bool needs_weight)
      : b(batch), weights(row_weights), workers(plan.workers),
        row_chunk(ceil_div(std::min(plan.rows, row_count), nr) * nr), rows(row_chunk * b.D),
        classes(class_space * b.D), gradient(row_chunk * class_chunk),
        classes_transposed(needs_input ? left_space * class_chunk : 0),
        d_rows(needs_input ? row_chunk * b.D : 0), rows_right(needs_weight ? row_chunk * input_space : 0),
        left(needs_weight ? workers * BLOCK * mr * row_chunk : 0), parts(b.part_space(workers)) {}

  // Compute the gradient in the logits of n rows and m classes, and add its part to d input^T.
  void rows_step(int64_t row, int64_t n, int64_t c, int64_t m, bool needs_input) {
    share_groups(ceil_div(n, nr), workers, [&](int64_t group, int64_t groups, int64_t worker) {
      T* x = gradient.get() + group * m * nr;
      kernel.gemm(m, groups * nr, b.D, classes.get(), b.D, rows.get() + group * nr * b.D, b.D, x, nr, m * nr,
                  false);
      for (int64_t g = 0; g < groups; g++) {
        int64_t at = row + (group + g) * nr;
        kernel.softmax_gradient(x + g * m * nr, m, c, b.bias_from(c), b.class_weight_from(c),
                                b.parts(at, c, m, parts.get() + worker * class_chunk * nr * b.soft),
                                b.target.get() + at, weights.lse.get() + at, weights.probability.get() + at,
                                weights.smooth.get() + at, weights.at_target.get() + at, b.kept.get() + at);
      }
      if (needs_input)
        kernel.gemm(b.D, groups * nr, m, classes_transposed.get(), m, x, m, d_rows.get() + group * nr * b.D,
                    nr, b.D * nr, c > 0);
    });
  }

  // d weight (m classes from c) += gradient^T x, and d bias += its sums.
  void classes_step(int64_t n, int64_t c, int64_t m, T* d_weight, T* d_bias, bool first) {
    const int64_t groups = ceil_div(n, nr);
    share(ceil_div(m, mr), workers, [&](int64_t begin, int64_t end, int64_t worker) {
      T* packed = left.get() + worker * BLOCK * mr * row_chunk;
      for (int64_t block = begin; block < end; block += BLOCK) {
        const int64_t at = block * mr, count = std::min(m, std::min(end, block + BLOCK) * mr) - at;
        kernel.lane_sums(gradient.get() + at * nr, count, groups, m * nr, d_bias + c + at);
        if (!d_weight) continue;
        for (int64_t g = 0; g < groups; g++)
          kernel.pack_a(Matrix{gradient.get() + g * m * nr + at * nr, dtype_as<T>, nr, 1}, count,
                        std::min(nr, n - g * nr), n, packed + g * nr * mr);
        kernel.gemm(count, b.D, n, packed, n, rows_right.get(), n, d_weight + (c + at) * b.D, b.D, nr,
                    !first);
      }
    });
  }

  void pack_right(int64_t row, int64_t n) {
    share(ceil_div(b.D, nr), workers, [&](int64_t first, int64_t last, int64_t) {
      Matrix x = from_row(b.input, row, b.input_size);
      x.data = static_cast<const char*>(x.data) + first * nr * x.column * int64_t(b.input_size);
      kernel.pack_b(x, n, std::min(b.D, last * nr) - first * nr, n, rows_right.get() + first * nr * n);
    });
  }

  void pack_transposed(int64_t c, int64_t m) {
    share(ceil_div(b.D, mr), workers, [&](int64_t first, int64_t last, int64_t) {
      Matrix w = from_row(b.weight, c, b.weight_size);
      w.data = static_cast<const char*>(w.data) + first * mr * w.column * int64_t(b.weight_size);
      kernel.pack_a(w.transposed(), std::min(b.D, last * mr) - first * mr, m, m,
                    classes_transposed.get() + first * mr * m);
    });
  }

  void write_rows(int64_t n, T* d_input) {
    share(ceil_div(n, nr), workers, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t g = first; g < last; g++)
        kernel.write_lanes(d_rows.get() + g * nr * b.D, std::min(nr, n - g * nr), b.D,
                           Matrix{d_input + g * nr * b.D, dtype_as<T>, b.D, 1});
    });
  }

  // Rows first..last: write d_input and this team's part of d_weight; add its part to d_bias.
  void run(int64_t first, int64_t last, T* d_input, T* d_weight, T* d_bias) {
    for (int64_t row = first; row < last; row += row_chunk) {
      const int64_t n = std::min(row_chunk, last - row);
      b.pack_rows(row, n, rows.get(), workers);
      if (d_weight) pack_right(row, n);
      for (int64_t c = 0; c < b.C; c += CLASSES) {
        const int64_t m = std::min(CLASSES, b.C - c);
        if (b.C > CLASSES || row == first) {
          b.pack_classes(c, m, classes.get(), workers);
          if (d_input) pack_transposed(c, m);
        }
        rows_step(row, n, c, m, d_input != nullptr);
        classes_step(n, c, m, d_weight, d_bias, row == first);
      }
      if (d_input) write_rows(n, d_input + row * b.D);
    }
  }
};

template <class T>
Tensors3 backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& target,
                  const OptionalTensor& bias, const OptionalTensor& class_weight, const Tensor& lse,
                  int64_t ignore_index, double smoothing, Reduction reduction, bool needs_input,
                  bool needs_weight) {
  Batch<T> b(input, weight, target, bias, class_weight, ignore_index, smoothing);
  const int64_t N = b.N, D = b.D, C = b.C;
  std::vector<int64_t> none = {0}, input_shape = {N, D}, weight_shape = {C, D};
  Tensor g_input = empty(needs_input ? input_shape : none, scalar_type<T>),
         g_weight = empty(needs_weight ? weight_shape : none, scalar_type<T>);
  Tensor g_bias = empty({C}, scalar_type<T>);
  T *d_input = needs_input ? pointer<T>(g_input) : nullptr,
    *d_weight = needs_weight ? pointer<T>(g_weight) : nullptr, *d_bias = pointer<T>(g_bias);
  if (N == 0) {
    std::fill(d_bias, d_bias + C, T(0));
    if (needs_weight) std::fill(d_weight, d_weight + C * D, T(0));
    return {g_input, g_weight, g_bias};
  }
  const bool rows = reduction == Reduction::none;
  const Buffer<T> upstream = numbers<T>(OP, "grad", grad, rows ? N : 1, T(0));
  const auto row_upstream = [&](int64_t i) {
    return rows ? double(upstream[i]) : double(upstream[0]) * b.factor(reduction);
  };
  const RowWeights<T> weights(b, row_upstream, pointer<T>(lse));
  const Plan plan(C, D);
  const int64_t teams = plan.team_count(N, b.kernel.nr), part = needs_weight ? C * D : 0;
  Buffer<T> parts((teams - 1) * part), bias_parts(teams * C, T(0));
  plan.teams(N, b.kernel.nr, [&](int64_t first, int64_t last, int64_t team) {
    T* mine = !needs_weight ? nullptr : team == 0 ? d_weight : parts.get() + (team - 1) * part;
    Backward<T>(b, weights, plan, last - first, needs_input, needs_weight)
        .run(first, last, d_input, mine, bias_parts.get() + team * C);
  });
  std::copy(bias_parts.get(), bias_parts.get() + C, d_bias);
  for (int64_t team = 1; team < teams; team++) {
    for (int64_t c = 0; c < C; c++) d_bias[c] += bias_parts[team * C + c];
    for (int64_t i = 0; i < part; i++) d_weight[i] += parts[(team - 1) * part + i];
  }
  return {g_input, g_weight, g_bias};
}

bool in_double(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return is_double(input) || is_double(weight) || is_double(bias);
}

Tensors3 linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor target, OptionalTensor bias,
                                      OptionalTensor class_weight, int64_t ignore_index,
                                      double label_smoothing, int64_t reduction) {
  auto run = in_double(input, weight, bias) ? forward<double> : forward<float>;
  return run(input, weight, target, bias, class_weight, ignore_index, label_smoothing, Reduction(reduction));
}

Tensors3 linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor weight, Tensor target,
                                       OptionalTensor bias, OptionalTensor class_weight, Tensor lse,
                                       int64_t ignore_index, double label_smoothing, int64_t reduction,
                                       bool needs_input, bool needs_weight) {
  auto run = in_double(input, weight, bias) ? backward<double> : backward<float>;
  return run(grad, input, weight, target, bias, class_weight, lse, ignore_index, label_smoothing,
             Reduction(reduction), needs_input, needs_weight);
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&infopro::linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&infopro::linear_cross_entropy_backward));
}
