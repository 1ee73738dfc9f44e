// reconstruction_loss on the CPU: checks, buffers, and three sweeps over the batch shared out among threads by samples.
#include <algorithm>
#include <cmath>

#include "../resize.h"
#include "ops.h"

namespace infopro {
namespace {

constexpr const char* OP = "reconstruction_loss";

// One call: the Decoder that the kernels read, and the memory behind its pointers.
template <class T>
struct Call {
  const Kernels<T>& kernel = kernels<T>();
  AxisTable rows, columns;
  Decoder<T> d;
  Buffer<T> w1, w2, b1, b2, gamma, beta, w1_packed, w1_backward, w2_packed, w2_backward, center, inverse_std, scale;
  std::optional<Buffer<T>> expand, expand_backward;
  std::optional<Buffer<int32_t>> band, band_backward;

  Call(const Tensor& features, const Tensor& image, const Tensor& w1_, const OptionalTensor& b1_, const OptionalTensor& gamma_,
       const OptionalTensor& beta_, const Tensor& w2_, const OptionalTensor& b2_, const std::vector<double>& restore, int64_t mode, int64_t loss)
      : rows(features.size(2), image.size(2), Resize(int(mode))), columns(features.size(3), image.size(3), Resize(int(mode))),
        d(shape(features, image, w1_)), w1(numbers<T>(OP, "w1", w1_, 9 * d.K * d.C, T(0))), w2(numbers<T>(OP, "w2", w2_, 27 * d.K, T(0))),
        b1(numbers<T>(OP, "b1", b1_, d.K, T(0))), b2(numbers<T>(OP, "b2", b2_, 3, T(0))), gamma(numbers<T>(OP, "gamma", gamma_, d.K, T(1))),
        beta(numbers<T>(OP, "beta", beta_, d.K, T(0))), w1_packed(packed_taps() * d.K * d.C),
        w1_backward(packed_taps() * d.K * d.C), w2_packed(27 * d.K),
        w2_backward(27 * d.K), center(d.K), inverse_std(d.K), scale(d.K) {
    d.rows = rows.view(d.h);
    d.columns = columns.view(d.w);
    d.restore = restore.size() == 6;
    for (int i = 0; i < 3 && d.restore; i++) {
      d.image_mean[i] = T(restore[i]);
      d.image_std[i] = T(restore[3 + i]);
    }
    d.pixel = Pixel(int(loss));
    d.pixel_weight = T(1.0 / (3.0 * double(d.N) * double(d.H) * double(d.W)));
    kernel.decoder_pack(d, w1.get(), w2.get(), w1_packed.get(), w1_backward.get(), w2_packed.get(), w2_backward.get());
    d.w1 = w1_packed.get();
    d.w1_backward = w1_backward.get();
    d.w2 = w2_packed.get();
    d.w2_backward = w2_backward.get();
    d.b1 = b1.get();
    d.b2 = b2.get();
    d.center = center.get();
    d.inverse_std = inverse_std.get();
    d.scale = scale.get();
    d.shift = beta.get();
    if (d.low_resolution) {
      expand.emplace(kernel.decoder_expand_size(d));
      expand_backward.emplace(kernel.decoder_expand_size(d));
      band.emplace(kernel.decoder_band_size(d));
      band_backward.emplace(kernel.decoder_band_size(d));
      Buffer<T> memory(2 * kernel.decoder_expand_size(d));
      d.shuffled = kernel.decoder_expand(d, expand->get(), expand_backward->get(), band->get(), band_backward->get(), memory.get());
      d.expand = expand->get();
      d.expand_backward = expand_backward->get();
      d.band = band->get();
      d.band_backward = band_backward->get();
    }
  }

