// The choice among the instruction sets that *_isa.cc files are compiled for. Macros only, so that
// those files may include this header.
#pragma once

// Declares `...` in the namespace of each instruction set.
#define ONEREC_EACH_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__                \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__                \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__                \
  }

// The `name` of CurrentIsa() (onerec/runtime.h).
#ifdef ONEREC_X86
#define ONEREC_DISPATCH(name)                  \
  (CurrentIsa() >= Isa::kAvx512 ? avx512::name \
   : CurrentIsa() == Isa::kAvx2 ? avx2::name   \
                                : baseline::name)
#else
#define ONEREC_DISPATCH(name) (baseline::name)
#endif
