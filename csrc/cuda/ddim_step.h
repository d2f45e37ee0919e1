#pragma once

#include "../ddim.h"

namespace protofast {

// Queues the step on `stream` (a cudaStream_t) of the current device; returns null, or what went wrong.
const char* ddim_step_cuda(const DdimArgs& args, void* stream);

}  // namespace protofast
