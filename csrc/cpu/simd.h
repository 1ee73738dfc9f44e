// Vectors of float or double, as wide as the instruction set that this file is compiled for.
//
// Only the isa_*.cpp files include it, after they set the target, the vector width and a namespace. It uses
// no library code, so the linker cannot pick code compiled for a newer processor for an older one.
#pragma once

#define INLINE inline __attribute__((always_inline))
#define INFOPRO_PRAGMA(text) _Pragma(#text)
#define UNROLL(n) INFOPRO_PRAGMA(GCC unroll n)

namespace infopro::INFOPRO_ISA {

template <class T> struct Simd;

template <> struct Simd<float> {
  typedef float type __attribute__((vector_size(INFOPRO_BYTES)));
  typedef int32_t mask __attribute__((vector_size(INFOPRO_BYTES)));
  static constexpr int width = INFOPRO_BYTES / 4;
  static constexpr int exponent_bias = 127, mantissa_bits = 23;
  static constexpr float lowest_exp = -87.0f, highest_exp = 88.3f, round_magic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float log2e = 1.44269504088896340736f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int exp_terms = 7, atanh_terms = 8;  // Taylor remainders below 2^-25 on the reduced ranges
};

template <> struct Simd<double> {
  typedef double type __attribute__((vector_size(INFOPRO_BYTES)));
  typedef int64_t mask __attribute__((vector_size(INFOPRO_BYTES)));
  static constexpr int width = INFOPRO_BYTES / 8;
  static constexpr int exponent_bias = 1023, mantissa_bits = 52;
  static constexpr double lowest_exp = -708.0, highest_exp = 709.0;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.44269504088896340736, ln2_high = 0.693145751953125,
                          ln2_low = 1.42860682030941723212e-6;
  static constexpr int exp_terms = 13, atanh_terms = 17;
};

template <class T> using vec = typename Simd<T>::type;

template <class T> INLINE vec<T> splat(T x) {
  return x - vec<T>{};  // x + 0 would lose the sign of -0
}

template <class T> INLINE vec<T> load(const T* p) {
  vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T> INLINE void store(T* p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

// Keep a vector in a register. The compiler might read it from memory again for every use.
template <class V> INLINE void hold(V& v) {
#if INFOPRO_BYTES == 64
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
}

// Load the first n < width elements; the others are zero.
template <class T> INLINE vec<T> load_first(const T* p, int n) {
  vec<T> v = {};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}

template <class T> INLINE void store_first(T* p, vec<T> v, int n) { for (int i = 0; i < n; i++) p[i] = v[i]; }

// f(index of a vector, how many of its elements count), over n elements.
template <class T, class F> INLINE void over(int64_t n, F f) {
  int64_t p = 0;
  for (; p + Simd<T>::width <= n; p += Simd<T>::width) f(p, Simd<T>::width);
  if (p < n) f(p, int(n - p));
}

template <class T> INLINE vec<T> load_some(const T* p, int n) {
  return n == Simd<T>::width ? load<T>(p) : load_first<T>(p, n);
}

template <class T> INLINE void store_some(T* p, vec<T> v, int n) {
  if (n == Simd<T>::width)
    store<T>(p, v);
  else
    store_first<T>(p, v, n);
}

template <class T> INLINE T sum(vec<T> v) {
  T lanes[Simd<T>::width];
  store<T>(lanes, v);
  for (int half = Simd<T>::width / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A stage of a transpose: swap the lanes of `a` whose number has bit `step` with the lanes of `b` whose
// number does not.
template <class T, int step> INLINE void swap_lanes(vec<T>& a, vec<T>& b) {
  constexpr int width = Simd<T>::width;
  typename Simd<T>::mask low, high;
  for (int i = 0; i < width; i++) {
    low[i] = i & step ? width + i - step : i;
    high[i] = i & step ? width + i : i + step;
  }
  vec<T> first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

template <class T, int step> INLINE void transpose_stage(vec<T>* r) {
  constexpr int width = Simd<T>::width;
  if constexpr (step < width) {
    UNROLL(16) for (int i = 0; i < width; i++)
      if (!(i & step)) swap_lanes<T, step>(r[i], r[i + step]);
    transpose_stage<T, step * 2>(r);
  }
}

template <class T, int step> INLINE void fold_stage(vec<T>* r) {
  constexpr int width = Simd<T>::width;
  if constexpr (step < width) {
    UNROLL(16) for (int i = 0; i < width; i += 2 * step) {
      swap_lanes<T, step>(r[i], r[i + step]);
      r[i] += r[i + step];
    }
    fold_stage<T, step * 2>(r);
  }
}

// Vector whose lane i is the sum of the lanes of r[i]. r is overwritten.
template <class T> INLINE vec<T> sums(vec<T>* r) {
  fold_stage<T, 1>(r);
  return r[0];
}

// to[j][i] = from[i][j], i and j < width; rows are from_row and to_row elements apart.
template <class T> INLINE void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int width = Simd<T>::width;
  vec<T> r[width];
  UNROLL(16) for (int i = 0; i < width; i++) r[i] = load<T>(from + i * from_row);
  transpose_stage<T, 1>(r);
  UNROLL(16) for (int i = 0; i < width; i++) store<T>(to + i * to_row, r[i]);
}

// to[j][i] = from[i][j], i < rows, j < columns.
template <class T>
INLINE void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  constexpr int width = Simd<T>::width;
  const int64_t whole_rows = rows / width * width, whole_columns = columns / width * width;
  for (int64_t i = 0; i < whole_rows; i += width)
    for (int64_t j = 0; j < whole_columns; j += width)
      transpose_block<T>(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
      to[j * to_row + i] = from[i * from_row + j];
}

// to[j][i] = from[i][j], i < R < width, j < columns; rows of `to` are R elements apart. A stored vector
// reaches into the next row, which is stored later.
template <int R, class T>
INLINE void transpose_panel(const T* from, int64_t from_row, int64_t columns, T* to) {
  constexpr int width = Simd<T>::width;
  int64_t j = 0;
  for (; j + width < columns; j += width) {
    vec<T> r[width];
    UNROLL(16) for (int i = 0; i < width; i++) r[i] = i < R ? load<T>(from + i * from_row + j) : vec<T>{};
    transpose_stage<T, 1>(r);
    UNROLL(16) for (int i = 0; i < width; i++) store<T>(to + (j + i) * R, r[i]);
  }
  for (; j < columns; j++)
    for (int i = 0; i < R; i++) to[j * R + i] = from[i * from_row + j];
}

constexpr double factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

// e^x to about 1 ulp: 2^n e^r with |r| <= ln 2 / 2. Any x below lowest_exp gives e^lowest_exp, about 1e-38 or
// 1e-308. nan stays nan.
template <class T> INLINE vec<T> exp(vec<T> x) {
  using S = Simd<T>;
  x = x < splat<T>(S::lowest_exp) ? splat<T>(S::lowest_exp) : x;
  x = x > splat<T>(S::highest_exp) ? splat<T>(S::highest_exp) : x;
  vec<T> shifted = x * S::log2e + S::round_magic;  // the integer nearest x log2 e, in the low mantissa bits
  vec<T> n = shifted - S::round_magic;
  vec<T> r = x - n * S::ln2_high;
  r = r - n * S::ln2_low;
  vec<T> p = splat<T>(T(1 / factorial(S::exp_terms)));
  UNROLL(16) for (int k = S::exp_terms - 1; k >= 0; k--) p = p * r + T(1 / factorial(k));
  typename S::mask bits = (typename S::mask)shifted << S::mantissa_bits;  // n in the exponent field
  return (vec<T>)((typename S::mask)p + bits);
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(s), s = e / (2 + e) <= 1/3.
template <class T> INLINE vec<T> log1p(vec<T> e) {
  vec<T> s = e / (e + T(2)), s2 = s * s;
  vec<T> p = splat<T>(T(1.0 / (2 * Simd<T>::atanh_terms + 1)));
  UNROLL(20) for (int k = Simd<T>::atanh_terms - 1; k >= 0; k--) p = p * s2 + T(1.0 / (2 * k + 1));
  return s * p * T(2);
}

// log x to about 1 ulp, for normal x > 0; inf and nan stay. x = 2^n m, m in [sqrt 1/2, sqrt 2), and
// log m = 2 atanh((m - 1) / (m + 1)).
template <class T> INLINE vec<T> log(vec<T> x) {
  using S = Simd<T>;
  using lanes = typename S::mask;
  lanes bits = (lanes)x, root = (lanes)splat<T>(T(0.70710678118654752440));
  lanes exponent = (bits - root) >> S::mantissa_bits;
  vec<T> m = (vec<T>)(bits - (exponent << S::mantissa_bits)), n = __builtin_convertvector(exponent, vec<T>);
  vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  vec<T> p = splat<T>(T(1.0 / (2 * S::atanh_terms + 1)));
  UNROLL(20) for (int k = S::atanh_terms - 1; k >= 0; k--) p = p * s2 + T(1.0 / (2 * k + 1));
  vec<T> value = n * S::ln2_high + (n * S::ln2_low + s * p * T(2));
  return x < splat<T>(T(__builtin_huge_val())) ? value : x;
}

template <class T> INLINE vec<T> abs(vec<T> x) { return x < T(0) ? -x : x; }

}  // namespace infopro::INFOPRO_ISA
