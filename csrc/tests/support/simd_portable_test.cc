#include "tests/support/simd_portable.h"

#undef __SSE2__
#define ONEREC_ISA portable
#include "tests/support/simd_case.h"

namespace onerec::portable {
std::vector<uint32_t> PortableLanes(const float* x, const float* y) { return Everything(x, y); }
}  // namespace onerec::portable
