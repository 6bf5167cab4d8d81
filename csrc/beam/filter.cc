#include "beam/filter.h"

#include <algorithm>

namespace onerec {

int64_t OwnItems::UsedUp(int level, const RequestFilter& filter, int64_t beam, int64_t first,
                         int64_t last, int64_t* edges) const {
  const int64_t* const path = paths + beam * path_size;
  int64_t count = 0;
  for (int64_t i = 0; i < items; ++i) {
    const int64_t edge = path[i * view->levels + level];
    if (edge >= first && edge < last && !AnyLeft(level, edge, filter, path)) edges[count++] = edge;
  }
  return count;
}

bool OwnItems::AnyLeft(int level, int64_t edge, const RequestFilter& filter,
                       const int64_t* path) const {
  const int bottom = view->levels - 1;
  if (filter.allow == kEveryTag) {  // every leaf counts: no need to look at them
    const Edges& gone = filter.dead[bottom];
    const int64_t begin = view->FirstLeaf(level + 1, edge);
    const int64_t end = view->FirstLeaf(level + 1, edge + 1);
    int64_t left = end - begin;
    if (left > items + gone.size()) return true;
    left -=
        std::lower_bound(gone.begin, gone.end, end) - std::lower_bound(gone.begin, gone.end, begin);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t leaf = path[i * view->levels + bottom];
      left -= leaf >= begin && leaf < end;
    }
    return left > 0;
  }
  if (level == bottom) return false;  // it is one of the items
  if (trie == nullptr) {
    const int64_t end = view->FirstLeaf(level + 1, edge + 1);
    for (int64_t leaf = view->FirstLeaf(level + 1, edge); leaf < end; ++leaf) {
      if ((leaf_tags[leaf] & filter.allow) == 0 || filter.dead[bottom].Has(leaf)) continue;
      bool own = false;
      for (int64_t i = 0; i < items; ++i) own |= path[i * view->levels + bottom] == leaf;
      if (!own) return true;
    }
    return false;
  }
  const uint64_t* const tags = trie->Tags(level + 1);
  const int64_t end = view->FirstEdge(level + 1, edge + 1);
  for (int64_t child = view->FirstEdge(level + 1, edge); child < end; ++child) {
    if ((tags[child] & filter.allow) == 0 || filter.dead[level + 1].Has(child)) continue;
    bool own = false;
    for (int64_t i = 0; i < items; ++i) own |= path[i * view->levels + level + 1] == child;
    if (!own || AnyLeft(level + 1, child, filter, path)) return true;
  }
  return false;
}
}  // namespace onerec
