#include "kmeans/lists/maker.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kmeans/options.h"
#include "kmeans/rounding.h"
#include "kmeans/sample.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kRowBytes = 20;  // of a list beside its entries
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

int64_t ListMaker::Build(const double* prices, const int32_t* labels, const ListSimplex* basis) {
  const double begin = Seconds();
  const int64_t columns = centers_.columns();
  const int64_t entries = (options_.memory_budget / 2 / x_.rows - kRowBytes) / kEntryBytes;
  const int64_t target = std::clamp<int64_t>(
      (entries - kListPad / 2) / 2, 1, std::clamp(nodes_.count / kListShare, kShortest, kLongest));
  centers_.SetPrices(prices);
  lists_.prices.assign(prices, prices + nodes_.count);
  lists_.again.clear();
  lists_.group_offset = nodes_.group_offset;
  if (basis == nullptr) {
    const int64_t count = std::min(x_.rows, std::max<int64_t>(256, kListSample / columns));
    const std::vector<int64_t> rows = SampleRows(x_.rows, count, options_.seed ^ 0x1175);
    const auto groups = static_cast<int64_t>(nodes_.group_offset.size()) - 1;
    std::vector<float> above(count * nodes_.count);
    std::vector<float> leaders(count * groups);
    DensePass(x_, rows.data(), count, centers_, kernels_, options_,
              [&](int64_t, int64_t i, const float* row, double) {
                const float low = kernels_.row_min(row, columns);
                float* least = leaders.data() + i * groups;
                kernels_.group_min(row, nodes_.group_offset.data(), groups, least);
                for (int64_t g = 0; g < groups; ++g) least[g] -= low;
                for (int64_t k = 0; k < nodes_.count; ++k) {
                  above[i * nodes_.count + k] = row[k] - low;
                }
              });
    const auto place = above.begin() + count * std::min(target, nodes_.count) - 1;
    std::nth_element(above.begin(), place, above.end());
    lists_.scale = static_cast<double>(*place);
    lists_.threshold =
        target < nodes_.count ? lists_.scale : std::numeric_limits<double>::infinity();
    const auto leader = leaders.begin() + count * std::min(target, groups) - 1;
    std::nth_element(leaders.begin(), leader, leaders.end());
    lists_.reach =
        std::max(lists_.threshold, groups > target ? static_cast<double>(*leader)
                                                   : std::numeric_limits<double>::infinity());
  }
  const PassPlan plan = PlanPass(x_.rows, columns, kernels_);
  lists_.rows = x_.rows;
  lists_.chunk_rows = plan.chunk_rows;
  lists_.chunks.assign(plan.chunks, {});
  std::vector<int64_t> open(plan.chunks);
  pass_.Run(prices, lists_.threshold, lists_.reach, nullptr, x_.rows,
            [&](int64_t c, int64_t i, Candidates& row) {
              const size_t at = c;
              open[at] += ListRow(lists_.chunks[at], i, row, prices, labels, basis) ? 1 : 0;
            });
  ++report_.passes;
  report_.pass_seconds += Seconds() - begin;
  return std::accumulate(open.begin(), open.end(), int64_t{0});
}

bool ListMaker::ListRow(CandidateLists::Chunk& chunk, int64_t item, Candidates& row,
                        const double* prices, const int32_t* labels, const ListSimplex* basis) {
  const auto exact = [&](int32_t k) {
    return Cost(x_, item, nodes_.centers.data(), k, kernels_) + prices[k];
  };
  const auto add = [&](int32_t k) {
    const auto at = std::lower_bound(row.code.begin(), row.code.end(), k);
    if (at != row.code.end() && *at == k) return;
    const double square =
        kernels_.exact_cost(x_.data + item * x_.stride, centers_.mean(), x_.columns);
    row.value.insert(row.value.begin() + (at - row.code.begin()),
                     static_cast<float>(exact(k) - square));
    row.code.insert(at, k);
  };
  const int32_t label = labels != nullptr ? labels[item] : -1;
  if (label >= 0) add(label);
  bool open = false;
  if (basis != nullptr) {
    basis->Basic(item, add);
    open = Open(item, row, prices, *basis);
  }
  const size_t found = row.code.size();
  float error = row.error;
  if (static_cast<double>(error) > lists_.scale / 16) {
    // The tile is too coarse here: costs again, in float64.
    double least = std::numeric_limits<double>::infinity();
    std::vector<double> costs(found);
    for (size_t t = 0; t < found; ++t) {
      costs[t] = exact(row.code[t]);
      least = std::min(least, costs[t]);
    }
    for (size_t t = 0; t < found; ++t) {
      const double above = costs[t] - least;
      if (basis == nullptr && row.code[t] != label && above > lists_.threshold &&
          row.value[t] <= row.limit) {
        continue;
      }
      chunk.code.push_back(row.code[t]);
      chunk.rel.push_back(static_cast<float>(above));
    }
    error = static_cast<float>(kExactEntry * lists_.scale);
  } else {
    chunk.code.insert(chunk.code.end(), row.code.begin(), row.code.end());
    for (const float value : row.value) chunk.rel.push_back(value - row.low);
  }
  EndRow(chunk, error, static_cast<double>(row.low));
  return open;
}

