// The seal of the files of this library: what they are, and hashes that tell of damage. A header
// has `char magic[8]; uint32_t version, byte_order; uint64_t file_bytes;` first and the two hashes
// somewhere: content_hash of all bytes after the header, header_hash of the header's bytes before
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "support/error.h"
#include "support/xxh64.h"

namespace onerec {

struct SealedKind {
  char magic[9];  // eight letters
  uint32_t version;
};

inline constexpr uint32_t kByteOrder = 0x01020304;

template <class Header>
uint64_t HeaderHash(const Header& h) {
  return Xxh64(&h,
               reinterpret_cast<const char*>(&h.header_hash) - reinterpret_cast<const char*>(&h));
}

template <class Header>
uint64_t ContentHash(const void* data, size_t size) {
  return Xxh64(static_cast<const char*>(data) + sizeof(Header), size - sizeof(Header));
}

// Begins a header: everything before file_bytes.
template <class Header>
void Name(Header& h, const SealedKind& kind) {
  std::memcpy(h.magic, kind.magic, sizeof h.magic);
  h.version = kind.version;
  h.byte_order = kByteOrder;
}

// Ends a header and writes it to the beginning of `data`, whose other h.file_bytes are in place.
template <class Header>
void Seal(Header& h, void* data) {
  h.content_hash = ContentHash<Header>(data, h.file_bytes);
  h.header_hash = HeaderHash(h);
  std::memcpy(data, &h, sizeof h);
}

// The header of `size` bytes at `data`, all of it checked but the content hash. `refuse` throws
// with the reason that it is given.
template <class Header, class Refuse>
Header ReadHeader(const void* data, size_t size, const SealedKind& kind, const Refuse& refuse) {
  Header h;
  if (size < sizeof h) {
    refuse(WantedGot("size in bytes is below the header's", sizeof h, size));
  }
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, kind.magic, sizeof h.magic) != 0) {
    refuse(Text("it does not start with ", kind.magic));
  }
  if (h.byte_order == __builtin_bswap32(kByteOrder)) refuse("its byte order is not this machine's");
  if (h.byte_order != kByteOrder) refuse("its byte order mark is damaged");
  if (h.version != kind.version) refuse(WantedGot("version", kind.version, h.version));
  if (h.header_hash != HeaderHash(h)) refuse("the header hash does not match");
  if (h.file_bytes != size) refuse(WantedGot("size in bytes", h.file_bytes, size));
  return h;
}

template <class Header, class Refuse>
void CheckContent(const Header& h, const void* data, const Refuse& refuse) {
  if (h.content_hash != ContentHash<Header>(data, h.file_bytes)) {
    refuse("the content hash does not match");
  }
}

}  // namespace onerec
