// upsample_cross_entropy on the CPU: one pass for the loss, for the gradient, or for both.
//
// Each thread takes a range of gaps between source rows (upsample_cross_entropy.h). The gradient of a source
// row at which two threads meet is added up after the pass. The bits of a result do not depend on the number
// of threads.
//
// Extra memory, in numbers: 6 C (w + 2 vectors) for each thread, 2 vectors of W, and with `collect` W vectors
// more.

#include "../checks.h"
#include "../resize.h"

namespace infopro {
namespace {

constexpr const char* OP = "upsample_cross_entropy";
// In the order of REDUCTIONS and KEEP in infopro_fast/ops/upsample_cross_entropy.py
enum class Reduction : int64_t { mean, sum, none };
enum class Keep : int64_t { nothing, lse, gradient };

AxisTable axis(int64_t in, int64_t out, bool align_corners) {
  return AxisTable(out, [=](int p) { return exact_place(in, out, p, align_corners); });
}

Labels labels(const Tensor& t) {
  const auto dtype = [&] {
    switch (t.scalar_type()) {
      case ScalarType::Byte: return Integer::u8;
      case ScalarType::Char: return Integer::i8;
      case ScalarType::Short: return Integer::i16;
      case ScalarType::Int: return Integer::i32;
      case ScalarType::Long: return Integer::i64;
      default: fail(OP, ": target: expected uint8, int8, int16, int32 or int64");
    }
  };
  return {t.const_data_ptr(), dtype(), t.stride(0), t.stride(1), t.stride(2)};
}

int64_t value_of(const Labels& t, int64_t at) {
  switch (t.dtype) {
    case Integer::u8: return static_cast<const uint8_t*>(t.data)[at];
    case Integer::i8: return static_cast<const int8_t*>(t.data)[at];
    case Integer::i16: return static_cast<const int16_t*>(t.data)[at];
    case Integer::i32: return static_cast<const int32_t*>(t.data)[at];
    default: return static_cast<const int64_t*>(t.data)[at];
  }
}

// One call: the UpsampleCrossEntropy that the kernels read, and the memory behind its pointers.
template <class T> struct Call {
  const Kernels<T>& kernel = kernels<T>();
  AxisTable rows, columns;
  UpsampleCrossEntropy<T> d;
  Buffer<T> class_weight;
  int64_t vectors, gaps, workers;
  Buffer<int64_t> first_row, base;
  Buffer<T> row_weights, column_weights, collect;
  Buffer<label<T>> taps;

  Call(const Tensor& logits, const Tensor& target, const OptionalTensor& class_weight_, bool align_corners,
       int64_t ignore_index, double smoothing, bool gradient)
      : rows(axis(logits.size(2), target.size(1), align_corners)),
        columns(axis(logits.size(3), target.size(2), align_corners)), d(shape(logits, target)),
        class_weight(numbers<T>(OP, "class_weight", class_weight_, d.C, T(1))),
        vectors(ceil_div(d.W, kernel.width)), gaps(d.N * d.h),
        workers(std::max<int64_t>(1, std::min(threads(), gaps))), first_row(d.h + 1), base(vectors),
        row_weights(2 * d.H), column_weights(2 * vectors * kernel.width),
        collect(gradient ? vectors * count_chunks() * kernel.width * kernel.width : 0, T(0)),
        taps(2 * vectors * kernel.width) {
    d.logits = maps(OP, "logits", logits);
    d.target = labels(target);
    d.ignore_index = ignore_index;
    d.smoothing = T(smoothing);
    d.class_weight = class_weight_ ? class_weight.get() : nullptr;
    double weight_sum = 0;
    for (int64_t c = 0; c < d.C; c++) weight_sum += double(class_weight[c]);
    d.weight_sum = T(weight_sum);
    set_rows();
    set_columns();
    if (gradient) set_collect();
  }

  // Distribute the gaps and run them. Return whether all labels are classes. head and tail: (workers, C,
  // pitch).
  bool run(const UpsampleOutputs<T>& to, T* head, T* tail, int64_t* confusion_parts) const {
    const int64_t size = kernel.upsample_scratch(d), edge = d.C * d.pitch;
    Buffer<T> scratch(workers * size);
    std::vector<char> bad(workers, 0);
    share(gaps, workers, [&](int64_t first, int64_t last, int64_t worker) {
      UpsampleOutputs<T> mine = to;
      if (confusion_parts) mine.confusion = confusion_parts + worker * d.C * d.C;
      bool wrong = false;
      kernel.upsample_gaps(d, first, last, scratch.get() + worker * size, mine, head + worker * edge,
                           tail + worker * edge, wrong);
      bad[worker] = wrong;
    });
    return std::none_of(bad.begin(), bad.end(), [](char b) { return b != 0; });
  }

  // Write the source rows between the gaps of one worker and the next.
  void join(const Maps& to, T* head, const T* tail) const {
    const int64_t edge = d.C * d.pitch;
    for (int64_t worker = 1; worker < workers; worker++) {
      const int64_t gap = worker * gaps / workers, n = gap / d.h, y = gap % d.h;
      if (y == 0) continue;
      T* row = head + worker * edge;
      for (int64_t i = 0; i < edge; i++) row[i] += tail[(worker - 1) * edge + i];
      for (int64_t c = 0; c < d.C; c++)
        kernel.write_row(to.data, row + c * d.pitch, to.dtype, n * to.n + c * to.c + y * to.y, to.x, d.w);
    }
  }

  [[noreturn]] void refuse_labels() const {
    const Labels& t = d.target;
    for (int64_t n = 0; n < d.N; n++)
      for (int64_t Y = 0; Y < d.H; Y++)
        for (int64_t X = 0; X < d.W; X++) {
          const int64_t value = value_of(t, n * t.n + Y * t.y + X * t.x);
          CHECK(value == d.ignore_index || (value >= 0 && value < d.C), OP,
                ": target: expected classes in [0, ", d.C, ") or ignore_index ", d.ignore_index, ", got ",
                value, " at (", n, ", ", Y, ", ", X, ")");
        }
    fail(OP, ": target: expected classes in [0, ", d.C, "), and labels that do not change during the call");
  }

 private:
  static UpsampleCrossEntropy<T> shape(const Tensor& logits, const Tensor& target) {
    UpsampleCrossEntropy<T> d = {};
    d.N = logits.size(0), d.C = logits.size(1), d.h = logits.size(2), d.w = logits.size(3),
    d.H = target.size(1), d.W = target.size(2);
    return d;
  }

  int64_t last_pixel(int64_t v) const { return std::min((v + 1) * kernel.width, d.W) - 1; }

  int64_t count_chunks() const {
    int64_t most = 1;
    for (int64_t v = 0; v < vectors; v++)
      most = std::max(
          most, ceil_div(columns.high[last_pixel(v)] - columns.low[v * kernel.width] + 1, kernel.width));
    return most;
  }

  void set_rows() {
    for (int64_t y = 0, Y = 0; y <= d.h; y++) {
      while (Y < d.H && rows.low[Y] < y) Y++;
      first_row[y] = Y;
    }
    std::copy(rows.low_weight.begin(), rows.low_weight.end(), row_weights.get());
    std::copy(rows.high_weight.begin(), rows.high_weight.end(), row_weights.get() + d.H);
    d.first_row = first_row.get();
    d.row_low_weight = row_weights.get();
    d.row_high_weight = row_weights.get() + d.H;
  }

  void set_columns() {
    const int64_t padded = vectors * kernel.width;
    d.chunks = count_chunks();
    d.pitch = ceil_div(d.w, kernel.width) * kernel.width + d.chunks * kernel.width;
    for (int64_t X = 0; X < padded; X++) {
      const int64_t v = X / kernel.width, first = columns.low[v * kernel.width];
      base[v] = first;
      taps[X] = X < d.W ? label<T>(columns.low[X] - first) : 0;
      taps[padded + X] = X < d.W ? label<T>(columns.high[X] - first) : 0;
      column_weights[X] = X < d.W ? T(columns.low_weight[X]) : T(0);
      column_weights[padded + X] = X < d.W ? T(columns.high_weight[X]) : T(0);
    }
    d.base = base.get();
    d.low = taps.get();
    d.high = taps.get() + padded;
    d.low_weight = column_weights.get();
    d.high_weight = column_weights.get() + padded;
  }

  void set_collect() {
    const int64_t width = kernel.width;
    const auto weight = [&](int64_t X, int64_t tap) -> T& {
      return collect[((X / width * d.chunks + tap / width) * width + X % width) * width + tap % width];
    };
    for (int64_t X = 0; X < d.W; X++) {
      weight(X, d.low[X]) += d.low_weight[X];
      weight(X, d.high[X]) += d.high_weight[X];
    }
    d.collect = collect.get();
  }
};

template <class T>
Tensors4 forward(const Tensor& logits, const Tensor& target, const OptionalTensor& class_weight,
                 bool align_corners, int64_t ignore_index, double smoothing, Reduction reduction, Keep keep,
                 bool needs_confusion) {
  CHECK(keep != Keep::lse, OP, ": keep: the CPU kernels keep the gradient or nothing");
  const bool each = reduction == Reduction::none, needs_gradient = keep == Keep::gradient;
  CHECK(!(each && needs_gradient), OP, ": keep: the gradient needs one loss, got reduction \"none\"");
  const Call<T> call(logits, target, class_weight, align_corners, ignore_index, smoothing, needs_gradient);
  const UpsampleCrossEntropy<T>& d = call.d;
  std::vector<int64_t> none = {0}, pixels = {d.N, d.H, d.W}, source = {d.N, d.C, d.h, d.w}, scalar = {},
                       classes = {d.C, d.C};
  Tensor loss = empty(each ? pixels : scalar, scalar_type<T>),
         kept = empty(needs_gradient ? source : none, scalar_type<T>);
  Tensor divisor = empty(scalar, ScalarType::Double),
         confusion = empty(needs_confusion ? classes : none, ScalarType::Long);
  const int64_t counters = d.C * d.C, edges = needs_gradient ? call.workers * d.C * d.pitch : 0;
  Buffer<double> sums(2 * call.gaps);
  Buffer<T> head(edges), tail(edges);
  const T one = 1;
  UpsampleOutputs<T> to = {};
  to.loss = each ? pointer<T>(loss) : nullptr;
  to.sums = sums.get();
  to.gradient = needs_gradient;
  to.upstream = &one;
  if (needs_gradient) to.d_logits = maps(OP, "gradient", kept);
  // Few counters: each thread has its own. Many: the threads share them, and seldom meet.
  to.shared_confusion =
      needs_confusion && call.workers > 1 && counters * (call.workers - 1) > d.N * d.H * d.W / 8;
  Buffer<int64_t> parts(needs_confusion && !to.shared_confusion ? call.workers * counters : 0, 0);
  if (needs_confusion) {
    std::fill(pointer<int64_t>(confusion), pointer<int64_t>(confusion) + counters, 0);
    if (to.shared_confusion) to.confusion = pointer<int64_t>(confusion);
  }
  if (!call.run(to, head.get(), tail.get(), needs_confusion && !to.shared_confusion ? parts.get() : nullptr))
    call.refuse_labels();
  if (needs_gradient) call.join(to.d_logits, head.get(), tail.get());
  if (needs_confusion && !to.shared_confusion)
    for (int64_t i = 0; i < call.workers * counters; i++)
      pointer<int64_t>(confusion)[i % counters] += parts[i];
  double total = 0, weight = 0;
  for (int64_t gap = 0; gap < call.gaps; gap++) {
    total += sums[2 * gap];
    weight += sums[2 * gap + 1];
  }
  const double divide = reduction == Reduction::mean && weight != 0 ? weight : 1;
  if (!each) *pointer<T>(loss) = T(total / divide);
  *pointer<double>(divisor) = divide;
  return {loss, kept, divisor, confusion};
}

template <class T> Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                const OptionalTensor& class_weight, const Tensor& kept, const Tensor& divisor,
                bool align_corners, int64_t ignore_index, double smoothing, Reduction reduction, Keep keep) {
  Tensor d_logits = torch::stable::empty_like(logits);
  const bool each = reduction == Reduction::none;
  const int64_t N = logits.size(0), C = logits.size(1), h = logits.size(2), w = logits.size(3);
  const Maps to_maps = maps(OP, "logits", d_logits);
  CHECK(grad.scalar_type() == scalar_type<T>, OP, ": grad: expected the dtype of the loss");
  const T factor = each ? T(1) : T(double(*pointer<T>(grad)) / *pointer<double>(divisor));
  if (keep == Keep::gradient) {
    const Kernels<T>& kernel = kernels<T>();
    const T* from = pointer<T>(kept);
    share(N * C, threads(), [&](int64_t first, int64_t last, int64_t) {
      Buffer<T> row(w);
      for (int64_t i = first; i < last; i++)
        for (int64_t y = 0; y < h; y++) {
          for (int64_t x = 0; x < w; x++) row[x] = factor * from[(i * h + y) * w + x];
          const int64_t at = i / C * to_maps.n + i % C * to_maps.c + y * to_maps.y;
          kernel.write_row(to_maps.data, row.get(), to_maps.dtype, at, to_maps.x, w);
        }
    });
    return d_logits;
  }
  const Call<T> call(logits, target, class_weight, align_corners, ignore_index, smoothing, true);
  const int64_t edges = call.workers * C * call.d.pitch;
  Buffer<T> head(edges), tail(edges);
  UpsampleOutputs<T> to = {};
  to.gradient = true;
  to.d_logits = to_maps;
  to.upstream = each ? pointer<T>(grad) : &factor;
  if (each) {
    to.upstream_n = grad.stride(0);
    to.upstream_y = grad.stride(1);
    to.upstream_x = grad.stride(2);
  }
  call.run(to, head.get(), tail.get(), nullptr);
  call.join(to_maps, head.get(), tail.get());
  return d_logits;
}

Tensors4 upsample_cross_entropy_forward(Tensor logits, Tensor target, OptionalTensor class_weight,
                                        bool align_corners, int64_t ignore_index, double label_smoothing,
                                        int64_t reduction, int64_t keep, bool needs_confusion) {
  auto run = is_double(logits) ? forward<double> : forward<float>;
  return run(logits, target, class_weight, align_corners, ignore_index, label_smoothing, Reduction(reduction),
             Keep(keep), needs_confusion);
}

Tensor upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, OptionalTensor class_weight,
                                       Tensor kept, Tensor divisor, bool align_corners, int64_t ignore_index,
                                       double label_smoothing, int64_t reduction, int64_t keep) {
  auto run = is_double(logits) ? backward<double> : backward<float>;
  return run(grad, logits, target, class_weight, kept, divisor, align_corners, ignore_index, label_smoothing,
             Reduction(reduction), Keep(keep));
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("upsample_cross_entropy_forward", TORCH_BOX(&infopro::upsample_cross_entropy_forward));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&infopro::upsample_cross_entropy_backward));
}
