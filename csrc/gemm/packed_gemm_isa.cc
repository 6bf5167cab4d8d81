#include <cstdint>
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "gemm/tile.h"
#include "support/int_math.h"
#include "support/simd.h"

namespace onerec::ONEREC_ISA {
namespace {

// Rows of a block, those that the last one may have, and registers that the sums may take where a
// block has several panels. More than eight rows can share their places in the L1 cache, so that
// they take only what would be a second reading of the weights.
#if defined(ONEREC_ISA_avx512)
constexpr int kRows = 8, kLastRows = 14, kBudget = 8;
#elif defined(ONEREC_ISA_avx2)
constexpr int kRows = 6, kLastRows = 6, kBudget = 8;
#elif defined(__SSE2__)
constexpr int kRows = 2, kLastRows = 2, kBudget = 8;
#else  // thirty-two registers of four
constexpr int kRows = 6, kLastRows = 6, kBudget = 16;
#endif
constexpr int64_t kRowBlock = 96;  // rows whose inputs stay in the cache while panels pass by

constexpr int PanelsFor(int rows) {
  return rows * 4 * kRegisters <= kBudget ? 4 : rows * 2 * kRegisters <= kBudget ? 2 : 1;
}

inline Floats Broadcast(float value) {
#if defined(__SSE2__)
  return ONEREC_F(set1_ps)(value);
#else
  return Floats{value, value, value, value};
#endif
}

inline Floats Fma(Floats a, Floats b, Floats c) {
#if defined(ONEREC_ISA_avx512) || defined(ONEREC_ISA_avx2)
  return ONEREC_F(fmadd_ps)(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

struct Float32 {
  using Type = float;
  using Input = float;
  static constexpr int kStep = 1;    // columns of W that lie together
  static constexpr int kInputs = 1;  // of x, that are multiplied with them
  static Lanes Read(const float* p, int) { return Load(p); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return Fma(a, b, c); }
};

struct BFloat16 {
  using Type = uint32_t;  // two neighbours of a row of W, the first in the low half
  using Input = float;
  static constexpr int kStep = 2;
  static constexpr int kInputs = 2;
  static Lanes Read(const uint32_t* p, int second) {
    Lanes out;
    ONEREC_EACH {
#if defined(ONEREC_ISA_avx512)
      const Ints v = _mm512_loadu_si512(p + i * kWidth);
      out.r[i] = ONEREC_CAST_FLOAT(second ? _mm512_and_si512(v, _mm512_set1_epi32(-65536))
                                          : _mm512_slli_epi32(v, 16));
#elif defined(ONEREC_ISA_avx2)
      const Ints v = _mm256_loadu_si256(reinterpret_cast<const Ints*>(p + i * kWidth));
      out.r[i] = ONEREC_CAST_FLOAT(second ? _mm256_and_si256(v, _mm256_set1_epi32(-65536))
                                          : _mm256_slli_epi32(v, 16));
#elif defined(__SSE2__)
      const Ints v = _mm_loadu_si128(reinterpret_cast<const Ints*>(p + i * kWidth));
      out.r[i] = ONEREC_CAST_FLOAT(second ? _mm_and_si128(v, _mm_set1_epi32(-65536))
                                          : _mm_slli_epi32(v, 16));
#else
      Ints v;
      __builtin_memcpy(&v, p + i * kWidth, sizeof v);
      out.r[i] = ONEREC_CAST_FLOAT(second ? v & 0xFFFF0000u : v << 16);
#endif
    }
    return out;
  }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return Fma(a, b, c); }
};

#if defined(ONEREC_ISA_avx512_bf16)
// The same weights; x in such pairs too, and two products in one instruction.
struct BFloat16Pairs {
  using Type = uint32_t;
  using Input = uint32_t;
  static constexpr int kStep = 2;
  static constexpr int kInputs = 1;
  static Lanes Read(const uint32_t* p, int) { return Load(reinterpret_cast<const float*>(p)); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};

inline Floats Broadcast(uint32_t pair) {
  return ONEREC_CAST_FLOAT(_mm512_set1_epi32(static_cast<int>(pair)));
}
#endif

// kColumns columns of W that lie together (of each panel) times R rows. Panel by panel, for the
// registers do not hold what all panels' columns are read from.
template <class Format, int kColumns, int R, int P>
inline void Columns(const typename Format::Input* const* a, int64_t at,
                    const typename Format::Type* const* w, int64_t offset, Lanes (&acc)[R][P]) {
  _Pragma("GCC unroll 4") for (int p = 0; p < P; ++p) {
    _Pragma("GCC unroll 2") for (int j = 0; j < kColumns; ++j) {
      const Lanes b = Format::Read(w[p] + offset, j);
      _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) {
        const Floats x = Broadcast(a[r][at + j]);
        ONEREC_EACH acc[r][p].r[i] = Format::MultiplyAdd(x, b.r[i], acc[r][p].r[i]);
      }
    }
  }
}

template <class Format, int R, int P>
void Block(const GemmTile& tile, int64_t row, int64_t panel) {
  const typename Format::Input* a[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = tile.rows != nullptr ? tile.rows[row + r] : row + r;
    a[r] = reinterpret_cast<const typename Format::Input*>(tile.x) + at * tile.x_stride;
  }
  const int64_t steps = tile.k / Format::kStep;
  const int64_t elements = DivideUp(tile.k, Format::kStep) * kPanelWidth;
  const typename Format::Type* w[P];
  for (int p = 0; p < P; ++p) {
    const int64_t at = tile.panels != nullptr ? tile.panels[panel + p] : panel + p;
    w[p] = static_cast<const typename Format::Type*>(tile.weights) + at * elements;
  }
  Lanes acc[R][P];
  _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) {
    _Pragma("GCC unroll 4") for (int p = 0; p < P; ++p) acc[r][p] = Set(0.0f);
  }
  _Pragma("GCC unroll 4") for (int64_t s = 0; s < steps; ++s) {
    if constexpr (R > 2) {  // the next panels; fewer rows wait for the memory alone
      for (int p = 0; p < P; ++p) __builtin_prefetch(w[p] + P * elements + s * kPanelWidth, 0, 2);
    }
    Columns<Format, Format::kInputs>(a, s * Format::kInputs, w, s * kPanelWidth, acc);
  }
  if (steps * Format::kStep < tile.k) {
    Columns<Format, 1>(a, tile.k - 1, w, steps * kPanelWidth, acc);
  }
  _Pragma("GCC unroll 4") for (int p = 0; p < P; ++p) {
    const int64_t column = (panel + p) * kPanelWidth;
    const int64_t left = tile.n - column;
    float* const y = tile.y + row * tile.y_stride + column;
    if (left >= kPanelWidth) {
      _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) {
        float* const to = y + r * tile.y_stride;
        Store(to, tile.add ? Add(Load(to), acc[r][p]) : acc[r][p]);
      }
      continue;
    }
    float last[R][kPanelWidth];
    _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) Store(last[r], acc[r][p]);
    for (int r = 0; r < R; ++r) {
      float* const to = y + r * tile.y_stride;
      for (int64_t j = 0; j < left; ++j) to[j] = tile.add ? to[j] + last[r][j] : last[r][j];
    }
  }
}

