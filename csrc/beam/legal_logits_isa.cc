#include "beam/legal_logits_isa.h"

#include "support/simd.h"

namespace onerec::ONEREC_ISA {

float Dot(const float* a, const float* b, int64_t size) {
  Lanes sums[2] = {Set(0.0f), Set(0.0f)};  // two chains of operations side by side
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    sums[0] = Add(sums[0], Mul(Load(a + i), Load(b + i)));
    sums[1] = Add(sums[1], Mul(Load(a + i + 16), Load(b + i + 16)));
  }
  float lanes[16];
  Store(lanes, Add(sums[0], sums[1]));
  for (; i < size; ++i) lanes[i % 16] += a[i] * b[i];
  for (int step = 8; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

}  // namespace onerec::ONEREC_ISA
