// Clipping by the norm of all gradients.
#pragma once
#include "../math.h"

namespace fastops {

// Clipping by the norm of all gradients (Pascanu, Mikolov and Bengio, 2013), as
// torch.nn.utils.clip_grad_norm_ does it; the gradients are `scale` times too large.
struct Clip {
  float norm, divisor;
  FASTOPS_FN Clip(double sum_of_squares, float scale, float max_norm) {
    norm = static_cast<float>(::sqrt(sum_of_squares)) / scale;
    const float excess = (norm + 1e-6f) / max_norm;
    divisor = (excess < 1.0f ? 1.0f : excess) * scale;
  }
};

}  // namespace fastops
