// What a *_test.cc file does with the lanes of its own ONEREC_ISA.
#pragma once

#include <cstdint>
#include <vector>

#include "support/simd.h"

namespace onerec::ONEREC_ISA {

// The bits of every operation on sixteen pairs of floats.
inline std::vector<uint32_t> Everything(const float* x, const float* y) {
  std::vector<uint32_t> out;
  const auto keep = [&out](const Lanes& lanes) {
    float values[16];
    Store(values, lanes);
    for (float value : values) {  // which NaN it is may differ
      out.push_back(value == value ? __builtin_bit_cast(uint32_t, value) : 0x7FC00000u);
    }
  };
  const Lanes a = Load(x), b = Load(y);
  for (const Lanes& lanes : {Set(x[0]), Add(a, b), Sub(a, b), Mul(a, b), Div(a, b), Max(a, b),
                             Min(a, b), OrDifferent(a, b, 0x3F800000u), Exp2(a)}) {
    keep(lanes);
  }
  Lanes far = Set(0.0f);
  keep(Exp2Near(a, &far));
  keep(far);
  out.push_back(AtLeast(a, b));
  for (uint32_t bits : {~4095u, 1u, 0x80000000u}) out.push_back(AnyBit(far, bits));
  keep(Set(Sum(a)));
  keep(Set(Largest(Max(a, Set(-1.0f)))));
  return out;
}

}  // namespace onerec::ONEREC_ISA
