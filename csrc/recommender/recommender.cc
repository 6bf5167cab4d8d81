#include "onerec/recommender.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "recommender/mixture.h"
#include "support/error.h"
#include "support/file_block.h"
#include "support/sealed_file.h"

namespace onerec {
namespace {

constexpr SealedKind kCatalogFile{"ONERCATL", 2};
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
  uint64_t tagged;  // kTagged, kRetired
  uint64_t content_hash;
  uint64_t header_hash;
  uint64_t engine;   // the header hash of the engine.bin of its export, or 0
  uint64_t trie;     // and of the trie.bin
  uint64_t mixture;  // and of the mixture.bin; 0 where its export has none
  char reserved[24];
};
static_assert(sizeof(Header) == 128 && offsetof(Header, header_hash) == 72);

// Whether the column `tags` has tags in the bits 0 .. 62, and whether it has retired items, which
// are known and never shown, in bit 63.
constexpr uint64_t kTagged = 1, kRetired = 2;
constexpr uint64_t kRetiredBit = uint64_t{1} << 63;

// Where the header hash of engine.bin, trie.bin and mixture.bin lies.
constexpr size_t kHashAt = 248;

// Where the parts lie.
struct Parts {
  explicit Parts(const Header& h) {
    const uint64_t list = h.items * 8;
    leaf_of_item = sizeof(Header);
    by_id = leaf_of_item + list;
    leaf_offsets = by_id + list;
    leaf_items = leaf_offsets + (h.leaves + 1) * 8;
    tags = leaf_items + list;
    offsets = tags + (h.tagged ? list : 0);
    ids = offsets + (h.text ? (h.items + 1) * 8 : 0);
    end = ids + h.id_bytes;
  }
  uint64_t leaf_of_item, by_id, leaf_offsets, leaf_items, tags, offsets, ids, end;
};

[[noreturn]] void Refuse(const std::string& why) {
  throw EngineFormatError("not a valid catalog.bin: " + why);
}

struct Catalog {
  // Id of item i, for comparisons.
  int64_t Int(int64_t i) const { return reinterpret_cast<const int64_t*>(ids)[i]; }
  const char* Text(int64_t i) const { return ids + offsets[i]; }
  // First item of a leaf that has a tag of `allow` and is not in `excluded` (ascending), or -1.
  int64_t FirstFree(int64_t leaf, const std::vector<int64_t>& excluded, uint64_t allow) const {
    for (int64_t i = leaf_offsets[leaf]; i < leaf_offsets[leaf + 1]; ++i) {
      const int64_t item = leaf_items[i];
      if (allow != kEveryTag && (tags[item] & allow) == 0) continue;
      if (!std::binary_search(excluded.begin(), excluded.end(), item)) return item;
    }
    return -1;
  }

  FileBlock block;
  Header header{};
  const int64_t* leaf_of_item = nullptr;
  const int64_t* by_id = nullptr;
  const int64_t* leaf_offsets = nullptr;
  const int64_t* leaf_items = nullptr;
  const uint64_t* tags = nullptr;
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
  c.tags = reinterpret_cast<const uint64_t*>(base + at.tags);
  c.offsets = reinterpret_cast<const int64_t*>(base + at.offsets);
  c.ids = base + at.ids;
}

// Refuses numbers that no catalogue has: a hash tells damage, but anybody can make one.
void CheckCatalog(const Catalog& c) {
  const auto items = static_cast<int64_t>(c.header.items);
  const auto leaves = static_cast<int64_t>(c.header.leaves);
  const auto check = [](bool good, const char* part, int64_t at) {
    if (!good) Refuse(Text(part, ": wrong at ", at));
  };
  check(c.leaf_offsets[0] == 0 && c.leaf_offsets[leaves] == items, "leaf_offsets", leaves);
  for (int64_t l = 0; l < leaves; ++l) {
    check(c.leaf_offsets[l] < c.leaf_offsets[l + 1], "leaf_offsets", l);
  }
  for (int64_t i = 0; i < items; ++i) {
    check(c.leaf_of_item[i] >= 0 && c.leaf_of_item[i] < leaves, "leaf_of_item", i);
    check(c.by_id[i] >= 0 && c.by_id[i] < items, "by_id", i);
    check(c.leaf_items[i] >= 0 && c.leaf_items[i] < items, "leaf_items", i);
    if (c.header.tagged == kTagged) check((c.tags[i] & kRetiredBit) == 0, "tags", i);
    if (c.header.tagged == kRetired) check((c.tags[i] & ~kRetiredBit) == 0, "tags", i);
  }
  // Ascending within a leaf that is their own: with the right number each item is there once.
  for (int64_t l = 0; l < leaves; ++l) {
    for (int64_t i = c.leaf_offsets[l]; i < c.leaf_offsets[l + 1]; ++i) {
      const bool ascends = i == c.leaf_offsets[l] || c.leaf_items[i - 1] < c.leaf_items[i];
      check(ascends && c.leaf_of_item[c.leaf_items[i]] == l, "leaf_items", i);
    }
  }
  if (c.header.text) {
    check(c.offsets[0] == 0, "offsets", 0);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t begin = c.offsets[i], end = c.offsets[i + 1];
      check(end > begin && end <= static_cast<int64_t>(c.header.id_bytes), "offsets", i);
      check(std::memchr(c.ids + begin, 0, end - begin) == c.ids + end - 1, "ids", i);
    }
    check(c.offsets[items] == static_cast<int64_t>(c.header.id_bytes), "offsets", items);
  }
  for (int64_t i = 1; i < items; ++i) {
    const int64_t a = c.by_id[i - 1], b = c.by_id[i];
    check(c.header.text ? std::string_view(c.Text(a)) < std::string_view(c.Text(b))
                        : c.Int(a) < c.Int(b),
          "by_id", i);
  }
}

