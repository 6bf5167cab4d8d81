// The text of errors: "NAME: wanted ..., got ...".
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace onerec {

// Numbers and strings, one after the other.
template <class... Parts>
std::string Text(const Parts&... parts) {
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  return (text(parts) + ...);
}

// `got` may have further parts: where the value was found.
template <class Name, class Wanted, class... Got>
std::string WantedGot(const Name& name, const Wanted& wanted, const Got&... got) {
  return Text(name, ": wanted ", wanted, ", got ", got...);
}

// Throws std::invalid_argument unless least <= value <= most.
inline void CheckRange(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(WantedGot(name, Text(least, "..", most), value));
  }
}

}  // namespace onerec
