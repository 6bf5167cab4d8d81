// The priced assignment: dual prices, hard step, exact finish, certificate.
#include "kmeans/assign.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "kmeans/lists/candidates.h"
#include "kmeans/lists/maker.h"
#include "kmeans/nodes.h"
#include "kmeans/options.h"
#include "kmeans/rounding.h"
#include "kmeans/sample.h"
#include "kmeans/tiles/pass.h"
#include "kmeans/transport/annealer.h"
#include "kmeans/transport/capacity.h"
#include "kmeans/transport/paths.h"
#include "kmeans/transport/simplex.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kAhead = 8;  // rows that are on their way from memory
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// Costs for the exact finish that know the moves in candidate lists that lose less than `reach` at
// starting prices `now`.
class ListCosts : public TileCosts {
 public:
  ListCosts(const FloatRows& x, const float* centers, const PackedCenters& packed,
            const KMeansKernels& kernels, const CandidateLists& lists, const double* now,
            double reach)
      : TileCosts(x, centers, nullptr, packed, kernels),
        lists_(lists),
        now_(now, now + lists.prices.size()),
        reach_(reach),
        moved_(lists, now) {}

  double Known(const int32_t* items, int64_t count, int32_t from,
               const MoveBody& body) const override {
    const double limit = now_[from] + reach_;
    double edge = limit;
    const auto chunk_of = [&](int32_t item) -> const CandidateLists::Chunk& {
      return lists_.chunks[item / lists_.chunk_rows];
    };
    const auto row_of = [&](int32_t item) { return item % lists_.chunk_rows; };
    for (int64_t i = 0; i < count; ++i) {
      // A node's rows are far apart: each would wait for memory, first for its offset.
      if (i + 2 * kAhead < count) {
        const int32_t item = items[i + 2 * kAhead];
        __builtin_prefetch(chunk_of(item).offset.data() + row_of(item));
      }
      if (i + kAhead < count) {
        const int32_t item = items[i + kAhead];
        const CandidateLists::Chunk& ahead = chunk_of(item);
        __builtin_prefetch(ahead.code.data() + ahead.offset[row_of(item)]);
        __builtin_prefetch(ahead.rel.data() + ahead.offset[row_of(item)]);
        __builtin_prefetch(ahead.error.data() + row_of(item));
      }
      const CandidateLists::Chunk& chunk = chunk_of(items[i]);
      const size_t row = row_of(items[i]);
      const auto begin = chunk.code.begin() + chunk.offset[row];
      const auto end = chunk.code.begin() + chunk.offset[row + 1];
      const auto own = std::find(begin, end, from);
      if (own == end) return -std::numeric_limits<double>::infinity();
      const auto rel = [&](auto at) {
        return static_cast<double>(chunk.rel[at - chunk.code.begin()]) - lists_.prices[*at];
      };
      const double stay = rel(own) + Rounding(chunk, row);
      edge = std::min(edge, moved_.Edge(chunk, row, edge + stay) - stay);
      for (auto at = begin; at < end; ++at) {
        const double above = static_cast<double>(chunk.rel[at - chunk.code.begin()]);
        const double delta = rel(at) - stay - kEntryRounding * above;
        if (*at != from && delta + now_[*at] < limit) body(i, *at, delta);
      }
    }
    return edge;
  }

 private:
  // Bound on the error of a difference of two entries.
  double Rounding(const CandidateLists::Chunk& chunk, size_t row) const {
    return static_cast<double>(chunk.error[row]) + kListRounding * lists_.scale;
  }

  const CandidateLists& lists_;
  std::vector<double> now_;
  double reach_;
  MovedLists moved_;
};

