// The decoder on features as large as the image: the kernels. Three sweeps over the tiles, as batch norm
// needs its statistics in between. Only the gradient in the logits leaves a block, for backward.
#pragma once

#include "reconstruction_loss_same_steps.cuh"

namespace infopro::gpu::same {

// Weights in the order of their reads, for all of a call's kernels.
template <class T> __global__ void __launch_bounds__(THREADS)
    decoder_same_prepare_kernel(Call d, Numbers w1, Numbers w2, void* to_w1, void* to_w1_back, void* to_w2,
                                void* to_w2_back) {
  using O = Operand<T>;
  const int C = d.s.C, K = d.s.K, first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
  auto vector = [](int t, auto value) {
    float v[4];
    for (int j = 0; j < 4; j++) v[j] = value(channel_of(4 * t + j));
    return O::vector(v[0], v[1], v[2], v[3]);
  };
  auto first_weight = [&](int k, int c, int tap) {
    return k < K && c < C ? w1[(int64_t(k) * C + c) * 9 + tap] : 0.0f;
  };
  auto second_weight = [&](int o, int k, int tap) {
    return o < 3 && k < K ? w2[(int64_t(o) * K + k) * 9 + tap] : 0.0f;
  };
  for (int i = first; i < d.blocks * d.chunks * 9 * WARP; i += step) {
    const int g = i % WARP / 4, t = i % 4, dy = i / WARP % 3, dx = i / WARP / 3 % 3, pair = i / WARP / 9;
    {
      const int block = pair / d.chunks, c0 = pair % d.chunks * GROUP;
      auto row = [&](int k) {
        return vector(t, [&](int c) { return first_weight(GROUP * block + k, c0 + c, 3 * dy + dx); });
      };
      static_cast<typename O::Matrix*>(to_w1)[i] = O::matrix(row(g), row(g + 8));
    }
    const int chunk = pair / d.blocks, k0 = pair % d.blocks * GROUP;
    auto row = [&](int c) {  // the taps turned round
      return vector(t, [&](int k) { return first_weight(k0 + k, GROUP * chunk + c, 8 - 3 * dy - dx); });
    };
    static_cast<typename O::Matrix*>(to_w1_back)[i] = O::matrix(row(g), row(g + 8));
  }
  for (int i = first; i < d.blocks * 12 * WARP; i += step) {  // B; its columns are 4 row + logit
    const int g = i % WARP / 4, t = i % 4, dx = i / WARP % 3, e = i / WARP / 3 % 4, block = i / WARP / 12,
              o = g % 4, dy = e - g / 4;
    float v[4];
    for (int j = 0; j < 4; j++) {  // places in the order of ldmatrix
      const int place = O::BYTES == 2 ? 8 * (j / 2) + 2 * t + j % 2 : t + 4 * j;
      v[j] = dy >= 0 && dy < 3 ? second_weight(o, GROUP * block + channel_of(place), 3 * dy + dx) : 0.0f;
    }
    static_cast<typename O::Vector*>(to_w2)[i] = O::vector(v[0], v[1], v[2], v[3]);
  }
  for (int i = first; i < d.blocks * 3 * WARP; i += step) {  // the contraction: four pixels of four logits
    const int g = i % WARP / 4, t = i % 4, e = i / WARP % 3, block = i / WARP / 3;
    auto row = [&](int k) {
      float v[4];
      for (int o = 0; o < 4; o++)
        v[o] = t < 3 ? second_weight(o, GROUP * block + k, 3 * (2 - e) + 2 - t) : 0.0f;
      return O::vector(v[0], v[1], v[2], v[3]);
    };
    static_cast<typename O::Matrix*>(to_w2_back)[i] = O::matrix(row(g), row(g + 8));
  }
}

// Sums of a lane's z about its first, and how many.
struct Moments {
  float pivot[2], sum[2], squares[2];
  int count;
};

DEVICE void add_moments(const Region& r, int y, int x, const Accumulators& z, Moments& to) {
  const bool whole = r.owns_tile(y, x);
  const int t = lane_of() % 4;
  if (to.count == 0) to.pivot[0] = z[0][0], to.pivot[1] = z[0][2];
  UNROLL_ALL for (int row = 0; row < ROWS; row++) UNROLL_ALL for (int i = 0; i < 2; i++) {
    const bool own = whole || r.owns(y + row, x + 2 * t + i);
    to.count += own;
    UNROLL_ALL for (int c = 0; c < 2; c++) {
      const float v = own ? z[row][2 * c + i] - to.pivot[c] : 0.0f;
      to.sum[c] += v;
      to.squares[c] = fmaf(v, v, to.squares[c]);
    }
  }
}

// to (K, 3): count, mean and sum of squared deviations of the block's hidden channels, in float64.
template <class T>
DEVICE void write_moments(const Call& d, const Moments& mine, char* memory, int block, double* to) {
  constexpr int LANES = WARPS * 4;  // that have a channel
  float(*slots)[LANES][3] = reinterpret_cast<float(*)[LANES][3]>(memory);  // by channel
  const int lane = lane_of(), slot = 4 * warp_of() + lane % 4, n = mine.count;
  __syncthreads();
  UNROLL_ALL for (int c = 0; c < 2; c++) {
    float* s = slots[8 * c + lane / 4][slot];
    s[0] = float(n), s[1] = n ? mine.pivot[c] + mine.sum[c] / float(n) : 0.0f;
    s[2] = n ? mine.squares[c] - mine.sum[c] * (mine.sum[c] / float(n)) : 0.0f;
  }
  __syncthreads();
  const int k = GROUP * block + threadIdx.x;
  if (threadIdx.x >= GROUP || k >= d.s.K) return;
  double count = 0, sum = 0, squares = 0;
  for (int i = 0; i < LANES; i++) {
    const float* s = slots[threadIdx.x][i];
    count += double(s[0]), sum += double(s[0]) * double(s[1]);
  }
  const double mean = sum / count;
  for (int i = 0; i < LANES; i++) {
    const float* s = slots[threadIdx.x][i];
    squares += double(s[2]) + double(s[0]) * (double(s[1]) - mean) * (double(s[1]) - mean);
  }
  to[3 * k] = count, to[3 * k + 1] = mean + double(d.b1[k]), to[3 * k + 2] = squares;
}

// moments (rows, K, 3): a row is a block if there is one block of hidden channels, else a tile.
template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    decoder_same_statistics_kernel(Call d, double* moments) {
  INFOPRO_DYNAMIC_SHARED(memory);
  Features<T> features(reinterpret_cast<char*>(memory));
  clear(features.map, d.p.features());
  const bool alone = d.blocks == 1;
  const float start[2] = {};  // the mean alone takes the bias
  Moments sums = {};
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Region r(d, tile);
    features.forget();
    UNROLL(1) for (int block = 0; block < d.blocks; block++) {
      if (!alone) sums = {};
      each_hidden<T>(d, r, features, block, start,
                     [&](int y, int x, const Accumulators& z) { add_moments(r, y, x, z, sums); });
      if (alone && tile + int(gridDim.x) < d.tiles()) continue;
      write_moments<T>(d, sums, features.map, block,
          moments + int64_t(alone ? blockIdx.x : tile) * d.s.K * 3);
      features.clear_map(d);
    }
  }
}

