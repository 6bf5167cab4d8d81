#include "onerec/engine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "onerec/engine_c.h"
#include "onerec/recommender.h"
#include "tests/count_allocations.h"
#include "tests/random_sids.h"

namespace onerec {
namespace {

constexpr int kCodes = 20;
constexpr int64_t kWidth = 13;

EngineConfig Config(bool bfloat16) {
  EngineConfig c;
  c.levels = 3;
  c.codebook_size = kCodes;
  c.session_length = 3;
  c.history_length = 5;
  c.d_model = 18;
  c.n_heads = 3;
  c.encoder_layers = 2;
  c.decoder_layers = 2;
  c.d_ff = 21;
  c.n_experts = 4;
  c.experts_per_token = 2;
  c.expert_d_ff = 19;
  c.bfloat16 = bfloat16;
  return c;
}

std::shared_ptr<const EngineModel> Model(const EngineConfig& config,
                                         const std::vector<int32_t>& sids = {}) {
  std::mt19937 draw(7);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> values;
  return EngineModel::Build(
      config,
      [&](const std::string& name, int64_t elements) {
        if (name == "item_sids") {
          values.assign(sids.begin(), sids.end());
          return values.data();
        }
        values.resize(elements);
        for (float& value : values) value = normal(draw);
        return values.data();
      },
      2);
}

// A network of the items `sids`, with output vectors of their trie's nodes.
EngineConfig NodeConfig(bool bfloat16) {
  EngineConfig c = Config(bfloat16);
  c.history_is_items = c.causal = c.dense_head = c.legal_softmax = 1;
  c.node_outputs = c.decoder_start = 1;
  c.n_items = 60;
  return c;
}

struct Found {
  explicit Found(int64_t batch, int64_t length)
      : items(batch * kWidth * length), scores(batch * kWidth), valid(batch) {}
  EngineResult Result() { return {items.data(), nullptr, scores.data(), valid.data()}; }
  std::vector<int64_t> items;
  std::vector<float> scores;
  std::vector<int32_t> valid;
};

struct Requests {
  Requests() {
    for (int64_t items : {0, 5, 1, 3}) {
      codes.push_back(RandomSids(items, 3, kCodes, static_cast<uint32_t>(items)));
    }
    for (const auto& history : codes) {
      list.push_back({history.data(), static_cast<int64_t>(history.size()) / 3, deny.data(),
                      static_cast<int64_t>(deny.size())});
    }
  }
  std::vector<std::vector<int32_t>> codes;
  std::vector<int64_t> deny = {0, 7, 8};
  std::vector<EngineRequest> list;
};

EngineOptions Options(Scoring scoring, int threads) {
  EngineOptions o;
  o.beam_width = kWidth;
  o.session_length = 3;
  o.scoring = scoring;
  o.num_threads = threads;
  return o;
}

TEST(Engine, AResultIsTheSameAloneInABatchAndOnMoreThreads) {
  const auto trie = BuildTrie(RandomSids(60, 3, kCodes, 1), 3, kCodes);
  const Requests requests;
  const EngineConfig configs[] = {Config(false), Config(true), NodeConfig(false), NodeConfig(true)};
  for (const EngineConfig& config : configs) {
    const Engine engine(Model(config, RandomSids(60, 3, kCodes, 1)), trie);
    for (Scoring scoring : {Scoring::kFullSoftmax, Scoring::kLegalSoftmax}) {
      Found together(4, 3);
      engine.Run(requests.list.data(), 4, Options(scoring, 3), together.Result());
      for (int64_t b = 0; b < 4; ++b) {
        Found alone(1, 3);
        engine.Run(&requests.list[b], 1, Options(scoring, 1), alone.Result());
        ASSERT_EQ(alone.valid[0], kWidth);
        for (int64_t i = 0; i < kWidth * 3; ++i) {
          ASSERT_EQ(alone.items[i], together.items[b * kWidth * 3 + i]);
        }
        for (int64_t i = 0; i < kWidth; ++i) {
          ASSERT_EQ(alone.scores[i], together.scores[b * kWidth + i]);
        }
      }
    }
  }
}

TEST(Engine, StepsAllocateNothing) {
  if (!CanCountAllocations()) {
    GTEST_SKIP() << "a sanitizer's allocator counts; build with ONEREC_SANITIZE";
  }
  const Engine engine(Model(Config(false)), BuildTrie(RandomSids(60, 3, kCodes, 1), 3, kCodes));
  const Requests requests;
  Found found(4, 3);
  // A search begins with lists of what is denied; three items take as many as one.
  int64_t counted[2];
  for (int64_t items : {1, 3}) {
    EngineOptions options = Options(Scoring::kFullSoftmax, 2);
    options.session_length = items;
    engine.Run(requests.list.data(), 4, options, found.Result());
    counted[items == 3] =
        CountAllocations(2, [&] { engine.Run(requests.list.data(), 4, options, found.Result()); });
  }
  EXPECT_EQ(counted[0], counted[1]);
}

TEST(Engine, ThreadsShareIt) {
  const Engine engine(Model(Config(true)), BuildTrie(RandomSids(60, 3, kCodes, 1), 3, kCodes));
  const Requests requests;
  Found wanted(4, 3);
  engine.Run(requests.list.data(), 4, Options(Scoring::kFullSoftmax, 1), wanted.Result());
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        Found got(4, 3);
        engine.Run(requests.list.data(), 4, Options(Scoring::kFullSoftmax, 2), got.Result());
        wrong += got.items != wanted.items || got.scores != wanted.scores;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Engine, ItemsOfTheNetworkHaveAllTheProbability) {
  constexpr int64_t kItems = 60;
  const auto sids = RandomSids(kItems, 3, kCodes, 1);
  const auto trie = BuildTrie(sids, 3, kCodes);
  ASSERT_EQ(trie->View().Leaves(), kItems);
  const Engine engine(Model(NodeConfig(false), sids), trie);
  const std::vector<int32_t> history = {3, 59, 0};
  const EngineRequest requests[] = {{history.data(), 3}, {history.data(), 0}};
  std::vector<int64_t> items(2 * kItems);
  for (size_t i = 0; i < items.size(); ++i) items[i] = static_cast<int64_t>(i) % kItems;
  std::vector<float> together(items.size()), alone(items.size());
  engine.ItemLogProbs(requests, 2, items.data(), kItems, 3, together.data());
  for (size_t b = 0; b < 2; ++b) {
    double sum = 0;
    for (size_t i = 0; i < kItems; ++i) {
      sum += std::exp(static_cast<double>(together[b * kItems + i]));
    }
    EXPECT_NEAR(sum, 1, 1e-5);
    engine.ItemLogProbs(requests + b, 1, items.data(), kItems, 1, alone.data() + b * kItems);
  }
  EXPECT_EQ(alone, together);
  engine.ItemScores(requests, 2, 3, together.data());
  for (int64_t b : {0, 1}) engine.ItemScores(requests + b, 1, 1, alone.data() + b * kItems);
  EXPECT_EQ(alone, together);

  const int64_t unknown = kItems;
  EXPECT_THROW(engine.ItemLogProbs(requests, 1, &unknown, 1, 1, alone.data()),
               std::invalid_argument);
  const Engine other(Model(Config(false)), trie);
  EXPECT_THROW(other.ItemLogProbs(requests, 1, items.data(), 1, 1, alone.data()),
               std::invalid_argument);
  EXPECT_THROW(other.ItemScores(requests, 1, 1, alone.data()), std::invalid_argument);
}

TEST(Engine, NodesThatHaveTheirCodesVectorsChangeNothing) {
  // Four first codes, and siblings of one, of some and of more than a panel.
  std::vector<int32_t> sids;
  for (int32_t i = 0; i < 60; ++i) {
    const int32_t first = i % 3 == 0 ? 1 + i % 2 : 7 + i % 5 / 4;
    for (int32_t code : {3 * first / 2, i / 3, i % 7}) sids.push_back(code);
  }
  const auto trie = BuildTrie(sids, 3, kCodes);
  EngineConfig nodes = NodeConfig(false), codes = nodes;
  codes.node_outputs = 0;
  const TrieView& view = trie->View();
  const int64_t d = nodes.d_model;
  std::mt19937 draw(7);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::map<std::string, std::vector<float>> tensors;
  const auto source = [&](const std::string& name, int64_t elements) -> const float* {
    std::vector<float>& values = tensors[name];
    if (name == "item_sids") {
      values.assign(sids.begin(), sids.end());
    } else if (name.rfind("nodes.", 0) == 0) {
      const int level = std::stoi(name.substr(6));
      EXPECT_EQ(elements, view.nodes[level + 1] * d);
      values.clear();
      for (int64_t edge = 0; edge < view.nodes[level + 1]; ++edge) {
        const auto row = tensors["heads"].begin() + (level * kCodes + view.Token(level, edge)) * d;
        values.insert(values.end(), row, row + d);
      }
    }
    while (static_cast<int64_t>(values.size()) < elements) values.push_back(normal(draw));
    return values.data();
  };
  const Engine one(EngineModel::Build(codes, source, 1), trie);
  const Engine other(EngineModel::Build(nodes, source, 1), trie);
  const Requests requests;
  for (Scoring scoring : {Scoring::kLegalSoftmax, Scoring::kRaw}) {
    Found wanted(4, 3), got(4, 3);
    one.Run(requests.list.data(), 4, Options(scoring, 2), wanted.Result());
    other.Run(requests.list.data(), 4, Options(scoring, 2), got.Result());
    ASSERT_EQ(got.valid, wanted.valid);
    ASSERT_EQ(got.items, wanted.items);
    ASSERT_EQ(got.scores, wanted.scores);
  }
  std::vector<int64_t> items(4 * 60);
  for (size_t i = 0; i < items.size(); ++i) items[i] = static_cast<int64_t>(i) * 7 % 60;
  std::vector<float> wanted(items.size()), got(items.size());
  one.ItemLogProbs(requests.list.data(), 4, items.data(), 60, 2, wanted.data());
  other.ItemLogProbs(requests.list.data(), 4, items.data(), 60, 2, got.data());
  EXPECT_EQ(got, wanted);

  EXPECT_THROW(Engine(Model(nodes, RandomSids(60, 3, kCodes, 1)), trie), std::invalid_argument);
}

TEST(Engine, RefusesWrongArguments) {
  const auto trie = BuildTrie(RandomSids(60, 3, kCodes, 1), 3, kCodes);
  EXPECT_THROW(Engine(Model(Config(false)), BuildTrie(RandomSids(9, 3, 7, 1), 3, 7)),
               std::invalid_argument);
  EngineConfig config = Config(false);
  config.n_heads = 4;
  EXPECT_THROW(Model(config), std::invalid_argument);
  const Engine engine(Model(Config(false)), trie);
  Found found(1, 3);
  const auto run = [&](const EngineRequest& request, const EngineOptions& options) {
    engine.Run(&request, 1, options, found.Result());
  };
  const std::vector<int32_t> codes(18, kCodes);
  const std::vector<int64_t> deny = {4, 3};
  const EngineOptions good = Options(Scoring::kFullSoftmax, 1);
  EXPECT_THROW(run({codes.data(), 1, nullptr, 0}, good), std::invalid_argument);
  EXPECT_THROW(run({codes.data(), 6, nullptr, 0}, good), std::invalid_argument);
  EXPECT_THROW(run({codes.data(), 0, deny.data(), 2}, good), std::invalid_argument);
  EngineOptions bad = good;
  bad.session_length = 4;
  EXPECT_THROW(run({codes.data(), 0, nullptr, 0}, bad), std::invalid_argument);
  bad = good;
  bad.beam_width = 0;
  EXPECT_THROW(run({codes.data(), 0, nullptr, 0}, bad), std::invalid_argument);
  run({codes.data(), 0, nullptr, 0}, good);
}

// A folder as `onerec export` writes it.
struct Folder {
  explicit Folder(const EngineConfig& config = Config(false)) {
    path = ::testing::TempDir() + "onerec_engine_test_" + std::to_string(::getpid());
    EXPECT_EQ(std::system(("mkdir -p '" + path + "'").c_str()), 0);
    const auto sids = RandomSids(60, 3, kCodes, 1);
    const auto trie = BuildTrie(sids, 3, kCodes);
    trie->Save(path + "/trie.bin");
    Model(config, sids)->Save(path + "/engine.bin");
    std::vector<int64_t> leaves(60), ids(60);
    std::vector<uint64_t> tags(60);
    trie->Lookup(sids.data(), 60, 3, 3, leaves.data(), 1);
    for (int64_t i = 0; i < 60; ++i) ids[i] = 1000 - 3 * i;
    for (int64_t i = 0; i < 60; ++i) tags[i] = i < 2 ? 4 : 1 + i % 2;
    SaveCatalog(path + "/catalog.bin", 60, trie->View().Leaves(), leaves.data(), false, ids.data(),
                nullptr, tags.data());
  }
  ~Folder() { EXPECT_EQ(std::system(("rm -r '" + path + "'").c_str()), 0); }
  std::string path;
};

TEST(Recommender, ServesAFolderAndTheCInterfaceGivesTheSame) {
  const Folder folder;
  const auto recommender = Recommender::Load(folder.path);
  EXPECT_EQ(recommender->Find(int64_t{1000 - 3 * 17}), 17);
  EXPECT_EQ(recommender->Find(int64_t{999}), -1);
  EXPECT_EQ(recommender->Find(std::string_view("999")), -1);
  EXPECT_EQ(recommender->IntId(59), 1000 - 3 * 59);
  EXPECT_THROW(recommender->IntId(60), std::out_of_range);
  EXPECT_THROW(recommender->TextId(0), std::logic_error);
  RecommendOptions options;
  options.beam_width = 9;
  options.num_sessions = 4;
  const std::vector<int64_t> history = {5, -1, 6, 7, 8, 9, 10}, exclude = {30, 31};
  const auto found = recommender->Recommend(history, exclude, options);
  ASSERT_EQ(found.size(), 4);
  EXPECT_THROW(recommender->Recommend({60}, {}, options), std::invalid_argument);

  char error[64];
  onerec_recommender* handle = nullptr;
  ASSERT_EQ(onerec_create(folder.path.c_str(), &handle, error, sizeof error), ONEREC_OK);
  EXPECT_EQ(onerec_items(handle), 60);
  EXPECT_EQ(onerec_session_length(handle), 3);
  EXPECT_EQ(onerec_text_id(handle, 0), nullptr);
  onerec_options o = onerec_default_options();
  o.beam_width = 9;
  o.num_sessions = 4;
  std::vector<int64_t> items(12);
  std::vector<float> scores(4);
  int64_t sessions = 0, length = 0;
  const auto ask = [&] {
    return onerec_recommend(handle, history.data(), static_cast<int64_t>(history.size()),
                            exclude.data(), 2, &o, items.data(), scores.data(), &sessions, &length,
                            error, sizeof error);
  };
  ASSERT_EQ(ask(), ONEREC_OK);
  ASSERT_EQ(sessions, 4);
  ASSERT_EQ(length, 3);
  for (size_t s = 0; s < 4; ++s) {
    EXPECT_EQ(scores[s], found[s].score);
    for (size_t i = 0; i < 3; ++i) {
      const int64_t item = items[s * 3 + i];
      EXPECT_EQ(item, found[s].items[i]);
      EXPECT_EQ(std::count(history.begin(), history.end(), item), 0);
      EXPECT_NE(item, 30);
    }
  }
  o.allow_tags = options.allow_tags = 2;  // the odd items
  ASSERT_EQ(ask(), ONEREC_OK);
  const auto tagged = recommender->Recommend(history, exclude, options);
  ASSERT_EQ(sessions, 4);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(items[i], tagged[i / 3].items[i % 3]);
    EXPECT_EQ(items[i] % 2, 1);
  }
  o.allow_tags = 4;  // two items
  ASSERT_EQ(ask(), ONEREC_OK);
  EXPECT_EQ(sessions, 2);
  EXPECT_EQ(length, 2);
  o.num_sessions = 10;
  EXPECT_EQ(ask(), ONEREC_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(error).rfind("num_sessions", 0), 0);

