// The table of contents of the CPU kernels: every operator and what implements it. The schemas are defined in Python
// (infopro_fast/ops/<op>.py), so that they exist where there is no compiled kernel.
#include "../checks.h"
#include "ops.h"

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
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  return v4 ? 2 : v3 ? 1 : 0;
}

static int isa_in_force = best_isa();

template <>
const Kernels<float>& kernels<float>() {
  return isa_in_force == 2 ? avx512::table_f32 : isa_in_force == 1 ? avx2::table_f32 : baseline::table_f32;
}

template <>
const Kernels<double>& kernels<double>() {
  return isa_in_force == 2 ? avx512::table_f64 : isa_in_force == 1 ? avx2::table_f64 : baseline::table_f64;
}

// For tests: run with at most this instruction set (0 baseline, 1 AVX2, 2 AVX-512) from now on, -1 to change nothing.
// Returns the one in force.
int64_t isa(int64_t level) {
  STD_TORCH_CHECK(level >= -1 && level <= 2, "_isa: level: expected -1, 0, 1 or 2, got ", level);
  if (level >= 0) isa_in_force = int(level) < best_isa() ? int(level) : best_isa();
  return isa_in_force;
}

}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CPU, m) {
  m.impl("reconstruction_loss_forward", TORCH_BOX(&infopro::reconstruction_loss_forward_cpu));
  m.impl("reconstruction_loss_backward", TORCH_BOX(&infopro::reconstruction_loss_backward_cpu));
  m.impl("supcon_loss_forward", TORCH_BOX(&infopro::supcon_loss_forward_cpu));
  m.impl("supcon_loss_backward", TORCH_BOX(&infopro::supcon_loss_backward_cpu));
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&infopro::linear_cross_entropy_forward_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&infopro::linear_cross_entropy_backward_cpu));
  m.impl("norm_relu_pool_forward", TORCH_BOX(&infopro::norm_relu_pool_forward_cpu));
  m.impl("norm_relu_pool_backward", TORCH_BOX(&infopro::norm_relu_pool_backward_cpu));
  m.impl("conv_norm_relu_pool_forward", TORCH_BOX(&infopro::conv_norm_relu_pool_forward_cpu));
  m.impl("conv_norm_relu_pool_backward", TORCH_BOX(&infopro::conv_norm_relu_pool_backward_cpu));
  m.impl("upsample_cross_entropy_forward", TORCH_BOX(&infopro::upsample_cross_entropy_forward_cpu));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&infopro::upsample_cross_entropy_backward_cpu));
  m.impl("chain_stage_forward", TORCH_BOX(&infopro::chain_stage_forward_cpu));
  m.impl("chain_stage_backward", TORCH_BOX(&infopro::chain_stage_backward_cpu));
  m.impl("chain_loss_forward", TORCH_BOX(&infopro::chain_loss_forward_cpu));
  m.impl("chain_loss_backward", TORCH_BOX(&infopro::chain_loss_backward_cpu));
  m.impl("upsample_conv3x3_forward", TORCH_BOX(&infopro::upsample_conv3x3_forward_cpu));
  m.impl("upsample_conv3x3_backward", TORCH_BOX(&infopro::upsample_conv3x3_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&infopro::isa));
}
