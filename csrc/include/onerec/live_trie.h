// A catalogue that changes while readers decode.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "onerec/export.h"
#include "onerec/trie.h"

namespace onerec {

// The trie of the moment. A reader pins it and keeps what it pinned; each change makes another trie
// aside and puts it in its place at once. All calls may come from any thread; changes wait for one
// another, readers wait for nobody.
class ONEREC_API LiveTrie {
 public:
  struct Epoch {
    int64_t id;  // counts the changes
    std::shared_ptr<const Trie> trie;
  };

  explicit LiveTrie(std::shared_ptr<const Trie> trie);

  Epoch Pin() const;

  // Each returns the epoch that it made. They throw what Trie's calls throw, and change nothing
  // then.
  //
  // Adds semantic ids, see Trie::With: the whole trie is built anew, and leaf ids are new.
  int64_t Insert(const int32_t* sids, int64_t n, int64_t row_stride, const uint64_t* tags);
  // Takes semantic ids away, see Trie::Without; those that are not there are ignored. Leaf ids
  // stay. Fold when the removed ones are no longer few: a search whose request has filters of its
  // own looks at all of them when it starts.
  int64_t Remove(const int32_t* sids, int64_t n, int64_t row_stride);
  // Builds the trie without the removed leaves; leaf ids are new.
  int64_t Fold();
  // Another trie. Throws std::invalid_argument if its levels or codebook size differ.
  int64_t Swap(std::shared_ptr<const Trie> trie);
  // Puts the trie before the last change in place again; calling it twice changes nothing. Throws
  // std::logic_error if there was no change.
  int64_t Rollback();

 private:
  int64_t Publish(std::shared_ptr<const Trie> trie);

  std::mutex writing_;        // held through a change
  mutable std::mutex mutex_;  // held for a moment, guards what follows
  Epoch now_;
  std::shared_ptr<const Trie> before_;
};

}  // namespace onerec
