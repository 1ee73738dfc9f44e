// The CUDA kernels of a chain decoder's stages on the host, with a plain C interface for ctypes.
#include "cuda/chain_stage_launch.cuh"

using namespace infopro::gpu;
using infopro::Dtype;
using infopro::Maps;
using infopro::Pixel;
using infopro::Resize;

extern "C" {

struct HostArray {
  void* data;
  int64_t dtype;  // infopro::Dtype
  int64_t strides[4];
};

struct HostCall {
  int64_t N, C, K, h, w, H, W, mode, loss;
  double eps, factor_y, factor_x;
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor, seed;
  HostArray x, image, weight, bias, mean, var, gamma, beta;
  const double* restore;
};

}

static Maps maps(const HostArray& a) { return {a.data, Dtype(a.dtype), a.strides[0], a.strides[1], a.strides[2], a.strides[3]}; }
static Numbers numbers(const HostArray& a, float missing) { return {a.data, Dtype(a.dtype), missing}; }
static Device device_of(const HostCall& c) { return {int(c.multiprocessors), int(c.shared_per_block), int(c.shared_per_multiprocessor)}; }

static chain::Shape shape_of(const HostCall& c) {
  const Resize mode = Resize(int(c.mode));
  return {int(c.N), int(c.C), int(c.K), {int(c.h), int(c.H), mode, c.factor_y}, {int(c.w), int(c.W), mode, c.factor_x}};
}

static chain::Request request_of(const HostCall& c) {
  chain::Given given = {numbers(c.weight, 0), numbers(c.bias, 0), numbers(c.mean, 0), numbers(c.var, 1), numbers(c.gamma, 1), numbers(c.beta, 0), c.eps};
  return {shape_of(c), maps(c.x), c.mean.data != nullptr, given, maps(c.image), c.restore, Pixel(c.loss)};
}

static const char* outcome(Error error) {
  cuda_host::Device& device = cuda_host::device();
  if (error != success && device.error.empty()) device.fail("a launch failed");
  return device.error.empty() ? nullptr : device.error.c_str();
}

static void begin(const HostCall& c) {
  cuda_host::device().seed = unsigned(c.seed);
  cuda_host::device().error.clear();
}

extern "C" {

// Null, or what went wrong.
const char* chain_loss_forward(const HostCall* c, float* value) {
  begin(*c);
  const chain::LossForward forward(shape_of(*c), device_of(*c));
  if (forward.plan.shared == 0) return "no plan fits the device";
  char workspace;
  return outcome(forward.run(request_of(*c), value, &workspace, nullptr));
}

const char* chain_loss_backward(const HostCall* c, const float* upstream, int64_t needs_x, const HostArray* d_x, float* sums, float* d_weight,
                                float* d_bias) {
  begin(*c);
  const chain::LossBackward backward(shape_of(*c), device_of(*c));
  if (backward.plan.shared == 0) return "no plan fits the device";
  char workspace;
  return outcome(backward.run(request_of(*c), upstream, needs_x != 0, maps(*d_x), sums, d_weight, d_bias, &workspace, nullptr));
}

const char* chain_stage_forward(const HostCall* c, float* z, float* statistics) {
  begin(*c);
  const chain::StageForward forward(shape_of(*c), device_of(*c));
  if (forward.plan.shared == 0) return "no plan fits the device";
  char workspace;
  return outcome(forward.run(request_of(*c), z, statistics, &workspace, nullptr));
}

struct HostOuter {
  const float *dy, *z, *mean_dy;
  HostArray mean, var, gamma;
  double eps;
};

const char* chain_stage_backward(const HostCall* c, const HostOuter* o, int64_t needs_x, const HostArray* d_x, float* sums, float* d_weight) {
  begin(*c);
  const chain::StageBackward backward(shape_of(*c), device_of(*c));
  if (backward.plan.shared == 0) return "no plan fits the device";
  const chain::Outer outer = {o->dy, o->z, numbers(o->mean, 0), numbers(o->var, 1), numbers(o->gamma, 1), o->mean_dy, o->eps, nullptr};
  char workspace;
  return outcome(backward.run(request_of(*c), outer, needs_x != 0, maps(*d_x), sums, d_weight, &workspace, nullptr));
}

// Tiles of a sample, tile_h, tile_w, low_h, low_w, out_h, out_w, strips, tile_strips, shared bytes, blocks to a multiprocessor, bytes of
// the workspace
void chain_plan(const HostCall* c, int64_t last, int64_t backward, int64_t* to) {
  const chain::Shape s = shape_of(*c);
  const Device device = device_of(*c);
  const chain::Sweep sweep = last ? (backward ? chain::Sweep(chain::LossBackward(s, device)) : chain::Sweep(chain::LossForward(s, device)))
                                  : (backward ? chain::Sweep(chain::StageBackward(s, device)) : chain::Sweep(chain::StageForward(s, device)));
  const chain::Plan& p = sweep.plan;
  const int64_t numbers[] = {p.tiles(), p.tile_h, p.tile_w, p.low_h, p.low_w, p.out_h, p.out_w, p.strips, p.tile_strips, p.shared,
                             chain::blocks_per_multiprocessor(p, device), sweep.bytes};
  std::copy(std::begin(numbers), std::end(numbers), to);
}
}
