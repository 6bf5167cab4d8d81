#include "onerec/trie.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/xxh64.h"
#include "tests/random_sids.h"
#include "tests/trie/fuzz.h"

namespace onerec {
namespace {

struct Shape {
  int64_t n;
  int levels;
  int codebook_size;
};

constexpr Shape kShapes[] = {{0, 3, 8},      {1, 1, 1},      {33, 3, 4},     {500, 2, 256},
                             {1000, 4, 257}, {800, 5, 8192}, {700, 8, 65536}};

std::vector<char> BytesOf(const Trie& trie) {
  const char* data = static_cast<const char*>(trie.Data());
  return {data, data + trie.Bytes()};
}

void SetHashes(std::vector<char>& bytes) {
  const uint64_t content = Xxh64(bytes.data() + 256, bytes.size() - 256);
  std::memcpy(bytes.data() + 240, &content, sizeof content);
  const uint64_t header = Xxh64(bytes.data(), 248);
  std::memcpy(bytes.data() + 248, &header, sizeof header);
}

// Every leaf has codes in range, all different, and is found again.
void ExpectWhole(const Trie& trie) {
  const TrieView& view = trie.View();
  std::vector<int64_t> leaves(view.Leaves());
  for (size_t i = 0; i < leaves.size(); ++i) leaves[i] = static_cast<int64_t>(i);
  std::vector<int32_t> sids(leaves.size() * view.levels);
  trie.LeafSids(leaves.data(), view.Leaves(), sids.data());
  for (int32_t code : sids) ASSERT_TRUE(code >= 0 && code < view.codebook_size);
  std::vector<int64_t> found(leaves.size());
  trie.Lookup(sids.data(), view.Leaves(), view.levels, view.levels, found.data(), 2);
  EXPECT_EQ(found, leaves);
}

TEST(Trie, HoldsExactlyTheDistinctIdsInOrder) {
  for (const Shape& shape : kShapes) {
    const auto sids = RandomSids(shape.n, shape.levels, shape.codebook_size, 1);
    const auto distinct = Distinct(sids, shape.levels);
    const auto trie = BuildTrie(sids, shape.levels, shape.codebook_size);
    ASSERT_EQ(trie->View().Leaves(), static_cast<int64_t>(distinct.size()));
    ExpectWhole(*trie);
    std::set<Sid> prefixes[kMaxTrieLevels + 1];
    for (size_t leaf = 0; leaf < distinct.size(); ++leaf) {
      Sid sid(shape.levels);
      const auto id = static_cast<int64_t>(leaf);
      trie->LeafSids(&id, 1, sid.data());
      EXPECT_EQ(sid, distinct[leaf]);
      for (int d = 0; d <= shape.levels; ++d) prefixes[d].insert(Sid(sid.begin(), sid.begin() + d));
    }
    // Nodes of a depth are the distinct prefixes in order, here and among random ones.
    std::mt19937 draw(2);
    std::uniform_int_distribution<int32_t> code(-1, shape.codebook_size);
    for (int depth = 0; depth <= shape.levels; ++depth) {
      int64_t rank = 0;
      for (const Sid& prefix : prefixes[depth]) {
        int64_t node = -2;
        trie->Lookup(prefix.data(), 1, depth, depth, &node, 1);
        EXPECT_EQ(node, rank++);
      }
      for (int i = 0; i < 50; ++i) {
        Sid prefix(depth);
        for (int32_t& c : prefix) c = code(draw);
        int64_t node = -2;
        trie->Lookup(prefix.data(), 1, depth, depth, &node, 1);
        EXPECT_EQ(node >= 0, prefixes[depth].count(prefix) == 1);
      }
      if (depth == shape.levels) continue;
      const TrieLevelStats stats = trie->LevelStats(depth);
      EXPECT_EQ(stats.edges, static_cast<int64_t>(prefixes[depth + 1].size()));
    }
  }
}

TEST(Trie, BitmaskIsTheSetOfChildren) {
  const auto sids = RandomSids(60, 3, 40, 3);
  const auto distinct = Distinct(sids, 3);
  const auto trie = BuildTrie(sids, 3, 40);
  for (int depth = 0; depth < 3; ++depth) {
    for (int64_t node = -1; node < trie->View().nodes[depth]; ++node) {
      uint32_t words[2] = {~0u, ~0u};
      trie->Bitmask(&node, 1, depth, words);
      std::set<int> legal;
      for (const Sid& sid : distinct) {
        int64_t at = 0;
        trie->Lookup(sid.data(), 1, 3, depth, &at, 1);
        if (at == node) legal.insert(sid[depth]);
      }
      for (int code = 0; code < 64; ++code) {
        EXPECT_EQ((words[code / 32] >> (code % 32)) & 1, legal.count(code));
      }
    }
  }
  const int64_t outside = trie->View().nodes[1];
  uint32_t words[2];
  EXPECT_THROW(trie->Bitmask(&outside, 1, 1, words), std::invalid_argument);
  EXPECT_THROW(trie->Bitmask(&outside, 0, 3, words), std::invalid_argument);
}

TEST(Trie, OrderAndRepetitionDoNotChangeTheBytes) {
  auto sids = RandomSids(5000, 3, 40, 4);
  const auto bytes = BytesOf(*BuildTrie(sids, 3, 40));
  std::vector<int32_t> sorted;
  for (const Sid& sid : Distinct(sids, 3)) sorted.insert(sorted.end(), sid.begin(), sid.end());
  EXPECT_EQ(BytesOf(*BuildTrie(sorted, 3, 40)), bytes);
  sids.insert(sids.end(), sorted.begin(), sorted.end());
  EXPECT_EQ(BytesOf(*BuildTrie(sids, 3, 40)), bytes);
}

TEST(Trie, FileHoldsTheBytes) {
  const auto trie = BuildTrie(RandomSids(300, 3, 16, 5), 3, 16);
  const TemporaryFile file("trie.bin");
  trie->Save(file.Path());
  EXPECT_EQ(BytesOf(*Trie::Load(file.Path())), BytesOf(*trie));
  const auto bytes = BytesOf(*trie);
  EXPECT_EQ(BytesOf(*Trie::FromBytes(bytes.data(), bytes.size())), bytes);
  EXPECT_THROW(Trie::Load(file.Path() + ".none"), std::runtime_error);
  EXPECT_THROW(trie->Save(file.Path() + "/none"), std::runtime_error);
}

TEST(Trie, RefusesEveryTruncation) {
  const auto bytes = BytesOf(*BuildTrie(RandomSids(40, 3, 5, 6), 3, 5));
  const TemporaryFile file("short.bin");
  for (size_t size = 0; size < bytes.size(); ++size) {
    // A block of its own, so that a read past its end is seen.
    const std::vector<char> part(bytes.begin(), bytes.begin() + static_cast<int64_t>(size));
    EXPECT_THROW(Trie::FromBytes(part.data(), part.size()), TrieFormatError) << size;
    if (size % 37 == 0) {
      file.Write(part);
      EXPECT_THROW(Trie::Load(file.Path()), TrieFormatError) << size;
    }
  }
  auto longer = bytes;
  longer.push_back(0);
  EXPECT_THROW(Trie::FromBytes(longer.data(), longer.size()), TrieFormatError);
}

TEST(Trie, RefusesOrSurvivesDamage) {
  const auto bytes = BytesOf(*BuildTrie(RandomSids(40, 3, 5, 7), 3, 5));
  for (size_t at = 0; at < bytes.size(); ++at) {
    auto damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    EXPECT_THROW(Trie::FromBytes(damaged.data(), damaged.size()), TrieFormatError) << at;
  }
  // With hashes that fit, what is accepted must be a trie.
  std::mt19937 draw(8);
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    auto hostile = bytes;
    const int changes = 1 + static_cast<int>(draw() % 3);
    for (int i = 0; i < changes; ++i) {
      const size_t at = 16 + draw() % (hostile.size() - 16);
      hostile[at] = static_cast<char>(draw() % 4 == 0 ? draw() : hostile[at] ^ (1 << draw() % 8));
    }
    SetHashes(hostile);
    try {
      const auto trie = Trie::FromBytes(hostile.data(), hostile.size());
      ExpectWhole(*trie);
      ++accepted;
    } catch (const TrieFormatError&) {
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(Trie, SurvivesWhatTheFuzzerFound) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ONEREC_CORPUS)) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    FuzzTrie(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    ++files;
  }
  EXPECT_GT(files, 0);
}

TEST(Trie, RefusesBadArguments) {
  const int32_t sids[] = {0, 4, -1, 0};
  EXPECT_THROW(Trie::Build(sids, 1, 2, 2, 4), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids + 2, 1, 2, 2, 4), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids, -1, 2, 2, 8), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids, 1, 2, 0, 8), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids, 1, 2, 9, 8), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids, 1, 2, 2, 0), std::invalid_argument);
  EXPECT_THROW(Trie::Build(sids, 1, 2, 2, 65537), std::invalid_argument);
  const auto trie = Trie::Build(sids, 1, 2, 2, 5);
  int64_t leaf = 1;
  int32_t out[2];
  EXPECT_THROW(trie->LeafSids(&leaf, 1, out), std::invalid_argument);
  EXPECT_THROW(trie->Lookup(sids, 1, 2, 3, &leaf, 1), std::invalid_argument);
  EXPECT_THROW(trie->LevelStats(2), std::invalid_argument);
}

}  // namespace
}  // namespace onerec
