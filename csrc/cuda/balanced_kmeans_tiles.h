// Kernel bodies of balanced k-means on CUDA: products of rows and centres on the tensor cores,
// priced and reduced in the registers that they come out in; nothing of size N x K is stored.
//
// A block has a fixed tile of 128 rows of one operand and walks over tiles of 128 rows of the
// other; each reduction runs along the walk. Both operands are padded with zeros to whole tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.h"

namespace onerec::tiles {

constexpr int kTile = 128;         // rows of both operands
constexpr int kDepth = 32;         // dimensions in shared memory at a time
constexpr int kThreads = 256;      // eight warps, four along the fixed tile and two along the other
constexpr int kLead = kDepth + 4;  // floats from row to row: the lanes of a warp hit 32 banks
constexpr int kStage = 2 * kTile * kLead;
constexpr int kSharedBytes = 2 * kStage * static_cast<int>(sizeof(float));
constexpr float kPadding = 1e30f;       // bias of a centre that is not there
constexpr float kShareUnits = 1 << 24;  // units of a share of an item: sums are order-free
constexpr unsigned kAll = 0xFFFFFFFFu;

struct Operands {
  const float* fixed;   // [tiles * kTile, d]
  const float* walked;  // [tiles * kTile, d]
  int64_t d;            // a multiple of kDepth
};

// Products of a thread: of its fixed rows 16 m + 8 (e / 2) and walked rows 8 n + e % 2, counted
// from FixedRow() and WalkedRow().
using Products = float[2][8][4];

__device__ inline int FixedRow() {
  return static_cast<int>(threadIdx.x) / 32 % 4 * 32 + static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ inline int WalkedRow() {
  return static_cast<int>(threadIdx.x) / 128 * 64 + static_cast<int>(threadIdx.x) % 4 * 2;
}

// Calls body(tile, products) for walked tiles first..last-1. If kSplit, each operand goes in as two
// tf32 parts, hi hi + hi lo + lo hi, and the sums of kDepth dimensions are added up in float32:
// what ProductError bounds. Else as one.
template <bool kSplit, class Body>
__device__ void Walk(const Operands& in, int64_t fixed_tile, int64_t first, int64_t last,
                     float* shared, Body&& body) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int depth_tiles = static_cast<int>(in.d / kDepth);
  const int64_t steps = (last - first) * depth_tiles;
  const auto load = [&](int64_t step) {
    float* const stage = shared + step % 2 * kStage;
    const int64_t depth = step % depth_tiles * kDepth;
    const float* const fixed = in.fixed + fixed_tile * kTile * in.d + depth;
    const float* const walked = in.walked + (first + step / depth_tiles) * kTile * in.d + depth;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kTile * (kDepth / 4); i += kThreads) {
      const int line = i / (kDepth / 4), at = i % (kDepth / 4) * 4;
      CopyAsync(stage + line * kLead + at,
                (line < kTile ? fixed + line * in.d : walked + (line - kTile) * in.d) + at);
    }
  };
  Products sums = {};
  if (steps > 0) load(0);
  for (int64_t step = 0; step < steps; ++step) {
    WaitCopies();
    __syncthreads();  // this step's floats are here, and nobody reads the other stage any more
    if (step + 1 < steps) load(step + 1);
    const float* const a = shared + step % 2 * kStage + FixedRow() * kLead + lane % 4;
    const float* const b = shared + step % 2 * kStage +
                           (kTile + static_cast<int>(threadIdx.x) / 128 * 64 + lane / 4) * kLead +
                           lane % 4;
    Products fresh = {};
    Products& target = kSplit ? fresh : sums;
    ONEREC_UNROLL
    for (int kk = 0; kk < kDepth; kk += 8) {
      uint32_t left[2][4], left_low[2][4];
      ONEREC_UNROLL
      for (int m = 0; m < 2; ++m) {
        ONEREC_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float value = a[(16 * m + 8 * (e % 2)) * kLead + kk + 4 * (e / 2)];
          left[m][e] = ToTf32(value);
          if (kSplit) left_low[m][e] = ToTf32(value - __uint_as_float(left[m][e]));
        }
      }
      ONEREC_UNROLL
      for (int n = 0; n < 8; ++n) {
        uint32_t right[2], right_low[2];
        ONEREC_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float value = b[8 * n * kLead + kk + 4 * e];
          right[e] = ToTf32(value);
          if (kSplit) right_low[e] = ToTf32(value - __uint_as_float(right[e]));
        }
        ONEREC_UNROLL
        for (int m = 0; m < 2; ++m) {
          if (kSplit) {
            Mma(target[m][n], left_low[m], right);
            Mma(target[m][n], left[m], right_low);
          }
          Mma(target[m][n], left[m], right);
        }
      }
    }
    const bool done = step % depth_tiles == depth_tiles - 1;
    if (kSplit) {
      ONEREC_UNROLL
      for (int at = 0; at < 64; ++at) (&sums[0][0][0])[at] += (&fresh[0][0][0])[at];
    }
    if (!done) continue;
    body(first + step / depth_tiles, sums);
    ONEREC_UNROLL
    for (int at = 0; at < 64; ++at) (&sums[0][0][0])[at] = 0;
  }
  __syncthreads();  // shared memory is free again
}

