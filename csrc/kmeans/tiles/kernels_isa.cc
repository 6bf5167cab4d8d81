// Compiled once for each instruction set. The distance tile uses fused multiply-adds on purpose:
// it screens candidates, and what is decided is decided on float64 costs.
#include <cstdint>

#include "kmeans/tiles/kernels.h"

#if defined(ONEREC_ISA_avx2) || defined(ONEREC_ISA_avx512)
#include <immintrin.h>
#endif

// Vectors wider than the machine's are returned by inlined functions alone.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace onerec {
namespace ONEREC_ISA {
namespace {

#if defined(ONEREC_ISA_avx512)
constexpr int kLanes = 16;
constexpr int kRows = 12;
#elif defined(ONEREC_ISA_avx2)
constexpr int kLanes = 8;
constexpr int kRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kRows = 4;
#endif
constexpr int kWidth = 2 * kLanes;
constexpr int64_t kDepth = 256;  // dimensions per pass over a panel: it stays in the L1 cache

using Vec = float __attribute__((vector_size(kLanes * 4)));
using Vec8 = float __attribute__((vector_size(32)));
using Double8 = double __attribute__((vector_size(64)));

template <class V>
struct Integers;
template <>
struct Integers<Vec8> {
  using Type = int32_t __attribute__((vector_size(32)));
};
#if !defined(ONEREC_ISA_avx2)
template <>
struct Integers<Vec> {
  using Type = int32_t __attribute__((vector_size(kLanes * 4)));
};
#endif

template <class V>
inline V Load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void Store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline Vec MultiplyAdd(Vec a, Vec b, Vec c) {
#if defined(ONEREC_ISA_avx512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(ONEREC_ISA_avx2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// kRows x kWidth block of the product; `first` starts from zero, `last` adds the bias.
inline void Micro(const float* a, int64_t lda, int64_t depth, const float* panel, const float* bias,
                  bool first, bool last, float* out, int64_t ldo) {
  Vec sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = first ? Vec{} : Load<Vec>(out + r * ldo);
    sum[r][1] = first ? Vec{} : Load<Vec>(out + r * ldo + kLanes);
  }
  for (int64_t j = 0; j < depth; ++j) {
    const Vec b0 = Load<Vec>(panel + j * kWidth);
    const Vec b1 = Load<Vec>(panel + j * kWidth + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = a[r * lda + j] - Vec{};
      sum[r][0] = MultiplyAdd(x, b0, sum[r][0]);
      sum[r][1] = MultiplyAdd(x, b1, sum[r][1]);
    }
  }
  const Vec bias0 = Load<Vec>(bias);
  const Vec bias1 = Load<Vec>(bias + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Store(out + r * ldo, last ? sum[r][0] + bias0 : sum[r][0]);
    Store(out + r * ldo + kLanes, last ? sum[r][1] + bias1 : sum[r][1]);
  }
}

void CostTile(const float* a, int64_t rows, int64_t d, const float* packed, const float* bias,
              int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += kWidth) {
    for (int64_t j = 0; j < d; j += kDepth) {
      const int64_t depth = d - j < kDepth ? d - j : kDepth;
      for (int64_t r = 0; r < rows; r += kRows) {
        Micro(a + r * d + j, d, depth, packed + k * d + j * kWidth, bias + k, j == 0,
              j + depth == d, out + r * columns + k, columns);
      }
    }
  }
}

// The smallest of the lanes, none of which is NaN.
inline float Least(Vec lanes) {
  float v[kLanes];
  Store(v, lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i + half] < v[i] ? v[i + half] : v[i];
  }
  return v[0];
}

float RowMin(const float* v, int64_t n) {
  Vec low0 = Load<Vec>(v);
  Vec low1 = Load<Vec>(v + kLanes);
  for (int64_t i = kWidth; i < n; i += kWidth) {
    const Vec x0 = Load<Vec>(v + i);
    const Vec x1 = Load<Vec>(v + i + kLanes);
    low0 = x0 < low0 ? x0 : low0;
    low1 = x1 < low1 ? x1 : low1;
  }
  return Least(low1 < low0 ? low1 : low0);
}

void GroupMin(const float* v, const int32_t* offset, int64_t groups, float* least) {
  for (int64_t g = 0; g < groups; ++g) {
    int64_t i = offset[g];
    const int64_t end = offset[g + 1];
#if defined(ONEREC_ISA_avx512)
    Vec lows = Vec{} + __builtin_inff();
    for (; i < end; i += kLanes) {
      const int64_t lanes = end - i < kLanes ? end - i : kLanes;
      const auto mask = static_cast<__mmask16>((1u << lanes) - 1);
      const Vec x = (Vec)_mm512_mask_loadu_ps((__m512)lows, mask, v + i);
      lows = x < lows ? x : lows;
    }
    least[g] = _mm512_reduce_min_ps((__m512)lows);
#else
    float low = v[i];
    if (end - i >= kLanes) {
      Vec lows = Load<Vec>(v + i);
      for (i += kLanes; i + kLanes <= end; i += kLanes) {
        const Vec x = Load<Vec>(v + i);
        lows = x < lows ? x : lows;
      }
      low = Least(lows);
    }
    for (; i < end; ++i) low = v[i] < low ? v[i] : low;
    least[g] = low;
#endif
  }
}

