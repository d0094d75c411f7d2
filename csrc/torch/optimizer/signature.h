// The names that a kernel declares, taken apart once: for the op's schema, the optimizer's
// dictionaries, and Python.
#pragma once
#include <string>
#include <vector>

#include "../../kernels/optimizer.h"

namespace fastops {

struct OptimizerSignature {
  const OptimizerKernel* kernel;  // of the CPU's table; other back ends have the same order
  std::vector<std::string> states, scalar_states, options;
};

// In the order of the kernels' table.
const std::vector<OptimizerSignature>& optimizer_signatures();

}  // namespace fastops
