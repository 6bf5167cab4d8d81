// The CUDA beam step against the CPU's, which is held to brute force.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "onerec/beam_search.h"
#include "tests/random_sids.h"

namespace onerec {
namespace {

constexpr Scoring kScorings[] = {Scoring::kFullSoftmax, Scoring::kLegalSoftmax, Scoring::kRaw};

struct Beams {
  Beams(int64_t batch, int64_t width)
      : parents(batch * width, -7),
        tokens(parents),
        nodes(parents),
        scores(parents.size(), std::nan("")),
        valid(batch, -7),
        view{width, parents.data(), tokens.data(), nodes.data(), scores.data(), valid.data()} {}
  std::vector<int64_t> parents, tokens, nodes;
  std::vector<double> scores;
  std::vector<int32_t> valid;
  BeamStepOutput view;
};

// Runs both; the same beams are wanted, and scores that differ by rounding alone.
Beams Step(const Trie& trie, const BeamStepInput& input, Scoring scoring, double temperature,
           int64_t width) {
  Beams host(input.batch, width), device(input.batch, width);
  BeamWorkspace workspace;
  BeamStep(trie.View(), input, scoring, temperature, host.view, workspace, 1);
  std::vector<uint64_t> addresses(1 + trie.View().levels);
  addresses[0] = reinterpret_cast<uint64_t>(trie.Data());
  addresses.back() = reinterpret_cast<uint64_t>(input.leaf_tags);
  addresses[1 + input.level] = reinterpret_cast<uint64_t>(input.tags);
  std::vector<char> memory(CudaBeamStepBytes(input.batch, input.rows, input.items), '\xFF');
  CudaBeamStep(addresses.data(), trie.View().codebook_size, input, scoring, temperature,
               device.view, memory.data(), nullptr);
  EXPECT_EQ(device.valid, host.valid);
  EXPECT_EQ(device.parents, host.parents);
  EXPECT_EQ(device.tokens, host.tokens);
  EXPECT_EQ(device.nodes, host.nodes);
  for (size_t i = 0; i < host.scores.size(); ++i) {
    if (std::isinf(host.scores[i])) {
      EXPECT_EQ(device.scores[i], host.scores[i]);
    } else {
      EXPECT_NEAR(device.scores[i], host.scores[i], 2e-6 * (1 + std::abs(host.scores[i])));
    }
  }
  return device;
}

std::vector<float> RandomLogits(size_t count, std::mt19937& draw) {
  const float unusual[] = {-std::numeric_limits<float>::infinity(), std::nanf(""),
                           std::numeric_limits<float>::infinity()};
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(count);
  for (float& x : logits) x = draw() % 60 == 0 ? unusual[draw() % 3] : normal(draw);
  return logits;
}

// A random setting, all levels of a trie.
void Play(uint32_t seed, Scoring scoring) {
  std::mt19937 draw(seed);
  const auto choose = [&](std::vector<int64_t> from) { return from[draw() % from.size()]; };
  const int size = static_cast<int>(choose({1, 3, 6, 300}));
  const int levels = 1 + static_cast<int>(draw() % 4);
  const auto plain = BuildTrie(RandomSids(1 + draw() % 900, levels, size, seed), levels, size);
  const TrieView& view = plain->View();
  std::vector<uint64_t> leaf_tags;
  for (int64_t leaf = 0; leaf < view.Leaves(); ++leaf) leaf_tags.push_back(draw() % 8);
  const auto trie = plain->WithTags(leaf_tags.data());
  const int64_t batch = 3, width = choose({1, 7, 33}), rows = choose({0, 1, 6, 20});
  const bool filters = draw() % 2 == 0, tagged = draw() % 2 == 0;
  const int64_t items = static_cast<int64_t>(draw() % 3);
  const int64_t path_size = (items + 1) * levels;

  std::vector<std::vector<int64_t>> dead_leaves(batch);
  for (auto& dead : dead_leaves) {
    const uint32_t share = draw() % 4;
    for (int64_t leaf = 0; leaf < view.Leaves(); ++leaf) {
      if (draw() % 4 < share) dead.push_back(leaf);
    }
  }
  for (int level = 0; level < levels; ++level) {
    // Edges of the level, then leaves, of each request.
    std::vector<int64_t> dead, dead_offsets = {0}, leaf_offsets;
    for (const auto& leaves : dead_leaves) {
      for (int64_t edge = 0; edge < view.nodes[level + 1]; ++edge) {
        const auto begin =
            std::lower_bound(leaves.begin(), leaves.end(), view.FirstLeaf(level + 1, edge));
        const int64_t end = view.FirstLeaf(level + 1, edge + 1);
        const auto count = std::lower_bound(begin, leaves.end(), end) - begin;
        if (count == end - view.FirstLeaf(level + 1, edge)) dead.push_back(edge);
      }
      dead_offsets.push_back(static_cast<int64_t>(dead.size()));
    }
    for (const auto& leaves : dead_leaves) {
      leaf_offsets.push_back(static_cast<int64_t>(dead.size()));
      dead.insert(dead.end(), leaves.begin(), leaves.end());
    }
    leaf_offsets.push_back(static_cast<int64_t>(dead.size()));
    std::vector<uint64_t> allow;
    std::vector<int64_t> nodes, paths, widths;
    std::vector<double> scores;
    for (int64_t b = 0; b < batch; ++b) {
      allow.push_back(draw() % 3 == 0 ? kEveryTag : draw() % 8);
      widths.push_back(b == 1 ? 0 : 1 + static_cast<int64_t>(draw() % width));
      for (int64_t r = 0; r < rows; ++r) {
        nodes.push_back(draw() % 8 == 0 ? -1
                                        : static_cast<int64_t>(
                                              draw() % static_cast<uint64_t>(view.nodes[level])));
        scores.push_back(-static_cast<double>(draw() % 1000) / 100);
        for (int64_t i = 0; i <= items; ++i) {
          int64_t edge = static_cast<int64_t>(draw() % static_cast<uint64_t>(view.Leaves()));
          paths.resize(paths.size() + levels);
          for (int l = levels - 1; l >= 0; --l) {
            paths[paths.size() - (levels - l)] = edge;
            edge = view.NodeOf(l, edge);
          }
        }
        if (level > 0 && draw() % 2 == 0) {  // the beam is about to repeat its first item
          nodes.back() = paths[paths.size() - (path_size - level + 1)];
        }
      }
    }
    BeamStepInput input;
    const int64_t stride = size + 3;
    const std::vector<float> logits = RandomLogits(batch * (rows + 1) * stride, draw);
    input.batch = batch;
    input.rows = rows;
    input.level = level;
    input.logits = {logits.data(), LogitType::kFloat32, (rows + 1) * stride, stride};
    input.scores = scores.data();
    input.nodes = nodes.data();
    if (filters) input.widths = widths.data();
    if (filters) input.dead = dead.data();
    if (filters) input.dead_offsets = dead_offsets.data();
    if (filters) input.leaf_offsets = leaf_offsets.data();
    if (tagged) input.tags = trie->Tags(level);
    if (tagged) input.allow = allow.data();
    if (tagged) input.leaf_tags = trie->Tags(levels - 1);
    if (items > 0) input.paths = paths.data();
    input.path_size = path_size;
    input.items = items;
    Step(*trie, input, scoring, draw() % 2 == 0 ? 1.0 : 0.4, width);
  }
}

TEST(CudaBeamStep, IsTheHosts) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Play(seed, kScorings[seed % 3]);
    if (testing::Test::HasFailure()) return;
  }
}

