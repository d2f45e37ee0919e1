#pragma once

#include "../selection.h"

namespace protofast {

// Each queues its work on `stream` (a cudaStream_t) of the current device and returns null, or what went wrong.
const char* k_center_cuda(const KCenter& args, void* stream);
const char* relax_cuda(const Relax& args, void* stream);

}  // namespace protofast
