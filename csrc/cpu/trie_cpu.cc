#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/thread_pool.h"
#include "cpu/xxh64.h"
#include "onerec/trie.h"

namespace onerec {
namespace {

constexpr char kMagic[8] = {'O', 'N', 'E', 'R', 'T', 'R', 'I', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kByteOrder = 0x01020304;
constexpr size_t kAlign = 64;

struct Header {
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
static_assert(sizeof(Header) == 256 && offsetof(Header, header_hash) == 248);

uint64_t HeaderHash(const Header& header) { return Xxh64(&header, offsetof(Header, header_hash)); }

uint64_t ContentHash(const void* data, size_t size) {
  return Xxh64(static_cast<const char*>(data) + sizeof(Header), size - sizeof(Header));
}

uint64_t AlignUp(uint64_t offset) { return (offset + kAlign - 1) / kAlign * kAlign; }

// Fills sizes, offsets and file size from levels, codebook_size and nodes; false if they would not
// fit a signed 64-bit offset.
bool LayOut(Header& h) {
  h.token_bytes = h.codebook_size <= 256 ? 1 : 2;
  h.pointer_bytes = 4;
  for (uint32_t l = 0; l <= h.levels; ++l) {
    if (h.nodes[l] >= uint64_t{1} << 56) return false;
    if (h.nodes[l] >= uint64_t{1} << 32) h.pointer_bytes = 8;
  }
  uint64_t offset = sizeof(Header);
  for (uint32_t l = 0; l < h.levels; ++l) {
    h.pointers[l] = AlignUp(offset);
    h.tokens[l] = AlignUp(h.pointers[l] + (h.nodes[l] + 1) * h.pointer_bytes);
    offset = h.tokens[l] + h.nodes[l + 1] * h.token_bytes;
  }
  h.file_bytes = AlignUp(offset + kAlign);
  return true;
}

[[noreturn]] void Refuse(const std::string& why) {
  throw TrieFormatError("not a valid trie: " + why);
}

std::string WantedGot(const char* what, uint64_t wanted, uint64_t got) {
  return std::string(what) + ": wanted " + std::to_string(wanted) + ", got " + std::to_string(got);
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
  const auto& header = *static_cast<const Header*>(data);
  if (header.content_hash != ContentHash(data, size)) Refuse("the content hash does not match");
  CheckLevels(view);
  return view;
}

void* Allocate(size_t bytes) {
  void* data = std::aligned_alloc(kAlign, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

std::string SystemError(const char* what, const std::string& path) {
  return std::string(what) + " " + path + ": " + std::strerror(errno);
}

// --- building ---

struct Wide {  // a semantic id of more than 64 bits; high part first in order
  uint64_t high = 0, low = 0;
  bool operator==(const Wide&) const = default;
};

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

// First level at which two different keys differ.
int FirstDifference(uint64_t a, uint64_t b, int levels, int bits) {
  return levels - 1 - (static_cast<int>(std::bit_width(a ^ b)) - 1) / bits;
}
int FirstDifference(const Wide& a, const Wide& b, int levels, int bits) {
  const int width = a.high != b.high ? 64 + static_cast<int>(std::bit_width(a.high ^ b.high))
                                     : static_cast<int>(std::bit_width(a.low ^ b.low));
  return levels - 1 - (width - 1) / bits;
}

template <class Key>
std::vector<Key> Pack(const int32_t* sids, int64_t n, int64_t row_stride, int levels,
                      int codebook_size, int bits) {
  std::vector<Key> keys(static_cast<size_t>(n));
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
          throw std::invalid_argument("sids: wanted codes in [0, " + std::to_string(codebook_size) +
                                      "), got " + std::to_string(row[l]) + " in row " +
                                      std::to_string(i) + ", level " + std::to_string(l));
        }
      }
    }
    keys[static_cast<size_t>(i)] = key;
  }
  return keys;
}

template <class Key>
void RadixSort(std::vector<Key>& keys, int total_bits) {
  constexpr int kDigitBits = 11;
  constexpr uint32_t kMask = (1u << kDigitBits) - 1;
  if (keys.size() < 2048) {
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
      if constexpr (std::is_same_v<Key, uint64_t>) {
        return a < b;
      } else {
        return a.high != b.high ? a.high < b.high : a.low < b.low;
      }
    });
    return;
  }
  const int passes = (total_bits + kDigitBits - 1) / kDigitBits;
  std::vector<std::vector<size_t>> counts(static_cast<size_t>(passes),
                                          std::vector<size_t>(kMask + 1));
  for (const Key& key : keys) {
    for (int pass = 0; pass < passes; ++pass) {
      ++counts[static_cast<size_t>(pass)][Digit(key, pass * kDigitBits, kMask)];
    }
  }
  std::vector<Key> other(keys.size());
  for (int pass = 0; pass < passes; ++pass) {
    auto& count = counts[static_cast<size_t>(pass)];
    if (*std::max_element(count.begin(), count.end()) == keys.size()) continue;
    size_t sum = 0;
    for (size_t& c : count) sum += std::exchange(c, sum);
    for (const Key& key : keys) other[count[Digit(key, pass * kDigitBits, kMask)]++] = key;
    keys.swap(other);
  }
}

