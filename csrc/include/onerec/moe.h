// The feed-forward experts of a sparse mixture on packed weights, forward only.
#pragma once

#include <cstdint>

#include "onerec/export.h"
#include "onerec/packed_gemm.h"

namespace onerec {

enum class Activation { kSwiGlu = 0, kGeGlu = 1, kGelu = 2, kRelu = 3 };

// Experts first .. first + count - 1. `gate`, `up` and `down` are the packed matrices of the first
// one: [hidden, width], [hidden, width] and [width, hidden]; the next expert's lie `stride` bytes
// after each. The plain activations (kGelu, kRelu) have no `up`.
struct PackedExperts {
  const void* gate = nullptr;
  const void* up = nullptr;
  const void* down = nullptr;
  WeightType type = WeightType::kFloat32;
  Activation activation = Activation::kSwiGlu;
  int64_t count = 0;
  int64_t width = 0;
  int64_t hidden = 0;
  int64_t first = 0;
  int64_t stride = 0;  // 0: the matrices of one kind follow one another, PackedBytes apart
};

// Bytes that MoeForward needs for up to `tokens` tokens of `slots` experts each.
ONEREC_API int64_t MoeWorkspaceBytes(int64_t tokens, int64_t slots, const PackedExperts& experts);

// y[t] (row t at y + t * y_stride) = (or, where `add`, +=) sum over j of gates[t][j]
// FFN_{ids[t][j]}(x[t]), added in the order of j. ids and gates are [tokens, slots]; an id of no
// expert here adds nothing. A row of y depends on its own row of x, ids and gates alone, not on the
// other rows or the threads; AVX2 and AVX-512 agree bit for bit. `workspace` is aligned to 64
// bytes. Allocates nothing.
ONEREC_API void MoeForward(const float* x, int64_t tokens, int64_t x_stride, const int64_t* ids,
                           const float* gates, int64_t slots, const PackedExperts& experts,
                           void* workspace, float* y, int64_t y_stride, bool add, int num_threads);

}  // namespace onerec
