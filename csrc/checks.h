// What the files cpu/<op>.cpp share: tensors as plain pointers, scratch memory, work shared out among threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace infopro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, op, ": ", name, ": expected float32, float64, bfloat16 or float16");
  }
}

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
inline bool is_double(const OptionalTensor& t) { return t && is_double(*t); }

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) { return torch::stable::empty(shape, dtype); }

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Matrix matrix(const char* op, const char* name, const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(op, name, t), t.stride(0), t.stride(1)};
}

inline Maps maps(const char* op, const char* name, const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, name, t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Memory that lives as long as the object; 64-byte aligned, not set to anything. Not a tensor: to make one, through the dispatcher, takes
// microseconds, which a call that needs twenty of them would notice.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(size_t(n > 0 ? n : 1) * sizeof(T), ALIGNMENT))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  void fill(T value, int64_t n) const {
    for (int64_t i = 0; i < n; i++) data_.get()[i] = value;
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, ALIGNMENT); }
  };
  std::unique_ptr<T, Free> data_;
};

// The tensor itself where it is contiguous, which asking is quicker than torch's own answer through the dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Labels of any integer dtype as a row of int64.
inline Tensor wide_labels(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long));
}

// The numbers of a tensor of any floating dtype and any shape whose elements are in order, as T; `missing` n times where
// there is no tensor.
template <class T>
Buffer<T> numbers(const char* op, const char* name, const OptionalTensor& t, int64_t n, T missing) {
  Buffer<T> to(n);
  if (t) {
    Tensor flat = as_contiguous(*t);
    STD_TORCH_CHECK(flat.numel() == n, op, ": ", name, ": expected ", n, " numbers, got ", flat.numel());
    kernels<T>().read_row(to.get(), flat.const_data_ptr(), dtype_of(op, name, flat), 0, 1, n);
  } else {
    to.fill(missing, n);
  }
  return to;
}

inline int64_t threads() { return int64_t(torch::stable::get_num_threads()); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(first, last, worker): items [0, n) in `workers` equal shares, so that a result depends on the number of threads alone.
template <class F>
void share(int64_t n, int64_t workers, const F& work) {
  if (n <= 0) return;
  workers = workers < 1 ? 1 : workers > n ? n : workers;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) work(worker * n / workers, (worker + 1) * n / workers, worker);
  });
}

// Mean and biased variance of a channel from those of the samples (Chan, Golub & LeVeque 1983), in float64.
template <class T>
inline void merge_statistics(int64_t N, int64_t K, double pixels, const double* mean, const double* squares, T* batch_mean, T* batch_var) {
  for (int64_t k = 0; k < K; k++) {
    double center = 0, total = 0;
    for (int64_t n = 0; n < N; n++) center += mean[n * K + k];
    center /= double(N);
    for (int64_t n = 0; n < N; n++) total += squares[n * K + k] + pixels * (mean[n * K + k] - center) * (mean[n * K + k] - center);
    batch_mean[k] = T(center);
    batch_var[k] = T(total / (pixels * double(N)));
  }
}

}  // namespace infopro