class Search {
 public:
  Search(const FloatRows& x, const std::vector<double>& mean, const Nodes& nodes, int64_t clusters,
         const BalancedKMeansOptions& options, KMeansDevice* device, BalancedAssignment& report)
      : x_(x),
        mean_(mean),
        nodes_(nodes),
        options_(options),
        report_(report),
        kernels_(CurrentKMeansKernels()),
        centers_(nodes.centers.data(), nodes.count, x.columns, mean, kernels_),
        share_(Shares(nodes, clusters)),
        annealer_(share_, options, kernels_),
        pass_(x, nodes, options, kernels_, centers_, device),
        maker_(x, mean, nodes, options, kernels_, centers_, pass_, report),
        lists_(maker_.lists()) {
    const int64_t low = x.rows / clusters;
    const int64_t rest = x.rows % clusters;
    for (const int64_t m : nodes.multiplicity) {
      capacity_.units.push_back(m * (rest > 0 ? low + 1 : low));
      capacity_.extra.push_back(rest > 0 ? m : 0);
    }
    capacity_.dummies = rest > 0 ? clusters - rest : 0;
  }

  void Run(bool prices_given, bool labels_given, bool certify, double* prices, int32_t* labels) {
    Labels(prices_given, labels_given, prices, labels);
    Finish(certify, prices, labels);
    if (certify) Certify(prices, labels);
    report_.sweeps = annealer_.sweeps();
  }

 private:
  // Prices, and the hard argmin at them.
  void Labels(bool prices_given, bool labels_given, double* prices, int32_t* labels) {
    CostMatrix matrix;
    const int64_t columns = centers_.columns();
    const int64_t affordable =
        options_.memory_budget / 2 / static_cast<int64_t>(sizeof(float)) / columns;
    const bool whole = x_.rows <= affordable && x_.rows * columns <= kMatrixEntries;
    const int64_t count = std::max<int64_t>(
        1, std::min({x_.rows, affordable / 2,
                     std::max(kSampleRows * nodes_.count, kSampleEntries / columns)}));
    if (!prices_given && !whole) {
      AnnealMatrix(matrix, SampleRows(x_.rows, count, options_.seed ^ 0x5A3F), false, prices);
      matrix = {};
      prices_given = true;
    }
    if (whole) {
      // All costs at once: no lists.
      AnnealMatrix(matrix, {}, prices_given, prices);
      const double begin = Seconds();
      MatrixLabels(matrix, prices, labels);
      report_.finish_seconds += Seconds() - begin;
      matrix = {};
    } else {
      ListLabels(count, labels_given, prices, labels);
    }
  }

  // Prices from candidate lists, which are made again where prices leave their range.
  void ListLabels(int64_t sample, bool labels_given, double* prices, int32_t* labels) {
    double over = 1;
    const int32_t* const given = labels_given ? labels : nullptr;
    bool near = !labels_given || Changed(prices, labels) < kChanged;
    if (near) {
      maker_.Build(prices, given);
      over = annealer_.OverFull(lists_, prices);
      near = over <= (labels_given ? kNearLabels : kNear);
    }
    if (!near) {
      CostMatrix matrix;
      const std::vector<int64_t> rows = Strata(sample, prices, given, matrix.weights);
      AnnealMatrix(matrix, rows, true, prices);
      maker_.Build(prices, given);
      over = annealer_.OverFull(lists_, prices);
    }
    if (lists_.scale > 0 && (labels_given || x_.rows <= kSimplexRows * nodes_.count)) {
      if (!labels_given) Feasible(prices, labels);
      if (SolveLists(prices, labels)) return;
    } else {
      std::fill(labels, labels + x_.rows, -1);  // none is preferred yet
      for (double before = 1; over <= kWorth * before;) {
        before = over;
        if (ListPrices(prices)) break;
        if (!maker_.Extend(prices)) maker_.Build(prices);
        over = annealer_.OverFull(lists_, prices);
      }
    }
    const double begin = Seconds();
    HardLabels(prices, labels);
    report_.finish_seconds += Seconds() - begin;
  }

