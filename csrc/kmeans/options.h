// The constants of balanced k-means: README.md says what they were tuned on. None changes which
// labels are right, only how soon they are found.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onerec {

// Which way an assignment takes.
inline constexpr int64_t kMatrixEntries = 1 << 22;  // costs up to which all are kept, without lists
inline constexpr int64_t kSimplexRows = 1024;       // rows a center up to which the simplex pays
inline constexpr int64_t kChangedRows = 4096;       // sampled rows that tell if prices are far off
inline constexpr double kChanged = 0.23;     // share of them with another cluster: prices are far
inline constexpr double kNear = 0.08;        // share of items above size: prices are far
inline constexpr double kNearLabels = 0.16;  // the same bound where labels are given
inline constexpr int kRounds = 16;           // rounds of lists and simplex, at most
inline constexpr double kWorth = 0.9;        // fall of the share above size that is worth new lists

// Prices from a sample.
inline constexpr int64_t kSampleRows = 16;          // sampled rows a center
inline constexpr int64_t kSampleEntries = 1 << 22;  // costs of a sample, at least
inline constexpr double kWidestEps = 0.3;     // first eps, in the median of mean less smallest cost
inline constexpr double kCooling = 3;         // from one eps to the next
inline constexpr double kLastEps = 100;       // widest over last eps, on all rows
inline constexpr double kLastSampleEps = 20;  // widest over last eps, on a sample
inline constexpr double kLost = 0.15;         // share off balance at which a larger eps has to help
inline constexpr int64_t kNewtonEntries = 64;    // entries a row up to which a sample's lists pay
inline constexpr double kListReach = 20;         // width of a sample's lists in eps
inline constexpr int kNewtonSteps = 8;           // steps at one eps, at most
inline constexpr double kNewtonStep = 4;         // move of a price in a step, in eps, at most
inline constexpr double kNearlyBalanced = 0.02;  // share off balance where slow progress ends it
inline constexpr double kOutsideRows = 0.02;     // share of rows with too short lists that ends it

// Candidate lists.
inline constexpr int64_t kShortest = 6;          // entries of an average list, of few clusters
inline constexpr int64_t kLongest = 16;          // entries of an average list, of many clusters
inline constexpr int64_t kListShare = 10;        // clusters for each entry, between these two
inline constexpr int64_t kListSample = 1 << 19;  // costs from which the lists' width is read
inline constexpr double kMargin = 0.25;          // of a row's first look, in the lists' scale
inline constexpr int64_t kFewSuspects = 8;       // one suspect in so many clusters: one by one
inline constexpr size_t kAges = 250;             // times that rows are listed again, at most

// The simplex.
inline constexpr double kFirstPenalty = 0.02;      // of a wrong size, in the lists' scale
inline constexpr double kLastPenalty = 0.32;       // of a wrong size, at last
inline constexpr double kPivotGain = 1e-6;         // gain worth a pivot on lists, in their scale
inline constexpr int64_t kBlock = 512;             // rows that offer moves at a time, at least
inline constexpr int64_t kLargestBlock = 1 << 14;  // rows that offer moves at a time, at most
inline constexpr size_t kFewOffers = 256;  // offers of a block below which the next is larger
inline constexpr int kOfferRounds = 3;     // times that a block's offers are tried
inline constexpr double kStaleOffer =
    0.3;  // share of its gain that an offer may lose before its turn
inline constexpr size_t kGreedyOffers = 4;  // free clusters that an item looks at in a greedy round

// The paths.
inline constexpr int64_t kFirstWidth = 256;     // arcs of a node that are kept at first, at least
inline constexpr int64_t kFirstArcs = 1 << 20;  // arcs of all nodes that are kept at first
inline constexpr int64_t kTogether = 8;    // paths of a search for which all sources start at once
inline constexpr int64_t kMoveBytes = 24;  // of a list's entry that is a move
inline constexpr int kCenteringSweeps = 64;  // sweeps that move prices to the middle
inline constexpr double kCenteringReach =
    0.1;  // of the moves that these look at, in the lists' scale

}  // namespace onerec