  static Decoder<T> shape(const Tensor& features, const Tensor& image, const Tensor& w1) {
    Decoder<T> d = {};
    d.N = features.size(0), d.C = features.size(1), d.h = features.size(2), d.w = features.size(3);
    d.K = w1.size(0), d.H = image.size(2), d.W = image.size(3);
    STD_TORCH_CHECK(w1.size(1) == d.C && image.size(0) == d.N && image.size(1) == 3, OP, ": shapes of features, image and w1 do not fit");
    d.features = maps(OP, "features", features);
    d.image = maps(OP, "image", image);
    d.resize = d.h != d.H || d.w != d.W;
    // Multiply-adds of z either way: nine 1x1 convolutions and the expansion, or the resize and a 3x3 convolution.
    double pixels = double(d.H) * double(d.W), K = double(d.K), C = double(d.C);
    double low = 9 * K * C * double(d.h) * double(d.w) + K * pixels * (6 + 18.0 * double(d.h) / double(d.H));
    d.low_resolution = d.resize && low < 9 * K * C * pixels + 4 * C * pixels;
    d.winograd = !d.low_resolution && d.H % 4 == 0;
    return d;
  }

  int64_t packed_taps() const { return d.winograd ? 18 : 9; }

  void set_statistics(const T* mean, const T* var, double eps) {
    for (int64_t k = 0; k < d.K; k++) {
      center[k] = mean[k];
      inverse_std[k] = T(1.0 / std::sqrt(double(var[k]) + eps));
      scale[k] = gamma[k] * inverse_std[k];
    }
  }

  int64_t workers() const { return std::min(threads(), d.N); }

