// How much memory this process may use: what the machine has, and what its control groups allow
// (Linux; version 1 and version 2, and both at once). Knows no torch.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace fastops {

class MemoryLimit {
 public:
  // `root` stands before every path that is read, so that tests can bring groups of their own.
  explicit MemoryLimit(const std::string& root = "");

  // The smallest of the machine's memory and the limits of the groups that this process is in.
  size_t total() const;

  // How much more can be touched before the machine or one of the groups is full. Page cache that
  // has not been used for a while does not count: the kernel drops it first.
  size_t available() const;

 private:
  struct Group {
    std::string limit, usage, stat;  // files
    std::string inactive;            // the line of `stat` that tells of page cache
  };
  std::string meminfo_;
  size_t ram_;
  std::vector<Group> groups_;
};

}  // namespace fastops