template <class Key, class Pointer, class Token>
void Fill(const std::vector<Key>& keys, const Header& h, char* data, int bits) {
  const int levels = static_cast<int>(h.levels);
  Pointer* pointers[kMaxTrieLevels] = {};
  Token* tokens[kMaxTrieLevels] = {};
  uint64_t edges[kMaxTrieLevels] = {};
  for (int l = 0; l < levels; ++l) {
    pointers[l] = reinterpret_cast<Pointer*>(data + h.pointers[l]);
    tokens[l] = reinterpret_cast<Token*>(data + h.tokens[l]);
  }
  const auto mask = static_cast<uint32_t>((uint64_t{1} << bits) - 1);
  for (size_t i = 0; i < keys.size(); ++i) {
    const int first = i == 0 ? 0 : FirstDifference(keys[i - 1], keys[i], levels, bits);
    for (int l = first; l < levels; ++l) {
      tokens[l][edges[l]] = static_cast<Token>(Digit(keys[i], (levels - 1 - l) * bits, mask));
      if (l + 1 < levels) pointers[l + 1][edges[l]] = static_cast<Pointer>(edges[l + 1]);
      ++edges[l];
    }
  }
  pointers[0][0] = 0;
  for (int l = 0; l < levels; ++l) pointers[l][h.nodes[l]] = static_cast<Pointer>(edges[l]);
}

template <class Key>
std::pair<void*, size_t> BuildBytes(const int32_t* sids, int64_t n, int64_t row_stride, Header& h,
                                    int bits) {
  const int levels = static_cast<int>(h.levels);
  auto keys = Pack<Key>(sids, n, row_stride, levels, static_cast<int>(h.codebook_size), bits);
  RadixSort(keys, bits * levels);
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  uint64_t begun[kMaxTrieLevels] = {};  // keys whose first new level is l
  if (!keys.empty()) ++begun[0];
  for (size_t i = 1; i < keys.size(); ++i) {
    ++begun[FirstDifference(keys[i - 1], keys[i], levels, bits)];
  }
  h.nodes[0] = 1;
  for (int l = 0; l < levels; ++l) h.nodes[l + 1] = begun[l] + (l == 0 ? 0 : h.nodes[l]);
  if (!LayOut(h)) throw std::invalid_argument("sids: too many");
  char* data = static_cast<char*>(Allocate(h.file_bytes));
  // Padding is zero so that equal tries are equal bytes.
  for (int l = 0; l < levels; ++l) {
    std::memset(data + h.tokens[l] - kAlign, 0, kAlign);
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
  return {data, h.file_bytes};
}

// --- searching ---

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

void CheckDepth(int depth, int most) {
  if (depth < 0 || depth > most) {
    throw std::invalid_argument("depth: wanted 0.." + std::to_string(most) + ", got " +
                                std::to_string(depth));
  }
}

// The node of `level` whose edges contain `edge`.
int64_t ParentOf(const TrieView& view, int level, int64_t edge) {
  int64_t low = 0, high = view.nodes[level];  // FirstEdge(low) <= edge < FirstEdge(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (view.FirstEdge(level, middle) <= edge ? low : high) = middle;
  }
  return low;
}

}  // namespace

TrieView ViewTrie(const void* data, size_t size) {
  if (size < sizeof(Header))
    Refuse(WantedGot("size in bytes is below the header's", sizeof(Header), size));
  Header h;
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) Refuse("it does not start with ONERTRIE");
  if (h.byte_order == __builtin_bswap32(kByteOrder)) Refuse("its byte order is not this machine's");
  if (h.byte_order != kByteOrder) Refuse("its byte order mark is damaged");
  if (h.version != kVersion) Refuse(WantedGot("version", kVersion, h.version));
  if (h.header_hash != HeaderHash(h)) Refuse("the header hash does not match");
  if (h.file_bytes != size) Refuse(WantedGot("size in bytes", h.file_bytes, size));
  if (h.levels < 1 || h.levels > kMaxTrieLevels) Refuse("levels out of range");
  if (h.codebook_size < 1 || h.codebook_size > kMaxCodebookSize)
    Refuse("codebook size out of range");
  Header wanted = h;
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

