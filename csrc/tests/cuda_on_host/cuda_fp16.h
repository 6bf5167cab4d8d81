#pragma once

struct __half {
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
