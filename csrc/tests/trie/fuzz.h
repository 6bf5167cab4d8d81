// What the fuzzer and the test of its corpus do with some bytes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "onerec/trie.h"
#include "support/xxh64.h"

namespace onerec {

// Takes the bytes as they are, and once more with hashes that fit, so that what the hashes guard is
// reached. Aborts if what was accepted is not a trie: codes in range, and every leaf found again.
inline void FuzzTrie(const uint8_t* data, size_t size) {
  std::vector<uint8_t> bytes(data, data + size);
  for (bool hashed : {false, true}) {
    if (hashed) {
      if (size < 256) return;
      const uint64_t content = Xxh64(bytes.data() + 256, size - 256);
      std::memcpy(bytes.data() + 240, &content, sizeof content);
      const uint64_t header = Xxh64(bytes.data(), 248);
      std::memcpy(bytes.data() + 248, &header, sizeof header);
    }
    try {
      const auto trie = Trie::FromBytes(bytes.data(), size);
      const TrieView& view = trie->View();
      std::vector<int32_t> sid(view.levels);
      for (int64_t leaf = 0; leaf < view.Leaves(); ++leaf) {
        int64_t found = -1;
        trie->LeafSids(&leaf, 1, sid.data());
        trie->Lookup(sid.data(), 1, view.levels, view.levels, &found, 1);
        if (found != leaf) std::abort();
      }
    } catch (const TrieFormatError&) {
    }
  }
}

}  // namespace onerec
