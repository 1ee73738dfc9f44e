// reconstruction_loss on CUDA tensors: checks, memory from torch, and the launches on torch's current stream.
// The schemas are defined in Python (infopro_fast/ops/reconstruction_loss.py).
#include <limits>

#include "checks.h"
#include "reconstruction_loss_launch.cuh"

namespace infopro {
namespace {

constexpr const char* OP = "reconstruction_loss";

struct Arguments {
  Parameter w1, b1, gamma, beta, w2, b2;
  Doubles restore;
  gpu::Request request;

  Arguments(const Tensor& features, const Tensor& image, const Tensor& w1_, const OptionalTensor& b1_,
            const OptionalTensor& gamma_, const OptionalTensor& beta_, const Tensor& w2_,
            const OptionalTensor& b2_, const Doubles& restore_, double eps, int64_t mode, int64_t loss,
            int64_t precision)
      : w1(OP, "w1", w1_, 9 * w1_.size(0) * features.size(1), 0), b1(OP, "b1", b1_, w1_.size(0), 0),
        gamma(OP, "gamma", gamma_, w1_.size(0), 1), beta(OP, "beta", beta_, w1_.size(0), 0),
        w2(OP, "w2", w2_, 27 * w1_.size(0), 0), b2(OP, "b2", b2_, 3, 0), restore(restore_) {
    const int64_t N = features.size(0), C = features.size(1), h = features.size(2), w = features.size(3),
                  K = w1_.size(0);
    const int64_t H = image.size(2), W = image.size(3), most = std::numeric_limits<int32_t>::max();
    CHECK(w1_.size(1) == C && image.size(0) == N && image.size(1) == 3, OP,
          ": shapes of features, image and w1 do not fit");
    CHECK(K > 0 && H > 0 && W > 0 && h > 0 && w > 0, OP,
          ": expected at least one hidden channel and maps of at least 1x1");
    CHECK(N * H * W <= most && 12 * C * (K + 6) <= most && C * h * w <= most, OP,
          ": expected fewer than 2^31 pixels, weights, features of a sample");
    check_dtype(OP, "features", features);
    check_dtype(OP, "image", image);
    request.s = {int(N), int(C), int(K), int(h), int(w), int(H), int(W), mode == 1};
    request.features = maps(OP, "features", features);
    request.image = maps(OP, "image", image);
    request.parameters = {w1.numbers, b1.numbers, gamma.numbers, beta.numbers, w2.numbers, b2.numbers};
    request.restore = restore.size() == 6 ? restore.data() : nullptr;
    request.pixel = Pixel(int(loss));
    request.eps = eps;
    CHECK(precision >= 0 && precision <= 3, OP, ": precision: expected 0 to 3, got ", precision);
    request.precision = gpu::Precision(int(precision));
  }

  // Numbers that forward saves.
  int64_t saved(bool needs_grad) const {
    const gpu::Shape& s = request.s;
    if (!needs_grad || !gpu::same::takes(s, request.precision)) return 31 * s.K + 3;
    return gpu::same::Sweeps::header(s.K) +
           int64_t(s.N) * s.H * s.W * gpu::same::operand_bytes(request.precision);
  }

  Arguments(const Arguments&) = delete;
};

void check_plan(int shared, const gpu::Shape& s, const gpu::Device& device) {
  CHECK(shared > 0, OP, ": ", s.K, " hidden channels do not fit the ", device.shared_per_block,
        " bytes of shared memory that a block has on this device; impl='triton' and impl='reference' take "
        "them");
}

Tensors2 forward(Tensor features, Tensor image, Tensor w1, OptionalTensor b1, OptionalTensor gamma,
                 OptionalTensor beta, Tensor w2, OptionalTensor b2, OptionalTensor running_mean,
                 OptionalTensor running_var, Doubles restore, double eps, int64_t mode, int64_t loss,
                 bool needs_grad, int64_t precision) {
  const int64_t K = w1.size(0);
  const int index = features.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  Tensor value = empty_like_on(features, {}, ScalarType::Float);
  if (features.size(0) == 0) {
    Tensor saved = empty_like_on(features, {31 * K + 3}, ScalarType::Float);
    torch::stable::zero_(value);
    torch::stable::zero_(saved);
    return {value, saved};
  }
  const Arguments arguments(features, image, w1, b1, gamma, beta, w2, b2, restore, eps, mode, loss,
      precision);
  Tensor saved = empty_like_on(features, {arguments.saved(needs_grad)}, ScalarType::Float);
  const Parameter mean(OP, "running_mean", running_mean, K, 0), var(OP, "running_var", running_var, K, 1);
  const gpu::Device& device = device_facts(OP, index);
  const gpu::Forward call(arguments.request.s, arguments.request.precision, device);
  check_plan(call.shared, arguments.request.s, device);
  Tensor workspace = empty_like_on(features, {call.bytes}, ScalarType::Byte);
  check_launch(OP, call.run(arguments.request, mean.numbers, var.numbers, needs_grad, floats(value),
                            floats(saved), workspace.mutable_data_ptr(), current_stream(index)));
  return {value, saved};
}

Tensors3 backward(Tensor grad, Tensor features, Tensor image, Tensor w1, OptionalTensor b1,
                  OptionalTensor gamma, OptionalTensor beta, Tensor w2, OptionalTensor b2, Tensor saved,
                  Doubles restore, bool batch_statistics, double eps, int64_t mode, int64_t loss,
                  bool needs_features, bool needs_w1, int64_t precision) {
  const int64_t C = features.size(1), K = w1.size(0);
  const int index = features.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  std::vector<int64_t> none = {0}, w1_shape = {K, C, 3, 3};
  Tensor d_features = needs_features ? torch::stable::empty_like(features)
                                     : empty_like_on(features, none, features.scalar_type());
  Tensor d_w1 = empty_like_on(features, needs_w1 ? w1_shape : none, ScalarType::Float),
         d_b1 = empty_like_on(features, {K}, ScalarType::Float);
  if (features.size(0) == 0) {
    torch::stable::zero_(d_w1);
    torch::stable::zero_(d_b1);
    return {d_features, d_w1, d_b1};
  }
  const Arguments arguments(features, image, w1, b1, gamma, beta, w2, b2, restore, eps, mode, loss,
      precision);
  Tensor upstream = torch::stable::contiguous(grad), kept = torch::stable::contiguous(saved);
  CHECK(upstream.scalar_type() == ScalarType::Float && upstream.numel() == 1, OP,
        ": grad: expected one float32 number");
  CHECK(kept.scalar_type() == ScalarType::Float && kept.numel() == arguments.saved(true), OP,
        ": saved: expected ", arguments.saved(true), " float32 numbers");
  const gpu::Device& device = device_facts(OP, index);
  const gpu::Backward call(arguments.request.s, arguments.request.precision, device, needs_features,
      needs_w1);
  check_plan(call.shared, arguments.request.s, device);
  Tensor workspace = empty_like_on(features, {call.bytes}, ScalarType::Byte);
  Maps to = {};
  if (needs_features) to = maps(OP, "features", d_features);
  check_launch(OP, call.run(arguments.request, floats(upstream), floats(kept), batch_statistics, to,
                            needs_w1 ? floats(d_w1) : nullptr, floats(d_b1), workspace.mutable_data_ptr(),
                            current_stream(index)));
  return {d_features, d_w1, d_b1};
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CUDA, m) {
  m.impl("reconstruction_loss_forward_cuda", TORCH_BOX(&infopro::forward));
  m.impl("reconstruction_loss_backward_cuda", TORCH_BOX(&infopro::backward));
}
