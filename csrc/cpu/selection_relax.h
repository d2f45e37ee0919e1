// Further centers, for other kernels of the CPU.
#pragma once

#include "../selection.h"

namespace protofast {

void relax_points(const Relax&);  // in selection.cpp

}  // namespace protofast