  // Share of a sample's rows that no longer prefer their cluster.
  double Changed(const double* prices, const int32_t* labels) {
    const int64_t count = std::min<int64_t>(x_.rows, kChangedRows);
    const std::vector<int64_t> rows = SampleRows(x_.rows, count, options_.seed ^ 0xC4A9);
    std::vector<uint8_t> changed(count);
    centers_.SetPrices(prices);
    DensePass(x_, rows.data(), count, centers_, kernels_, options_,
              [&](int64_t, int64_t i, const float* row, double square) {
                const size_t at = i;
                changed[at] = row[labels[rows[at]]] - centers_.Error(square) >
                              kernels_.row_min(row, centers_.columns());
              });
    const auto sum = std::accumulate(changed.begin(), changed.end(), int64_t{0});
    return static_cast<double>(sum) / static_cast<double>(count);
  }

  static std::vector<double> Shares(const Nodes& nodes, int64_t clusters) {
    std::vector<double> shares;
    for (const int64_t m : nodes.multiplicity) {
      shares.push_back(static_cast<double>(m) / static_cast<double>(clusters));
    }
    return shares;
  }

  // A sample with as many rows of each cluster, as labels or, if they are null, the hard argmin
  // over the lists say: each stands for its share of them, so that no cluster's number of items is
  // left to chance.
  std::vector<int64_t> Strata(int64_t count, const double* prices, const int32_t* given,
                              std::vector<float>& weights) {
    std::vector<int32_t> labels(x_.rows);
    if (given != nullptr) {
      std::copy(given, given + x_.rows, labels.begin());
    } else {
      annealer_.ListLabels(lists_, prices, labels.data());
    }
    std::vector<int64_t> sizes(nodes_.count);
    for (const int32_t k : labels) ++sizes[k];
    // Every cluster gives what it has, or the same as the other large ones.
    const int64_t each = std::max<int64_t>(1, count / nodes_.count);
    std::vector<int64_t> wanted(sizes);
    for (int64_t& size : wanted) size = std::min(size, each);
    std::vector<int64_t> left(wanted);
    std::vector<int64_t> rows;
    for (const int64_t i : DrawRows(x_.rows, x_.rows, options_.seed ^ 0x77E1)) {
      if (left[labels[i]]-- > 0) rows.push_back(i);
    }
    std::sort(rows.begin(), rows.end());
    for (const int64_t i : rows) {
      const size_t k = labels[i];
      weights.push_back(static_cast<float>(sizes[k]) / static_cast<float>(wanted[k]));
    }
    return rows;
  }

  // Annealing on the costs of some rows, or of all if `rows` is empty, with matrix.weights. From
  // given prices it starts at a smaller eps.
  void AnnealMatrix(CostMatrix& matrix, const std::vector<int64_t>& rows, bool prices_given,
                    double* prices) {
    const double begin = Seconds();
    const int64_t columns = centers_.columns();
    const bool all = rows.empty();
    const int64_t count = all ? x_.rows : static_cast<int64_t>(rows.size());
    matrix.rows = count;
    matrix.columns = columns;
    matrix.costs.resize(count * columns);
    matrix.errors.resize(count);
    std::vector<double> spread(count);
    centers_.SetPrices(nullptr);
    DensePass(x_, all ? nullptr : rows.data(), count, centers_, kernels_, options_,
              [&](int64_t, int64_t i, const float* row, double square) {
                std::memcpy(matrix.costs.data() + i * columns, row, sizeof(float) * columns);
                matrix.errors[i] = centers_.Error(square);
                double sum = 0;
                for (int64_t k = 0; k < nodes_.count; ++k) sum += static_cast<double>(row[k]);
                spread[i] = sum / static_cast<double>(nodes_.count) -
                            static_cast<double>(kernels_.row_min(row, columns));
              });
    if (all) {
      ++report_.passes;
      report_.pass_seconds += Seconds() - begin;
    }
    const double fill = Seconds();
    std::nth_element(spread.begin(), spread.begin() + count / 2, spread.end());
    const double widest = kWidestEps * spread[count / 2];
    double eps = prices_given ? widest / (kCooling * kCooling) : widest;
    if (!prices_given) {
      for (int sweep = 0; sweep < 3 && eps > 0; ++sweep) annealer_.Sweep(matrix, eps, prices);
    }
    CandidateLists lists;
    // A sample says little at the smallest.
    const double last = widest / (all ? kLastEps : kLastSampleEps);
    for (int climbs = 0; eps > last;) {
      eps_ = eps;
      const Annealer::State state = SampleLists(matrix, kListReach * eps, prices, lists)
                                        ? annealer_.Balance(lists, eps, 0.01, prices)
                                        : annealer_.Balance(matrix, eps, 0.02, prices);
      if (options_.on_step) options_.on_step();
      // Prices that are far off come near in a few steps of a larger eps only.
      const bool lost = state.off > kLost && eps < widest && climbs++ < 3;
      eps = lost ? std::min(widest, eps * kCooling * kCooling) : eps / kCooling;
    }
    report_.price_seconds += Seconds() - (all ? fill : begin);
  }