// What a tile adds to the gradients of a block of hidden channels. They are not kept in registers over tiles:
// the other steps need those.
template <class T> struct LossSums {
  float d_beta[2], d_gamma[2];
  Taps d_w2;

  // to: a row of partial sums, d gamma, d beta, d W2, d b2, loss.
  DEVICE void write(const Call& d, char* memory, int block, bool add, float* to) {
    const int K = d.s.K, lane = lane_of();
    auto put = [&](int at, float sum, bool more) { to[at] = more ? to[at] + sum : sum; };
    sum_warps<1>(d_w2, memory, d.p.features(), [&](int i, float sum, bool later) {
      const int tap = i / (4 * WARP), r = i / WARP % 4, from = i % WARP, o = from % 4 * 2 + r % 2,
                k = GROUP * block + channel_of(place_of<T>(from / 4 + r / 2 * 8));
      if (o < 3 && k < K) put(2 * K + (o * K + k) * 9 + tap, d.pixel_weight * sum, add || later);
    });
    __syncthreads();
    float(*slots)[2 * GROUP] = reinterpret_cast<float(*)[2 * GROUP]>(memory);
    UNROLL_ALL for (int c = 0; c < 2; c++) {
      float gamma = d_gamma[c], beta = d_beta[c];
      UNROLL_ALL for (int step = 1; step < 4; step *= 2) {
        gamma += __shfl_xor_sync(ALL_LANES, gamma, step);
        beta += __shfl_xor_sync(ALL_LANES, beta, step);
      }
      float* slot = slots[warp_of()] + 8 * c + lane / 4;
      if (lane % 4 == 0) slot[0] = gamma, slot[GROUP] = beta;
    }
    __syncthreads();
    const int i = threadIdx.x, k = GROUP * block + i % GROUP;
    if (i >= 2 * GROUP || k >= K) return;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += slots[warp][i];
    const float scale = i < GROUP ? d.norm[INVERSE_STD * GROUP * d.blocks + k] : 1.0f;
    put(i < GROUP ? k : K + k, d.pixel_weight * scale * sum, add);
  }
};

