#include "recommender/mixture.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <utility>

#include "onerec/engine.h"
#include "support/error.h"
#include "support/sealed_file.h"

namespace onerec {
namespace {

constexpr SealedKind kMixtureFile{"ONERMIXT", 1};
constexpr uint64_t kMost = uint64_t{1} << 40;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t file_bytes;
  uint64_t items;
  uint64_t lists;
  uint64_t parts;
  char reserved[192];
  uint64_t content_hash;
  uint64_t header_hash;
};
static_assert(sizeof(Header) == 256 && offsetof(Header, header_hash) == 248);

[[noreturn]] void Refuse(const std::string& why) {
  throw EngineFormatError("not a valid mixture.bin: " + why);
}

void Check(bool good, const char* part) {
  if (!good) Refuse(Text(part, ": wrong"));
}

// Takes one array after another from a block.
class Cursor {
 public:
  explicit Cursor(const FileBlock& block) : block_(block) {}

  template <class T>
  const T* Take(uint64_t count) {
    if (count > (block_.size() - at_) / sizeof(T)) Refuse("its parts do not fill the file");
    const auto* const found = reinterpret_cast<const T*>(block_.data() + at_);
    at_ += count * sizeof(T);
    return found;
  }
  bool AtEnd() const { return at_ == block_.size(); }

 private:
  const FileBlock& block_;
  size_t at_ = sizeof(Header);
};

// The sums of each part for the items that any part touches.
class Sums {
 public:
  Sums(size_t parts, size_t most) : parts_(parts), slots_(std::bit_ceil(2 * most + 2), -1) {}

  void Add(size_t part, int64_t item, double value) {
    const size_t mask = slots_.size() - 1;
    size_t slot = (static_cast<uint64_t>(item) * 0x9E3779B97F4A7C15U >> 20) & mask;
    while (slots_[slot] >= 0 && items_[slots_[slot]] != item) slot = (slot + 1) & mask;
    if (slots_[slot] < 0) {
      slots_[slot] = static_cast<int32_t>(items_.size());
      items_.push_back(item);
      values_.resize(values_.size() + parts_, 0.0);
    }
    values_[slots_[slot] * parts_ + part] += value;
  }

  const std::vector<int64_t>& Items() const { return items_; }
  double& At(size_t row, size_t part) { return values_[row * parts_ + part]; }

 private:
  size_t parts_;
  std::vector<int32_t> slots_;  // the row of an item, or -1
  std::vector<int64_t> items_;
  std::vector<double> values_;
};

bool Finite(std::span<const double> values) {
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
}

}  // namespace

Mixture Mixture::Load(const std::string& path, int64_t items) {
  Mixture made;
  made.block_ = FileBlock::Map(path);
  const FileBlock& block = made.block_;
  const auto h = ReadHeader<Header>(block.data(), block.size(), kMixtureFile, Refuse);
  if (h.lists >= kMost || h.parts >= kMost) Refuse("its parts do not fill the file");
  if (h.items != static_cast<uint64_t>(items)) {
    Refuse(WantedGot("items", Text(items, " as in catalog.bin"), h.items));
  }
  CheckContent(h, block.data(), Refuse);
  made.items_ = items;
  Cursor cursor(block);
  made.masked_ = {cursor.Take<double>(2 + h.parts), 2 + h.parts};
  made.unmasked_ = {cursor.Take<double>(2 + h.parts), 2 + h.parts};
  Check(Finite(made.masked_) && Finite(made.unmasked_), "weights");

  const auto* const shape = cursor.Take<int64_t>(3 * h.parts);
  uint64_t ages = 0, constants = 0;
  for (uint64_t p = 0; p < h.parts; ++p) {
    const auto list = static_cast<uint64_t>(shape[3 * p]);
    const auto depth = static_cast<uint64_t>(shape[3 * p + 1]);
    const auto always = static_cast<uint64_t>(shape[3 * p + 2]);
    Check(list < h.lists && depth < kMost && always < kMost, "parts");
    ages += depth;
    constants += always;
  }
  const double* recency = cursor.Take<double>(ages);
  const int64_t* constant_items = cursor.Take<int64_t>(constants);
  const double* constant_weights = cursor.Take<double>(constants);
  for (uint64_t p = 0; p < h.parts; ++p) {
    const size_t depth = shape[3 * p + 1], always = shape[3 * p + 2];
    made.parts_.push_back(
        {shape[3 * p], {recency, depth}, {constant_items, always}, {constant_weights, always}});
    const CountPart& part = made.parts_.back();
    Check(Finite(part.recency) && Finite(part.constant_weights), "recency");
    for (int64_t item : part.constant_items) Check(item >= 0 && item < items, "constants");
    recency += depth;
    constant_items += always;
    constant_weights += always;
  }

  made.place_ = cursor.Take<int64_t>(h.items);
  std::vector<bool> taken(h.items, false);
  for (int64_t i = 0; i < items; ++i) {
    Check(made.place_[i] >= 0 && made.place_[i] < items && !taken[made.place_[i]], "places");
    taken[made.place_[i]] = true;
  }
  uint64_t neighbors = 0;
  for (uint64_t q = 0; q < h.lists; ++q) {
    const auto* const offsets = cursor.Take<int64_t>(h.items + 1);
    Check(offsets[0] == 0 && std::is_sorted(offsets, offsets + items + 1), "offsets");
    Check(static_cast<uint64_t>(offsets[items]) < kMost, "offsets");
    made.lists_.push_back({offsets, nullptr, nullptr});
    neighbors += offsets[items];
  }
  const float* weights = cursor.Take<float>(neighbors);
  const int32_t* neighbor = cursor.Take<int32_t>(neighbors);
  Check(cursor.AtEnd(), "size");
  for (uint64_t i = 0; i < neighbors; ++i) {
    Check(std::isfinite(weights[i]) && neighbor[i] >= 0 && neighbor[i] < items, "neighbors");
  }
  for (CountList& list : made.lists_) {
    list.weights = weights;
    list.items = neighbor;
    weights += list.offsets[items];
    neighbor += list.offsets[items];
  }
  return made;
}

