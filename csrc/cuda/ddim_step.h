#pragma once

#include "../ddim.h"

namespace protofast {

// Each queues its work on `stream` (a cudaStream_t) of the current device and returns null, or what went wrong.
const char* ddim_step_cuda(const DdimArgs& args, void* stream);
const char* ddim_coefficients_cuda(const CoefficientArgs& args, void* stream);
const char* philox_normal_cuda(const NormalArgs& args, void* stream);

}  // namespace protofast
