// What differs between the versions of torch that this builds for, 2.9 to 2.14, found by the types
// and not by version numbers.
#pragma once
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace fastops {

// Up to 2.11 a graph holds its nodes by std::shared_ptr, later by c10::intrusive_ptr.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T, class... A>
auto make_node(A&&... a) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>(std::forward<A>(a)...);
  } else {
    return c10::make_intrusive<T>(std::forward<A>(a)...);
  }
}

}  // namespace fastops
