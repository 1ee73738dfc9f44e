// The launches of reconstruction_loss on plain pointers: the order of the kernels, their grids, and their one
// workspace. Nothing here waits for the device or allocates.
#pragma once

#include "reconstruction_loss_kernels.cuh"
#include "reconstruction_loss_same_launch.cuh"

namespace infopro::gpu {

inline Parameters take_parameters(const Call& d, Workspace& w) {
  const int K = d.s.K;
  Parameters p;
  p.w1_by_channel = w.take<float>(int64_t(d.s.C) * d.hidden_rows() * TAP_ROW);
  p.w1_by_tap = w.take<float>(int64_t(9) * K * round_up(d.s.C, 4));
  p.w2 = w.take<float>(K * W2_ROW);
  p.b2 = w.take<float>(4);
  p.norm = w.take<float>(6 * K);
  p.rows = w.take<Cell>(d.s.H);
  p.columns = w.take<Cell>(d.s.W);
  return p;
}

inline Call make_call(const Request& r, const Plan& plan, Workspace& w) {
  Call d = {};
  d.s = r.s;
  d.p = plan;
  d.features = r.features;
  d.target = Target::of(r.image, r.restore);
  d.pixel = r.pixel;
  d.pixel_weight = float(1.0 / (3.0 * double(r.s.N) * double(r.s.H) * double(r.s.W)));
  d.w = take_parameters(d, w);
  return d;
}

inline NormCall norm_call(const Call& d, const Request& r) {
  const GivenParameters& given = r.parameters;
  return {d.s.K, d.s.K, given.b1, given.gamma, given.beta, d.w.norm, double(d.s.N) * d.s.H * d.s.W};
}

inline int sweep_blocks(const Plan& p, const Device& device, int tiles) {
  return smaller(tiles, device.multiprocessors * blocks_per_multiprocessor(p, device));
}

inline Error launch_prepare(const Call& d, const Request& r, Stream stream) {
  const int blocks = larger(1, smaller(64, ceil_div(d.s.C * d.hidden_rows() * TAP_ROW, THREADS)));
  return launch(decoder_prepare_kernel, blocks, THREADS, 0, stream, d, r.parameters);
}

// ---- forward ----

struct Forward {
  Plan plan;
  Device device;
  int64_t bytes;  // of the workspace
  int shared;     // bytes of a block's shared memory; 0 if nothing fits

  Forward(const Shape& s, Precision precision, const Device& device) : device(device) {
    Request request = {};
    request.s = s, request.precision = precision;
    Workspace counted(nullptr);
    if (same::takes(s, precision)) {
      const same::Sweeps sweeps(request, device, counted);
      sweeps.forward_parts(counted);
      shared = sweeps.d.p.shared;
    } else {
      plan = make_plan(s, device);
      take(make_call(request, plan, counted), counted);
      shared = plan.shared;
    }
    bytes = counted.used();
  }

  struct Parts {
    double* moments;
    float* partial;
  };

  static Parts take(const Call& d, Workspace& w) {
    double* moments = w.take<double>(int64_t(d.tiles()) * d.s.K * 3);
    return {moments, w.take<float>(int64_t(d.tiles()) * sums_columns(d.s.K))};
  }

  // value (1); saved: mean, var, d gamma, d beta, d W2, d b2 and, if same::takes and needs_grad, the
  // gradient in the logits
  Error run(const Request& r, Numbers running_mean, Numbers running_var, bool needs_grad, float* value,
            float* saved, void* workspace, Stream stream) const {
    Workspace w(workspace);
    if (same::takes(r.s, r.precision)) {
      same::Sweeps sweeps(r, device, w);
      const auto parts = sweeps.forward_parts(w);
      return sweeps.forward(parts, running_mean, running_var, r.eps, needs_grad, value, saved, stream);
    }
    const Call d = make_call(r, plan, w);
    const Parts parts = take(d, w);
    const int K = d.s.K, blocks = sweep_blocks(plan, device, d.tiles());
    Error error = launch_prepare(d, r, stream);
    const auto statistics =
        plan.low_resolution ? decoder_statistics_kernel<true> : decoder_statistics_kernel<false>;
    const auto loss = plan.low_resolution ? decoder_loss_kernel<true> : decoder_loss_kernel<false>;
    const double* moments = parts.moments;
    const float* partial = parts.partial;
    const double share = 1.0 / (3.0 * double(r.s.N) * double(r.s.H) * double(r.s.W));
    if (error == success && !running_mean.data)
      error = launch(statistics, blocks, THREADS, plan.shared, stream, d, parts.moments);
    if (error == success)
      error = launch(decoder_norm_kernel, K, THREADS, 0, stream, norm_call(d, r), running_mean, running_var,
                     moments, d.tiles(), r.eps, saved);
    if (error == success)
      error = launch(loss, blocks, THREADS, plan.shared, stream, d, needs_grad, parts.partial);
    if (error != success) return error;
    return launch(reduce_rows_kernel, ceil_div(sums_columns(K), SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0,
                  stream, partial, d.tiles(), sums_columns(K), saved + 2 * K, value, share, needs_grad);
  }
};

// ---- backward ----

struct Backward {
  Plan plan;
  Device device;
  bool needs_features, needs_w1;
  int samples;    // of a launch of the sweep
  int64_t bytes;  // of the workspace
  int shared;     // bytes of a block's shared memory; 0 if nothing fits

