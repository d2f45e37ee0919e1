#pragma once

#include "../prototype.h"

namespace protofast {

// Each queues its work on `stream` (a cudaStream_t) of the current device and returns null, or what went wrong.
const char* prototype_search_cuda(const PrototypeSearch& args, void* stream);
const char* prototype_gradient_cuda(const PrototypeGradient& args, void* stream);
const char* prototype_map_cuda(const PrototypeMap& args, void* stream);

}  // namespace protofast
