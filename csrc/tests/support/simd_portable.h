#pragma once

#include <cstdint>
#include <vector>

namespace onerec::portable {
// As Everything of simd_case.h, with the lanes of processors that have no intrinsics here.
std::vector<uint32_t> PortableLanes(const float* x, const float* y);
}  // namespace onerec::portable
