// y = x W^T for a weight matrix W that is packed once and read many times.
//
// Every y[r][j] is one chain of fused multiply-adds, acc = x[r][i] * W[j][i] + acc for i = 0 .. k-1
// from acc = 0 (on the baseline instruction set a product, then a sum). It therefore depends on row
// r and column j alone: not on the other rows, the threads or the tiles; AVX2 and AVX-512 agree bit
// for bit. With bfloat16 weights and Isa::kAvx512Bf16 x is rounded to bfloat16 too (nearest, ties
// to even; subnormals count as zero), and a link of the chain is the CPU's dot product of two
// pairs: twice as fast, and still a row's own (for k up to 131,000; beyond, x stays float).
#pragma once

#include <cstdint>

#include "onerec/export.h"

namespace onerec {

enum class WeightType { kFloat32 = 0, kBFloat16 = 1 };

// W [n, k] as ceil(n / 16) panels of 16 rows of W each; rows past n are zero. A panel is [k][16]
// floats, or [ceil(k / 2)][16][2] bfloat16 with a zero past an odd k. Sums are float always, and
// so is x but for the dot products above.
inline constexpr int64_t kPanelWidth = 16;

struct PackedMatrix {
  const void* data = nullptr;
  WeightType type = WeightType::kFloat32;
  int64_t n = 0;
  int64_t k = 0;
};

// Bytes of a packed [n, k]; a multiple of 64.
ONEREC_API int64_t PackedBytes(int64_t n, int64_t k, WeightType type);

// Asks the system for large pages for `bytes` of memory that nobody has touched yet. Packed weights
// are read faster from them; without any, nothing happens.
ONEREC_API void AdviseLargePages(void* data, int64_t bytes);

// Packs W, row j at w + j * row_stride; bfloat16 rounds to nearest, ties to even.
ONEREC_API void PackWeights(const float* w, int64_t n, int64_t k, int64_t row_stride,
                            WeightType type, void* packed, int num_threads);

// y [m, n] (row r at y + r * y_stride) = x W^T, or += it, the product being summed first, on up to
// num_threads threads. Allocates nothing.
ONEREC_API void PackedGemm(const float* x, int64_t m, int64_t x_stride, const PackedMatrix& w,
                           float* y, int64_t y_stride, bool add, int num_threads);

}  // namespace onerec
