// The element types of tensors, as the CPU's loops name them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../dtype.h"

namespace protofast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// run.operator()<T>() for the type that `dtype` names.
template <class Run>
auto with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f64:
      return run.template operator()<double>();
    case Dtype::bf16:
      return run.template operator()<BFloat16>();
    case Dtype::f16:
      return run.template operator()<Half>();
    default:
      return run.template operator()<float>();
  }
}

}  // namespace protofast
