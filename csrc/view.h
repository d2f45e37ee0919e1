// What torch is asked of tensors, for the host side of ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "dtype.h"

namespace protofast {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What torch is asked of a tensor, asked once: each question is a call into its library, and those of a small step
// took longer than its kernel.
struct View {
  explicit View(const Tensor& tensor) : tensor(&tensor) {
    int64_t* from;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &from));
    sizes = from;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &from));
    strides = from;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device));
    for (int64_t axis = 0; axis < dim; ++axis) numel *= sizes[axis];
  }

  void* data() const { return tensor->data_ptr(); }

  const Tensor* tensor;
  int64_t dim = 0, numel = 1;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;
};

using MaybeView = std::optional<View>;

inline MaybeView view(const MaybeTensor& tensor) { return tensor ? MaybeView(View(*tensor)) : std::nullopt; }

// The numbers that torch gives its dtypes.
struct Numbers {
  int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(), bf16 = aoti_torch_dtype_bfloat16(),
          f16 = aoti_torch_dtype_float16(), int64 = aoti_torch_dtype_int64(), boolean = aoti_torch_dtype_bool();
};

inline const Numbers& numbers() {
  static const Numbers all;
  return all;
}

inline Dtype dtype_of(const View& tensor) {
  if (tensor.dtype == numbers().f32) return Dtype::f32;
  if (tensor.dtype == numbers().f64) return Dtype::f64;
  if (tensor.dtype == numbers().bf16) return Dtype::bf16;
  if (tensor.dtype == numbers().f16) return Dtype::f16;
  throw std::runtime_error("tensors must be float32, float64, bfloat16 or float16");
}

inline Tensor empty(const View& like, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type, like.device, &made));
  return Tensor(made);
}

inline Tensor empty(const View& like, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  return empty(like, dim, sizes, strides, like.dtype);
}

// Do axes first, first + 1, … cover a block of memory without holes or overlap?
inline bool is_dense(const View& tensor, int64_t first) {
  int64_t expected = 1, left = 0;
  for (int64_t axis = first; axis < tensor.dim; ++axis) left += tensor.sizes[axis] != 1;
  for (; left > 0; --left) {
    int64_t axis = tensor.dim - 1;  // the usual order first
    while (axis >= first && (tensor.sizes[axis] == 1 || tensor.strides[axis] != expected)) --axis;
    if (axis < first) return false;
    expected *= tensor.sizes[axis];
  }
  return true;
}

}  // namespace protofast
