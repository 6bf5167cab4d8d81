// One pool of worker threads for every CPU kernel.
#pragma once

#include <cstdint>
#include <type_traits>

namespace onerec {

// Calls body(chunk) once for each chunk in [0, chunks) on up to num_threads threads, the caller
// being one of them, and returns when all are done. Chunks are handed out in order, first come
// first served: a result must not depend on which thread runs a chunk. A call from inside a body,
// or while another caller holds the pool, runs on the calling thread alone. Allocates nothing
// once the workers exist. The first exception thrown by a body is thrown again here.
void ParallelForImpl(int64_t chunks, int num_threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void ParallelFor(int64_t chunks, int num_threads, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  ParallelForImpl(
      chunks, num_threads,
      [](void* context, int64_t chunk) { (*static_cast<Plain*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace onerec
