#include "support/file_block.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "onerec/packed_gemm.h"
#include "support/int_math.h"

namespace onerec {
std::string SystemError(const char* what, const std::string& path) {
  return std::string(what) + " " + path + ": " + std::strerror(errno);
}

FileBlock::FileBlock(FileBlock&& other) noexcept { *this = std::move(other); }

FileBlock& FileBlock::operator=(FileBlock&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

FileBlock::~FileBlock() {
  if (mapped_) {
    ::munmap(data_, size_);
  } else {
    std::free(data_);
  }
}

FileBlock FileBlock::Allocate(size_t size) {
  FileBlock block;
  block.data_ = static_cast<char*>(std::aligned_alloc(64, RoundUp(size, 64)));
  if (block.data_ == nullptr) throw std::bad_alloc();
  AdviseLargePages(block.data_, static_cast<int64_t>(size));
  block.size_ = size;
  return block;
}

FileBlock FileBlock::Map(const std::string& path) {
  // A FIFO or a device would block, for ever perhaps.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) throw std::runtime_error(SystemError("cannot open", path));
  struct stat status;
  FileBlock block;
  if (::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(file);
    throw std::runtime_error("cannot open " + path + ": wanted a regular file");
  }
  if (status.st_size > 0) {
    block.size_ = status.st_size;
    void* data = ::mmap(nullptr, block.size_, PROT_READ, MAP_SHARED, file, 0);
    if (data != MAP_FAILED) {
      block.data_ = static_cast<char*>(data);
      block.mapped_ = true;
    }
  }
  const std::string problem = SystemError("cannot map", path);
  ::close(file);
  if (!block.mapped_ && block.size_ != 0) throw std::runtime_error(problem);
  return block;
}

void SaveBytes(const std::string& path, const void* data, size_t size) {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) throw std::runtime_error(SystemError("cannot write", temporary));
  const char* at = static_cast<const char*>(data);
  size_t left = size;
  bool good = true;
  while (good && left > 0) {
    const ssize_t written = ::write(file, at, std::min<size_t>(left, size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    good = written > 0;
    if (good) {
      at += written;
      left -= written;
    }
  }
  good = good && ::fsync(file) == 0;
  std::string problem = SystemError("cannot write", path);
  good = ::close(file) == 0 && good;
  if (good && ::rename(temporary.c_str(), path.c_str()) != 0) {
    problem = SystemError("cannot write", path);
    good = false;
  }
  if (!good) {
    ::unlink(temporary.c_str());
    throw std::runtime_error(problem);
  }
}

}  // namespace onerec
