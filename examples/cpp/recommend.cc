// Answers one request with the whole model on the CPU; no Python and no libtorch in the process.
//
//   onerec export RUN                       # once: packs the trained model and its catalogue
//   recommend RUN/export ITEM_ID...         # a history, oldest first
#include <onerec/recommender.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

namespace {

// Index of an item id in whichever kind the catalogue has; -1 for an unknown one.
int64_t Find(const onerec::Recommender& recommender, std::string_view id) {
  if (recommender.TextIds()) return recommender.Find(id);
  int64_t number = 0;
  const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), number);
  if (error != std::errc() || end != id.data() + id.size()) return -1;
  return recommender.Find(number);
}

std::string Id(const onerec::Recommender& recommender, int64_t item) {
  return recommender.TextIds() ? recommender.TextId(item) : std::to_string(recommender.IntId(item));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FOLDER [ITEM_ID...]\n", argv[0]);
    return 2;
  }
  try {
    // One for the process: it is read-only, maps its files and may be shared by threads.
    const auto recommender = onerec::Recommender::Load(argv[1]);

    std::vector<int64_t> history;
    for (int i = 2; i < argc; ++i) history.push_back(Find(*recommender, argv[i]));

    onerec::RecommendOptions options;
    options.beam_width = 32;
    options.num_sessions = 3;
    options.num_threads = 2;
    for (const auto& session : recommender->Recommend(history, {}, options)) {
      std::printf("%.4f", static_cast<double>(session.score));
      for (int64_t item : session.items) std::printf(" %s", Id(*recommender, item).c_str());
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
