#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "onerec/trie.h"
#include "support/error.h"
#include "support/file_block.h"
#include "support/int_math.h"
#include "trie/format.h"

namespace onerec {
namespace {

struct Wide {  // a semantic id of more than 64 bits; high part first in order
  uint64_t high = 0, low = 0;
  bool operator==(const Wide&) const = default;
};

template <class Key>
bool Less(const Key& a, const Key& b) {
  if constexpr (std::is_same_v<Key, uint64_t>) {
    return a < b;
  } else {
    return a.high != b.high ? a.high < b.high : a.low < b.low;
  }
}

int BitWidth(uint32_t codebook_size) {
  return std::max(1, static_cast<int>(std::bit_width(codebook_size - 1)));
}

uint32_t Digit(uint64_t key, int shift, uint32_t mask) {
  return static_cast<uint32_t>(key >> shift) & mask;
}
uint32_t Digit(const Wide& key, int shift, uint32_t mask) {
  if (shift >= 64) return static_cast<uint32_t>(key.high >> (shift - 64)) & mask;
  uint64_t part = key.low >> shift;
  if (shift > 0) part |= key.high << (64 - shift);
  return static_cast<uint32_t>(part) & mask;
}

// Codes first to last, most significant first; the code of level l starts at bit (L - 1 - l) *
// bits.
void Append(uint64_t& key, uint32_t code, int bits) { key = key << bits | code; }
void Append(Wide& key, uint32_t code, int bits) {
  key.high = key.high << bits | key.low >> (64 - bits);
  key.low = key.low << bits | code;
}

// The first level at which two different keys differ, from the highest bit that does.
class Difference {
 public:
  Difference(int levels, int bits) {
    for (int width = 1; width <= levels * bits; ++width) {
      level_[width] = static_cast<int8_t>(levels - 1 - (width - 1) / bits);
    }
  }
  int operator()(uint64_t a, uint64_t b) const { return level_[std::bit_width(a ^ b)]; }
  int operator()(const Wide& a, const Wide& b) const {
    return a.high != b.high ? level_[64 + std::bit_width(a.high ^ b.high)]
                            : level_[std::bit_width(a.low ^ b.low)];
  }

