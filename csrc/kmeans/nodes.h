// Centres as the nodes of the transport problem.
#pragma once

#include <cstdint>
#include <vector>

#include "onerec/balanced_kmeans.h"

namespace onerec {

// Distinct centres, neighbours together; equal ones are one node that takes as many items as all of
// them.
struct Nodes {
  int64_t count = 0;
  std::vector<float> centers;         // [count, d]
  std::vector<int64_t> multiplicity;  // [count]
  std::vector<int32_t> first;         // [count] the smallest cluster of the node: ties go by it
  std::vector<int32_t> node_of;       // [clusters]
  std::vector<int32_t> group_offset;  // [groups + 1] nodes of each group of neighbours
};

Nodes MakeNodes(const float* centers, int64_t clusters, int64_t d,
                const BalancedKMeansOptions& options);

}  // namespace onerec
