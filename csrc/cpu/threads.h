// Work in parallel, as torch divides it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace protofast {

inline int64_t thread_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return std::max<int64_t>(1, count);
}

// run(begin, end) for runs of [0, count), of `grain` or more where there are as many.
template <class Run>
void parallel(int64_t count, int64_t grain, const Run& run) {
  if (count <= grain)
    run(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, run);
}

}  // namespace protofast
