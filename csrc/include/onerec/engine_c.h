/* Recommendations from C, and from any language that calls C: an exported folder (`onerec export`)
   served on the CPU. An item is an index, its row in the catalogue; ids are looked up.

   A handle is read-only: threads may share it. A function that can fail returns a status and, if
   `error` is not null, writes a message of at most error_size bytes, zero included; an empty one if
   it does not fail. Functions without a status give -1, or what they say, for a null handle. */
#ifndef ONEREC_ENGINE_C_H_
#define ONEREC_ENGINE_C_H_

#include <stddef.h>
#include <stdint.h>

#include "onerec/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct onerec_recommender onerec_recommender;

typedef enum onerec_status {
  ONEREC_OK = 0,
  ONEREC_INVALID_ARGUMENT = 1, /* an option, index or pointer is wrong */
  ONEREC_BAD_FILE = 2,         /* a file is missing, damaged or of another version */
  ONEREC_FAILED = 3            /* out of memory, or a fault of this library */
} onerec_status;

typedef struct onerec_options {
  int64_t beam_width;      /* sessions followed at once */
  int64_t session_length;  /* items of a session; 0: the model's own, which is also the most */
  int64_t num_sessions;    /* sessions returned, at most beam_width */
  int32_t exclude_history; /* 1: show nothing from the history */
  int32_t scoring; /* 0 full softmax, 1 legal softmax, 2 raw; -1 as the network was trained */
  double temperature;
  int32_t num_threads;
  uint64_t allow_tags; /* items with one of these tags alone; 0: all items */
} onerec_options;

/* 128 beams, one session of the model's length, the history excluded, the softmax of training, one
   thread, all items. */
ONEREC_API onerec_options onerec_default_options(void);

ONEREC_API onerec_status onerec_create(const char* folder, onerec_recommender** made, char* error,
                                       size_t error_size);
ONEREC_API void onerec_destroy(onerec_recommender* recommender); /* null is allowed */

ONEREC_API int64_t onerec_items(const onerec_recommender* recommender);
ONEREC_API int64_t onerec_session_length(const onerec_recommender* recommender);
ONEREC_API int onerec_ids_are_text(const onerec_recommender* recommender);
/* Index of an item id, or -1; always -1 for ids of the other kind. */
ONEREC_API int64_t onerec_find_int(const onerec_recommender* recommender, int64_t id);
ONEREC_API int64_t onerec_find_text(const onerec_recommender* recommender, const char* id);
/* Id of an item: INT64_MIN, or null, for an index that is none or ids of the other kind. */
ONEREC_API int64_t onerec_int_id(const onerec_recommender* recommender, int64_t item);
ONEREC_API const char* onerec_text_id(const onerec_recommender* recommender, int64_t item);

/* Writes the best sessions after a history (oldest item first; -1 is left out): session s has its
   items at items[s * length] .., its score at scores[s]. The caller's arrays hold num_sessions *
   session_length items and num_sessions scores; *sessions and *length say how many were found. */
ONEREC_API onerec_status onerec_recommend(const onerec_recommender* recommender,
                                          const int64_t* history, int64_t history_size,
                                          const int64_t* exclude, int64_t exclude_size,
                                          const onerec_options* options, int64_t* items,
                                          float* scores, int64_t* sessions, int64_t* length,
                                          char* error, size_t error_size);

typedef struct onerec_rank_options {
  int64_t k;           /* most items */
  int64_t beam_width;  /* 0: the larger of k and 128 */
  double dense_weight; /* 0 .. 1, of the dense head's log-probability beside the generator's;
                          -1: the mixture of generator, dense head and counts where the export
                          has one, else the generator */
  int64_t dense_top;   /* best items of the dense head, and of each count, that join the beam's */
  int32_t exclude_history; /* 1: show nothing from the history */
  int32_t scoring;         /* of the beam; as in onerec_options */
  double temperature;      /* of the beam */
  int32_t num_threads;
  uint64_t allow_tags; /* items with one of these tags alone; 0: all items */
} onerec_rank_options;

/* Ten items by the mixture where the export has one, else by the beam; the rest as in
   onerec_default_options. */
ONEREC_API onerec_rank_options onerec_default_rank_options(void);

/* Writes the next items, best first; `items` holds k, *found says how many there are. A
   dense_weight above 0 needs a model that was trained with a dense head. */
ONEREC_API onerec_status onerec_rank(const onerec_recommender* recommender, const int64_t* history,
                                     int64_t history_size, const int64_t* exclude,
                                     int64_t exclude_size, const onerec_rank_options* options,
                                     int64_t* items, int64_t* found, char* error,
                                     size_t error_size);

#ifdef __cplusplus
}
#endif

#endif /* ONEREC_ENGINE_C_H_ */
