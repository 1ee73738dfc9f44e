// norm_relu_pool on the CPU: two sweeps over the samples forward (one in eval mode), one backward. A convolution before it is part of
// the first, in eval mode too, and of the last, sample by sample: its output is written once, and the gradient of that never.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace infopro {
namespace {

constexpr const char* OP = "norm_relu_pool";

void check_conv(const Tensor& x, const Tensor& weight, int64_t stride) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && weight.scalar_type() == dtype, OP,
                  ": expected x and weight of one dtype, float32 or float64");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3, OP,
                  ": expected a weight (K, ", x.size(1), ", 3, 3) and a stride of 1 or 2");
}

// Batch norm's numbers of a channel, for maps (N, C, h, w).
template <class T>
struct Call {
  const Kernels<T>& kernel = kernels<T>();
  NormPool<T> d;
  Buffer<T> gamma, beta, center, inverse_std, scale;

  Call(const Tensor& x, const OptionalTensor& gamma_, const OptionalTensor& beta_)
      : d{x.size(0), x.size(1), x.size(2), x.size(3), maps(OP, "x", x), nullptr, nullptr, nullptr, nullptr},
        gamma(numbers<T>(OP, "gamma", gamma_, d.C, T(1))), beta(numbers<T>(OP, "beta", beta_, d.C, T(0))), center(d.C), inverse_std(d.C), scale(d.C) {
    d.center = center.get();
    d.inverse_std = inverse_std.get();
    d.scale = scale.get();
    d.shift = beta.get();
  }

  void set_statistics(const T* mean, const T* var, double eps) {
    for (int64_t c = 0; c < d.C; c++) {
      center[c] = mean[c];
      inverse_std[c] = T(1.0 / std::sqrt(double(var[c]) + eps));
      scale[c] = gamma[c] * inverse_std[c];
    }
  }

  // work(sample, a thread's (C, pixels)) for every sample
  template <class F>
  void sweep(const F& work) const {
    const int64_t workers = std::min(threads(), d.N), size = d.C * kernel.norm_pool_row(d.h * d.w) + 8 * kernel.width;
    Buffer<T> rows(workers * size);
    share(d.N, workers, [&](int64_t first, int64_t last, int64_t worker) {
      for (int64_t n = first; n < last; n++) work(n, rows.get() + worker * size);
    });
  }
};

// A convolution before them: the memory behind the pointers of its ConvPool.
template <class T>
struct Convolution {
  const Kernels<T>& kernel = kernels<T>();
  ConvPool<T> d;
  Buffer<T> packed;

  // z: (N, H, W, K), contiguous. backward: whether the weights are wanted as the gradient of x takes them
  Convolution(const Tensor& x, const Tensor& weight, int64_t stride, const Tensor& z, bool backward)
      : d{x.size(0), x.size(1), z.size(3), x.size(2), x.size(3), z.size(1), z.size(2), stride, maps(OP, "x", x), {}, nullptr, pointer<T>(z),
          nullptr, nullptr, nullptr, nullptr},
        packed(weights()) {
    packed.fill(T(0), weights());
    kernel.conv_pool_pack(d, maps(OP, "weight", weight), backward ? nullptr : packed.get(), backward ? packed.get() : nullptr);
    d.weight = packed.get();
  }

  int64_t weights() const { return kernel.conv_pool_weights(d); }
  int64_t workers() const { return std::min(threads(), d.N); }

  // work(sample, a thread's scratch, the thread) for every sample
  template <class F>
  void sweep(const F& work) const {
    const int64_t size = kernel.conv_pool_scratch(d);
    Buffer<T> scratch(workers() * size);
    share(d.N, workers(), [&](int64_t first, int64_t last, int64_t worker) {
      T* mine = scratch.get() + worker * size;
      std::fill(mine, mine + size, T(0));
      for (int64_t n = first; n < last; n++) work(n, mine, worker);
    });
  }
};

