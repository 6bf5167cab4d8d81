// The dual: prices at which every cluster is wanted by as many items as it holds.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kmeans/tiles/pass.h"

namespace onerec {

constexpr int64_t kEntryBytes = 8;  // of a candidate list's entry

// For each row of a set of items, every centre whose cost + price is within `threshold` of the
// smallest at the prices of the time, and of each group of neighbouring centres at least the best
// if it is within `reach`: so that prices of whole groups can move far.
struct CandidateLists {
  struct Chunk {
    std::vector<int64_t> offset = {0};
    LineVector<int32_t> code;
    LineVector<float> rel;     // cost + price above the row's smallest
    std::vector<float> error;  // bound on the error of rel, a row
    std::vector<double> low;   // the smallest value itself, less |x|^2
    std::vector<uint8_t> age;  // which of `again` the row was listed at, from 1; 0: at `prices`
  };

  int64_t rows = 0;
  int64_t chunk_rows = 0;
  std::vector<Chunk> chunks;
  std::vector<double> prices;
  std::vector<std::vector<double>> again;  // prices at which some rows were listed again
  double margin = 0;                  // at the first of them what is not listed was so far above
  std::vector<int32_t> group_offset;  // [groups + 1] centres of each group of neighbours
  double threshold = 0;               // infinite: every centre
  double reach = 0;                   // at least threshold
  double scale = 0;                   // a finite measure of the width of the lists
  std::vector<float> weights;         // items that a row stands for; empty: one

  int64_t entries() const;
};

// What lists say at other prices than those that they were made at.
class MovedLists {
 public:
  MovedLists(const CandidateLists& lists, const double* now);

  // Change of each price: the value of an entry is rel + moved[code].
  const std::vector<float>& moved() const { return moved_; }

  // No centre that is not listed in the row has a value below this. Looks at the entries only as
  // long as that may be less than `enough`.
  double Edge(const CandidateLists::Chunk& chunk, size_t row,
              double enough = std::numeric_limits<double>::infinity()) const;

  // The centres that are not listed in the row and may have a value below `limit`.
  void Suspects(const CandidateLists::Chunk& chunk, size_t row, double limit,
                std::vector<int32_t>& found) const;

 private:
  struct Since {
    std::vector<float> moved;    // change of each price, padded
    std::vector<float> fallen;   // for each centre the smallest price change in its group
    double drift;                // the smallest of all
    std::vector<float> between;  // change from `prices` to these prices
  };

  double Least(const Since& since, const CandidateLists::Chunk& chunk, size_t row) const;

  const CandidateLists& lists_;
  const KMeansKernels& kernels_;
  std::vector<int32_t> group_;  // of each centre
  std::vector<float> moved_;
  std::vector<Since> since_;  // `prices`, then those of `again`
};

// Ends the row that was begun at chunk.code[first]: pads it.
void EndRow(CandidateLists::Chunk& chunk, float error, double low, uint8_t age = 0);

// Costs of every centre for each row of a set of items.
struct CostMatrix {
  int64_t rows = 0;
  int64_t columns = 0;  // padded; the padding is infinite
  LineVector<float> costs;
  std::vector<float> errors;   // bound on the error of a row
  std::vector<float> weights;  // items that a row stands for; empty: one
};

// Newton's method on the entropic dual
//   g(p) = sum_i -eps log sum_k exp(-(cost_ik + p_k) / eps) - sum_k target_k p_k,
// whose gradient is the column sums less the targets. The Hessian is the Laplacian of the graph
// whose edges say how many items hover between two clusters; groups of clusters with little between
// them are so shifted as one, which sweeps p_k += eps log(s_k / target_k) do not do.
class Annealer {
 public:
  // share: of the items, that each cluster takes.
  Annealer(std::vector<double> share, const BalancedKMeansOptions& options,
           const KMeansKernels& kernels);

  struct State {
    double off;      // share of the items off balance
    double outside;  // share of the rows whose lists have become too short to know; 0 for a matrix
  };

  // Balances at one eps until the share of the items off balance is below `tolerance` or stops
  // falling.
  State Balance(const CandidateLists& lists, double eps, double tolerance, double* prices);
  State Balance(const CostMatrix& matrix, double eps, double tolerance, double* prices);

  // One sweep p_k += eps log(s_k / target_k); returns the share of the items off balance before it.
  double Sweep(const CostMatrix& matrix, double eps, double* prices);

  // The hard argmin over the lists, in float32: one label for each row.
  void ListLabels(const CandidateLists& lists, const double* prices, int32_t* labels) const;

  // Share of the items above their cluster's target after the hard argmin over the lists.
  double OverFull(const CandidateLists& lists, const double* prices) const;

  int64_t sweeps() const { return sweeps_; }

 private:
  struct Sums {
    std::vector<double> columns;
    std::vector<double> ground;  // coupling of each cluster to what is too thin to be listed
    double value = 0;            // of the dual, up to a constant
    double off = 0;              // share of the items off balance
    double outside = 0;          // share of the rows with too short lists
  };

  struct Part;

  template <class Rows>
  State Newton(const Rows& rows, double eps, double tolerance, double* prices);
  Sums Evaluate(const CandidateLists& lists, double eps, const double* prices);
  Sums Evaluate(const CostMatrix& matrix, double eps, const double* prices);
  template <class Body>
  Sums Sum(double mass, int64_t chunks, int64_t columns, double eps, const double* prices,
           const Body& body);
  void CollectEdges();
  void Couple(const std::vector<std::pair<int32_t, float>>& visible, double weight, float* ground);
  std::vector<double> Solve(const std::vector<double>& excess, const std::vector<double>& ground,
                            double rows);

  struct Edge {
    uint64_t key;  // the two clusters, the smaller one first
    int64_t units;
  };

  std::vector<double> share_;
  const BalancedKMeansOptions& options_;
  const KMeansKernels& kernels_;
  int64_t sweeps_ = 0;
  // Couplings in fixed point, in a table that threads fill together: the order does not matter.
  size_t slots_ = 4096;
  std::unique_ptr<std::atomic<uint64_t>[]> keys_;
  std::unique_ptr<std::atomic<int64_t>[]> values_;
  std::atomic<int64_t> used_{0};
  std::vector<Edge> edges_;  // the couplings of the last evaluation, by key
};

}  // namespace onerec
