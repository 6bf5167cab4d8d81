// Bounds on rounding, relative to the sizes that they are multiplied with: README.md derives them.
#pragma once

namespace onerec {

inline constexpr double kFloatUnit = 0x1p-24;     // half the spacing of float32 at 1
inline constexpr double kFloatUnitUp = 6e-8;      // at least kFloatUnit, with its own rounding
inline constexpr double kEntryRounding = 1.2e-7;  // two units: a listed value
inline constexpr double kSumRounding = 2e-7;     // three units: cost and price, both rounded, added
inline constexpr double kListRounding = 4e-7;    // six units: a difference of two listed values
inline constexpr double kScreenRounding = 5e-7;  // above kListRounding, for what screens before it
inline constexpr double kExactEntry = 1e-6;   // of lists' scale: entries from float64, in float32
inline constexpr double kDoubleTie = 1e-15;   // of a cost in float64: what counts as equal
inline constexpr double kDoubleGain = 1e-11;  // of lists' scale: a gain that float64 can tell

}  // namespace onerec
