// A chain decoder's stages on CUDA tensors: checks, memory from torch, and the launches on torch's current
// stream. The schemas are defined in Python (infopro_fast/ops/reconstruction_loss_chain.py), which also
// decides whether these kernels take a call.
#include <limits>
#include <map>
#include <tuple>

#include "chain_stage_launch.cuh"
#include "checks.h"

namespace infopro {
namespace {

namespace chain = gpu::chain;

// A batch norm, or none.
struct Norm {
  OptionalTensor mean, var, gamma, beta;
  double eps;
};

chain::Line line_of(int64_t in, int64_t out, int64_t mode, double factor) {
  return {int(in), int(out), Resize(int(mode)), factor};
}

// x (N, C, h, w), weight (K, C, 3, 3), z (N, K, H, W)
struct Arguments {
  Parameter weight, bias, mean, var, gamma, beta;
  Doubles restore;
  chain::Request request = {};

  Arguments(const char* op, const Tensor& x, const Norm& norm, const Tensor& weight_,
            const OptionalTensor& bias_, int64_t H, int64_t W, int64_t mode, const Doubles& factors)
      : weight(op, "weight", weight_, 9 * weight_.size(0) * x.size(1), 0),
        bias(op, "bias", bias_, weight_.size(0), 0), mean(op, "mean", norm.mean, x.size(1), 0),
        var(op, "var", norm.var, x.size(1), 1), gamma(op, "gamma", norm.gamma, x.size(1), 1),
        beta(op, "beta", norm.beta, x.size(1), 0) {
    const int64_t N = x.size(0), C = x.size(1), h = x.size(2), w = x.size(3), K = weight_.size(0),
                  most = std::numeric_limits<int32_t>::max();
    CHECK(weight_.size(1) == C && weight_.size(2) == 3 && weight_.size(3) == 3, op, ": weight: expected (K, ",
          C, ", 3, 3)");
    CHECK(C > 0 && C <= chain::MOST_CHANNELS, op, ": x: expected 1 to ", chain::MOST_CHANNELS,
          " channels, got ", C);
    CHECK(K > 0 && K <= chain::MOST_OUTPUTS, op, ": weight: expected 1 to ", chain::MOST_OUTPUTS,
          " output channels, got ", K);
    CHECK(h > 0 && w > 0 && N * H * W <= most, op,
          ": expected maps of at least 1x1 and fewer than 2^31 pixels");
    CHECK(h <= H && w <= W && H <= chain::MOST_ENLARGED * h && W <= chain::MOST_ENLARGED * w, op,
          ": expected maps of 1 to ", chain::MOST_ENLARGED, " times the size of x, got (", H, ", ", W,
          ") of (", h, ", ", w, ")");
    CHECK(mode >= 0 && mode <= 2, op, ": mode: expected 0, 1 or 2, got ", mode);
    check_dtype(op, "x", x);
    const bool scaled = factors.size() == 2;
    request.s = {int(N), int(C), int(K), line_of(h, H, mode, scaled ? factors[0] : 0),
                 line_of(w, W, mode, scaled ? factors[1] : 0)};
    request.x = maps(op, "x", x);
    request.norm = bool(norm.mean);
    request.given = {weight.numbers, bias.numbers, mean.numbers, var.numbers,
                     gamma.numbers,  beta.numbers, norm.eps};
  }

  void set_image(const char* op, const Tensor& image, const Doubles& restore_, int64_t loss) {
    CHECK(request.s.K == 3 && image.size(0) == request.s.N && image.size(1) == 3, op, ": image: expected (",
          request.s.N, ", 3, H, W) and a weight of 3 output channels");
    CHECK(loss >= 0 && loss <= 2, op, ": loss: expected 0, 1 or 2, got ", loss);
    check_dtype(op, "image", image);
    restore = restore_;
    request.image = maps(op, "image", image);
    request.restore = restore.size() == 6 ? restore.data() : nullptr;
    request.pixel = Pixel(int(loss));
  }

