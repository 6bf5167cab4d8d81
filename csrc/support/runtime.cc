#include "onerec/runtime.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "support/error.h"

namespace onerec {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa ChooseIsa() {
  if (const char* name = std::getenv("ONEREC_ISA"); name != nullptr && *name != '\0') {
    for (Isa isa : kIsas) {
      if (std::string(name) != IsaName(isa)) continue;
      if (IsaAvailable(isa)) return isa;
      throw std::invalid_argument(std::string("ONEREC_ISA=") + name + ": not available here");
    }
    throw std::invalid_argument(
        WantedGot("ONEREC_ISA", "baseline, avx2, avx512 or avx512_bf16", name));
  }
  Isa best = Isa::kBaseline;
  for (Isa isa : kIsas) best = IsaAvailable(isa) ? isa : best;
  return best;
}

std::atomic<int>& IsaChoice() {
  static std::atomic<int> choice{static_cast<int>(ChooseIsa())};
  return choice;
}

}  // namespace

const char* Version() { return ONEREC_VERSION; }

const char* IsaName(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

bool IsaAvailable(Isa isa) {
  if (isa == Isa::kBaseline) return true;
#ifdef ONEREC_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa CurrentIsa() { return static_cast<Isa>(IsaChoice().load(std::memory_order_relaxed)); }

void SetIsa(Isa isa) {
  if (!IsaAvailable(isa)) {
    throw std::invalid_argument(std::string("isa ") + IsaName(isa) + " is not available here");
  }
  IsaChoice().store(static_cast<int>(isa), std::memory_order_relaxed);
}

#ifndef ONEREC_CUDA
CudaInfo GetCudaInfo() {
  return {false, 0, "onerec was built without CUDA (ONEREC_CUDA=OFF, or no nvcc was found)"};
}
#endif

}  // namespace onerec