  // Exact argmin of cost + price for every item.
  void MatrixLabels(const CostMatrix& matrix, const double* prices, int32_t* labels) {
    const int64_t columns = matrix.columns;
    std::vector<float> p(columns, 0.0f);
    double most = 0;
    for (int64_t k = 0; k < nodes_.count; ++k) {
      p[k] = static_cast<float>(prices[k]);
      most = std::max(most, std::abs(prices[k]));
    }
    ParallelFor((matrix.rows + 255) / 256, options_.num_threads, [&](int64_t c) {
      std::vector<float> row(columns);
      std::vector<int32_t> contenders;
      for (int64_t i = c * 256; i < std::min(matrix.rows, (c + 1) * 256); ++i) {
        const float* costs = matrix.costs.data() + i * columns;
        for (int64_t k = 0; k < columns; ++k) {
          row[k] = costs[k] + p[k];
        }
        const float low = kernels_.row_min(row.data(), columns);
        // Prices and sums are rounded to float32 once each.
        const double error = static_cast<double>(matrix.errors[i]) +
                             kSumRounding * (2 * most + std::abs(static_cast<double>(low)));
        const float limit =
            std::nextafter(static_cast<float>(static_cast<double>(low) + 2 * error), kInfinity);
        contenders.resize(columns);
        contenders.resize(kernels_.collect(row.data(), columns, limit, contenders.data()));
        labels[i] = Best(i, contenders, prices, -1);
      }
    });
  }

  // Lists of the sample's rows; false if they would be too long to pay.
  bool SampleLists(const CostMatrix& matrix, double threshold, const double* prices,
                   CandidateLists& lists) {
    const int64_t columns = matrix.columns;
    const int64_t count = matrix.rows;
    constexpr int64_t kChunk = 256;
    const int64_t chunks = DivideUp(count, kChunk);
    std::vector<float> p(columns, 0.0f);
    for (int64_t k = 0; k < nodes_.count; ++k) {
      p[k] = static_cast<float>(prices[k]);
    }
    lists.rows = count;
    lists.chunk_rows = kChunk;
    lists.threshold = threshold;
    lists.reach = threshold;
    lists.scale = threshold;
    lists.weights = matrix.weights;
    lists.prices.assign(prices, prices + nodes_.count);
    lists.group_offset = nodes_.group_offset;
    lists.chunks.assign(chunks, {});
    const auto fill = [&](int64_t c, int64_t stride) {
      CandidateLists::Chunk& chunk = lists.chunks[c];
      chunk = {};
      std::vector<float> row(columns);
      std::vector<int32_t> found(columns);
      for (int64_t i = c * kChunk; i < std::min(count, (c + 1) * kChunk); i += stride) {
        const float* cost = matrix.costs.data() + i * columns;
        for (int64_t k = 0; k < columns; ++k) {
          row[k] = cost[k] + p[k];
        }
        const float low = kernels_.row_min(row.data(), columns);
        const int64_t n = kernels_.collect(row.data(), columns, low + static_cast<float>(threshold),
                                           found.data());
        for (int64_t t = 0; t < n; ++t) {
          const int32_t k = found[t];
          chunk.code.push_back(k);
          chunk.rel.push_back(row[k] - low);
        }
        EndRow(chunk, 0.0f, static_cast<double>(low));
      }
    };
    ParallelFor(chunks, options_.num_threads, [&](int64_t c) { fill(c, 32); });
    const int64_t tried = chunks * kChunk / 32;
    if (lists.entries() > kNewtonEntries * std::max<int64_t>(1, tried) ||
        lists.entries() > options_.memory_budget / 4 / (32 * kEntryBytes)) {
      return false;
    }
    ParallelFor(chunks, options_.num_threads, [&](int64_t c) { fill(c, 1); });
    return true;
  }