// The loss, and the gradient of b2, of which a lane has logits 2 (t % 2) and the next.
DEVICE void write_pixels(const Call& d, const float (&pixels)[3], char* memory, float* to) {
  float(*slots)[4] = reinterpret_cast<float(*)[4]>(memory);
  const int lane = lane_of();
  float sum[4] = {pixels[0], 0.0f, 0.0f, 0.0f};
  UNROLL_ALL for (int o = 0; o < 3; o++) sum[1 + o] = lane % 2 == o / 2 ? pixels[1 + o % 2] : 0.0f;
  __syncthreads();
  UNROLL_ALL for (int i = 0; i < 4; i++) {
    sum[i] = warp_sum(sum[i]);
    if (lane == 0) slots[warp_of()][i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  float all = 0.0f;
  for (int warp = 0; warp < WARPS; warp++) all += slots[warp][threadIdx.x];
  to[threadIdx.x == 0 ? 29 * d.s.K + 3 : 29 * d.s.K + threadIdx.x - 1] =
      threadIdx.x == 0 ? all : d.pixel_weight * all;
}

// partial (blocks, 29 K + 4); without needs_grad only the loss is used.
template <class T>
__global__ void __launch_bounds__(THREADS, Operand<T>::BYTES == 2 ? 2 : 1)
    decoder_same_loss_kernel(Call d, bool needs_grad, float* partial) {
  INFOPRO_DYNAMIC_SHARED(memory);
  Features<T> features(reinterpret_cast<char*>(memory));
  char *hidden = features.map + d.p.features(), *to = hidden + d.blocks * d.p.map();
  clear(features.map, d.p.shared);
  float *mine = partial + int64_t(blockIdx.x) * sums_columns(d.s.K), pixels[3] = {};
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Region r(d, tile);
    features.forget();
    if (d.p.tiles() > 1) {
      __syncthreads();
      clear(hidden, d.p.shared - d.p.features());
    }
    __syncthreads();
    UNROLL(1) for (int block = 0; block < d.blocks; block++) {
      const Channels start(d, START, block), scale(d, SCALE, block), shift(d, SHIFT, block);
      each_hidden<T>(d, r, features, block, start.v, [&](int y, int x, Accumulators& z) {
        UNROLL_ALL for (int row = 0; row < ROWS; row++) UNROLL_ALL for (int i = 0; i < 4; i++) z[row][i] =
            relu(fmaf(z[row][i], scale[i], shift[i]));
        store_hidden<T>(hidden + block * d.p.map(), r, y, x, z);
      });
    }
    __syncthreads();
    logits<T>(d, r, hidden, to, needs_grad, pixels);
    if (!needs_grad) continue;
    __syncthreads();
    UNROLL(1) for (int block = 0; block < d.blocks; block++) {
      LossSums<T> sums = {};
      const Channels start(d, START, block), scale(d, SCALE, block), shift(d, SHIFT, block);
      each_hidden<T>(d, r, features, block, start.v, [&](int y, int x, const Accumulators& z) {
        const int height = r.h - y, width = r.w - x - lane_of() % 4 * 2;  // what is left of the region
        hidden_gradient<T>(d, to, block, y, x, [&](int row, const float(&da)[4]) {
          UNROLL_ALL for (int i = 0; i < 4; i++) {
            const bool inside = row < height && i % 2 < width;
            const float v = z[row][i], dy = inside && fmaf(v, scale[i], shift[i]) > 0.0f ? da[i] : 0.0f;
            sums.d_beta[i / 2] += dy;
            sums.d_gamma[i / 2] = fmaf(dy, v, sums.d_gamma[i / 2]);
          }
        });
      });
      second_weight<T>(d, r, hidden + block * d.p.map(), to, sums.d_w2);
      sums.write(d, features.map, block, tile != int(blockIdx.x), mine);
      features.clear_map(d);
    }
  }
  write_pixels(d, pixels, features.map, mine);
}

// The gradient of the features in 16 channels on a tile, into the tensor.
DEVICE void store_gradient(const Call& d, const Region& r, const Maps& to, int chunk, int y, int x,
                           const Accumulators& g, float factor) {
  const int lane = lane_of(), c = GROUP * chunk + lane / 4, column = x + 2 * (lane % 4);
  const int64_t at = r.n * to.n + c * to.c + (r.y0 + y) * to.y + (r.x0 + column) * to.x;
  const bool pairs = to.dtype == Dtype::f32 && to.x == 1 && ((to.c | to.y | at) & 1) == 0 &&
                     reinterpret_cast<uintptr_t>(to.data) % 8 == 0 && r.owns_tile(y, x);
  UNROLL_ALL for (int half = 0; half < 2; half++) UNROLL_ALL for (int row = 0; row < ROWS; row++) {
    const int64_t offset = at + half * 8 * to.c + row * to.y;
    if (c + 8 * half >= d.s.C) continue;
    if (pairs) {
      *reinterpret_cast<float2*>(static_cast<float*>(to.data) + offset) = {factor * g[row][2 * half],
                                                                           factor * g[row][2 * half + 1]};
      continue;
    }
    UNROLL_ALL for (int i = 0; i < 2; i++) if (r.owns(y + row, column + i))
        store(to.data, to.dtype, offset + i * to.x, factor * g[row][2 * half + i]);
  }
}

// Set the gradient of z to zero where the region is not the tile's own.
template <class T> DEVICE void clear_neighbours(const Call& d, const Region& r, char* hidden) {
  constexpr int WORDS = PIXEL<T> / 16;
  for (int i = threadIdx.x; i < d.blocks * r.h * r.w * WORDS; i += THREADS) {
    const int pixel = i / WORDS % (r.h * r.w), y = pixel / r.w, x = pixel % r.w,
        block = i / WORDS / (r.h * r.w);
    char* at = hidden + block * d.p.map() + (y + 1) * LINE<T> + (x + 1) * PIXEL<T> + i % WORDS * 16;
    if (!r.owns(y, x)) *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
  }
}

// w1_partial (blocks, K, C, 9) or null; d_features with null data if it is not needed.
template <class T> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    decoder_same_backward_kernel(Call d, float* w1_partial, Maps d_features) {
  using Matrix = typename Operand<T>::Matrix;
  INFOPRO_DYNAMIC_SHARED(memory);
  Features<T> features(reinterpret_cast<char*>(memory));
  char *hidden = features.map + d.p.features(), *logits = hidden + d.blocks * d.p.map();
  clear(features.map, d.p.shared);
  const float factor = d.pixel_weight * *d.upstream;
  float* mine = w1_partial ? w1_partial + int64_t(blockIdx.x) * 9 * d.s.K * d.s.C : nullptr;
  for (int tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Region r(d, tile);
    features.forget();
    __syncthreads();
    if (d.p.tiles() > 1) {
      clear(hidden, d.blocks * d.p.map());
      __syncthreads();
    }
    load_logits<T>(d, r, logits);
    __syncthreads();
    UNROLL(1) for (int block = 0; block < d.blocks; block++) {  // the gradient of z
      const Channels start(d, START, block), scale(d, SCALE, block), shift(d, SHIFT, block),
          mean_dy(d, MEAN_DY, block), slope(d, SLOPE, block);
      each_hidden<T>(d, r, features, block, start.v, [&](int y, int x, Accumulators& z) {
        hidden_gradient<T>(d, logits, block, y, x, [&](int row, const float(&da)[4]) {
          UNROLL_ALL for (int i = 0; i < 4; i++) {
            const float v = z[row][i], dy = fmaf(v, scale[i], shift[i]) > 0.0f ? da[i] : 0.0f;
            z[row][i] = scale[i] * (dy - fmaf(v, slope[i], mean_dy[i]));
          }
        });
        store_hidden<T>(hidden + block * d.p.map(), r, y, x, z);
      });
    }
    __syncthreads();
    if (d_features.data) {
      const Window<T> window((warp_of() & ((1 << d.p.strips) - 1)) * 8);
      UNROLL(1) for (int chunk = 0; chunk < d.chunks; chunk++) {
        const Matrix* weights = static_cast<const Matrix*>(d.w1_back) + chunk * d.blocks * 9 * WARP;
        each_tile(d, r, [](int) {}, [&](int y, int x) {
          Accumulators g = {};
          UNROLL(1) for (int block = 0; block < d.blocks; block++)
            convolve<T>(hidden + block * d.p.map() + y * LINE<T>, window, weights + block * 9 * WARP, g);
          store_gradient(d, r, d_features, chunk, y, x, g, factor);
        });
      }
    }
    if (!mine) continue;
    if (d.p.tiles() > 1) {
      __syncthreads();
      clear_neighbours<T>(d, r, hidden);
      __syncthreads();
    }
    UNROLL(1) for (int chunk = 0; chunk < d.chunks; chunk++)
      UNROLL(1) for (int block = 0; block < d.blocks; block++) {
        Taps d_w1 = {};
        for (int row = 0; row < r.h; row += d.p.band) {
          features.hold(d, r, chunk, row);
          first_weight<T>(d, hidden + block * d.p.map(), features, row, smaller(row + d.p.band, r.h), d_w1);
        }
        const bool add = tile != int(blockIdx.x);
        sum_warps<2>(d_w1, features.map, d.p.features(), [&](int i, float sum, bool later) {
          const int half = i / (36 * WARP), tap = i / (4 * WARP) % 9, n = i / WARP % 4, from = i % WARP,
                    k = GROUP * block + channel_of(place_of<T>(from / 4 + n / 2 * 8)),
                    c = GROUP * chunk + channel_of(8 * half + from % 4 * 2 + n % 2);
          if (k >= d.s.K || c >= d.s.C) return;
          float* to = mine + (int64_t(k) * d.s.C + c) * 9 + tap;
          *to = add || later ? *to + factor * sum : factor * sum;
        });
        features.clear_map(d);
      }
  }
}

}  // namespace infopro::gpu::same