// Says if one of the listed clusters suits the item better than its own.
bool ListMaker::Open(int64_t item, const Candidates& row, const double* prices,
                     const ListSimplex& basis) const {
  const int32_t own = basis.labels()[item];
  const auto value = [&](int32_t k) {
    return Cost(x_, item, nodes_.centers.data(), k, kernels_) + prices[k];
  };
  const auto place = std::lower_bound(row.code.begin(), row.code.end(), own) - row.code.begin();
  const float own_value = row.value[place];
  for (size_t t = 0; t < row.code.size(); ++t) {
    const int32_t k = row.code[t];
    if (k == own || row.value[t] > own_value + row.error) continue;
    if (row.value[t] < own_value - row.error || value(k) < value(own) - basis.rounding()) {
      return true;
    }
  }
  return false;
}

bool ListMaker::Extend(const double* prices) {
  if (pass_.on_device()) return false;
  const double begin = Seconds();
  const MovedLists lists_now(lists_, prices);
  const std::vector<float>& moved = lists_now.moved();
  // What all prices have in common moves nobody.
  std::vector<float> sorted(moved);
  std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
  const auto common = static_cast<double>(sorted[sorted.size() / 2]);
  std::vector<int32_t> fallen;
  std::vector<float> fallen_centers;
  std::vector<double> fallen_prices;
  for (int64_t k = 0; k < nodes_.count; ++k) {
    const size_t node = k;
    if (static_cast<double>(moved[node]) - common > -lists_.scale / 4) continue;
    fallen.push_back(static_cast<int32_t>(k));
    const float* center = nodes_.centers.data() + k * x_.columns;
    fallen_centers.insert(fallen_centers.end(), center, center + x_.columns);
    fallen_prices.push_back(prices[k] - common);
  }
  if (fallen.empty() || static_cast<int64_t>(fallen.size()) * 8 > nodes_.count) return false;
  struct Hit {
    int64_t item;
    int32_t code;
    float rel;
    float error;
  };
  PackedCenters packed(fallen_centers.data(), static_cast<int64_t>(fallen.size()), x_.columns,
                       mean_, kernels_);
  packed.SetPrices(fallen_prices.data());
  const int64_t columns = packed.columns();
  std::vector<std::vector<Hit>> hits(PlanPass(x_.rows, columns, kernels_).chunks);
  DensePass(x_, nullptr, x_.rows, packed, kernels_, options_,
            [&](int64_t c, int64_t i, const float* row, double square) {
              const CandidateLists::Chunk& chunk = lists_.chunks[i / lists_.chunk_rows];
              const double low = chunk.low[i % lists_.chunk_rows];
              const float error = 2 * centers_.Error(square);
              for (size_t f = 0; f < fallen.size(); ++f) {
                const double rel = static_cast<double>(row[f]) - low;
                if (rel > lists_.reach + static_cast<double>(error)) continue;
                hits[c].push_back({i, fallen[f], static_cast<float>(rel), error});
              }
            });
  std::vector<Hit> all;
  for (auto& part : hits) {
    all.insert(all.end(), part.begin(), part.end());
    part = {};
  }
  std::vector<uint8_t> is_fallen(nodes_.count, 0);
  for (const int32_t k : fallen) is_fallen[k] = 1;
  ParallelFor(static_cast<int64_t>(lists_.chunks.size()), options_.num_threads, [&](int64_t c) {
    CandidateLists::Chunk& chunk = lists_.chunks[c];
    CandidateLists::Chunk next;
    auto hit = std::lower_bound(all.begin(), all.end(), c * lists_.chunk_rows,
                                [](const Hit& h, int64_t item) { return h.item < item; });
    std::vector<std::pair<int32_t, float>> row;
    for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
      const int64_t item = c * lists_.chunk_rows + static_cast<int64_t>(r);
      float error = chunk.error[r];
      row.clear();
      for (int64_t t = chunk.offset[r]; t < chunk.offset[r + 1]; ++t) {
        const int32_t k = chunk.code[t];
        const float rel = chunk.rel[t];
        if (rel < kInfinity && is_fallen[k] == 0) row.emplace_back(k, rel);
      }
      for (; hit != all.end() && hit->item == item; ++hit) {
        row.emplace_back(hit->code, hit->rel);
        error = std::max(error, hit->error);
      }
      std::sort(row.begin(), row.end());
      for (const auto& [k, rel] : row) {
        next.code.push_back(k);
        next.rel.push_back(rel);
      }
      EndRow(next, error, chunk.low[r]);
    }
    chunk = std::move(next);
  });
  for (const int32_t k : fallen) lists_.prices[k] = prices[k] - common;
  report_.pass_seconds += Seconds() - begin;
  return true;
}

