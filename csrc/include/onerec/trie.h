// A set of semantic ids as a trie: one read-only block of bytes, the same in memory, in a file and
// on a device.
//
// Level l holds one edge for each distinct prefix of l + 1 codes, ordered lexicographically. The
// child that edge e leads to is node e of level l + 1, so no child ids are stored; a leaf is an
// edge of the last level, and its id is the rank of its semantic id among the distinct ones. The
// edges of node v of level l are pointers[l][v] .. pointers[l][v + 1], their codes tokens[l][...],
// ascending.
//
// File format, version 1, little endian:
//   0    char[8]  "ONERTRIE"
//   8    u32      version (1)
//   12   u32      0x01020304: tells the byte order
//   16   u64      size of the file in bytes
//   24   u32      levels L, 1..8
//   28   u32      codebook size K, 1..65536
//   32   u32      bytes of a token: 1 (K <= 256) or 2
//   36   u32      bytes of a pointer: 4, or 8 where a level has 2^32 nodes or more
//   40   u64[9]   nodes of each depth, root first; zero past depth L
//   112  u64[8]   offset of the tokens of each level; zero past level L - 1
//   176  u64[8]   offset of the pointers of each level; zero past level L - 1
//   240  u64      XXH64 (seed 0) of bytes 256 .. end
//   248  u64      XXH64 (seed 0) of bytes 0 .. 248
// then for each level its pointers (nodes[l] + 1 of them) and its tokens (nodes[l + 1]), each
// section starting at the next multiple of 64, and zeros up to a multiple of 64 with at least 64 to
// spare.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "onerec/export.h"

namespace onerec {

inline constexpr int kMaxTrieLevels = 8;
inline constexpr int kMaxCodebookSize = 65536;

// Bytes that are not a valid trie: truncated, corrupt, of another version or byte order.
class ONEREC_API TrieFormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where the parts of a trie lie; valid as long as the bytes that it was made from.
struct TrieView {
  int levels = 0;
  int codebook_size = 0;
  int token_bytes = 1;
  int pointer_bytes = 4;
  int64_t nodes[kMaxTrieLevels + 1] = {};     // nodes[0] == 1, nodes[levels] == number of leaves
  const void* tokens[kMaxTrieLevels] = {};    // uint8_t or uint16_t [nodes[l + 1]]
  const void* pointers[kMaxTrieLevels] = {};  // uint32_t or uint64_t [nodes[l] + 1]

  int64_t Leaves() const { return nodes[levels]; }
  int Token(int level, int64_t edge) const {
    return token_bytes == 1 ? static_cast<const uint8_t*>(tokens[level])[edge]
                            : static_cast<const uint16_t*>(tokens[level])[edge];
  }
  // First edge of a node; FirstEdge(level, node + 1) is one past its last.
  int64_t FirstEdge(int level, int64_t node) const {
    return pointer_bytes == 4
               ? static_cast<int64_t>(static_cast<const uint32_t*>(pointers[level])[node])
               : static_cast<int64_t>(static_cast<const uint64_t*>(pointers[level])[node]);
  }
  // First leaf below a node of `depth` (0 is the root); FirstLeaf(depth, node + 1) is one past its
  // last.
  int64_t FirstLeaf(int depth, int64_t node) const {
    for (int level = depth; level < levels; ++level) node = FirstEdge(level, node);
    return node;
  }
  // The node of depth `level` that has `edge` of that level.
  int64_t NodeOf(int level, int64_t edge) const {
    int64_t low = 0, high = nodes[level];  // FirstEdge(low) <= edge < FirstEdge(high)
    // Near the place where it would be if all nodes had the same number of edges.
    const auto guess = static_cast<int64_t>(static_cast<double>(edge) * static_cast<double>(high) /
                                            static_cast<double>(nodes[level + 1]));
    int64_t step = 8;
    if (FirstEdge(level, guess) <= edge) {
      low = guess;
      for (; low + step < high && FirstEdge(level, low + step) <= edge; step *= 2) low += step;
      if (low + step < high) high = low + step;
    } else {
      high = guess;
      for (; high - step > 0 && FirstEdge(level, high - step) > edge; step *= 2) high -= step;
      if (high - step > 0) low = high - step;
    }
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (FirstEdge(level, middle) <= edge ? low : high) = middle;
    }
    return low;
  }
};

struct TrieLevelStats {
  int64_t nodes = 0;         // inner nodes of this level
  int64_t edges = 0;         // their children
  int64_t max_degree = 0;    // most children of one node
  int64_t single_child = 0;  // nodes with exactly one child
};

// The tag that every leaf has, whatever it was given; the others are bits 0 .. 62.
inline constexpr uint64_t kEveryTag = uint64_t{1} << 63;

