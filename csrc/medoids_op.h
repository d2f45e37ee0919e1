// The host side of k-medoids: checks and outputs. A device gives its kernel and registers the op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bound.h"
#include "medoids.h"
#include "view.h"

namespace protofast {

struct MedoidsKernels {
  void (*k_medoids)(const KMedoids&);
};

namespace op {

std::tuple<Tensor, Tensor> k_medoids(const MedoidsKernels&, const Tensor& points, const Tensor& initial, int64_t metric,
                                     int64_t max_iter, bool refine);

}  // namespace op

template <const MedoidsKernels& kernels, class Library>
void register_medoids(Library& m) {
  m.impl("k_medoids.native", TORCH_BOX((&op::Bound<kernels, op::k_medoids>::call)));
}

}  // namespace protofast