// More candidates than are sorted at once and more than have their keys kept, in whole numbers, so
// that thousands are equal; logits of every type.
TEST(CudaBeamStep, TakesTiesInTheirOrder) {
  constexpr int64_t kRows = 33, kSize = 700, kBatch = 2;
  std::vector<int32_t> sids(kSize);
  for (int32_t i = 0; i < kSize; ++i) sids[i] = i;
  const auto trie = BuildTrie(sids, 1, kSize);
  std::mt19937 draw(0);
  std::vector<float> single;
  std::vector<uint16_t> half, brain;
  for (int64_t i = 0; i < kBatch * kRows * kSize; ++i) {
    const uint32_t which = draw() % 4;  // -2, -1, 0, 1
    single.push_back(static_cast<float>(which) - 2);
    half.push_back(std::vector<uint16_t>{0xC000, 0xBC00, 0, 0x3C00}[which]);
    brain.push_back(std::vector<uint16_t>{0xC000, 0xBF80, 0, 0x3F80}[which]);
  }
  std::vector<double> scores(kBatch * kRows);
  for (double& score : scores) score = static_cast<double>(draw() % 2);
  const std::vector<int64_t> nodes(kBatch * kRows);
  BeamStepInput input;
  input.batch = kBatch;
  input.rows = kRows;
  input.scores = scores.data();
  input.nodes = nodes.data();
  for (const void* data :
       {static_cast<const void*>(single.data()), static_cast<const void*>(half.data()),
        static_cast<const void*>(brain.data())}) {
    const LogitType types[] = {LogitType::kFloat32, LogitType::kFloat16, LogitType::kBFloat16};
    const LogitType type = types[data == half.data() ? 1 : data == brain.data() ? 2 : 0];
    input.logits = {data, type, kRows * kSize, kSize};
    for (const int64_t width : {1, 600, 4000}) Step(*trie, input, Scoring::kRaw, 1, width);
  }
}

TEST(CudaBeamStep, ReadsTheTrieWhenItRuns) {
  const auto first = BuildTrie({1, 2, 3}, 1, 8), second = BuildTrie({5}, 1, 8);
  const std::vector<float> logits(8);
  const double score = 0;
  const int64_t node = 0;
  BeamStepInput input;
  input.batch = input.rows = 1;
  input.logits = {logits.data(), LogitType::kFloat32, 8, 8};
  input.scores = &score;
  input.nodes = &node;
  EXPECT_EQ(Step(*first, input, Scoring::kRaw, 1, 3).tokens, (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(Step(*second, input, Scoring::kRaw, 1, 3).tokens, (std::vector<int64_t>{5, -1, -1}));
}

}  // namespace
}  // namespace onerec