int64_t ListMaker::ListAgain(const double* prices, const ListSimplex& basis) {
  const double begin = Seconds();
  const MovedLists now(lists_, prices);
  lists_.margin = kMargin * lists_.scale;
  const auto count = static_cast<int64_t>(lists_.chunks.size());
  std::vector<Missed> missed(count);
  ParallelFor(count, options_.num_threads,
              [&](int64_t c) { missed[c] = Miss(c, now, prices, basis); });
  std::vector<int64_t> rows;
  int64_t found = 0;
  for (const Missed& part : missed) {
    rows.insert(rows.end(), part.rows.begin(), part.rows.end());
    found += part.open;
  }
  const auto number = static_cast<int64_t>(rows.size());
  if (5 * number > 4 * x_.rows || lists_.again.size() == kAges) {
    return Build(prices, nullptr, &basis);
  }
  lists_.again.emplace_back(prices, prices + nodes_.count);
  const auto age = static_cast<uint8_t>(lists_.again.size());
  const PassPlan plan = PlanPass(number, centers_.columns(), kernels_);
  std::vector<CandidateLists::Chunk> listed(plan.chunks);
  std::vector<int64_t> open(plan.chunks);
  pass_.Run(prices, lists_.threshold, lists_.reach, rows.data(), number,
            [&](int64_t c, int64_t position, Candidates& row) {
              const size_t at = c;
              open[at] += ListRow(listed[at], rows[position], row, prices, nullptr, &basis) ? 1 : 0;
            });
  const int64_t total = std::accumulate(open.begin(), open.end(), found);
  if (total > 0) {
    ParallelFor(count, options_.num_threads, [&](int64_t c) {
      const Missed& part = missed[c];
      if (part.rows.empty() && part.entries.empty()) return;
      Replace(lists_.chunks[c], c * lists_.chunk_rows, rows, listed, plan.chunk_rows, age,
              part.entries, basis);
    });
  }
  report_.pass_seconds += Seconds() - begin;
  return total;
}

// What a chunk's lists may miss at the prices. Few suspects of a row are looked at one by one.
ListMaker::Missed ListMaker::Miss(int64_t number, const MovedLists& now, const double* prices,
                                  const ListSimplex& basis) const {
  const CandidateLists::Chunk& chunk = lists_.chunks[number];
  Missed missed;
  std::vector<int32_t> suspects;
  const double rounded = 1 - kFloatUnitUp * static_cast<double>(x_.columns + 8);  // of near_cost
  for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
    const int64_t item = number * lists_.chunk_rows + static_cast<int64_t>(r);
    const size_t place = Place(chunk, r, basis.labels()[item]);
    const int32_t own = chunk.code[place];
    const auto value = static_cast<double>(chunk.rel[place] + now.moved()[own]);
    const double error = static_cast<double>(chunk.error[r]) +
                         kListRounding * (std::abs(static_cast<double>(chunk.rel[place])) +
                                          std::abs(value) + lists_.scale);
    const double limit = value + 2 * error + (lists_.again.empty() ? lists_.margin : 0);
    now.Suspects(chunk, r, limit, suspects);
    if (static_cast<int64_t>(suspects.size()) > nodes_.count / kFewSuspects) {
      missed.rows.push_back(item);
      continue;
    }
    if (suspects.empty()) continue;
    const float* x = x_.data + item * x_.stride;
    const double cost = Cost(x_, item, nodes_.centers.data(), own, kernels_);
    const double before = static_cast<double>(chunk.rel[place]) - cost - lists_.prices[own];
    const double most = cost + prices[own] + lists_.threshold;
    bool open = false;
    for (const int32_t k : suspects) {
      const float* center = nodes_.centers.data() + k * x_.columns;
      const auto near = static_cast<double>(kernels_.near_cost(x, center, x_.columns));
      if (near * rounded + prices[k] > most) continue;
      const double exact = kernels_.exact_cost(x, center, x_.columns);
      open = open || exact + prices[k] < cost + prices[own] - basis.rounding();
      missed.entries.push_back({item, k, static_cast<float>(before + exact + lists_.prices[k])});
    }
    missed.open += open ? 1 : 0;
  }
  return missed;
}

