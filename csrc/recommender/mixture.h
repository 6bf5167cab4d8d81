// A ranking by generator, dense head and counts: the evidence of `CountRanker` in
// onerec/model/counting.py and the weights of `Mixture` in onerec/inference/mixture.py.
//
// mixture.bin, version 1, little endian: char[8] "ONERMIXT", u32 version, u32 0x01020304, u64 size
// of the file, u64 items N, u64 lists Q, u64 parts P, zeros up to 240, u64 XXH64 (seed 0) of bytes
// 256 .. end, u64 XXH64 of bytes 0 .. 248; then f64 masked[2 + P], f64 unmasked[2 + P], i64 [P][3]
// (list, ages and constants of each part), f64 recency[sum of ages], i64 constant items and f64
// constant weights [sum of constants], i64 place[N] (of each item in the order of popularity), i64
// offsets[Q][N + 1], f32 weights and then i32 items of all lists one after another.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "onerec/export.h"
#include "support/file_block.h"

namespace onerec {

// Weighted neighbors of each of N items: those of item i are at offsets[i] .. offsets[i + 1].
struct CountList {
  const int64_t* offsets;
  const int32_t* items;
  const float* weights;
};

// sum_a recency[a] * weight(a-th last item -> candidate), and weights that every history gets.
struct CountPart {
  int64_t list;
  std::span<const double> recency;
  std::span<const int64_t> constant_items;
  std::span<const double> constant_weights;
};

class Mixture {
 public:
  // Throws EngineFormatError for a bad file or one of another number of items,
  // std::runtime_error if it cannot be read.
  static Mixture Load(const std::string& path, int64_t items);

  int64_t Parts() const { return static_cast<int64_t>(parts_.size()); }
  // Of generator, dense head and each part.
  std::span<const double> Weights(bool exclude_history) const {
    return exclude_history ? masked_ : unmasked_;
  }

  struct Evidence {
    std::vector<int64_t> items;              // ascending
    std::vector<std::vector<float>> values;  // of each part, for each of `items`
  };
  // What each part knows of any item, divided by its standard deviation over the catalogue.
  Evidence Of(const std::vector<int64_t>& history) const;

 private:
  FileBlock block_;
  int64_t items_ = 0;
  std::span<const double> masked_, unmasked_;
  const int64_t* place_ = nullptr;
  std::vector<CountList> lists_;
  std::vector<CountPart> parts_;
};

// Writes mixture.bin. `place` is int64 [n], `masked` and `unmasked` [2 + parts].
// Throws std::runtime_error if it cannot be written.
ONEREC_API void SaveMixture(const std::string& path, int64_t n, const int64_t* place,
                            const double* masked, const double* unmasked,
                            const std::vector<CountList>& lists,
                            const std::vector<CountPart>& parts);

}  // namespace onerec
