#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "onerec/live_trie.h"
#include "support/error.h"

namespace onerec {

LiveTrie::LiveTrie(std::shared_ptr<const Trie> trie) : now_{0, std::move(trie)} {}

LiveTrie::Epoch LiveTrie::Pin() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return now_;
}

int64_t LiveTrie::Publish(std::shared_ptr<const Trie> trie) {
  std::shared_ptr<const Trie> freed;  // after the lock, if nobody else has it
  const std::lock_guard<std::mutex> lock(mutex_);
  freed = std::exchange(before_, std::exchange(now_.trie, std::move(trie)));
  return ++now_.id;
}

int64_t LiveTrie::Insert(const int32_t* sids, int64_t n, int64_t row_stride, const uint64_t* tags) {
  const std::lock_guard<std::mutex> lock(writing_);
  return Publish(Pin().trie->With(sids, n, row_stride, tags));
}

int64_t LiveTrie::Remove(const int32_t* sids, int64_t n, int64_t row_stride) {
  const std::lock_guard<std::mutex> lock(writing_);
  const std::shared_ptr<const Trie> trie = Pin().trie;
  std::vector<int64_t> leaves(n);
  trie->Lookup(sids, n, row_stride, trie->View().levels, leaves.data(), 1);
  std::sort(leaves.begin(), leaves.end());
  leaves.erase(std::unique(leaves.begin(), leaves.end()), leaves.end());
  const bool missing = !leaves.empty() && leaves[0] < 0;
  return Publish(
      trie->Without(leaves.data() + missing, static_cast<int64_t>(leaves.size()) - missing));
}

int64_t LiveTrie::Fold() {
  const std::lock_guard<std::mutex> lock(writing_);
  return Publish(Pin().trie->With(nullptr, 0, 0, nullptr));
}

int64_t LiveTrie::Swap(std::shared_ptr<const Trie> trie) {
  const std::lock_guard<std::mutex> lock(writing_);
  const TrieView now = Pin().trie->View(), next = trie->View();
  if (next.levels != now.levels || next.codebook_size != now.codebook_size) {
    throw std::invalid_argument(
        WantedGot("trie", Text(now.levels, " levels of ", now.codebook_size, " codes"), next.levels,
                  " of ", next.codebook_size));
  }
  return Publish(std::move(trie));
}

int64_t LiveTrie::Rollback() {
  const std::lock_guard<std::mutex> lock(writing_);
  std::shared_ptr<const Trie> before;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    before = before_;
  }
  if (before == nullptr) throw std::logic_error("Rollback: there was no change");
  return Publish(std::move(before));
}

}  // namespace onerec
