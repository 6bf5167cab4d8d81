// Integer arithmetic. Each source file has its own copy, so that *_isa.cc files may include this
// header.
#pragma once

namespace onerec {

// a / b, rounded up; a >= 0 and b > 0.
template <class A, class B>
static constexpr auto DivideUp(A a, B b) {
  return (a + b - 1) / b;
}

// The smallest multiple of b that is not below a.
template <class A, class B>
static constexpr auto RoundUp(A a, B b) {
  return DivideUp(a, b) * b;
}

}  // namespace onerec
