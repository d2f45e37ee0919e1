// An op's host side, which takes a device's kernels first, as a function of the op's arguments alone.
#pragma once

namespace protofast::op {

template <const auto& kernels, auto function>
struct Bound;
template <const auto& kernels, class R, class Kernels, class... A, R (*function)(const Kernels&, A...)>
struct Bound<kernels, function> {
  static R call(A... arguments) { return function(kernels, arguments...); }
};

}  // namespace protofast::op
