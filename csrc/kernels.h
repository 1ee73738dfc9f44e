// The table of CPU kernels: one for each instruction set and each arithmetic type (float, double).
//
// A kernel works on plain pointers, in one thread, and allocates nothing. The files cpu/<op>.cpp check arguments, make
// the buffers and share the work out among threads.
#pragma once

#include <cstdint>

namespace infopro {

enum class Dtype : int { f32, f64, bf16, f16 };

// A strided matrix of any dtype. Strides are in elements.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t row, column;

  Matrix transposed() const { return {data, dtype, column, row}; }
};

// A strided (N, C, H, W) tensor of any dtype. Strides are in elements.
struct Maps {
  void* data;
  Dtype dtype;
  int64_t n, c, y, x;
};

// One axis of a resize from `in` to `out` elements: out[p] = low_weight[p] in[low[p]] + high_weight[p] in[high[p]].
struct Axis {
  int64_t in, out;
  const int32_t *low, *high;
  const double *low_weight, *high_weight;
};

enum class Pixel : int { bce, mse, l1 };

// Integers as wide as T, so that a comparison of labels selects lanes of T.
template <class T>
struct Lane;
template <>
struct Lane<float> { using type = int32_t; };
template <>
struct Lane<double> { using type = int64_t; };
template <class T>
using label = typename Lane<T>::type;

// Everything a decoder kernel needs to know of one call of reconstruction_loss.
// N samples, C channels of the features (h, w), K hidden channels, images (3, H, W).
template <class T>
struct Decoder {
  int64_t N, C, K, h, w, H, W;
  bool low_resolution;  // mix channels at the size of the features, then expand; else resize, then convolve
  bool winograd;        // the first convolution, where it is of the image's size, by Winograd's algorithm
  bool resize;          // features and image differ in size
  Axis rows, columns;
  Maps features, image;
  bool restore;                   // image * std + mean, clamped to [0, 1]
  T image_mean[3], image_std[3];
  Pixel pixel;
  T pixel_weight;                 // 1 / (3 N H W), times the upstream gradient in backward
  const T *w1, *w1_backward, *w2, *w2_backward;         // packed by Kernels::decoder_pack
  const T *b1, *b2;                                     // (K), (3)
  const T *center, *inverse_std, *scale, *shift;        // (K): relu((z - center) scale + shift), scale = gamma inverse_std
  int shuffled;                                         // low_resolution: the resize along x, by Kernels::decoder_expand
  const T *expand, *expand_backward;
  const int32_t *band, *band_backward;
};

// What a sample adds to the gradients of the decoder's parameters in the sweep that finds the loss.
struct SampleSums {
  double loss;
  double *d_gamma, *d_beta;  // (K) sums of dy xhat and of dy
  double *d_b2;              // (3)
};

// One convolution of a chain decoder, or upsample_conv3x3: x (N, C, h, w), resized to (H, W), is convolved to z (N, K, H, W).
template <class T>
struct ChainStage {
  int64_t N, C, K, h, w, H, W;
  int side;                         // of the convolution's window: 3, or 1
  bool plain;                       // 1x1 and not resized: one product of matrices
  Axis rows, columns;
  Maps x;
  bool norm;                        // relu((x - center) scale + shift) is what is convolved; x is then contiguous, of T
  const T *center, *inverse_std, *scale, *shift;                // (C), scale = gamma inverse_std
  const T *weight, *weight_backward;                            // (side^2 K, C) with taps first, and its transpose, by pack_a
  const T* bias;                                                // (K)
  const T *expand, *gather;                                     // the resize along x and its transpose, by chain_table
  const int32_t *expand_band, *gather_band;
  int64_t chunk, in_rows, out_rows;                             // rows of x a product takes; most rows of x and of z in a band
  bool weight_of_inputs;                                        // the gradient of the weights is found as (C, side^2 K)
  // The gradient in z: (dy - z_mean - (z - z_center) z_slope) z_scale where there is a z, else dy. Both (N, K, H, W), contiguous.
  const T *dy, *z, *z_mean, *z_center, *z_slope, *z_scale;
  // or that of the loss of an image (N, 3, H, W), which z are the logits of
  bool loss;
  Maps image;
  bool restore;
  T image_mean[3], image_std[3];
  Pixel pixel;
  T pixel_weight;
};

// A share of a sample: rows out0..out1 of z, for which rows in0..in1 of x are needed; or rows in0..in1 of x, whose gradient takes
// rows out0..out1 of z, which rows all0..all1 of x give.
struct ChainBand {
  int64_t n, out0, out1, in0, in1, all0, all1;
};

// One call of norm_relu_pool: maps (N, C, h, w).
template <class T>
struct NormPool {
  int64_t N, C, h, w;
  Maps x;
  const T *center, *inverse_std, *scale, *shift;  // (C): y = (x - center) scale + shift, scale = gamma inverse_std
};

