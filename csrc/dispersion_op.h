// The host side of the farthest pair and dispersion: checks and outputs. A device gives its kernels and registers the
// ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bound.h"
#include "dispersion.h"
#include "view.h"

namespace protofast {

struct DispersionKernels {
  void (*farthest_pair)(const FarthestPair&);
  void (*max_min_swaps)(const MaxMinSwaps&);
  void (*max_sum)(const MaxSum&);
};

namespace op {

std::tuple<Tensor, Tensor> farthest_pair(const DispersionKernels&, const Tensor& points, const MaybeTensor& mask,
                                         int64_t metric);
std::tuple<Tensor, Tensor> max_min_swaps(const DispersionKernels&, const Tensor& points, const Tensor& indices,
                                         const Tensor& labels, const Tensor& distances, const MaybeTensor& mask,
                                         int64_t metric, int64_t swaps);
std::tuple<Tensor, Tensor, Tensor> max_sum(const DispersionKernels&, const Tensor& points, const Tensor& initial,
                                           const MaybeTensor& mask, int64_t k, int64_t metric, int64_t sweeps);

}  // namespace op

template <const DispersionKernels& kernels, class Library>
void register_dispersion(Library& m) {
  m.impl("farthest_pair.native", TORCH_BOX((&op::Bound<kernels, op::farthest_pair>::call)));
  m.impl("max_min_swaps.native", TORCH_BOX((&op::Bound<kernels, op::max_min_swaps>::call)));
  m.impl("max_sum.native", TORCH_BOX((&op::Bound<kernels, op::max_sum>::call)));
}

}  // namespace protofast