  // work(sample, scratch, worker) for every sample
  template <class F>
  void sweep(const F& work) const {
    int64_t size = kernel.decoder_scratch(d);
    Buffer<T> scratch(workers() * size);
    share(d.N, workers(), [&](int64_t first, int64_t last, int64_t worker) {
      T* mine = scratch.get() + worker * size;
      std::fill(mine, mine + size, T(0));
      for (int64_t n = first; n < last; n++) work(n, mine, worker);
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& features, const Tensor& image, const Tensor& w1, const OptionalTensor& b1,
                                   const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& w2, const OptionalTensor& b2,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var, const std::vector<double>& restore,
                                   double eps, int64_t mode, int64_t loss, bool needs_grad) {
  const int64_t N = features.size(0), K = w1.size(0);
  Tensor value = empty({}, scalar_type<T>), saved = empty({31 * K + 3}, scalar_type<T>);
  T *mean = pointer<T>(saved), *var = mean + K, *d_gamma = var + K, *d_beta = d_gamma + K, *d_w2 = d_beta + K, *d_b2 = d_w2 + 27 * K;
  std::fill(mean, d_b2 + 3, T(0));
  *pointer<T>(value) = T(0);
  if (N == 0) return {value, saved};
  Call<T> call(features, image, w1, b1, gamma, beta, w2, b2, restore, mode, loss);
  const Decoder<T>& d = call.d;
  if (running_mean) {
    Buffer<T> m = numbers<T>(OP, "running_mean", running_mean, K, T(0)), v = numbers<T>(OP, "running_var", running_var, K, T(1));
    std::copy(m.get(), m.get() + K, mean);
    std::copy(v.get(), v.get() + K, var);
  } else {
    Buffer<double> means(N * K), squares(N * K);
    call.sweep([&](int64_t n, T* scratch, int64_t) { call.kernel.decoder_statistics(d, n, scratch, &means[n * K], &squares[n * K]); });
    merge_statistics<T>(N, K, double(d.H) * double(d.W), means.get(), squares.get(), mean, var);
  }
  call.set_statistics(mean, var, eps);
  const int64_t row = 2 * K + 4, part = call.kernel.decoder_w2_partial(d);
  Buffer<double> sums(N * row);
  Buffer<T> partial(call.workers() * part);
  partial.fill(T(0), call.workers() * part);
  call.sweep([&](int64_t n, T* scratch, int64_t worker) {
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
  if (needs_grad) {
    for (int64_t k = 0; k < 2 * K; k++) d_gamma[k] = T(total(k));
    for (int64_t o = 0; o < 3; o++) d_b2[o] = T(total(2 * K + o));
    for (int64_t t = 0; t < call.workers(); t++) call.kernel.decoder_w2_reduce(d, partial.get() + t * part, d_w2);
  }
  return {value, saved};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& features, const Tensor& image, const Tensor& w1,
                                            const OptionalTensor& b1, const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& w2,
                                            const OptionalTensor& b2, const Tensor& saved, const std::vector<double>& restore,
                                            bool batch_statistics, double eps, int64_t mode, int64_t loss, bool needs_features, bool needs_w1) {
  const int64_t N = features.size(0), C = features.size(1), K = w1.size(0);
  std::vector<int64_t> none = {0}, w1_shape = {K, C, 3, 3};
  Tensor g_features = needs_features ? torch::stable::empty_like(features) : empty(none, features.scalar_type());  // features' strides
  Tensor g_w1 = empty(needs_w1 ? w1_shape : none, scalar_type<T>), g_b1 = empty({K}, scalar_type<T>);
  T *d_w1 = pointer<T>(g_w1), *d_b1 = pointer<T>(g_b1);
  if (needs_w1) std::fill(d_w1, d_w1 + 9 * K * C, T(0));
  std::fill(d_b1, d_b1 + K, T(0));
  if (N == 0) return {g_features, g_w1, g_b1};
  Call<T> call(features, image, w1, b1, gamma, beta, w2, b2, restore, mode, loss);
  Decoder<T>& d = call.d;
  Buffer<T> kept = numbers<T>(OP, "saved", saved, 31 * K + 3, T(0)), upstream = numbers<T>(OP, "grad", grad, 1, T(0));
  const T *mean = kept.get(), *var = mean + K, *d_gamma = var + K, *d_beta = d_gamma + K;
  call.set_statistics(mean, var, eps);
  d.pixel_weight *= upstream[0];
  Buffer<T> mean_dy(K), mean_dy_xhat(K);
  const double count = double(N) * double(d.H) * double(d.W);
  for (int64_t k = 0; k < K; k++) {
    mean_dy[k] = batch_statistics ? T(double(d_beta[k]) * double(upstream[0]) / count) : T(0);
    mean_dy_xhat[k] = batch_statistics ? T(double(d_gamma[k]) * double(upstream[0]) / count) : T(0);
    // with batch statistics a constant added to z changes nothing: the gradient of b1 is exactly 0
    if (!batch_statistics) d_b1[k] = call.scale[k] * d_beta[k] * upstream[0];
  }
  if (!needs_features && !needs_w1) return {g_features, g_w1, g_b1};
  std::optional<Maps> g_maps;
  if (needs_features) g_maps = maps(OP, "features", g_features);
  const int64_t part = needs_w1 ? call.kernel.decoder_w1_partial(d) : 0;
  Buffer<T> partial(call.workers() * part);
  partial.fill(T(0), call.workers() * part);
  call.sweep([&](int64_t n, T* scratch, int64_t worker) {
    call.kernel.decoder_backward(d, n, mean_dy.get(), mean_dy_xhat.get(), g_maps ? &*g_maps : nullptr,
                                 needs_w1 ? partial.get() + worker * part : nullptr, scratch);
  });
  for (int64_t t = 0; t < call.workers() && needs_w1; t++) call.kernel.decoder_w1_reduce(d, partial.get() + t * part, d_w1);
  return {g_features, g_w1, g_b1};
}

bool in_double(const Tensor& features, const Tensor& image, const Tensor& w1) { return is_double(features) || is_double(image) || is_double(w1); }

}  // namespace

std::tuple<Tensor, Tensor> reconstruction_loss_forward_cpu(
    Tensor features, Tensor image, Tensor w1, OptionalTensor b1, OptionalTensor gamma, OptionalTensor beta, Tensor w2, OptionalTensor b2,
    OptionalTensor running_mean, OptionalTensor running_var, std::vector<double> restore, double eps, int64_t mode, int64_t loss,
    bool needs_grad) {
  auto run = in_double(features, image, w1) ? forward<double> : forward<float>;
  return run(features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var, restore, eps, mode, loss, needs_grad);
}

std::tuple<Tensor, Tensor, Tensor> reconstruction_loss_backward_cpu(
    Tensor grad, Tensor features, Tensor image, Tensor w1, OptionalTensor b1, OptionalTensor gamma, OptionalTensor beta, Tensor w2,
    OptionalTensor b2, Tensor saved, std::vector<double> restore, bool batch_statistics, double eps, int64_t mode, int64_t loss,
    bool needs_features, bool needs_w1) {
  auto run = in_double(features, image, w1) ? backward<double> : backward<float>;
  return run(grad, features, image, w1, b1, gamma, beta, w2, b2, saved, restore, batch_statistics, eps, mode, loss, needs_features, needs_w1);
}

}  // namespace infopro
