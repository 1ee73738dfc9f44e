// The launches of a chain decoder's last stage on plain pointers: the order of the kernels, their grids, and the one workspace they share.
// Nothing here waits for the device or allocates.
#pragma once

#include "chain_loss_kernels.cuh"

namespace infopro::gpu::chain {

struct Request {
  Shape s;
  Maps x, image;
  bool norm;
  Given given;
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
  const int padded = round_up(r.s.C, STEP);
  d.w.weight = w.take<float>(int64_t(padded) * W_ROW);
  d.w.norm = w.take<float>(4 * padded);
  d.w.bias = w.take<float>(4);
  d.w.rows = w.take<Cell>(r.s.rows.out);
  d.w.columns = w.take<Cell>(r.s.columns.out);
  d.w.first_row = w.take<int>(r.s.rows.in + 1);
  d.w.first_column = w.take<int>(r.s.columns.in + 1);
  return d;
}

// One direction's plan, and what its two launches beside the sweep need.
struct Sweep {
  Plan plan;
  Device device;
  int blocks;

  Sweep(const Shape& s, const Device& device, bool backward) : plan(make_plan(s, device, backward)), device(device), blocks(1) {
    if (plan.shared > 0) blocks = smaller(s.N * plan.tiles(), device.multiprocessors * blocks_per_multiprocessor(plan, device));
  }

  Error prepare(const Call& d, const Request& r, Stream stream) const {
    const int most = larger(larger(round_up(d.s.C, STEP) * W_ROW, d.s.rows.out), d.s.columns.out);
    return launch(chain_prepare_kernel, smaller(32, ceil_div(most, THREADS)), THREADS, 0, stream, d, r.given);
  }
};

struct Forward : Sweep {
  int64_t bytes;  // of the workspace

  Forward(const Shape& s, const Device& device) : Sweep(s, device, false) {
    Request request = {};
    request.s = s;
    Workspace counted(nullptr);
    make_call(request, plan, counted);
    counted.take<double>(blocks);
    bytes = counted.used();
  }

  // value (1)
  Error run(const Request& r, float* value, void* workspace, Stream stream) const {
    Workspace w(workspace);
    const Call d = make_call(r, plan, w);
    double* partial = w.take<double>(blocks);
    Error error = prepare(d, r, stream);
    if (error == success) error = launch(chain_loss_kernel, blocks, THREADS, plan.shared, stream, d, partial);
    const double factor = 1.0 / (3.0 * double(d.s.N) * double(d.s.rows.out) * double(d.s.columns.out));
    if (error == success)
      error = launch(chain_reduce_loss_kernel, 1, SUM_COLUMNS * SUM_ROWS, 0, stream, static_cast<const double*>(partial), blocks, factor, value);
    return error;
  }
};

struct Backward : Sweep {
  int64_t bytes;

  Backward(const Shape& s, const Device& device) : Sweep(s, device, true) {
    Request request = {};
    request.s = s;
    Workspace counted(nullptr);
    make_call(request, plan, counted);
    counted.take<float>(int64_t(blocks) * sums_columns(s.C));
    bytes = counted.used();
  }

  // upstream: one number on the device. d_x where needs_x, sums (2, C), d_weight (3, C, 3, 3) or null, d_bias (3)
  Error run(const Request& r, const float* upstream, bool needs_x, Maps d_x, float* sums, float* d_weight, float* d_bias, void* workspace,
            Stream stream) const {
    Workspace w(workspace);
    Call d = make_call(r, plan, w);
    d.upstream = upstream;
    const int columns = sums_columns(d.s.C);
    float* partial = w.take<float>(int64_t(blocks) * columns);
    Error error = prepare(d, r, stream);
    if (error == success)
      error = launch(chain_gradient_kernel, blocks, THREADS, plan.shared, stream, d, needs_x, d_weight != nullptr, d_x, partial);
    if (error == success)
      error = launch(chain_reduce_kernel, ceil_div(columns, SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0, stream, static_cast<const float*>(partial),
                     blocks, d.s.C, sums, d_weight, d_bias);
    return error;
  }
};

}  // namespace infopro::gpu::chain
