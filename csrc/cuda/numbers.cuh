// Numbers of any dtype to and from float32, four floats at a time, and a ReLU that passes nan.
#pragma once

#include "../kernels.h"
#include "launch.cuh"

namespace infopro::gpu {

__host__ DEVICE int round_up(int n, int to) { return (n + to - 1) / to * to; }
__host__ DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ DEVICE int smaller(int a, int b) { return a < b ? a : b; }
__host__ DEVICE int larger(int a, int b) { return a > b ? a : b; }

DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_as_bits(float x) { return __float_as_uint(x); }

DEVICE float from_bf16(uint16_t bits) { return bits_as_float(uint32_t(bits) << 16); }

DEVICE float from_f16(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return bits_as_float(sign | rest | 0x7f800000);  // infinities and nans
  // times 2^112, the difference of the exponents' biases
  return bits_as_float(sign | float_as_bits(bits_as_float(rest) * bits_as_float(0x77800000)));
}

// To nearest, ties to even.
DEVICE uint16_t to_bf16(float x) {
  uint32_t bits = float_as_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DEVICE uint16_t to_f16(float x) {
  uint32_t bits = float_as_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (rest < 0x38800000)                                   // subnormal: the adder rounds
    return uint16_t(sign | (float_as_bits(bits_as_float(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}

// Element `offset` of an array of float32, bfloat16 or float16. The branch is the same in every thread.
DEVICE float load(const void* data, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::f32) return __ldg(static_cast<const float*>(data) + offset);
  uint16_t bits = __ldg(static_cast<const uint16_t*>(data) + offset);
  return dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

DEVICE void store(void* data, Dtype dtype, int64_t offset, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[offset] = x;
  else
    static_cast<uint16_t*>(data)[offset] = dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x);
}

// Consecutive numbers of any dtype, or `missing` for each if data is null.
struct Numbers {
  const void* data;
  Dtype dtype;
  float missing;

  DEVICE float operator[](int64_t i) const { return data ? load(data, dtype, i) : missing; }
};

// Four floats in one transaction; `p` is 16-byte aligned.
DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEVICE void store4(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }

// max(x, 0); nan stays nan.
DEVICE float relu(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

}  // namespace infopro::gpu
