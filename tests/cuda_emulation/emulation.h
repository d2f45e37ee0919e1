// Runs CUDA sources on the CPU, to find a wrong index where there is no GPU. The threads of a block are fibers; blocks
// run one after another, so `__shared__` is `static`. With EMULATE_TOGETHER, the blocks of a cooperative launch run at
// once, a thread of the system each, which has its own `__shared__`. Include it before all else: it takes the place of
// mma.cuh and grid.cuh too.
#pragma once

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#ifdef EMULATE_TOGETHER
#define PER_BLOCK thread_local
#else
#define PER_BLOCK
#endif
#define __shared__ static PER_BLOCK
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulation {

struct Place {
  unsigned x = 0, y = 0, z = 0;
};

}  // namespace emulation

inline PER_BLOCK emulation::Place blockDim, gridDim;

namespace emulation {

// Threads that wait for each other: a block or a warp.
struct Group {
  int alive = 0, arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;

  void open() { arrived = 0, ++generation; }
};

struct Fiber {
  ucontext_t context;  // where it starts; from then on it goes on at `here`, which takes no system call
  jmp_buf here;
  bool started = false;
  Place place;
  bool done = false;
};

constexpr int WARP = 32, MOST = 1024;
constexpr size_t STACK = 1 << 16;

inline struct Device {
  int multiprocessors = 4;
  bool descending = false;  // the order of the threads: results must not depend on it
  bool cooperative = true;  // whether blocks can run at once
  int shared = 227 << 10;   // bytes that a block may have
} device;

inline PER_BLOCK struct Machine {
  Place block;
  Fiber fiber[MOST];
  Fiber* current = nullptr;
  ucontext_t end;
  jmp_buf scheduler;
  Group all, warp[MOST / WARP];
  uint64_t slot[MOST][6];
  std::unique_ptr<char[]> stacks{new char[MOST * STACK]};  // untouched until used
  std::vector<double> shared;                              // of a size set at the launch
  std::function<void()> body;
  int64_t steps = 0;
} machine;

[[noreturn]] inline void fail(const char* text) {
  fprintf(stderr, "CUDA emulation: %s, block %u, thread %u\n", text, machine.block.x,
          machine.current ? machine.current->place.x : 0);
  abort();
}

inline void wait(Group& group, const char* what) {
  if (group.arrived > 0 && strcmp(group.what, what) != 0) fail("threads of a group wait for different things");
  group.what = what;
  ++machine.steps;
  if (++group.arrived == group.alive) return group.open();
  for (const unsigned before = group.generation; group.generation == before;)
    if (_setjmp(machine.current->here) == 0) _longjmp(machine.scheduler, 1);
}

inline Group& own_warp() { return machine.warp[machine.current->place.x / WARP]; }

inline void leave(Group& group) {
  if (--group.alive > 0 && group.arrived == group.alive) group.open();
}

inline void start() {
  machine.body();
  machine.current->done = true;
  ++machine.steps;
  leave(machine.all);
  leave(own_warp());
  _longjmp(machine.scheduler, 1);
}

inline void go_on(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  swapcontext(&machine.end, &fiber.context);
}

inline void run(unsigned first, unsigned end, unsigned blocks, int threads, size_t shared, std::function<void()> body) {
  machine.body = std::move(body);
  gridDim.x = blocks, blockDim.x = static_cast<unsigned>(threads);
  for (machine.block.x = first; machine.block.x < end; ++machine.block.x) {
    machine.shared.assign(shared / 8 + 1, -7e77);  // what is not written shows
    machine.all = {threads};
    for (Group& warp : machine.warp) warp = {};
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = machine.fiber[i];
      fiber.place.x = static_cast<unsigned>(i), fiber.done = fiber.started = false;
      ++machine.warp[i / WARP].alive;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = machine.stacks.get() + i * STACK;
      fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, start, 0);
    }
    for (bool left = true; left;) {
      left = false;
      const int64_t before = machine.steps;
      for (int i = 0; i < threads; ++i) {
        Fiber& fiber = machine.fiber[device.descending ? threads - 1 - i : i];
        if (fiber.done) continue;
        go_on(fiber);
        left = left || !fiber.done;
      }
      machine.current = nullptr;
      if (left && machine.steps == before) fail("no thread can go on");
    }
  }
}

// Every lane's value to every lane: `take` reads the slots of the own warp.
template <class T, class Take>
auto exchange(const char* what, const T& value, Take take) {
  Group& warp = own_warp();
  if (warp.alive != WARP) fail("a warp that is not whole");
  uint64_t (*const slots)[6] = machine.slot + machine.current->place.x / WARP * WARP;
  memcpy(slots[machine.current->place.x % WARP], &value, sizeof value);
  wait(warp, what);
  const auto result = take([&](int lane) {
    T out;
    memcpy(&out, slots[lane], sizeof out);
    return out;
  });
  wait(warp, "end");
  return result;
}

inline int lane() { return static_cast<int>(machine.current->place.x % WARP); }

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &value, sizeof out);
  return out;
}

}  // namespace emulation

#define threadIdx (emulation::machine.current->place)
#define blockIdx (emulation::machine.block)

// --- what the kernels use of CUDA ---

inline void __syncthreads() { emulation::wait(emulation::machine.all, "block"); }
inline void __syncwarp() { emulation::wait(emulation::own_warp(), "warp"); }

