// What the gathered products compile once per instruction set.
#pragma once

#include <cstdint>

#include "support/dispatch.h"

namespace onerec {

// Sum of a[i] * b[i], 16 lanes in turn; the same on every instruction set.
ONEREC_EACH_ISA(float Dot(const float* a, const float* b, int64_t size);)

}  // namespace onerec
