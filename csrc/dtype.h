// The element types of tensors.
#pragma once

#include <cstddef>

namespace protofast {

enum class Dtype { f32, f64, bf16, f16 };

inline size_t bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace protofast
