// XXH64 with seed 0 of Yann Collet's xxHash specification: the checksum of our files.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onerec {

inline uint64_t Xxh64(const void* data, size_t size) {
  constexpr uint64_t p1 = 0x9E3779B185EBCA87, p2 = 0xC2B2AE3D27D4EB4F, p3 = 0x165667B19E3779F9,
                     p4 = 0x85EBCA77C2B2AE63, p5 = 0x27D4EB2F165667C5;
  const auto load = [](const unsigned char* p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
  };
  const auto round = [](uint64_t acc, uint64_t input) {
    return std::rotl(acc + input * p2, 31) * p1;
  };
  const auto* p = static_cast<const unsigned char*>(data);
  const unsigned char* const end = p + size;
  uint64_t h;
  if (size >= 32) {
    uint64_t lane[4] = {p1 + p2, p2, 0, 0 - p1};
    for (; end - p >= 32; p += 32) {
      for (int i = 0; i < 4; ++i) lane[i] = round(lane[i], load(p + 8 * i));
    }
    h = std::rotl(lane[0], 1) + std::rotl(lane[1], 7) + std::rotl(lane[2], 12) +
        std::rotl(lane[3], 18);
    for (uint64_t l : lane) h = (h ^ round(0, l)) * p1 + p4;
  } else {
    h = p5;
  }
  h += size;
  for (; end - p >= 8; p += 8) h = std::rotl(h ^ round(0, load(p)), 27) * p1 + p4;
  if (end - p >= 4) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    h = std::rotl(h ^ (word * p1), 23) * p2 + p3;
    p += 4;
  }
  for (; p < end; ++p) h = std::rotl(h ^ (*p * p5), 11) * p1;
  h = (h ^ (h >> 33)) * p2;
  h = (h ^ (h >> 29)) * p3;
  return h ^ (h >> 32);
}

}  // namespace onerec
