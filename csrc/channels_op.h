// The host side of channel purity: checks, layouts, outputs. A device gives its kernels and registers the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bound.h"
#include "channels.h"
#include "view.h"

namespace protofast {

struct ChannelKernels {
  void (*purity)(const ChannelPurity&);
  void (*gradient)(const ChannelPurityGradient&);
};

namespace op {

std::tuple<Tensor, Tensor> channel_purity(const ChannelKernels&, const Tensor& features, const Tensor& rotation,
                                          const Tensor& channels, bool rectify);
std::tuple<Tensor, Tensor> channel_purity_backward(const ChannelKernels&, const Tensor& grad, const Tensor& features,
                                                   const Tensor& rotation, const Tensor& channels, const Tensor& purity,
                                                   const Tensor& index, bool rectify, bool to_features,
                                                   bool to_rotation);

}  // namespace op

template <const ChannelKernels& kernels, class Library>
void register_channels(Library& m) {
  m.impl("channel_purity.native", TORCH_BOX((&op::Bound<kernels, op::channel_purity>::call)));
  m.impl("channel_purity.native_nograd", TORCH_BOX((&op::Bound<kernels, op::channel_purity>::call)));
  m.impl("channel_purity_backward.native", TORCH_BOX((&op::Bound<kernels, op::channel_purity_backward>::call)));
}

}  // namespace protofast