// Up to kGroup panels for R rows: as many at once as the registers hold, or one by one.
template <class Format, int R>
void Rows(const GemmTile& tile, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if (rows != R) {
    if constexpr (R > 1) Rows<Format, R - 1>(tile, row, rows, panel, panels);
    return;
  }
  constexpr int P = PanelsFor(R);
  for (int64_t p = 0; p < panels; p += P) {
    if (panels - p >= P) {
      Block<Format, R, P>(tile, row, panel + p);
    } else {
      for (; p < panels; ++p) Block<Format, R, 1>(tile, row, panel + p);
    }
  }
}

// Rows of whole blocks pass by one panel after the other, which stays in the cache; what is left of
// them passes by a group of panels.
template <class Format>
void Run(const GemmTile& tile) {
  constexpr int kGroup = 4;
  const int64_t panels = DivideUp(tile.n, kPanelWidth);
  for (int64_t block = 0; block < tile.m; block += kRowBlock) {
    const int64_t end = block + kRowBlock < tile.m ? block + kRowBlock : tile.m;
    const int64_t rest = (end - block) % kRows;
    const bool longer = rest > 0 && end - block > kRows && kRows + rest <= kLastRows;
    const int64_t whole = end - rest - (longer ? kRows : 0);
    for (int64_t panel = 0; panel < panels; panel += kGroup) {
      const int64_t count = panels - panel < kGroup ? panels - panel : kGroup;
      constexpr int P = PanelsFor(kRows);
      for (int64_t p = 0; p < count; p += P) {
        for (int64_t row = block; row < whole; row += kRows) {
          Rows<Format, kRows>(tile, row, kRows, panel + p, count - p < P ? count - p : P);
        }
      }
      if (whole < end) Rows<Format, kLastRows>(tile, whole, end - whole, panel, count);
    }
  }
}

