// What the engine compiles once per instruction set; the same values on each of them. Plain data
// and declarations only.
#pragma once

#include <cstdint>

#include "support/dispatch.h"

namespace onerec {

struct EngineKernels {
  // out = x / rms(x) * weight, all of n floats.
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  // softmax(scale * x) of n >= 1 floats, in place.
  void (*softmax)(float* x, int64_t n, float scale);
  // gate = act(gate) * up, or act(gate) for the plain activations (2 gelu, 3 relu).
  void (*activate)(float* gate, const float* up, int64_t n, int activation);
  // y += a * x.
  void (*add_scaled)(float* y, const float* x, float a, int64_t n);
  // y += x, x being float, or bfloat16 where `half`.
  void (*add_row)(float* y, const void* x, bool half, int64_t n);
  // One head: out = softmax(scale * q k_t) v over `times` keys and values of n floats each, which
  // lie at row offset + head_offset; scores holds `times` floats.
  void (*attend)(const float* q, const float* keys, const float* values, const int64_t* offsets,
                 int64_t times, int64_t n, float scale, float* scores, float* out);
};

ONEREC_EACH_ISA(EngineKernels EngineTable();)

// Those of the instruction set in use.
EngineKernels CurrentEngineKernels();

}  // namespace onerec