  // Labels of the right sizes, and prices near those that they are best at: a simplex for which
  // wrong sizes cost little, and a greedy fill for what it leaves.
  void Feasible(double* prices, int32_t* labels) {
    const double begin = Seconds();
    ListSimplex simplex(capacity_, lists_, options_.num_threads, ExactCosts(), prices, nullptr);
    for (double penalty = kFirstPenalty; penalty <= kLastPenalty; penalty *= 4) {
      const int64_t off = simplex.Solve(penalty * lists_.scale);
      if (options_.on_step) options_.on_step();
      if (off == 0) break;
    }
    std::copy(simplex.prices().begin(), simplex.prices().end(), prices);
    std::copy(simplex.labels().begin(), simplex.labels().end(), labels);
    GreedyFinish(prices, labels);
    maker_.AddLabels(labels);
    report_.price_seconds += Seconds() - begin;
  }

  ListSimplex::Exact ExactCosts() const {
    return [this](int64_t item, int32_t node) {
      return Cost(x_, item, nodes_.centers.data(), node, kernels_);
    };
  }

  // From labels of the right sizes, all listed, to the cheapest: what a pass finds cheaper than
  // the best within the lists is listed too, until there is nothing. False if that takes too long.
  bool SolveLists(double* prices, int32_t* labels) {
    const auto begin = Seconds();
    const double passes = report_.pass_seconds;
    ListSimplex simplex(capacity_, lists_, options_.num_threads, ExactCosts(), prices, labels);
    bool best = false;
    for (int round = 0; round < kRounds && !best; ++round) {
      simplex.Solve();
      if (options_.on_step) options_.on_step();
      std::copy(simplex.prices().begin(), simplex.prices().end(), prices);
      const int64_t open = maker_.ListAgain(prices, simplex);
      best = open == 0;
      if (best) break;
      simplex.TakeLists();
    }
    std::copy(simplex.labels().begin(), simplex.labels().end(), labels);
    eps_ = lists_.scale / 100;
    report_.price_seconds += Seconds() - begin - (report_.pass_seconds - passes);
    solved_ = best;
    return best;
  }

  // Annealing on the lists of all items; false when prices have left the range of the lists.
  bool ListPrices(double* prices) {
    const double begin = Seconds();
    bool inside = true;
    double before = 1;
    eps_ = lists_.scale / 12;
    for (int level = 0; level < 8 && lists_.scale > 0; ++level, eps_ /= kCooling) {
      const double outside = annealer_.Balance(lists_, eps_, 3e-3, prices).outside;
      const double over = annealer_.OverFull(lists_, prices);
      if (options_.on_step) options_.on_step();
      inside = outside <= 0.02;
      if (!inside || over > 0.8 * before || over * static_cast<double>(x_.rows) < 8) break;
      before = over;
    }
    report_.price_seconds += Seconds() - begin;
    return inside;
  }

