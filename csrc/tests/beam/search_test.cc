#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "onerec/beam_search.h"
#include "onerec/runtime.h"
#include "tests/count_allocations.h"
#include "tests/random_sids.h"

namespace onerec {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr Scoring kScorings[] = {Scoring::kFullSoftmax, Scoring::kLegalSoftmax, Scoring::kRaw};

std::vector<Isa> Isas() {
  std::vector<Isa> isas;
  for (Isa isa : kIsas) {
    if (IsaAvailable(isa) && isa <= Isa::kAvx512) isas.push_back(isa);
  }
  return isas;
}

// Runs body once for each instruction set.
template <class Body>
void ForEachIsa(Body body) {
  const Isa before = CurrentIsa();
  for (Isa isa : Isas()) {
    SCOPED_TRACE(IsaName(isa));
    SetIsa(isa);
    body();
  }
  SetIsa(before);
}

double LogSumExp(const std::vector<double>& values) {
  double top = kNothing, sum = 0;
  for (double x : values) top = std::max(top, x);
  if (top == kNothing) return 0;
  for (double x : values) sum += std::exp(x - top);
  return top + std::log(sum);
}

// One request's beams as lists of codes; every continuation is listed and sorted. Shares nothing
// with the search but the order of leaves.
struct BruteForce {
  struct Beam {
    double score = 0;
    std::vector<int32_t> codes;
  };
  struct Choice {
    double score;
    int64_t parent, token;
  };

  bool Legal(const std::vector<int32_t>& codes, int32_t code) const {
    const size_t start = codes.size() / levels * levels;
    for (const Sid& sid : sids) {
      if (!std::equal(codes.begin() + static_cast<int64_t>(start), codes.end(), sid.begin()) ||
          sid[codes.size() - start] != code || banned.count(sid) > 0) {
        continue;
      }
      bool own = false;
      for (size_t i = 0; i < start; i += levels) {
        own |= std::equal(sid.begin(), sid.end(), codes.begin() + static_cast<int64_t>(i));
      }
      if (!own) return true;
    }
    return false;
  }

  std::vector<Choice> Step(const float* logits, int64_t row_stride, size_t width) {
    std::vector<Choice> found;
    for (size_t r = 0; r < beams.size(); ++r) {
      std::vector<double> row, legal;
      for (int32_t code = 0; code < codebook_size; ++code) {
        const double x = logits[static_cast<int64_t>(r) * row_stride + code];
        row.push_back(std::isnan(x)
                          ? kNothing
                          : std::min<double>(x, std::numeric_limits<float>::max()) / temperature);
        if (Legal(beams[r].codes, code)) legal.push_back(row.back());
      }
      double norm = 0;
      if (scoring == Scoring::kFullSoftmax) norm = LogSumExp(row);
      if (scoring == Scoring::kLegalSoftmax) norm = LogSumExp(legal);
      for (int32_t code = 0; code < codebook_size; ++code) {
        const double x = row[code];
        if (x == kNothing || !Legal(beams[r].codes, code)) continue;
        found.push_back({beams[r].score + (x - norm), static_cast<int64_t>(r), code});
      }
    }
    std::sort(found.begin(), found.end(), [](const Choice& a, const Choice& b) {
      return std::make_tuple(-a.score, a.parent, a.token) <
             std::make_tuple(-b.score, b.parent, b.token);
    });
    if (found.size() > width) found.resize(width);
    std::vector<Beam> next;
    for (const Choice& c : found) {
      next.push_back({c.score, beams[c.parent].codes});
      next.back().codes.push_back(static_cast<int32_t>(c.token));
    }
    beams = next;
    return found;
  }

