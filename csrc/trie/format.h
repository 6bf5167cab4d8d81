// The bytes of a trie: what the sources that make and read them share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "onerec/trie.h"
#include "support/xxh64.h"

namespace onerec {

inline constexpr char kTrieMagic[8] = {'O', 'N', 'E', 'R', 'T', 'R', 'I', 'E'};
inline constexpr uint32_t kTrieVersion = 1;
inline constexpr uint32_t kTrieByteOrder = 0x01020304;
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

inline uint64_t HeaderHash(const TrieHeader& header) {
  return Xxh64(&header, offsetof(TrieHeader, header_hash));
}

inline uint64_t ContentHash(const void* data, size_t size) {
  return Xxh64(static_cast<const char*>(data) + sizeof(TrieHeader), size - sizeof(TrieHeader));
}

inline uint64_t AlignUp(uint64_t offset) {
  return (offset + kTrieAlign - 1) / kTrieAlign * kTrieAlign;
}

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
    h.pointers[l] = AlignUp(offset);
    h.tokens[l] = AlignUp(h.pointers[l] + (h.nodes[l] + 1) * h.pointer_bytes);
    offset = h.tokens[l] + h.nodes[l + 1] * h.token_bytes;
  }
  h.file_bytes = AlignUp(offset + kTrieAlign);
  return true;
}

}  // namespace onerec