// Bound on |computed - exact| of a split product, as a share of |row| |centre|: what the two parts
// leave out, sums of kDepth terms on the tensor cores, which cut off, and the sums of those.
inline double ProductError(int64_t d) {
  return (3.0 * kDepth + static_cast<double>(d) / kDepth + 16) * 0x1p-22;
}

// labels[i] = argmin_k bias[k] - 2 x_i c_k, or -1 where the two smallest are too close to tell:
// within 2 (slope |x_i| + offset). squares[i] = |x_i|^2.
struct Argmin {
  Operands in;  // fixed: items; walked: centres
  const float* bias;
  const float* squares;
  float slope, offset;
  int64_t rows, centre_tiles;
  int32_t* labels;

  __device__ void operator()(int64_t tile, float* shared) const {
    float least[4], second[4];
    int32_t code[4];
    for (int r = 0; r < 4; ++r) {
      least[r] = second[r] = 2 * kPadding;
      code[r] = 0;
    }
    Walk<true>(in, tile, 0, centre_tiles, shared, [&](int64_t walked, const Products& products) {
      ONEREC_UNROLL
      for (int n = 0; n < 8; ++n) {
        ONEREC_UNROLL
        for (int side = 0; side < 2; ++side) {
          const auto k = static_cast<int32_t>(walked * kTile + WalkedRow() + 8 * n + side);
          const float own = bias[k];
          ONEREC_UNROLL
          for (int r = 0; r < 4; ++r) {
            const float value = own - 2 * products[r / 2][n][r % 2 * 2 + side];
            if (value < least[r]) {
              second[r] = least[r];
              least[r] = value;
              code[r] = k;
            } else {
              second[r] = second[r] < value ? second[r] : value;
            }
          }
        }
      }
    });
    // The four lanes of a row, then the two warps of a row.
    auto* const codes = reinterpret_cast<int32_t*>(shared + 2 * kTile);
    ONEREC_UNROLL
    for (int r = 0; r < 4; ++r) {
      for (int step = 1; step < 4; step *= 2) {
        Join(least[r], second[r], code[r], __shfl_xor_sync(kAll, least[r], step),
             __shfl_xor_sync(kAll, second[r], step), __shfl_xor_sync(kAll, code[r], step));
      }
      const int row = FixedRow() + 16 * (r / 2) + 8 * (r % 2);
      if (threadIdx.x >= 128 && threadIdx.x % 4 == 0) {
        shared[row] = least[r];
        shared[kTile + row] = second[r];
        codes[row] = code[r];
      }
    }
    __syncthreads();
    for (int r = 0; r < 4 && threadIdx.x < 128 && threadIdx.x % 4 == 0; ++r) {
      const int row = FixedRow() + 16 * (r / 2) + 8 * (r % 2);
      Join(least[r], second[r], code[r], shared[row], shared[kTile + row], codes[row]);
      const int64_t item = tile * kTile + row;
      if (item >= rows) continue;
      const float error = slope * sqrtf(squares[item]) + offset;
      labels[item] = second[r] - least[r] > 2 * error ? code[r] : -1;
    }
  }

 private:
  static __device__ void Join(float& least, float& second, int32_t& code, float other_least,
                              float other_second, int32_t other_code) {
    const float larger = least > other_least ? least : other_least;
    const float smaller_second = second < other_second ? second : other_second;
    second = larger < smaller_second ? larger : smaller_second;
    if (other_least < least) {
      least = other_least;
      code = other_code;
    }
  }
};