  Backward(const Shape& s, Precision precision, const Device& device, bool needs_features, bool needs_w1)
      : device(device), needs_features(needs_features), needs_w1(needs_w1), samples(s.N) {
    Request request = {};
    request.s = s, request.precision = precision;
    Workspace counted(nullptr);
    if (same::takes(s, precision)) {
      const same::Sweeps sweeps(request, device, counted);
      sweeps.backward_part(counted, needs_w1);
      shared = sweeps.d.p.shared;
    } else {
      plan = make_plan(s, device);
      if (needs_features && plan.tiles() > 1) samples = samples_of_a_launch(s);
      take(make_call(request, plan, counted), counted);
      shared = plan.shared;
    }
    bytes = counted.used();
  }

  // As many as keep all transient memory under a quarter of the resized map, rounded down to whole rounds of
  // the blocks.
  int samples_of_a_launch(const Shape& s) const {
    const int tiles = plan.tiles(),
              together = device.multiprocessors * blocks_per_multiprocessor(plan, device);
    const double w1 = (needs_w1 ? together + 3.0 : 3.0) * 9 * s.K * s.C;  // partial sums, packed copies
    const double part = double(tiles) * plan.pixels * s.C,
                 room = double(s.N) * s.C * s.H * s.W / 4 - w1 - 4096;
    const int most = larger(1, smaller(s.N, int(room / part)));
    const int rounds = int(int64_t(most) * tiles / together);
    return rounds > 0 && most < s.N ? larger(1, int(int64_t(rounds) * together / tiles)) : most;
  }

  struct Parts {
    float *w1, *features;
  };

  int blocks() const { return sweep_blocks(plan, device, samples * plan.tiles()); }

  Parts take(const Call& d, Workspace& w) const {
    float* w1 = needs_w1 ? w.take<float>(int64_t(blocks()) * 9 * d.s.K * d.s.C) : nullptr;
    const bool split = needs_features && plan.tiles() > 1;
    return {w1, split ? w.take<float>(int64_t(samples) * plan.tiles() * d.s.C * plan.pixels) : nullptr};
  }

  // d_w1 (K, C, 3, 3) if needs_w1, d_b1 (K), d_features if needs_features. upstream: one number on the
  // device.
  Error run(const Request& r, const float* upstream, const float* saved, bool batch_statistics,
            Maps d_features, float* d_w1, float* d_b1, void* workspace, Stream stream) const {
    Workspace w(workspace);
    if (same::takes(r.s, r.precision)) {
      same::Sweeps sweeps(r, device, w);
      float* part = sweeps.backward_part(w, needs_w1);
      return sweeps.backward(part, upstream, saved, batch_statistics, r.eps, d_features, d_w1, d_b1, stream);
    }
    Call d = make_call(r, plan, w);
    const Parts parts = take(d, w);
    d.upstream = upstream;
    Error error = launch_prepare(d, r, stream);
    if (error == success)
      error = launch(decoder_norm_backward_kernel, 1, THREADS, 0, stream, norm_call(d, r), upstream, saved,
                     batch_statistics, 0.0, r.eps, d_b1);
    if (!needs_features && !needs_w1) return error;
    const auto sweep = plan.low_resolution ? decoder_backward_kernel<true> : decoder_backward_kernel<false>;
    const float *w1 = parts.w1, *features = parts.features;
    for (int n = 0; n < d.s.N && error == success; n += samples) {
      const int count = smaller(samples, d.s.N - n), tiles = plan.tiles();
      error =
          launch(sweep, sweep_blocks(plan, device, count * tiles), THREADS, plan.shared, stream, d, n * tiles,
                 (n + count) * tiles, n > 0, parts.w1, needs_features, d_features, parts.features);
      if (error == success && parts.features) {
        const int64_t numbers = int64_t(count) * d.s.C * d.s.h * d.s.w;
        const int blocks = int(numbers < 4096 * THREADS ? (numbers + THREADS - 1) / THREADS : 4096);
        error = launch(decoder_overlap_kernel, blocks, THREADS, 0, stream, d, n, count, features, d_features);
      }
    }
    const int columns = 9 * d.s.K * d.s.C;
    if (error == success && needs_w1)
      error = launch(reduce_rows_kernel, ceil_div(columns, SUM_COLUMNS), SUM_COLUMNS * SUM_ROWS, 0, stream,
                     w1, blocks(), columns, d_w1, static_cast<float*>(nullptr), 1.0, true);
    return error;
  }
};

}  // namespace infopro::gpu
