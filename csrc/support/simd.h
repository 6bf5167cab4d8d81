// Sixteen floats at once, the same values on every instruction set; for *_isa.cc files only.
#pragma once

#include <cstdint>
#ifdef __SSE2__
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false: GCC bug 105593
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace onerec::ONEREC_ISA {

#if defined(ONEREC_ISA_avx512)
constexpr int kRegisters = 1;
using Floats = __m512;
using Ints = __m512i;
#define ONEREC_F(op) _mm512_##op
#define ONEREC_CAST_INT(v) _mm512_castps_si512(v)
#define ONEREC_CAST_FLOAT(v) _mm512_castsi512_ps(v)
#elif defined(ONEREC_ISA_avx2)
constexpr int kRegisters = 2;
using Floats = __m256;
using Ints = __m256i;
#define ONEREC_F(op) _mm256_##op
#define ONEREC_CAST_INT(v) _mm256_castps_si256(v)
#define ONEREC_CAST_FLOAT(v) _mm256_castsi256_ps(v)
#elif defined(__SSE2__)
constexpr int kRegisters = 4;
using Floats = __m128;
using Ints = __m128i;
#define ONEREC_F(op) _mm_##op
#define ONEREC_CAST_INT(v) _mm_castps_si128(v)
#define ONEREC_CAST_FLOAT(v) _mm_castsi128_ps(v)
#else  // any other processor: the compiler's own vectors
constexpr int kRegisters = 4;
using Floats = float __attribute__((vector_size(16)));
using Ints = uint32_t __attribute__((vector_size(16)));
#define ONEREC_CAST_INT(v) __builtin_bit_cast(Ints, v)
#define ONEREC_CAST_FLOAT(v) __builtin_bit_cast(Floats, v)
#endif
constexpr int kWidth = 16 / kRegisters;

// GCC leaves out-of-line calls in the middle of loops otherwise.
#define ONEREC_INLINE inline __attribute__((always_inline))

struct Lanes {
  Floats r[kRegisters];
};

#define ONEREC_EACH _Pragma("GCC unroll 16") for (int i = 0; i < kRegisters; ++i)

#if defined(__SSE2__)
ONEREC_INLINE Lanes Set(float value) {
  Lanes out;
  ONEREC_EACH out.r[i] = ONEREC_F(set1_ps)(value);
  return out;
}
ONEREC_INLINE Lanes Load(const float* p) {
  Lanes out;
  ONEREC_EACH out.r[i] = ONEREC_F(loadu_ps)(p + i * kWidth);
  return out;
}
ONEREC_INLINE void Store(float* p, const Lanes& a) {
  ONEREC_EACH ONEREC_F(storeu_ps)(p + i * kWidth, a.r[i]);
}
#define ONEREC_BINARY(name, op)                              \
  ONEREC_INLINE Lanes name(const Lanes& a, const Lanes& b) { \
    Lanes out;                                               \
    ONEREC_EACH out.r[i] = ONEREC_F(op)(a.r[i], b.r[i]);     \
    return out;                                              \
  }
ONEREC_BINARY(Add, add_ps)
ONEREC_BINARY(Sub, sub_ps)
ONEREC_BINARY(Mul, mul_ps)
ONEREC_BINARY(Div, div_ps)
ONEREC_BINARY(Max, max_ps)  // b where either is NaN
ONEREC_BINARY(Min, min_ps)  // b where either is NaN
#undef ONEREC_BINARY

// Bit i tells whether lane i of a is at least lane i of b; NaN is not.
ONEREC_INLINE uint32_t AtLeast(const Lanes& a, const Lanes& b) {
  uint32_t bits = 0;
  ONEREC_EACH {
#if defined(ONEREC_ISA_avx512)
    bits |= static_cast<uint32_t>(_mm512_cmp_ps_mask(a.r[i], b.r[i], _CMP_GE_OQ));
#elif defined(ONEREC_ISA_avx2)
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.r[i], b.r[i], _CMP_GE_OQ)))
            << (i * kWidth);
#else
    bits |= static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a.r[i], b.r[i]))) << (i * kWidth);
