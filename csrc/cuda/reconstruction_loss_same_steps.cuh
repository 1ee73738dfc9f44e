// The decoder on features as large as the image: the steps of its kernels, each on a region in shared memory.
#pragma once

#include "reconstruction_loss_same_maps.cuh"

namespace infopro::gpu::same {

// f(the dtype as a type): one loop a dtype instead of a branch for each number.
template <class F> DEVICE void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::f32)
    f(std::integral_constant<Dtype, Dtype::f32>());
  else if (dtype == Dtype::bf16)
    f(std::integral_constant<Dtype, Dtype::bf16>());
  else
    f(std::integral_constant<Dtype, Dtype::f16>());
}

DEVICE void clear(char* p, int bytes) {
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS)
    *reinterpret_cast<uint4*>(p + i) = uint4{0, 0, 0, 0};
}

// ---- features ----

// The map of features, and which it holds.
template <class T> struct Features {
  char* map;
  int chunk = -1, first = -1;

  DEVICE explicit Features(char* map) : map(map) {}

  // Hold row `row` of the region and the rest of its band, of the channels of `chunk`. All threads call it.
  DEVICE void hold(const Call& d, const Region& r, int wanted, int row) {
    const int from = d.p.band >= r.h ? 0 : row / d.p.band * d.p.band;
    if (wanted == chunk && from == first) return;
    chunk = wanted, first = from;
    __syncthreads();
    with_dtype(d.features.dtype, [&](auto dtype) { load<decltype(dtype)::value>(d, r); });
    __syncthreads();
  }

  DEVICE void forget() { chunk = -1; }

  DEVICE void clear_map(const Call& d) {  // after other use
    __syncthreads();
    clear(map, d.p.features());
    forget();
  }

  DEVICE const char* row(int y) const { return map + (y - first) * LINE<T>; }  // the row above row y

 private:
  // A warp takes a row, a lane four channels of a pixel. Channels behind the last repeat it: weights there
  // are zero. Places outside the region are zero from the start, unless a tile has neighbours at its sides.
  template <Dtype DTYPE> DEVICE void load(const Call& d, const Region& r) {
    const Maps& m = d.features;
    const int lane = lane_of(), t = lane % 4, g = lane / 4, rows = smaller(d.p.band, r.h - first) + 2;
    auto channel = [&](int j) { return smaller(GROUP * chunk + channel_of(4 * t + j), d.s.C - 1) * m.c; };
    auto move = [&](int row, int x) {
      const int y = r.y0 + first + row - 1, column = r.x0 + x;
      float v[4] = {};
      if (unsigned(y) < unsigned(d.s.H) && unsigned(column) < unsigned(d.s.W)) {
        const int64_t at = r.n * m.n + y * m.y + column * m.x;
        UNROLL_ALL for (int j = 0; j < 4; j++) v[j] = gpu::load(m.data, DTYPE, at + channel(j));
      }
      store_shared(map + row * LINE<T> + vector_at<T>(x + 1, t), Operand<T>::vector(v[0], v[1], v[2], v[3]));
    };
    for (int row = warp_of(); row < rows; row += WARPS)
      UNROLL(1) for (int x = g; x < r.w; x += 8) move(row, x);
    if (d.p.tiles_x > 1)
      for (int side = threadIdx.x / 4; side < 2 * rows; side += THREADS / 4)
        move(side / 2, side % 2 ? r.w : -1);
  }
};

// ---- hidden channels ----

// A row of the norm's coefficients, for the lane's channels g and g + 8 of a block.
struct Channels {
  float v[2];

  DEVICE Channels(const Call& d, int row, int block) {
    const float* from = d.norm + (row * d.blocks + block) * GROUP + lane_of() / 4;
    v[0] = __ldg(from), v[1] = __ldg(from + 8);
  }
  DEVICE float operator[](int i) const { return v[i / 2]; }  // of accumulator i
};

// use(y, x) for each of the warp's tiles of ROWS x 8 pixels in the region; before(y) in all warps, for the
// first row of a pass of all warps.
template <class B, class F> DEVICE void each_tile(const Call& d, const Region& r, B before, F use) {
  const int warp = warp_of(), x = (warp & ((1 << d.p.strips) - 1)) * 8, below = (warp >> d.p.strips) * ROWS;
  for (int y = 0; y < r.h; y += d.p.pass_rows()) {
    before(y);
    if (y + below < r.h && x < r.w) use(y + below, x);
  }
}

