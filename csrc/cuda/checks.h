// What the files <op>.cu share: a device's limits, torch's current stream, parameters as plain pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../checks.h"
#include "numbers.cuh"

namespace infopro {

// Limits of a device, kept per thread: asking the driver takes microseconds.
inline const gpu::Device& device_facts(const char* op, int index) {
  constexpr int MOST_DEVICES = 64;
  static thread_local gpu::Device found[MOST_DEVICES] = {};
  CHECK(index >= 0 && index < MOST_DEVICES, op, ": expected one of ", MOST_DEVICES, " devices, got ", index);
  gpu::Device& d = found[index];
  if (d.multiprocessors == 0) {
    gpu::Device asked;
    cudaError_t error = cudaDeviceGetAttribute(&asked.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&asked.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&asked.shared_per_multiprocessor,
                                     cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    if (error != cudaSuccess) fail<std::runtime_error>(op, ": ", cudaGetErrorString(error));
    d = asked;
  }
  return d;
}

inline cudaStream_t current_stream(int index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor empty_like_on(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  CHECK(dtype_of(op, name, t) != Dtype::f64, op, ": ", name,
        ": expected float32, bfloat16 or float16, got float64");
}

// A parameter, contiguous and kept alive, or `missing` for each number if there is no tensor.
struct Parameter {
  std::optional<Tensor> kept;
  gpu::Numbers numbers;

  Parameter(const char* op, const char* name, const OptionalTensor& t, int64_t n, float missing)
      : numbers({nullptr, Dtype::f32, missing}) {
    if (!t) return;
    check_dtype(op, name, *t);
    CHECK(t->numel() == n, op, ": ", name, ": expected ", n, " numbers, got ", t->numel());
    kept = torch::stable::contiguous(*t);
    numbers.data = n > 0 ? kept->const_data_ptr() : nullptr;
    numbers.dtype = dtype_of(op, name, *kept);
  }
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) fail<std::runtime_error>(op, ": ", cudaGetErrorString(error));
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace infopro
