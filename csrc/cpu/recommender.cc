#include "onerec/recommender.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cpu/file_block.h"
#include "cpu/xxh64.h"

namespace onerec {
namespace {

constexpr char kMagic[8] = {'O', 'N', 'E', 'R', 'C', 'A', 'T', 'L'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kByteOrder = 0x01020304;
constexpr uint64_t kMost = uint64_t{1} << 48;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t file_bytes;
  uint64_t items;
  uint64_t leaves;
  uint64_t text;
  uint64_t id_bytes;
  uint64_t content_hash;
  uint64_t header_hash;
  char reserved[56];
};
static_assert(sizeof(Header) == 128 && offsetof(Header, header_hash) == 64);

// Where the parts lie.
struct Parts {
  explicit Parts(const Header& h) {
    const uint64_t list = h.items * 8;
    leaf_of_item = sizeof(Header);
    by_id = leaf_of_item + list;
    leaf_offsets = by_id + list;
    leaf_items = leaf_offsets + (h.leaves + 1) * 8;
    offsets = leaf_items + list;
    ids = offsets + (h.text ? (h.items + 1) * 8 : 0);
    end = ids + h.id_bytes;
  }
  uint64_t leaf_of_item, by_id, leaf_offsets, leaf_items, offsets, ids, end;
};

[[noreturn]] void Refuse(const std::string& why) {
  throw EngineFormatError("not a valid catalog.bin: " + why);
}

struct Catalog {
  // Id of item i, for comparisons.
  int64_t Int(int64_t i) const { return reinterpret_cast<const int64_t*>(ids)[i]; }
  const char* Text(int64_t i) const { return ids + offsets[i]; }

  FileBlock block;
  Header header{};
  const int64_t* leaf_of_item = nullptr;
  const int64_t* by_id = nullptr;
  const int64_t* leaf_offsets = nullptr;
  const int64_t* leaf_items = nullptr;
  const int64_t* offsets = nullptr;
  const char* ids = nullptr;
};

void SetParts(Catalog& c) {
  const Parts at(c.header);
  const char* const base = c.block.data();
  c.leaf_of_item = reinterpret_cast<const int64_t*>(base + at.leaf_of_item);
  c.by_id = reinterpret_cast<const int64_t*>(base + at.by_id);
  c.leaf_offsets = reinterpret_cast<const int64_t*>(base + at.leaf_offsets);
  c.leaf_items = reinterpret_cast<const int64_t*>(base + at.leaf_items);
  c.offsets = reinterpret_cast<const int64_t*>(base + at.offsets);
  c.ids = base + at.ids;
}

Catalog LoadCatalog(const std::string& path) {
  Catalog c;
  c.block = FileBlock::Map(path);
  Header& h = c.header;
  if (c.block.size() < sizeof h) Refuse("it has " + std::to_string(c.block.size()) + " bytes");
  std::memcpy(&h, c.block.data(), sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) Refuse("it does not start with ONERCATL");
  if (h.byte_order != kByteOrder) Refuse("its byte order is not this machine's");
  if (h.version != kVersion) {
    Refuse("version: wanted " + std::to_string(kVersion) + ", got " + std::to_string(h.version));
  }
  if (h.header_hash != Xxh64(&h, offsetof(Header, header_hash))) {
    Refuse("the header hash does not match");
  }
  if (h.file_bytes != c.block.size()) {
    Refuse("size in bytes: wanted " + std::to_string(h.file_bytes) + ", got " +
           std::to_string(c.block.size()));
  }
  if (h.items >= kMost || h.leaves >= kMost || h.id_bytes >= kMost ||
      Parts(h).end != h.file_bytes) {
    Refuse("its parts do not fill the file");
  }
  if (h.content_hash != Xxh64(c.block.data() + sizeof(Header), c.block.size() - sizeof(Header))) {
    Refuse("the content hash does not match");
  }
  SetParts(c);
  return c;
}

void CheckItem(const char* name, int64_t item, int64_t items) {
  if (item < -1 || item >= items) {
    throw std::invalid_argument(std::string(name) + ": wanted indices in [-1, " +
                                std::to_string(items) + "), got " + std::to_string(item));
  }
}

}  // namespace

struct Recommender::Impl {
  Catalog catalog;
  std::unique_ptr<Engine> engine;

