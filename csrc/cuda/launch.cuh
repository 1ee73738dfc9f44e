// The few CUDA features that kernels and launchers use: the tests compile the same .cuh files with g++ and
// their own header in place of the CUDA runtime (tests/cuda_host).
#pragma once

#define DEVICE __device__ __forceinline__
#define INFOPRO_PRAGMA(text) _Pragma(#text)
#define UNROLL_ALL INFOPRO_PRAGMA(unroll)
#define UNROLL(n) INFOPRO_PRAGMA(unroll n)

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <cstdint>

#define INFOPRO_DYNAMIC_SHARED(name) extern __shared__ float4 name[]

namespace infopro::gpu {

using Stream = cudaStream_t;
using Error = cudaError_t;
constexpr Error success = cudaSuccess;

// kernel<<<grid, threads, shared bytes, stream>>>(arguments). Beyond 48 KB a kernel has to ask for its shared
// memory. It also asks for all that a multiprocessor has: otherwise the driver may give so much of it to the
// L1 cache that a second block does not fit.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int grid, int threads, int shared, Stream stream,
             const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    Error error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == success)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    if (error != success) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

// Hands out parts of the workspace; with a null start it only counts their bytes.
class Workspace {
 public:
  explicit Workspace(void* start) : start_(static_cast<char*>(start)) {}

  template <class T>
  T* take(int64_t n) {
    T* part = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
    used_ += (n * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }

  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

}  // namespace infopro::gpu
#endif

namespace infopro::gpu {

// What a plan depends on. Shared memory is in bytes: the most for a block, and all of a multiprocessor.
struct Device {
  int multiprocessors, shared_per_block, shared_per_multiprocessor;
};

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

}  // namespace infopro::gpu
