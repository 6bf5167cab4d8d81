#include "engine/kernels_isa.h"

#include <cstdint>

#include "support/simd.h"

namespace onerec::ONEREC_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

#if defined(ONEREC_ISA_avx512)
__mmask16 First(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#endif

// Sixteen values of an array of n from i on; zeros (or `fill`) past its end.
Lanes Part(const float* x, int64_t i, int64_t n, float fill = 0.0f) {
  if (i + 16 <= n) return Load(x + i);
#if defined(ONEREC_ISA_avx512)
  return {{_mm512_mask_loadu_ps(_mm512_set1_ps(fill), First(n - i), x + i)}};
#else
  float values[16];
  for (int64_t j = 0; j < 16; ++j) values[j] = i + j < n ? x[i + j] : fill;
  return Load(values);
#endif
}

void Keep(float* y, int64_t i, int64_t n, const Lanes& v) {
  if (i + 16 <= n) return Store(y + i, v);
#if defined(ONEREC_ISA_avx512)
  _mm512_mask_storeu_ps(y + i, First(n - i), v.r[0]);
#else
  float values[16];
  Store(values, v);
  for (int64_t j = 0; i + j < n; ++j) y[i + j] = values[j];
#endif
}

void Norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Lanes sum = Set(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes v = Part(x, i, n);
    sum = Add(sum, Mul(v, v));
  }
  const Lanes factor = Set(1.0f / __builtin_sqrtf(Sum(sum) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    Keep(out, i, n, Mul(Mul(Part(x, i, n), factor), Part(weight, i, n)));
  }
}

void Softmax(float* x, int64_t n, float scale) {
  const float low = -__builtin_inff();
  Lanes top = Set(low);
  for (int64_t i = 0; i < n; i += 16) top = Max(Part(x, i, n, low), top);
  const Lanes shift = Set(Largest(top)), factor = Set(scale * kLog2E);
  Lanes sum = Set(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes e = Exp2(Mul(Sub(Part(x, i, n, low), shift), factor));
    sum = Add(sum, e);
    Keep(x, i, n, e);
  }
  const Lanes inverse = Set(1.0f / Sum(sum));
  for (int64_t i = 0; i < n; i += 16) Keep(x, i, n, Mul(Part(x, i, n), inverse));
}

// x / (1 + e^-x); below -87 e^126 log 2 stands for e^-x, which gives 0 all the same.
void Silu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes v = Part(x, i, n);
    const Lanes y = Sub(Set(0.0f), Max(Mul(v, Set(kLog2E)), Set(-126.0f)));
    Keep(x, i, n, Div(v, Add(Set(1.0f), Exp2(y))));
  }
}

void Gelu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.70710678118654752440f));
  }
}

void Activate(float* gate, const float* up, int64_t n, int activation) {
  if (activation == 0) {
    Silu(gate, n);
  } else if (activation == 3) {
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] > 0 ? gate[i] : 0.0f;
  } else {
    Gelu(gate, n);
  }
  if (activation > 1) return;
  for (int64_t i = 0; i < n; i += 16) Keep(gate, i, n, Mul(Part(gate, i, n), Part(up, i, n)));
}

void AddScaled(float* y, const float* x, float a, int64_t n) {
  const Lanes factor = Set(a);
  for (int64_t i = 0; i < n; i += 16) {
    Keep(y, i, n, Add(Part(y, i, n), Mul(factor, Part(x, i, n))));
  }
}

void AddRow(float* y, const void* x, bool half, int64_t n) {
  if (!half) {
    const auto* from = static_cast<const float*>(x);
    for (int64_t i = 0; i < n; i += 16) Keep(y, i, n, Add(Part(y, i, n), Part(from, i, n)));
    return;
  }
  const auto* from = static_cast<const uint16_t*>(x);
  for (int64_t i = 0; i < n; ++i) {
    y[i] += __builtin_bit_cast(float, static_cast<uint32_t>(from[i]) << 16);
  }
}

void Attend(const float* q, const float* keys, const float* values, const int64_t* offsets,
            int64_t times, int64_t n, float scale, float* scores, float* out) {
  for (int64_t t = 0; t < times; ++t) {
    const float* const key = keys + offsets[t];
    Lanes sum = Set(0.0f);
    for (int64_t i = 0; i < n; i += 16) sum = Add(sum, Mul(Part(q, i, n), Part(key, i, n)));
    scores[t] = Sum(sum);
  }
  Softmax(scores, times, scale);
  for (int64_t i = 0; i < n; i += 16) {
    Lanes sum = Set(0.0f);
    for (int64_t t = 0; t < times; ++t) {
      sum = Add(sum, Mul(Set(scores[t]), Part(values + offsets[t], i, n)));
    }
    Keep(out, i, n, sum);
  }
}

}  // namespace

EngineKernels EngineTable() { return {&Norm, &Softmax, &Activate, &AddScaled, &AddRow, &Attend}; }

}  // namespace onerec::ONEREC_ISA
