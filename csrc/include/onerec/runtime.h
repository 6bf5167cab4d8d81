// What this build is and what this machine can run: version, instruction set, threads, CUDA.
#pragma once

#include <string>

#include "onerec/export.h"

namespace onerec {

// Release of the library, e.g. "0.1.0".
ONEREC_API const char* Version();

// Each includes those before it. kAvx512Bf16 multiplies matrices in bfloat16 with the CPU's dot
// products of pairs; all else is kAvx512's.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// Instruction set that the CPU kernels run with: the best one that the machine has, or the one
// named by the environment variable ONEREC_ISA (baseline, avx2, avx512, avx512_bf16).
// Throws std::invalid_argument if the variable names one that is unknown or not available here.
ONEREC_API Isa CurrentIsa();
ONEREC_API const char* IsaName(Isa isa);
ONEREC_API bool IsaAvailable(Isa isa);

// Overrides the choice for this process. Throws std::invalid_argument if it is not available.
ONEREC_API void SetIsa(Isa isa);

struct CudaInfo {
  bool built = false;   // the library was compiled with CUDA
  int devices = 0;      // devices that the driver shows
  std::string problem;  // why no device can be used; empty if one can
};
ONEREC_API CudaInfo GetCudaInfo();

}  // namespace onerec
