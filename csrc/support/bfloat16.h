// Rounding to bfloat16. Not for *_isa.cc files: an inline function may be kept from any of them.
#pragma once

#include <bit>
#include <cstdint>

namespace onerec {

// To nearest, ties to even.
inline uint16_t RoundToBFloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace onerec
