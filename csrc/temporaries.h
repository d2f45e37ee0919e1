// Tensors that live until an op's kernels have been queued.
#pragma once

#include <deque>

#include "scratch.h"
#include "view.h"

namespace protofast {

class Temporaries {
 public:
  explicit Temporaries(const View& like) : like_(like) {}

  Scratch scratch() {
    return [this](int64_t bytes) {
      AtenTensorHandle made;
      const int64_t stride = 1;
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), like_.device_type,
                                                      like_.device, &made));
      return kept_.emplace_back(made).data_ptr();
    };
  }

  // The tensor without gaps: itself, or a copy.
  const Tensor& packed(const Tensor& tensor) { return kept_.emplace_back(torch::stable::contiguous(tensor)); }

 private:
  View like_;
  std::deque<Tensor> kept_;
};

}  // namespace protofast