// x: the maps that are normalised; conv: what makes them first, or null.
template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Convolution<T>* conv, const OptionalTensor& gamma, const OptionalTensor& beta,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps) {
  const int64_t N = x.size(0), C = x.size(1);
  Tensor result = empty({N, C}, scalar_type<T>), saved = empty({2 * C + 2 * N * C}, scalar_type<T>);
  T *pooled = pointer<T>(result), *mean = pointer<T>(saved), *var = mean + C, *positive = var + C, *positive_xhat = positive + N * C;
  std::fill(mean, mean + 2 * C, T(0));
  if (N == 0) return {result, saved};
  Call<T> call(x, gamma, beta);
  const NormPool<T>& d = call.d;
  Buffer<double> means(N * C), squares(N * C);
  if (conv)
    conv->sweep([&](int64_t n, T* scratch, int64_t) {
      conv->kernel.conv_pool_forward(conv->d, n, scratch, running_mean ? nullptr : &means[n * C], &squares[n * C]);
    });
  else if (!running_mean)
    call.sweep([&](int64_t n, T* rows) { call.kernel.norm_pool_statistics(d, n, rows, &means[n * C], &squares[n * C]); });
  if (running_mean) {
    Buffer<T> m = numbers<T>(OP, "running_mean", running_mean, C, T(0)), v = numbers<T>(OP, "running_var", running_var, C, T(1));
    std::copy(m.get(), m.get() + C, mean);
    std::copy(v.get(), v.get() + C, var);
  } else {
    merge_statistics<T>(N, C, double(d.h) * double(d.w), means.get(), squares.get(), mean, var);
  }
  call.set_statistics(mean, var, eps);
  call.sweep([&](int64_t n, T* rows) { call.kernel.norm_pool_forward(d, n, rows, pooled + n * C, positive + n * C, positive_xhat + n * C); });
  return {result, saved};
}

// (N, H, W, C) as maps (N, C, H, W).
Tensor channels_first(const Tensor& pixels) { return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2); }

// What the sweep of backward needs, and the gradients of gamma and beta.
template <class T>
struct Backward {
  Call<T> call;
  Tensor g_gamma, g_beta;
  Buffer<T> upstream, mean_dy, mean_dy_xhat;