#endif
  }
  return bits;
}
#else
ONEREC_INLINE Lanes Set(float value) {
  Lanes out;
  ONEREC_EACH out.r[i] = Floats{value, value, value, value};
  return out;
}
ONEREC_INLINE Lanes Load(const float* p) {
  Lanes out;
  __builtin_memcpy(out.r, p, sizeof out.r);
  return out;
}
ONEREC_INLINE void Store(float* p, const Lanes& a) { __builtin_memcpy(p, a.r, sizeof a.r); }
#define ONEREC_BINARY(name, expression)                      \
  ONEREC_INLINE Lanes name(const Lanes& a, const Lanes& b) { \
    Lanes out;                                               \
    ONEREC_EACH {                                            \
      const Floats x = a.r[i], y = b.r[i];                   \
      out.r[i] = expression;                                 \
    }                                                        \
    return out;                                              \
  }
ONEREC_BINARY(Add, x + y)
ONEREC_BINARY(Sub, x - y)
ONEREC_BINARY(Mul, x* y)
ONEREC_BINARY(Div, x / y)
ONEREC_BINARY(Max, x > y ? x : y)  // b where either is NaN
ONEREC_BINARY(Min, x < y ? x : y)  // b where either is NaN
#undef ONEREC_BINARY

// Bit i tells whether lane i of a is at least lane i of b; NaN is not.
ONEREC_INLINE uint32_t AtLeast(const Lanes& a, const Lanes& b) {
  Ints bits = {};
  ONEREC_EACH bits |= (Ints)(a.r[i] >= b.r[i]) & Ints{1, 2, 4, 8} << (4 * i);
  return bits[0] | bits[1] | bits[2] | bits[3];
}
#endif

// The bits of a or'ed with those in which b differs from `bits`.
ONEREC_INLINE Lanes OrDifferent(const Lanes& a, const Lanes& b, uint32_t bits) {
  Lanes out;
#if defined(ONEREC_ISA_avx512)
  out.r[0] = ONEREC_CAST_FLOAT(_mm512_ternarylogic_epi32(
      ONEREC_CAST_INT(a.r[0]), ONEREC_CAST_INT(b.r[0]), _mm512_set1_epi32(bits), 0xF6));
#else
  const Lanes same = Set(__builtin_bit_cast(float, bits));
  ONEREC_EACH {
#if defined(__SSE2__)
    out.r[i] = ONEREC_F(or_ps)(a.r[i], ONEREC_F(xor_ps)(b.r[i], same.r[i]));
#else
    out.r[i] = ONEREC_CAST_FLOAT(ONEREC_CAST_INT(a.r[i]) |
                                 (ONEREC_CAST_INT(b.r[i]) ^ ONEREC_CAST_INT(same.r[i])));
#endif
  }
#endif
  return out;
}

// Whether a lane has one of these bits.
ONEREC_INLINE bool AnyBit(const Lanes& a, uint32_t bits) {
#if defined(ONEREC_ISA_avx512)
  return _mm512_test_epi32_mask(ONEREC_CAST_INT(a.r[0]), _mm512_set1_epi32(bits)) != 0;
#elif defined(ONEREC_ISA_avx2)
  const Ints any = _mm256_or_si256(ONEREC_CAST_INT(a.r[0]), ONEREC_CAST_INT(a.r[1]));
  return _mm256_testz_si256(any, _mm256_set1_epi32(bits)) == 0;
#else
  float values[16];
  Store(values, a);
  uint32_t any = 0;
  for (float value : values) any |= __builtin_bit_cast(uint32_t, value);
  return (any & bits) != 0;
#endif
}

// op over the lanes: of those eight apart, then four, two and one.
template <class Op>
ONEREC_INLINE float Fold(const Lanes& a, Op op) {
#if defined(ONEREC_ISA_avx512)
  const __m256 eight = op(_mm512_castps512_ps256(a.r[0]), _mm512_extractf32x8_ps(a.r[0], 1));
  const __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(ONEREC_ISA_avx2)
  const __m256 eight = op(a.r[0], a.r[1]);
  const __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const Floats four = op(op(a.r[0], a.r[2]), op(a.r[1], a.r[3]));
#endif
  return op(op(four[0], four[2]), op(four[1], four[3]));
}

ONEREC_INLINE float Sum(const Lanes& a) {
  return Fold(a, [](auto x, auto y) { return x + y; });
}

// None is NaN.
ONEREC_INLINE float Largest(const Lanes& a) {
  return Fold(a, [](auto x, auto y) { return x > y ? x : y; });
}

