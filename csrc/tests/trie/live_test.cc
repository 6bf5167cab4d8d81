#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "onerec/beam_search.h"
#include "onerec/live_trie.h"
#include "tests/random_sids.h"

namespace onerec {
namespace {

std::vector<char> BytesOf(const Trie& trie) {
  const char* data = static_cast<const char*>(trie.Data());
  return {data, data + trie.Bytes()};
}

std::vector<int32_t> Flat(const std::set<Sid>& sids) {
  std::vector<int32_t> flat;
  for (const Sid& sid : sids) flat.insert(flat.end(), sid.begin(), sid.end());
  return flat;
}

TEST(LiveTrie, RandomChangesGiveTheSetThatTheySay) {
  for (const int levels : {1, 3, 8}) {
    const int size = levels == 8 ? 65536 : 6;  // 128 bits a key, and 9
    std::mt19937 draw(1);
    const auto pool = RandomSids(200, levels, size, 2);
    const auto some = [&] {
      std::set<Sid> sids;
      for (uint32_t i = draw() % 60; i > 0; --i) {
        const auto at = pool.begin() + static_cast<int64_t>(draw() % 200) * levels;
        sids.insert(Sid(at, at + levels));
      }
      return sids;
    };
    std::set<Sid> now = some(), before;
    LiveTrie live(BuildTrie(Flat(now), levels, size));
    for (int change = 1; change <= 60; ++change) {
      const std::set<Sid> sids = some(), was = now;
      const auto flat = Flat(sids);
      const auto n = static_cast<int64_t>(sids.size());
      switch (change == 1 ? 0 : draw() % 4) {
        case 0:
          EXPECT_EQ(live.Insert(flat.data(), n, levels, nullptr), change);
          now.insert(sids.begin(), sids.end());
          break;
        case 1:
          EXPECT_EQ(live.Remove(flat.data(), n, levels), change);
          for (const Sid& sid : sids) now.erase(sid);
          break;
        case 2:
          EXPECT_EQ(live.Rollback(), change);
          now = before;
          break;
        default:
          EXPECT_EQ(live.Fold(), change);
      }
      before = was;
      const LiveTrie::Epoch epoch = live.Pin();
      EXPECT_EQ(epoch.id, change);
      ASSERT_EQ(epoch.trie->LiveLeaves(), static_cast<int64_t>(now.size()));
      ASSERT_EQ(BytesOf(*epoch.trie->With(nullptr, 0, 0, nullptr)),
                BytesOf(*BuildTrie(Flat(now), levels, size)));
      for (size_t i = 0; i < pool.size(); i += levels) {
        int64_t leaf = -2;
        epoch.trie->Lookup(&pool[i], 1, levels, levels, &leaf, 1);
        const auto at = pool.begin() + static_cast<int64_t>(i);
        ASSERT_EQ(leaf >= 0, now.count(Sid(at, at + levels)) == 1);
      }
    }
  }
}

TEST(LiveTrie, RefusesBadChanges) {
  LiveTrie live(BuildTrie({0, 1}, 2, 4));
  EXPECT_THROW(live.Rollback(), std::logic_error);
  const int32_t outside[] = {0, 4};
  EXPECT_THROW(live.Insert(outside, 1, 2, nullptr), std::invalid_argument);
  EXPECT_THROW(live.Swap(BuildTrie({0}, 1, 4)), std::invalid_argument);
  EXPECT_EQ(live.Pin().id, 0);
  live.Remove(outside, 1, 2);  // is not there
  EXPECT_EQ(live.Pin().trie->LiveLeaves(), 1);
  const int64_t leaf = 0;
  const auto empty = live.Pin().trie->Without(&leaf, 1);
  EXPECT_EQ(empty->LiveLeaves(), 0);
  EXPECT_THROW(empty->Save("/tmp/none"), std::logic_error);
  const int64_t twice[] = {0, 0};
  EXPECT_THROW(empty->Without(twice, 2), std::invalid_argument);
}

// A writer and two readers, ONEREC_STRESS_SECONDS long (1 by default): every item that a search
// returns is in the epoch that its reader has pinned.
TEST(LiveTrie, ReadersNeverSeeHalfAChange) {
  constexpr int kLevels = 3, kSize = 32;
  constexpr int64_t kWidth = 16;
  const char* given = std::getenv("ONEREC_STRESS_SECONDS");
  const double seconds = given != nullptr ? std::atof(given) : 1.0;
  const auto pool = RandomSids(4000, kLevels, kSize, 0);
  LiveTrie live(BuildTrie({pool.begin(), pool.begin() + 1000 * kLevels}, kLevels, kSize));
  std::atomic<bool> stop{false};
  std::atomic<int64_t> wrong{0}, searches{0};

  const auto read = [&](uint32_t seed) {
    std::mt19937 draw(seed);
    std::normal_distribution<float> normal;
    BeamSearchOptions options;
    options.width = kWidth;
    options.items = 2;
    options.num_threads = 2;
    BeamSearch search(live.Pin().trie, options);
    std::vector<float> logits(kWidth * kSize);
    while (!stop) {
      const std::shared_ptr<const Trie> trie = live.Pin().trie;
      search.Reset({}, trie);
      while (!search.Done()) {
        for (float& x : logits) x = normal(draw);
        search.Step({logits.data(), LogitType::kFloat32, kWidth * kSize, kSize}, kWidth);
      }
      std::vector<int32_t> sids(kWidth * 2 * kLevels);
      search.Sids(sids.data());
      std::vector<int64_t> leaves(kWidth * 2);
      trie->Lookup(sids.data(), kWidth * 2, kLevels, kLevels, leaves.data(), 1);
      wrong += search.Valid()[0] != kWidth;
      wrong += std::count(leaves.begin(), leaves.end(), -1);
      ++searches;
    }
  };
  std::thread readers[] = {std::thread(read, 1), std::thread(read, 2)};
  std::mt19937 draw(3);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t changes = 0;
  for (; std::chrono::steady_clock::now() < end; ++changes) {
    const int32_t* sids = &pool[draw() % 3900 * kLevels];
    switch (draw() % 8) {
      case 0:
        live.Insert(sids, 100, kLevels, nullptr);
        break;
      case 1:
        if (changes > 0) live.Rollback();
        break;
      case 2:
        live.Fold();
        break;
      case 3:
        live.Swap(BuildTrie({sids, sids + 100 * kLevels}, kLevels, kSize));
        break;
      default:
        live.Remove(sids, 4, kLevels);
    }
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(searches, 0);
  RecordProperty("searches", std::to_string(searches));
  RecordProperty("changes", std::to_string(changes));
}

}  // namespace
}  // namespace onerec
