#include "beam/step_isa.h"

#include <cstdint>

#include "support/simd.h"

namespace onerec::ONEREC_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep127f;
constexpr int kFirst = 32;    // logits read twice, to know how large the values are
constexpr int kBlock = 2048;  // logits whose exponentials are summed in float, 128 a lane
constexpr int kAhead = 512;   // logits on their way to the cache; runs into the next row

struct Float32 {
  using Type = float;
  static float Get(const float* p) { return *p; }
  static Lanes Read(const float* p) { return Load(p); }
  // Thirty-two values, in any order.
  static void Read(const float* p, Lanes* a, Lanes* b) {
    *a = Load(p);
    *b = Load(p + 16);
  }
};

struct BFloat16 {
  using Type = uint16_t;
  static float Get(const uint16_t* p) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(*p) << 16);
  }
  static Lanes Read(const uint16_t* p) {
    Lanes out;
#if defined(ONEREC_ISA_avx512)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out.r[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(ONEREC_ISA_avx2)
    for (int i = 0; i < 2; ++i) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
      out.r[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
#else
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = Get(p + i);
    out = Load(values);
#endif
    return out;
  }
  // The even ones, and the odd ones: an operation less than in order.
  static void Read(const uint16_t* p, Lanes* a, Lanes* b) {
#if defined(__SSE2__)
    const Ints high = ONEREC_F(set1_epi32)(static_cast<int>(0xFFFF0000));
    ONEREC_EACH {
      const Ints pair =
          ONEREC_CAST_INT(ONEREC_F(loadu_ps)(reinterpret_cast<const float*>(p + 2 * kWidth * i)));
      a->r[i] = ONEREC_CAST_FLOAT(ONEREC_F(slli_epi32)(pair, 16));
      b->r[i] = ONEREC_F(and_ps)(ONEREC_CAST_FLOAT(pair), ONEREC_CAST_FLOAT(high));
    }
#else
    const Lanes pairs = Load(reinterpret_cast<const float*>(p));
    ONEREC_EACH {
      a->r[i] = ONEREC_CAST_FLOAT(ONEREC_CAST_INT(pairs.r[i]) << 16);
      b->r[i] = ONEREC_CAST_FLOAT(ONEREC_CAST_INT(pairs.r[i]) & 0xFFFF0000u);
    }
#endif
  }
};

struct Float16 {
  using Type = uint16_t;
  static float Get(const uint16_t* p) {
    const uint32_t sign = static_cast<uint32_t>(*p & 0x8000) << 16;
    const uint32_t rest = *p & 0x7FFF;
    if (rest >= 0x7C00) return __builtin_bit_cast(float, sign | 0x7F800000 | (rest << 13));
    if (rest < 0x0400) {  // subnormal or zero
      const float small = static_cast<float>(rest) * 0x1p-24f;
      return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, small));
    }
    return __builtin_bit_cast(float, sign | ((rest << 13) + 0x38000000));
  }
  static Lanes Read(const uint16_t* p) {
    Lanes out;
#if defined(ONEREC_ISA_avx512)
    out.r[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(ONEREC_ISA_avx2)
    for (int i = 0; i < 2; ++i) {
      out.r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
    }
#else
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = Get(p + i);
    out = Load(values);
#endif
    return out;
  }
  static void Read(const uint16_t* p, Lanes* a, Lanes* b) {
    *a = Read(p);
    *b = Read(p + 16);
  }
};

// log sum exp(x / temperature) of a row, read block by block. The sum is kept relative to a value
// near the largest so far; each lane's part of a block is a float, added to a double.
struct LogSumExp {
  explicit LogSumExp(const RowInput& row) : temperature(row.temperature), scale(row.scale) {}

  // Learns from some of the n values to come how large they are.
  template <class Format>
  void Expect(const typename Format::Type* p, int64_t n) {
    if (n < kFirst) return;
    Lanes a, b;
    Format::Read(p, &a, &b);
    RaiseTo(Largest(Max(b, Max(a, Set(-kInfinity)))));
  }

  // Takes n <= kBlock values.
  template <class Format>
  void Take(const typename Format::Type* p, int n) {
    if (n % 32 != 0 || largest == -kInfinity || !TakeNear<Format>(p, n)) TakeAny<Format>(p, n);
  }

