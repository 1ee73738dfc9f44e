// norm_relu_pool on the CPU: two sweeps over the samples in forward (one in eval mode), one in backward.
//
// A convolution in front is part of the first sweep, in eval mode too, and of the last. Its output is written
// once, the gradient in it never.
#include "../checks.h"

namespace infopro {
namespace {

constexpr const char* OP = "norm_relu_pool";

void check_conv(const Tensor& x, const Tensor& weight, int64_t stride) {
  const ScalarType dtype = x.scalar_type();
  CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && weight.scalar_type() == dtype, OP,
        ": expected x and weight of one dtype, float32 or float64");
  CHECK((stride == 1 || stride == 2) && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
            weight.size(3) == 3,
        OP, ": expected a weight (K, ", x.size(1), ", 3, 3) and a stride of 1 or 2");
}

// The NormPool of one call, for maps (N, C, h, w), and the memory behind its pointers.
template <class T> struct Call {
  const Kernels<T>& kernel = kernels<T>();
  NormPool<T> d = {};
  NormCoefficients<T> norm;

  Call(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta)
      : norm(OP, gamma, beta, x.size(1)) {
    d.N = x.size(0), d.C = x.size(1), d.h = x.size(2), d.w = x.size(3);
    d.x = maps(OP, "x", x);
    norm.give_to(d);
  }

  // work(sample, a thread's (C, pixels), worker) for every sample
  template <class F>
  void for_samples(const F& work) const {
    sweep<T>(d.N, d.C * kernel.norm_pool_row(d.h * d.w) + 8 * kernel.width, false, work);
  }
};

// The ConvPool of a convolution in front, and the memory behind its pointers.
template <class T> struct Convolution {
  const Kernels<T>& kernel = kernels<T>();
  ConvPool<T> d;
  Buffer<T> packed;

  // z: (N, H, W, K), contiguous. backward: pack the weights for backward
  Convolution(const Tensor& x, const Tensor& weight, int64_t stride, const Tensor& z, bool backward)
      : d(shape(x, stride, z)), packed(weights(), T(0)) {
    T* to = packed.get();
    kernel.conv_pool_pack(d, maps(OP, "weight", weight), backward ? nullptr : to, backward ? to : nullptr);
    d.weight = to;
  }

  static ConvPool<T> shape(const Tensor& x, int64_t stride, const Tensor& z) {
    ConvPool<T> d = {};
    d.N = x.size(0), d.C = x.size(1), d.K = z.size(3), d.h = x.size(2), d.w = x.size(3), d.H = z.size(1);
    d.W = z.size(2), d.stride = stride, d.x = maps(OP, "x", x), d.z = pointer<T>(z);
    return d;
  }

  int64_t weights() const { return kernel.conv_pool_weights(d); }

  // work(sample, scratch, worker) for every sample
  template <class F>
  void for_samples(const F& work) const { sweep<T>(d.N, kernel.conv_pool_scratch(d), true, work); }
};

// x: the maps that are normalised; conv: the convolution that makes them first, or null.
template <class T> Tensors2 forward(const Tensor& x, const Convolution<T>* conv, const OptionalTensor& gamma,
                 const OptionalTensor& beta, const OptionalTensor& running_mean,
                 const OptionalTensor& running_var, double eps) {
  const int64_t N = x.size(0), C = x.size(1);
  Tensor result = empty({N, C}, scalar_type<T>), saved = empty({2 * C + 2 * N * C}, scalar_type<T>);
  T *pooled = pointer<T>(result), *mean = pointer<T>(saved), *var = mean + C, *positive = var + C;
  T* positive_xhat = positive + N * C;
  std::fill(mean, mean + 2 * C, T(0));
  if (N == 0) return {result, saved};
  Call<T> call(x, gamma, beta);
  const NormPool<T>& d = call.d;
  Buffer<double> means(N * C), squares(N * C);
  if (conv)
    conv->for_samples([&](int64_t n, T* scratch, int64_t) {
      double* mean = running_mean ? nullptr : &means[n * C];
      conv->kernel.conv_pool_forward(conv->d, n, scratch, mean, &squares[n * C]);
    });
  else if (!running_mean)
    call.for_samples([&](int64_t n, T* rows, int64_t) {
      call.kernel.norm_pool_statistics(d, n, rows, &means[n * C], &squares[n * C]);
    });
  if (running_mean) {
    read_numbers(OP, "running_mean", running_mean, C, T(0), mean);
    read_numbers(OP, "running_var", running_var, C, T(1), var);
  } else {
    merge_statistics<T>(N, C, double(d.h) * double(d.w), means.get(), squares.get(), mean, var);
  }
  call.norm.set(mean, var, eps, C);
  call.for_samples([&](int64_t n, T* rows, int64_t) {
    call.kernel.norm_pool_forward(d, n, rows, pooled + n * C, positive + n * C, positive_xhat + n * C);
  });
  return {result, saved};
}

// (N, H, W, C) as maps (N, C, H, W).
Tensor channels_first(const Tensor& pixels) {
  return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

// What the sweep of backward needs, and the gradients of gamma and beta.
template <class T> struct Backward {
  Call<T> call;
  Tensor g_gamma, g_beta;
  Buffer<T> upstream, mean_dy, mean_dy_xhat;

  Backward(const Tensor& grad, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
           const Tensor& saved, bool batch_statistics, double eps)
      : call(x, gamma, beta), g_gamma(empty({call.d.C}, scalar_type<T>)),
        g_beta(empty({call.d.C}, scalar_type<T>)),
        upstream(numbers<T>(OP, "grad", grad, call.d.N * call.d.C, T(0))), mean_dy(call.d.C),
        mean_dy_xhat(call.d.C) {
    const int64_t N = call.d.N, C = call.d.C;
    T *d_gamma = pointer<T>(g_gamma), *d_beta = pointer<T>(g_beta);
    const T *mean = pointer<T>(saved), *var = mean + C, *positive = var + C,
            *positive_xhat = positive + N * C;
    call.norm.set(mean, var, eps, C);
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

template <class T> Tensors3 backward(const Tensor& grad, const Tensor& x, const OptionalTensor& gamma,
                  const OptionalTensor& beta, const Tensor& saved, bool batch_statistics, double eps) {
  Tensor g_x = torch::stable::empty_like(x);
  const Backward<T> b(grad, x, gamma, beta, saved, batch_statistics, eps);
  const Maps to = maps(OP, "x", g_x);
  b.call.for_samples([&](int64_t n, T* rows, int64_t) {
    b.call.kernel.norm_pool_backward(b.call.d, n, rows, b.upstream.get() + n * b.call.d.C, b.mean_dy.get(),
                                     b.mean_dy_xhat.get(), to);
  });
  return {g_x, b.g_gamma, b.g_beta};
}

template <class T>
Tensors3 conv_forward(const Tensor& x, const Tensor& weight, int64_t stride, const OptionalTensor& gamma,
                      const OptionalTensor& beta, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, double eps) {
  Tensor z = empty({x.size(0), (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1, weight.size(0)},
                   scalar_type<T>);
  const Convolution<T> conv(x, weight, stride, z, false);
  auto [pooled, saved] = forward<T>(channels_first(z), &conv, gamma, beta, running_mean, running_var, eps);
  return {pooled, z, saved};
}

template <class T>
Tensors4 conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride,
                       const Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta,
                       const Tensor& saved, bool batch_statistics, double eps, bool needs_x,
                       bool needs_weight) {
  std::vector<int64_t> none = {0};
  Tensor g_x = needs_x ? torch::stable::empty_like(x) : empty(none, scalar_type<T>);
  Tensor g_weight = needs_weight ? torch::stable::empty_like(weight) : empty(none, scalar_type<T>);
  torch::stable::zero_(g_weight);
  CHECK(z.scalar_type() == scalar_type<T> && z.is_contiguous() && z.dim() == 4 && z.size(0) == x.size(0) &&
            z.size(1) == (x.size(2) - 1) / stride + 1 && z.size(2) == (x.size(3) - 1) / stride + 1 &&
            z.size(3) == weight.size(0),
        OP, ": expected the convolution's output as forward gave it");
  const Backward<T> b(grad, channels_first(z), gamma, beta, saved, batch_statistics, eps);
  if (!needs_x && !needs_weight) return {g_x, g_weight, b.g_gamma, b.g_beta};
  Convolution<T> conv(x, weight, stride, z, true);
  ConvPool<T>& d = conv.d;
  if (needs_x) d.dx = maps(OP, "x", g_x);
  b.call.norm.give_to(d);
  const int64_t part = needs_weight ? conv.weights() : 0, workers = threads_for(d.N);
  Buffer<T> partial(workers * part, T(0));
  conv.for_samples([&](int64_t n, T* scratch, int64_t worker) {
    conv.kernel.conv_pool_backward(d, n, b.upstream.get() + n * d.K, b.mean_dy.get(), b.mean_dy_xhat.get(),
                                   needs_weight ? partial.get() + worker * part : nullptr, scratch);
  });
  for (int64_t t = 0; t < workers && needs_weight; t++)
    conv.kernel.conv_pool_weight_reduce(d, partial.get() + t * part, maps(OP, "weight", g_weight));
  return {g_x, g_weight, b.g_gamma, b.g_beta};
}

Tensors2 norm_relu_pool_forward(Tensor x, OptionalTensor gamma, OptionalTensor beta,
                                OptionalTensor running_mean, OptionalTensor running_var, double eps) {
  if (is_double(x)) return forward<double>(x, nullptr, gamma, beta, running_mean, running_var, eps);
  return forward<float>(x, nullptr, gamma, beta, running_mean, running_var, eps);
}

Tensors3 norm_relu_pool_backward(Tensor grad, Tensor x, OptionalTensor gamma, OptionalTensor beta,
                                 Tensor saved, bool batch_statistics, double eps) {
  return (is_double(x) ? backward<double> : backward<float>)(grad, x, gamma, beta, saved, batch_statistics,
                                                             eps);
}

Tensors3 conv_norm_relu_pool_forward(Tensor x, Tensor weight, int64_t stride, OptionalTensor gamma,
                                     OptionalTensor beta, OptionalTensor running_mean,
                                     OptionalTensor running_var, double eps) {
  check_conv(x, weight, stride);
  return (is_double(x) ? conv_forward<double> : conv_forward<float>)(x, weight, stride, gamma, beta,
                                                                     running_mean, running_var, eps);
}

Tensors4 conv_norm_relu_pool_backward(Tensor grad, Tensor x, Tensor weight, int64_t stride, Tensor z,
                                      OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                      bool batch_statistics, double eps, bool needs_x, bool needs_weight) {
  check_conv(x, weight, stride);
  auto run = is_double(x) ? conv_backward<double> : conv_backward<float>;
  return run(grad, x, weight, stride, z, gamma, beta, saved, batch_statistics, eps, needs_x, needs_weight);
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("norm_relu_pool_forward", TORCH_BOX(&infopro::norm_relu_pool_forward));
  m.impl("norm_relu_pool_backward", TORCH_BOX(&infopro::norm_relu_pool_backward));
  m.impl("conv_norm_relu_pool_forward", TORCH_BOX(&infopro::conv_norm_relu_pool_forward));
  m.impl("conv_norm_relu_pool_backward", TORCH_BOX(&infopro::conv_norm_relu_pool_backward));
}
