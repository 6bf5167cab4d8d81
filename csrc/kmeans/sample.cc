#include "kmeans/sample.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace onerec {
namespace {

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

}  // namespace

std::vector<int64_t> DrawRows(int64_t total, int64_t count, uint64_t seed) {
  std::vector<int64_t> order(total);
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(seed);
  for (int64_t i = 0; i < count && i + 1 < total; ++i) {
    std::swap(order[i], order[i + random.Below(total - i)]);
  }
  order.resize(count);
  return order;
}

std::vector<int64_t> SampleRows(int64_t total, int64_t count, uint64_t seed) {
  std::vector<int64_t> rows = DrawRows(total, count, seed);
  std::sort(rows.begin(), rows.end());
  return rows;
}

void DrawCenters(const FloatRows& x, int64_t clusters, uint64_t seed, float* centers) {
  const std::vector<int64_t> order = DrawRows(x.rows, x.rows, seed);
  const auto bytes = sizeof(float) * x.columns;
  std::vector<int64_t> table(16, -1);
  while (static_cast<int64_t>(table.size()) < 4 * clusters) table.resize(2 * table.size(), -1);
  std::vector<int64_t> repeats;
  int64_t drawn = 0;
  for (int64_t i = 0; i < x.rows && drawn < clusters; ++i) {
    const float* row = x.data + order[i] * x.stride;
    uint64_t hash = 0;
    for (int64_t j = 0; j < x.columns; ++j) {
      const float value = row[j] + 0.0f;  // -0 and 0 are one value
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      hash = (hash ^ bits) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 32;
    }
    size_t slot = hash & (table.size() - 1);
    bool known = false;
    for (; table[slot] >= 0 && !known; slot = (slot + 1) & (table.size() - 1)) {
      known = std::equal(row, row + x.columns, x.data + table[slot] * x.stride);
    }
    if (known) {
      repeats.push_back(order[i]);
      continue;
    }
    table[slot] = order[i];
    std::memcpy(centers + drawn++ * x.columns, row, bytes);
  }
  for (size_t t = 0; drawn < clusters; ++t) {
    std::memcpy(centers + drawn++ * x.columns, x.data + repeats[t] * x.stride, bytes);
  }
}

}  // namespace onerec