using std::max;
using std::min;

inline bool __any_sync(unsigned, bool predicate) {
  return emulation::exchange("any", predicate, [](auto of) {
    bool out = false;
    for (int i = 0; i < emulation::WARP; ++i) out = out || of(i);
    return out;
  });
}
template <class Better>
unsigned emulate_reduce(const char* what, unsigned value, Better better) {
  return emulation::exchange(what, value, [&](auto of) {
    unsigned out = of(0);
    for (int i = 1; i < emulation::WARP; ++i) out = better(out, of(i));
    return out;
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulate_reduce("reduce_max", value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return emulate_reduce("reduce_min", value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  return emulation::exchange("ballot", predicate, [](auto of) {
    unsigned out = 0;
    for (int i = 0; i < emulation::WARP; ++i) out |= static_cast<unsigned>(of(i)) << i;
    return out;
  });
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange("shfl", value, [&](auto of) { return of(source % emulation::WARP); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int from = emulation::lane() - by;
  return emulation::exchange("shfl_up", value, [&](auto of) { return of(from < 0 ? emulation::lane() : from); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return emulation::exchange("shfl_xor", value, [&](auto of) { return of(emulation::lane() ^ by); });
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int64_t __double_as_longlong(double v) { return emulation::bits<int64_t>(v); }
inline double __longlong_as_double(int64_t v) { return emulation::bits<double>(v); }
inline unsigned __float_as_uint(float v) { return emulation::bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulation::bits<float>(v); }

struct __nv_bfloat16 {
  unsigned short bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const unsigned bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

struct __half {
  unsigned short bits;
};
inline float __half2float(__half v) { return emulation::bits<_Float16>(v.bits); }
inline __half __float2half_rn(float v) { return {emulation::bits<unsigned short>(static_cast<_Float16>(v))}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Device& device = emulation::device;
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.shared
                                                                  : device.cooperative;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  memset(to, value, size);
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaFuncSetAttribute(Function, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned blocks = config->gridDim.x;
  const auto run = [&](unsigned first, unsigned end) {
    emulation::run(first, end, blocks, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes,
                   [&] { kernel(arguments...); });
  };
  if (config->numAttrs == 0) {
    run(0, blocks);
  } else {
    std::vector<std::thread> at_once;
    for (unsigned block = 0; block < blocks; ++block) at_once.emplace_back(run, block, block + 1);
    for (std::thread& thread : at_once) thread.join();
  }
  return cudaSuccess;
}

// --- in place of grid.cuh ---

#define PROTOFAST_GRID_CUH

namespace protofast {

inline char* dynamic_shared() { return reinterpret_cast<char*>(emulation::machine.shared.data()); }

inline uint64_t observed(const uint64_t* at) { return std::atomic_ref(*const_cast<uint64_t*>(at)).load(); }

inline void meet(unsigned long long* arrived, uint64_t parts, uint64_t turn) {
  std::atomic_ref counter(*arrived);
  for (counter.fetch_add(1); counter.load() < parts * turn;) sched_yield();
}

}  // namespace protofast

// --- in place of mma.cuh: the fragments of PTX's mma.m16n8, in words of 32 bits ---

#define PROTOFAST_MMA_CUH

namespace protofast {

inline uint32_t to_tf32(float value) {  // to nearest, ties away from 0
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

template <class Product>
void emulate_mma(float& d00, float& d01, float& d10, float& d11, const uint32_t (&a)[4], const uint32_t (&b)[2],
                 Product product) {
  struct Words {
    uint32_t a[4], b[2];
  } own;
  memcpy(own.a, a, sizeof a), memcpy(own.b, b, sizeof b);
  emulation::exchange("mma", own, [&](auto of) {
    float* const to[2][2] = {{&d00, &d01}, {&d10, &d11}};
    const int group = emulation::lane() / 4, within = emulation::lane() % 4;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        double sum = *to[i][j];
        for (int k = 0; k < 8; ++k)
          sum += product(of(group * 4 + k % 4).a[i + k / 4 * 2], of((2 * within + j) * 4 + k % 4).b[k / 4]);
        *to[i][j] = static_cast<float>(sum);
      }
    return 0;
  });
}

inline void mma_bf16(float& d00, float& d01, float& d10, float& d11, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma(d00, d01, d10, d11, a, b, [](uint32_t x, uint32_t y) {
    return double{__uint_as_float(x << 16)} * __uint_as_float(y << 16) +
           double{__uint_as_float(x & 0xffff0000)} * __uint_as_float(y & 0xffff0000);
  });
}
inline void mma_f16(float& d00, float& d01, float& d10, float& d11, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto half = [](uint32_t bits) { return double{__half2float({static_cast<unsigned short>(bits)})}; };
  emulate_mma(d00, d01, d10, d11, a, b,
              [&](uint32_t x, uint32_t y) { return half(x) * half(y) + half(x >> 16) * half(y >> 16); });
}
inline void mma_tf32(float& d00, float& d01, float& d10, float& d11, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma(d00, d01, d10, d11, a, b, [](uint32_t x, uint32_t y) {  // the hardware reads 19 bits
    return double{__uint_as_float(x & 0xffffe000)} * __uint_as_float(y & 0xffffe000);
  });
}

}  // namespace protofast