// Where the row lists the cluster, which it does.
size_t ListMaker::Place(const CandidateLists::Chunk& chunk, size_t row, int32_t cluster) {
  size_t t = chunk.offset[row];
  while (chunk.code[t] != cluster) ++t;
  return t;
}

// Puts the rows that were listed again in their places.
void ListMaker::Replace(CandidateLists::Chunk& chunk, int64_t first,
                        const std::vector<int64_t>& rows,
                        const std::vector<CandidateLists::Chunk>& listed, int64_t listed_rows,
                        uint8_t age, const std::vector<Entry>& entries, const ListSimplex& basis) {
  const std::vector<double>& prices = lists_.again.back();
  CandidateLists::Chunk next;
  auto position = std::lower_bound(rows.begin(), rows.end(), first);
  auto entry = entries.begin();
  for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
    const int64_t item = first + static_cast<int64_t>(r);
    if (position == rows.end() || *position != item) {
      int64_t end = chunk.offset[r + 1];
      if (entry != entries.end() && entry->item == item) {  // their place is that of the padding
        while (chunk.rel[end - 1] == kInfinity) --end;
      }
      next.code.insert(next.code.end(), chunk.code.begin() + chunk.offset[r],
                       chunk.code.begin() + end);
      next.rel.insert(next.rel.end(), chunk.rel.begin() + chunk.offset[r], chunk.rel.begin() + end);
      for (; entry != entries.end() && entry->item == item; ++entry) {
        next.code.push_back(entry->code);
        next.rel.push_back(entry->rel);
      }
      EndRow(next, chunk.error[r], chunk.low[r], chunk.age[r]);
      continue;
    }
    const int64_t at = position++ - rows.begin();
    const CandidateLists::Chunk& source = listed[at / listed_rows];
    const size_t row = at % listed_rows;
    // As if from the prices of the other rows, and counted from what the row was before.
    const auto then = [&](size_t t) {
      const size_t k = source.code[t];
      return static_cast<double>(source.rel[t]) - (prices[k] - lists_.prices[k]);
    };
    const int32_t label = basis.labels()[item];
    const double base =
        static_cast<double>(chunk.rel[Place(chunk, r, label)]) - then(Place(source, row, label));
    double widest = 0;
    for (int64_t t = source.offset[row]; t < source.offset[row + 1]; ++t) {
      if (source.rel[t] == kInfinity) continue;
      next.code.push_back(source.code[t]);
      next.rel.push_back(static_cast<float>(base + then(t)));
      widest = std::max(widest, std::abs(base + then(t)));
    }
    EndRow(next, source.error[row] + static_cast<float>(kListRounding) * static_cast<float>(widest),
           chunk.low[r], age);
  }
  chunk = std::move(next);
}

void ListMaker::AddLabels(const int32_t* labels) {
  ParallelFor(static_cast<int64_t>(lists_.chunks.size()), options_.num_threads, [&](int64_t c) {
    CandidateLists::Chunk& chunk = lists_.chunks[c];
    CandidateLists::Chunk next;
    for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
      const int64_t item = c * lists_.chunk_rows + static_cast<int64_t>(r);
      const int32_t label = labels[item];
      bool listed = false;
      double least = std::numeric_limits<double>::infinity();
      int32_t nearest = 0;
      for (int64_t t = chunk.offset[r]; t < chunk.offset[r + 1]; ++t) {
        const size_t entry = t;
        if (chunk.rel[entry] == kInfinity) continue;
        listed = listed || chunk.code[entry] == label;
        if (static_cast<double>(chunk.rel[entry]) < least) {
          least = static_cast<double>(chunk.rel[entry]);
          nearest = chunk.code[entry];
        }
        next.code.push_back(chunk.code[entry]);
        next.rel.push_back(chunk.rel[entry]);
      }
      if (!listed) {
        const auto at = [&](int32_t k) {
          return Cost(x_, item, nodes_.centers.data(), k, kernels_) + lists_.prices[k];
        };
        next.code.push_back(label);
        next.rel.push_back(static_cast<float>(at(label) - at(nearest) + least));
      }
      EndRow(next, chunk.error[r], chunk.low[r]);
    }
    chunk = std::move(next);
  });
}

}  // namespace onerec