// use(y, x, z): z of a block of hidden channels on each tile of the region, on top of `start`.
template <class T, class F> DEVICE void each_hidden(const Call& d, const Region& r, Features<T>& features,
                                                    int block, const float (&start)[2], F use) {
  using Matrix = typename Operand<T>::Matrix;
  const Window<T> window((warp_of() & ((1 << d.p.strips) - 1)) * 8);
  const Matrix* weights = static_cast<const Matrix*>(d.w1) + block * d.chunks * 9 * WARP;
  Accumulators z;
  const int below = (warp_of() >> d.p.strips) * ROWS;
  each_tile(
      d, r,
      [&](int y) {
        UNROLL_ALL for (int row = 0; row < ROWS; row++)
          UNROLL_ALL for (int i = 0; i < 4; i++) z[row][i] = start[i / 2];
        UNROLL(1) for (int chunk = 0; chunk < d.chunks; chunk++) {
          features.hold(d, r, chunk, y);
          if (y + below < r.h) convolve<T>(features.row(y + below), window, weights + chunk * 9 * WARP, z);
        }
      },
      [&](int y, int x) { use(y, x, z); });
}

// use(row, da): the gradient in the ReLU's result, in each two of a tile's rows, from the map of the logits'
// gradient. Two rows and one matrix at a time: the registers that four rows need are not there.
template <class T, class F>
DEVICE void hidden_gradient(const Call& d, const char* logits, int block, int y, int x, F use) {
  using Vector = typename Operand<T>::Vector;
  const int lane = lane_of();
  const Vector* from = reinterpret_cast<const Vector*>(logits) + y * PITCH + x + lane / 4 + lane % 4;
  const auto* weights = static_cast<const typename Operand<T>::Matrix*>(d.w2_back) + block * 3 * WARP + lane;
  UNROLL_ALL for (int row = 0; row < ROWS; row += 2) {
    float da[2][4] = {};
    UNROLL_ALL for (int dy = 0; dy < 3; dy++) {
      const auto w = load_matrix<T>(weights + dy * WARP);
      UNROLL_ALL for (int r = 0; r < 2; r++)
          Operand<T>::product(da[r], w, load_shared<Vector>(from + (row + r + dy) * PITCH));
    }
    UNROLL_ALL for (int r = 0; r < 2; r++) use(row + r, da[r]);
  }
}

// ---- logits ----

// The logits of all pixels of the tile: their loss, and its gradient in them, into the map and d.kept if
// needs_grad. sums: loss; gradient in logits 2 (t % 2) and the next.
template <class T> DEVICE void logits(const Call& d, const Region& r, const char* hidden, char* to,
                                      bool needs_grad, float (&sums)[3]) {
  using Pair = typename Operand<T>::Pair;
  using Vector = typename Operand<T>::Vector;
  const int lane = lane_of(), t = lane % 4, first = 2 * (t % 2), wide = d.p.strips > 1,
            warp = warp_of(), x0 = (warp & wide) * 16;
  const bool two = first == 0;  // there is no fourth logit
  const float bias[2] = {d.b2[first], two ? d.b2[1] : 0.0f};
  const PixelRows<T> rows(x0);
  const Maps& m = d.target.maps;
  UNROLL(1) for (int y0 = 2 * (warp >> wide); y0 < r.h; y0 += 2 * WARPS >> wide) {
    const int y = y0 + t / 2, x = x0 + lane / 4;
    bool own[2][2];
    float target[2][2], sum[3][4] = {{bias[0], bias[1], bias[0], bias[1]}};
    UNROLL_ALL for (int i = 0; i < 2; i++) UNROLL_ALL for (int j = 0; j < 2; j++) {
      own[i][j] = r.owns(y, x + 8 * i) && (j == 0 || two);
      const int64_t at = r.n * m.n + (r.y0 + y) * m.y + (r.x0 + x + 8 * i) * m.x;
      target[i][j] = own[i][j] ? d.target.at(first + j, at) : 0.0f;
    }
    UNROLL(1) for (int block = 0; block < d.blocks; block++) {  // columns of B: 4 row + logit
      const char* map = hidden + block * d.p.map() + y0 * LINE<T>;
      const Vector* w = static_cast<const Vector*>(d.w2) + block * 12 * WARP + lane;
      UNROLL_ALL for (int e = 0; e < 4; e++) UNROLL_ALL for (int dx = 0; dx < 3; dx++)
          Operand<T>::product(sum[dx], rows.load(map + e * LINE<T>, dx), load_now(w + (3 * e + dx) * WARP));
    }
    float g[2][2];
    UNROLL_ALL for (int i = 0; i < 2; i++) UNROLL_ALL for (int j = 0; j < 2; j++) {
      const int a = 2 * i + j;
      const LossAndGradient pixel = pixel_loss(d.pixel, sum[0][a] + sum[1][a] + sum[2][a], target[i][j]);
      g[i][j] = own[i][j] ? pixel.gradient : 0.0f;
      sums[0] += own[i][j] ? pixel.loss : 0.0f;
      sums[1 + j] += g[i][j];
    }
    if (!needs_grad) continue;
    UNROLL_ALL for (int i = 0; i < 2; i++) if (own[i][0]) {
      const int column = x + 8 * i;
      const Pair pair = Operand<T>::pair(g[i][0], g[i][1]);
      const int64_t kept = (r.n * d.s.H + r.y0 + y) * d.s.W + r.x0 + column;
      store_shared(to + (((y + 1) * PITCH + column + 1) * 2 + t % 2) * sizeof(Pair), pair);
      static_cast<Pair*>(d.kept)[2 * kept + t % 2] = pair;
    }
  }
}

