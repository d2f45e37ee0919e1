// The host side of the selection ops: checks and outputs. A device gives its kernels and registers the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bound.h"
#include "selection.h"
#include "view.h"

namespace protofast {

struct SelectionKernels {
  void (*k_center)(const KCenter&);
  void (*relax)(const Relax&);
};

namespace op {

std::tuple<Tensor, Tensor, Tensor, Tensor> k_center(const SelectionKernels&, const Tensor& points,
                                                    const Tensor& initial, const MaybeTensor& mask, int64_t k,
                                                    int64_t metric, int64_t engine, bool assign);
std::tuple<Tensor, Tensor, Tensor> cover(const SelectionKernels&, const Tensor& points, const Tensor& indices,
                                         const MaybeTensor& mask, int64_t metric);
std::tuple<Tensor, Tensor> relax(const SelectionKernels&, const Tensor& points, const Tensor& centers,
                                 const MaybeTensor& mask, const MaybeTensor& nearest, int64_t metric);

}  // namespace op

template <const SelectionKernels& kernels, class Library>
void register_selection(Library& m) {
  m.impl("k_center.native", TORCH_BOX((&op::Bound<kernels, op::k_center>::call)));
  m.impl("cover.native", TORCH_BOX((&op::Bound<kernels, op::cover>::call)));
  m.impl("relax.native", TORCH_BOX((&op::Bound<kernels, op::relax>::call)));
}

}  // namespace protofast