// Refuses a part of another export.
void CheckHash(const std::string& path, uint64_t wanted) {
  if (wanted == 0) return;
  const FileBlock block = FileBlock::Map(path);
  uint64_t hash = 0;
  if (block.size() >= kHashAt + sizeof hash) {
    std::memcpy(&hash, block.data() + kHashAt, sizeof hash);
  }
  if (hash != wanted) Refuse(path + " is not the file that was exported with it");
}

Catalog LoadCatalog(const std::string& path) {
  Catalog c;
  c.block = FileBlock::Map(path);
  Header& h = c.header;
  h = ReadHeader<Header>(c.block.data(), c.block.size(), kCatalogFile, Refuse);
  if (h.items >= kMost || h.leaves >= kMost || h.id_bytes >= kMost || h.text > 1 ||
      h.tagged > (kTagged | kRetired) || Parts(h).end != h.file_bytes ||
      (!h.text && h.id_bytes != h.items * 8)) {
    Refuse("its parts do not fill the file");
  }
  CheckContent(h, c.block.data(), Refuse);
  SetParts(c);
  CheckCatalog(c);
  return c;
}

void CheckOptions(int64_t beam_width, const std::optional<Scoring>& scoring, int num_threads) {
  constexpr int64_t kMostBeams = int64_t{1} << 20;
  constexpr int64_t kMostThreads = 4096;
  CheckRange("beam_width", beam_width, 1, kMostBeams);
  CheckRange("num_threads", num_threads, 1, kMostThreads);
  if (scoring) CheckRange("scoring", static_cast<int64_t>(*scoring), 0, 2);
}

void CheckItem(const char* name, int64_t item, int64_t items) {
  if (item < -1 || item >= items) {
    throw std::invalid_argument(WantedGot(name, Text("indices in [-1, ", items, ")"), item));
  }
}

}  // namespace

struct Recommender::Impl {
  Catalog catalog;
  std::unique_ptr<Engine> engine;
  std::optional<Mixture> mixture;
  std::vector<int64_t> retired;  // items that are known and never shown, ascending

