// A vector whose elements begin at a whole cache line: otherwise each of the widest loads and
// stores touches two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace onerec {

template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

// Makes a vector at least `size` long: buffers that are used again never shrink.
template <class T>
void Grow(T& values, size_t size) {
  if (values.size() < size) values.resize(size);
}

}  // namespace onerec
