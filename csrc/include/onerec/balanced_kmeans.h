// Balanced k-means: clusters of equal size, exactly, with a certificate of optimality.
//
// For fixed centres the cheapest assignment with given cluster sizes is a power diagram: item i
// goes to argmin_k |x_i - c_k|^2 + price_k (Aurenhammer, Hoffmann, Aronov, "Minkowski-type theorems
// and least-squares clustering"). K prices describe it, so that new items are encoded with the same
// rule. Nothing of size N x K is ever stored beyond the memory budget.
//
// Sizes: every cluster gets floor(N/K) or ceil(N/K) items, exactly N mod K of them ceil(N/K).
// Ties: the smaller cluster index, then the smaller item index. The same input and seed give the
// same output for every number of threads.
#pragma once

#include <cstdint>
#include <functional>

#include "onerec/export.h"

namespace onerec {

// Rows of float32, `stride` floats apart; the memory stays the caller's.
struct FloatRows {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;
};

enum class BalancedMethod {
  kPriced,      // exact assignment by prices
  kSequential,  // Algorithm 1 of OneRec (arXiv 2502.18965): clusters in turn take the nearest left
};

struct BalancedKMeansOptions {
  BalancedMethod method = BalancedMethod::kPriced;
  int max_iter = 10;        // Lloyd steps
  double tolerance = 1e-4;  // stop when a step lowers the inertia by less than this share of it
  uint64_t seed = 0;
  int num_threads = 1;
  // Number of the CUDA device that makes the passes over all items and all centres, -1 for none. It
  // holds a copy of x; what it leaves open is decided, and the sizes are made exact, on the host.
  int cuda_device = -1;
  // Bytes that the work may take beside the input and the outputs; a smaller budget means shorter
  // candidate lists and more passes over the data.
  int64_t memory_budget = int64_t{2} << 30;
  // Called on the calling thread between pieces of work; stops the work by throwing.
  std::function<void()> on_step;
  // Called after each Lloyd step of a fit: centers, prices and labels hold the state, from which,
  // with the steps and the inertia that this says, another fit goes on as this one would.
  std::function<void(int steps, double inertia)> on_iteration;
  int steps_done = 0;       // Lloyd steps behind the given centers, prices and labels
  double inertia_done = 0;  // inertia after them
};

struct BalancedAssignment {
  double cost = 0;            // sum of squared distances to the assigned centres, float64
  double dual = 0;            // lower bound on the cost of every assignment of these sizes, float64
  double gap = 0;             // (cost - dual) / cost; 0 when cost is 0
  int64_t moves = 0;          // augmenting paths of the exact finish
  int64_t passes = 0;         // passes over all items and all centres
  int64_t sweeps = 0;         // dual sweeps over candidate lists
  double pass_seconds = 0;    // time in passes over all items and all centres
  double price_seconds = 0;   // time in dual sweeps, the sample's included, and in the simplex
  double finish_seconds = 0;  // time in the exact finish
};

struct BalancedKMeansResult {
  double inertia = 0;  // sum of squared distances to the final centres
  double gap = 0;      // of the final assignment; NaN for kSequential
  int iterations = 0;
  bool converged = false;
  BalancedAssignment work;  // times and counts summed over all steps; cost and dual of the last
};

// Fits `clusters` centres. centers [clusters, columns] holds the starting centres if
// `centers_given`, else distinct rows of x are drawn with the seed; prices and labels are read if
// options.steps_done > 0. Writes centers, prices [clusters] (mean zero; all zero for kSequential)
// and labels [rows]. Throws std::invalid_argument for rows < clusters, empty shapes, NaN or
// infinity in x.
ONEREC_API BalancedKMeansResult BalancedKMeansFit(const FloatRows& x, int64_t clusters,
                                                  const BalancedKMeansOptions& options,
                                                  bool centers_given, float* centers,
                                                  double* prices, int32_t* labels);

// One exact balanced assignment at fixed centres [clusters, columns]. prices [clusters] is the
// start if `prices_given`, and the certified dual solution at the end. labels [rows], if
// `labels_given`, are those of a balanced assignment at centres nearby, which is where the search
// starts from; they say nothing without prices.
ONEREC_API BalancedAssignment BalancedAssign(const FloatRows& x, const float* centers,
                                             int64_t clusters, const BalancedKMeansOptions& options,
                                             bool prices_given, double* prices, int32_t* labels,
                                             bool labels_given = false);

// labels[i] = argmin_k |x_i - c_k|^2 + prices[k], decided in float64; prices may be null (zero).
// distances [rows], if not null, gets the squared distance to the chosen centre.
ONEREC_API void PricedArgmin(const FloatRows& x, const float* centers, int64_t clusters,
                             const double* prices, const BalancedKMeansOptions& options,
                             int32_t* labels, double* distances);

// Cheapest assignment in which no cluster takes more than `cap` items of a group: minimises
// |x_i - c_k|^2 + prices[k] for each group on its own. groups [rows] numbers the groups from 0, in
// any order. Throws std::invalid_argument if a group has more than cap * clusters items.
ONEREC_API void CappedAssign(const FloatRows& x, const float* centers, int64_t clusters,
                             const double* prices, const int64_t* groups, int64_t cap,
                             const BalancedKMeansOptions& options, int32_t* labels);

// Cheapest assignment in which cluster k takes at most room[k] items: minimises |x_i - c_k|^2 +
// prices[k]. prices may be null (zero). Throws std::invalid_argument if a room is negative or there
// is less room than rows.
ONEREC_API void AssignWithin(const FloatRows& x, const float* centers, int64_t clusters,
                             const double* prices, const int64_t* room,
                             const BalancedKMeansOptions& options, int32_t* labels);

}  // namespace onerec
