// The decoder on features as large as the image: tiles, and maps in shared memory, for products on tensor
// cores.
//
// A block takes a tile of the image at a time. Its region is the tile and the pixels next to it: the whole
// image if that is at most 32 wide and fits. Shared memory holds maps of a region with a border of one pixel,
// as [pixel][16 channels] in the operands' type:
//     features  16 channels at a time, of `band` rows of the region at a time
//     hidden    all hidden channels, 16 a map: the ReLU's result, or the gradient of z
//     logits    the gradient of the loss in the three logits and a zero, as [pixel][4]
// Place p of a pixel holds channel p / 2 + 8 (p % 2): a lane's accumulators, channels g and g + 8, are
// neighbours. A pixel is four vectors (mma.cuh), vector t at place t ^ swizzle(x). So rows of vectors, for
// products over channels, and columns of numbers, for products over pixels, are read without bank conflicts.
// The right border of a row is the left border of the next.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "pixel.cuh"
#include "reconstruction_loss_plan.cuh"

namespace infopro::gpu::same {

constexpr int GROUP = 16;    // channels of a map
constexpr int PITCH = 33;    // pixels from a row of a map to the next
constexpr int ROWS = 4;      // of a warp's tile, eight pixels wide
constexpr int LEAST = 9216;  // bytes of the features' map, which sums of warps take too

// Places of a map. Warps read whole tiles, and two places behind the last.
__host__ __device__ inline int places(int rows) { return (round_up(rows, ROWS) + 2) * PITCH + 2; }

struct Plan {
  int tile_h, tile_w, tiles_y, tiles_x;
  int rows;    // most rows of a region
  int strips;  // log2 of the strips of eight columns in a region
  int band;
  int bytes;   // of an operand
  int shared;  // bytes; 0 if nothing fits

  // Blocks on a multiprocessor. The registers of operands of 4 bytes leave room for one.
  int blocks(const Device& device) const {
    return bytes == 2 && 2 * (shared + 1024) <= device.shared_per_multiprocessor ? 2 : 1;
  }
  __host__ __device__ int tiles() const { return tiles_y * tiles_x; }
  __host__ __device__ int pass_rows() const { return ROWS * WARPS >> strips; }  // of all warps' tiles
  __host__ __device__ int map() const { return places(rows) * GROUP * bytes; }
  __host__ __device__ int features() const { return larger(places(band) * GROUP * bytes, LEAST); }
};

// How many hidden channels fit any GPU, in the smallest tiles.
__host__ __device__ inline int most_hidden(int bytes) { return bytes == 2 ? 192 : 96; }

// Fewest rounds of warps' tiles; a block that is alone on a multiprocessor waits more.
inline Plan make_plan(const Shape& s, int bytes, const Device& device) {
  constexpr double ALONE = 1.6, RELOAD = 1.1;
  Plan p = {}, best = {};
  p.bytes = bytes;
  for (p.tiles_x = s.W <= 32 ? 1 : 2;; p.tiles_x++) {  // 33 places of a row hold 31 pixels and a border
    p.tile_w = ceil_div(s.W, p.tiles_x);
    if (p.tiles_x == 1 || p.tile_w + smaller(p.tiles_x - 1, 2) < 32) break;
  }
  const int columns = smaller(s.W, p.tile_w + 2);
  p.strips = columns > 16 ? 2 : columns > 8 ? 1 : 0;
  double least = 0;
  for (int tiles_y = 1; tiles_y <= s.H; tiles_y++) {
    p.tile_h = ceil_div(s.H, tiles_y), p.tiles_y = ceil_div(s.H, p.tile_h);
    p.rows = smaller(s.H, p.tile_h + smaller(p.tiles_y - 1, 2));
    // What a tile takes beside its passes, loads and sums of weights' gradients, counts as one more.
    const double passes = double(p.tiles_y) * (1 + ceil_div(p.rows, p.pass_rows()));
    if (least > 0 && passes >= least) break;
    for (p.band = p.rows; p.band > 0; p.band = (p.band - 1) / p.pass_rows() * p.pass_rows()) {
      p.shared = p.features() + ceil_div(s.K, GROUP) * p.map() + round_up(places(p.rows) * 4 * bytes, 16);
      const double cost = passes * (p.blocks(device) == 2 ? 1 : ALONE) * (p.band < p.rows ? RELOAD : 1);
      if (p.shared <= device.shared_per_block && (least == 0 || cost < least)) least = cost, best = p;
    }
  }
  return best;
}

// A call, as kernels read it. Weights are matrices and vectors in the order of their reads.
struct Call {
  Shape s;
  Plan p;
  int chunks, blocks;  // of 16 channels of the features, and of the hidden channels
  Maps features;
  Target target;
  Pixel pixel;
  float pixel_weight;                        // 1 / (3 N H W)
  const float* upstream;
  const void *w1, *w1_back, *w2, *w2_back;
  Numbers b1, b2;
  const float* norm;                         // (6, 16 blocks)
  void* kept;                                // (N, H, W) vectors: the gradient in the logits

