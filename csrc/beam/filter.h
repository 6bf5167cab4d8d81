// What the beams of a request must not reach.
#pragma once

#include <algorithm>
#include <cstdint>

#include "onerec/trie.h"

namespace onerec {

// Ascending edges of one level.
struct Edges {
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;
  int64_t size() const { return end - begin; }
  bool Has(int64_t edge) const { return std::binary_search(begin, end, edge); }
  // The first that is not below `edge`; without a jump, which would be guessed wrong half the time.
  const int64_t* From(int64_t edge) const {
    const int64_t* at = begin;
    for (int64_t left = size(); left > 0; left /= 2) {
      const int64_t half = (left + 1) / 2;
      at += at[half - 1] < edge ? half : 0;
    }
    return at;
  }
};

// What one request's beams must not reach, at each level.
struct RequestFilter {
  Edges dead[kMaxTrieLevels];  // no live leaf below; of the last level, the leaves
  uint64_t allow = kEveryTag;
};

// The finished items of the beams of a step, which they must not reach again.
class OwnItems {
 public:
  // Writes the edges of [first, last) that the beam's own items use up, alone or with what the
  // filter takes; returns how many (at most `items`).
  int64_t UsedUp(int level, const RequestFilter& filter, int64_t beam, int64_t first, int64_t last,
                 int64_t* edges) const;

  const TrieView* view = nullptr;
  const Trie* trie = nullptr;           // for its tags, or
  const uint64_t* leaf_tags = nullptr;  // the leaves'; both may be null if filters allow every tag
  const int64_t* paths = nullptr;       // [beams, path_size], edges of each item, level by level
  int64_t path_size = 0;
  int64_t items = 0;  // finished items of every beam

 private:
  bool AnyLeft(int level, int64_t edge, const RequestFilter& filter, const int64_t* path) const;
};

}  // namespace onerec