#if defined(ONEREC_ISA_avx512)
inline uint32_t NotAbove(Vec a, Vec b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
}
inline uint32_t Below(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
#elif defined(ONEREC_ISA_avx2)
inline uint32_t NotAbove(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
}
inline uint32_t Below(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)));
}
#else
inline uint32_t NotAbove(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= (a[lane] <= b[lane] ? 1u : 0u) << lane;
  return mask;
}
inline uint32_t Below(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= (a[lane] < b[lane] ? 1u : 0u) << lane;
  return mask;
}
#endif

int64_t Find(const float* v, int64_t n, float limit) {
  const Vec most = Vec{} + limit;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t mask = NotAbove(Load<Vec>(v + i), most);
    if (mask != 0) return i + __builtin_ctz(mask);
  }
  while (!(v[i] <= limit)) ++i;
  return i;
}

int64_t Collect(const float* v, int64_t n, float limit, int32_t* where) {
  int64_t count = 0;
  const Vec most = Vec{} + limit;
#if defined(ONEREC_ISA_avx512)
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < n; i += kLanes) {
    const uint32_t mask = NotAbove(Load<Vec>(v + i), most);
    _mm512_storeu_si512(where + count,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), at));
    count += __builtin_popcount(mask);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes));
  }
#else
  for (int64_t i = 0; i < n; i += kLanes) {
    for (uint32_t mask = NotAbove(Load<Vec>(v + i), most); mask != 0; mask &= mask - 1) {
      where[count++] = static_cast<int32_t>(i + __builtin_ctz(mask));
    }
  }
#endif
  return count;
}

int64_t CollectEach(const float* v, float base, const float* limits, int64_t n, int32_t* where) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (uint32_t mask = Below(Load<Vec>(v + i) - base, Load<Vec>(limits + i)); mask != 0;
         mask &= mask - 1) {
      where[count++] = static_cast<int32_t>(i + __builtin_ctz(mask));
    }
  }
  for (; i < n; ++i) {
    if (v[i] - base < limits[i]) where[count++] = static_cast<int32_t>(i);
  }
  return count;
}

// exp of x <= 0, relative error below 2e-7; below -80 it is exp(-80).
template <class V>
inline V Exp(V x) {
  using I = typename Integers<V>::Type;
  const V lowest = V{} - 80.0f;
  x = x > lowest ? x : lowest;
  const V shifted = x * 1.44269504f + 12582912.0f;  // the integer part lands in the low bits
  const V whole = shifted - 12582912.0f;
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (V)(((I)shifted << 23) + 0x3f800000);
}

float SoftRow(const float* v, const float* p, int64_t n, float inverse_eps, float weight,
              float* share, float* column, float* total) {
  Vec low = Load<Vec>(v) + Load<Vec>(p);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = Load<Vec>(v + i) + Load<Vec>(p + i);
    Store(share + i, x);
    low = x < low ? x : low;
  }
  const float least = Least(low);
  Vec sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = Exp((least - Load<Vec>(share + i)) * inverse_eps);
    Store(share + i, e);
    sums += e;
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  const float scale = 1.0f / sum;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec part = Load<Vec>(share + i) * scale;
    Store(share + i, part);
    Store(column + i, Load<Vec>(column + i) + part * weight);
  }
  *total = sum;
  return least;
}

float SoftList(const float* rel, const int32_t* code, const float* p, int64_t n, float inverse_eps,
               float weight, float* share, float* column, float* total) {
  float least = rel[0] + p[code[0]];
  for (int64_t i = 0; i < n; ++i) {
    const float x = rel[i] + p[code[i]];
    share[i] = x;
    least = x < least ? x : least;
  }
  Vec8 sums = {};
  for (int64_t i = 0; i < n; i += 8) {
    const Vec8 e = Exp((least - Load<Vec8>(share + i)) * inverse_eps);
    Store(share + i, e);
    sums += e;
  }
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += sums[i];
  const float scale = 1.0f / sum;
  for (int64_t i = 0; i < n; ++i) {
    share[i] *= scale;
    column[code[i]] += share[i] * weight;
  }
  *total = sum;
  return least;
}

int64_t ListArgmin(const float* rel, const int32_t* code, const float* p, int64_t n,
                   float* smallest) {
  int64_t best = 0;
  float least = rel[0] + p[code[0]];
  for (int64_t i = 1; i < n; ++i) {
    const float x = rel[i] + p[code[i]];
    if (x < least) {
      least = x;
      best = i;
    }
  }
  *smallest = least;
  return best;
}

