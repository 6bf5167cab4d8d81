#include "onerec/trie.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/error.h"
#include "support/file_block.h"
#include "support/int_math.h"
#include "support/thread_pool.h"
#include "trie/format.h"

namespace onerec {
namespace {

[[noreturn]] void Refuse(const std::string& why) {
  throw TrieFormatError("not a valid trie: " + why);
}

// Every node has ascending edges that follow the previous node's; every token is in range.
template <class Pointer, class Token>
void CheckLevel(const TrieView& view, int level) {
  const auto* pointers = static_cast<const Pointer*>(view.pointers[level]);
  const auto* tokens = static_cast<const Token*>(view.tokens[level]);
  const int64_t nodes = view.nodes[level];
  const auto edges = static_cast<uint64_t>(view.nodes[level + 1]);
  const auto bad = [&](const char* what, int64_t at) {
    Refuse(std::string(what) + " at level " + std::to_string(level) + ", index " +
           std::to_string(at));
  };
  if (pointers[0] != 0) bad("first pointer is not 0", 0);
  if (pointers[nodes] != edges) bad("last pointer is not the number of edges", nodes);
  const bool may_be_empty = level == 0 && edges == 0;
  for (int64_t node = 0; node < nodes; ++node) {
    const uint64_t begin = pointers[node], end = pointers[node + 1];
    if (end < begin || end > edges || (end == begin && !may_be_empty)) bad("bad pointer", node);
    for (uint64_t edge = begin; edge < end; ++edge) {
      if (tokens[edge] >= view.codebook_size) bad("token out of range", static_cast<int64_t>(edge));
      if (edge > begin && tokens[edge] <= tokens[edge - 1]) {
        bad("tokens not ascending", static_cast<int64_t>(edge));
      }
    }
  }
}

void CheckLevels(const TrieView& view) {
  for (int level = 0; level < view.levels; ++level) {
    if (view.pointer_bytes == 4) {
      view.token_bytes == 1 ? CheckLevel<uint32_t, uint8_t>(view, level)
                            : CheckLevel<uint32_t, uint16_t>(view, level);
    } else {
      view.token_bytes == 1 ? CheckLevel<uint64_t, uint8_t>(view, level)
                            : CheckLevel<uint64_t, uint16_t>(view, level);
    }
  }
}

TrieView Validate(const void* data, size_t size) {
  const TrieView view = ViewTrie(data, size);
  CheckContent(*static_cast<const TrieHeader*>(data), data, Refuse);
  CheckLevels(view);
  return view;
}

template <class Pointer, class Token>
int64_t Find(const TrieView& view, const int32_t* sid, int depth) {
  int64_t node = 0;
  for (int l = 0; l < depth; ++l) {
    const auto* pointers = static_cast<const Pointer*>(view.pointers[l]);
    const auto* tokens = static_cast<const Token*>(view.tokens[l]);
    if (sid[l] < 0 || sid[l] >= view.codebook_size) return -1;
    const auto token = static_cast<Token>(sid[l]);
    const Token* const begin = tokens + pointers[node];
    const Token* const end = tokens + pointers[node + 1];
    const Token* const at = std::lower_bound(begin, end, token);
    if (at == end || *at != token) return -1;
    node = at - tokens;
  }
  return node;
}

int64_t Find(const TrieView& view, const int32_t* sid, int depth) {
  // The empty trie has a root, which no semantic id goes through.
  if (view.Leaves() == 0) return -1;
  if (view.pointer_bytes == 4) {
    return view.token_bytes == 1 ? Find<uint32_t, uint8_t>(view, sid, depth)
                                 : Find<uint32_t, uint16_t>(view, sid, depth);
  }
  return view.token_bytes == 1 ? Find<uint64_t, uint8_t>(view, sid, depth)
                               : Find<uint64_t, uint16_t>(view, sid, depth);
}

bool Gone(const std::vector<int64_t>& dead, int64_t edge) {
  return !dead.empty() && std::binary_search(dead.begin(), dead.end(), edge);
}

void CheckDepth(int depth, int most) { CheckRange("depth", depth, 0, most); }

}  // namespace

TrieView ViewTrie(const void* data, size_t size) {
  const auto h = ReadHeader<TrieHeader>(data, size, kTrieFile, Refuse);
  if (h.levels < 1 || h.levels > kMaxTrieLevels) Refuse("levels out of range");
  if (h.codebook_size < 1 || h.codebook_size > kMaxCodebookSize)
    Refuse("codebook size out of range");
  TrieHeader wanted = h;
  if (!LayOut(wanted) || std::memcmp(&wanted, &h, sizeof h) != 0 || h.nodes[0] != 1) {
    Refuse("its sections do not lie where they should");
  }
  TrieView view;
  view.levels = static_cast<int>(h.levels);
  view.codebook_size = static_cast<int>(h.codebook_size);
  view.token_bytes = static_cast<int>(h.token_bytes);
  view.pointer_bytes = static_cast<int>(h.pointer_bytes);
  for (int l = 0; l <= view.levels; ++l) view.nodes[l] = static_cast<int64_t>(h.nodes[l]);
  for (int l = 0; l < view.levels; ++l) {
    view.tokens[l] = static_cast<const char*>(data) + h.tokens[l];
    view.pointers[l] = static_cast<const char*>(data) + h.pointers[l];
  }
  return view;
}

Trie::Trie(std::shared_ptr<FileBlock> block)
    : block_(std::move(block)), view_(ViewTrie(block_->data(), block_->size())) {}

const void* Trie::Data() const { return block_->data(); }
size_t Trie::Bytes() const { return block_->size(); }

std::shared_ptr<const Trie> Trie::Load(const std::string& path) {
  auto block = std::make_shared<FileBlock>(FileBlock::Map(path));
  if (block->size() == 0) throw TrieFormatError("not a valid trie: no bytes in " + path);
  Validate(block->data(), block->size());
  return std::shared_ptr<const Trie>(new Trie(std::move(block)));
}

std::shared_ptr<const Trie> Trie::FromBytes(const void* data, size_t size) {
  // Sized before it is copied, so that a wrong size cannot reach the allocator.
  if (size < sizeof(TrieHeader)) ViewTrie(data, size);
  auto block = std::make_shared<FileBlock>(FileBlock::Allocate(size));
  std::memcpy(block->data(), data, size);
  Validate(block->data(), size);
  return std::shared_ptr<const Trie>(new Trie(std::move(block)));
}

void Trie::Save(const std::string& path) const {
  if (!Dead(view_.levels - 1).empty()) {
    throw std::logic_error("Save: the trie has removed leaves");
  }
  SaveBytes(path, Data(), Bytes());
}

TrieLevelStats Trie::LevelStats(int level) const {
  if (level < 0 || level >= view_.levels) {
    throw std::invalid_argument(WantedGot("level", Text("0..", view_.levels - 1), level));
  }
  TrieLevelStats stats;
  stats.nodes = view_.nodes[level];
  stats.edges = view_.nodes[level + 1];
  for (int64_t node = 0; node < stats.nodes; ++node) {
    const int64_t degree = view_.FirstEdge(level, node + 1) - view_.FirstEdge(level, node);
    stats.max_degree = std::max(stats.max_degree, degree);
    stats.single_child += degree == 1;
  }
  return stats;
}

void Trie::Lookup(const int32_t* prefixes, int64_t n, int64_t row_stride, int depth, int64_t* nodes,
                  int num_threads) const {
  CheckDepth(depth, view_.levels);
  constexpr int64_t kChunk = 4096;
  ParallelFor(DivideUp(n, kChunk), num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      nodes[i] = Find(view_, prefixes + i * row_stride, depth);
      if (depth > 0 && Gone(dead_[depth - 1], nodes[i])) nodes[i] = -1;
    }
  });
}

