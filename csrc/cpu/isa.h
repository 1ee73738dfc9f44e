// The kernels of one instruction set. Each isa_*.cpp includes this once, after it sets target, vector width
// and namespace.
#pragma once

#include "chain_stage.h"
#include "conv_norm_relu_pool.h"
#include "gemm.h"
#include "linear_cross_entropy.h"
#include "norm_relu_pool.h"
#include "reconstruction_loss.h"
#include "supcon_loss.h"
#include "upsample_cross_entropy.h"

namespace infopro::INFOPRO_ISA {

template <class T> constexpr Kernels<T> make_table() {
  Kernels<T> t = {};
  t.mr = MR;
  t.nr = NR<T>;
  t.width = Simd<T>::width;
  t.pack_a = pack_a<T>;
  t.pack_b = pack_b<T>;
  t.gemm = gemm<T>;
  t.write_lanes = write_lanes<T>;
  t.read_row = read_row<T>;
  t.write_row = write_row<T>;
  t.softmax_update = softmax_update<T>;
  t.softmax_gradient = softmax_gradient<T>;
  t.lane_sums = lane_sums<T>;
  t.supcon_forward = supcon_forward<T>;
  t.supcon_forward_both = supcon_forward_both<T>;
  t.supcon_others = supcon_others<T>;
  t.supcon_backward = supcon_backward<T>;
  t.decoder_scratch = decoder_scratch<T>;
  t.decoder_w1_partial = decoder_w1_partial<T>;
  t.decoder_w2_partial = decoder_w2_partial<T>;
  t.decoder_pack = decoder_pack<T>;
  t.decoder_expand_size = decoder_expand_size<T>;
  t.decoder_band_size = decoder_band_size<T>;
  t.decoder_expand = decoder_expand<T>;
  t.decoder_statistics = decoder_statistics<T>;
  t.decoder_loss = decoder_loss<T>;
  t.decoder_backward = decoder_backward<T>;
  t.decoder_w1_reduce = decoder_w1_reduce<T>;
  t.decoder_w2_reduce = decoder_w2_reduce<T>;
  t.chain_scratch = chain_scratch<T>;
  t.chain_weight_partial = chain_weight_partial<T>;
  t.chain_bands = chain_bands<T>;
  t.chain_table = chain_table<T>;
  t.chain_forward = chain_forward<T>;
  t.chain_loss = chain_loss<T>;
  t.chain_backward = chain_backward<T>;
  t.chain_weight_reduce = chain_weight_reduce<T>;
  t.norm_pool_row = norm_pool_row<T>;
  t.norm_pool_statistics = norm_pool_statistics<T>;
  t.norm_pool_forward = norm_pool_forward<T>;
  t.norm_pool_backward = norm_pool_backward<T>;
  t.conv_pool_scratch = conv_pool_scratch<T>;
  t.conv_pool_weights = conv_pool_weights<T>;
  t.conv_pool_pack = conv_pool_pack<T>;
  t.conv_pool_forward = conv_pool_forward<T>;
  t.conv_pool_backward = conv_pool_backward<T>;
  t.conv_pool_weight_reduce = conv_pool_weight_reduce<T>;
  t.upsample_scratch = upsample_scratch<T>;
  t.upsample_gaps = upsample_gaps<T>;
  return t;
}

extern const Kernels<float> table_f32;
extern const Kernels<double> table_f64;
const Kernels<float> table_f32 = make_table<float>();
const Kernels<double> table_f64 = make_table<double>();

}  // namespace infopro::INFOPRO_ISA