  Backward(const Tensor& grad, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& saved,
           bool batch_statistics, double eps)
      : call(x, gamma, beta), g_gamma(empty({call.d.C}, scalar_type<T>)), g_beta(empty({call.d.C}, scalar_type<T>)),
        upstream(numbers<T>(OP, "grad", grad, call.d.N * call.d.C, T(0))), mean_dy(call.d.C), mean_dy_xhat(call.d.C) {
    const int64_t N = call.d.N, C = call.d.C;
    T *d_gamma = pointer<T>(g_gamma), *d_beta = pointer<T>(g_beta);
    const T *mean = pointer<T>(saved), *var = mean + C, *positive = var + C, *positive_xhat = positive + N * C;
    call.set_statistics(mean, var, eps);
    const double pixels = double(call.d.h) * double(call.d.w), count = pixels * double(N);
    for (int64_t c = 0; c < C; c++) {
      double dy = 0, dy_xhat = 0;
      for (int64_t n = 0; n < N; n++) {
        dy += double(upstream[n * C + c]) * double(positive[n * C + c]);
        dy_xhat += double(upstream[n * C + c]) * double(positive_xhat[n * C + c]);
      }
      d_beta[c] = T(dy / pixels);
      d_gamma[c] = T(dy_xhat / pixels);
      mean_dy[c] = batch_statistics && N ? T(dy / pixels / count) : T(0);
      mean_dy_xhat[c] = batch_statistics && N ? T(dy_xhat / pixels / count) : T(0);
    }
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                                            const Tensor& saved, bool batch_statistics, double eps) {
  Tensor g_x = torch::stable::empty_like(x);
  const Backward<T> b(grad, x, gamma, beta, saved, batch_statistics, eps);
  const Maps to = maps(OP, "x", g_x);
  b.call.sweep([&](int64_t n, T* rows) {
    b.call.kernel.norm_pool_backward(b.call.d, n, rows, b.upstream.get() + n * b.call.d.C, b.mean_dy.get(), b.mean_dy_xhat.get(), to);
  });
  return {g_x, b.g_gamma, b.g_beta};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> conv_forward(const Tensor& x, const Tensor& weight, int64_t stride, const OptionalTensor& gamma,
                                                const OptionalTensor& beta, const OptionalTensor& running_mean,
                                                const OptionalTensor& running_var, double eps) {
  Tensor z = empty({x.size(0), (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1, weight.size(0)}, scalar_type<T>);
  const Convolution<T> conv(x, weight, stride, z, false);
  auto [pooled, saved] = forward<T>(channels_first(z), &conv, gamma, beta, running_mean, running_var, eps);
  return {pooled, z, saved};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride, const Tensor& z,
                                                         const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& saved,
                                                         bool batch_statistics, double eps, bool needs_x, bool needs_weight) {
  std::vector<int64_t> none = {0};
  Tensor g_x = needs_x ? torch::stable::empty_like(x) : empty(none, scalar_type<T>);
  Tensor g_weight = needs_weight ? torch::stable::empty_like(weight) : empty(none, scalar_type<T>);
  torch::stable::zero_(g_weight);
  STD_TORCH_CHECK(z.scalar_type() == scalar_type<T> && z.is_contiguous() && z.dim() == 4 && z.size(0) == x.size(0) &&
                      z.size(1) == (x.size(2) - 1) / stride + 1 && z.size(2) == (x.size(3) - 1) / stride + 1 && z.size(3) == weight.size(0),
                  OP, ": expected the convolution's output as forward gave it");
  const Backward<T> b(grad, channels_first(z), gamma, beta, saved, batch_statistics, eps);
  if (!needs_x && !needs_weight) return {g_x, g_weight, b.g_gamma, b.g_beta};
  Convolution<T> conv(x, weight, stride, z, true);
  ConvPool<T>& d = conv.d;
  if (needs_x) d.dx = maps(OP, "x", g_x);
  d.center = b.call.d.center, d.inverse_std = b.call.d.inverse_std, d.scale = b.call.d.scale, d.shift = b.call.d.shift;
  const int64_t part = needs_weight ? conv.weights() : 0;
  Buffer<T> partial(conv.workers() * part);
  partial.fill(T(0), conv.workers() * part);
  conv.sweep([&](int64_t n, T* scratch, int64_t worker) {
    conv.kernel.conv_pool_backward(d, n, b.upstream.get() + n * d.K, b.mean_dy.get(), b.mean_dy_xhat.get(),
                                   needs_weight ? partial.get() + worker * part : nullptr, scratch);
  });
  for (int64_t t = 0; t < conv.workers() && needs_weight; t++)
    conv.kernel.conv_pool_weight_reduce(d, partial.get() + t * part, maps(OP, "weight", g_weight));
  return {g_x, g_weight, b.g_gamma, b.g_beta};
}

}  // namespace

std::tuple<Tensor, Tensor> norm_relu_pool_forward_cpu(Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean,
                                                      OptionalTensor running_var, double eps) {
  if (is_double(x)) return forward<double>(x, nullptr, gamma, beta, running_mean, running_var, eps);
  return forward<float>(x, nullptr, gamma, beta, running_mean, running_var, eps);
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward_cpu(Tensor grad, Tensor x, OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                                               bool batch_statistics, double eps) {
  return (is_double(x) ? backward<double> : backward<float>)(grad, x, gamma, beta, saved, batch_statistics, eps);
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool_forward_cpu(Tensor x, Tensor weight, int64_t stride, OptionalTensor gamma,
                                                                   OptionalTensor beta, OptionalTensor running_mean,
                                                                   OptionalTensor running_var, double eps) {
  check_conv(x, weight, stride);
  return (is_double(x) ? conv_forward<double> : conv_forward<float>)(x, weight, stride, gamma, beta, running_mean, running_var, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_relu_pool_backward_cpu(Tensor grad, Tensor x, Tensor weight, int64_t stride, Tensor z,
                                                                            OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                                                            bool batch_statistics, double eps, bool needs_x,
                                                                            bool needs_weight) {
  check_conv(x, weight, stride);
  auto run = is_double(x) ? conv_backward<double> : conv_backward<float>;
  return run(grad, x, weight, stride, z, gamma, beta, saved, batch_statistics, eps, needs_x, needs_weight);
}

}  // namespace infopro
