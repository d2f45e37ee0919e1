// Registers the CUDA kernels. Needs no CUDA header, and none of torch's CUDA libraries when it is linked.
#include <torch/csrc/stable/accelerator.h>

#include "../ddim_op.h"
#include "../prototype_op.h"
#include "../selection_op.h"
#include "ddim_step.h"
#include "prototype.h"
#include "selection.h"

// In the CUDA builds of torch only, so weak: this library must load in the others too. Its successor in the stable
// ABI, Stream::nativeHandle, needs torch 2.13.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace protofast {
namespace {

template <class Args, const char* (*queue)(const Args&, void*)>
void launch(const Args& args) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  const torch::stable::accelerator::DeviceGuard guard(args.device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(args.device, &stream));
  const char* problem = queue(args, stream);
  STD_TORCH_CHECK(problem == nullptr, "a kernel on CUDA: ", problem);
}

constexpr Kernels KERNELS{&launch<DdimArgs, &ddim_step_cuda>, &launch<CoefficientArgs, &ddim_coefficients_cuda>,
                          &launch<NormalArgs, &philox_normal_cuda>};
constexpr PrototypeKernels PROTOTYPE_KERNELS{&launch<PrototypeSearch, &prototype_search_cuda>,
                                             &launch<PrototypeGradient, &prototype_gradient_cuda>,
                                             &launch<PrototypeMap, &prototype_map_cuda>};
constexpr SelectionKernels SELECTION_KERNELS{&launch<KCenter, &k_center_cuda>, &launch<Relax, &relax_cuda>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CUDA, m) {
  register_ddim<KERNELS>(m);
  register_prototype<PROTOTYPE_KERNELS>(m);
  register_selection<SELECTION_KERNELS>(m);
}

}  // namespace protofast
