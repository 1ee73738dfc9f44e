// What the ops share: errors, tensors as plain pointers, buffers, batch norm's coefficients, work for the
// threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace infopro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Doubles = std::vector<double>;
using Tensors2 = std::tuple<Tensor, Tensor>;  // what an op returns
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Throw the parts as one message, which reaches Python as a ValueError, or as the RuntimeError of `Error`.
template <class Error = std::invalid_argument, class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// STD_TORCH_CHECK would put a function, a file and a line in front of the message.
#define CHECK(condition, ...) \
  if (!(condition)) ::infopro::fail(__VA_ARGS__)

inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: fail(op, ": ", name, ": expected float32, float64, bfloat16 or float16");
  }
}

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
inline bool is_double(const OptionalTensor& t) { return t && is_double(*t); }

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

template <class T> T* pointer(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline Matrix matrix(const char* op, const char* name, const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(op, name, t), t.stride(0), t.stride(1)};
}

inline Maps maps(const char* op, const char* name, const Tensor& t) {
  void* data = const_cast<void*>(t.const_data_ptr());
  return {data, dtype_of(op, name, t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Memory that lives as long as the object, 64-byte aligned and uninitialised. A tensor would take
// microseconds of the dispatcher's time, which shows in a call that needs twenty buffers.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(::operator new(size_t(n > 0 ? n : 1) * sizeof(T), ALIGNMENT))) {}
  Buffer(int64_t n, T value) : Buffer(n) { std::fill(get(), get() + n, value); }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, ALIGNMENT); }
  };
  std::unique_ptr<T, Free> data_;
};

// The tensor itself if it is contiguous: asking is quicker than torch::stable::contiguous through the
// dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Labels of any integer dtype as a row of int64.
inline Tensor wide_labels(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long));
}

// to[0..n) = the numbers of a tensor of any floating dtype, in order, as T; `missing` if there is no tensor.
template <class T>
void read_numbers(const char* op, const char* name, const OptionalTensor& t, int64_t n, T missing, T* to) {
  if (!t) return std::fill(to, to + n, missing);
  Tensor flat = as_contiguous(*t);
  CHECK(flat.numel() == n, op, ": ", name, ": expected ", n, " numbers, got ", flat.numel());
  kernels<T>().read_row(to, flat.const_data_ptr(), dtype_of(op, name, flat), 0, 1, n);
}

template <class T>
Buffer<T> numbers(const char* op, const char* name, const OptionalTensor& t, int64_t n, T missing) {
  Buffer<T> to(n);
  read_numbers(op, name, t, n, missing, to.get());
  return to;
}

// Batch norm of C channels, as kernels read it: (x - center) scale + shift.
template <class T> struct NormCoefficients {
  Buffer<T> gamma, shift, center, inverse_std, scale;

  NormCoefficients(const char* op, const OptionalTensor& gamma_, const OptionalTensor& beta, int64_t C)
      : gamma(numbers<T>(op, "gamma", gamma_, C, T(1))), shift(numbers<T>(op, "beta", beta, C, T(0))),
        center(C), inverse_std(C), scale(C) {}

  void set(const T* mean, const T* var, double eps, int64_t C) {
    for (int64_t c = 0; c < C; c++) {
      center[c] = mean[c];
      inverse_std[c] = T(1.0 / std::sqrt(double(var[c]) + eps));
      scale[c] = gamma[c] * inverse_std[c];
    }
  }

  // Make d's pointers point at them.
  template <class D>
  void give_to(D& d) const {
    d.center = center.get(), d.inverse_std = inverse_std.get(), d.scale = scale.get(), d.shift = shift.get();
  }
};

// The loss of the pixels of an image. restore: three means and three standard deviations, or empty.
template <class T>
void set_image(PixelLoss<T>& d, const char* op, const Tensor& image, const Doubles& restore, int64_t loss) {
  d.image = maps(op, "image", image);
  d.restore = restore.size() == 6;
  for (int i = 0; i < 3 && d.restore; i++) {
    d.image_mean[i] = T(restore[i]);
    d.image_std[i] = T(restore[3 + i]);
  }
  d.pixel = Pixel(int(loss));
  d.pixel_weight = T(1.0 / (3.0 * double(image.size(0)) * double(image.size(2)) * double(image.size(3))));
}

// Throw if the image is what made the loss nan: numbers outside [0, 1]. Numbers that are nan pass.
template <class T> void refuse_image(const PixelLoss<T>& d, const Tensor& image) {
  const int64_t N = image.size(0), H = image.size(2), W = image.size(3);
  Buffer<T> row(W);
  T least = std::numeric_limits<T>::infinity(), most = -least;
  for (int64_t i = 0; i < N * 3 * H; i++) {
    const int64_t o = i / H % 3, at = i / (3 * H) * d.image.n + o * d.image.c + i % H * d.image.y;
    kernels<T>().read_row(row.get(), d.image.data, d.image.dtype, at, d.image.x, W);
    for (int64_t x = 0; x < W; x++) {
      const T value = d.restore ? row[x] * d.image_std[o] + d.image_mean[o] : row[x];
      least = value < least ? value : least, most = value > most ? value : most;
    }
  }
  const double slack = d.restore ? RESTORED_SLACK : IMAGE_SLACK;
  CHECK(least >= -slack && most <= 1 + slack, "reconstruction_loss: image",
        d.restore ? " * image_std + image_mean" : "", ": expected numbers in [0, 1], got ", least, " to ",
        most, d.restore ? "" : ": pass image_mean and image_std for a normalised image");
}

inline int64_t threads() { return int64_t(torch::stable::get_num_threads()); }
inline int64_t threads_for(int64_t items) { return std::min(threads(), items); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(first, last, worker): items [0, n) in `workers` equal shares, so that a result depends on the number
// of threads alone.
template <class F> void share(int64_t n, int64_t workers, const F& work) {
  if (n <= 0) return;
  workers = workers < 1 ? 1 : workers > n ? n : workers;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++)
      work(worker * n / workers, (worker + 1) * n / workers, worker);
  });
}

// work(item, scratch, worker) for items [0, n). Each of threads_for(n) workers has `size` numbers of scratch,
// which start as zeros if `clear`.
template <class T, class F> void sweep(int64_t n, int64_t size, bool clear, const F& work) {
  const int64_t workers = threads_for(n);
  Buffer<T> scratch(workers * size);
  share(n, workers, [&](int64_t first, int64_t last, int64_t worker) {
    T* mine = scratch.get() + worker * size;
    if (clear) std::fill(mine, mine + size, T(0));
    for (int64_t i = first; i < last; i++) work(i, mine, worker);
  });
}

// Mean and biased variance of a channel from those of the samples (Chan, Golub & LeVeque 1983), in float64.
template <class T>
void merge_statistics(int64_t N, int64_t K, double pixels, const double* mean, const double* squares,
                      T* batch_mean, T* batch_var) {
  for (int64_t k = 0; k < K; k++) {
    double center = 0, total = 0;
    for (int64_t n = 0; n < N; n++) center += mean[n * K + k];
    center /= double(N);
    for (int64_t n = 0; n < N; n++)
      total += squares[n * K + k] + pixels * (mean[n * K + k] - center) * (mean[n * K + k] - center);
    batch_mean[k] = T(center);
    batch_var[k] = T(total / (pixels * double(N)));
  }
}

}  // namespace infopro
