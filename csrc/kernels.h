// The table of CPU kernels: one for each instruction set and each arithmetic type, float and double.
//
// A kernel works on plain pointers, in one thread, and allocates nothing. The files cpu/<op>.cpp check
// arguments, allocate buffers and distribute the work over threads. "Scratch" is a thread's own memory.
#pragma once

#include <cstdint>

namespace infopro {

enum class Dtype : int { f32, f64, bf16, f16 };

// The dtype of the arithmetic type T.
template <class T> constexpr Dtype dtype_as = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

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

// One axis of a resize from `in` to `out` elements: out[p] = low_weight[p] in[low[p]] + high_weight[p]
// in[high[p]].
struct Axis {
  int64_t in, out;
  const int32_t *low, *high;
  const double *low_weight, *high_weight;
};

// Integers as wide as T, so that a comparison of labels selects lanes of T.
template <class T> struct Lane;
template <> struct Lane<float> { using type = int32_t; };
template <> struct Lane<double> { using type = int64_t; };
template <class T> using label = typename Lane<T>::type;

enum class Pixel : int { bce, mse, l1 };

// A target is clamped to [0, 1] by at most this much; further outside, the loss is nan. Rounding moves an
// image by less. A normalised image may overshoot, by noise or augmentation, but not by the range itself.
constexpr double IMAGE_SLACK = 1.0 / 512, RESTORED_SLACK = 1;

// The mean loss over the pixels of images (N, 3, H, W).
template <class T> struct PixelLoss {
  Maps image;
  bool restore;    // the target is image * std + mean
  T image_mean[3], image_std[3];
  Pixel pixel;
  T pixel_weight;  // 1 / (3 N H W), times the upstream gradient in backward
};

// One call of reconstruction_loss: N samples, features (C, h, w), K hidden channels, images (3, H, W). Here
// and below, scale = gamma inverse_std.
template <class T> struct Decoder : PixelLoss<T> {
  int64_t N, C, K, h, w, H, W;
  bool low_resolution;  // mix channels at the size of the features, then resize; else resize, then convolve
  bool winograd;        // run the first convolution, where it has the image's size, by Winograd's algorithm
  bool resize;          // features and image differ in size
  Axis rows, columns;
  Maps features;
  const T *w1, *w1_backward, *w2, *w2_backward;   // packed by Kernels::decoder_pack
  const T *b1, *b2;                               // (K), (3)
  const T *center, *inverse_std, *scale, *shift;  // (K): relu((z - center) scale + shift)
  int shuffled;  // result of Kernels::decoder_expand, which fills the tables below
  const T *expand, *expand_backward;
  const int32_t *band, *band_backward;
};

// What a sample adds to the gradients of the decoder's parameters in the sweep that computes the loss.
struct SampleSums {
  double loss;
  double *d_gamma, *d_beta;  // (K): sums of dy xhat and of dy
  double *d_b2;              // (3)
};

// One convolution of a chain decoder, or upsample_conv3x3: x (N, C, h, w), resized to (H, W), is convolved to
// z (N, K, H, W).
template <class T> struct ChainStage : PixelLoss<T> {
  int64_t N, C, K, h, w, H, W;
  int side;    // of the convolution's window: 3 or 1
  bool plain;  // 1x1 without a resize: one matrix product
  bool norm;   // relu((x - center) scale + shift) is convolved; x is then contiguous and of T
  bool loss;   // z are the logits of an image (N, 3, H, W), and `dy` is the gradient of PixelLoss
  Axis rows, columns;
  Maps x;
  const T *center, *inverse_std, *scale, *shift;  // (C)
  const T *weight, *weight_backward;  // (side^2 K, C), taps first, and its transpose; packed by pack_a
  const T* bias;                      // (K)
  const T *expand, *gather;           // the resize along x and its transpose, by chain_table
  const int32_t *expand_band, *gather_band;
  int64_t chunk;              // rows of x in one matrix product
  int64_t in_rows, out_rows;  // most rows of x and of z in a band
  bool weight_of_inputs;      // compute the gradient of the weights as (C, side^2 K)
  // The gradient in z, both (N, K, H, W) and contiguous: (dy - z_mean - (z - z_center) z_slope) z_scale; dy
  // without z.
  const T *dy, *z, *z_mean, *z_center, *z_slope, *z_scale;
};

// A band of sample n. Forward: rows out0..out1 of z, which read rows in0..in1 of x. Backward: rows in0..in1
// of x, whose gradient reads rows out0..out1 of z; those depend on rows all0..all1 of x.
struct ChainBand {
  int64_t n, out0, out1, in0, in1, all0, all1;
};

// One call of norm_relu_pool: maps (N, C, h, w).
template <class T> struct NormPool {
  int64_t N, C, h, w;
  Maps x;
  const T *center, *inverse_std, *scale, *shift;  // (C): y = (x - center) scale + shift
};

// One call of norm_relu_pool after a convolution: x (N, C, h, w), of T, gives z (N, H, W, K).
template <class T> struct ConvPool {
  int64_t N, C, K, h, w, H, W, stride;
  Maps x, dx;       // dx has no data where no gradient is needed
  const T* weight;  // packed by Kernels::conv_pool_pack for forward or for backward
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
template <class T> struct UpsampleCrossEntropy {
  int64_t N, C, h, w, H, W;
  Maps logits;
  Labels target;
  int64_t ignore_index;
  T smoothing;
  const T* class_weight;  // (C), or null: 1 for all
  T weight_sum;           // over all classes
  // Pixel rows first_row[y] to first_row[y + 1] mix source rows y and y + 1, the last source row with itself.
  const int64_t* first_row;
  const T *row_low_weight, *row_high_weight;
  // Pixel i of vector v is low_weight * source[base + low] + high_weight * source[base + high]: base[v],
  // others at [v * width + i].
  const int64_t* base;
  const label<T>*low, *high;
  const T *low_weight, *high_weight;
  int64_t chunks;    // most vectors that the taps of one vector reach over
  int64_t pitch;     // elements of a source row, padded so that a chunk can be read behind it
  const T* collect;  // (vectors, chunks, width, width): the weights of a vector's pixels, a row for each
};

// What a pass over the pixels of upsample_cross_entropy computes.
template <class T> struct UpsampleOutputs {
  T* loss;             // of every pixel (N, H, W), or null
  double* sums;        // of every gap, its loss and the weight of its targets; or null
  int64_t* confusion;  // (C, C) counts to add to, or null
  bool shared_confusion;
  bool gradient;
  Maps d_logits;
  const T* upstream;   // the gradient of every pixel's loss; strides in elements
  int64_t upstream_n, upstream_y, upstream_x;
};

template <class T> struct Kernels {
  int mr, nr;  // rows and columns of a register tile: packed matrices are padded to multiples of them
  int width;   // elements of a vector

  // ---- products of packed matrices: gemm.h ----
  // Pack (m, k) into panels (m / mr, depth, mr), columns 0..k of them; depth >= k.
  void (*pack_a)(Matrix a, int64_t m, int64_t k, int64_t depth, T* packed);
  // Pack (k, n) into panels (n / nr, depth, nr).
  void (*pack_b)(Matrix b, int64_t k, int64_t n, int64_t depth, T* packed);
  // c (m, n) = a b, or += if accumulate. Rows of c are ldc apart, groups of nr columns c_panel apart.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_depth, const T* b, int64_t b_depth,
               T* c, int64_t ldc, int64_t c_panel, bool accumulate);
  // to (rows, columns), of any dtype, = from^T; from (columns, nr) holds the rows of `to` in its lanes.
  void (*write_lanes)(const T* from, int64_t rows, int64_t columns, Matrix to);
  void (*read_row)(T* to, const void* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n);
  void (*write_row)(void* to, const T* from, Dtype dtype, int64_t offset, int64_t stride, int64_t n);

  // ---- logits (classes, nr rows in lanes): linear_cross_entropy.h ----
  void (*softmax_update)(const T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight,
                         const T* parts, bool smooth, const label<T>* target, T* best, T* sum, T* weighted,
                         T* at_target, label<T>* argmax);
  void (*softmax_gradient)(T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight,
                           const T* parts, const label<T>* target, const T* lse, const T* probability,
                           const T* smoothing, const T* at_target, const label<T>* kept);
  // sums[r] += the sum of row r of each panel
  void (*lane_sums)(const T* x, int64_t rows, int64_t panels, int64_t panel, T* sums);

  // ---- similarities (others, nr anchors in lanes): supcon_loss.h ----
  void (*supcon_forward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound,
                         const label<T>* labels, const label<T>* anchor_labels, T* best, T* sum, T* positive);
  void (*supcon_forward_both)(const T* s, int64_t others, T scale, T bound, const label<T>* labels,
                              const label<T>* anchor_labels, T* sum, T* positive, T* other_sum,
                              T* other_positive);
  void (*supcon_others)(const T* s, int64_t others, const T* z, int64_t pitch, T* to);
  void (*supcon_backward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound,
                          const label<T>* labels, const T* lse, const T* pull, const T* push,
                          const label<T>* anchor_labels, const T* anchor_lse, const T* anchor_pull,
                          const T* anchor_push);

  // ---- the decoder, sample by sample: reconstruction_loss.h ----
  // Elements of a thread's scratch, and of its parts of d W1 and d W2. All start as zeros.
  int64_t (*decoder_scratch)(const Decoder<T>&);
  int64_t (*decoder_w1_partial)(const Decoder<T>&);
  int64_t (*decoder_w2_partial)(const Decoder<T>&);
  void (*decoder_pack)(const Decoder<T>&, const T* w1, const T* w2, T* w1_packed, T* w1_backward,
                       T* w2_packed, T* w2_backward);
  int64_t (*decoder_expand_size)(const Decoder<T>&);
  int64_t (*decoder_band_size)(const Decoder<T>&);
  // Fill the tables and return Decoder::shuffled. memory: 2 decoder_expand_size elements.
  int (*decoder_expand)(const Decoder<T>&, T* expand, T* expand_backward, int32_t* band,
                        int32_t* band_backward, T* memory);
  void (*decoder_statistics)(const Decoder<T>&, int64_t n, T* scratch, double* mean, double* squares);
  void (*decoder_loss)(const Decoder<T>&, int64_t n, bool needs_grad, T* scratch, SampleSums& sums,
                       T* w2_partial);
  void (*decoder_backward)(const Decoder<T>&, int64_t n, const T* mean_dy, const T* mean_dy_xhat,
                           const Maps* d_features, T* w1_partial, T* scratch);
  // d_w1 (K, C, 3, 3) and d_w2 (3, K, 3, 3) += a thread's part
  void (*decoder_w1_reduce)(const Decoder<T>&, const T* partial, T* d_w1);
  void (*decoder_w2_reduce)(const Decoder<T>&, const T* partial, T* d_w2);

  // ---- a stage of a chain decoder, band by band: chain_stage.h ----
  // Elements of a thread's scratch, and of its part of dW, which starts as zeros.
  int64_t (*chain_scratch)(const ChainStage<T>&);
  int64_t (*chain_weight_partial)(const ChainStage<T>&);
  int64_t (*chain_bands)(const ChainStage<T>&, bool gather);  // elements of the table of bands
  // Fill the table and the bands, the bands alone if `table` is null. Return the table's elements.
  int64_t (*chain_table)(const ChainStage<T>&, bool gather, T* table, int32_t* band);
  // z (N, K, H, W); mean and sum of squared deviations of the band's z
  void (*chain_forward)(const ChainStage<T>&, const ChainBand&, T* scratch, T* z, double* mean,
                        double* squares);
  double (*chain_loss)(const ChainStage<T>&, const ChainBand&, T* scratch);
  // dx: the gradient of x. With a norm it is the gradient of the normalised x, masked by the ReLU, and sums
  // (2, C) are its sums of dy and of dy xhat. d_bias: (3), for a loss.
  void (*chain_backward)(const ChainStage<T>&, const ChainBand&, T* scratch, const Maps* dx, double* sums,
                         double* d_bias, T* weight_partial);
  // d_weight (K, C, side, side) += a thread's part
  void (*chain_weight_reduce)(const ChainStage<T>&, const T* partial, T* d_weight);

  // ---- batch norm, ReLU and pooling, sample by sample: norm_relu_pool.h ----
  int64_t (*norm_pool_row)(int64_t pixels);  // elements of a row of a thread's (C, pixels)
  void (*norm_pool_statistics)(const NormPool<T>&, int64_t n, T* rows, double* mean, double* squares);
  void (*norm_pool_forward)(const NormPool<T>&, int64_t n, T* rows, T* pooled, T* positive, T* positive_xhat);
  void (*norm_pool_backward)(const NormPool<T>&, int64_t n, T* rows, const T* upstream, const T* mean_dy,
                             const T* mean_dy_xhat, const Maps& dx);

  // ---- a 3x3 convolution in front of them: conv_norm_relu_pool.h ----
  int64_t (*conv_pool_scratch)(const ConvPool<T>&);  // elements of a thread's scratch, which starts as zeros
  // Elements of the packed weights, and of a thread's part of their gradient; both start as zeros.
  int64_t (*conv_pool_weights)(const ConvPool<T>&);
  // Pack weights (K, C, 3, 3) for the forward sweep and the backward one; either may be null.
  void (*conv_pool_pack)(const ConvPool<T>&, const Maps& weight, T* packed, T* packed_backward);
  void (*conv_pool_forward)(const ConvPool<T>&, int64_t n, T* scratch, double* mean, double* squares);
  void (*conv_pool_backward)(const ConvPool<T>&, int64_t n, const T* upstream, const T* mean_dy,
                             const T* mean_dy_xhat, T* weight_partial, T* scratch);
  // d_weight (K, C, 3, 3) += a thread's part
  void (*conv_pool_weight_reduce)(const ConvPool<T>&, const T* partial, const Maps& d_weight);

  // ---- cross entropy of resized logits, gap by gap between their rows: upsample_cross_entropy.h ----
  int64_t (*upsample_scratch)(const UpsampleCrossEntropy<T>&);  // elements of a thread's scratch
  void (*upsample_gaps)(const UpsampleCrossEntropy<T>&, int64_t first, int64_t last, T* scratch,
                        const UpsampleOutputs<T>& to, T* head, T* tail, bool& bad);
};

template <class T> const Kernels<T>& kernels();  // of the instruction set in force

}  // namespace infopro
