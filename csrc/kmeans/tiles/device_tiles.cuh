// Kernel bodies of balanced k-means on CUDA: products of rows and centres on the tensor cores,
// priced and reduced in the registers that they come out in; nothing of size N x K is stored.
//
// A block has a fixed tile of 128 rows of one operand and walks over tiles of 128 rows of the
// other; each reduction runs along the walk. Both operands are padded with zeros to whole tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "support/cuda/device.h"

namespace onerec::tiles {

constexpr int kTile = 128;         // rows of both operands
constexpr int kDepth = 32;         // dimensions in shared memory at a time
constexpr int kThreads = 256;      // eight warps, four along the fixed tile and two along the other
constexpr int kLead = kDepth + 4;  // floats from row to row: the lanes of a warp hit 32 banks
constexpr int kStage = 2 * kTile * kLead;
constexpr int kSharedBytes = 2 * kStage * static_cast<int>(sizeof(float));
constexpr int kRoom = 128;         // candidates of an item
constexpr float kPadding = 1e30f;  // bias of a centre that is not there
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

// Calls body(tile, products) for each walked tile. Each operand goes in as two tf32 parts, hi hi +
// hi lo + lo hi, and the sums of kDepth dimensions are added up in float32: what ProductError
// bounds.
template <class Body>
__device__ void Walk(const Operands& in, int64_t fixed_tile, int64_t walked_tiles, float* shared,
                     Body&& body) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int depth_tiles = static_cast<int>(in.d / kDepth);
  const int64_t steps = walked_tiles * depth_tiles;
  const auto load = [&](int64_t step) {
    float* const stage = shared + step % 2 * kStage;
    const int64_t depth = step % depth_tiles * kDepth;
    const float* const fixed = in.fixed + fixed_tile * kTile * in.d + depth;
    const float* const walked = in.walked + step / depth_tiles * kTile * in.d + depth;
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
    ONEREC_UNROLL
    for (int kk = 0; kk < kDepth; kk += 8) {
      uint32_t left[2][4], left_low[2][4];
      ONEREC_UNROLL
      for (int m = 0; m < 2; ++m) {
        ONEREC_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float value = a[(16 * m + 8 * (e % 2)) * kLead + kk + 4 * (e / 2)];
          left[m][e] = ToTf32(value);
          left_low[m][e] = ToTf32(value - __uint_as_float(left[m][e]));
        }
      }
      ONEREC_UNROLL
      for (int n = 0; n < 8; ++n) {
        uint32_t right[2], right_low[2];
        ONEREC_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float value = b[8 * n * kLead + kk + 4 * e];
          right[e] = ToTf32(value);
          right_low[e] = ToTf32(value - __uint_as_float(right[e]));
        }
        ONEREC_UNROLL
        for (int m = 0; m < 2; ++m) {
          Mma(fresh[m][n], left_low[m], right);
          Mma(fresh[m][n], left[m], right_low);
          Mma(fresh[m][n], left[m], right);
        }
      }
    }
    const bool done = step % depth_tiles == depth_tiles - 1;
    ONEREC_UNROLL
    for (int at = 0; at < 64; ++at) (&sums[0][0][0])[at] += (&fresh[0][0][0])[at];
    if (!done) continue;
    body(step / depth_tiles, sums);
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
// within 2 (slope |x_i| + offset). squares[i] = |x_i|^2; lows[i] is the smallest.
struct Argmin {
  Operands in;  // fixed: items; walked: centres
  const float* bias;
  const float* squares;
  float slope, offset;
  int64_t rows, centre_tiles;
  int32_t* labels;
  float* lows;

