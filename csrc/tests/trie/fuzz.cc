// libFuzzer on the trie's loader: `make fuzz`.
#include "tests/trie/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  onerec::FuzzTrie(data, size);
  return 0;
}
