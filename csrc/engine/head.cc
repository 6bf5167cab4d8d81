#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/call.h"

namespace onerec::engine {

bool Call::Few(const LegalCodes& legal) const {
  int64_t panels = 0, all = 0;
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t first = b * o_.beam_width, live = w_.live[b];
    all += live * head_panels_;
    for (int64_t beam = first; beam < first + live; ++beam) {
      if (Forced(legal, beam)) continue;
      panels += std::min(legal.offsets[beam + 1] - legal.offsets[beam], head_panels_);
    }
  }
  return panels * 2 < all;
}

void Call::Head(const PackedMatrix& head) {
  const int64_t width = o_.beam_width, size = c_.codebook_size;
  constexpr int64_t kGroup = 16;
  Parallel(DivideUp(head_panels_, kGroup), [&](int64_t, int64_t group) {
    GemmTile tile = TileOf(head, group * kGroup, kGroup);
    tile.x_stride = d_;
    tile.y_stride = size;
    for (int64_t b = 0; b < batch_; ++b) {
      tile.x = LastOf(b);
      tile.m = w_.live[b];
      tile.y = w_.logits.data() + b * width * size + group * kGroup * kPanelWidth;
      gemm_(tile);
    }
  });
}

void Call::LegalHead(const PackedMatrix& head, const LegalCodes& legal) {
  const int64_t beams = batch_ * o_.beam_width;
  const auto each = [&](auto&& take) {  // every pair of a beam and a panel, in order
    for (int64_t beam = 0; beam < beams; ++beam) {
      if (Forced(legal, beam)) continue;
      int64_t last = -1;
      for (int64_t i = legal.offsets[beam]; i < legal.offsets[beam + 1]; ++i) {
        const int64_t panel = legal.codes[i] / kPanelWidth;
        if (panel != last) take(beam, panel);
        last = panel;
      }
    }
  };
  std::fill_n(w_.panel_begin.begin(), head_panels_ + 2, 0);
  each([&](int64_t, int64_t panel) { ++w_.panel_begin[panel + 2]; });
  std::partial_sum(w_.panel_begin.begin(), w_.panel_begin.begin() + head_panels_ + 2,
                   w_.panel_begin.begin());
  const int64_t pairs = w_.panel_begin[head_panels_ + 1];
  Grow(w_.panel_rows, pairs);
  Grow(w_.found, pairs * kPanelWidth);
  each([&](int64_t beam, int64_t panel) {  // leaves the first pair of panel p in panel_begin[p]
    const int64_t at = w_.panel_begin[panel + 1]++;
    w_.panel_rows[at] = w_.last_row[beam];
  });
  Parallel(pairs > 0 ? head_panels_ : 0, [&](int64_t, int64_t panel) {
    const int64_t first = w_.panel_begin[panel];
    GemmTile tile = TileOf(head, panel, 1);
    tile.x = w_.last.data();
    tile.x_stride = d_;
    tile.rows = w_.panel_rows.data() + first;
    tile.m = w_.panel_begin[panel + 1] - first;
    tile.y = w_.found.data() + first * kPanelWidth;
    tile.y_stride = kPanelWidth;
    if (tile.m > 0) gemm_(tile);
  });
  std::copy_backward(w_.panel_begin.begin(), w_.panel_begin.begin() + head_panels_,
                     w_.panel_begin.begin() + head_panels_ + 1);
  int64_t at = 0;
  for (int64_t beam = 0; beam < beams; ++beam) {
    if (Forced(legal, beam)) {
      std::fill(w_.logits.begin() + legal.offsets[beam],
                w_.logits.begin() + legal.offsets[beam + 1], 0.0f);
      continue;
    }
    int64_t last = -1;
    for (int64_t i = legal.offsets[beam]; i < legal.offsets[beam + 1]; ++i) {
      const int64_t panel = legal.codes[i] / kPanelWidth;
      if (panel != last) at = w_.panel_begin[panel + 1]++;
      last = panel;
      w_.logits[i] = w_.found[at * kPanelWidth + legal.codes[i] % kPanelWidth];
    }
  }
}

LegalCodes Call::Children(int level) {
  const TrieView& view = trie_->View();
  const int64_t count = o_.beam_width, all = batch_ * count;
  Grow(w_.nodes, all);
  trie_->Lookup(w_.sids.data(), all, c_.levels, level, w_.nodes.data(), workers_);
  w_.legal_codes.clear();
  w_.legal_offsets.assign(1, 0);
  for (int64_t i = 0; i < all; ++i) {
    const int64_t node = w_.nodes[i];
    if (node >= 0 && (level > 0 || i % count == 0)) {
      const int64_t end = view.FirstEdge(level, node + 1);
      for (int64_t edge = view.FirstEdge(level, node); edge < end; ++edge) {
        w_.legal_codes.push_back(view.Token(level, edge));
      }
    }
    w_.legal_offsets.push_back(static_cast<int64_t>(w_.legal_codes.size()));
  }
  return {w_.legal_offsets.data(), w_.legal_codes.data()};
}

void Call::AddLogProbs(int level, const LegalCodes& legal, bool few, int64_t first, int64_t beams,
                       float* scratch, float* scores) const {
  const float* x = w_.logits.data() + first * c_.codebook_size;
  int64_t n = c_.codebook_size;
  const int32_t *begin = nullptr, *end = nullptr;
  if (legal.codes != nullptr) {
    begin = legal.codes + legal.offsets[first];
    end = legal.codes + legal.offsets[first + 1];
    n = end - begin;
    if (few) {
      x = w_.logits.data() + legal.offsets[first];
    } else {
      for (int64_t i = 0; i < n; ++i) scratch[i] = x[begin[i]];
      x = scratch;
    }
  }
  float log_sum = 0.0f;
  if (n > 0) {
    float* const odds = scratch + c_.codebook_size;
    std::copy_n(x, n, odds);
    const int64_t top = std::max_element(x, x + n) - x;
    f_.softmax(odds, n, 1.0f);  // the largest probability does not underflow
    log_sum = x[top] - std::log(odds[top]);
  }
  for (int64_t i = first; i < first + beams; ++i) {
    int64_t at = w_.sids[i * c_.levels + level];
    if (begin != nullptr) {
      const int32_t* const found = std::lower_bound(begin, end, static_cast<int32_t>(at));
      at = found != end && *found == at ? found - begin : -1;
    }
    scores[i] += at < 0 ? -std::numeric_limits<float>::infinity() : x[at] - log_sum;
  }
}

}  // namespace onerec::engine
