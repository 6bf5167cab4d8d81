// Bytes that are the same in memory and in a file: mapping, and writing whole or not at all.
#pragma once

#include <cstddef>
#include <string>

namespace onerec {

// "what path: the reason in errno".
std::string SystemError(const char* what, const std::string& path);

// Owns bytes that were allocated (64-byte aligned) or mapped read-only from a file.
class FileBlock {
 public:
  FileBlock() = default;
  FileBlock(FileBlock&& other) noexcept;
  FileBlock& operator=(FileBlock&& other) noexcept;
  ~FileBlock();

  static FileBlock Allocate(size_t size);
  // Throws std::runtime_error if the file cannot be read. An empty file has no data.
  static FileBlock Map(const std::string& path);

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  bool mapped_ = false;
};

// Writes beside `path` and renames, so that a reader sees the old file or the new one.
// Throws std::runtime_error if it cannot be written.
void SaveBytes(const std::string& path, const void* data, size_t size);

}  // namespace onerec
