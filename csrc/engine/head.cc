#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/call.h"

namespace onerec::engine {

bool Call::Few(int level, const LegalCodes& legal) const {
  if (c_.node_outputs) return level > 0;
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

void Call::AllLogits(int level) {
  const int64_t size = c_.codebook_size;
  // Moves the logits of n codes, which lie at `from` or before it, to their places in a row.
  const auto spread = [&](const float* from, const int32_t* codes, int64_t n, float* row) {
    int64_t end = size;
    for (int64_t i = n - 1; i >= 0; --i) {
      const float value = from[i];
      std::fill(row + codes[i] + 1, row + end, -std::numeric_limits<float>::infinity());
      row[codes[i]] = value;
      end = codes[i];
    }
    std::fill(row, row + end, -std::numeric_limits<float>::infinity());
  };
  float* const logits = w_.logits.data();
  if (c_.node_outputs && level > 0) {
    const LegalCodes codes = Children(m_.own->View(), level);
    NodeHead(level, codes);
    for (int64_t beam = batch_ * o_.beam_width - 1; beam >= 0; --beam) {
      const int64_t begin = codes.offsets[beam], n = codes.offsets[beam + 1] - begin;
      if (n > 0) spread(logits + begin, codes.codes + begin, n, logits + beam * size);
    }
    return;
  }
  const PackedMatrix& head = m_.heads[level];
  Head(head);
  if (head.n == size) return;
  Parallel(batch_, [&](int64_t, int64_t b) {
    for (int64_t i = 0; i < w_.live[b]; ++i) {
      float* const row = logits + (b * o_.beam_width + i) * size;
      spread(row, m_.first_codes.data(), head.n, row);
    }
  });
}

void Call::Head(const PackedMatrix& head) {
  const int64_t width = o_.beam_width, size = c_.codebook_size;
  constexpr int64_t kGroup = 16;
  Parallel(DivideUp(head.n, kGroup * kPanelWidth), [&](int64_t, int64_t group) {
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

void Call::LegalHead(int level, const LegalCodes& legal) {
  if (c_.node_outputs) return NodeHead(level, legal);
  const PackedMatrix& head = m_.heads[level];
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

void Call::NodeHead(int level, const LegalCodes& legal) {
  const TrieView& own = m_.own->View();
  const PackedMatrix& head = m_.heads[level];
  w_.at_nodes.clear();
  for (int64_t beam = 0; beam < batch_ * o_.beam_width; ++beam) {
    const int64_t begin = legal.offsets[beam], end = legal.offsets[beam + 1];
    if (Forced(legal, beam)) {
      std::fill(w_.logits.begin() + begin, w_.logits.begin() + end, 0.0f);
    } else if (begin < end) {
      w_.at_nodes.push_back({w_.nodes[beam], beam});
    }
  }
  std::sort(w_.at_nodes.begin(), w_.at_nodes.end(), [](const AtNode& a, const AtNode& b) {
    return a.node != b.node ? a.node < b.node : a.beam < b.beam;
  });
  const auto wanted = static_cast<int64_t>(w_.at_nodes.size());
  Grow(w_.panel_rows, wanted);
  w_.groups.clear();
  int64_t found = 0;
  for (int64_t i = 0; i < wanted; ++i) {
    const AtNode& at = w_.at_nodes[i];
    w_.panel_rows[i] = w_.last_row[at.beam];
    if (i == 0 || at.node != w_.at_nodes[i - 1].node) {
      const int64_t first = own.FirstEdge(level, at.node) / kPanelWidth;
      const int64_t end = DivideUp(own.FirstEdge(level, at.node + 1), kPanelWidth);
      w_.groups.push_back({i, i, first, end - first, found});
    }
    NodeGroup& group = w_.groups.back();
    group.end = i + 1;
    found += group.panels * kPanelWidth;
  }
  Grow(w_.found, found);
  Parallel(static_cast<int64_t>(w_.groups.size()), [&](int64_t, int64_t i) {
    const NodeGroup& group = w_.groups[i];
    GemmTile tile = TileOf(head, group.first_panel, group.panels);
    tile.x = w_.last.data();
    tile.x_stride = d_;
    tile.rows = w_.panel_rows.data() + group.begin;
    tile.m = group.end - group.begin;
    tile.y = w_.found.data() + group.found;
    tile.y_stride = group.panels * kPanelWidth;
    gemm_(tile);
    for (int64_t r = 0; r < tile.m; ++r) {
      const AtNode& at = w_.at_nodes[group.begin + r];
      const float* const row = tile.y + r * tile.y_stride;
      int64_t edge = own.FirstEdge(level, at.node);
      for (int64_t j = legal.offsets[at.beam]; j < legal.offsets[at.beam + 1]; ++j, ++edge) {
        while (own.Token(level, edge) != legal.codes[j]) ++edge;
        w_.logits[j] = row[edge - group.first_panel * kPanelWidth];
      }
    }
  });
}

int64_t Call::Child(int level, int64_t node, int64_t code) const {
  const TrieView& own = m_.own->View();
  int64_t low = own.FirstEdge(level, node), high = own.FirstEdge(level, node + 1);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (own.Token(level, middle) <= code ? low : high) = middle;
  }
  return low;
}

LegalCodes Call::Children(const TrieView& view, int level) {
  w_.legal_codes.clear();
  w_.legal_offsets.assign(1, 0);
  for (int64_t beam = 0; beam < batch_ * o_.beam_width; ++beam) {
    const int64_t node = w_.nodes[beam];
    const int64_t live = w_.live[beam / o_.beam_width];
    if (node >= 0 && beam % o_.beam_width < live) {
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