std::shared_ptr<const Trie> Trie::Build(const int32_t* sids, int64_t n, int64_t row_stride,
                                        int levels, int codebook_size) {
  if (levels < 1 || levels > kMaxTrieLevels) {
    throw std::invalid_argument("levels: wanted 1..8, got " + std::to_string(levels));
  }
  if (codebook_size < 1 || codebook_size > kMaxCodebookSize) {
    throw std::invalid_argument("codebook_size: wanted 1..65536, got " +
                                std::to_string(codebook_size));
  }
  if (n < 0) throw std::invalid_argument("n: wanted 0 or more, got " + std::to_string(n));
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.byte_order = kByteOrder;
  h.levels = static_cast<uint32_t>(levels);
  h.codebook_size = static_cast<uint32_t>(codebook_size);
  const int bits = BitWidth(h.codebook_size);
  std::shared_ptr<Trie> trie(new Trie);
  std::tie(trie->data_, trie->bytes_) = bits * levels <= 64
                                            ? BuildBytes<uint64_t>(sids, n, row_stride, h, bits)
                                            : BuildBytes<Wide>(sids, n, row_stride, h, bits);
  auto* data = static_cast<char*>(trie->data_);
  std::memcpy(data, &h, sizeof h);
  h.content_hash = ContentHash(data, trie->bytes_);
  h.header_hash = HeaderHash(h);
  std::memcpy(data, &h, sizeof h);
  trie->view_ = ViewTrie(data, trie->bytes_);
  return trie;
}

std::shared_ptr<const Trie> Trie::Load(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error(SystemError("cannot open", path));
  struct stat status;
  std::shared_ptr<Trie> trie(new Trie);
  if (::fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
    trie->bytes_ = static_cast<size_t>(status.st_size);
    void* data = ::mmap(nullptr, trie->bytes_, PROT_READ, MAP_SHARED, file, 0);
    if (data != MAP_FAILED) {
      trie->data_ = data;
      trie->mapped_ = true;
    }
  }
  const std::string problem = SystemError("cannot map", path);
  ::close(file);
  if (!trie->mapped_) {
    if (trie->bytes_ == 0) throw TrieFormatError("not a valid trie: no bytes in " + path);
    throw std::runtime_error(problem);
  }
  trie->view_ = Validate(trie->data_, trie->bytes_);
  return trie;
}

std::shared_ptr<const Trie> Trie::FromBytes(const void* data, size_t size) {
  // Sized before it is copied, so that a wrong size cannot reach the allocator.
  if (size < sizeof(Header)) ViewTrie(data, size);
  std::shared_ptr<Trie> trie(new Trie);
  trie->bytes_ = size;
  trie->data_ = Allocate(AlignUp(size));
  std::memcpy(trie->data_, data, size);
  trie->view_ = Validate(trie->data_, size);
  return trie;
}

Trie::~Trie() {
  if (mapped_) {
    ::munmap(data_, bytes_);
  } else {
    std::free(data_);
  }
}

void Trie::Save(const std::string& path) const {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) throw std::runtime_error(SystemError("cannot write", temporary));
  const char* at = static_cast<const char*>(data_);
  size_t left = bytes_;
  bool good = true;
  while (good && left > 0) {
    const ssize_t written = ::write(file, at, std::min<size_t>(left, size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    good = written > 0;
    if (good) {
      at += written;
      left -= static_cast<size_t>(written);
    }
  }
  good = good && ::fsync(file) == 0;
  std::string problem = SystemError("cannot write", path);
  good = ::close(file) == 0 && good;
  if (good && ::rename(temporary.c_str(), path.c_str()) != 0) {
    problem = SystemError("cannot write", path);
    good = false;
  }
  if (!good) {
    ::unlink(temporary.c_str());
    throw std::runtime_error(problem);
  }
}

TrieLevelStats Trie::LevelStats(int level) const {
  if (level < 0 || level >= view_.levels) {
    throw std::invalid_argument("level: wanted 0.." + std::to_string(view_.levels - 1) + ", got " +
                                std::to_string(level));
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
  ParallelFor((n + kChunk - 1) / kChunk, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      nodes[i] = Find(view_, prefixes + i * row_stride, depth);
    }
  });
}

void Trie::Bitmask(const int64_t* nodes, int64_t n, int depth, uint32_t* words) const {
  CheckDepth(depth, view_.levels - 1);
  const int64_t row_words = (view_.codebook_size + 31) / 32;
  std::fill_n(words, n * row_words, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (nodes[i] == -1) continue;
    if (nodes[i] < 0 || nodes[i] >= view_.nodes[depth]) {
      throw std::invalid_argument("nodes: wanted -1 or less than " +
                                  std::to_string(view_.nodes[depth]) + ", got " +
                                  std::to_string(nodes[i]));
    }
    const int64_t last = view_.FirstEdge(depth, nodes[i] + 1);
    for (int64_t edge = view_.FirstEdge(depth, nodes[i]); edge < last; ++edge) {
      const int token = view_.Token(depth, edge);
      words[i * row_words + token / 32] |= uint32_t{1} << (token % 32);
    }
  }
}

void Trie::LeafSids(const int64_t* leaves, int64_t n, int32_t* sids) const {
  for (int64_t i = 0; i < n; ++i) {
    int64_t edge = leaves[i];
    if (edge < 0 || edge >= view_.Leaves()) {
      throw std::invalid_argument("leaves: wanted ids in [0, " + std::to_string(view_.Leaves()) +
                                  "), got " + std::to_string(edge) + " at " + std::to_string(i));
    }
    for (int level = view_.levels - 1; level >= 0; --level) {
      sids[i * view_.levels + level] = view_.Token(level, edge);
      edge = ParentOf(view_, level, edge);
    }
  }
}

}  // namespace onerec