  std::vector<Sid> sids;
  size_t levels;
  int codebook_size;
  Scoring scoring;
  double temperature;
  std::set<Sid> banned;
  std::vector<Beam> beams = std::vector<Beam>(1);
};

// A random setting, played by the search and by brute force.
void PlayAgainstBruteForce(uint32_t seed, Scoring scoring) {
  std::mt19937 draw(seed);
  const auto choose = [&](std::vector<int64_t> from) { return from[draw() % from.size()]; };
  const int size = static_cast<int>(choose({1, 3, 17, 40}));
  const int levels = 1 + static_cast<int>(draw() % 4);
  const auto codes = RandomSids(1 + draw() % 80, levels, size, seed);
  const auto plain = BuildTrie(codes, levels, size);
  const auto distinct = Distinct(codes, levels);
  BeamSearchOptions options;
  options.batch = 3;
  options.width = choose({1, 7, 33});
  options.items = 2;
  options.scoring = scoring;
  options.temperature = draw() % 2 == 0 ? 1.0 : 0.4;
  options.num_threads = 1 + static_cast<int>(draw() % 3);

  // Tags and removed leaves, of the trie.
  std::vector<uint64_t> tags;
  std::vector<int64_t> removed;
  const uint32_t gone = draw() % 3;  // none to half
  for (size_t leaf = 0; leaf < distinct.size(); ++leaf) {
    tags.push_back(draw() % 8);
    if (draw() % 4 < gone) removed.push_back(static_cast<int64_t>(leaf));
  }
  const auto trie =
      plain->WithTags(tags.data())->Without(removed.data(), static_cast<int64_t>(removed.size()));

  std::vector<BruteForce> expected;
  std::vector<int64_t> deny, offsets = {0}, widths;
  std::vector<uint64_t> allow;
  for (int64_t i = draw() % (levels * 2 + 1); i > 0; --i) {
    options.ramp.push_back(1 + static_cast<int64_t>(draw() % options.width));
  }
  for (int64_t b = 0; b < options.batch; ++b) {
    expected.push_back(
        {distinct, static_cast<size_t>(levels), size, scoring, options.temperature, {}});
    const uint32_t share = draw() % 4;  // none to three quarters
    allow.push_back(draw() % 2 == 0 ? kEveryTag : draw() % 8);
    widths.push_back(b == 1 ? 0 : 1 + static_cast<int64_t>(draw() % options.width));
    if (widths.back() == 0) expected.back().beams.clear();
    for (size_t leaf = 0; leaf < distinct.size(); ++leaf) {
      const bool denied = draw() % 4 < share;
      if (denied) deny.push_back(static_cast<int64_t>(leaf));
      if (denied || std::binary_search(removed.begin(), removed.end(), leaf) ||
          ((tags[leaf] | kEveryTag) & allow.back()) == 0) {
        expected.back().banned.insert(distinct[leaf]);
      }
    }
    offsets.push_back(static_cast<int64_t>(deny.size()));
  }
  BeamSearch search(plain, options);
  search.Reset({deny.data(), offsets.data(), allow.data(), widths.data()}, trie);

  const int64_t row = size + 3;  // strided
  std::vector<float> logits(options.batch * options.width * row);
  std::normal_distribution<float> normal(0, 2);
  const bool sparse = scoring != Scoring::kFullSoftmax && draw() % 2 == 0;
  while (!search.Done()) {
    for (float& x : logits) {
      const float unusual[] = {-std::numeric_limits<float>::infinity(), std::nanf(""),
                               std::numeric_limits<float>::infinity()};
      x = draw() % 30 == 0 ? unusual[draw() % 3] : normal(draw);
    }
    const size_t step = search.Steps();
    const int64_t most = step < options.ramp.size() ? options.ramp[step] : options.width;
    const int64_t rows = search.Rows();
    if (sparse) {
      const LegalCodes& legal = search.Legal();
      std::vector<float> values;
      for (int64_t beam = 0; beam < options.batch * options.width; ++beam) {
        for (int64_t i = legal.offsets[beam]; i < legal.offsets[beam + 1]; ++i) {
          values.push_back(logits[beam * row + legal.codes[i]]);
        }
      }
      search.StepLegal(values.data(), static_cast<int64_t>(values.size()));
    } else {
      search.Step({logits.data(), LogitType::kFloat32, options.width * row, row}, rows);
    }
    for (int64_t b = 0; b < options.batch; ++b) {
      const auto choices =
          expected[b].Step(&logits[b * options.width * row], row, std::min(most, widths[b]));
      ASSERT_EQ(search.Valid()[b], static_cast<int32_t>(choices.size()));
      for (int64_t i = 0; i < options.width; ++i) {
        const int64_t at = b * options.width + i;
        if (i < static_cast<int64_t>(choices.size())) {
          const auto& choice = choices[i];
          ASSERT_EQ(search.Parents()[at], choice.parent);
          ASSERT_EQ(search.Tokens()[at], choice.token);
          ASSERT_NEAR(search.Scores()[at], choice.score, 1e-5);
        } else {
          ASSERT_EQ(search.Parents()[at], 0);
          ASSERT_EQ(search.Tokens()[at], -1);
          ASSERT_EQ(search.Scores()[at], kNothing);
        }
      }
    }
  }
  std::vector<int32_t> sids(options.batch * options.width * 2 * levels);
  std::vector<int64_t> items(options.batch * options.width * 2);
  search.Sids(sids.data());
  search.Items(items.data());
  for (int64_t beam = 0; beam < options.batch * options.width; ++beam) {
    const auto& beams = expected[beam / options.width].beams;
    const size_t i = beam % options.width;
    for (int64_t item = 0; item < 2; ++item) {
      const int64_t* leaf = &items[beam * 2 + item];
      const int32_t* got = &sids[(beam * 2 + item) * levels];
      Sid want(levels, -1);
      if (i < beams.size()) {
        const auto at = beams[i].codes.begin() + item * levels;
        want.assign(at, at + levels);
        ASSERT_EQ(distinct[*leaf], want);
      } else {
        ASSERT_EQ(*leaf, -1);
      }
      ASSERT_EQ(Sid(got, got + levels), want);
    }
  }
}

TEST(BeamSearch, EqualsBruteForce) {
  ForEachIsa([] {
    for (Scoring scoring : kScorings) {
      for (uint32_t seed = 0; seed < 15; ++seed) {
        SCOPED_TRACE(testing::Message()
                     << "scoring " << static_cast<int>(scoring) << " seed " << seed);
        ASSERT_NO_FATAL_FAILURE(PlayAgainstBruteForce(seed, scoring));
      }
    }
  });
}

uint16_t ToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

TEST(BeamSearch, EveryInstructionSetAndThreadCountGivesTheSameBits) {
  constexpr int kSize = 2500;
  constexpr int64_t kWidth = 40, kBatch = 2;
  const auto trie = BuildTrie(RandomSids(20000, 3, kSize, 0), 3, kSize);
  std::mt19937 draw(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(kBatch * kWidth * kSize);
  std::vector<uint16_t> half(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) half[i] = ToBFloat16(logits[i] = normal(draw));
  std::vector<int64_t> deny;
  for (int64_t leaf = 0; leaf < trie->View().Leaves(); leaf += 7) deny.push_back(leaf);
  const auto count = static_cast<int64_t>(deny.size());
  const int64_t offsets[] = {0, count, count};
  for (LogitType type : {LogitType::kFloat32, LogitType::kBFloat16, LogitType::kFloat16}) {
    for (Scoring scoring : kScorings) {
      std::map<int, std::vector<double>> scores;
      std::map<int, std::vector<int32_t>> sids;
      int run = 0;
      ForEachIsa([&] {
        for (int threads : {1, 3}) {
          BeamSearchOptions options;
          options.batch = kBatch;
          options.width = kWidth;
          options.items = 2;
          options.scoring = scoring;
          options.num_threads = threads;
          BeamSearch search(trie, options);
          search.Reset({deny.data(), offsets});
          const void* data =
              type == LogitType::kFloat32 ? static_cast<const void*>(logits.data()) : half.data();
          while (!search.Done()) search.Step({data, type, kWidth * kSize, kSize}, kWidth);
          scores[run].assign(search.Scores(), search.Scores() + kBatch * kWidth);
          sids[run].resize(kBatch * kWidth * 2 * 3);
          search.Sids(sids[run].data());
          EXPECT_EQ(scores[run], scores[0]);
          EXPECT_EQ(sids[run], sids[0]);
          ++run;
        }
      });
    }
  }
}

TEST(BeamSearch, StepsAllocateNothing) {
  if (!CanCountAllocations()) {
    GTEST_SKIP() << "a sanitizer's allocator counts; build with ONEREC_SANITIZE";
  }
  constexpr int kSize = 64;
  const auto trie = BuildTrie(RandomSids(3000, 3, kSize, 0), 3, kSize);
  BeamSearchOptions options;
  options.batch = 3;
  options.width = 20;
  options.items = 3;
  options.num_threads = 2;
  std::vector<float> logits(options.batch * options.width * kSize);
  std::mt19937 draw(1);
  std::normal_distribution<float> normal;
  for (float& x : logits) x = normal(draw);
  std::vector<int64_t> deny;
  for (int64_t leaf = 0; leaf < trie->View().Leaves(); leaf += 3) deny.push_back(leaf);
  const auto count = static_cast<int64_t>(deny.size());
  const int64_t offsets[] = {0, count, count, count};
  const Logits given = {logits.data(), LogitType::kFloat32, options.width * kSize, kSize};
  for (Scoring scoring : kScorings) {
    options.scoring = scoring;
    BeamSearch search(trie, options);
    search.Reset({deny.data(), offsets});
    const int64_t allocations = CountAllocations(options.num_threads, [&] {
      while (!search.Done()) search.Step(given, options.width);
    });
    EXPECT_EQ(allocations, 0);
  }
}

TEST(BeamSearch, TiesGoByParentThenCode) {
  std::vector<int32_t> codes;
  for (int32_t a = 0; a < 4; ++a) {
    for (int32_t b = 0; b < 4; ++b) codes.insert(codes.end(), {a, b});
  }
  const auto trie = BuildTrie(codes, 2, 4);
  ForEachIsa([&] {
    BeamSearchOptions options;
    options.width = 6;
    BeamSearch search(trie, options);
    const std::vector<float> zeros(6 * 4);
    for (int step = 0; step < 2; ++step) {
      search.Step({zeros.data(), LogitType::kFloat32, 0, 4}, 6);
    }
    EXPECT_EQ(std::vector<int64_t>(search.Parents(), search.Parents() + 6),
              (std::vector<int64_t>{0, 0, 0, 0, 1, 1}));
    EXPECT_EQ(std::vector<int64_t>(search.Tokens(), search.Tokens() + 6),
              (std::vector<int64_t>{0, 1, 2, 3, 0, 1}));
  });
}

TEST(BeamSearch, EmptyTrieAndEmptyBatch) {
  const float logits[8] = {};
  BeamSearchOptions options;
  options.width = 2;
  BeamSearch none(BuildTrie({}, 2, 4), options);
  none.Step({logits, LogitType::kFloat32, 8, 4}, 2);
  EXPECT_EQ(none.Valid()[0], 0);
  none.Step({logits, LogitType::kFloat32, 8, 4}, 2);
  EXPECT_EQ(none.Valid()[0], 0);
  options.batch = 0;
  BeamSearch nobody(BuildTrie({0, 1}, 2, 4), options);
  nobody.Step({logits, LogitType::kFloat32, 8, 4}, 2);
  EXPECT_EQ(nobody.Steps(), 1);
}

TEST(BeamSearch, RefusesBadArguments) {
  const auto trie = BuildTrie({0, 1, 2, 3}, 2, 4);
  const auto refuses = [&](void (*change)(BeamSearchOptions&)) {
    BeamSearchOptions options;
    change(options);
    EXPECT_THROW(BeamSearch(trie, options), std::invalid_argument);
  };
  refuses([](BeamSearchOptions& o) { o.batch = -1; });
  refuses([](BeamSearchOptions& o) { o.width = 0; });
  refuses([](BeamSearchOptions& o) { o.items = 0; });
  refuses([](BeamSearchOptions& o) { o.ramp = {2}; });
  refuses([](BeamSearchOptions& o) { o.temperature = 0; });
  refuses([](BeamSearchOptions& o) { o.temperature = std::nan(""); });
  BeamSearchOptions options;
  options.width = 3;
  BeamSearch search(trie, options);
  for (const std::vector<int64_t>& deny : {std::vector<int64_t>{-1, 0}, {1, 2}, {1, 1}, {1, 0}}) {
    const int64_t offsets[] = {0, 2};
    EXPECT_THROW(search.Reset({deny.data(), offsets}), std::invalid_argument);
  }
  const uint64_t allow = 1;
  EXPECT_THROW(search.Reset({nullptr, nullptr, &allow}), std::invalid_argument);
  const int64_t width = 4;
  EXPECT_THROW(search.Reset({nullptr, nullptr, nullptr, &width}), std::invalid_argument);
  EXPECT_THROW(search.Reset({}, BuildTrie({0}, 1, 4)), std::invalid_argument);
  const float logits[12] = {};
  EXPECT_THROW(search.Step({logits, LogitType::kFloat32, 12, 4}, 4), std::invalid_argument);
  EXPECT_THROW(search.StepLegal(logits, 12), std::invalid_argument);
  search.Step({logits, LogitType::kFloat32, 12, 4}, 1);
  search.Step({logits, LogitType::kFloat32, 12, 4}, 3);
  EXPECT_THROW(search.Step({logits, LogitType::kFloat32, 12, 4}, 3), std::logic_error);
  EXPECT_THROW(search.StepLegal(logits, 0), std::logic_error);
}

}  // namespace
}  // namespace onerec