// potentials[i] = -log2(sum_k exp2(-scale (bias[k] - 2 x_i c_k))) / scale: the entropic minimum.
// Rows that are not there get -kPadding.
struct RowPotentials {
  Operands in;  // fixed: items; walked: centres
  const float* bias;
  float scale;
  int64_t rows, centre_tiles;
  float* potentials;

  __device__ void operator()(int64_t tile, float* shared) const {
    float least[4], sum[4];
    for (int r = 0; r < 4; ++r) {
      least[r] = 2 * kPadding;
      sum[r] = 0;
    }
    Walk<false>(in, tile, 0, centre_tiles, shared, [&](int64_t walked, const Products& products) {
      ONEREC_UNROLL
      for (int r = 0; r < 4; ++r) {
        float values[16];
        float low = least[r];
        ONEREC_UNROLL
        for (int t = 0; t < 16; ++t) {
          const int64_t k = walked * kTile + WalkedRow() + 8 * (t / 2) + t % 2;
          values[t] = bias[k] - 2 * products[r / 2][t / 2][r % 2 * 2 + t % 2];
          low = low < values[t] ? low : values[t];
        }
        sum[r] *= exp2f((low - least[r]) * scale);
        ONEREC_UNROLL
        for (int t = 0; t < 16; ++t) sum[r] += exp2f((low - values[t]) * scale);
        least[r] = low;
      }
    });
    ONEREC_UNROLL
    for (int r = 0; r < 4; ++r) {
      for (int step = 1; step < 4; step *= 2) {
        Join(least[r], sum[r], __shfl_xor_sync(kAll, least[r], step),
             __shfl_xor_sync(kAll, sum[r], step));
      }
      const int row = FixedRow() + 16 * (r / 2) + 8 * (r % 2);
      if (threadIdx.x >= 128 && threadIdx.x % 4 == 0) {
        shared[row] = least[r];
        shared[kTile + row] = sum[r];
      }
    }
    __syncthreads();
    for (int r = 0; r < 4 && threadIdx.x < 128 && threadIdx.x % 4 == 0; ++r) {
      const int row = FixedRow() + 16 * (r / 2) + 8 * (r % 2);
      Join(least[r], sum[r], shared[row], shared[kTile + row]);
      const int64_t item = tile * kTile + row;
      potentials[item] = item < rows ? least[r] - log2f(sum[r]) / scale : -kPadding;
    }
  }

 private:
  __device__ void Join(float& least, float& sum, float other_least, float other_sum) const {
    const float low = least < other_least ? least : other_least;
    sum = sum * exp2f((low - least) * scale) + other_sum * exp2f((low - other_least) * scale);
    least = low;
  }
};

// sums[k] += over items of walked tiles first..last-1, in units of 1 / kShareUnits, of
// exp2(scale (potentials[i] - bias[k] + 2 x_i c_k)): the share of item i that centre k gets.
struct ColumnSums {
  Operands in;  // fixed: centres; walked: items
  const float* bias;
  const float* potentials;
  float scale;
  unsigned long long* sums;

  __device__ void operator()(int64_t tile, int64_t first, int64_t last, float* shared) const {
    unsigned long long units[4] = {};
    float own[4];
    for (int r = 0; r < 4; ++r) {
      own[r] = bias[tile * kTile + FixedRow() + 16 * (r / 2) + 8 * (r % 2)];
    }
    Walk<false>(in, tile, first, last, shared, [&](int64_t walked, const Products& products) {
      ONEREC_UNROLL
      for (int r = 0; r < 4; ++r) {
        uint32_t some = 0;
        ONEREC_UNROLL
        for (int t = 0; t < 16; ++t) {
          const float potential = potentials[walked * kTile + WalkedRow() + 8 * (t / 2) + t % 2];
          const float value = own[r] - 2 * products[r / 2][t / 2][r % 2 * 2 + t % 2];
          const float share = exp2f((potential - value) * scale);  // above 1 by rounding alone
          some += static_cast<uint32_t>((share < 1 ? share : 1) * kShareUnits + 0.5f);
        }
        units[r] += some;
      }
    });
    ONEREC_UNROLL
    for (int r = 0; r < 4; ++r) {
      for (int step = 1; step < 4; step *= 2) units[r] += __shfl_xor_sync(kAll, units[r], step);
      if (threadIdx.x % 4 == 0) {
        atomicAdd(sums + tile * kTile + FixedRow() + 16 * (r / 2) + 8 * (r % 2), units[r]);
      }
    }
  }
};

}  // namespace onerec::tiles