// 2^y is s 2^(k / 32) ((f + a)^2 + b) for the whole number k / 32 nearest to y and f = y - k / 32;
// s, a and b are those of the parabola that comes nearest to 2^f.
constexpr float kParabolaA = 0x1.7154ecp0f;
constexpr float kParabolaB = 0x1.0a684ep1f;

// 2^8 s 2^(h / 4) 2^(l / 32) for i = 8 h + l is the rounded product of two tables of eight.
alignas(32) constexpr float kQuarters[8] = {0x1p0f, 0x1.306fep0f, 0x1.6a09e6p0f, 0x1.ae89fap0f,
                                            0x1p0f, 0x1.306fep0f, 0x1.6a09e6p0f, 0x1.ae89fap0f};
alignas(32) constexpr float kParts[8] = {0x1.ebfd1cp5f, 0x1.f6c308p5f, 0x1.00e2acp6f,
                                         0x1.0682bp6f,  0x1.0c423cp6f, 0x1.122202p6f,
                                         0x1.1822b4p6f, 0x1.1e450ep6f};
// Bits of that product less those that i << 18 will add to them.
struct Table {
  uint32_t bits[32];
};
constexpr Table MakeTable() {
  Table table{};
  for (uint32_t i = 0; i < 32; ++i) {
    table.bits[i] = __builtin_bit_cast(uint32_t, kQuarters[i / 8] * kParts[i % 8]) - (i << 18);
  }
  return table;
}
alignas(64) constexpr Table kTable = MakeTable();

#if defined(__SSE2__)
// Those of i in the low half and of j in the high one, at 32 j + i: SSE2 reads two at once.
struct PairTable {
  double bits[1024];
};
constexpr PairTable MakePairTable() {
  PairTable table{};
  for (uint64_t i = 0; i < 1024; ++i) {
    const uint64_t high = kTable.bits[i / 32];
    table.bits[i] = __builtin_bit_cast(double, high << 32 | kTable.bits[i % 32]);
  }
  return table;
}
alignas(64) constexpr PairTable kPairs = MakePairTable();
#endif

// Adding it rounds to whole k / 32. The sum's last bits are those of k - 256, and those above the
// last twelve tell whether k is from -3840 to 255.
constexpr float kMagic = 1.5f * 0x1p18f - 8.0f;
constexpr uint32_t kNear = 0x48BFF000;

// s 2^(k / 32) for shifted = k / 32 + kMagic.
ONEREC_INLINE Lanes Power(const Lanes& shifted) {
  Lanes out;
#if defined(ONEREC_ISA_avx512)
  const Ints k = ONEREC_CAST_INT(shifted.r[0]);
  const Ints table = _mm512_permutex2var_epi32(_mm512_load_si512(kTable.bits), k,
                                               _mm512_load_si512(kTable.bits + 16));
  out.r[0] = ONEREC_CAST_FLOAT(_mm512_add_epi32(table, _mm512_slli_epi32(k, 18)));
#elif defined(ONEREC_ISA_avx2)
  const Floats quarters = _mm256_load_ps(kQuarters), parts = _mm256_load_ps(kParts);
  const Ints whole = _mm256_set1_epi32(~31);
  ONEREC_EACH {
    const Ints k = ONEREC_CAST_INT(shifted.r[i]);
    const Floats value = _mm256_mul_ps(_mm256_permutevar8x32_ps(quarters, _mm256_srli_epi32(k, 3)),
                                       _mm256_permutevar8x32_ps(parts, k));
    out.r[i] = ONEREC_CAST_FLOAT(_mm256_add_epi32(
        ONEREC_CAST_INT(value), _mm256_slli_epi32(_mm256_and_si256(k, whole), 18)));
  }
#elif defined(__SSE2__)
  const Ints last = _mm_set1_epi32(31), weights = _mm_set1_epi32(32 << 16 | 1);
  const auto power = [](Ints k, uint64_t low, uint64_t high) {
    const __m128d table = _mm_loadh_pd(_mm_load_sd(&kPairs.bits[low]), &kPairs.bits[high]);
    return ONEREC_CAST_FLOAT(_mm_add_epi32(_mm_castpd_si128(table), _mm_slli_epi32(k, 18)));
  };
  _Pragma("GCC unroll 2") for (int i = 0; i < 4; i += 2) {
    const Ints j = ONEREC_CAST_INT(shifted.r[i]), k = ONEREC_CAST_INT(shifted.r[i + 1]);
    const Ints pairs =
        _mm_madd_epi16(_mm_packs_epi32(_mm_and_si128(j, last), _mm_and_si128(k, last)), weights);
    const auto low = static_cast<uint64_t>(_mm_cvtsi128_si64(pairs));
    const auto high = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_unpackhi_epi64(pairs, pairs)));
    out.r[i] = power(j, static_cast<uint32_t>(low), low >> 32);
    out.r[i + 1] = power(k, static_cast<uint32_t>(high), high >> 32);
  }
