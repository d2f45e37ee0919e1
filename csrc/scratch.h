// Memory that a kernel asks for, as bytes; it lives until the op returns (on a GPU: until what was queued has run).
#pragma once

#include <cstdint>
#include <functional>

namespace protofast {

using Scratch = std::function<void*(int64_t bytes)>;

}  // namespace protofast
