// The host side of the prototype ops: checks, layouts, outputs. A device gives its kernels and registers the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "bound.h"
#include "prototype.h"
#include "view.h"

namespace protofast {

struct PrototypeKernels {
  void (*search)(const PrototypeSearch&);
  void (*gradient)(const PrototypeGradient&);
  void (*map)(const PrototypeMap&);
};

namespace op {

std::tuple<Tensor, Tensor, Tensor> search(const PrototypeKernels&, const Tensor& features, const Tensor& prototypes,
                                          const MaybeTensor& mask, int64_t metric, int64_t activation, double eps,
                                          int64_t topk, int64_t precision, bool verify);
std::tuple<Tensor, Tensor> gradient(const PrototypeKernels&, const MaybeTensor& grad_activation,
                                    const MaybeTensor& grad_distance, const Tensor& features, const Tensor& prototypes,
                                    const Tensor& distance, const Tensor& index, int64_t metric, int64_t activation,
                                    double eps, int64_t topk, bool to_features, bool to_prototypes);
Tensor map(const PrototypeKernels&, const Tensor& features, const Tensor& prototypes, int64_t metric);

}  // namespace op

template <const PrototypeKernels& kernels, class Library>
void register_prototype(Library& m) {
  m.impl("prototype_activation.native", TORCH_BOX((&op::Bound<kernels, op::search>::call)));
  m.impl("prototype_activation.native_nograd", TORCH_BOX((&op::Bound<kernels, op::search>::call)));
  m.impl("prototype_backward.native", TORCH_BOX((&op::Bound<kernels, op::gradient>::call)));
  m.impl("prototype_map.native", TORCH_BOX((&op::Bound<kernels, op::map>::call)));
  m.impl("prototype_map.native_nograd", TORCH_BOX((&op::Bound<kernels, op::map>::call)));
}

}  // namespace protofast