  // The contender whose exact cost + price is smallest; of equals the one preferred, if it is one
  // of them up to rounding, else the first.
  int32_t Best(int64_t item, const std::vector<int32_t>& contenders, const double* prices,
               int32_t preferred) const {
    if (contenders.size() == 1) return contenders.front();
    double least = std::numeric_limits<double>::infinity();
    int32_t best = 0;
    for (const int32_t k : contenders) {
      const double cost = Cost(x_, item, nodes_.centers.data(), k, kernels_);
      const double rounding = k == preferred ? kDoubleTie * (cost + std::abs(prices[k])) : 0;
      const double exact = cost + prices[k] - rounding;
      if (exact < least || (exact == least && nodes_.first[k] < nodes_.first[best])) {
        least = exact;
        best = k;
      }
    }
    return best;
  }

  // Exact argmin of cost + price for every item: from the lists where they are long enough to know,
  // by a pass over all centres for the rest.
  void HardLabels(const double* prices, int32_t* labels) {
    const MovedLists lists_now(lists_, prices);
    const std::vector<float>& moved = lists_now.moved();
    const auto chunks = static_cast<int64_t>(lists_.chunks.size());
    std::vector<std::vector<int64_t>> outside(chunks);
    ParallelFor(chunks, options_.num_threads, [&](int64_t c) {
      const CandidateLists::Chunk& chunk = lists_.chunks[c];
      std::vector<int32_t> contenders;
      for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
        const int64_t item = c * lists_.chunk_rows + static_cast<int64_t>(r);
        const int64_t first = chunk.offset[r];
        const int64_t n = chunk.offset[r + 1] - first;
        float low;
        kernels_.list_argmin(chunk.rel.data() + first, chunk.code.data() + first, moved.data(), n,
                             &low);
        // float32 rounding of the sums in `low` and below is part of the error.
        const double error = static_cast<double>(chunk.error[r]) +
                             kListRounding * (std::abs(static_cast<double>(low)) + lists_.scale);
        const double edge = lists_now.Edge(chunk, r);
        if (static_cast<double>(low) + error > edge - error) {
          outside[c].push_back(item);
          continue;
        }
        contenders.clear();
        for (int64_t t = first; t < first + n; ++t) {
          const int32_t k = chunk.code[t];
          const float value = chunk.rel[t] + moved[k];
          if (static_cast<double>(value) <= static_cast<double>(low) + error)
            contenders.push_back(k);
        }
        labels[item] = Best(item, contenders, prices, labels[item]);
      }
    });
    std::vector<int64_t> lost;
    for (const auto& part : outside) lost.insert(lost.end(), part.begin(), part.end());
    Decide(lost, prices, labels);
  }

  // Exact argmin of cost + price for some items, by a pass over all centres.
  void Decide(const std::vector<int64_t>& items, const double* prices, int32_t* labels) {
    pass_.Run(prices, 0, 0, items.data(), static_cast<int64_t>(items.size()),
              [&](int64_t, int64_t i, const Candidates& row) {
                const int64_t item = items[i];
                labels[item] = Best(item, row.code, prices, labels[item]);
              });
  }

  void Finish(bool certify, double* prices, int32_t* labels) {
    const double begin = Seconds();
    if (solved_ && !certify) return;
    centers_.SetPrices(nullptr);
    std::unique_ptr<TileCosts> costs;
    if (lists_.rows > 0 && lists_.entries() * kMoveBytes <= options_.memory_budget / 2) {
      costs = std::make_unique<ListCosts>(
          x_, nodes_.centers.data(), centers_, kernels_, lists_, prices,
          solved_ ? kCenteringReach * lists_.scale : std::numeric_limits<double>::infinity());
    } else {
      costs = std::make_unique<TileCosts>(x_, nodes_.centers.data(), nullptr, centers_, kernels_);
    }
    ExactFinish finish(capacity_, *costs, x_.rows, labels, prices, options_.num_threads,
                       options_.on_step);
    finish.Run();
    if (certify) finish.CentrePrices(4 * eps_);
    report_.moves += finish.moves();
    report_.finish_seconds += Seconds() - begin;
  }

  // Moves items out of over-full clusters into free ones, those first that lose least at the
  // prices.
  void GreedyFinish(const double* prices, int32_t* labels) {
    std::vector<int64_t> room(capacity_.units);
    for (int64_t i = 0; i < x_.rows; ++i) --room[labels[i]];
    // The smaller clusters are those that have fewest of what they may hold.
    std::vector<int64_t> taken;
    for (const int64_t free : room) taken.push_back(-free);
    const Dummies dummies = PlaceDummies(capacity_, taken);
    for (int64_t k = 0; k < nodes_.count; ++k) room[k] -= dummies.held[k];
    struct Offer {
      float loss;
      int32_t item;
      int32_t to;
    };
    for (;;) {
      std::vector<int32_t> open;
      std::vector<float> open_centers;
      std::vector<double> open_prices;
      std::vector<int64_t> crowd;
      for (int64_t k = 0; k < nodes_.count; ++k) {
        if (room[k] <= 0) continue;
        open.push_back(static_cast<int32_t>(k));
        const float* center = nodes_.centers.data() + k * x_.columns;
        open_centers.insert(open_centers.end(), center, center + x_.columns);
        open_prices.push_back(prices[k]);
      }
      for (int64_t i = 0; i < x_.rows; ++i) {
        if (room[labels[i]] < 0) crowd.push_back(i);
      }
      if (crowd.empty()) return;
      PackedCenters packed(open_centers.data(), static_cast<int64_t>(open.size()), x_.columns,
                           mean_, kernels_);
      packed.SetPrices(open_prices.data());
      const int64_t columns = packed.columns();
      std::vector<Offer> offers(kGreedyOffers * crowd.size());
      DensePass(x_, crowd.data(), static_cast<int64_t>(crowd.size()), packed, kernels_, options_,
                [&](int64_t, int64_t i, float* row, double square) {
                  const auto item = static_cast<int32_t>(crowd[i]);
                  const auto own = static_cast<float>(
                      Cost(x_, item, nodes_.centers.data(), labels[item], kernels_) +
                      prices[labels[item]] - square);
                  for (size_t t = 0; t < kGreedyOffers; ++t) {
                    const float least = kernels_.row_min(row, columns);
                    Offer& offer = offers[kGreedyOffers * i + t];
                    offer = {least - own, item, -1};
                    if (least > kLargest) continue;
                    const auto k = std::find(row, row + columns, least) - row;
                    offer.to = open[k];
                    row[k] = kInfinity;
                  }
                });
      std::sort(offers.begin(), offers.end(), [](const Offer& a, const Offer& b) {
        return a.loss != b.loss   ? a.loss < b.loss
               : a.item != b.item ? a.item < b.item
                                  : a.to < b.to;
      });
      for (const Offer& offer : offers) {
        if (offer.to < 0) break;
        const size_t from = labels[offer.item];
        if (room[from] >= 0 || room[offer.to] <= 0) continue;
        ++room[from];
        --room[offer.to];
        labels[offer.item] = offer.to;
        ++report_.moves;
      }
    }
  }

  // Cost of the assignment, and the lower bound that the prices prove: a pass over all items and
  // centres of its own, with float64 where float32 leaves the smallest open.
  void Certify(const double* prices, const int32_t* labels) {
    const double begin = Seconds();
    const PassPlan plan = PlanPass(x_.rows, centers_.columns(), kernels_);
    std::vector<double> costs(plan.chunks);
    std::vector<double> duals(plan.chunks);
    pass_.Run(prices, 0, 0, nullptr, x_.rows, [&](int64_t c, int64_t i, const Candidates& row) {
      const double own = Cost(x_, i, nodes_.centers.data(), labels[i], kernels_);
      double least = own + prices[labels[i]];
      for (const int32_t k : row.code) {
        if (k == labels[i]) continue;
        least = std::min(least, Cost(x_, i, nodes_.centers.data(), k, kernels_) + prices[k]);
      }
      costs[c] += own;
      duals[c] += least;
    });
    ++report_.passes;
    report_.pass_seconds += Seconds() - begin;
    report_.cost = std::accumulate(costs.begin(), costs.end(), 0.0);
    report_.dual = std::accumulate(duals.begin(), duals.end(), 0.0);
    const Dummies dummies =
        PlaceDummies(capacity_, std::vector<double>(prices, prices + nodes_.count));
    for (int64_t k = 0; k < nodes_.count; ++k) {
      report_.dual -= static_cast<double>(capacity_.units[k] - dummies.held[k]) * prices[k];
    }
    report_.gap = report_.cost > 0 ? (report_.cost - report_.dual) / report_.cost : 0;
  }

  const FloatRows& x_;
  const std::vector<double>& mean_;
  const Nodes& nodes_;
  const BalancedKMeansOptions& options_;
  BalancedAssignment& report_;
  const KMeansKernels& kernels_;
  PackedCenters centers_;
  std::vector<double> share_;
  Annealer annealer_;
  NodeCapacity capacity_;
  CandidatePass pass_;
  ListMaker maker_;
  const CandidateLists& lists_;
  bool solved_ = false;  // labels are the cheapest of the right sizes, prices show it
  double eps_ = 0;       // of the last prices
};

}  // namespace

