#include "signature.h"

#include <algorithm>

#include "../backend.h"

namespace fastops {
namespace {

std::vector<std::string> split(const std::string& words, const std::string& between) {
  std::vector<std::string> result;
  for (size_t begin = 0; begin < words.size();) {
    const size_t end = std::min(words.find(between, begin), words.size());
    result.push_back(words.substr(begin, end - begin));
    begin = end + between.size();
  }
  return result;
}

// The name in "float eps" or "bool maximize=False".
std::string name_of(const std::string& option) {
  const size_t begin = option.find(' ') + 1;
  return option.substr(begin, option.find('=') - begin);
}

}  // namespace

const std::vector<OptimizerSignature>& optimizer_signatures() {
  static const std::vector<OptimizerSignature> signatures = [] {
    std::vector<OptimizerSignature> result;
    for (const OptimizerKernel& kernel : tables(c10::DeviceType::CPU).optimizer) {
      OptimizerSignature& s = result.emplace_back();
      s.kernel = &kernel;
      s.states = split(kernel.state_names, " ");
      s.scalar_states = split(kernel.scalar_state_names, " ");
      for (const std::string& option : split(kernel.options, ", "))
        s.options.push_back(name_of(option));
    }
    return result;
  }();
  return signatures;
}

}  // namespace fastops
