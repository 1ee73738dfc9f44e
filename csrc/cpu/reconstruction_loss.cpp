// reconstruction_loss on the CPU: checks, buffers, and three sweeps over the samples of the batch, shared by
// the threads.
#include "../checks.h"
#include "../resize.h"

namespace infopro {
namespace {

constexpr const char* OP = "reconstruction_loss";

// What forward and backward are given.
struct Given {
  const Tensor &features, &image, &w1;
  const OptionalTensor &b1, &gamma, &beta;
  const Tensor& w2;
  const OptionalTensor& b2;
  const Doubles& restore;
  double eps;
  int64_t mode, loss;

  bool in_double() const { return is_double(features) || is_double(image) || is_double(w1); }
};

// One call: the Decoder that the kernels read, and the memory behind its pointers.
template <class T> struct Call {
  const Kernels<T>& kernel = kernels<T>();
  AxisTable rows, columns;
  Decoder<T> d;
  NormCoefficients<T> norm;
  Buffer<T> w1, w2, b1, b2, w1_packed, w1_backward, w2_packed, w2_backward, expand, expand_backward;
  Buffer<int32_t> band, band_backward;

  explicit Call(const Given& g)
      : rows(g.features.size(2), g.image.size(2), Resize(int(g.mode))),
        columns(g.features.size(3), g.image.size(3), Resize(int(g.mode))), d(shape(g)),
        norm(OP, g.gamma, g.beta, d.K), w1(numbers<T>(OP, "w1", g.w1, 9 * d.K * d.C, T(0))),
        w2(numbers<T>(OP, "w2", g.w2, 27 * d.K, T(0))), b1(numbers<T>(OP, "b1", g.b1, d.K, T(0))),
        b2(numbers<T>(OP, "b2", g.b2, 3, T(0))), w1_packed(packed_taps() * d.K * d.C),
        w1_backward(packed_taps() * d.K * d.C), w2_packed(27 * d.K), w2_backward(27 * d.K), expand(table()),
        expand_backward(table()), band(bands()), band_backward(bands()) {
    d.rows = rows.view(d.h);
    d.columns = columns.view(d.w);
    set_image(d, OP, g.image, g.restore, g.loss);
    kernel.decoder_pack(d, w1.get(), w2.get(), w1_packed.get(), w1_backward.get(), w2_packed.get(),
                        w2_backward.get());
    d.w1 = w1_packed.get(), d.w1_backward = w1_backward.get();
    d.w2 = w2_packed.get(), d.w2_backward = w2_backward.get();
    d.b1 = b1.get(), d.b2 = b2.get();
    norm.give_to(d);
    if (!d.low_resolution) return;
    Buffer<T> memory(2 * table());
    d.shuffled = kernel.decoder_expand(d, expand.get(), expand_backward.get(), band.get(),
                                       band_backward.get(), memory.get());
    d.expand = expand.get(), d.expand_backward = expand_backward.get();
    d.band = band.get(), d.band_backward = band_backward.get();
  }

  static Decoder<T> shape(const Given& g) {
    Decoder<T> d = {};
    d.N = g.features.size(0), d.C = g.features.size(1), d.h = g.features.size(2), d.w = g.features.size(3);
    d.K = g.w1.size(0), d.H = g.image.size(2), d.W = g.image.size(3);
    CHECK(g.w1.size(1) == d.C && g.image.size(0) == d.N && g.image.size(1) == 3, OP,
          ": shapes of features, image and w1 do not fit");
    d.features = maps(OP, "features", g.features);
    d.resize = d.h != d.H || d.w != d.W;
    // Multiply-adds of z either way: nine 1x1 convolutions and the expansion, or the resize and a 3x3
    // convolution.
    double pixels = double(d.H) * double(d.W), K = double(d.K), C = double(d.C);
    double low = 9 * K * C * double(d.h) * double(d.w) + K * pixels * (6 + 18.0 * double(d.h) / double(d.H));
    d.low_resolution = d.resize && low < 9 * K * C * pixels + 4 * C * pixels;
    d.winograd = !d.low_resolution && d.H % 4 == 0;
    return d;
  }

  int64_t packed_taps() const { return d.winograd ? 18 : 9; }
  int64_t table() const { return d.low_resolution ? kernel.decoder_expand_size(d) : 0; }
  int64_t bands() const { return d.low_resolution ? kernel.decoder_band_size(d) : 0; }
  int64_t workers() const { return threads_for(d.N); }

  // work(sample, scratch, worker) for every sample
  template <class F>
  void for_samples(const F& work) const { sweep<T>(d.N, kernel.decoder_scratch(d), true, work); }
};

template <class T>
Tensors2 forward(const Given& g, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 bool needs_grad) {
  const int64_t N = g.features.size(0), K = g.w1.size(0);
  Tensor value = empty({}, scalar_type<T>), saved = empty({31 * K + 3}, scalar_type<T>);
  T *mean = pointer<T>(saved), *var = mean + K, *d_gamma = var + K, *d_beta = d_gamma + K, *d_w2 = d_beta + K;
  T* d_b2 = d_w2 + 27 * K;
  std::fill(mean, d_b2 + 3, T(0));
  *pointer<T>(value) = T(0);
  if (N == 0) return {value, saved};
  Call<T> call(g);
  const Decoder<T>& d = call.d;
  if (running_mean) {
    read_numbers(OP, "running_mean", running_mean, K, T(0), mean);
    read_numbers(OP, "running_var", running_var, K, T(1), var);
  } else {
    Buffer<double> means(N * K), squares(N * K);
    call.for_samples([&](int64_t n, T* scratch, int64_t) {
      call.kernel.decoder_statistics(d, n, scratch, &means[n * K], &squares[n * K]);
    });
    merge_statistics<T>(N, K, double(d.H) * double(d.W), means.get(), squares.get(), mean, var);
  }
  call.norm.set(mean, var, g.eps, K);
  const int64_t row = 2 * K + 4, part = call.kernel.decoder_w2_partial(d);
  Buffer<double> sums(N * row);
  Buffer<T> partial(call.workers() * part, T(0));
  call.for_samples([&](int64_t n, T* scratch, int64_t worker) {
    double* mine = &sums[n * row];
    SampleSums sample = {0, mine, mine + K, mine + 2 * K};
    call.kernel.decoder_loss(d, n, needs_grad, scratch, sample, partial.get() + worker * part);
    mine[2 * K + 3] = sample.loss;
  });
  auto total = [&](int64_t column) {
    double sum = 0;
    for (int64_t n = 0; n < N; n++) sum += sums[n * row + column];
    return sum;
  };
  *pointer<T>(value) = T(total(2 * K + 3) / (3.0 * double(N) * double(d.H) * double(d.W)));
  if (std::isnan(*pointer<T>(value))) refuse_image(d, g.image);
  if (needs_grad) {
    for (int64_t k = 0; k < 2 * K; k++) d_gamma[k] = T(total(k));
    for (int64_t o = 0; o < 3; o++) d_b2[o] = T(total(2 * K + o));
    for (int64_t t = 0; t < call.workers(); t++)
      call.kernel.decoder_w2_reduce(d, partial.get() + t * part, d_w2);
  }
  return {value, saved};
}

template <class T>
Tensors3 backward(const Given& g, const Tensor& grad, const Tensor& saved, bool batch_statistics,
                  bool needs_features, bool needs_w1) {
  const int64_t N = g.features.size(0), C = g.features.size(1), K = g.w1.size(0);
  std::vector<int64_t> none = {0}, w1_shape = {K, C, 3, 3};
  // empty_like keeps the strides of the features.
  Tensor g_features =
      needs_features ? torch::stable::empty_like(g.features) : empty(none, g.features.scalar_type());
  Tensor g_w1 = empty(needs_w1 ? w1_shape : none, scalar_type<T>), g_b1 = empty({K}, scalar_type<T>);
  T *d_w1 = pointer<T>(g_w1), *d_b1 = pointer<T>(g_b1);
  if (needs_w1) std::fill(d_w1, d_w1 + 9 * K * C, T(0));
  std::fill(d_b1, d_b1 + K, T(0));
  if (N == 0) return {g_features, g_w1, g_b1};
  Call<T> call(g);
  Decoder<T>& d = call.d;
  Buffer<T> kept = numbers<T>(OP, "saved", saved, 31 * K + 3, T(0));
  const T upstream = numbers<T>(OP, "grad", grad, 1, T(0))[0];
  const T *mean = kept.get(), *var = mean + K, *d_gamma = var + K, *d_beta = d_gamma + K;
  call.norm.set(mean, var, g.eps, K);
  d.pixel_weight *= upstream;
  Buffer<T> mean_dy(K), mean_dy_xhat(K);
  const double count = double(N) * double(d.H) * double(d.W);
  for (int64_t k = 0; k < K; k++) {
    mean_dy[k] = batch_statistics ? T(double(d_beta[k]) * double(upstream) / count) : T(0);
    mean_dy_xhat[k] = batch_statistics ? T(double(d_gamma[k]) * double(upstream) / count) : T(0);
    // With batch statistics a constant added to z changes nothing: the gradient of b1 is exactly 0.
    if (!batch_statistics) d_b1[k] = call.norm.scale[k] * d_beta[k] * upstream;
  }
  if (!needs_features && !needs_w1) return {g_features, g_w1, g_b1};
  std::optional<Maps> g_maps;
  if (needs_features) g_maps = maps(OP, "features", g_features);
  const int64_t part = needs_w1 ? call.kernel.decoder_w1_partial(d) : 0;
  Buffer<T> partial(call.workers() * part, T(0));
  call.for_samples([&](int64_t n, T* scratch, int64_t worker) {
    call.kernel.decoder_backward(d, n, mean_dy.get(), mean_dy_xhat.get(), g_maps ? &*g_maps : nullptr,
                                 needs_w1 ? partial.get() + worker * part : nullptr, scratch);
  });
  for (int64_t t = 0; t < call.workers() && needs_w1; t++)
    call.kernel.decoder_w1_reduce(d, partial.get() + t * part, d_w1);
  return {g_features, g_w1, g_b1};
}

Tensors2 reconstruction_loss_forward(Tensor features, Tensor image, Tensor w1, OptionalTensor b1,
                                     OptionalTensor gamma, OptionalTensor beta, Tensor w2, OptionalTensor b2,
                                     OptionalTensor running_mean, OptionalTensor running_var, Doubles restore,
                                     double eps, int64_t mode, int64_t loss, bool needs_grad) {
  const Given g = {features, image, w1, b1, gamma, beta, w2, b2, restore, eps, mode, loss};
  return (g.in_double() ? forward<double> : forward<float>)(g, running_mean, running_var, needs_grad);
}

Tensors3 reconstruction_loss_backward(Tensor grad, Tensor features, Tensor image, Tensor w1,
                                      OptionalTensor b1, OptionalTensor gamma, OptionalTensor beta, Tensor w2,
                                      OptionalTensor b2, Tensor saved, Doubles restore, bool batch_statistics,
                                      double eps, int64_t mode, int64_t loss, bool needs_features,
                                      bool needs_w1) {
  const Given g = {features, image, w1, b1, gamma, beta, w2, b2, restore, eps, mode, loss};
  auto run = g.in_double() ? backward<double> : backward<float>;
  return run(g, grad, saved, batch_statistics, needs_features, needs_w1);
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("reconstruction_loss_forward", TORCH_BOX(&infopro::reconstruction_loss_forward));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&infopro::reconstruction_loss_backward));
}
