// The launches of a chain decoder's stages on plain pointers: the order of the kernels, their grids, and
// their one workspace. Nothing here waits for the device or allocates.
#pragma once

#include "chain_stage_kernels.cuh"

namespace infopro::gpu::chain {

struct Request {
  Shape s;
  Maps x;
  bool norm;
  Given given;
  // for the last stage
  Maps image;
  const double* restore;  // see Target::of
  Pixel pixel;
};

inline Call make_call(const Request& r, const Plan& plan, Workspace& w) {
  Call d = {};
  d.s = r.s;
  d.p = plan;
  d.x = r.x;
  d.norm = r.norm;
  d.target = Target::of(r.image, r.restore);
  d.pixel = r.pixel;
  d.pixel_weight = float(1.0 / (3.0 * double(r.s.N) * double(r.s.rows.out) * double(r.s.columns.out)));
  d.w.weight = w.take<float>(int64_t(r.s.groups()) * r.s.padded() * W_ROW);
  d.w.norm = w.take<float>(4 * r.s.padded());
  d.w.bias = w.take<float>(r.s.groups() * OUTPUTS);
  d.w.rows = w.take<Cell>(r.s.rows.out);
  d.w.columns = w.take<Cell>(r.s.columns.out);
  d.w.first_row = w.take<int>(r.s.rows.in + 1);
  d.w.first_column = w.take<int>(r.s.columns.in + 1);
  return d;
}

// One direction's plan, and the launches beside the sweep.
struct Sweep {
  Plan plan;
  int blocks;
  int64_t bytes;  // of the workspace

  // own: takes the direction's own part of the workspace
  template <class Own>
  Sweep(const Shape& s, const Device& device, Kind kind, Own own)
      : plan(make_plan(s, device, kind)), blocks(1), bytes(0) {
    if (plan.shared == 0) return;
    blocks = smaller(s.N * plan.tiles(), device.multiprocessors * blocks_per_multiprocessor(plan, device));
    Request request = {};
    request.s = s;
    Workspace counted(nullptr);
    const Call d = make_call(request, plan, counted);
    own(d, blocks, counted);
    bytes = counted.used();
  }

  Error prepare(const Call& d, const Request& r, Stream stream) const {
    const int most = larger(larger(d.s.groups() * d.s.padded() * W_ROW, d.s.rows.out), d.s.columns.out);
    return launch(chain_prepare_kernel, smaller(32, ceil_div(most, THREADS)), THREADS, 0, stream, d, r.given);
  }

  Error reduce(const Call& d, bool last, const float* partial, float* sums, float* d_weight, float* d_bias,
               Stream stream) const {
    const int columns = sums_columns(d.s, last);
    return launch(chain_reduce_kernel, ceil_div(columns, SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0, stream,
                  partial, blocks, columns, d.s, sums, d_weight, d_bias);
  }
};

// ---- the last stage ----

struct LossForward : Sweep {
  LossForward(const Shape& s, const Device& device) : Sweep(s, device, {true, false}, take) {}

  static double* take(const Call&, int blocks, Workspace& w) { return w.take<double>(blocks); }

  // value (1)
  Error run(const Request& r, float* value, void* workspace, Stream stream) const {
    Workspace w(workspace);
    const Call d = make_call(r, plan, w);
    double* partial = take(d, blocks, w);
    Error error = prepare(d, r, stream);
    if (error == success) error = launch(chain_loss_kernel, blocks, THREADS, plan.shared, stream, d, partial);
    const double factor = 1.0 / (3.0 * double(d.s.N) * double(d.s.rows.out) * double(d.s.columns.out));
    if (error == success)
      error = launch(chain_reduce_loss_kernel, 1, SUM_COLUMNS * SUM_ROWS, 0, stream,
                     static_cast<const double*>(partial), blocks, factor, value);
    return error;
  }
};

struct LossBackward : Sweep {
  LossBackward(const Shape& s, const Device& device) : Sweep(s, device, {true, true}, take) {}

  static float* take(const Call& d, int blocks, Workspace& w) {
    return w.take<float>(int64_t(blocks) * sums_columns(d.s, true));
  }

  // upstream: one number on the device. d_x if needs_x, sums (2, C), d_weight (3, C, 3, 3) or null, d_bias
  // (3)
  Error run(const Request& r, const float* upstream, bool needs_x, Maps d_x, float* sums, float* d_weight,
            float* d_bias, void* workspace, Stream stream) const {
    Workspace w(workspace);
    Call d = make_call(r, plan, w);
    d.upstream = upstream;
    float* partial = take(d, blocks, w);
    Error error = prepare(d, r, stream);
    if (error == success)
      error = launch(chain_gradient_kernel, blocks, THREADS, plan.shared, stream, d, needs_x,
                     d_weight != nullptr, d_x, partial);
    return error == success ? reduce(d, true, partial, sums, d_weight, d_bias, stream) : error;
  }
};

// ---- the stages in front of it ----

struct StageForward : Sweep {
  StageForward(const Shape& s, const Device& device) : Sweep(s, device, {false, false}, take) {}

  static double* take(const Call& d, int, Workspace& w) {
    return w.take<double>(int64_t(d.tiles()) * d.s.K * 2);
  }

  // z (N, K, H, W), statistics (2, K)
  Error run(const Request& r, float* z, float* statistics, void* workspace, Stream stream) const {
    Workspace w(workspace);
    const Call d = make_call(r, plan, w);
    double* moments = take(d, blocks, w);
    Error error = prepare(d, r, stream);
    if (error == success)
      error = launch(chain_stage_kernel, blocks, THREADS, plan.shared, stream, d, z, moments);
    if (error == success)
      error = launch(chain_statistics_kernel, d.s.K, THREADS, 0, stream, d,
                     static_cast<const double*>(moments), statistics);
    return error;
  }
};

struct StageBackward : Sweep {
  StageBackward(const Shape& s, const Device& device) : Sweep(s, device, {false, true}, take) {}

  struct Parts {
    float *coefficients, *partial;
  };

  static Parts take(const Call& d, int blocks, Workspace& w) {
    float* coefficients = w.take<float>(OUTER * d.s.K);
    return {coefficients, w.take<float>(int64_t(blocks) * sums_columns(d.s, false))};
  }

  // d_x if needs_x, sums (2, C), d_weight (K, C, 3, 3) or null
  Error run(const Request& r, Outer outer, bool needs_x, Maps d_x, float* sums, float* d_weight,
            void* workspace, Stream stream) const {
    Workspace w(workspace);
    const Call d = make_call(r, plan, w);
    const Parts parts = take(d, blocks, w);
    outer.coefficients = parts.coefficients;
    Error error = prepare(d, r, stream);
    if (error == success) error = launch(chain_outer_kernel, 1, THREADS, 0, stream, outer, d.s.K);
    if (error == success)
      error = launch(chain_stage_gradient_kernel, blocks, THREADS, plan.shared, stream, d, outer, needs_x,
                     d_weight != nullptr, d_x, parts.partial);
    return error == success ? reduce(d, false, parts.partial, sums, d_weight, nullptr, stream) : error;
  }
};

}  // namespace infopro::gpu::chain