 private:
  int8_t level_[129] = {};
};

template <class Key>
std::vector<Key> Pack(const int32_t* sids, int64_t n, int64_t row_stride, int levels,
                      int codebook_size, int bits) {
  std::vector<Key> keys(n);
  for (int64_t i = 0; i < n; ++i) {
    Key key{};
    const int32_t* row = sids + i * row_stride;
    uint32_t worst = 0;
    for (int l = 0; l < levels; ++l) {
      const auto code = static_cast<uint32_t>(row[l]);
      worst = std::max(worst, code);
      Append(key, code, bits);
    }
    if (worst >= static_cast<uint32_t>(codebook_size)) {
      for (int l = 0; l < levels; ++l) {
        if (row[l] < 0 || row[l] >= codebook_size) {
          throw std::invalid_argument(WantedGot("sids", Text("codes in [0, ", codebook_size, ")"),
                                                row[l], " in row ", i, ", level ", l));
        }
      }
    }
    keys[i] = key;
  }
  return keys;
}

template <class Key>
void RadixSort(std::vector<Key>& keys, int total_bits) {
  constexpr int kDigitBits = 11;
  constexpr uint32_t kMask = (1u << kDigitBits) - 1;
  if (keys.size() < 2048) {
    std::sort(keys.begin(), keys.end(), Less<Key>);
    return;
  }
  const int passes = DivideUp(total_bits, kDigitBits);
  std::vector<std::vector<size_t>> counts(passes, std::vector<size_t>(kMask + 1));
  for (const Key& key : keys) {
    for (int pass = 0; pass < passes; ++pass) {
      ++counts[pass][Digit(key, pass * kDigitBits, kMask)];
    }
  }
  std::vector<Key> other(keys.size());
  for (int pass = 0; pass < passes; ++pass) {
    auto& count = counts[pass];
    if (*std::max_element(count.begin(), count.end()) == keys.size()) continue;
    size_t sum = 0;
    for (size_t& c : count) sum += std::exchange(c, sum);
    for (const Key& key : keys) other[count[Digit(key, pass * kDigitBits, kMask)]++] = key;
    keys.swap(other);
  }
}

template <class Key, class Pointer, class Token>
void Fill(const std::vector<Key>& keys, const TrieHeader& h, char* data, int bits) {
  const int levels = static_cast<int>(h.levels);
  Pointer* pointers[kMaxTrieLevels] = {};
  Token* tokens[kMaxTrieLevels] = {};
  uint64_t edges[kMaxTrieLevels] = {};
  for (int l = 0; l < levels; ++l) {
    pointers[l] = reinterpret_cast<Pointer*>(data + h.pointers[l]);
    tokens[l] = reinterpret_cast<Token*>(data + h.tokens[l]);
  }
  const auto mask = static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  const Difference difference(levels, bits);
  for (size_t i = 0; i < keys.size(); ++i) {
    const int first = i == 0 ? 0 : difference(keys[i - 1], keys[i]);
    for (int l = first; l < levels; ++l) {
      tokens[l][edges[l]] = static_cast<Token>(Digit(keys[i], (levels - 1 - l) * bits, mask));
      if (l + 1 < levels) pointers[l + 1][edges[l]] = static_cast<Pointer>(edges[l + 1]);
      ++edges[l];
    }
  }
  pointers[0][0] = 0;
  for (int l = 0; l < levels; ++l) pointers[l][h.nodes[l]] = static_cast<Pointer>(edges[l]);
}

// The bytes of a trie of ascending, distinct keys.
template <class Key>
std::shared_ptr<FileBlock> FromKeys(const std::vector<Key>& keys, TrieHeader h, int bits) {
  const int levels = static_cast<int>(h.levels);
  uint64_t begun[kMaxTrieLevels] = {};  // keys whose first new level is l
  if (!keys.empty()) ++begun[0];
  const Difference difference(levels, bits);
  for (size_t i = 1; i < keys.size(); ++i) ++begun[difference(keys[i - 1], keys[i])];
  h.nodes[0] = 1;
  for (int l = 0; l < levels; ++l) h.nodes[l + 1] = begun[l] + (l == 0 ? 0 : h.nodes[l]);
  if (!LayOut(h)) throw std::invalid_argument("sids: too many");
  auto block = std::make_shared<FileBlock>(FileBlock::Allocate(h.file_bytes));
  char* data = block->data();
  // Padding is zero so that equal tries are equal bytes.
  for (int l = 0; l < levels; ++l) {
    std::memset(data + h.tokens[l] - kTrieAlign, 0, kTrieAlign);
    const uint64_t end = h.tokens[l] + h.nodes[l + 1] * h.token_bytes;
    const uint64_t next = l + 1 < levels ? h.pointers[l + 1] : h.file_bytes;
    std::memset(data + end, 0, next - end);
  }
  if (h.pointer_bytes == 4) {
    h.token_bytes == 1 ? Fill<Key, uint32_t, uint8_t>(keys, h, data, bits)
                       : Fill<Key, uint32_t, uint16_t>(keys, h, data, bits);
  } else {
    h.token_bytes == 1 ? Fill<Key, uint64_t, uint8_t>(keys, h, data, bits)
                       : Fill<Key, uint64_t, uint16_t>(keys, h, data, bits);
  }
  std::memcpy(data, &h, sizeof h);
  Seal(h, data);
  return block;
}

// The keys of all leaves, ascending.
template <class Key>
std::vector<Key> Keys(const TrieView& view, int bits) {
  std::vector<Key> above(1), keys;
  for (int level = 0; level < view.levels; ++level) {
    keys.resize(view.nodes[level + 1]);
    for (int64_t node = 0; node < view.nodes[level]; ++node) {
      const int64_t end = view.FirstEdge(level, node + 1);
      for (int64_t edge = view.FirstEdge(level, node); edge < end; ++edge) {
        Key key = above[node];
        Append(key, static_cast<uint32_t>(view.Token(level, edge)), bits);
        keys[edge] = key;
      }
    }
    above.swap(keys);
  }
  return above;
}

TrieHeader MakeHeader(int levels, int codebook_size) {
  TrieHeader h{};
  Name(h, kTrieFile);
  h.levels = static_cast<uint32_t>(levels);
  h.codebook_size = static_cast<uint32_t>(codebook_size);
  return h;
}

template <class Key>
std::vector<Key> SortedKeys(const int32_t* sids, int64_t n, int64_t row_stride, int levels,
                            int codebook_size) {
  const int bits = BitWidth(static_cast<uint32_t>(codebook_size));
  auto keys = Pack<Key>(sids, n, row_stride, levels, codebook_size, bits);
  const auto not_above = [](const Key& a, const Key& b) { return !Less(a, b); };
  if (std::adjacent_find(keys.begin(), keys.end(), not_above) == keys.end()) return keys;
  if (!std::is_sorted(keys.begin(), keys.end(), Less<Key>)) RadixSort(keys, bits * levels);
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  return keys;
}

// Takes out the elements at ascending places.
template <class T>
void EraseAt(std::vector<T>& values, const std::vector<int64_t>& places) {
  for (size_t i = 0; i < places.size(); ++i) {
    const auto begin = values.begin() + places[i] + 1;
    const auto end = i + 1 < places.size() ? values.begin() + places[i + 1] : values.end();
    std::move(begin, end, begin - 1 - static_cast<int64_t>(i));
  }
  values.resize(values.size() - places.size());
}

// Calls body with a key that holds a semantic id.
template <class Body>
std::shared_ptr<FileBlock> WithKey(int levels, int codebook_size, Body body) {
  const int bits = BitWidth(static_cast<uint32_t>(codebook_size));
  return bits * levels <= 64 ? body(uint64_t{}, bits) : body(Wide{}, bits);
}

}  // namespace

std::shared_ptr<const Trie> Trie::Build(const int32_t* sids, int64_t n, int64_t row_stride,
                                        int levels, int codebook_size) {
  if (levels < 1 || levels > kMaxTrieLevels) {
    throw std::invalid_argument(WantedGot("levels", "1..8", levels));
  }
  if (codebook_size < 1 || codebook_size > kMaxCodebookSize) {
    throw std::invalid_argument(WantedGot("codebook_size", "1..65536", codebook_size));
  }
  if (n < 0) throw std::invalid_argument(WantedGot("n", "0 or more", n));
  return std::shared_ptr<const Trie>(
      new Trie(WithKey(levels, codebook_size, [&](auto key, int bits) {
        return FromKeys(SortedKeys<decltype(key)>(sids, n, row_stride, levels, codebook_size),
                        MakeHeader(levels, codebook_size), bits);
      })));
}

std::shared_ptr<const Trie> Trie::With(const int32_t* sids, int64_t n, int64_t row_stride,
                                       const uint64_t* tags) const {
  if (n < 0) throw std::invalid_argument(WantedGot("n", "0 or more", n));
  const int levels = view_.levels, codebook_size = view_.codebook_size;
  const std::vector<int64_t>& removed = Dead(levels - 1);
  std::vector<uint64_t> joined, live_tags;
  if (tags_ != nullptr) {
    live_tags = (*tags_)[levels - 1];
    EraseAt(live_tags, removed);
  }
  std::shared_ptr<const Trie> made(new Trie(WithKey(levels, codebook_size, [&](auto key, int bits) {
    using Key = decltype(key);
    const auto more = SortedKeys<Key>(sids, n, row_stride, levels, codebook_size);
    auto old = Keys<Key>(view_, bits);
    EraseAt(old, removed);
    std::vector<Key> keys;
    keys.reserve(old.size() + more.size());
    std::set_union(old.begin(), old.end(), more.begin(), more.end(), std::back_inserter(keys),
                   Less<Key>);
    if (tags_ != nullptr) {
      joined.resize(keys.size());
      for (size_t i = 0, at = 0; i < old.size(); ++i) {
        while (keys[at] != old[i]) ++at;
        joined[at] = live_tags[i] & ~kEveryTag;
      }
    }
    return FromKeys(keys, MakeHeader(levels, codebook_size), bits);
  })));
  if (tags_ == nullptr && tags == nullptr) return made;
  joined.resize(made->View().Leaves());
  if (tags != nullptr) {
    std::vector<int64_t> ids(n);
    made->Lookup(sids, n, row_stride, levels, ids.data(), 1);
    for (size_t i = 0; i < ids.size(); ++i) joined[ids[i]] |= tags[i];
  }
  return made->WithTags(joined.data());
}

}  // namespace onerec