  __host__ __device__ int tiles() const { return s.N * p.tiles(); }
};

// Rows [0, h) and columns [0, w) of a region lie at (y0, x0) of the image; its tile is rows [top, bottom) and
// columns [left, right).
struct Region {
  int64_t n;
  int y0, x0, h, w, top, bottom, left, right;

  DEVICE Region(const Call& d, int index) {
    const int tile = index % d.p.tiles(), y = tile / d.p.tiles_x * d.p.tile_h,
              x = tile % d.p.tiles_x * d.p.tile_w;
    n = index / d.p.tiles();
    y0 = larger(y - 1, 0), x0 = larger(x - 1, 0);
    h = smaller(y + d.p.tile_h + 1, d.s.H) - y0, w = smaller(x + d.p.tile_w + 1, d.s.W) - x0;
    top = y - y0, bottom = smaller(y + d.p.tile_h, d.s.H) - y0;
    left = x - x0, right = smaller(x + d.p.tile_w, d.s.W) - x0;
  }

  DEVICE bool owns(int y, int x) const { return y >= top && y < bottom && x >= left && x < right; }
  DEVICE bool owns_tile(int y, int x) const { return owns(y, x) && y + ROWS <= bottom && x + 8 <= right; }
};

// Blocks for which the registers of a multiprocessor must suffice. Float32 holds its operands in two parts.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T> constexpr int BLOCKS = 1;  // with half the registers the compiler for these spills
#else
template <class T> constexpr int BLOCKS = Operand<T>::WORDS == 4 ? 1 : 2;
#endif

// ---- places ----

DEVICE constexpr int channel_of(int place) { return place / 2 + 8 * (place & 1); }

// x + 8 has the swizzle of x.
template <class T> DEVICE int swizzle(int x) {
  return Operand<T>::BYTES == 4 ? (x & 2) | (x >> 2 & 1) : x >> 1 & 2;
}

template <class T> constexpr int PIXEL = GROUP * Operand<T>::BYTES;  // bytes of a pixel of a map
template <class T> constexpr int LINE = PITCH * PIXEL<T>;            // of a row

// Byte of vector t of column x, the border being column 0.
template <class T> DEVICE int vector_at(int x, int t) {
  return x * PIXEL<T> + (t ^ swizzle<T>(x)) * 4 * Operand<T>::BYTES;
}

// The same for the lane: column x + g + dx of a convolution, vector t.
template <class T> struct Window {
  int at[3];

  DEVICE explicit Window(int x) {
    const int lane = lane_of();
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) at[dx] = vector_at<T>(x + lane / 4 + dx, lane % 4);
  }
};

using Accumulators = float[ROWS][4];  // channels g (0, 1) and g + 8 (2, 3), columns 2 t (0, 2) and 2 t + 1

// d += the 3x3 convolution of the rows from `rows` on, of 16 channels by a matrix for each column and row of
// taps. Weights are A, pixels are B.
template <class T> DEVICE void convolve(const char* rows, const Window<T>& window, const void* weights,
                                        Accumulators& d) {
  using Matrix = typename Operand<T>::Matrix;
  const Matrix* w = static_cast<const Matrix*>(weights) + lane_of();
  UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
    Matrix tap[3];
    UNROLL_ALL for (int dy = 0; dy < 3; dy++) tap[dy] = load_matrix<T>(w + (3 * dx + dy) * WARP);
    UNROLL_ALL for (int i = 0; i < ROWS + 2; i++) {
      const auto v = load_shared<typename Operand<T>::Vector>(rows + i * LINE<T> + window.at[dx]);
      UNROLL_ALL for (int r = 0; r < ROWS; r++) if (i - r >= 0 && i - r < 3)
          Operand<T>::product(d[r], tap[i - r], v);
    }
  }
}

// Store the lane's accumulators, whose pixels are row `y` and column `x` of the region, where those lie in
// it.
template <class T> DEVICE void store_hidden(char* map, const Region& r, int y, int x, const Accumulators& d) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  UNROLL_ALL for (int i = 0; i < 2; i++) {
    const int column = x + 2 * t + i;
    char* to = map + (y + 1) * LINE<T> + vector_at<T>(column + 1, g / 2) + g % 2 * 2 * Operand<T>::BYTES;
    if (column < r.w)
      UNROLL_ALL for (int row = 0; row < ROWS; row++) if (y + row < r.h)
          store_shared(to + row * LINE<T>, Operand<T>::pair(d[row][i], d[row][2 + i]));
  }
}