// One call of norm_relu_pool with a convolution before it: x (N, C, h, w), of T, gives z (N, H, W, K).
template <class T>
struct ConvPool {
  int64_t N, C, K, h, w, H, W, stride;
  Maps x, dx;                                     // dx: without data where it is not needed
  const T* weight;                                // packed by Kernels::conv_pool_pack, one way or the other
  T* z;
  const T *center, *inverse_std, *scale, *shift;  // (K), as in NormPool
};

// Integers of any dtype, (N, H, W). Strides are in elements.
enum class Integer : int { u8, i8, i16, i32, i64 };
struct Labels {
  const void* data;
  Integer dtype;
  int64_t n, y, x;
};

// One call of upsample_cross_entropy: logits (N, C, h, w), resized to (H, W).
template <class T>
struct UpsampleCrossEntropy {
  int64_t N, C, h, w, H, W;
  Maps logits;
  Labels target;
  int64_t ignore_index;
  T smoothing;
  const T* class_weight;  // (C), or null: 1 for all
  T weight_sum;           // of all classes
  // Pixel rows first_row[y] to first_row[y + 1] are row_low_weight * source row y + row_high_weight * source row y + 1 (the last: y).
  const int64_t* first_row;
  const T *row_low_weight, *row_high_weight;
  // Pixel i of vector v is low_weight * source base[v] + low + high_weight * source base[v] + high, with low.. at [v * width + i].
  const int64_t* base;
  const label<T>*low, *high;
  const T *low_weight, *high_weight;
  int64_t chunks, pitch;  // vectors that the taps of a vector reach over, at most; elements of a source row, padded for that
  const T* collect;       // (vectors, chunks, width, width): the weights of a vector's pixels, a row each, in `chunks` vectors from base[v]
};

// What a pass over the pixels of upsample_cross_entropy is to find.
template <class T>
struct UpsampleOutputs {
  T* loss;             // of every pixel (N, H, W), or null
  double* sums;        // of every gap: its loss, and the weight of its targets; or null
  int64_t* confusion;  // (C, C) counts to add to, or null
  bool shared_confusion;
  bool gradient;
  Maps d_logits;
  const T* upstream;   // of every pixel's loss; strides in elements
  int64_t upstream_n, upstream_y, upstream_x;
};

template <class T>
struct Kernels {
  int mr, nr;  // rows and columns of a register tile: packed matrices are padded to multiples of them
  int width;   // elements of a vector

