// norm_relu_pool on the CPU: two sweeps over the samples forward (one in eval mode), one backward.
#include <algorithm>
#include <cmath>

#include "ops_cpu.h"

namespace infopro {
namespace {

constexpr const char* OP = "norm_relu_pool";

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

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, double eps) {
  const int64_t N = x.size(0), C = x.size(1);
  Tensor result = empty({N, C}, scalar_type<T>), saved = empty({2 * C + 2 * N * C}, scalar_type<T>);
  T *pooled = pointer<T>(result), *mean = pointer<T>(saved), *var = mean + C, *positive = var + C, *positive_xhat = positive + N * C;
  std::fill(mean, mean + 2 * C, T(0));
  if (N == 0) return {result, saved};
  Call<T> call(x, gamma, beta);
  const NormPool<T>& d = call.d;
  if (running_mean) {
    Buffer<T> m = numbers<T>(OP, "running_mean", running_mean, C, T(0)), v = numbers<T>(OP, "running_var", running_var, C, T(1));
    std::copy(m.get(), m.get() + C, mean);
    std::copy(v.get(), v.get() + C, var);
  } else {
    Buffer<double> means(N * C), squares(N * C);
    call.sweep([&](int64_t n, T* rows) { call.kernel.norm_pool_statistics(d, n, rows, &means[n * C], &squares[n * C]); });
    merge_statistics<T>(N, C, double(d.h) * double(d.w), means.get(), squares.get(), mean, var);
  }
  call.set_statistics(mean, var, eps);
  call.sweep([&](int64_t n, T* rows) { call.kernel.norm_pool_forward(d, n, rows, pooled + n * C, positive + n * C, positive_xhat + n * C); });
  return {result, saved};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                                            const Tensor& saved, bool batch_statistics, double eps) {
  const int64_t N = x.size(0), C = x.size(1);
  Tensor g_x = torch::stable::empty_like(x), g_gamma = empty({C}, scalar_type<T>), g_beta = empty({C}, scalar_type<T>);
  T *d_gamma = pointer<T>(g_gamma), *d_beta = pointer<T>(g_beta);
  std::fill(d_gamma, d_gamma + C, T(0));
  std::fill(d_beta, d_beta + C, T(0));
  if (N == 0) return {g_x, g_gamma, g_beta};
  Call<T> call(x, gamma, beta);
  const NormPool<T>& d = call.d;
  const T *mean = pointer<T>(saved), *var = mean + C, *positive = var + C, *positive_xhat = positive + N * C;
  call.set_statistics(mean, var, eps);
  Buffer<T> upstream = numbers<T>(OP, "grad", grad, N * C, T(0)), mean_dy(C), mean_dy_xhat(C);
  const double pixels = double(d.h) * double(d.w), count = pixels * double(N);
  for (int64_t c = 0; c < C; c++) {
    double dy = 0, dy_xhat = 0;
    for (int64_t n = 0; n < N; n++) {
      dy += double(upstream[n * C + c]) * double(positive[n * C + c]);
      dy_xhat += double(upstream[n * C + c]) * double(positive_xhat[n * C + c]);
    }
    d_beta[c] = T(dy / pixels);
    d_gamma[c] = T(dy_xhat / pixels);
    mean_dy[c] = batch_statistics ? T(dy / pixels / count) : T(0);
    mean_dy_xhat[c] = batch_statistics ? T(dy_xhat / pixels / count) : T(0);
  }
  const Maps to = maps(OP, "x", g_x);
  call.sweep([&](int64_t n, T* rows) {
    call.kernel.norm_pool_backward(d, n, rows, upstream.get() + n * C, mean_dy.get(), mean_dy_xhat.get(), to);
  });
  return {g_x, g_gamma, g_beta};
}

}  // namespace

std::tuple<Tensor, Tensor> norm_relu_pool_forward_cpu(Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean,
                                                      OptionalTensor running_var, double eps) {
  return (is_double(x) ? forward<double> : forward<float>)(x, gamma, beta, running_mean, running_var, eps);
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward_cpu(Tensor grad, Tensor x, OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                                               bool batch_statistics, double eps) {
  return (is_double(x) ? backward<double> : backward<float>)(grad, x, gamma, beta, saved, batch_statistics, eps);
}

}  // namespace infopro