  __device__ void operator()(int64_t tile, float* shared) const {
    float least[4], second[4];
    int32_t code[4];
    for (int r = 0; r < 4; ++r) {
      least[r] = second[r] = 2 * kPadding;
      code[r] = 0;
    }
    Walk(in, tile, centre_tiles, shared, [&](int64_t walked, const Products& products) {
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
      lows[item] = least[r];
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

// The candidates of each item: the centres whose value bias[k] - 2 x_i c_k is at most lows[i] +
// threshold, and of each group of centres the best if it is at most lows[i] + reach, both widened
// by what two values err. In no order, as code << 32 | bits of the value; counts[i] above kRoom:
// there are more than those.
struct Collect {
  Operands in;  // fixed: items; walked: centres
  const float* bias;
  const float* squares;
  const float* lows;
  float slope, offset;
  double threshold, reach;
  int64_t rows, centre_tiles;
  const int32_t* group_of;      // [centres]
  int64_t groups;               // 0: none has a leader
  unsigned long long* leaders;  // [rows, groups] all ones
  int32_t* counts;
  unsigned long long* found;  // [rows, kRoom]

  __device__ void operator()(int64_t tile, float* shared) const {
    auto* const taken = reinterpret_cast<int32_t*>(shared + 2 * kStage);
    if (threadIdx.x < kTile) taken[threadIdx.x] = 0;  // Walk has a barrier before its first tile
    float far[4];
    for (int r = 0; r < 4; ++r) far[r] = Limit(tile * kTile + Row(r), groups > 0);
    Walk(in, tile, centre_tiles, shared, [&](int64_t walked, const Products& products) {
      ONEREC_UNROLL
      for (int n = 0; n < 8; ++n) {
        ONEREC_UNROLL
        for (int side = 0; side < 2; ++side) {
          const auto k = static_cast<int32_t>(walked * kTile + WalkedRow() + 8 * n + side);
          const float own = bias[k];
          ONEREC_UNROLL
          for (int r = 0; r < 4; ++r) {
            const float value = own - 2 * products[r / 2][n][r % 2 * 2 + side];
            if (value <= far[r]) Take(tile, Row(r), k, value, taken);
          }
        }
      }
    });
    for (int64_t i = threadIdx.x; i < kTile * groups; i += kThreads) {
      const auto row = static_cast<int>(i / groups);
      const int64_t item = tile * kTile + row;
      if (item >= rows) break;
      const unsigned long long key = leaders[tile * kTile * groups + i];
      if (key == ~0ull) continue;
      const float value = Ordered(static_cast<uint32_t>(key >> 32));
      if (value > Limit(item, false)) Add(item, row, static_cast<uint32_t>(key), value, taken);
    }
    __syncthreads();
    const int64_t item = tile * kTile + threadIdx.x;
    if (threadIdx.x < kTile && item < rows) counts[item] = taken[threadIdx.x];
  }

 private:
  static __device__ int Row(int r) { return FixedRow() + 16 * (r / 2) + 8 * (r % 2); }

  // Bits that sort as the values do, and back.
  static __device__ uint32_t Order(float value) {
    const uint32_t bits = __float_as_uint(value);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  }
  static __device__ float Ordered(uint32_t order) {
    return __uint_as_float((order >> 31) != 0 ? order & 0x7FFFFFFFu : ~order);
  }

  __device__ float Limit(int64_t item, bool of_leaders) const {
    if (item >= rows) return -kPadding;
    const float error = 2 * (slope * sqrtf(squares[item]) + offset);
    const double limit = static_cast<double>(lows[item]) + (of_leaders ? reach : threshold) +
                         static_cast<double>(error);
    return nextafterf(static_cast<float>(limit < kPadding / 4 ? limit : kPadding / 4), kPadding);
  }

  __device__ void Take(int64_t tile, int row, int32_t k, float value, int32_t* taken) const {
    const int64_t item = tile * kTile + row;
    if (groups > 0) {
      atomicMin(leaders + item * groups + group_of[k],
                static_cast<unsigned long long>(Order(value)) << 32 | static_cast<uint32_t>(k));
      if (value > Limit(item, false)) return;
    }
    Add(item, row, static_cast<uint32_t>(k), value, taken);
  }

  __device__ void Add(int64_t item, int row, uint32_t k, float value, int32_t* taken) const {
    const int32_t at = atomicAdd(taken + row, 1);
    if (at >= kRoom) return;
    found[item * kRoom + at] = static_cast<unsigned long long>(k) << 32 | __float_as_uint(value);
  }
};

// The rows that have room, by code and without the gaps; one warp each. Row i begins at starts[i].
struct Pack {
  const int32_t* counts;
  const unsigned long long* found;
  int64_t rows;
  unsigned long long* total;  // 0
  unsigned long long* starts;
  int32_t* codes;
  float* values;

  __device__ void operator()(int64_t block) const {
    const int64_t row = block * (kThreads / 32) + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (row >= rows) return;
    const int32_t count = counts[row];
    if (count > kRoom) return;
    unsigned long long start = 0;
    if (lane == 0) {
      start = atomicAdd(total, static_cast<unsigned long long>(count));
      starts[row] = start;
    }
    start = __shfl_sync(kAll, start, 0);
    const unsigned long long* const own = found + row * kRoom;
    for (int32_t t = lane; t < count; t += 32) {
      const unsigned long long key = own[t];
      int32_t rank = 0;
      for (int32_t other = 0; other < count; ++other) rank += own[other] < key ? 1 : 0;
      codes[start + static_cast<unsigned>(rank)] = static_cast<int32_t>(key >> 32);
      values[start + static_cast<unsigned>(rank)] = __uint_as_float(static_cast<uint32_t>(key));
    }
  }
};

// Some rows and their squares side by side, zeros after them up to a whole tile; one warp each.
struct Gather {
  const float* x;
  const float* squares;
  const int64_t* subset;
  int64_t rows, d;
  float* some;
  float* some_squares;

  __device__ void operator()(int64_t block) const {
    const int64_t row = block * (kThreads / 32) + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t source = row < rows ? subset[row] : 0;
    for (int64_t j = lane; j < d; j += 32) some[row * d + j] = row < rows ? x[source * d + j] : 0;
    if (lane == 0) some_squares[row] = row < rows ? squares[source] : 0;
  }
};

}  // namespace onerec::tiles