  // ---- products of packed matrices: gemm.h ----
  // (m, k) to panels (m / mr, depth, mr), columns 0..k of them; depth >= k
  void (*pack_a)(Matrix a, int64_t m, int64_t k, int64_t depth, T* packed);
  // (k, n) to panels (n / nr, depth, nr)
  void (*pack_b)(Matrix b, int64_t k, int64_t n, int64_t depth, T* packed);
  // c (m, n) = a b, or += where accumulate. Rows of c are ldc apart, groups of nr columns c_panel apart.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_depth, const T* b, int64_t b_depth, T* c, int64_t ldc,
               int64_t c_panel, bool accumulate);
  // to (rows, columns) of any dtype = from^T, from (columns, nr) with the rows of `to` in its lanes
  void (*write_lanes)(const T* from, int64_t rows, int64_t columns, Matrix to);
  void (*read_row)(T* to, const void* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n);
  void (*write_row)(void* to, const T* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n);

  // ---- logits (classes, nr rows in lanes): linear_cross_entropy.h ----
  void (*softmax_update)(const T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight, bool smooth,
                         const label<T>* target, T* best, T* sum, T* weighted, T* at_target, label<T>* argmax);
  void (*softmax_gradient)(T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight, const label<T>* target,
                           const T* lse, const T* probability, const T* smoothing, const T* at_target, const label<T>* kept);
  void (*lane_sums)(const T* x, int64_t rows, int64_t panels, int64_t panel, T* sums);  // sums[r] += sum of row r of each panel

  // ---- similarities (others, nr anchors in lanes): supcon_loss.h ----
  void (*supcon_forward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels,
                         const label<T>* anchor_labels, T* best, T* sum, T* positive);
  void (*supcon_forward_both)(const T* s, int64_t others, T scale, T bound, const label<T>* labels, const label<T>* anchor_labels, T* sum,
                              T* positive, T* other_sum, T* other_positive);
  void (*supcon_others)(const T* s, int64_t others, const T* z, int64_t pitch, T* to);
  void (*supcon_backward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels, const T* lse, const T* pull,
                          const T* push, const label<T>* anchor_labels, const T* anchor_lse, const T* anchor_pull, const T* anchor_push);

  // ---- the decoder, sample by sample: reconstruction_loss.h ----
  int64_t (*decoder_scratch)(const Decoder<T>&);  // elements a thread needs, zero at the start
  int64_t (*decoder_w1_partial)(const Decoder<T>&);  // elements of a thread's part of d W1 and
  int64_t (*decoder_w2_partial)(const Decoder<T>&);  // of d W2, zero at the start
  void (*decoder_pack)(const Decoder<T>&, const T* w1, const T* w2, T* w1_packed, T* w1_backward, T* w2_packed, T* w2_backward);
  int64_t (*decoder_expand_size)(const Decoder<T>&);
  int64_t (*decoder_band_size)(const Decoder<T>&);
  // fills the tables and returns Decoder::shuffled; memory: twice decoder_expand_size
  int (*decoder_expand)(const Decoder<T>&, T* expand, T* expand_backward, int32_t* band, int32_t* band_backward, T* memory);
  void (*decoder_statistics)(const Decoder<T>&, int64_t n, T* scratch, double* mean, double* squares);
  void (*decoder_loss)(const Decoder<T>&, int64_t n, bool needs_grad, T* scratch, SampleSums& sums, T* w2_partial);
  void (*decoder_backward)(const Decoder<T>&, int64_t n, const T* mean_dy, const T* mean_dy_xhat, const Maps* d_features, T* w1_partial,
                           T* scratch);
  void (*decoder_w1_reduce)(const Decoder<T>&, const T* partial, T* d_w1);  // d_w1 (K, C, 3, 3) += a thread's part
  void (*decoder_w2_reduce)(const Decoder<T>&, const T* partial, T* d_w2);  // d_w2 (3, K, 3, 3) += a thread's part

  // ---- a stage of a chain decoder, band by band: chain_stage.h ----
  int64_t (*chain_scratch)(const ChainStage<T>&);                 // elements a thread needs
  int64_t (*chain_weight_partial)(const ChainStage<T>&);          // of a thread's part of the gradient of the weights, zero at the start
  int64_t (*chain_bands)(const ChainStage<T>&, bool gather);      // of a table of bands
  int64_t (*chain_table)(const ChainStage<T>&, bool gather, T* table, int32_t* band);  // its elements; without a table fills the bands alone
  // z (N, K, H, W), and mean and sum of squared deviations of a band's z
  void (*chain_forward)(const ChainStage<T>&, const ChainBand&, T* scratch, T* z, double* mean, double* squares);
  double (*chain_loss)(const ChainStage<T>&, const ChainBand&, T* scratch);
  // dx: of x itself, or, where there is a norm, masked by the ReLU, with its sums of dy and of dy xhat (2, C); d_bias (3) of a loss
  void (*chain_backward)(const ChainStage<T>&, const ChainBand&, T* scratch, const Maps* dx, double* sums, double* d_bias, T* weight_partial);
  void (*chain_weight_reduce)(const ChainStage<T>&, const T* partial, T* d_weight);  // d_weight (K, C, side, side) += a thread's part

  // ---- batch norm, ReLU and pooling, sample by sample: norm_relu_pool.h ----
  int64_t (*norm_pool_row)(int64_t pixels);  // elements of a row of a thread's (C, pixels)
  void (*norm_pool_statistics)(const NormPool<T>&, int64_t n, T* rows, double* mean, double* squares);
  void (*norm_pool_forward)(const NormPool<T>&, int64_t n, T* rows, T* pooled, T* positive, T* positive_xhat);
  void (*norm_pool_backward)(const NormPool<T>&, int64_t n, T* rows, const T* upstream, const T* mean_dy, const T* mean_dy_xhat, const Maps& dx);

  // ---- a 3x3 convolution before them: conv_norm_relu_pool.h ----
  int64_t (*conv_pool_scratch)(const ConvPool<T>&);  // elements a thread needs, zero at the start
  int64_t (*conv_pool_weights)(const ConvPool<T>&);  // of each of the packed weights and of a thread's part of their gradient, likewise
  // of (K, C, 3, 3), for the forward sweep and the backward one; either may be null
  void (*conv_pool_pack)(const ConvPool<T>&, const Maps& weight, T* packed, T* packed_backward);
  void (*conv_pool_forward)(const ConvPool<T>&, int64_t n, T* scratch, double* mean, double* squares);
  void (*conv_pool_backward)(const ConvPool<T>&, int64_t n, const T* upstream, const T* mean_dy, const T* mean_dy_xhat, T* weight_partial,
                             T* scratch);
  void (*conv_pool_weight_reduce)(const ConvPool<T>&, const T* partial, const Maps& d_weight);  // d_weight (K, C, 3, 3) += a thread's part

  // ---- cross entropy of resized logits, gap by gap between their rows: upsample_cross_entropy.h ----
  int64_t (*upsample_scratch)(const UpsampleCrossEntropy<T>&);  // elements a thread needs
  void (*upsample_gaps)(const UpsampleCrossEntropy<T>&, int64_t first, int64_t last, T* scratch, const UpsampleOutputs<T>& to, T* head, T* tail,
                        bool& bad);
};

template <class T>
const Kernels<T>& kernels();  // those of the instruction set in force

}  // namespace infopro
