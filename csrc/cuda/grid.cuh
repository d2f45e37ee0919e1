// What the blocks of a grid share, and shared memory of a size set at the launch. Nothing but what the emulation in
// tests/ puts its own in place of.
#ifndef PROTOFAST_GRID_CUH
#define PROTOFAST_GRID_CUH

#include <cstdint>

namespace protofast {

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// What another block wrote.
__device__ inline uint64_t observed(const uint64_t* at) { return *reinterpret_cast<const volatile uint64_t*>(at); }

// By one thread of each of `parts` blocks that run at once: waits for the `turn`-th time until all have come. What
// that thread wrote before is visible to the others after.
__device__ inline void meet(unsigned long long* arrived, uint64_t parts, uint64_t turn) {
  __threadfence();
  atomicAdd(arrived, 1ull);
  while (*const_cast<volatile unsigned long long*>(arrived) < parts * turn) {
  }
  __threadfence();
}

}  // namespace protofast

#endif
