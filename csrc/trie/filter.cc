// What a trie does not hold any more, or not for everybody: removed leaves and tags.
#include <algorithm>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "onerec/trie.h"
#include "support/error.h"

namespace onerec {

void Trie::AppendDead(uint64_t allow, const std::vector<int64_t>& leaves,
                      std::vector<int64_t>* dead) const {
  const TrieView& view = view_;
  const int last = view.levels - 1;
  const bool any = (allow & kEveryTag) != 0;
  // What has died anew at the level at hand. Under a choice of tags a removed leaf may be the last
  // allowed one of an edge that is not dead otherwise, so the trie's own count as new.
  std::vector<int64_t> fresh, next;
  const std::vector<int64_t>& removed = Dead(last);
  if (any) {
    std::set_difference(leaves.begin(), leaves.end(), removed.begin(), removed.end(),
                        std::back_inserter(fresh));
  } else {
    std::set_union(leaves.begin(), leaves.end(), removed.begin(), removed.end(),
                   std::back_inserter(fresh));
  }
  for (int level = last; level >= 0; --level) {
    const auto begin = static_cast<int64_t>(dead[level].size());
    if (any) {
      std::set_union(fresh.begin(), fresh.end(), Dead(level).begin(), Dead(level).end(),
                     std::back_inserter(dead[level]));
    } else {
      dead[level].insert(dead[level].end(), fresh.begin(), fresh.end());
    }
    if (level == 0) break;
    next.clear();
    const uint64_t* const tags = any ? nullptr : Tags(level);
    auto gone = dead[level].begin() + begin;
    for (size_t i = 0; i < fresh.size();) {
      const int64_t node = view.NodeOf(level, fresh[i]);
      const int64_t first = view.FirstEdge(level, node), end = view.FirstEdge(level, node + 1);
      gone = std::lower_bound(gone, dead[level].end(), first);
      bool live = false;
      if (any) {
        const auto after = std::lower_bound(gone, dead[level].end(), end);
        live = after - gone < end - first;
        gone = after;
      } else {
        for (int64_t edge = first; edge < end && !live; ++edge) {
          if (gone != dead[level].end() && *gone == edge) {
            ++gone;
          } else {
            live = tags == nullptr || (tags[edge] & allow) != 0;
          }
        }
      }
      if (!live) next.push_back(node);
      while (i < fresh.size() && fresh[i] < end) ++i;
    }
    fresh.swap(next);
  }
}

std::shared_ptr<const Trie> Trie::Without(const int64_t* leaves, int64_t n) const {
  for (int64_t i = 0; i < n; ++i) {
    if (leaves[i] < 0 || leaves[i] >= view_.Leaves() || (i > 0 && leaves[i] <= leaves[i - 1])) {
      throw std::invalid_argument(
          WantedGot("leaves", Text("ascending distinct ids in [0, ", view_.Leaves(), ")"),
                    leaves[i], " at ", i));
    }
  }
  std::shared_ptr<Trie> made(new Trie);
  made->block_ = block_;
  made->view_ = view_;
  made->tags_ = tags_;
  AppendDead(kEveryTag, {leaves, leaves + n}, made->dead_.data());
  return made;
}

std::shared_ptr<const Trie> Trie::WithTags(const uint64_t* tags) const {
  std::shared_ptr<Trie> made(new Trie);
  made->block_ = block_;
  made->view_ = view_;
  made->dead_ = dead_;
  if (tags == nullptr) return made;
  auto edges = std::make_shared<EdgeTags>();
  const int last = view_.levels - 1;
  for (int level = last; level >= 0; --level) {
    std::vector<uint64_t>& own = (*edges)[level];
    own.resize(view_.nodes[level + 1], kEveryTag);
    for (int64_t edge = 0; edge < view_.nodes[level + 1]; ++edge) {
      uint64_t& joined = own[edge];
      if (level == last) {
        if ((tags[edge] & kEveryTag) != 0) {
          throw std::invalid_argument(WantedGot("tags", "bits below 63", tags[edge], " at ", edge));
        }
        joined |= tags[edge];
        continue;
      }
      const uint64_t* const below = (*edges)[level + 1].data();
      const int64_t end = view_.FirstEdge(level + 1, edge + 1);
      for (int64_t i = view_.FirstEdge(level + 1, edge); i < end; ++i) joined |= below[i];
    }
  }
  made->tags_ = std::move(edges);
  return made;
}

}  // namespace onerec