#else
  ONEREC_EACH {
    const Ints k = ONEREC_CAST_INT(shifted.r[i]), index = k & 31;
    const Ints table = {kTable.bits[index[0]], kTable.bits[index[1]], kTable.bits[index[2]],
                        kTable.bits[index[3]]};
    out.r[i] = ONEREC_CAST_FLOAT(table + (k << 18));
  }
#endif
  return out;
}

// 2^y for y from -120 to 128 and shifted = y + kMagic, relative error below 3.2e-7.
ONEREC_INLINE Lanes Exp2Of(const Lanes& y, const Lanes& shifted) {
#if defined(ONEREC_ISA_avx512)
  const Lanes f = {{_mm512_reduce_ps(y.r[0], 0x50)}};  // the same, in one operation
#else
  const Lanes f = Sub(y, Sub(shifted, Set(kMagic)));
#endif
  const Lanes t = Add(f, Set(kParabolaA));
  return Mul(Add(Mul(t, t), Set(kParabolaB)), Power(shifted));
}

// 2^y for y < 128; 2^-64 for y < -64 and NaN: nothing beside a sum that has a 1.
ONEREC_INLINE Lanes Exp2(const Lanes& exponent) {
  const Lanes y = Max(exponent, Set(-64.0f));
  return Exp2Of(y, Add(y, Set(kMagic)));
}

// 2^y for y from -120 to 8; sets bits above the last twelve in `far` where one is not, or is NaN.
ONEREC_INLINE Lanes Exp2Near(const Lanes& y, Lanes* far) {
  const Lanes shifted = Add(y, Set(kMagic));
  *far = OrDifferent(*far, shifted, kNear);
  return Exp2Of(y, shifted);
}

// Natural logarithm of a positive normal double, error below 2 ulp.
ONEREC_INLINE double Log(double x) {
  // x = m * 2^exponent, m from about sqrt(1/2) to sqrt(2).
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  const int64_t exponent = static_cast<int64_t>(bits - 0x3FE6A09E00000000) >> 52;
  const double m = __builtin_bit_cast(double, bits - (static_cast<uint64_t>(exponent) << 52));
  const double f = (m - 1.0) / (m + 1.0);
  // The series of g = f * f in two halves, so that the chain of dependent operations is short.
  const double g = f * f, h = g * g;
  constexpr double kEven[] = {1.0 / 19, 1.0 / 15, 1.0 / 11, 1.0 / 7, 1.0 / 3};
  constexpr double kOdd[] = {1.0 / 21, 1.0 / 17, 1.0 / 13, 1.0 / 9, 1.0 / 5};
  double even = 1.0 / 23, odd = kOdd[0];
  for (double term : kEven) even = even * h + term;
  for (int i = 1; i < 5; ++i) odd = odd * h + kOdd[i];
  const double series = even + g * odd;
  const auto e = static_cast<double>(exponent);
  return e * 0x1.62e42fefa0000p-1 + (e * 0x1.cf79abc9e3b3ap-40 + 2.0 * (f + f * g * series));
}

// e^x for x <= 700, error below 2 ulp; 0 below -700.
ONEREC_INLINE double Exp(double x) {
  if (!(x > -700.0)) return 0.0;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  constexpr double kInverse[] = {1.0 / 12, 1.0 / 11, 1.0 / 10, 1.0 / 9, 1.0 / 8, 1.0 / 7,
                                 1.0 / 6,  1.0 / 5,  1.0 / 4,  1.0 / 3, 1.0 / 2, 1.0};
  double series = 1.0 + r / 13;
  for (double inverse : kInverse) series = series * (r * inverse) + 1.0;
  const uint64_t scale = (__builtin_bit_cast(uint64_t, shifted) + 1023) << 52;
  return series * __builtin_bit_cast(double, scale);
}

}  // namespace onerec::ONEREC_ISA
