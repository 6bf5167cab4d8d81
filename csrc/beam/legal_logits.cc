#include <algorithm>

#include "beam/legal_logits_isa.h"
#include "onerec/beam_search.h"
#include "onerec/runtime.h"
#include "support/dispatch.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
void LegalLogits(const HiddenRows& hidden, const float* head, int64_t head_stride,
                 const int64_t* rows, const int32_t* codes, int64_t count, float* logits,
                 int num_threads) {
  constexpr int64_t kChunk = 256;
  constexpr int64_t kAhead = 8;  // rows of the head whose first lines are fetched early
  const auto dot = ONEREC_DISPATCH(Dot);
  ParallelFor(DivideUp(count, kChunk), num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      if (i + kAhead < end) {
        const float* const next = head + codes[i + kAhead] * head_stride;
        for (int64_t at = 0; at < hidden.size; at += 16) __builtin_prefetch(next + at);
      }
      const float* const row = hidden.data + rows[i] / hidden.beams * hidden.batch_stride +
                               rows[i] % hidden.beams * hidden.row_stride;
      logits[i] = dot(row, head + codes[i] * head_stride, hidden.size);
    }
  });
}

}  // namespace onerec
