// reconstruction_loss's CUDA kernels on the host, with a plain C interface for ctypes.
#include "cuda/reconstruction_loss_launch.cuh"

using namespace infopro::gpu;
using infopro::Dtype;
using infopro::Maps;
using infopro::Pixel;

extern "C" {

struct HostArray {
  void* data;
  int64_t dtype;  // infopro::Dtype
  int64_t strides[4];
};

struct HostCall {
  int64_t N, C, K, h, w, H, W, nearest, loss, precision;
  double eps;
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor, seed;
  HostArray features, image, w1, b1, gamma, beta, w2, b2, running_mean, running_var;
  const double* restore;
};

}

static Maps maps(const HostArray& a) {
  return {a.data, Dtype(a.dtype), a.strides[0], a.strides[1], a.strides[2], a.strides[3]};
}
static Numbers numbers(const HostArray& a, float missing) { return {a.data, Dtype(a.dtype), missing}; }
static Device device_of(const HostCall& c) {
  return {int(c.multiprocessors), int(c.shared_per_block), int(c.shared_per_multiprocessor)};
}

static Shape shape_of(const HostCall& c) {
  return {int(c.N), int(c.C), int(c.K), int(c.h), int(c.w), int(c.H), int(c.W), c.nearest != 0};
}

static Request request_of(const HostCall& c) {
  GivenParameters given = {numbers(c.w1, 0),   numbers(c.b1, 0), numbers(c.gamma, 1),
                           numbers(c.beta, 0), numbers(c.w2, 0), numbers(c.b2, 0)};
  return {shape_of(c), maps(c.features), maps(c.image), given, c.restore,
          Pixel(c.loss), c.eps, Precision(c.precision)};
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
const char* decoder_forward(const HostCall* c, int64_t needs_grad, float* value, float* saved) {
  begin(*c);
  const Forward forward(shape_of(*c), Precision(c->precision), device_of(*c));
  if (forward.shared == 0) return "no plan fits the device";
  char workspace;
  return outcome(forward.run(request_of(*c), numbers(c->running_mean, 0), numbers(c->running_var, 1),
                             needs_grad != 0, value, saved, &workspace, nullptr));
}

const char* decoder_backward(const HostCall* c, const float* upstream, const float* saved,
                             int64_t batch_statistics, const HostArray* d_features, float* d_w1,
                             float* d_b1) {
  begin(*c);
  const Backward backward(shape_of(*c), Precision(c->precision), device_of(*c),
      d_features->data != nullptr, d_w1 != nullptr);
  char workspace;
  return outcome(backward.run(request_of(*c), upstream, saved, batch_statistics != 0, maps(*d_features), d_w1,
                              d_b1, &workspace, nullptr));
}

// low_resolution, tiles of a sample, tile_h, tile_w, group, part, chunk, late_channels, samples a launch of
// backward, shared bytes, blocks to a multiprocessor, bytes of memory that forward and backward take for
// themselves
void decoder_plan(const HostCall* c, int64_t* to) {
  const Precision precision = Precision(c->precision);
  const Backward b(shape_of(*c), precision, device_of(*c), true, true);
  const Forward f(shape_of(*c), precision, device_of(*c));
  Plan p = b.plan;
  int blocks = 0;
  if (same::takes(shape_of(*c), precision)) {
    const same::Plan own = same::make_plan(shape_of(*c), same::operand_bytes(precision), device_of(*c));
    p = {};
    p.tile_h = own.tile_h, p.tile_w = own.tile_w, p.tiles_y = own.tiles_y, p.tiles_x = own.tiles_x;
    p.part = own.band, p.shared = own.shared;
    blocks = own.blocks(device_of(*c));
  } else {
    blocks = blocks_per_multiprocessor(p, device_of(*c));
  }
  const int64_t numbers[] = {p.low_resolution, p.tiles(), p.tile_h, p.tile_w, p.group, p.part, p.chunk,
                             p.late_channels, b.samples, p.shared, blocks, f.bytes, b.bytes};
  std::copy(std::begin(numbers), std::end(numbers), to);
}

int64_t decoder_switches() { return cuda_host::device().switches; }

// The worst accesses of shared memory since the last call: wavefronts over the fewest possible.
int64_t decoder_conflicts() { return std::exchange(cuda_host::device().conflicts, {}).worst; }

// One product of a warp, from fragments as lanes hold them: a (32, 4), b (32, 2), c (32, 4) words.
static Precision kind;
static const uint32_t *fragment_a, *fragment_b;
static float* fragment_c;

static void product_kernel() {
  const int lane = lane_of();
  const uint32_t *a = fragment_a + 4 * lane, *b = fragment_b + 2 * lane;
  float(&c)[4] = *reinterpret_cast<float(*)[4]>(fragment_c + 4 * lane);
  const uint4 rows = {a[0], a[1], a[2], a[3]};
  if (kind == Precision::tf32) mma_tf32(c, rows, b[0], b[1]);
  if (kind == Precision::bf16) mma_bf16(c, rows, b[0], b[1]);
  if (kind == Precision::f16) mma_f16(c, rows, b[0], b[1]);
}

const char* product(int64_t precision, const uint32_t* a, const uint32_t* b, float* c) {
  cuda_host::device().error.clear();
  kind = Precision(precision), fragment_a = a, fragment_b = b, fragment_c = c;
  return outcome(launch(product_kernel, 1, WARP, 0, nullptr));
}
}
