// One warp's product on tensor cores, D (16 x 8) += A (16 x 16) B (16 x 8), with float32 sums. Operands are
// bfloat16, float16, TF32, or float32 as three products of TF32 parts.
//
// A lane is 4 g + t. A *vector* is what it holds of one column of B or one row of A: four of the 16 elements
// of the contraction, one word in memory. The order of a contraction is free if both operands share it, so
// one plain load gives B's registers in order. A's registers interleave rows g and g + 8: a *matrix* is
// stored in that order once (weights), or read with ldmatrix.
//
// On the host (tests/cuda_host) the functions are warp collectives that follow the PTX ISA's layouts, "Matrix
// fragments for mma.m16n8k8" and ".m16n8k16".
#pragma once

#include "numbers.cuh"

namespace infopro::gpu {

#ifndef __CUDACC__
namespace host = cuda_host;
#endif

// ---- operands as 32-bit words ----

DEVICE uint32_t tf32(float x) {  // to nearest, ties away from zero
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = float_as_bits(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
#endif
}

DEVICE uint32_t pair_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return to_bf16(low) | uint32_t(to_bf16(high)) << 16;
#endif
}

DEVICE uint32_t pair_f16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return to_f16(low) | uint32_t(to_f16(high)) << 16;
#endif
}

// x = big + small, exactly: big is x as TF32. The instruction ignores the lower 13 bits of an operand, so
// `small` needs no rounding of its own. A nan stays in `small`.
DEVICE void split(uint32_t x, uint32_t& big, uint32_t& small) {
  big = (x + 0x1000) & ~0x1fffu;
  small = float_as_bits(bits_as_float(x) - bits_as_float(big));
}

DEVICE void split(uint4 x, uint4& big, uint4& small) {
  split(x.x, big.x, small.x), split(x.y, big.y, small.y);
  split(x.z, big.z, small.z), split(x.w, big.w, small.w);
}

// ---- the instructions ----

// The lane, opaque: otherwise the compiler keeps every address that follows from it over a whole kernel.
DEVICE int lane_of() {
  int lane = threadIdx.x % WARP;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

DEVICE int warp_of() {
  int warp = threadIdx.x / WARP;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(warp));
#endif
  return warp;
}

// D += A B with K = 16 numbers of 16 bits, or 8 of TF32. Word r of A holds row g + 8 (r % 2) at the places
// t + 4 (r / 2) of the contraction, word r of B column g at place t + 4 r; a place is two numbers of 16 bits.
// D[r] is row g + 8 (r / 2), column 2 t + r % 2.
#ifdef __CUDACC__
#define INFOPRO_MMA(name, shape)                                                                    \
  DEVICE void name(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {                              \
    asm("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"          \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                                \
  }
INFOPRO_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
INFOPRO_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
INFOPRO_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#else
template <class Products>
void emulate_mma(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1, Products products) {
  struct Given {
    uint32_t a[4], b[2];
  };
  const Given* all = host::device().gather(Given{{a.x, a.y, a.z, a.w}, {b0, b1}}, "mma");
  const int g = lane_of() / 4, t = lane_of() % 4;
  for (int r = 0; r < 4; r++) {
    const int row = g + r / 2 * 8, column = 2 * t + r % 2;
    double sum = d[r];
    for (int k = 0; k < 8; k++)
      sum += products(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2], all[column * 4 + k % 4].b[k / 4]);
    d[r] = float(sum);
  }
}
inline void mma_bf16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  emulate_mma(d, a, b0, b1, [](uint32_t x, uint32_t y) {
    return double(from_bf16(uint16_t(x))) * from_bf16(uint16_t(y)) +
           double(from_bf16(uint16_t(x >> 16))) * from_bf16(uint16_t(y >> 16));
  });
}
inline void mma_f16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  emulate_mma(d, a, b0, b1, [](uint32_t x, uint32_t y) {
    return double(from_f16(uint16_t(x))) * from_f16(uint16_t(y)) +
           double(from_f16(uint16_t(x >> 16))) * from_f16(uint16_t(y >> 16));
  });
}
inline void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  emulate_mma(d, a, b0, b1, [](uint32_t x, uint32_t y) {
    return double(bits_as_float(x & ~0x1fffu)) * bits_as_float(y & ~0x1fffu);
  });
}
#endif

// Four 8x8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8. Word m holds row g of
// matrix m, places 2 t and 2 t + 1; transposed, column g, rows 2 t and 2 t + 1.
template <bool TRANSPOSED> DEVICE uint4 load_matrices(const void* row) {
  uint4 r;
#ifdef __CUDA_ARCH__
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address) : "memory");
#elif !defined(__CUDACC__)
  const int g = lane_of() / 4, t = lane_of() % 4;
  const char* const* all = host::device().gather(static_cast<const char*>(row), "ldmatrix");
  host::device().count_conflicts(all, 16);
  auto number = [&](int matrix, int y, int x) {
    uint16_t bits;
    std::memcpy(&bits, all[8 * matrix + y] + 2 * x, 2);
    return uint32_t(bits);
  };
  auto word = [&](int m) {
    return TRANSPOSED ? number(m, 2 * t, g) | number(m, 2 * t + 1, g) << 16
                      : number(m, g, 2 * t) | number(m, g, 2 * t + 1) << 16;
  };
  r = {word(0), word(1), word(2), word(3)};