#if defined(ONEREC_ISA_avx512_bf16)
// Rounds some rows of x after the other to pairs.
void RunBFloat16(const GemmTile& tile) {
  constexpr int64_t kMost = 1 << 16;  // pairs that the stack has room for
  const int64_t stride = (tile.k + 31) / 32 * kPanelWidth + kPanelWidth;  // see kRows
  if (stride > kMost) return Run<BFloat16>(tile);
  alignas(64) uint32_t pairs[kMost];
  const int64_t most = kMost / stride < kRowBlock ? kMost / stride : kRowBlock;
  GemmTile some = tile;
  some.x = reinterpret_cast<const float*>(pairs);
  some.x_stride = stride;
  some.rows = nullptr;
  some.k = (tile.k + 1) / 2 * 2;
  for (int64_t row = 0; row < tile.m; row += most) {
    some.m = tile.m - row < most ? tile.m - row : most;
    some.y = tile.y + row * tile.y_stride;
    for (int64_t r = 0; r < some.m; ++r) {
      const int64_t at = tile.rows != nullptr ? tile.rows[row + r] : row + r;
      const float* const x = tile.x + at * tile.x_stride;
      uint32_t* const to = pairs + r * stride;
      const int64_t whole = tile.k & ~int64_t{31};
      for (int64_t i = 0; i < whole; i += 32) {
        _mm512_store_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16),
                                                                    _mm512_loadu_ps(x + i)));
      }
      if (whole == tile.k) continue;
      const uint32_t rest = (1u << (tile.k - whole)) - 1;
      _mm512_store_si512(
          to + whole / 2,
          (__m512i)_mm512_cvtne2ps_pbh(
              _mm512_maskz_loadu_ps(static_cast<__mmask16>(rest >> 16), x + whole + 16),
              _mm512_maskz_loadu_ps(static_cast<__mmask16>(rest), x + whole)));
    }
    Run<BFloat16Pairs>(some);
  }
}
#else
// Widens each panel once where several blocks of rows read it.
void RunBFloat16(const GemmTile& tile) {
  constexpr int64_t kMost = 2048;  // columns that the stack has room for
  if (tile.m <= 2 * kRows || tile.k > kMost) return Run<BFloat16>(tile);
  alignas(64) float wide[kMost * kPanelWidth];
  const int64_t steps = (tile.k + 1) / 2, panels = DivideUp(tile.n, kPanelWidth);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t at = tile.panels != nullptr ? tile.panels[panel] : panel;
    const auto* const from = static_cast<const uint32_t*>(tile.weights) + at * steps * kPanelWidth;
    for (int64_t i = 0; i < tile.k; ++i) {
      Store(wide + i * kPanelWidth, BFloat16::Read(from + i / 2 * kPanelWidth, i % 2));
    }
    GemmTile one = tile;
    one.weights = wide;
    one.panels = nullptr;
    one.n = tile.n - panel * kPanelWidth < kPanelWidth ? tile.n - panel * kPanelWidth : kPanelWidth;
    one.y = tile.y + panel * kPanelWidth;
    Run<Float32>(one);
  }
}
#endif

}  // namespace

void RunTile(const GemmTile& tile) {
  tile.type == WeightType::kFloat32 ? Run<Float32>(tile) : RunBFloat16(tile);
}

}  // namespace onerec::ONEREC_ISA
