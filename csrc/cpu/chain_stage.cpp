// The stages of a chain decoder and upsample_conv3x3 on the CPU: checks, buffers, and bands of rows shared by
// the threads.
#include "../checks.h"
#include "../resize.h"

namespace infopro {
namespace {

constexpr int64_t CACHE = 384 * 1024;          // bytes of a chunk's maps, for the L2 cache
constexpr int64_t EXPANDED = 2 * 1024 * 1024;  // bytes of a band's expanded rows
constexpr int64_t ROWS = 8;                    // least rows of x in a band: neighbours share about two

// A batch norm, in front of a stage or behind it; or none.
struct Norm {
  OptionalTensor mean, var, gamma, beta;
  double eps;
};

// One call: the ChainStage that the kernels read, and the memory behind its pointers.
template <class T> struct Call {
  const char* op;
  const Kernels<T>& kernel = kernels<T>();
  AxisTable rows, columns;
  ChainStage<T> d;
  NormCoefficients<T> norm;
  Buffer<T> bias, weight, weight_backward;
  std::optional<Buffer<T>> expand, gather;
  Buffer<int32_t> expand_band, gather_band;
  Buffer<T> z_mean, z_center, z_slope, z_scale;
  std::vector<ChainBand> bands;

  Call(const char* op, const Tensor& x, const Norm& in, const Tensor& w, const OptionalTensor& b, int64_t H,
       int64_t W, int64_t mode, const Doubles& factors)
      : op(op), rows(x.size(2), H, Resize(int(mode)), factors.empty() ? 0 : factors[0]),
        columns(x.size(3), W, Resize(int(mode)), factors.empty() ? 0 : factors[1]),
        d(shape(op, x, in, w, H, W)), norm(op, in.gamma, in.beta, d.C),
        bias(numbers<T>(op, "bias", b, d.K, T(0))), weight(padded(taps(), kernel.mr) * d.C),
        weight_backward(padded(d.C, kernel.mr) * taps()), expand_band(kernel.chain_bands(d, false)),
        gather_band(kernel.chain_bands(d, true)), z_mean(d.K), z_center(d.K), z_slope(d.K), z_scale(d.K) {
    d.rows = rows.view(d.h);
    d.columns = columns.view(d.w);
    d.plain = d.side == 1 && d.h == d.H && d.w == d.W;
    d.bias = bias.get();
    if (d.norm) {
      norm.set(numbers<T>(op, "mean", in.mean, d.C, T(0)).get(),
               numbers<T>(op, "var", in.var, d.C, T(1)).get(), in.eps, d.C);
      norm.give_to(d);
    }
    pack(w);
    d.expand_band = expand_band.get();
    d.gather_band = gather_band.get();
    const int64_t pixel = (d.C + taps()) * int64_t(sizeof(T));
    d.chunk = std::max<int64_t>(1, std::min(d.h, CACHE / pixel / d.w));
    // Register tiles are mr rows and nr columns: take the orientation that leaves fewer of them partly empty.
    const int64_t of_inputs = padded(d.C, kernel.mr) * padded(taps(), kernel.nr);
    d.weight_of_inputs = of_inputs < padded(taps(), kernel.mr) * padded(d.C, kernel.nr);
  }

  static ChainStage<T> shape(const char* op, const Tensor& x, const Norm& norm, const Tensor& w, int64_t H,
                             int64_t W) {
    ChainStage<T> d = {};
    d.N = x.size(0), d.C = x.size(1), d.h = x.size(2), d.w = x.size(3), d.K = w.size(0), d.H = H, d.W = W;
    d.side = int(w.size(2));
    CHECK(w.size(1) == d.C && (d.side == 1 || d.side == 3) && w.size(3) == d.side, op,
          ": shapes of x and weight do not fit");
    d.x = maps(op, "x", x);
    d.norm = norm.mean.has_value();
    CHECK(!d.norm || (d.x.dtype == dtype_as<T> && x.is_contiguous()), op,
          ": x: expected the contiguous map that a stage gave, where it is normalised");
    return d;
  }

  static int64_t padded(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
  int64_t taps() const { return d.side * d.side * d.K; }

  // Pack the weights (K, C, side, side) as (taps K, C), and their transpose.
  void pack(const Tensor& w) {
    const int64_t window = d.side * d.side, count = taps() * d.C;
    Buffer<T> given = numbers<T>(op, "weight", w, count, T(0)), mixed(count);
    for (int64_t k = 0; k < d.K; k++)
      for (int64_t c = 0; c < d.C; c++)
        for (int64_t t = 0; t < window; t++)
          mixed[(t * d.K + k) * d.C + c] = given[(k * d.C + c) * window + t];
    Matrix m = {mixed.get(), dtype_as<T>, d.C, 1};
    kernel.pack_a(m, taps(), d.C, d.C, weight.get());
    kernel.pack_a(m.transposed(), d.C, taps(), taps(), weight_backward.get());
    d.weight = weight.get();
    d.weight_backward = weight_backward.get();
  }

  void make_tables(bool backward) {
    if (d.plain) return;
    expand.emplace(kernel.chain_table(d, false, nullptr, expand_band.get()));
    kernel.chain_table(d, false, expand->get(), expand_band.get());
    d.expand = expand->get();
    if (!backward) return;
    gather.emplace(kernel.chain_table(d, true, nullptr, gather_band.get()));
    kernel.chain_table(d, true, gather->get(), gather_band.get());
    d.gather = gather->get();
  }

  // The rows of x that rows out0..out1 of z read.
  void inputs_of(int64_t out0, int64_t out1, int64_t& in0, int64_t& in1) const {
    const int64_t reach = d.side / 2;
    in0 = d.rows.low[std::max<int64_t>(0, out0 - reach)];
    in1 = d.rows.high[std::min(d.H, out1 + reach) - 1] + 1;
  }

  // The rows of z that read any of rows in0..in1 of x; none if a resize skips them.
  void outputs_of(int64_t in0, int64_t in1, int64_t& out0, int64_t& out1) const {
    int64_t first = 0, last = d.H;
    while (first < d.H && d.rows.high[first] < in0) first++;
    while (last > first && d.rows.low[last - 1] >= in1) last--;
    const int64_t reach = first < last ? d.side / 2 : 0;
    out0 = std::max<int64_t>(0, first - reach);
    out1 = std::min(d.H, last + reach);
  }

  // Cut samples into bands, of rows of z in forward and of x in backward: enough for the threads and for the
  // cache.
  void make_bands(bool backward) {
    const int64_t bytes = d.plain ? 0 : d.K * d.side * d.h * d.W * int64_t(sizeof(T));
    const bool uneven = d.N % threads() && d.N < 8 * threads();
    const int64_t wanted = std::max(ceil_div(bytes, EXPANDED), uneven ? ceil_div(4 * threads(), d.N) : 1);
    const int64_t count = std::max<int64_t>(1, std::min(wanted, d.h / ROWS)), size = backward ? d.h : d.H;
    for (int64_t n = 0; n < d.N; n++)
      for (int64_t i = 0; i < count; i++) {
        const int64_t begin = i * size / count, end = (i + 1) * size / count;
        if (begin == end) continue;
        ChainBand b = {n, begin, end, begin, end, 0, 0};
        if (!backward) {
          inputs_of(begin, end, b.in0, b.in1);
        } else {
          outputs_of(begin, end, b.out0, b.out1);
          if (b.out0 < b.out1) inputs_of(b.out0, b.out1, b.all0, b.all1);
        }
        d.in_rows = std::max({d.in_rows, b.in1 - b.in0, b.all1 - b.all0});
        d.out_rows = std::max(d.out_rows, b.out1 - b.out0);
        bands.push_back(b);
      }
  }

  void set_loss(const Tensor& image, const Doubles& restore, int64_t loss) {
    CHECK(d.K == 3 && image.size(0) == d.N && image.size(1) == 3, op,
          ": shapes of x, weight and image do not fit");
    d.loss = true;
    set_image(d, op, image, restore, loss);
  }

  // dy is the gradient in the normalised and rectified z if there is a z, else in z. mean_dy: (2, K), the
  // batch's means of dy and dy xhat.
  void set_gradient(const Tensor& dy, const OptionalTensor& z, const Norm& out,
                    const OptionalTensor& mean_dy) {
    d.dy = pointer<T>(dy);
    if (!z) return;
    Buffer<T> mean = numbers<T>(op, "z_mean", out.mean, d.K, T(0));
    Buffer<T> var = numbers<T>(op, "z_var", out.var, d.K, T(1));
    Buffer<T> gamma = numbers<T>(op, "z_gamma", out.gamma, d.K, T(1));
    Buffer<T> means = numbers<T>(op, "mean_dy", mean_dy, 2 * d.K, T(0));
    for (int64_t k = 0; k < d.K; k++) {
      const double inverse = 1.0 / std::sqrt(double(var[k]) + out.eps);
      z_center[k] = mean[k];
      z_mean[k] = means[k];
      z_slope[k] = T(double(means[d.K + k]) * inverse);
      z_scale[k] = gamma[k] * T(inverse);
    }
    d.z = pointer<T>(*z), d.z_mean = z_mean.get(), d.z_center = z_center.get();
    d.z_slope = z_slope.get(), d.z_scale = z_scale.get();
  }

  int64_t count() const { return int64_t(bands.size()); }

  // work(number of the band, scratch, worker) for every band
  template <class F>
  void for_bands(const F& work) const { sweep<T>(count(), kernel.chain_scratch(d), false, work); }

  // The sum of a column of (bands, row).
  double total(const Buffer<double>& own, int64_t row, int64_t column) const {
    double sum = 0;
    for (int64_t i = 0; i < count(); i++) sum += own[i * row + column];
    return sum;
  }

  // Compute z and, unless `statistics` is null, its mean and biased variance (2, K).
  void forward(T* z, T* statistics) {
    make_tables(false);
    make_bands(false);
    const int64_t K = d.K;
    Buffer<double> means(statistics ? count() * K : 0), squares(statistics ? count() * K : 0);
    for_bands([&](int64_t i, T* scratch, int64_t) {
      double* mean = statistics ? &means[i * K] : nullptr;
      kernel.chain_forward(d, bands[i], scratch, z, mean, statistics ? &squares[i * K] : nullptr);
    });
    // As merge_statistics, for bands that differ in size.
    auto share_of = [&](int64_t i) { return double(bands[i].out1 - bands[i].out0) * double(d.W); };
    const double all = double(d.N) * double(d.H) * double(d.W);
    for (int64_t k = 0; k < K && statistics; k++) {
      double center = 0, total = 0;
      for (int64_t i = 0; i < count(); i++) center += means[i * K + k] * (share_of(i) / all);
      for (int64_t i = 0; i < count(); i++) {
        const double off = means[i * K + k] - center;
        total += squares[i * K + k] + share_of(i) * off * off;
      }
      statistics[k] = T(center);
      statistics[K + k] = T(total / all);
    }
  }

  double loss() {
    make_tables(false);
    make_bands(false);
    Buffer<double> sums(count());
    for_bands([&](int64_t i, T* scratch, int64_t) { sums[i] = kernel.chain_loss(d, bands[i], scratch); });
    return total(sums, 1, 0) / (3.0 * double(d.N) * double(d.H) * double(d.W));
  }

  // Compute dx, sums (2, C), d_weight and d_bias (3). Each is null if not needed, else zeros at the start.
  void backward(const Maps* dx, T* sums, T* d_weight, T* d_bias) {
    make_tables(true);
    make_bands(true);
    const int64_t row = 2 * d.C + d.K, part = d_weight ? kernel.chain_weight_partial(d) : 0;
    const int64_t workers = threads_for(count());
    Buffer<double> own(count() * row, 0);
    Buffer<T> partial(workers * part, T(0));
    for_bands([&](int64_t i, T* scratch, int64_t worker) {
      T* mine = d_weight ? partial.get() + worker * part : nullptr;
      kernel.chain_backward(d, bands[i], scratch, dx, &own[i * row], &own[i * row + 2 * d.C], mine);
    });
    for (int64_t c = 0; c < 2 * d.C; c++) sums[c] = T(total(own, row, c));
    for (int64_t k = 0; k < d.K && d_bias; k++) d_bias[k] = T(total(own, row, 2 * d.C + k));
    for (int64_t t = 0; t < workers && d_weight; t++)
      kernel.chain_weight_reduce(d, partial.get() + t * part, d_weight);
  }
};

template <class T> Tensor zeros(std::vector<int64_t> shape) {
  Tensor t = empty(shape, scalar_type<T>);
  std::fill(pointer<T>(t), pointer<T>(t) + t.numel(), T(0));
  return t;
}

std::vector<int64_t> shape_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

// The results of a backward: the gradient of x, its sums, and the gradient of the weights, empty if not
// needed.
template <class T> struct Gradients {
  Tensor x, sums, weight;

  Gradients(const Tensor& of, const Norm& norm, const Tensor& w, bool needs_x, bool needs_weight)
      : x(!needs_x    ? empty({0}, of.scalar_type())
          : norm.mean ? empty(shape_of(of), scalar_type<T>)
                      : torch::stable::empty_like(of)),
        sums(zeros<T>({2, of.size(1)})),
        weight(zeros<T>(needs_weight ? shape_of(w) : std::vector<int64_t>{0})) {}

  void find(Call<T>& call, bool needs_x, bool needs_weight, T* d_bias) {
    if ((!needs_x && !needs_weight && !d_bias) || call.d.N == 0) return;
    std::optional<Maps> to;
    if (needs_x) to = maps(call.op, "x", x);
    call.backward(to ? &*to : nullptr, pointer<T>(sums), needs_weight ? pointer<T>(weight) : nullptr, d_bias);
  }
};

template <class T>
Tensors2 stage_forward(const char* op, const Tensor& x, const Norm& norm, const Tensor& weight,
                       const OptionalTensor& bias, int64_t H, int64_t W, int64_t mode, const Doubles& factors,
                       bool statistics) {
  const int64_t K = weight.size(0);
  Tensor z = empty({x.size(0), K, H, W}, scalar_type<T>), found = zeros<T>({2, statistics ? K : 0});
  if (x.size(0) == 0) return {z, found};
  Call<T> call(op, x, norm, weight, bias, H, W, mode, factors);
  call.forward(pointer<T>(z), statistics ? pointer<T>(found) : nullptr);
  return {z, found};
}

template <class T>
Tensors3 stage_backward(const char* op, const Tensor& dy, const OptionalTensor& z, const Norm& z_norm,
                        const OptionalTensor& mean_dy, const Tensor& x, const Norm& norm,
                        const Tensor& weight, int64_t mode, const Doubles& factors, bool needs_x,
                        bool needs_weight) {
  Gradients<T> found(x, norm, weight, needs_x, needs_weight);
  if (x.size(0)) {
    Tensor given =
        as_contiguous(dy.scalar_type() == scalar_type<T> ? dy : torch::stable::to(dy, scalar_type<T>));
    Call<T> call(op, x, norm, weight, {}, dy.size(2), dy.size(3), mode, factors);
    call.set_gradient(given, z, z_norm, mean_dy);
    found.find(call, needs_x, needs_weight, nullptr);
  }
  return {found.x, found.sums, found.weight};
}

template <class T>
Tensor loss_forward(const Tensor& x, const Norm& norm, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& image, const Doubles& restore, int64_t mode, const Doubles& factors,
                    int64_t loss) {
  Tensor value = zeros<T>({});
  if (x.size(0) == 0) return value;
  Call<T> call("chain_loss", x, norm, weight, bias, image.size(2), image.size(3), mode, factors);
  call.set_loss(image, restore, loss);
  *pointer<T>(value) = T(call.loss());
  if (std::isnan(*pointer<T>(value))) refuse_image(call.d, image);
  return value;
}

template <class T>
Tensors4 loss_backward(const Tensor& grad, const Tensor& x, const Norm& norm, const Tensor& weight,
                       const OptionalTensor& bias, const Tensor& image, const Doubles& restore, int64_t mode,
                       const Doubles& factors, int64_t loss, bool needs_x, bool needs_weight) {
  Gradients<T> found(x, norm, weight, needs_x, needs_weight);
  Tensor d_bias = zeros<T>({3});
  if (x.size(0)) {
    Call<T> call("chain_loss", x, norm, weight, bias, image.size(2), image.size(3), mode, factors);
    call.set_loss(image, restore, loss);
    call.d.pixel_weight *= numbers<T>("chain_loss", "grad", grad, 1, T(0))[0];
    found.find(call, needs_x, needs_weight, pointer<T>(d_bias));
  }
  return {found.x, found.sums, found.weight, d_bias};
}

bool in_double(const Tensor& x, const Tensor& weight) { return is_double(x) || is_double(weight); }

const Norm NO_NORM = {{}, {}, {}, {}, 0};

Tensors2 chain_stage_forward(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                             OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, int64_t H,
                             int64_t W, int64_t mode, Doubles factors, bool in_f64) {
  auto run = in_f64 ? stage_forward<double> : stage_forward<float>;
  return run("chain_stage", x, {mean, var, gamma, beta, eps}, weight, bias, H, W, mode, factors, true);
}

Tensors3 chain_stage_backward(Tensor dy, Tensor z, Tensor z_mean, Tensor z_var, OptionalTensor z_gamma,
                              double z_eps, OptionalTensor mean_dy, Tensor x, OptionalTensor mean,
                              OptionalTensor var, OptionalTensor gamma, OptionalTensor beta, double eps,
                              Tensor weight, int64_t mode, Doubles factors, bool needs_x, bool needs_weight) {
  auto run = is_double(dy) ? stage_backward<double> : stage_backward<float>;
  return run("chain_stage", dy, z, {z_mean, z_var, z_gamma, {}, z_eps}, mean_dy, x,
             {mean, var, gamma, beta, eps}, weight, mode, factors, needs_x, needs_weight);
}

Tensor chain_loss_forward(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                          OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, Tensor image,
                          Doubles restore, int64_t mode, Doubles factors, int64_t loss, bool in_f64) {
  auto run = in_f64 ? loss_forward<double> : loss_forward<float>;
  return run(x, {mean, var, gamma, beta, eps}, weight, bias, image, restore, mode, factors, loss);
}

Tensors4 chain_loss_backward(Tensor grad, Tensor x, OptionalTensor mean, OptionalTensor var,
                             OptionalTensor gamma, OptionalTensor beta, double eps, Tensor weight,
                             OptionalTensor bias, Tensor image, Doubles restore, int64_t mode,
                             Doubles factors, int64_t loss, bool needs_x, bool needs_weight) {
  auto run = is_double(grad) ? loss_backward<double> : loss_backward<float>;
  return run(grad, x, {mean, var, gamma, beta, eps}, weight, bias, image, restore, mode, factors, loss,
             needs_x, needs_weight);
}

Tensor upsample_conv3x3_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t H, int64_t W,
                                int64_t mode) {
  auto run = in_double(x, weight) ? stage_forward<double> : stage_forward<float>;
  return std::get<0>(run("upsample_conv3x3", x, NO_NORM, weight, bias, H, W, mode, {}, false));
}

Tensors2 upsample_conv3x3_backward(Tensor grad, Tensor x, Tensor weight, int64_t mode, bool needs_x,
                                   bool needs_weight) {
  auto run = in_double(x, weight) ? stage_backward<double> : stage_backward<float>;
  auto found =
      run("upsample_conv3x3", grad, {}, NO_NORM, {}, x, NO_NORM, weight, mode, {}, needs_x, needs_weight);
  return {std::get<0>(found), std::get<2>(found)};
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("chain_stage_forward", TORCH_BOX(&infopro::chain_stage_forward));
  m.impl("chain_stage_backward", TORCH_BOX(&infopro::chain_stage_backward));
  m.impl("chain_loss_forward", TORCH_BOX(&infopro::chain_loss_forward));
  m.impl("chain_loss_backward", TORCH_BOX(&infopro::chain_loss_backward));
  m.impl("upsample_conv3x3_forward", TORCH_BOX(&infopro::upsample_conv3x3_forward));
  m.impl("upsample_conv3x3_backward", TORCH_BOX(&infopro::upsample_conv3x3_backward));
}