  void CheckKind(int64_t item, bool text) const {
    if ((catalog.header.text != 0) != text) {
      throw std::logic_error(text ? "item ids are integers" : "item ids are text");
    }
    if (item < 0 || item >= static_cast<int64_t>(catalog.header.items)) {
      throw std::out_of_range(
          WantedGot("item", Text("an index in [0, ", catalog.header.items, ")"), item));
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
  const Catalog& c = s.catalog;
  CheckHash(folder + "/engine.bin", c.header.engine);
  CheckHash(folder + "/trie.bin", c.header.trie);
  const int64_t items = made->Items();
  if (c.header.tagged & kRetired) {
    for (int64_t i = 0; i < items; ++i) {
      if (c.tags[i] & kRetiredBit) s.retired.push_back(i);
    }
  }
  if (c.header.tagged & kTagged) {
    std::vector<uint64_t> tags(c.header.leaves, 0);
    for (int64_t i = 0; i < items; ++i) {
      tags[c.leaf_of_item[i]] |= c.tags[i] & ~kRetiredBit;
    }
    trie = trie->WithTags(tags.data());
  }
  const auto model = EngineModel::Load(folder + "/engine.bin");
  if (const int32_t* const wanted = model->ItemSids(); wanted != nullptr) {
    // The network knows the items by their indices, so they must be the catalogue's.
    const size_t levels = model->Config().levels;
    std::vector<int32_t> sids(items * levels);
    trie->LeafSids(c.leaf_of_item, items, sids.data());
    if (model->Config().n_items != items || !std::equal(sids.begin(), sids.end(), wanted)) {
      Refuse("its items are not the ones that engine.bin was made for, in their order");
    }
  }
  s.engine = std::make_unique<Engine>(model, std::move(trie));
  if (c.header.mixture != 0) {
    CheckHash(folder + "/mixture.bin", c.header.mixture);
    if (!model->Config().dense_head) Refuse("mixture.bin: the model has no dense head");
    s.mixture = Mixture::Load(folder + "/mixture.bin", items);
  }
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

namespace {

// A user's request as the engine takes it.
struct Prepared {
  std::vector<int64_t> known;     // items of the history
  std::vector<int64_t> excluded;  // items, ascending
  std::vector<int64_t> deny;      // leaves, ascending
  std::vector<int32_t> read;
  EngineRequest request;
  int64_t left = 0;  // items that a session can have, up to as many as were wanted
};

// The at most `k` items of greatest value that are `free`, best first; of equal ones the first.
template <class Value, class Free>
std::vector<int64_t> Best(const std::vector<int64_t>& items, const std::vector<Value>& values,
                          int64_t k, const Free& free) {
  std::vector<size_t> order;
  for (size_t i = 0; i < items.size(); ++i) {
    if (free(items[i])) order.push_back(i);
  }
  const auto kept = std::min<int64_t>(k, static_cast<int64_t>(order.size()));
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](size_t a, size_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
  std::vector<int64_t> best(kept);
  std::transform(order.begin(), order.begin() + kept, best.begin(),
                 [&](size_t i) { return items[i]; });
  return best;
}

Prepared Prepare(const Catalog& c, const Trie& trie, const EngineConfig& config,
                 const std::vector<int64_t>& retired, const std::vector<int64_t>& history,
                 const std::vector<int64_t>& exclude, bool exclude_history, uint64_t allow,
                 int64_t wanted) {
  const auto items = static_cast<int64_t>(c.header.items);
  Prepared made;
  std::vector<int64_t>&known = made.known, &excluded = made.excluded, &deny = made.deny;
  for (int64_t item : history) {
    CheckItem("history", item, items);
    if (item >= 0) known.push_back(item);
  }
  excluded = retired;
  if (exclude_history) excluded.insert(excluded.end(), known.begin(), known.end());
  for (int64_t item : exclude) {
    CheckItem("exclude", item, items);
    if (item >= 0) excluded.push_back(item);
  }
  std::sort(excluded.begin(), excluded.end());
  excluded.erase(std::unique(excluded.begin(), excluded.end()), excluded.end());

  if (allow != kEveryTag && !(c.header.tagged & kTagged)) {
    throw std::invalid_argument("allow_tags: the catalogue has no tags");
  }
  // A semantic id is out of the search when none of its items may be shown. The trie knows the
  // tags; it does not know of an excluded item that is the only one with them.
  for (int64_t item : excluded) deny.push_back(c.leaf_of_item[item]);
  std::sort(deny.begin(), deny.end());
  deny.erase(std::unique(deny.begin(), deny.end()), deny.end());
  std::erase_if(deny, [&](int64_t leaf) { return c.FirstFree(leaf, excluded, allow) >= 0; });

  const int64_t kept = std::min(static_cast<int64_t>(known.size()), int64_t{config.history_length});
  std::vector<int64_t> window(known.end() - kept, known.end());
  made.read.assign(window.begin(), window.end());
  if (config.n_items == 0) {
    for (int64_t& item : window) item = c.leaf_of_item[item];
    made.read.resize(kept * config.levels);
    trie.LeafSids(window.data(), kept, made.read.data());
  }

  int64_t left = trie.View().Leaves() - static_cast<int64_t>(deny.size());
  if (allow != kEveryTag) {
    left = 0;
    const uint64_t* const tags = trie.Tags(config.levels - 1);
    for (int64_t leaf = 0; leaf < trie.View().Leaves() && left < wanted; ++leaf) {
      left += (tags[leaf] & allow) != 0 && !std::binary_search(deny.begin(), deny.end(), leaf);
    }
  }
  made.left = std::min(wanted, left);
  made.request = {made.read.data(), kept, deny.data(), static_cast<int64_t>(deny.size()), allow};
  return made;
}

}  // namespace

std::vector<RecommendedSession> Recommender::Recommend(const std::vector<int64_t>& history,
                                                       const std::vector<int64_t>& exclude,
                                                       const RecommendOptions& options) const {
  const Catalog& c = impl_->catalog;
  CheckOptions(options.beam_width, options.scoring, options.num_threads);
  if (options.num_sessions < 1 || options.num_sessions > options.beam_width) {
    throw std::invalid_argument(WantedGot("num_sessions",
                                          Text("1..", options.beam_width, " (the beam width)"),
                                          options.num_sessions));
  }
  const int64_t wanted =
      options.session_length == 0 ? Config().session_length : options.session_length;
  const Prepared prepared = Prepare(c, impl_->engine->GetTrie(), Config(), impl_->retired, history,
                                    exclude, options.exclude_history, options.allow_tags, wanted);
  if (wanted >= 1 && prepared.left == 0) return {};

  EngineOptions o;
  o.beam_width = options.beam_width;
  o.session_length = prepared.left;
  o.scoring = options.scoring;
  o.temperature = options.temperature;
  o.num_threads = options.num_threads;
  const int64_t beams = options.beam_width, length = std::max<int64_t>(o.session_length, 1);
  std::vector<int64_t> items(beams * length);
  std::vector<float> scores(beams);
  int32_t valid = 0;
  impl_->engine->Run(&prepared.request, 1, o, {items.data(), nullptr, scores.data(), &valid});

  std::vector<RecommendedSession> sessions;
  for (int64_t s = 0; s < std::min<int64_t>(valid, options.num_sessions); ++s) {
    RecommendedSession session;
    session.score = scores[s];
    for (int64_t i = 0; i < length; ++i) {
      // Of items that share a semantic id the first that is not excluded is shown.
      session.items.push_back(
          c.FirstFree(items[s * length + i], prepared.excluded, options.allow_tags));
    }
    sessions.push_back(std::move(session));
  }
  return sessions;
}

std::vector<int64_t> Recommender::Rank(const std::vector<int64_t>& history,
                                       const std::vector<int64_t>& exclude,
                                       const RankOptions& options) const {
  const Catalog& c = impl_->catalog;
  const Engine& engine = *impl_->engine;
  if (options.k < 1) {
    throw std::invalid_argument(WantedGot("k", "1 or more", options.k));
  }
  CheckOptions(options.beam_width == 0 ? 1 : options.beam_width, options.scoring,
               options.num_threads);
  const double dense_weight = options.dense_weight.value_or(0.0);
  if (!(dense_weight >= 0 && dense_weight <= 1)) {
    throw std::invalid_argument(WantedGot("dense_weight", "0..1", dense_weight));
  }
  if (options.dense_top < 0) {
    throw std::invalid_argument(WantedGot("dense_top", "0 or more", options.dense_top));
  }
  if (dense_weight > 0 && !Config().dense_head) {
    throw std::invalid_argument("dense_weight: the model has no dense head");
  }
  const Prepared prepared = Prepare(c, engine.GetTrie(), Config(), impl_->retired, history, exclude,
                                    options.exclude_history, options.allow_tags, 1);
  if (prepared.left == 0) return {};

  EngineOptions o;
  o.beam_width = options.beam_width == 0 ? std::max<int64_t>(options.k, 128) : options.beam_width;
  o.scoring = options.scoring;
  o.temperature = options.temperature;
  o.num_threads = options.num_threads;
  std::vector<int64_t> leaves(std::max<int64_t>(o.beam_width, 0));
  std::vector<float> scores(leaves.size());
  int32_t valid = 0;
  engine.Run(&prepared.request, 1, o, {leaves.data(), nullptr, scores.data(), &valid});

  const auto free = [&](int64_t item) {
    return (options.allow_tags == kEveryTag || (c.tags[item] & options.allow_tags) != 0) &&
           !std::binary_search(prepared.excluded.begin(), prepared.excluded.end(), item);
  };
  std::vector<int64_t> found;
  for (int32_t i = 0; i < valid; ++i) {
    const int64_t leaf = leaves[i];
    std::copy_if(c.leaf_items + c.leaf_offsets[leaf], c.leaf_items + c.leaf_offsets[leaf + 1],
                 std::back_inserter(found), free);
  }
  const size_t most = options.k;
  const bool mixed = !options.dense_weight && impl_->mixture;
  if (dense_weight == 0 && !mixed) {
    found.resize(std::min(found.size(), most));
    return found;
  }

  std::vector<float> dense(Items());
  engine.ItemScores(&prepared.request, 1, options.num_threads, dense.data());
  const float top = *std::max_element(dense.begin(), dense.end());
  double sum = 0;
  for (float x : dense) sum += std::exp(static_cast<double>(x - top));
  const auto log_sum = static_cast<float>(top + std::log(sum));
  std::vector<int64_t> every(dense.size());
  std::iota(every.begin(), every.end(), int64_t{0});
  const std::vector<int64_t> likely = Best(every, dense, options.dense_top, free);
  found.insert(found.end(), likely.begin(), likely.end());
  Mixture::Evidence counts;
  if (mixed) {
    counts = impl_->mixture->Of(prepared.known);
    for (const std::vector<float>& values : counts.values) {
      std::vector<int64_t> items;
      std::vector<float> evidence;
      for (size_t i = 0; i < values.size(); ++i) {
        if (values[i] <= 0) continue;
        items.push_back(counts.items[i]);
        evidence.push_back(values[i]);
      }
      const std::vector<int64_t> best = Best(items, evidence, options.dense_top, free);
      found.insert(found.end(), best.begin(), best.end());
    }
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());

  scores.resize(found.size());
  engine.ItemLogProbs(&prepared.request, 1, found.data(), static_cast<int64_t>(found.size()),
                      options.num_threads, scores.data());
  std::vector<double> score(found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    const float log_p = dense[found[i]] - log_sum;
    if (mixed) {
      const std::span<const double> weights = impl_->mixture->Weights(options.exclude_history);
      score[i] = weights[0] * scores[i] + weights[1] * log_p;
      const auto at = std::lower_bound(counts.items.begin(), counts.items.end(), found[i]);
      if (at == counts.items.end() || *at != found[i]) continue;
      for (size_t p = 0; p < counts.values.size(); ++p) {
        score[i] += weights[2 + p] * counts.values[p][at - counts.items.begin()];
      }
    } else {
      score[i] = static_cast<float>(1 - dense_weight) * scores[i] +
                 static_cast<float>(dense_weight) * log_p;
    }
  }
  return Best(found, score, options.k, [](int64_t) { return true; });
}

void SaveCatalog(const std::string& path, int64_t n, int64_t leaves, const int64_t* leaf_of_item,
                 bool text, const void* ids, const int64_t* offsets, const uint64_t* tags,
                 uint64_t engine, uint64_t trie, uint64_t mixture) {
  for (int64_t i = 0; i < (text ? n : 0); ++i) {
    const char* const id = static_cast<const char*>(ids) + offsets[i];
    if (std::memchr(id, 0, offsets[i + 1] - offsets[i]) != id + (offsets[i + 1] - offsets[i] - 1)) {
      throw std::invalid_argument(WantedGot("ids", "one zero, at the end", "others in item ", i));
    }
  }
  Catalog c;
  Header& h = c.header;
  Name(h, kCatalogFile);
  h.items = static_cast<uint64_t>(n);
  h.leaves = static_cast<uint64_t>(leaves);
  h.text = text ? 1 : 0;
  const auto any = [&](uint64_t bits) {
    return std::any_of(tags, tags + n, [&](uint64_t one) { return (one & bits) != 0; });
  };
  const bool retired = tags != nullptr && any(kRetiredBit);
  const bool tagged = tags != nullptr && (!retired || any(~kRetiredBit));
  h.tagged = (tagged ? kTagged : 0) | (retired ? kRetired : 0);
  h.engine = engine;
  h.trie = trie;
  h.mixture = mixture;
  h.id_bytes = static_cast<uint64_t>(text ? offsets[n] : n * 8);
  const Parts at(h);
  h.file_bytes = at.end;
  c.block = FileBlock::Allocate(at.end);
  SetParts(c);
  char* const base = c.block.data();
  const size_t list = n * 8;
  std::memcpy(base + at.leaf_of_item, leaf_of_item, list);
  if (tags != nullptr) std::memcpy(base + at.tags, tags, list);
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
      throw std::invalid_argument(
          WantedGot("leaf_of_item", Text("leaves in [0, ", leaves, ")"), leaf_of_item[i]));
    }
    ++begin[leaf_of_item[i] + 1];
  }
  std::partial_sum(begin, begin + leaves + 1, begin);
  std::vector<int64_t> next(begin, begin + leaves);
  for (int64_t i = 0; i < n; ++i) items[next[leaf_of_item[i]]++] = i;

  Seal(h, base);
  SaveBytes(path, base, c.block.size());
}

}  // namespace onerec
