// The text of an error in an argument.
#pragma once

#include <cstdint>
#include <string>

namespace onerec {

inline std::string WantedGot(const char* name, const std::string& wanted, int64_t got) {
  return std::string(name) + ": wanted " + wanted + ", got " + std::to_string(got);
}

}  // namespace onerec