  // Takes n values, a multiple of 32, in one pass, relative to `largest` as it is; false, and takes
  // nothing, if one is so much larger that its exponent would lose digits, far below, or NaN.
  template <class Format>
  bool TakeNear(const typename Format::Type* p, int n) {
    const Lanes shift = Set(largest), factor = Set(scale);
    Lanes part = Set(0.0f), far = Set(0.0f);
    for (int i = 0; i < n; i += 32) {
      __builtin_prefetch(p + i + kAhead);
      if (sizeof *p == 4) __builtin_prefetch(p + i + kAhead + 16);
      Lanes a, b;
      Format::Read(p + i, &a, &b);
      part = Add(part, Exp2Near(Mul(Sub(a, shift), factor), &far));
      part = Add(part, Exp2Near(Mul(Sub(b, shift), factor), &far));
    }
    if (AnyBit(far, ~4095u)) return false;
    Collect(part);
    return true;
  }

  // Takes n values relative to the largest of all so far; those past a multiple of 16 are read
  // through `tail`.
  template <class Format>
  void TakeAny(const typename Format::Type* p, int n) {
    float tail[16];
    const int whole = n & ~15;
    for (int i = whole; i < n; ++i) tail[i - whole] = Format::Get(p + i);
    for (int i = n; i < whole + 16; ++i) tail[i - whole] = -kInfinity;

    Lanes top = Set(-kInfinity);
    for (int i = 0; i < whole; i += 16) top = Max(Format::Read(p + i), top);
    if (n != whole) top = Max(Load(tail), top);
    RaiseTo(Largest(top));
    if (largest == -kInfinity) return;

    const Lanes shift = Set(largest), factor = Set(scale);
    const Lanes most = Set(kLargest);  // +inf is read as the largest finite value
    const auto term = [&](const Lanes& x) { return Exp2(Mul(Sub(Min(most, x), shift), factor)); };
    Lanes part = Set(0.0f);
    for (int i = 0; i < whole; i += 16) part = Add(part, term(Format::Read(p + i)));
    if (n != whole) part = Add(part, term(Load(tail)));
    Collect(part);
  }

  void Collect(const Lanes& part) {
    float parts[16];
    Store(parts, part);
    for (int i = 0; i < 16; ++i) sums[i] += static_cast<double>(parts[i]);
  }

  void RaiseTo(float top) {
    if (top > kLargest) top = kLargest;
    if (!(top > largest)) return;
    if (largest > -kInfinity) {
      const double down =
          Exp((static_cast<double>(largest) - static_cast<double>(top)) / temperature);
      for (double& sum : sums) sum *= down;
    }
    largest = top;
  }

  double Sum() const {
    double s[8];
    for (int i = 0; i < 8; ++i) s[i] = sums[i] + sums[i + 8];
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
  }

  double Value() const {
    if (largest == -kInfinity) return static_cast<double>(-kInfinity);
    return static_cast<double>(largest) / temperature + Log(Sum());
  }

  double temperature;
  float scale;
  float largest = -kInfinity;
  double sums[16] = {};
};

double ReadThreshold(const Collector& collector) {
  double value;
  __atomic_load(collector.threshold, &value, __ATOMIC_RELAXED);
  return value;
}

// A float at or below the logit at which score + (logit / T - norm) reaches the threshold; -inf
// itself is never reached.
float Floor(double threshold, double score, double norm, double temperature) {
  const double slack = (__builtin_fabs(threshold) + __builtin_fabs(score) + __builtin_fabs(norm)) *
                       temperature * 1e-14;
  const double floor = (threshold - score + norm) * temperature - slack;
  if (!(floor > -static_cast<double>(kLargest))) return -kLargest;
  if (floor >= static_cast<double>(kLargest)) return kLargest;
  const auto value = static_cast<float>(floor);
  if (static_cast<double>(value) <= floor) return value;
  uint32_t bits = __builtin_bit_cast(uint32_t, value);  // the next float below
  bits = value > 0 ? bits - 1 : value < 0 ? bits + 1 : 0x80000001u;
  return __builtin_bit_cast(float, bits);
}

// out[i] = logits[tokens[i]]; followed by 16 times -inf.
template <class Format, class Token>
void Gather(const typename Format::Type* logits, const Token* tokens, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = Format::Get(logits + tokens[i]);
    asm volatile("");  // vectorised, this loop takes several times as long
  }
  for (int64_t i = n; i < n + 16; ++i) out[i] = -kInfinity;
}

