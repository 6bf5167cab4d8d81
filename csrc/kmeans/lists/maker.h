// The candidate lists of an assignment: for every item the clusters that may become its own, made
// by passes over all centres and kept up as prices move.
#pragma once

#include <cstdint>
#include <vector>

#include "kmeans/lists/candidates.h"
#include "kmeans/nodes.h"
#include "kmeans/tiles/pass.h"
#include "kmeans/transport/annealer.h"
#include "kmeans/transport/simplex.h"

namespace onerec {

class ListMaker {
 public:
  // Adds its passes and their time to `report`; `centers` are the nodes', packed, as are those of
  // `pass`.
  ListMaker(const FloatRows& x, const std::vector<double>& mean, const Nodes& nodes,
            const BalancedKMeansOptions& options, const KMeansKernels& kernels,
            PackedCenters& centers, CandidatePass& pass, BalancedAssignment& report)
      : x_(x),
        mean_(mean),
        nodes_(nodes),
        options_(options),
        kernels_(kernels),
        centers_(centers),
        pass_(pass),
        report_(report) {}

  // One pass over everything: candidate lists of kShortest to kLongest entries on average, and as
  // many leaders of groups, or what half of the budget has room for. Lists also each row's label,
  // if they are not null, and what `basis` needs, if it is not null; returns the number of rows
  // that some cluster suits better than what the basis says.
  int64_t Build(const double* prices, const int32_t* labels = nullptr,
                const ListSimplex* basis = nullptr);
  // Prices of a few centres have fallen so far that lists miss them: looks at these centres alone,
  // and adds them where they belong. False if they are not few, or if a device, which makes all
  // lists again as fast, makes the passes.
  bool Extend(const double* prices);
  // Lists each row's label, as Build does.
  void AddLabels(const int32_t* labels);
  // Looks at the rows whose lists are too short to tell that the basis is the best: adds what they
  // miss, or lists them again. Returns the number of rows that some cluster suits better than what
  // the basis says.
  int64_t ListAgain(const double* prices, const ListSimplex& basis);

  const CandidateLists& lists() const { return lists_; }

 private:
  struct Entry {
    int64_t item;
    int32_t code;
    float rel;
  };
  struct Missed {
    std::vector<Entry> entries;  // to be added to the lists
    int64_t open = 0;            // rows that one of them suits better than what the basis says
    std::vector<int64_t> rows;   // to be listed again
  };

  bool ListRow(CandidateLists::Chunk& chunk, int64_t item, Candidates& row, const double* prices,
               const int32_t* labels, const ListSimplex* basis);
  bool Open(int64_t item, const Candidates& row, const double* prices,
            const ListSimplex& basis) const;
  Missed Miss(int64_t number, const MovedLists& now, const double* prices,
              const ListSimplex& basis) const;
  static size_t Place(const CandidateLists::Chunk& chunk, size_t row, int32_t cluster);
  void Replace(CandidateLists::Chunk& chunk, int64_t first, const std::vector<int64_t>& rows,
               const std::vector<CandidateLists::Chunk>& listed, int64_t listed_rows, uint8_t age,
               const std::vector<Entry>& entries, const ListSimplex& basis);

  const FloatRows& x_;
  const std::vector<double>& mean_;
  const Nodes& nodes_;
  const BalancedKMeansOptions& options_;
  const KMeansKernels& kernels_;
  PackedCenters& centers_;
  CandidatePass& pass_;
  BalancedAssignment& report_;
  CandidateLists lists_;
};

}  // namespace onerec