void Trie::Bitmask(const int64_t* nodes, int64_t n, int depth, uint32_t* words) const {
  CheckDepth(depth, view_.levels - 1);
  const int64_t row_words = DivideUp(view_.codebook_size, 32);
  std::fill_n(words, n * row_words, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (nodes[i] == -1) continue;
    if (nodes[i] < 0 || nodes[i] >= view_.nodes[depth]) {
      throw std::invalid_argument(
          WantedGot("nodes", Text("-1 or less than ", view_.nodes[depth]), nodes[i]));
    }
    const int64_t last = view_.FirstEdge(depth, nodes[i] + 1);
    for (int64_t edge = view_.FirstEdge(depth, nodes[i]); edge < last; ++edge) {
      if (Gone(dead_[depth], edge)) continue;
      const int token = view_.Token(depth, edge);
      words[i * row_words + token / 32] |= uint32_t{1} << (token % 32);
    }
  }
}

void Trie::LeafSids(const int64_t* leaves, int64_t n, int32_t* sids) const {
  for (int64_t i = 0; i < n; ++i) {
    int64_t edge = leaves[i];
    if (edge < 0 || edge >= view_.Leaves()) {
      throw std::invalid_argument(
          WantedGot("leaves", Text("ids in [0, ", view_.Leaves(), ")"), edge, " at ", i));
    }
    for (int level = view_.levels - 1; level >= 0; --level) {
      sids[i * view_.levels + level] = view_.Token(level, edge);
      edge = view_.NodeOf(level, edge);
    }
  }
}

}  // namespace onerec