// Sixteen pixels of a row from column x + dx on, as rows of A. Pointers are to the row's first place.
template <class T> struct PixelRows {
  int at[3];

  DEVICE explicit PixelRows(int x) {
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const int lane = lane_of(), column = x + dx + lane % 16;
      at[dx] = column * PIXEL<T> +
               16 * (lane / 16 ^ (Operand<T>::BYTES == 2 ? swizzle<T>(column) / 2 : swizzle<T>(column)));
    }
  }

  DEVICE typename Operand<T>::Matrix load(const char* row, int dx) const {
    const uint4 first = load_matrices<false>(row + at[dx]);
    if constexpr (Operand<T>::BYTES == 2)
      return {{first}};
    else
      return Operand<T>::registers(first, load_matrices<false>(row + (at[dx] ^ 32)));
  }
};

// The same pixels as the contraction, the 16 places of the map as rows of A: row m is place place_of(m).
template <class T> struct PixelPlaces {
  int at[3];  // 4 bytes an operand: column t; four columns on, the swizzle differs in its lowest bit

  DEVICE explicit PixelPlaces(int x) {
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const int lane = lane_of();
      if constexpr (Operand<T>::BYTES == 2) {
        const int column = x + dx + lane / 16 * 8 + lane % 8;
        at[dx] = column * PIXEL<T> + 16 * ((lane >> 3 & 1) ^ swizzle<T>(column) / 2);
      } else {
        const int column = x + dx + lane % 4;
        at[dx] = column * PIXEL<T> + 8 * (lane / 4 ^ 2 * swizzle<T>(column));
      }
    }
  }

  DEVICE typename Operand<T>::Matrix load(const char* row, int dx) const {
    if constexpr (Operand<T>::BYTES == 2) {
      return {{load_matrices<true>(row + at[dx])}};
    } else {
      uint2 v[4];
      UNROLL_ALL for (int i = 0; i < 4; i++) v[i] =
          load_shared<uint2>(row + (i % 2 ? at[dx] ^ 16 : at[dx]) + i * 4 * PIXEL<T>);
      return Operand<T>::registers({v[0].x, v[0].y, v[1].x, v[1].y}, {v[2].x, v[2].y, v[3].x, v[3].y});
    }
  }
};

template <class T> DEVICE constexpr int place_of(int m) {
  return Operand<T>::BYTES == 2 ? m : m % 8 * 2 + m / 8;
}

// The same of two rows, with places 8 half + g as columns of B.
template <class T> struct HalfPlaces {
  int at[3];

  DEVICE HalfPlaces(int x, int half) {
    UNROLL_ALL for (int dx = 0; dx < 3; dx++) {
      const int lane = lane_of(), g = lane / 4;
      if constexpr (Operand<T>::BYTES == 2) {
        const int column = x + dx + lane % 16;
        at[dx] = lane / 16 * LINE<T> + column * PIXEL<T> + 16 * (half ^ swizzle<T>(column) / 2);
      } else {
        const int column = x + dx + lane % 4;
        at[dx] = column * PIXEL<T> + 16 * ((2 * half + g / 4) ^ swizzle<T>(column)) + 4 * (g % 4);
      }
    }
  }

  DEVICE void load(const char* row, int dx, typename Operand<T>::Vector (&v)[2]) const {
    if constexpr (Operand<T>::BYTES == 2) {
      const uint4 both = load_matrices<true>(row + at[dx]);
      v[0] = {both.x, both.y}, v[1] = {both.z, both.w};
    } else {
      UNROLL_ALL for (int i = 0; i < 2; i++) {
        uint32_t word[4];
        UNROLL_ALL for (int j = 0; j < 4; j++) word[j] = load_shared<uint32_t>(
            row + i * LINE<T> + (j % 2 ? at[dx] ^ 16 : at[dx]) + j * 4 * PIXEL<T>);
        v[i] = {word[0], word[1], word[2], word[3]};
      }
    }
  }
};

// Sixteen pixels of a row of the logits' gradient as the contraction; column g of B is logit g % 4.
template <class T> struct LogitColumns {
  static constexpr int BYTES = 4 * Operand<T>::BYTES;  // of a pixel
  int at;

  DEVICE explicit LogitColumns(int x) {
    const int lane = lane_of(), t = lane % 4;
    at = (x + (Operand<T>::BYTES == 2 ? 2 * t : t)) * BYTES + lane / 4 % 4 * Operand<T>::BYTES;
  }

  DEVICE typename Operand<T>::Vector load(const char* row) const {
    if constexpr (Operand<T>::BYTES == 2) {
      auto number = [&](int pixel) { return uint32_t(load_shared<uint16_t>(row + at + pixel * BYTES)); };
      return {number(0) | number(1) << 16, number(8) | number(9) << 16};
    } else {
      auto number = [&](int pixel) { return load_shared<uint32_t>(row + at + pixel * BYTES); };
      return {number(0), number(4), number(8), number(12)};
    }
  }
};

}  // namespace infopro::gpu::same