#endif
  return r;
}

// A word of shared memory that all lanes read or write together; the host counts bank conflicts.
template <class V> DEVICE V load_shared(const void* from) {
#ifndef __CUDACC__
  host::device().access(from, sizeof(V));
#endif
  return *static_cast<const V*>(from);
}
template <class V> DEVICE void store_shared(void* to, V value) {
#ifndef __CUDACC__
  host::device().access(to, sizeof(V));
#endif
  *static_cast<V*>(to) = value;
}

// A matrix in global memory, read here and not earlier: registers are dearer than a read from L1.
DEVICE uint4 load_now(const uint4* from) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
#else
  return *from;
#endif
}

DEVICE uint2 load_now(const uint2* from) {
#ifdef __CUDA_ARCH__
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
#else
  return *from;
#endif
}

// ---- operands ----

struct Bf16 {
  static DEVICE uint32_t pair(float low, float high) { return pair_bf16(low, high); }
  static DEVICE void mma(float (&d)[4], uint4 a, uint2 b) { mma_bf16(d, a, b.x, b.y); }
};
struct F16 {
  static DEVICE uint32_t pair(float low, float high) { return pair_f16(low, high); }
  static DEVICE void mma(float (&d)[4], uint4 a, uint2 b) { mma_f16(d, a, b.x, b.y); }
};
struct Tf32 {};
struct Float32 {};

// Vector: four numbers of a column. Pair: two. Matrix: a lane's part of A, of WORDS uint4.
template <class T> struct Operand {  // 16 bits
  static constexpr int BYTES = 2, WORDS = 1;
  using Vector = uint2;
  using Pair = uint32_t;
  struct Matrix {
    uint4 v[1];
  };
  static DEVICE Pair pair(float a, float b) { return T::pair(a, b); }
  static DEVICE Vector vector(float a, float b, float c, float d) { return {T::pair(a, b), T::pair(c, d)}; }
  static DEVICE Matrix matrix(Vector low, Vector high) { return {{{low.x, high.x, low.y, high.y}}}; }
  static DEVICE void product(float (&d)[4], const Matrix& a, Vector b) { T::mma(d, a.v[0], b); }
};

template <> struct Operand<Tf32> {
  static constexpr int BYTES = 4, WORDS = 2;
  using Vector = uint4;
  using Pair = uint2;
  struct Matrix {
    uint4 v[2];
  };
  static DEVICE Pair pair(float a, float b) { return {tf32(a), tf32(b)}; }
  static DEVICE Vector vector(float a, float b, float c, float d) { return {tf32(a), tf32(b), tf32(c),
      tf32(d)}; }
  static DEVICE Matrix registers(uint4 first, uint4 second) { return {{first, second}}; }
  static DEVICE Matrix matrix(Vector low, Vector high) {
    return registers({low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w});
  }
  static DEVICE void product(float (&d)[4], const Matrix& a, Vector b) {
    mma_tf32(d, a.v[0], b.x, b.y);
    mma_tf32(d, a.v[1], b.z, b.w);
  }
};

// Vectors are float32 as it is and are split at their product. small * small is left out: below 2^-22.
template <> struct Operand<Float32> {
  static constexpr int BYTES = 4, WORDS = 4;
  using Vector = uint4;
  using Pair = uint2;
  struct Matrix {
    uint4 v[4];  // big, big, small, small
  };
  static DEVICE Pair pair(float a, float b) { return {float_as_bits(a), float_as_bits(b)}; }
  static DEVICE Vector vector(float a, float b, float c, float d) {
    return {float_as_bits(a), float_as_bits(b), float_as_bits(c), float_as_bits(d)};
  }
  static DEVICE Matrix registers(uint4 first, uint4 second) {
    Matrix m;
    split(first, m.v[0], m.v[2]), split(second, m.v[1], m.v[3]);
    return m;
  }
  static DEVICE Matrix matrix(Vector low, Vector high) {
    return registers({low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w});
  }
  static DEVICE void product(float (&d)[4], const Matrix& a, Vector b) {
    uint4 big, small;
    split(b, big, small);
    mma_tf32(d, a.v[2], big.x, big.y);
    mma_tf32(d, a.v[3], big.z, big.w);
    mma_tf32(d, a.v[0], small.x, small.y);
    mma_tf32(d, a.v[1], small.z, small.w);
    mma_tf32(d, a.v[0], big.x, big.y);
    mma_tf32(d, a.v[1], big.z, big.w);
  }
};

template <class T> DEVICE typename Operand<T>::Matrix load_matrix(const void* from) {
  typename Operand<T>::Matrix m;
  const uint4* words = static_cast<const uint4*>(from);
  UNROLL_ALL for (int i = 0; i < Operand<T>::WORDS; i++) m.v[i] = load_now(words + i);
  return m;
}

}  // namespace infopro::gpu