  onerec_rank_options r = onerec_default_rank_options();
  r.k = 12;
  r.beam_width = 9;
  r.allow_tags = 2;
  int64_t count = 0;
  const auto rank = [&](int64_t size) {
    return onerec_rank(handle, history.data(), size, exclude.data(), 2, &r, items.data(), &count,
                       error, sizeof error);
  };
  ASSERT_EQ(rank(7), ONEREC_OK);
  RankOptions ranking;
  ranking.k = 12;
  ranking.beam_width = 9;
  ranking.allow_tags = 2;
  const auto ranked = recommender->Rank(history, exclude, ranking);
  ASSERT_GT(ranked.size(), 3);
  EXPECT_EQ(std::vector<int64_t>(items.begin(), items.begin() + count), ranked);
  EXPECT_EQ(rank(-1), ONEREC_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(error).rfind("history_size", 0), 0);
  r.dense_weight = 0.5;  // of a head that the model lacks
  EXPECT_EQ(rank(7), ONEREC_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(error).rfind("dense_weight", 0), 0);
  onerec_destroy(handle);
  onerec_destroy(nullptr);
  EXPECT_EQ(onerec_create("/nowhere", &handle, error, sizeof error), ONEREC_BAD_FILE);
  EXPECT_EQ(handle, nullptr);
}

TEST(Recommender, DamagedFilesAreRefused) {
  const Folder folder(NodeConfig(false));
  for (const char* name : {"/engine.bin", "/catalog.bin"}) {
    const std::string path = folder.path + name;
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    const auto write = [&](const std::string& content) {
      std::ofstream(path, std::ios::binary) << content;
    };
    std::mt19937 draw(3);
    for (int i = 0; i < 60; ++i) {
      std::string damaged = bytes;
      // Bytes past the header's fields and before its hashes are reserved but hashed as well.
      const size_t at = i < 40 ? draw() % 72 : draw() % bytes.size();
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << draw() % 8));
      write(damaged);
      if (name == std::string("/catalog.bin") && at >= 72 && at < 128) continue;
      EXPECT_THROW(Recommender::Load(folder.path), EngineFormatError) << name << " byte " << at;
    }
    for (size_t size : {size_t{0}, size_t{1}, size_t{100}, bytes.size() - 1}) {
      write(bytes.substr(0, size));
      EXPECT_THROW(Recommender::Load(folder.path), EngineFormatError) << name << " " << size;
    }
    write(bytes);
  }
  Recommender::Load(folder.path);
}

}  // namespace
}  // namespace onerec
