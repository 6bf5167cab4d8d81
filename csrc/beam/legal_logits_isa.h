// What the gathered products compile once per instruction set.
#pragma once

#include <cstdint>

namespace onerec {

// Sum of a[i] * b[i], 16 lanes in turn; the same on every instruction set.
#define ONEREC_DECLARE(isa)                                \
  namespace isa {                                          \
  float Dot(const float* a, const float* b, int64_t size); \
  }
ONEREC_DECLARE(baseline)
ONEREC_DECLARE(avx2)
ONEREC_DECLARE(avx512)
#undef ONEREC_DECLARE

}  // namespace onerec
