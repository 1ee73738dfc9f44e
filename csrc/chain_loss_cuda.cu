// A chain decoder's last stage on CUDA tensors: checks, memory from torch, and the launches on torch's current stream. The schemas are
// defined in Python (infopro_fast/ops/chain_decoder.py), which also asks whether a call is one that these kernels take.
#include <limits>
#include <map>
#include <tuple>

#include "chain_loss_launch.cuh"
#include "cuda_checks.h"

namespace infopro {
namespace {

constexpr const char* OP = "chain_loss";

gpu::chain::Line line_of(int64_t in, int64_t out, int64_t mode, double factor) { return {int(in), int(out), Resize(int(mode)), factor}; }

struct Arguments {
  Parameter weight, bias, mean, var, gamma, beta;
  std::vector<double> restore;
  gpu::chain::Request request;

  Arguments(const Tensor& x, const OptionalTensor& mean_, const OptionalTensor& var_, const OptionalTensor& gamma_, const OptionalTensor& beta_,
            double eps, const Tensor& weight_, const OptionalTensor& bias_, const Tensor& image, const std::vector<double>& restore_, int64_t mode,
            const std::vector<double>& factors, int64_t loss)
      : weight(OP, "weight", weight_, 27 * x.size(1), 0), bias(OP, "bias", bias_, 3, 0), mean(OP, "mean", mean_, x.size(1), 0),
        var(OP, "var", var_, x.size(1), 1), gamma(OP, "gamma", gamma_, x.size(1), 1), beta(OP, "beta", beta_, x.size(1), 0), restore(restore_) {
    namespace chain = gpu::chain;
    const int64_t N = x.size(0), C = x.size(1), h = x.size(2), w = x.size(3), H = image.size(2), W = image.size(3);
    const int64_t most = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(image.size(0) == N && image.size(1) == 3, OP, ": image: expected (", N, ", 3, H, W), got ", image.size(0), " of ", image.size(1));
    STD_TORCH_CHECK(C > 0 && C <= chain::MOST_CHANNELS, OP, ": x: expected 1 to ", chain::MOST_CHANNELS, " channels, got ", C);
    STD_TORCH_CHECK(h > 0 && w > 0 && N * H * W <= most, OP, ": expected maps of at least 1x1 and fewer than 2^31 pixels");
    STD_TORCH_CHECK(h <= H && w <= W && H <= chain::MOST_ENLARGED * h && W <= chain::MOST_ENLARGED * w, OP, ": expected an image of 1 to ",
                    chain::MOST_ENLARGED, " times the size of x, got (", H, ", ", W, ") and (", h, ", ", w, ")");
    STD_TORCH_CHECK(mode >= 0 && mode <= 2 && loss >= 0 && loss <= 2, OP, ": mode, loss: expected 0, 1 or 2, got ", mode, " and ", loss);
    check_dtype(OP, "x", x);
    check_dtype(OP, "image", image);
    const bool scaled = factors.size() == 2;
    request.s = {int(N), int(C), line_of(h, H, mode, scaled ? factors[0] : 0), line_of(w, W, mode, scaled ? factors[1] : 0)};
    request.x = maps(OP, "x", x);
    request.image = maps(OP, "image", image);
    request.norm = bool(mean_);
    request.given = {weight.numbers, bias.numbers, mean.numbers, var.numbers, gamma.numbers, beta.numbers, eps};
    request.restore = restore.size() == 6 ? restore.data() : nullptr;
    request.pixel = Pixel(int(loss));
  }

  Arguments(const Arguments&) = delete;
};

// The plan of a direction, which takes some tens of microseconds to find, and is the same for every batch of a shape.
template <class Direction>
Direction planned(const gpu::chain::Shape& s, int index) {
  constexpr size_t MOST = 64;
  using Key = std::tuple<int, int, int, int, int, int, int, Resize, double, double>;
  static thread_local std::map<Key, Direction> found;
  const Key key = {index, s.N, s.C, s.rows.in, s.rows.out, s.columns.in, s.columns.out, s.rows.mode, s.rows.factor, s.columns.factor};
  auto at = found.find(key);
  if (at == found.end()) {
    const gpu::Device& device = device_facts(OP, index);
    const Direction made(s, device);
    STD_TORCH_CHECK(made.plan.shared > 0, OP, ": no tile fits the ", device.shared_per_block,
                    " bytes of shared memory that a block has on this device; impl='triton' and impl='reference' take this call");
    if (found.size() == MOST) found.clear();
    at = found.emplace(key, made).first;
  }
  return at->second;
}

Tensor forward(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma, OptionalTensor beta, double eps, Tensor weight,
               OptionalTensor bias, Tensor image, std::vector<double> restore, int64_t mode, std::vector<double> factors, int64_t loss, bool) {
  const int index = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  Tensor value = empty_like_on(x, {}, ScalarType::Float);
  if (x.size(0) == 0) {
    torch::stable::zero_(value);
    return value;
  }
  const Arguments arguments(x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss);
  const auto call = planned<gpu::chain::Forward>(arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  check_launch(OP, call.run(arguments.request, floats(value), workspace.mutable_data_ptr(), current_stream(index)));
  return value;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                                                    OptionalTensor beta, double eps, Tensor weight, OptionalTensor bias, Tensor image,
                                                    std::vector<double> restore, int64_t mode, std::vector<double> factors, int64_t loss,
                                                    bool needs_x, bool needs_weight) {
  const int index = x.get_device_index();
  const int64_t C = x.size(1);
  torch::stable::accelerator::DeviceGuard guard(index);
  const std::vector<int64_t> none = {0}, x_shape = {x.size(0), C, x.size(2), x.size(3)}, weight_shape = {3, C, 3, 3};
  Tensor d_x = !needs_x ? empty_like_on(x, none, x.scalar_type()) : mean ? empty_like_on(x, x_shape, ScalarType::Float) : torch::stable::empty_like(x);
  Tensor sums = empty_like_on(x, {2, C}, ScalarType::Float), d_bias = empty_like_on(x, {3}, ScalarType::Float);
  Tensor d_weight = empty_like_on(x, needs_weight ? weight_shape : none, ScalarType::Float);
  if (x.size(0) == 0) {
    for (Tensor* t : {&sums, &d_bias, &d_weight}) torch::stable::zero_(*t);
    return {d_x, sums, d_weight, d_bias};
  }
  const Arguments arguments(x, mean, var, gamma, beta, eps, weight, bias, image, restore, mode, factors, loss);
  Tensor upstream = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float && upstream.numel() == 1, OP, ": grad: expected one float32 number");
  const auto call = planned<gpu::chain::Backward>(arguments.request.s, index);
  Tensor workspace = empty_like_on(x, {call.bytes}, ScalarType::Byte);
  const Maps to = needs_x ? maps(OP, "x", d_x) : Maps{};
  check_launch(OP, call.run(arguments.request, floats(upstream), needs_x, to, floats(sums), needs_weight ? floats(d_weight) : nullptr,
                            floats(d_bias), workspace.mutable_data_ptr(), current_stream(index)));
  return {d_x, sums, d_weight, d_bias};
}

}  // namespace
}  // namespace infopro

STABLE_TORCH_LIBRARY_IMPL(infopro_fast, CUDA, m) {
  m.impl("chain_loss_forward_cuda", TORCH_BOX(&infopro::forward));
  m.impl("chain_loss_backward_cuda", TORCH_BOX(&infopro::backward));
}
