#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "onerec/engine_c.h"
#include "onerec/recommender.h"
#include "support/error.h"

struct onerec_recommender {
  std::shared_ptr<const onerec::Recommender> held;
};

namespace {

void Tell(const char* what, char* error, size_t error_size) {
  if (error == nullptr || error_size == 0) return;
  std::strncpy(error, what, error_size - 1);
  error[error_size - 1] = '\0';
}

// Runs body; no exception leaves it.
template <class Body>
onerec_status Guarded(char* error, size_t error_size, Body&& body) noexcept {
  Tell("", error, error_size);
  try {
    body();
    return ONEREC_OK;
  } catch (const std::invalid_argument& e) {
    Tell(e.what(), error, error_size);
    return ONEREC_INVALID_ARGUMENT;
  } catch (const std::runtime_error& e) {  // a file's
    Tell(e.what(), error, error_size);
    return ONEREC_BAD_FILE;
  } catch (const std::exception& e) {
    Tell(e.what(), error, error_size);
  } catch (...) {
    Tell("unknown error", error, error_size);
  }
  return ONEREC_FAILED;
}

void Need(bool given, const char* name) {
  if (!given) throw std::invalid_argument(onerec::WantedGot(name, "a pointer", "null"));
}

// A list of item indices.
std::vector<int64_t> List(const int64_t* items, int64_t size, const char* name) {
  Need(items != nullptr || size == 0, name);
  if (size < 0) {
    throw std::invalid_argument(onerec::WantedGot(onerec::Text(name, "_size"), "0 or more", size));
  }
  return {items, items + size};
}

// What both kinds of options have in common.
template <class Options, class COptions>
Options Common(const COptions& given) {
  if (given.scoring < -1 || given.scoring > 2) {
    throw std::invalid_argument(onerec::WantedGot("scoring", "-1, 0, 1 or 2", given.scoring));
  }
  Options o;
  o.beam_width = given.beam_width;
  o.exclude_history = given.exclude_history != 0;
  if (given.scoring >= 0) o.scoring = static_cast<onerec::Scoring>(given.scoring);
  if (given.allow_tags != 0) o.allow_tags = given.allow_tags;
  o.temperature = given.temperature;
  o.num_threads = given.num_threads;
  return o;
}

}  // namespace

onerec_options onerec_default_options(void) { return {128, 0, 1, 1, -1, 1.0, 1, 0}; }

onerec_status onerec_create(const char* folder, onerec_recommender** made, char* error,
                            size_t error_size) {
  return Guarded(error, error_size, [&] {
    Need(folder != nullptr, "folder");
    Need(made != nullptr, "made");
    *made = nullptr;
    *made = new onerec_recommender{onerec::Recommender::Load(folder)};
  });
}

void onerec_destroy(onerec_recommender* recommender) { delete recommender; }

int64_t onerec_items(const onerec_recommender* recommender) {
  return recommender == nullptr ? -1 : recommender->held->Items();
}

int64_t onerec_session_length(const onerec_recommender* recommender) {
  return recommender == nullptr ? -1 : recommender->held->Config().session_length;
}

int onerec_ids_are_text(const onerec_recommender* recommender) {
  return recommender == nullptr ? -1 : recommender->held->TextIds();
}

int64_t onerec_find_int(const onerec_recommender* recommender, int64_t id) {
  return recommender == nullptr ? -1 : recommender->held->Find(id);
}

int64_t onerec_find_text(const onerec_recommender* recommender, const char* id) {
  if (recommender == nullptr || id == nullptr) return -1;
  return recommender->held->Find(std::string_view(id));
}

int64_t onerec_int_id(const onerec_recommender* recommender, int64_t item) {
  int64_t id = INT64_MIN;
  Guarded(nullptr, 0, [&] {
    Need(recommender != nullptr, "recommender");
    id = recommender->held->IntId(item);
  });
  return id;
}

const char* onerec_text_id(const onerec_recommender* recommender, int64_t item) {
  const char* id = nullptr;
  Guarded(nullptr, 0, [&] {
    Need(recommender != nullptr, "recommender");
    id = recommender->held->TextId(item);
  });
  return id;
}

onerec_status onerec_recommend(const onerec_recommender* recommender, const int64_t* history,
                               int64_t history_size, const int64_t* exclude, int64_t exclude_size,
                               const onerec_options* options, int64_t* items, float* scores,
                               int64_t* sessions, int64_t* length, char* error, size_t error_size) {
  return Guarded(error, error_size, [&] {
    Need(recommender != nullptr, "recommender");
    Need(options != nullptr && items != nullptr && scores != nullptr, "options, items and scores");
    Need(sessions != nullptr && length != nullptr, "sessions and length");
    auto o = Common<onerec::RecommendOptions>(*options);
    o.session_length = options->session_length;
    o.num_sessions = options->num_sessions;
    const auto found = recommender->held->Recommend(List(history, history_size, "history"),
                                                    List(exclude, exclude_size, "exclude"), o);
    *sessions = static_cast<int64_t>(found.size());
    *length = found.empty() ? 0 : static_cast<int64_t>(found[0].items.size());
    for (size_t s = 0; s < found.size(); ++s) {
      scores[s] = found[s].score;
      for (size_t i = 0; i < found[s].items.size(); ++i) {
        items[s * found[s].items.size() + i] = found[s].items[i];
      }
    }
  });
}

onerec_rank_options onerec_default_rank_options(void) {
  return {10, 0, -1.0, 50, 1, -1, 1.0, 1, 0};
}

onerec_status onerec_rank(const onerec_recommender* recommender, const int64_t* history,
                          int64_t history_size, const int64_t* exclude, int64_t exclude_size,
                          const onerec_rank_options* options, int64_t* items, int64_t* found,
                          char* error, size_t error_size) {
  return Guarded(error, error_size, [&] {
    Need(recommender != nullptr, "recommender");
    Need(options != nullptr && items != nullptr && found != nullptr, "options, items and found");
    auto o = Common<onerec::RankOptions>(*options);
    o.k = options->k;
    if (options->dense_weight != -1.0) o.dense_weight = options->dense_weight;
    o.dense_top = options->dense_top;
    const auto ranked = recommender->held->Rank(List(history, history_size, "history"),
                                                List(exclude, exclude_size, "exclude"), o);
    std::copy(ranked.begin(), ranked.end(), items);
    *found = static_cast<int64_t>(ranked.size());
  });
}