// Sets the children not to be chosen to -inf.
void Mask(const RowInput& row, float* values) {
  for (int list = 0; list < 2; ++list) {
    for (int64_t i = 0; i < row.banned_count[list]; ++i) {
      values[row.banned[list][i] - row.first_edge] = -kInfinity;
    }
  }
  if (row.tags == nullptr) return;
  for (int64_t i = 0; i < row.degree; ++i) {
    values[i] = (row.tags[i] & row.allow) != 0 ? values[i] : -kInfinity;
  }
}

bool AllAllowed(const RowInput& row) {
  return row.banned_count[0] + row.banned_count[1] == 0 && row.tags == nullptr;
}

bool Allowed(const RowInput& row, int64_t slot) {
  if (row.tags != nullptr && (row.tags[slot] & row.allow) == 0) return false;
  const int64_t edge = row.first_edge + slot;
  int64_t low = 0, high = row.banned_count[0];  // the first list ascends
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row.banned[0][middle] == edge) return false;
    if (row.banned[0][middle] < edge) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (int64_t i = 0; i < row.banned_count[1]; ++i) {
    if (row.banned[1][i] == edge) return false;
  }
  return true;
}

// The logits of the children in order, -inf after them up to a multiple of 16. Where only those of
// the chosen children matter, whether a child is allowed is asked when it is chosen: of most,
// never.
template <class Format>
const float* Legal(const RowInput& row, float* scratch) {
  const auto* logits = static_cast<const typename Format::Type*>(row.logits);
  const bool all = row.scoring != 1 || AllAllowed(row);
  if (row.degree == row.vocab) {  // every code is legal: the row as it lies
    const int64_t whole = row.vocab & ~int64_t{15};
    if (row.type == 0 && whole == row.vocab && all) return static_cast<const float*>(row.logits);
    for (int64_t i = 0; i < whole; i += 16) Store(scratch + i, Format::Read(logits + i));
    for (int64_t i = whole; i < row.vocab; ++i) scratch[i] = Format::Get(logits + i);
    for (int64_t i = row.vocab; i < row.vocab + 16; ++i) scratch[i] = -kInfinity;
  } else if (row.token_bytes == 1) {
    Gather<Format>(logits, static_cast<const uint8_t*>(row.tokens), row.degree, scratch);
  } else {
    Gather<Format>(logits, static_cast<const uint16_t*>(row.tokens), row.degree, scratch);
  }
  if (!all) Mask(row, scratch);
  return scratch;
}

// Spreads the logits of the legal children over all of them; the others get -inf.
const float* Spread(const RowInput& row, float* scratch) {
  const auto* logits = static_cast<const float*>(row.logits);
  for (int64_t i = 0; i < row.degree; ++i) scratch[i] = 0.0f;
  for (int64_t i = row.degree; i < row.degree + 16; ++i) scratch[i] = -kInfinity;
  Mask(row, scratch);
  for (int64_t i = 0; i < row.degree; ++i) {
    if (scratch[i] == 0.0f) scratch[i] = *logits++;
  }
  return scratch;
}

float LargestOf(const float* values, int64_t n) {
  Lanes top = Set(-kInfinity);
  for (int64_t i = 0; i < n; i += 16) top = Max(Load(values + i), top);
  return Largest(top);
}

// Log sum exp over a whole row, or infinity as soon as the part read so far shows that even the
// best legal code stays below the threshold.
template <class Format>
double FullNorm(const RowInput& row, const float* values, double threshold) {
  const auto* logits = static_cast<const typename Format::Type*>(row.logits);
  const double infinity = static_cast<double>(kInfinity);
  const bool bounded = threshold > -infinity && row.vocab > kBlock;
  double best = 0;
  if (bounded) {
    float top = LargestOf(values, row.degree);
    if (top == -kInfinity) return infinity;
    if (top > kLargest) top = kLargest;
    best = static_cast<double>(top);
  }
  LogSumExp sum(row);
  float seen = -kInfinity;
  double bound = infinity;  // of the sum relative to `seen`, beyond which the row is out
  sum.Expect<Format>(logits, row.vocab);
  for (int64_t i = 0; i < row.vocab; i += kBlock) {
    const int64_t left = row.vocab - i;
    sum.Take<Format>(logits + i, static_cast<int>(left < kBlock ? left : kBlock));
    if (!bounded) continue;
    if (sum.largest != seen) {
      seen = sum.largest;
      const auto far = static_cast<double>(seen);
      // With room for what the score's own sums round away.
      const double slack =
          1e-9 + (__builtin_fabs(best) + __builtin_fabs(far)) / row.temperature * 1e-15;
      const double exponent = (row.score - threshold) + (best - far) / row.temperature + slack;
      bound = exponent < 700.0 ? Exp(exponent) : infinity;
    }
    if (sum.Sum() > bound) return infinity;
  }
  return sum.Value();
}