  Arguments(const Arguments&) = delete;
};

// The plan of a direction. It takes tens of microseconds to find, so it is kept for later calls of the shape.
template <class Direction> const Direction& planned(const char* op, const chain::Shape& s, int index) {
  constexpr size_t MOST = 64;
  using Key = std::tuple<int, int, int, int, int, int, int, int, Resize, double, double>;
  static thread_local std::map<Key, Direction> found;
  const Key key = {index,        s.N,           s.C,         s.K,           s.rows.in,       s.rows.out,
                   s.columns.in, s.columns.out, s.rows.mode, s.rows.factor, s.columns.factor};
  auto at = found.find(key);
  if (at == found.end()) {
    const gpu::Device& device = device_facts(op, index);
    const Direction made(s, device);
    CHECK(made.plan.shared > 0, op, ": no tile fits the ", device.shared_per_block,
          " bytes of shared memory that a block has on this device; impl='triton' and impl='reference' take "
          "this call");
    if (found.size() == MOST) found.clear();
    at = found.emplace(key, made).first;
  }
  return at->second;
}

// The results of a backward: the gradient of x, its sums, and the gradient of the weight, empty if not
// needed.
struct Gradients {
  Tensor x, sums, weight;
  Maps to = {};

  Gradients(const char* op, const Tensor& of, const Norm& norm, const Tensor& w, bool needs_x,
            bool needs_weight)
      : x(!needs_x    ? empty_like_on(of, {0}, of.scalar_type())
          : norm.mean ? empty_like_on(of, {of.size(0), of.size(1), of.size(2), of.size(3)}, ScalarType::Float)
                      : torch::stable::empty_like(of)),
        sums(empty_like_on(of, {2, of.size(1)}, ScalarType::Float)),
        weight(empty_like_on(
            of, needs_weight ? std::vector<int64_t>{w.size(0), w.size(1), 3, 3} : std::vector<int64_t>{0},
            ScalarType::Float)) {
    if (needs_x) to = maps(op, "x", x);
    if (of.size(0) == 0) {
      torch::stable::zero_(sums);
      torch::stable::zero_(weight);
    }
  }
};

const float* floats_of(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  bool fits = t.scalar_type() == ScalarType::Float && t.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = t.size(i) == shape[i];
  CHECK(fits, op, ": ", name, ": expected float32 of the shape that x and weight give");
  return static_cast<const float*>(t.const_data_ptr());
}

// ---- the last stage ----

Tensor loss_forward(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                    OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, Tensor image,
                    Doubles restore, int64_t mode, Doubles factors, int64_t loss, bool) {
  constexpr const char* OP = "chain_loss";
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  Tensor value = empty_like_on(x, {}, ScalarType::Float);
  if (x.size(0) == 0) {
    torch::stable::zero_(value);
    return value;
  }
  Arguments arguments(OP, x, {mean, var, gamma, beta, eps}, weight, bias, image.size(2), image.size(3), mode,
                      factors);
  arguments.set_image(OP, image, restore, loss);
  const auto& call = planned<chain::LossForward>(OP, arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  check_launch(
      OP, call.run(arguments.request, floats(value), workspace.mutable_data_ptr(), current_stream(index)));
  return value;
}

Tensors4 loss_backward(Tensor grad, Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                       OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, Tensor image,
                       Doubles restore, int64_t mode, Doubles factors, int64_t loss, bool needs_x,
                       bool needs_weight) {
  constexpr const char* OP = "chain_loss";
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  const Norm norm = {mean, var, gamma, beta, eps};
  const Gradients found(OP, x, norm, weight, needs_x, needs_weight);
  Tensor d_bias = empty_like_on(x, {3}, ScalarType::Float);
  if (x.size(0) == 0) {
    torch::stable::zero_(d_bias);
    return {found.x, found.sums, found.weight, d_bias};
  }
  Arguments arguments(OP, x, norm, weight, bias, image.size(2), image.size(3), mode, factors);
  arguments.set_image(OP, image, restore, loss);
  Tensor upstream = torch::stable::contiguous(grad);
  const auto& call = planned<chain::LossBackward>(OP, arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  check_launch(OP, call.run(arguments.request, floats_of(OP, "grad", upstream, {}), needs_x, found.to,
                            floats(found.sums), needs_weight ? floats(found.weight) : nullptr, floats(d_bias),
                            workspace.mutable_data_ptr(), current_stream(index)));
  return {found.x, found.sums, found.weight, d_bias};
}

// ---- the stages in front of it ----

Tensors2 stage_forward(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                       OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, int64_t H,
                       int64_t W, int64_t mode, Doubles factors, bool) {
  constexpr const char* OP = "chain_stage";
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  Tensor z = empty_like_on(x, {x.size(0), weight.size(0), H, W}, ScalarType::Float);
  Tensor statistics = empty_like_on(x, {2, weight.size(0)}, ScalarType::Float);
  if (x.size(0) == 0) {
    torch::stable::zero_(statistics);
    return {z, statistics};
  }
  const Arguments arguments(OP, x, {mean, var, gamma, beta, eps}, weight, bias, H, W, mode, factors);
  const auto& call = planned<chain::StageForward>(OP, arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  check_launch(OP, call.run(arguments.request, floats(z), floats(statistics), workspace.mutable_data_ptr(),
                            current_stream(index)));
  return {z, statistics};
}

Tensors3 stage_backward(Tensor dy, Tensor z, Tensor z_mean, Tensor z_var, OptionalTensor z_gamma,
                        double z_eps, OptionalTensor mean_dy, Tensor x, OptionalTensor mean,
                        OptionalTensor var, OptionalTensor gamma, OptionalTensor beta, double eps,
                        Tensor weight, int64_t mode, Doubles factors, bool needs_x, bool needs_weight) {
  constexpr const char* OP = "chain_stage";
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  const Norm norm = {mean, var, gamma, beta, eps};
  Gradients found(OP, x, norm, weight, needs_x, needs_weight);
  if (x.size(0) == 0 || (!needs_x && !needs_weight)) {
    torch::stable::zero_(found.sums);
    return {found.x, found.sums, found.weight};
  }
  const int64_t K = weight.size(0), H = dy.size(2), W = dy.size(3);
  const Arguments arguments(OP, x, norm, weight, {}, H, W, mode, factors);
  const Parameter outer_mean(OP, "z_mean", z_mean, K, 0), outer_var(OP, "z_var", z_var, K, 1),
      outer_gamma(OP, "z_gamma", z_gamma, K, 1);
  const Tensor given = torch::stable::contiguous(dy), output = torch::stable::contiguous(z);
  const OptionalTensor means =
      mean_dy ? OptionalTensor(torch::stable::contiguous(*mean_dy)) : OptionalTensor();
  const std::vector<int64_t> shape = {x.size(0), K, H, W};
  const chain::Outer outer = {floats_of(OP, "dy", given, shape), floats_of(OP, "z", output, shape),
                              outer_mean.numbers,
                              outer_var.numbers,
                              outer_gamma.numbers,
                              means ? floats_of(OP, "mean_dy", *means, {2, K}) : nullptr,
                              z_eps,
                              nullptr};
  const auto& call = planned<chain::StageBackward>(OP, arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  check_launch(OP, call.run(arguments.request, outer, needs_x, found.to, floats(found.sums),
                            needs_weight ? floats(found.weight) : nullptr, workspace.mutable_data_ptr(),
                            current_stream(index)));
  return {found.x, found.sums, found.weight};
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CUDA, m) {
  m.impl("chain_stage_forward_cuda", TORCH_BOX(&infopro::stage_forward));
  m.impl("chain_stage_backward_cuda", TORCH_BOX(&infopro::stage_backward));
  m.impl("chain_loss_forward_cuda", TORCH_BOX(&infopro::loss_forward));
  m.impl("chain_loss_backward_cuda", TORCH_BOX(&infopro::loss_backward));
}