// The map of the logits' gradient from d.kept: the region and the pixels around it.
template <class T> DEVICE void load_logits(const Call& d, const Region& r, char* to) {
  using Vector = typename Operand<T>::Vector;
  for (int i = threadIdx.x; i < (r.h + 2) * PITCH; i += THREADS) {
    const int y = r.y0 + i / PITCH - 1, x = r.x0 + i % PITCH - 1;
    Vector v = {};
    if (unsigned(y) < unsigned(d.s.H) && unsigned(x) < unsigned(d.s.W))
      v = static_cast<const Vector*>(d.kept)[(r.n * d.s.H + y) * d.s.W + x];
    reinterpret_cast<Vector*>(to)[i] = v;
  }
}

// ---- gradients of weights ----

using Taps = float[9][4];  // accumulators of a product for each tap

// sums += the hidden map times the logits' gradient: rows are places, columns logits.
template <class T>
DEVICE void second_weight(const Call& d, const Region& r, const char* hidden, const char* logits,
    Taps& sums) {
  const int wide = d.p.strips > 1, warp = warp_of(), x = (warp & wide) * 16;
  const PixelPlaces<T> places(x);
  const LogitColumns<T> columns(x + 1);
  UNROLL(1) for (int y = 2 * (warp >> wide); y < r.h; y += 2 * WARPS >> wide) {
    typename Operand<T>::Vector g[2];
    UNROLL_ALL for (int row = 0; row < 2; row++) g[row] =
        columns.load(logits + (y + row + 1) * PITCH * 4 * Operand<T>::BYTES);
    UNROLL_ALL for (int i = 0; i < 4; i++) UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const auto a = places.load(hidden + (y + i) * LINE<T>, dx);
      UNROLL_ALL for (int row = 0; row < 2; row++) if (i - row >= 0 && i - row < 3)
          Operand<T>::product(sums[3 * (i - row) + dx], a, g[row]);
    }
  }
}

// sums += the gradient of z times the band of features, in rows [first, last): rows are places of the hidden
// channels, columns places 8 half + 0..7 of the features.
template <class T> DEVICE void first_weight(const Call& d, const char* hidden, const Features<T>& features,
                                            int first, int last, Taps& sums) {
  const int wide = d.p.strips > 1, pair = warp_of() / 2, x = (pair & wide) * 16;
  const PixelPlaces<T> places(x);
  const HalfPlaces<T> halves(x, warp_of() % 2);
  UNROLL(1) for (int y = first + 2 * (pair >> wide); y < last; y += WARPS >> wide) {
    typename Operand<T>::Matrix a[2];
    UNROLL_ALL for (int row = 0; row < 2; row++) a[row] = places.load(hidden + (y + row + 1) * LINE<T>, 1);
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) UNROLL_ALL for (int i = 0; i < 4; i += 2) {
      typename Operand<T>::Vector v[2];
      halves.load(features.row(y + i), dx, v);
      UNROLL_ALL for (int j = 0; j < 2; j++) UNROLL_ALL for (int row = 0; row < 2; row++)
          if (i + j - row >= 0 && i + j - row < 3)
              Operand<T>::product(sums[3 * (i + j - row) + dx], a[row], v[j]);
    }
  }
}

// use(number, sum, later): sums over the warps of their lanes' accumulators, number 32 i + lane of each of
// GROUPS groups of warps, warp % GROUPS. The warps come in rounds, as many at a time as the memory holds.
template <int GROUPS, class F> DEVICE void sum_warps(const Taps& sums, char* memory, int bytes, F use) {
  constexpr int NUMBERS = 36 * WARP;
  float* slots = reinterpret_cast<float*>(memory);
  const int warp = warp_of(), lane = lane_of(), together = smaller(WARPS, bytes / (4 * NUMBERS) / 2 * 2);
  for (int first = 0; first < WARPS; first += together) {
    __syncthreads();
    if (warp >= first && warp < first + together)
      UNROLL_ALL for (int i = 0; i < 36; i++) slots[(warp - first) * NUMBERS + WARP * i + lane] =
          sums[i / 4][i % 4];
    __syncthreads();
    const int last = smaller(together, WARPS - first);
    for (int i = threadIdx.x; i < GROUPS * NUMBERS; i += THREADS) {
      float sum = 0.0f;
      for (int from = i / NUMBERS; from < last; from += GROUPS) sum += slots[from * NUMBERS + i % NUMBERS];
      use(i, sum, first > 0);
    }
  }
}

}  // namespace infopro::gpu::same