int64_t ListOther(const float* rel, const int32_t* code, const float* p, int64_t n, int32_t own,
                  float* smallest) {
#if defined(ONEREC_ISA_avx2) || defined(ONEREC_ISA_avx512)
  const __m256 infinite = _mm256_set1_ps(__builtin_inff());
  const __m256i mine = _mm256_set1_epi32(own);
  __m256 low = infinite;
  __m256i where = _mm256_set1_epi32(-1);
  __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + i));
    const __m256 price = _mm256_i32gather_ps(p, k, 4);
    const __m256 x = _mm256_blendv_ps(_mm256_add_ps(_mm256_loadu_ps(rel + i), price), infinite,
                                      _mm256_castsi256_ps(_mm256_cmpeq_epi32(k, mine)));
    const __m256 less = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    low = _mm256_blendv_ps(low, x, less);
    where = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(where), _mm256_castsi256_ps(at), less));
    at = _mm256_add_epi32(at, _mm256_set1_epi32(8));
  }
  __m256 least = _mm256_min_ps(low, _mm256_permute2f128_ps(low, low, 1));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4E));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xB1));
  *smallest = _mm256_cvtss_f32(least);
  // Of equals the first; lanes without any have -1, the largest unsigned.
  __m256i first = _mm256_blendv_epi8(_mm256_set1_epi32(-1), where,
                                     _mm256_castps_si256(_mm256_cmp_ps(low, least, _CMP_EQ_OQ)));
  first = _mm256_min_epu32(first, _mm256_permute2x128_si256(first, first, 1));
  first = _mm256_min_epu32(first, _mm256_shuffle_epi32(first, 0x4E));
  first = _mm256_min_epu32(first, _mm256_shuffle_epi32(first, 0xB1));
  return _mm256_cvtsi256_si32(first);
#else
  int64_t best = -1;
  float least = __builtin_inff();
  for (int64_t i = 0; i < n; ++i) {
    const float x = rel[i] + p[code[i]];
    if (x < least && code[i] != own) {
      least = x;
      best = i;
    }
  }
  *smallest = least;
  return best;
#endif
}

int64_t ListsBelow(const float* rel, const int32_t* code, const int64_t* offset, const float* p,
                   const int32_t* own, const float* limits, int64_t rows, int32_t* where) {
  using I = Integers<Vec8>::Type;
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    I any = {};
    for (int64_t i = offset[r]; i < offset[r + 1]; i += 8) {
      const int32_t* k = code + i;
      const Vec8 price = {p[k[0]], p[k[1]], p[k[2]], p[k[3]], p[k[4]], p[k[5]], p[k[6]], p[k[7]]};
      I codes;
      __builtin_memcpy(&codes, k, sizeof(codes));
      any |= (Load<Vec8>(rel + i) + price < limits[r]) & (codes != own[r]);
    }
    int64_t halves[4];
    __builtin_memcpy(halves, &any, sizeof(halves));
    where[count] = static_cast<int32_t>(r);
    count += (halves[0] | halves[1] | halves[2] | halves[3]) != 0 ? 1 : 0;
  }
  return count;
}

double ExactCost(const float* x, const float* c, int64_t d) {
  Double8 sums = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
    const Double8 difference = __builtin_convertvector(Load<Vec8>(x + j), Double8) -
                               __builtin_convertvector(Load<Vec8>(c + j), Double8);
    sums += difference * difference;
  }
  for (int lane = 0; j < d; ++j, ++lane) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(c[j]);
    sums[lane] += difference * difference;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

double Centre(const float* x, const float* mean, int64_t d, float* centred) {
  for (int64_t j = 0; j < d; ++j) centred[j] = x[j] - mean[j];
  return ExactCost(x, mean, d);
}

float NearCost(const float* x, const float* c, int64_t d) {
  Vec sum0 = {};
  Vec sum1 = {};
  int64_t j = 0;
  for (; j + kWidth <= d; j += kWidth) {
    const Vec difference0 = Load<Vec>(x + j) - Load<Vec>(c + j);
    const Vec difference1 = Load<Vec>(x + j + kLanes) - Load<Vec>(c + j + kLanes);
    sum0 = MultiplyAdd(difference0, difference0, sum0);
    sum1 = MultiplyAdd(difference1, difference1, sum1);
  }
  sum0 += sum1;
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sum0[lane];
  for (; j < d; ++j) sum += (x[j] - c[j]) * (x[j] - c[j]);
  return sum;
}

}  // namespace

extern const KMeansKernels kKMeansKernels;
const KMeansKernels kKMeansKernels = {
    kRows,   kWidth,   CostTile,   RowMin,    GroupMin,   Find,      Collect, CollectEach,
    SoftRow, SoftList, ListArgmin, ListOther, ListsBelow, ExactCost, Centre,  NearCost};

}  // namespace ONEREC_ISA
}  // namespace onerec
