// What a formula with two results returns.
#pragma once
#include "../math.h"

namespace fastops {

template <class T>
struct Pair {
  T v[2];
};

}  // namespace fastops
