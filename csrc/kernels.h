// The table of CPU kernels: one for each instruction set and each arithmetic type (float, double).
//
// A kernel works on plain pointers, in one thread, and allocates nothing. The <op>_cpu.cpp files check arguments, make
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

// One call of norm_relu_pool: maps (N, C, h, w).
template <class T>
struct NormPool {
  int64_t N, C, h, w;
  Maps x;
  const T *center, *inverse_std, *scale, *shift;  // (C): y = (x - center) scale + shift, scale = gamma inverse_std
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

  // ---- logits (classes, nr rows in lanes): cross_entropy.h ----
  void (*softmax_update)(const T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight, bool smooth,
                         const label<T>* target, T* best, T* sum, T* weighted, T* at_target, label<T>* argmax);
  void (*softmax_gradient)(T* x, int64_t classes, int64_t first, const T* bias, const T* class_weight, const label<T>* target,
                           const T* lse, const T* probability, const T* smoothing, const T* at_target, const label<T>* kept);
  void (*lane_sums)(const T* x, int64_t rows, int64_t panels, int64_t panel, T* sums);  // sums[r] += sum of row r of each panel

  // ---- similarities (others, nr anchors in lanes): supcon.h ----
  void (*supcon_forward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels,
                         const label<T>* anchor_labels, T* best, T* sum, T* positive);
  void (*supcon_forward_both)(const T* s, int64_t others, T scale, T bound, const label<T>* labels, const label<T>* anchor_labels, T* sum,
                              T* positive, T* other_sum, T* other_positive);
  void (*supcon_others)(const T* s, int64_t others, const T* z, int64_t pitch, T* to);
  void (*supcon_backward)(T* s, int64_t others, int64_t first, int64_t anchor, T scale, T bound, const label<T>* labels, const T* lse, const T* pull,
                          const T* push, const label<T>* anchor_labels, const T* anchor_lse, const T* anchor_pull, const T* anchor_push);

  // ---- the decoder, sample by sample: decoder.h ----
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

  // ---- batch norm, ReLU and pooling, sample by sample: norm_pool.h ----
  int64_t (*norm_pool_row)(int64_t pixels);  // elements of a row of a thread's (C, pixels)
  void (*norm_pool_statistics)(const NormPool<T>&, int64_t n, T* rows, double* mean, double* squares);
  void (*norm_pool_forward)(const NormPool<T>&, int64_t n, T* rows, T* pooled, T* positive, T* positive_xhat);
  void (*norm_pool_backward)(const NormPool<T>&, int64_t n, T* rows, const T* upstream, const T* mean_dy, const T* mean_dy_xhat, const Maps& dx);
};

template <class T>
const Kernels<T>& kernels();  // those of the instruction set in force

}  // namespace infopro
