// Numbers of any floating dtype to and from the arithmetic type.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace infopro::INFOPRO_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T> INLINE T widen(float x) { return T(x); }

template <class T> INLINE T widen(double x) { return T(x); }

template <class T> INLINE T widen(bf16 x) { return T(as_float(uint32_t(x.bits) << 16)); }

template <class T> INLINE T widen(f16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  float finite = as_float(rest) * as_float(0x77800000);  // 2^112: the difference of the exponents' biases
  uint32_t bits = rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(finite);  // infinities and nans
  return T(as_float(sign | bits));
}

template <class S> struct Narrow;

template <> struct Narrow<float> {
  template <class T>
  static INLINE float from(T x) { return float(x); }
};

template <> struct Narrow<double> {
  template <class T>
  static INLINE double from(T x) { return double(x); }
};

template <> struct Narrow<bf16> {  // to nearest, ties to even
  template <class T>
  static INLINE bf16 from(T x) {
    uint32_t bits = as_bits(float(x));
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};

template <> struct Narrow<f16> {  // to nearest, ties to even
  template <class T>
  static INLINE f16 from(T x) {
    uint32_t bits = as_bits(float(x)), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
    if (rest < 0x38800000)                                     // subnormal: the adder rounds
      return {uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
  }
};

template <class T, class S> INLINE void read_strided(T* to, const S* from, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) to[i] = widen<T>(from[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i] = widen<T>(from[i * stride]);
}

template <class T, class S> INLINE void write_strided(S* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) to[i] = Narrow<S>::from(from[i]);
  else
    for (int64_t i = 0; i < n; i++) to[i * stride] = Narrow<S>::from(from[i]);
}

INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// f(data as a pointer to its dtype)
template <class F> INLINE void typed(const void* data, Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f((float*)data);
    case Dtype::f64: return f((double*)data);
    case Dtype::bf16: return f((bf16*)data);
    case Dtype::f16: return f((f16*)data);
  }
}

// to[0..n) = elements offset, offset + stride, ... of an array of any dtype
template <class T>
void read_row(T* to, const void* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n) {
  typed(from, dtype, [&](auto* data) { read_strided(to, data + offset, stride, n); });
}

template <class T>
void write_row(void* to, const T* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n) {
  typed(to, dtype, [&](auto* data) { write_strided(data + offset, from, stride, n); });
}

}  // namespace infopro::INFOPRO_ISA
