// The instruction set whose kernels run: the best one that the processor has, or a lower one that a test asks
// for.
#include "../checks.h"

namespace infopro {

#define INFOPRO_DECLARE(isa)                \
  namespace isa {                           \
  extern const Kernels<float> table_f32;    \
  extern const Kernels<double> table_f64;   \
  }
INFOPRO_DECLARE(baseline)
INFOPRO_DECLARE(avx2)
INFOPRO_DECLARE(avx512)

static int best_isa() {
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512cd");
  return v4 ? 2 : v3 ? 1 : 0;
}

static int isa_in_force = best_isa();

template <> const Kernels<float>& kernels<float>() {
  return isa_in_force == 2 ? avx512::table_f32 : isa_in_force == 1 ? avx2::table_f32 : baseline::table_f32;
}

template <> const Kernels<double>& kernels<double>() {
  return isa_in_force == 2 ? avx512::table_f64 : isa_in_force == 1 ? avx2::table_f64 : baseline::table_f64;
}

// Use at most this instruction set from now on: 0 baseline, 1 AVX2, 2 AVX-512; -1 changes nothing. Return the
// one in force.
int64_t isa(int64_t level) {
  CHECK(level >= -1 && level <= 2, "_isa: level: expected -1, 0, 1 or 2, got ", level);
  if (level >= 0) isa_in_force = int(level) < best_isa() ? int(level) : best_isa();
  return isa_in_force;
}

}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&infopro::isa));
}
