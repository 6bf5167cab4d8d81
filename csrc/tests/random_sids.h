// Random catalogues and temporary files for the tests.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "onerec/trie.h"

namespace onerec {

using Sid = std::vector<int32_t>;

inline std::vector<int32_t> RandomSids(int64_t n, int levels, int codebook_size, uint32_t seed) {
  std::mt19937 draw(seed);
  std::uniform_int_distribution<int32_t> code(0, codebook_size - 1);
  std::vector<int32_t> sids(n * levels);
  for (int32_t& c : sids) c = code(draw);
  return sids;
}

// The distinct ids in order: leaf i of a trie of them is the i-th.
inline std::vector<Sid> Distinct(const std::vector<int32_t>& sids, int levels) {
  std::set<Sid> distinct;
  for (size_t i = 0; i < sids.size(); i += levels) {
    distinct.insert(Sid(sids.begin() + static_cast<int64_t>(i),
                        sids.begin() + static_cast<int64_t>(i) + levels));
  }
  return {distinct.begin(), distinct.end()};
}

inline std::shared_ptr<const Trie> BuildTrie(const std::vector<int32_t>& sids, int levels,
                                             int codebook_size) {
  return Trie::Build(sids.data(), static_cast<int64_t>(sids.size()) / levels, levels, levels,
                     codebook_size);
}

// A path of this process that goes with the object.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& name)
      : path_(std::string("/tmp/onerec-") + std::to_string(::getpid()) + "-" + name) {}
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const std::string& Path() const { return path_; }
  void Write(const std::vector<char>& bytes) const {
    std::ofstream(path_, std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }

 private:
  std::string path_;
};

}  // namespace onerec
