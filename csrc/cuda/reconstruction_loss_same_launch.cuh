// The launches of the decoder on features as large as the image, and their memory.
#pragma once

#include "reconstruction_loss_same_kernels.cuh"

namespace infopro::gpu {

// Operands of the products; sums are float32. As in ops/reconstruction_loss_single.py.
enum class Precision : int { exact, tf32, bf16, f16 };

struct Request {
  Shape s;
  Maps features, image;
  GivenParameters parameters;
  const double* restore;  // three means and three standard deviations, or null
  Pixel pixel;
  double eps;
  Precision precision;
};

namespace same {

inline int operand_bytes(Precision p) { return p == Precision::bf16 || p == Precision::f16 ? 2 : 4; }

inline bool takes(const Shape& s, Precision p) {
  return s.h == s.H && s.w == s.W && s.K <= most_hidden(operand_bytes(p));
}

// f(an operand's type)
template <class F> Error with_operand(Precision p, F f) {
  if (p == Precision::exact) return f(Float32());
  if (p == Precision::tf32) return f(Tf32());
  return p == Precision::bf16 ? f(Bf16()) : f(F16());
}

// A call's kernels and memory. grid: blocks of a sweep; the moments' rows; floats in front of the gradient
// that forward keeps.
struct Sweeps {
  Call d = {};
  NormCall norm = {};
  GivenParameters given;
  Precision precision;
  int grid, rows;
  void *w1, *w1_back, *w2, *w2_back;

  Sweeps(const Request& r, const Device& device, Workspace& w)
      : given(r.parameters), precision(r.precision) {
    const int bytes = operand_bytes(precision), matrix = precision == Precision::exact ? 64 : 8 * bytes;
    d.s = r.s;
    d.p = make_plan(r.s, bytes, device);
    d.chunks = ceil_div(r.s.C, GROUP), d.blocks = ceil_div(r.s.K, GROUP);
    d.features = r.features;
    d.target = Target::of(r.image, r.restore);
    d.pixel = r.pixel;
    const double pixels = double(r.s.N) * r.s.H * r.s.W;
    d.pixel_weight = float(1.0 / (3.0 * pixels));
    d.b1 = given.b1, d.b2 = given.b2;
    const int64_t pairs = int64_t(d.chunks) * d.blocks * 9 * WARP;
    d.w1 = w1 = w.take<char>(pairs * matrix), d.w1_back = w1_back = w.take<char>(pairs * matrix);
    d.w2 = w2 = w.take<char>(int64_t(d.blocks) * 12 * WARP * 4 * bytes);
    d.w2_back = w2_back = w.take<char>(int64_t(d.blocks) * 3 * WARP * matrix);
    float* coefficients = w.take<float>(6 * GROUP * d.blocks);
    d.norm = coefficients;
    norm = {r.s.K, GROUP * d.blocks, given.b1, given.gamma, given.beta, coefficients, pixels};
    grid = smaller(d.tiles(), device.multiprocessors * d.p.blocks(device));
    rows = d.blocks == 1 ? grid : d.tiles();
  }

  // Floats of `saved` in front of the gradient in the logits.
  static int64_t header(int K) { return round_up(31 * K + 3, 4); }

  template <class T> Error prepare(Stream stream) const {
    const int blocks = smaller(64, ceil_div(d.chunks * d.blocks * 9 * WARP, THREADS));
    return launch(decoder_same_prepare_kernel<T>, blocks, THREADS, 0, stream, d, given.w1, given.w2, w1,
        w1_back,
                  w2, w2_back);
  }

  struct ForwardParts {
    double* moments;
    float* partial;
  };
  ForwardParts forward_parts(Workspace& w) const {
    double* moments = w.take<double>(int64_t(rows) * d.s.K * 3);
    return {moments, w.take<float>(int64_t(grid) * sums_columns(d.s.K))};
  }

  Error forward(const ForwardParts& parts, Numbers running_mean, Numbers running_var, double eps,
                bool needs_grad, float* value, float* saved, Stream stream) {
    d.kept = saved + header(d.s.K);
    return with_operand(precision, [&](auto operand) {
      using T = decltype(operand);
      const double* moments = parts.moments;
      const float* partial = parts.partial;
      const int columns = sums_columns(d.s.K);
      Error error = prepare<T>(stream);
      if (error == success && !running_mean.data)
        error = launch(decoder_same_statistics_kernel<T>, grid, THREADS, d.p.features(), stream, d,
            parts.moments);
      if (error == success)
        error = launch(decoder_norm_kernel, norm.row, THREADS, 0, stream, norm, running_mean, running_var,
            moments,
                       rows, eps, saved);
      if (error == success)
        error = launch(decoder_same_loss_kernel<T>, grid, THREADS, d.p.shared, stream, d, needs_grad,
                       parts.partial);
      if (error != success) return error;
      return launch(reduce_rows_kernel, ceil_div(columns, SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0, stream,
          partial,
                    grid, columns, saved + 2 * d.s.K, value, 1.0 / (3 * norm.pixels), needs_grad);
    });
  }

  float* backward_part(Workspace& w, bool needs_w1) const {
    return needs_w1 ? w.take<float>(int64_t(grid) * 9 * d.s.K * d.s.C) : nullptr;
  }

  Error backward(float* part, const float* upstream, const float* saved, bool batch_statistics, double eps,
                 Maps d_features, float* d_w1, float* d_b1, Stream stream) {
    d.upstream = upstream;
    d.kept = const_cast<float*>(saved) + header(d.s.K);
    return with_operand(precision, [&](auto operand) {
      using T = decltype(operand);
      Error error = prepare<T>(stream);
      if (error == success)  // a pixel has three logits, and all gradients wait for 1 / (3 N H W)
        error = launch(decoder_norm_backward_kernel, 1, THREADS, 0, stream, norm, upstream, saved,
                       batch_statistics, 3.0, eps, d_b1);
      if (error != success || (!d_features.data && !part)) return error;
      error = launch(decoder_same_backward_kernel<T>, grid, THREADS, d.p.shared, stream, d, part, d_features);
      const float* partial = part;
      const int columns = 9 * d.s.K * d.s.C;
      if (error != success || !part) return error;
      return launch(reduce_rows_kernel, ceil_div(columns, SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0, stream,
          partial,
                    grid, columns, d_w1, static_cast<float*>(nullptr), 1.0, true);
    });
  }
};

}  // namespace same
}  // namespace infopro::gpu