void Push(const RowInput& row, double norm, double threshold, float logit, int64_t slot,
          Collector& collector) {
  const double x = logit > kLargest ? static_cast<double>(kLargest) : static_cast<double>(logit);
  const double score = row.score + (x / row.temperature - norm);
  if (!(score >= threshold)) return;
  collector.items[collector.size++] = {score, row.parent, static_cast<uint32_t>(slot)};
}

// Log sum exp over the legal children.
double LegalNorm(const RowInput& row, const float* values) {
  if (row.degree == 1) {
    const float x = values[0] > kLargest ? kLargest : values[0];
    return x > -kInfinity ? static_cast<double>(x) / row.temperature
                          : static_cast<double>(-kInfinity);
  }
  LogSumExp sum(row);
  const int64_t whole = (row.degree + 15) & ~int64_t{15};  // -inf follows
  sum.Expect<Float32>(values, whole);
  for (int64_t i = 0; i < whole; i += kBlock) {
    const int64_t left = whole - i;
    sum.Take<Float32>(values + i, static_cast<int>(left < kBlock ? left : kBlock));
  }
  return sum.Value();
}

// Where one row has far more children than the search keeps: a score that `width` of them reach,
// or -inf. There are many groups of children, and the width-th largest of their maxima is such.
double ReachedBy(const RowInput& row, const float* values, double norm, int64_t width,
                 float* maxima) {
  const int64_t groups = (4 * width + 15) & ~int64_t{15};
  for (int64_t i = 0; i < groups; i += 16) {
    Lanes top = Set(-kInfinity);
    for (int64_t j = i; j < row.degree; j += groups) top = Max(Load(values + j), top);
    Store(maxima + i, top);
  }
  const float logit = NthLargest(maxima, groups, width);
  if (logit == -kInfinity) return static_cast<double>(-kInfinity);
  const double x = logit > kLargest ? static_cast<double>(kLargest) : static_cast<double>(logit);
  return row.score + (x / row.temperature - norm);
}

template <class Format>
void Scan(const RowInput& row, float* scratch, Collector& collector) {
  double threshold = ReadThreshold(collector);
  if (row.scoring != 2 && row.score < threshold) return;  // a code's log probability is at most 0
  const float* values = row.type == kLegalOnly ? Spread(row, scratch) : Legal<Format>(row, scratch);

  double norm = 0.0;
  if (row.scoring == 0) {
    norm = FullNorm<Format>(row, values, threshold);
  } else if (row.scoring == 1) {
    norm = LegalNorm(row, values);
  }
  if (__builtin_isinf(norm)) return;
  if (threshold == static_cast<double>(-kInfinity) && row.degree >= 8 * collector.width) {
    if (!AllAllowed(row)) {
      for (int64_t i = 0; i < row.degree && values != scratch; ++i) scratch[i] = values[i];
      for (int64_t i = row.degree; i < row.degree + 16; ++i) scratch[i] = -kInfinity;
      Mask(row, scratch);
      values = scratch;
    }
    Raise(collector, ReachedBy(row, values, norm, collector.width, scratch + row.vocab + 32));
    threshold = ReadThreshold(collector);
  }

  const bool all = AllAllowed(row);
  float floor = Floor(threshold, row.score, norm, row.temperature);
  Lanes floors = Set(floor);
  for (int64_t i = 0; i < row.degree; i += 16) {
    uint32_t hits = AtLeast(Load(values + i), floors);
    if (hits == 0) continue;
    if (collector.size + 16 > collector.capacity) {
      Compact(collector);
      threshold = ReadThreshold(collector);
      floor = Floor(threshold, row.score, norm, row.temperature);
      floors = Set(floor);
      hits = AtLeast(Load(values + i), floors);
    }
    for (; hits != 0; hits &= hits - 1) {
      const int64_t slot = i + __builtin_ctz(hits);
      if (all || Allowed(row, slot)) Push(row, norm, threshold, values[slot], slot, collector);
    }
  }
}

}  // namespace

void ScanRow(const RowInput& row, float* scratch, Collector& collector) {
  if (row.type == 0 || row.type == kLegalOnly) {
    Scan<Float32>(row, scratch, collector);
  } else if (row.type == 1) {
    Scan<Float16>(row, scratch, collector);
  } else {
    Scan<BFloat16>(row, scratch, collector);
  }
}

}  // namespace onerec::ONEREC_ISA