  void CheckKind(int64_t item, bool text) const {
    if ((catalog.header.text != 0) != text) {
      throw std::logic_error(text ? "item ids are integers" : "item ids are text");
    }
    if (item < 0 || item >= static_cast<int64_t>(catalog.header.items)) {
      throw std::out_of_range("item: wanted an index in [0, " +
                              std::to_string(catalog.header.items) + "), got " +
                              std::to_string(item));
    }
  }
};

Recommender::Recommender() : impl_(new Impl) {}
Recommender::~Recommender() = default;

std::shared_ptr<const Recommender> Recommender::Load(const std::string& folder) {
  std::shared_ptr<Recommender> made(new Recommender);
  Impl& s = *made->impl_;
  auto trie = Trie::Load(folder + "/trie.bin");
  s.catalog = LoadCatalog(folder + "/catalog.bin");
  if (static_cast<uint64_t>(trie->View().Leaves()) != s.catalog.header.leaves) {
    Refuse("leaves: wanted " + std::to_string(trie->View().Leaves()) + " as in trie.bin, got " +
           std::to_string(s.catalog.header.leaves));
  }
  s.engine = std::make_unique<Engine>(EngineModel::Load(folder + "/engine.bin"), std::move(trie));
  return made;
}

int64_t Recommender::Items() const { return static_cast<int64_t>(impl_->catalog.header.items); }
bool Recommender::TextIds() const { return impl_->catalog.header.text != 0; }
const EngineConfig& Recommender::Config() const { return impl_->engine->Model().Config(); }

int64_t Recommender::Find(int64_t id) const {
  const Catalog& c = impl_->catalog;
  if (TextIds()) return -1;
  const int64_t* const end = c.by_id + Items();
  const int64_t* const at = std::lower_bound(
      c.by_id, end, id, [&](int64_t item, int64_t wanted) { return c.Int(item) < wanted; });
  return at != end && c.Int(*at) == id ? *at : -1;
}

int64_t Recommender::Find(std::string_view id) const {
  const Catalog& c = impl_->catalog;
  if (!TextIds()) return -1;
  const int64_t* const end = c.by_id + Items();
  const int64_t* const at =
      std::lower_bound(c.by_id, end, id, [&](int64_t item, std::string_view wanted) {
        return std::string_view(c.Text(item)) < wanted;
      });
  return at != end && c.Text(*at) == id ? *at : -1;
}

int64_t Recommender::IntId(int64_t item) const {
  impl_->CheckKind(item, false);
  return impl_->catalog.Int(item);
}

const char* Recommender::TextId(int64_t item) const {
  impl_->CheckKind(item, true);
  return impl_->catalog.Text(item);
}

std::vector<RecommendedSession> Recommender::Recommend(const std::vector<int64_t>& history,
                                                       const std::vector<int64_t>& exclude,
                                                       const RecommendOptions& options) const {
  const Catalog& c = impl_->catalog;
  const Trie& trie = impl_->engine->GetTrie();
  const EngineConfig& config = Config();
  if (options.num_sessions < 1 || options.num_sessions > options.beam_width) {
    throw std::invalid_argument("num_sessions: wanted 1.." + std::to_string(options.beam_width) +
                                " (the beam width), got " + std::to_string(options.num_sessions));
  }
  std::vector<int64_t> known, excluded;
  for (int64_t item : history) {
    CheckItem("history", item, Items());
    if (item >= 0) known.push_back(item);
  }
  if (options.exclude_history) excluded = known;
  for (int64_t item : exclude) {
    CheckItem("exclude", item, Items());
    if (item >= 0) excluded.push_back(item);
  }
  std::sort(excluded.begin(), excluded.end());
  excluded.erase(std::unique(excluded.begin(), excluded.end()), excluded.end());

  // A semantic id is out of the search when all of its items are excluded.
  std::vector<int64_t> leaves, deny;
  for (int64_t item : excluded) leaves.push_back(c.leaf_of_item[item]);
  std::sort(leaves.begin(), leaves.end());
  for (size_t i = 0; i < leaves.size();) {
    size_t end = i;
    while (end < leaves.size() && leaves[end] == leaves[i]) ++end;
    const int64_t leaf = leaves[i];
    if (static_cast<int64_t>(end - i) == c.leaf_offsets[leaf + 1] - c.leaf_offsets[leaf]) {
      deny.push_back(leaf);
    }
    i = end;
  }

  const int64_t most = config.history_length;
  const int64_t kept = std::min(static_cast<int64_t>(known.size()), most);
  std::vector<int64_t> window;
  for (auto at = known.end() - kept; at != known.end(); ++at) {
    window.push_back(c.leaf_of_item[*at]);
  }
  std::vector<int32_t> codes(static_cast<size_t>(kept * config.levels));
  trie.LeafSids(window.data(), kept, codes.data());

  EngineOptions o;
  o.beam_width = options.beam_width;
  const int64_t wanted =
      options.session_length == 0 ? config.session_length : options.session_length;
  o.session_length = std::min(wanted, trie.View().Leaves() - static_cast<int64_t>(deny.size()));
  o.scoring = options.scoring;
  o.temperature = options.temperature;
  o.num_threads = options.num_threads;
  if (wanted >= 1 && o.session_length == 0) return {};
  const int64_t beams = options.beam_width, length = std::max<int64_t>(o.session_length, 1);
  std::vector<int64_t> items(static_cast<size_t>(beams * length));
  std::vector<float> scores(static_cast<size_t>(beams));
  int32_t valid = 0;
  const EngineRequest request{codes.data(), kept, deny.data(), static_cast<int64_t>(deny.size())};
  impl_->engine->Run(&request, 1, o, {items.data(), nullptr, scores.data(), &valid});

  std::vector<RecommendedSession> sessions;
  for (int64_t s = 0; s < std::min<int64_t>(valid, options.num_sessions); ++s) {
    RecommendedSession session;
    session.score = scores[static_cast<size_t>(s)];
    for (int64_t i = 0; i < length; ++i) {
      const int64_t leaf = items[static_cast<size_t>(s * length + i)];
      // Of items that share a semantic id the first that is not excluded is shown.
      const int64_t* item = c.leaf_items + c.leaf_offsets[leaf];
      while (std::binary_search(excluded.begin(), excluded.end(), *item)) ++item;
      session.items.push_back(*item);
    }
    sessions.push_back(std::move(session));
  }
  return sessions;
}

void SaveCatalog(const std::string& path, int64_t n, int64_t leaves, const int64_t* leaf_of_item,
                 bool text, const void* ids, const int64_t* offsets) {
  Catalog c;
  Header& h = c.header;
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.byte_order = kByteOrder;
  h.items = static_cast<uint64_t>(n);
  h.leaves = static_cast<uint64_t>(leaves);
  h.text = text ? 1 : 0;
  h.id_bytes = static_cast<uint64_t>(text ? offsets[n] : n * 8);
  const Parts at(h);
  h.file_bytes = at.end;
  c.block = FileBlock::Allocate(at.end);
  SetParts(c);
  char* const base = c.block.data();
  const size_t list = static_cast<size_t>(n) * 8;
  std::memcpy(base + at.leaf_of_item, leaf_of_item, list);
  if (text) std::memcpy(base + at.offsets, offsets, list + 8);
  std::memcpy(base + at.ids, ids, h.id_bytes);

  auto* const by_id = reinterpret_cast<int64_t*>(base + at.by_id);
  std::iota(by_id, by_id + n, int64_t{0});
  std::sort(by_id, by_id + n, [&](int64_t a, int64_t b) {
    return text ? std::string_view(c.Text(a)) < std::string_view(c.Text(b)) : c.Int(a) < c.Int(b);
  });
  auto* const begin = reinterpret_cast<int64_t*>(base + at.leaf_offsets);
  auto* const items = reinterpret_cast<int64_t*>(base + at.leaf_items);
  std::fill_n(begin, leaves + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (leaf_of_item[i] < 0 || leaf_of_item[i] >= leaves) {
      throw std::invalid_argument("leaf_of_item: wanted leaves in [0, " + std::to_string(leaves) +
                                  "), got " + std::to_string(leaf_of_item[i]));
    }
    ++begin[leaf_of_item[i] + 1];
  }
  std::partial_sum(begin, begin + leaves + 1, begin);
  std::vector<int64_t> next(begin, begin + leaves);
  for (int64_t i = 0; i < n; ++i) items[next[static_cast<size_t>(leaf_of_item[i])]++] = i;

  h.content_hash = Xxh64(base + sizeof(Header), c.block.size() - sizeof(Header));
  h.header_hash = Xxh64(&h, offsetof(Header, header_hash));
  std::memcpy(base, &h, sizeof h);
  SaveBytes(path, base, c.block.size());
}

}  // namespace onerec