BalancedAssignment SolveAssignment(const FloatRows& x, const std::vector<double>& mean,
                                   const float* centers, int64_t clusters,
                                   const BalancedKMeansOptions& options, KMeansDevice* device,
                                   bool prices_given, bool labels_given, bool certify,
                                   double* prices, int32_t* labels) {
  BalancedAssignment report;
  const Nodes nodes = MakeNodes(centers, clusters, x.columns, options);
  std::vector<double> node_prices(nodes.count, 0.0);
  if (prices_given) {
    for (int64_t k = 0; k < clusters; ++k) {
      node_prices[nodes.node_of[k]] = prices[k];
    }
  }
  for (int64_t i = 0; labels_given && i < x.rows; ++i) {
    labels[i] = nodes.node_of[labels[i]];
  }
  Search search(x, mean, nodes, clusters, options, device, report);
  search.Run(prices_given, labels_given, certify, node_prices.data(), labels);
  // Equal centres share their node's items in item order.
  std::vector<int32_t> member(nodes.count, -1);
  std::vector<int32_t> next(clusters, -1);
  std::vector<int64_t> total(nodes.count);
  for (int64_t k = clusters - 1; k >= 0; --k) {
    const size_t node = nodes.node_of[k];
    next[k] = member[node];
    member[node] = static_cast<int32_t>(k);
  }
  for (int64_t i = 0; i < x.rows; ++i) ++total[labels[i]];
  std::vector<int64_t> left(nodes.count);
  std::vector<int64_t> members(nodes.multiplicity);
  for (size_t g = 0; g < left.size(); ++g) left[g] = DivideUp(total[g], members[g]);
  for (int64_t i = 0; i < x.rows; ++i) {
    const size_t node = labels[i];
    if (left[node] == 0) {
      member[node] = next[member[node]];
      --members[node];
      left[node] = DivideUp(total[node], members[node]);
    }
    --left[node];
    --total[node];
    labels[i] = member[node];
  }
  double sum = 0;
  for (int64_t k = 0; k < clusters; ++k) {
    prices[k] = node_prices[nodes.node_of[k]];
    sum += prices[k];
  }
  for (int64_t k = 0; k < clusters; ++k) prices[k] -= sum / static_cast<double>(clusters);
  return report;
}

}  // namespace onerec
