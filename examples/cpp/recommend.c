/* The same request through the C interface, which other languages can call too.
 *
 *   recommend_c RUN/export ITEM_ID...
 */
#include <inttypes.h>
#include <onerec/engine_c.h>
#include <stdio.h>
#include <stdlib.h>

enum { kSessions = 3, kMostItems = 64, kMostHistory = 1024 };

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s FOLDER [ITEM_ID...]\n", argv[0]);
    return 2;
  }
  char error[512];
  onerec_recommender* recommender = NULL;
  if (onerec_create(argv[1], &recommender, error, sizeof error) != ONEREC_OK) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  const int text = onerec_ids_are_text(recommender);
  int64_t history[kMostHistory];
  int64_t known = 0;
  for (int i = 2; i < argc && known < kMostHistory; ++i) {
    history[known++] = text ? onerec_find_text(recommender, argv[i])
                            : onerec_find_int(recommender, strtoll(argv[i], NULL, 10));
  }

  onerec_options options = onerec_default_options();
  options.beam_width = 32;
  options.num_sessions = kSessions;
  options.session_length = onerec_session_length(recommender);
  if (options.session_length > kMostItems) options.session_length = kMostItems;
  int64_t items[kSessions * kMostItems];
  float scores[kSessions];
  int64_t sessions = 0, length = 0;
  const onerec_status status =
      onerec_recommend(recommender, history, known, NULL, 0, &options, items, scores, &sessions,
                       &length, error, sizeof error);
  if (status != ONEREC_OK) fprintf(stderr, "%s\n", error);
  for (int64_t s = 0; status == ONEREC_OK && s < sessions; ++s) {
    printf("%.4f", (double)scores[s]);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t item = items[s * length + i];
      if (text) {
        printf(" %s", onerec_text_id(recommender, item));
      } else {
        printf(" %" PRId64, onerec_int_id(recommender, item));
      }
    }
    printf("\n");
  }
  onerec_destroy(recommender);
  return status == ONEREC_OK ? 0 : 1;
}
