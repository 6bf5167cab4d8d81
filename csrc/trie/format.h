// The bytes of a trie: what the sources that make and read them share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "onerec/trie.h"
#include "support/int_math.h"
#include "support/sealed_file.h"

namespace onerec {

inline constexpr SealedKind kTrieFile{"ONERTRIE", 1};
inline constexpr size_t kTrieAlign = 64;

struct TrieHeader {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t file_bytes;
  uint32_t levels;
  uint32_t codebook_size;
  uint32_t token_bytes;
  uint32_t pointer_bytes;
  uint64_t nodes[kMaxTrieLevels + 1];
  uint64_t tokens[kMaxTrieLevels];
  uint64_t pointers[kMaxTrieLevels];
  uint64_t content_hash;
  uint64_t header_hash;
};
static_assert(sizeof(TrieHeader) == 256 && offsetof(TrieHeader, header_hash) == 248);

// Fills sizes, offsets and file size from levels, codebook_size and nodes; false if they would not
// fit a signed 64-bit offset.
inline bool LayOut(TrieHeader& h) {
  h.token_bytes = h.codebook_size <= 256 ? 1 : 2;
  h.pointer_bytes = 4;
  for (uint32_t l = 0; l <= h.levels; ++l) {
    if (h.nodes[l] >= uint64_t{1} << 56) return false;
    if (h.nodes[l] >= uint64_t{1} << 32) h.pointer_bytes = 8;
  }
  uint64_t offset = sizeof(TrieHeader);
  for (uint32_t l = 0; l < h.levels; ++l) {
    h.pointers[l] = RoundUp(offset, kTrieAlign);
    h.tokens[l] = RoundUp(h.pointers[l] + (h.nodes[l] + 1) * h.pointer_bytes, kTrieAlign);
    offset = h.tokens[l] + h.nodes[l + 1] * h.token_bytes;
  }
  h.file_bytes = RoundUp(offset + kTrieAlign, kTrieAlign);
  return true;
}

}  // namespace onerec
