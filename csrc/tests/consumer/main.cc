// Item vectors -> balanced semantic ids -> trie -> the best sessions of a model, all from C++.
#include <onerec/balanced_kmeans.h>
#include <onerec/beam_search.h>
#include <onerec/runtime.h>
#include <onerec/trie.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

namespace {

constexpr int64_t kItems = 1003;
constexpr int64_t kDim = 16;
constexpr int kLevels = 3;
constexpr int kCodes = 16;
constexpr int64_t kBeams = 5;
constexpr int64_t kSession = 2;
constexpr int kThreads = 2;

void Check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// Residual quantisation: each level clusters what the levels before left over.
std::vector<int32_t> SemanticIds(std::vector<float> residual) {
  std::vector<int32_t> sids(kItems * kLevels);
  for (int level = 0; level < kLevels; ++level) {
    std::vector<float> centers(kCodes * kDim);
    std::vector<double> prices(kCodes);
    std::vector<int32_t> labels(kItems);
    onerec::BalancedKMeansOptions options;
    options.num_threads = kThreads;
    const onerec::BalancedKMeansResult fit = onerec::BalancedKMeansFit(
        {residual.data(), kItems, kDim, kDim}, kCodes, options, /*centers_given=*/false,
        centers.data(), prices.data(), labels.data());
    std::printf("level %d: inertia %.1f, at most %.2g %% from the best assignment\n", level,
                fit.inertia, 100 * fit.gap);
    std::vector<int64_t> sizes(kCodes);
    for (int64_t i = 0; i < kItems; ++i) {
      ++sizes[labels[i]];
      sids[i * kLevels + level] = labels[i];
      for (int64_t d = 0; d < kDim; ++d) residual[i * kDim + d] -= centers[labels[i] * kDim + d];
    }
    for (int64_t size : sizes) {
      Check(size == kItems / kCodes || size == kItems / kCodes + 1, "cluster sizes");
    }
  }
  return sids;
}

// Stands for a model: the same numbers for the same codes so far.
void Logits(uint64_t path, float* row) {
  std::mt19937_64 draw(path);
  std::normal_distribution<float> normal;
  for (int code = 0; code < kCodes; ++code) row[code] = normal(draw);
}

uint64_t Extend(uint64_t path, int64_t code) { return path * 31 + static_cast<uint64_t>(code) + 1; }

// Score of one item's codes after `path`, which moves on.
double Score(const int32_t* codes, uint64_t& path) {
  double score = 0;
  for (int level = 0; level < kLevels; ++level) {
    float row[kCodes];
    Logits(path, row);
    double sum = 0;
    for (float x : row) sum += std::exp(static_cast<double>(x));
    score += row[codes[level]] - std::log(sum);
    path = Extend(path, codes[level]);
  }
  return score;
}

}  // namespace

int main() {
  std::printf("onerec %s on %s\n", onerec::Version(), onerec::IsaName(onerec::CurrentIsa()));

  std::mt19937 draw(0);
  std::normal_distribution<float> normal;
  std::vector<float> vectors(kItems * kDim);
  for (float& x : vectors) x = normal(draw);
  const std::vector<int32_t> sids = SemanticIds(vectors);

  const auto trie = onerec::Trie::Build(sids.data(), kItems, kLevels, kLevels, kCodes);
  const int64_t leaves = trie->View().Leaves();
  std::vector<int64_t> leaf_of_item(kItems);
  trie->Lookup(sids.data(), kItems, kLevels, kLevels, leaf_of_item.data(), kThreads);
  Check(*std::min_element(leaf_of_item.begin(), leaf_of_item.end()) == 0, "lookup");
  Check(*std::max_element(leaf_of_item.begin(), leaf_of_item.end()) == leaves - 1, "lookup");
  std::printf("%lld distinct ids in %zu bytes\n", static_cast<long long>(leaves), trie->Bytes());

  onerec::BeamSearchOptions options;
  options.width = kBeams;
  options.items = kSession;
  options.num_threads = kThreads;
  onerec::BeamSearch search(trie, options);
  const std::vector<int64_t> denied = {0, leaves - 1};
  const std::vector<int64_t> offsets = {0, 2};
  onerec::BeamRequests requests;
  requests.deny = denied.data();
  requests.deny_offsets = offsets.data();
  search.Reset(requests);
  std::vector<uint64_t> paths(kBeams, 1);
  std::vector<float> logits(kBeams * kCodes);
  for (int64_t rows = 1; !search.Done(); rows = kBeams) {
    for (int64_t beam = 0; beam < rows; ++beam) Logits(paths[beam], &logits[beam * kCodes]);
    search.Step({logits.data(), onerec::LogitType::kFloat32, kBeams * kCodes, kCodes}, rows);
    std::vector<uint64_t> next(kBeams);
    for (int64_t beam = 0; beam < search.Valid()[0]; ++beam) {
      next[beam] = Extend(paths[search.Parents()[beam]], search.Tokens()[beam]);
    }
    paths = next;
  }
  std::vector<int64_t> items(kBeams * kSession);
  search.Items(items.data());
  Check(search.Valid()[0] == kBeams, "live beams");

  std::set<std::vector<int64_t>> sessions;
  double before = std::numeric_limits<double>::infinity();
  for (int64_t beam = 0; beam < kBeams; ++beam) {
    const std::vector<int64_t> session(&items[beam * kSession], &items[(beam + 1) * kSession]);
    Check(std::set<int64_t>(session.begin(), session.end()).size() == kSession, "no item twice");
    std::vector<int32_t> codes(kSession * kLevels);
    trie->LeafSids(session.data(), kSession, codes.data());  // throws for what is no leaf
    uint64_t path = 1;
    double score = 0;
    for (int64_t i = 0; i < kSession; ++i) {
      Check(session[i] != denied[0] && session[i] != denied[1], "denied items");
      score += Score(&codes[i * kLevels], path);
    }
    Check(std::abs(score - search.Scores()[beam]) < 1e-4, "scores");
    Check(search.Scores()[beam] <= before, "best first");
    before = search.Scores()[beam];
    sessions.insert(session);
    std::printf("session %lld %lld: %.3f\n", static_cast<long long>(session[0]),
                static_cast<long long>(session[1]), score);
  }
  Check(sessions.size() == kBeams, "distinct sessions");

  try {
    onerec::Trie::Build(sids.data(), kItems, kLevels, kLevels, 0);
    Check(false, "an invalid argument is refused");
  } catch (const std::invalid_argument& error) {
    std::printf("refused: %s\n", error.what());
  }
  return 0;
}
