// What the beam search compiles once per instruction set. Plain data only: an inline function that
// is emitted here would carry one instruction set into code that runs with another.
#pragma once

#include <cstdint>

#include "support/dispatch.h"

namespace onerec {

struct Candidate {
  double score;
  uint32_t parent;
  uint32_t slot;  // index among the parent's children
};

// Keeps at least the best `width` of the candidates that it is given.
struct Collector {
  Candidate* items;
  int64_t size;
  int64_t capacity;  // at least width + kCollectorSlack
  int64_t width;
  double* threshold;  // candidates below it cannot be among the best; shared by a request's rows
};
inline constexpr int64_t kCollectorSlack = 16;

// Makes room by keeping the best `width`, and raises the threshold.
void Compact(Collector& collector);
// Raises the threshold to `score`, which `width` candidates of the request reach.
void Raise(Collector& collector, double score);
// The nth largest of n values, from 1; reorders them.
float NthLargest(float* values, int64_t n, int64_t nth);

inline constexpr int kLegalOnly = 3;  // a LogitType: the floats of the legal children alone

struct RowInput {
  const void* logits;
  int type;  // LogitType
  int64_t vocab;
  const void* tokens;  // of the children, ascending
  int token_bytes;
  int64_t degree;
  // Children not to be chosen, as edges, the first list ascending; the first child is first_edge.
  const int64_t* banned[2];
  int64_t banned_count[2];
  int64_t first_edge;
  // Null, or tags of the children; one without a tag of `allow` is not to be chosen either.
  const uint64_t* tags;
  uint64_t allow;
  double score;
  uint32_t parent;
  int scoring;  // Scoring
  double temperature;
  float scale;  // log2(e) / temperature, or the largest float
};

// Scores a beam's legal children and gives the collector those that may be among the best.
// scratch: 2 * vocab + 64 floats. The threshold is read and raised with relaxed atomics.
ONEREC_EACH_ISA(void ScanRow(const RowInput& row, float* scratch, Collector& collector);)

}  // namespace onerec