Mixture::Evidence Mixture::Of(const std::vector<int64_t>& history) const {
  const size_t parts = parts_.size();
  // The a-th last item of the history, for the ages that a part reads.
  const auto read = [&](const CountPart& part, const auto& take) {
    const size_t depth = std::min(part.recency.size(), history.size());
    for (size_t a = 0; a < depth; ++a) take(history[history.size() - 1 - a], part.recency[a]);
  };
  size_t most = 0;
  for (const CountPart& part : parts_) {
    const int64_t* const offsets = lists_[part.list].offsets;
    most += part.constant_items.size();
    read(part, [&](int64_t item, double) { most += offsets[item + 1] - offsets[item]; });
  }
  Sums sums(parts, most);
  for (size_t p = 0; p < parts; ++p) {
    const CountPart& part = parts_[p];
    const CountList& list = lists_[part.list];
    read(part, [&](int64_t item, double weight) {
      for (int64_t i = list.offsets[item]; i < list.offsets[item + 1]; ++i) {
        sums.Add(p, list.items[i], weight * list.weights[i]);
      }
    });
    for (size_t i = 0; i < part.constant_items.size(); ++i) {
      sums.Add(p, part.constant_items[i], part.constant_weights[i]);
    }
  }

  // Sums over the catalogue go by popularity, as in Python, so that they are equal to the last bit.
  const std::vector<int64_t>& items = sums.Items();
  std::vector<size_t> rows(items.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  std::sort(rows.begin(), rows.end(),
            [&](size_t a, size_t b) { return place_[items[a]] < place_[items[b]]; });
  const auto n = static_cast<double>(items_);
  for (size_t p = 0; p < parts; ++p) {
    double sum = 0, squares = 0;
    for (size_t row : rows) {
      const double value = sums.At(row, p), square = value * value;
      sum += value;
      squares += square;
    }
    const double mean = sum / n;
    const double spread = std::sqrt(std::max(squares / n - mean * mean, 0.0));
    if (spread > 0) {
      for (size_t row : rows) sums.At(row, p) /= spread;
    }
  }
  std::sort(rows.begin(), rows.end(), [&](size_t a, size_t b) { return items[a] < items[b]; });
  Evidence found{std::vector<int64_t>(rows.size()),
                 std::vector(parts, std::vector<float>(rows.size()))};
  for (size_t i = 0; i < rows.size(); ++i) {
    found.items[i] = items[rows[i]];
    for (size_t p = 0; p < parts; ++p) {
      found.values[p][i] = static_cast<float>(sums.At(rows[i], p));
    }
  }
  return found;
}

void SaveMixture(const std::string& path, int64_t n, const int64_t* place, const double* masked,
                 const double* unmasked, const std::vector<CountList>& lists,
                 const std::vector<CountPart>& parts) {
  std::string body;
  const auto put = [&](const auto* values, size_t count) {
    body.append(reinterpret_cast<const char*>(values), count * sizeof *values);
  };
  put(masked, 2 + parts.size());
  put(unmasked, 2 + parts.size());
  for (const CountPart& part : parts) {
    const int64_t shape[] = {part.list, static_cast<int64_t>(part.recency.size()),
                             static_cast<int64_t>(part.constant_items.size())};
    put(shape, 3);
  }
  for (const CountPart& part : parts) put(part.recency.data(), part.recency.size());
  for (const CountPart& part : parts) put(part.constant_items.data(), part.constant_items.size());
  for (const CountPart& part : parts) {
    put(part.constant_weights.data(), part.constant_weights.size());
  }
  put(place, n);
  for (const CountList& list : lists) put(list.offsets, n + 1);
  for (const CountList& list : lists) put(list.weights, list.offsets[n]);
  for (const CountList& list : lists) put(list.items, list.offsets[n]);

  Header h{};
  Name(h, kMixtureFile);
  h.file_bytes = sizeof h + body.size();
  h.items = static_cast<uint64_t>(n);
  h.lists = lists.size();
  h.parts = parts.size();
  body.insert(0, sizeof h, '\0');
  Seal(h, body.data());
  SaveBytes(path, body.data(), body.size());
}

}  // namespace onerec