class FileBlock;

// Never changes; what changes it makes another, so whoever holds one keeps what it holds.
class ONEREC_API Trie {
 public:
  // Builds from n semantic ids, row i at sids + i * row_stride, in any order (sorted ones are the
  // faster); duplicates count once. Throws std::invalid_argument if levels, codebook_size or a code
  // is out of range.
  static std::shared_ptr<const Trie> Build(const int32_t* sids, int64_t n, int64_t row_stride,
                                           int levels, int codebook_size);
  // Maps a file and checks all of it: header, both hashes, every pointer and token.
  // Throws TrieFormatError for a bad file, std::runtime_error if it cannot be read.
  static std::shared_ptr<const Trie> Load(const std::string& path);
  // Copies the bytes of a trie, with the checks of Load.
  static std::shared_ptr<const Trie> FromBytes(const void* data, size_t size);

  // This trie without some more leaves, ascending and distinct: the same bytes and leaf ids, and a
  // list of what is gone. Throws std::invalid_argument for an id out of range or out of order.
  std::shared_ptr<const Trie> Without(const int64_t* leaves, int64_t n) const;
  // This trie with tags[leaf], a set of bits below 63 for each leaf; null takes them away. An edge
  // has the tags of the leaves below it.
  std::shared_ptr<const Trie> WithTags(const uint64_t* tags) const;
  // A trie of the live leaves and n more semantic ids, as for Build, with tags[i] for id i (null:
  // none). An id that is already there gets both sets of tags. Leaf ids are new.
  std::shared_ptr<const Trie> With(const int32_t* sids, int64_t n, int64_t row_stride,
                                   const uint64_t* tags) const;

  // Writes beside `path` and renames, so that a reader sees the old file or the new one. Equal sets
  // of ids give equal bytes. Tags are not written. Throws std::runtime_error if it cannot be
  // written, std::logic_error if leaves are removed: With(nullptr, 0, 0, nullptr) has none.
  void Save(const std::string& path) const;

  // Removed leaves and their edges are in it.
  const TrieView& View() const { return view_; }
  const void* Data() const;
  size_t Bytes() const;
  TrieLevelStats LevelStats(int level) const;
  int64_t LiveLeaves() const {
    return view_.Leaves() - static_cast<int64_t>(Dead(view_.levels - 1).size());
  }
  // Edges of a level below which every leaf is removed, ascending; of the last one, the leaves.
  const std::vector<int64_t>& Dead(int level) const { return dead_[level]; }
  // Appends to dead[l], for each level, the edges below which no leaf is live, ascending. A leaf is
  // live if it is neither removed nor one of `leaves` (ascending, distinct) and has a tag of
  // `allow`; edges whose leaves all lack such a tag may be left out.
  void AppendDead(uint64_t allow, const std::vector<int64_t>& leaves,
                  std::vector<int64_t>* dead) const;
  // Tags of the edges of a level, kEveryTag among them; null if the trie has none.
  const uint64_t* Tags(int level) const { return tags_ ? (*tags_)[level].data() : nullptr; }

  // nodes[i] = node of `depth` that the i-th prefix of `depth` codes leads to (a leaf id if depth
  // is the number of levels), or -1 if no live semantic id begins so. Throws std::invalid_argument
  // if depth is out of range.
  void Lookup(const int32_t* prefixes, int64_t n, int64_t row_stride, int depth, int64_t* nodes,
              int num_threads) const;
  // For n nodes of `depth`, below the last level, one bit a code, lowest first: whether it leads to
  // a live leaf. Row i has (codebook_size + 31) / 32 words; node -1 has none set.
  // Throws std::invalid_argument for a depth or node out of range.
  void Bitmask(const int64_t* nodes, int64_t n, int depth, uint32_t* words) const;
  // Writes the [n, levels] codes of leaves. Throws std::invalid_argument for an id out of range.
  void LeafSids(const int64_t* leaves, int64_t n, int32_t* sids) const;

 private:
  using EdgeTags = std::array<std::vector<uint64_t>, kMaxTrieLevels>;

  Trie() = default;
  explicit Trie(std::shared_ptr<FileBlock> block);  // of bytes that are known to be a trie

  std::shared_ptr<const FileBlock> block_;
  TrieView view_;
  std::array<std::vector<int64_t>, kMaxTrieLevels> dead_;
  std::shared_ptr<const EdgeTags> tags_;
};

// The parts of a trie in `size` bytes. Checks the header and that every section lies inside, but
// neither the hashes nor the pointers and tokens: for bytes that a Trie has made or checked.
// Throws TrieFormatError.
ONEREC_API TrieView ViewTrie(const void* data, size_t size);

}  // namespace onerec
