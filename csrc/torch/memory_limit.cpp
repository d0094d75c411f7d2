#include "memory_limit.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>

namespace fastops {
namespace {

constexpr size_t kNone = std::numeric_limits<size_t>::max();

// Small files of the kernel's, read without the heap: this runs while memory is short.
struct Text {
  char bytes[16384];
  size_t size = 0;

  explicit Text(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    for (ssize_t n; size < sizeof bytes; size += static_cast<size_t>(n))
      if ((n = read(file, bytes + size, sizeof bytes - size)) <= 0) break;
    close(file);
  }
  std::string_view view() const { return {bytes, size}; }
};

std::optional<size_t> number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return std::nullopt;  // "max", or no such file
  return value;
}

// The number after `word` at the beginning of a line.
std::optional<size_t> number_of(std::string_view text, std::string_view word) {
  for (size_t at = text.find(word); at != text.npos; at = text.find(word, at + 1))
    if (at == 0 || text[at - 1] == '\n') return number(text.substr(at + word.size()));
  return std::nullopt;
}

bool names(const std::string& list, std::string_view word) {
  std::istringstream words(list);
  for (std::string one; std::getline(words, one, ',');)
    if (one == word) return true;
  return false;
}

struct Mount {
  std::string top, at;  // the group that is mounted, and where
};

// Where the hierarchies that limit memory are mounted: version 1, version 2.
void find_mounts(const std::string& path, std::optional<Mount>& v1, std::optional<Mount>& v2) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t dash = line.find(" - ");
    if (dash == line.npos) continue;
    std::istringstream left(line), right(line.substr(dash + 3));
    std::string skipped, type, options;
    Mount mount;
    left >> skipped >> skipped >> skipped >> mount.top >> mount.at;
    right >> type >> skipped >> options;
    if (type == "cgroup2") v2 = mount;
    if (type == "cgroup" && names(options, "memory")) v1 = mount;
  }
}

}  // namespace

MemoryLimit::MemoryLimit(const std::string& root)
    : meminfo_(root + "/proc/meminfo"),
      ram_(static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) *
           static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  std::optional<Mount> v1, v2;
  find_mounts(root + "/proc/self/mountinfo", v1, v2);
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:group
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool is_v2 = controllers.empty();
    if (!is_v2 && !names(controllers, "memory")) continue;
    const std::optional<Mount>& mount = is_v2 ? v2 : v1;
    if (!mount) continue;

    // In a container the group may be named as the host sees it, and mounted as the top. A name
    // that is not below what is mounted says nothing: then the mounted group itself counts.
    std::string group = line.substr(second + 1);
    const std::string top = mount->top == "/" ? "" : mount->top;
    const bool below = group.starts_with(top + "/") && group.find("/..") == group.npos;
    group = below ? group.substr(top.size()) : "";
    while (!group.empty() && group.back() == '/') group.pop_back();

    // A group is bound by those above it as well.
    while (true) {
      const std::string folder = root + mount->at + group + "/";
      if (access((folder + (is_v2 ? "memory.max" : "memory.limit_in_bytes")).c_str(), R_OK) != 0)
        ;  // the root of version 2 has none
      else if (is_v2)
        groups_.push_back({folder + "memory.max", folder + "memory.current", folder + "memory.stat",
                           "inactive_file "});
      else
        groups_.push_back({folder + "memory.limit_in_bytes", folder + "memory.usage_in_bytes",
                           folder + "memory.stat", "total_inactive_file "});
      if (group.empty()) break;
      group.resize(group.rfind('/'));
    }
  }
}

size_t MemoryLimit::total() const {
  size_t least = ram_;
  for (const Group& g : groups_)
    least = std::min(least, number(Text(g.limit).view()).value_or(kNone));
  return least;
}

size_t MemoryLimit::available() const {
  size_t least = kNone;
  if (const auto kib = number_of(Text(meminfo_).view(), "MemAvailable:")) least = *kib << 10;
  for (const Group& g : groups_) {
    const size_t limit = number(Text(g.limit).view()).value_or(kNone);
    if (limit >= ram_) continue;  // version 1 writes a huge number where there is no limit
    size_t used = number(Text(g.usage).view()).value_or(0);
    used -= std::min(used, number_of(Text(g.stat).view(), g.inactive).value_or(0));
    least = std::min(least, limit - std::min(used, limit));
  }
  return least;
}

}  // namespace fastops
