// Item ids in, sessions or rankings of item ids out: an exported folder served by the native
// engine, with the rules of onerec.Recommender in Python and the same items.
//
// `onerec export` writes the folder: engine.bin, trie.bin, catalog.bin and, for a run that ranks
// items by a mixture of generator, dense head and counts, mixture.bin. catalog.bin, version 2,
// little endian: char[8] "ONERCATL", u32 version, u32 0x01020304, u64 size of the file, u64 items
// N, u64 leaves, u64 whether ids are text, u64 bytes of the ids, u64 whether items have tags, u64
// XXH64 (seed 0) of bytes 128 .. end, u64 XXH64 of bytes 0 .. 72, the u64 at byte 248 of engine.bin
// and of trie.bin of its export (0: any), and of its mixture.bin (0: none); zeros up to 128; then
// i64 leaf_of_item[N], i64 by_id[N] (items in ascending order of their ids), i64
// leaf_offsets[leaves + 1], i64 leaf_items[N] (items of each leaf, ascending), the tags u64 [N] if
// there are any, and the ids: i64 [N], or i64 offsets[N + 1] and zero-terminated UTF-8.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "onerec/engine.h"
#include "onerec/export.h"

namespace onerec {

struct RecommendOptions {
  int64_t beam_width = 128;
  int64_t session_length = 0;  // 0: the model's own, which is also the most
  int64_t num_sessions = 1;    // at most beam_width
  bool exclude_history = true;
  uint64_t allow_tags = kEveryTag;  // items with one of these tags alone
  std::optional<Scoring> scoring;   // none: the softmax that the network was trained with
  double temperature = 1.0;
  int num_threads = 1;
};

struct RecommendedSession {
  std::vector<int64_t> items;  // item indices, in order
  float score = 0.0f;          // sum of the log-probabilities of their codes
};

struct RankOptions {
  int64_t k = 10;          // most items
  int64_t beam_width = 0;  // 0: the larger of k and 128
  // None: by the mixture of generator, dense head and counts where the export has one, else by the
  // generator. 0 .. 1: weight of the dense head's log-probability beside the generator's; above 0
  // the model must have a dense head (EngineConfig::dense_head).
  std::optional<double> dense_weight;
  int64_t dense_top = 50;  // best items of the dense head, and of each count, that join the beam's
  bool exclude_history = true;
  uint64_t allow_tags = kEveryTag;  // items with one of these tags alone
  std::optional<Scoring> scoring;   // of the beam; none: the softmax of training
  double temperature = 1.0;         // of the beam
  int num_threads = 1;
};

// An item's index is its row in the catalogue. Read-only: threads may share one object.
class ONEREC_API Recommender {
 public:
  // Throws EngineFormatError or TrieFormatError for a bad file, std::runtime_error if one cannot be
  // read.
  static std::shared_ptr<const Recommender> Load(const std::string& folder);
  ~Recommender();
  Recommender(const Recommender&) = delete;
  Recommender& operator=(const Recommender&) = delete;

  int64_t Items() const;
  bool TextIds() const;
  // Index of an item id, or -1; for ids of the other kind always -1.
  int64_t Find(int64_t id) const;
  int64_t Find(std::string_view id) const;
  // Id of an item. Throws std::out_of_range for an index that is none, std::logic_error for ids of
  // the other kind.
  int64_t IntId(int64_t item) const;
  const char* TextId(int64_t item) const;
  const EngineConfig& Config() const;

  // The best sessions after a history of items, oldest first; an index of -1 is left out of it.
  // Throws std::invalid_argument for an option or index out of range.
  std::vector<RecommendedSession> Recommend(const std::vector<int64_t>& history,
                                            const std::vector<int64_t>& exclude,
                                            const RecommendOptions& options) const;

  // The next items, best first: the beam's in its order; or with a dense_weight what the beam or
  // the dense head finds, by (1 - dense_weight) generator + dense_weight dense; or what the beam,
  // the dense head or a count finds, by the mixture. Fewer than k where less is found. Throws as
  // Recommend.
  std::vector<int64_t> Rank(const std::vector<int64_t>& history,
                            const std::vector<int64_t>& exclude, const RankOptions& options) const;

 private:
  Recommender();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes catalog.bin. `ids` are int64 [n], or, where `text`, zero-terminated UTF-8 beginning at
// offsets[0 .. n], the last one being their size in bytes. `tags` [n] may be null: tags in
// the bits 0 .. 62; bit 63 marks a retired item, which histories have and nobody is shown.
// `engine`, `trie` and `mixture` are the u64 at byte 248 of the files that it belongs to, or 0.
// Throws std::invalid_argument for a leaf out of range or an id with a zero in it,
// std::runtime_error if it cannot be written.
ONEREC_API void SaveCatalog(const std::string& path, int64_t n, int64_t leaves,
                            const int64_t* leaf_of_item, bool text, const void* ids,
                            const int64_t* offsets, const uint64_t* tags = nullptr,
                            uint64_t engine = 0, uint64_t trie = 0, uint64_t mixture = 0);

}  // namespace onerec
