// What the prototype kernels share: places in a feature map, sorted lists in a warp, and the direct form.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../prototype.h"
#include "numbers.cuh"

namespace protofast {

constexpr int THREADS = 256, LANES = 32, WARPS = THREADS / LANES;
constexpr unsigned ALL = 0xffffffff;
constexpr int64_t MOST_BLOCKS = 0x7fffffff;
constexpr const char* TOO_LARGE = "the tensors are too large for one launch; give it fewer samples at a time";

// --- places ---

// A PrototypeShape and the strides of a map, for the device. A sample has fewer than 2³¹ pixels.
struct Geometry {
  int64_t samples, prototypes, topk, sample, channel, stride[AXES];
  int depth, channels, patches, pixels, window, size[AXES], grid[AXES], kernel[AXES];
};

inline const char* describe(const PrototypeShape& shape, const FeatureMap& x, Geometry& g) {
  if (shape.pixels() > 0x7fffffff || shape.channels * shape.window() > 0x7fffff00)
    return "a sample has 2^31 pixels, or a patch 2^31 elements, or more; cut it into pieces";
  g = {.samples = shape.samples,
       .prototypes = shape.prototypes,
       .topk = shape.topk,
       .sample = x.sample,
       .channel = x.channel,
       .stride = {},
       .depth = static_cast<int>(shape.channels * shape.window()),
       .channels = static_cast<int>(shape.channels),
       .patches = static_cast<int>(shape.patches()),
       .pixels = static_cast<int>(shape.pixels()),
       .window = static_cast<int>(shape.window()),
       .size = {},
       .grid = {},
       .kernel = {}};
  for (int axis = 0; axis < AXES; ++axis) {
    g.stride[axis] = x.stride[axis];
    g.size[axis] = static_cast<int>(shape.size[axis]);
    g.grid[axis] = static_cast<int>(shape.grid(axis));
    g.kernel[axis] = static_cast<int>(shape.kernel[axis]);
  }
  return nullptr;
}

// Offset of place `flat` in a box of these sizes.
__device__ inline int64_t place_offset(const int (&sizes)[AXES], const int64_t (&stride)[AXES], int flat) {
  int64_t offset = 0;
#pragma unroll
  for (int axis = AXES - 1; axis >= 0; --axis) {
    if (sizes[axis] == 1) continue;
    offset += flat % sizes[axis] * stride[axis];
    flat /= sizes[axis];
  }
  return offset;
}

// The flat pixel of place `flat` in a box of these sizes.
__device__ inline int place_pixel(const Geometry& g, const int (&sizes)[AXES], int flat) {
  int pixel = 0, step = 1;
#pragma unroll
  for (int axis = AXES - 1; axis >= 0; --axis) {
    pixel += flat % sizes[axis] * step;
    flat /= sizes[axis];
    step *= g.size[axis];
  }
  return pixel;
}

// Depth runs over channels and, within each, the pixels of the window, as in a prototype.
__device__ inline int64_t depth_offset(const Geometry& g, int depth) {
  if (g.window == 1) return depth * g.channel;
  return depth / g.window * g.channel + place_offset(g.kernel, g.stride, depth % g.window);
}

template <class T>
__device__ inline const T* patch_data(const Geometry& g, const void* x, int64_t sample, int patch) {
  return static_cast<const T*>(x) + sample * g.sample + place_offset(g.grid, g.stride, patch);
}

// --- order ---

// Keys that sort as the numbers do, NaN before all; no number has the key NOTHING.
constexpr uint64_t NOTHING = ~uint64_t{0};
constexpr int NOWHERE = 0x7fffffff;

__device__ inline uint64_t to_key(double value) {
  if (value != value) return 0;
  const int64_t bits = __double_as_longlong(value + 0.0);  // −0 becomes 0
  return static_cast<uint64_t>(bits) ^ (bits < 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

__device__ inline double from_key(uint64_t key) {
  return __longlong_as_double(
      static_cast<int64_t>(key == 0 ? ~uint64_t{0} >> 1 : key ^ (key >> 63 ? uint64_t{1} << 63 : ~uint64_t{0})));
}

struct Entry {
  uint64_t key = NOTHING;
  int place = NOWHERE;
};

__device__ inline bool before(const Entry& a, const Entry& b) {
  return a.key < b.key || (a.key == b.key && a.place < b.place);
}

__device__ inline Entry entry_of(const Entry& mine, int lane) {
  Entry out;
  out.key = __shfl_sync(ALL, mine.key, lane);
  out.place = __shfl_sync(ALL, mine.place, lane);
  return out;
}

// A sorted list of 32 lies in a warp, one entry a lane.
__device__ inline void insert(Entry& mine, const Entry& added, int lane) {
  const int ahead = __popc(__ballot_sync(ALL, before(mine, added)));
  Entry previous;
  previous.key = __shfl_up_sync(ALL, mine.key, 1);
  previous.place = __shfl_up_sync(ALL, mine.place, 1);
  if (lane == ahead)
    mine = added;
  else if (lane > ahead)
    mine = previous;
}

// The lists of a (sample, prototype), one a split of its patches, `topk` entries each.
struct Lists {
  uint64_t* key;
  int* place;
  int64_t topk, splits;

  __device__ int64_t at(int64_t pair, int64_t split) const { return (pair * splits + split) * topk; }
};

__device__ inline Entry merged(const Lists& lists, int64_t pair, int lane) {
  Entry mine, worst;
  const int64_t entries = lists.splits * lists.topk, first = lists.at(pair, 0);
  for (int64_t start = 0; start < entries; start += LANES) {
    Entry own;
    if (start + lane < entries)
      own.key = lists.key[first + start + lane], own.place = lists.place[first + start + lane];
    unsigned left = __ballot_sync(ALL, before(own, worst));
    while (left) {
      insert(mine, entry_of(own, __ffs(static_cast<int>(left)) - 1), lane);
      worst = entry_of(mine, static_cast<int>(lists.topk) - 1);
      left &= left - 1;
      left &= __ballot_sync(ALL, before(own, worst));
    }
  }
  return mine;
}

// --- the direct form ---

template <class A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// Of `lanes` threads, each taking every so-maniest depth; `sum` adds up what they have. Squared for EUCLIDEAN.
template <class A, class T, class Sum>
__device__ inline A direct_form(const Geometry& g, const T* patch, const T* prototype, Metric metric, int lane,
                                int lanes, Sum sum) {
  A total = 0;
  if (metric == COSINE) {
    A square_x = 0, square_p = 0;
    for (int k = lane; k < g.depth; k += lanes) {
      const A x = widen(patch[depth_offset(g, k)]), p = widen(prototype[k]);
      square_x = multiply_add(x, x, square_x);
      square_p = multiply_add(p, p, square_p);
    }
    square_x = sum(square_x), square_p = sum(square_p);
    if constexpr (sizeof(A) == 4) {  // at 0 the caller tries again in float64
      if (!(square_x > 0x1p-80f && square_x < 0x1p100f && square_p > 0x1p-80f && square_p < 0x1p100f)) return 0;
    }
    if (square_x * square_p == 0) return 1;
    const A inverse_x = 1 / sqrt(square_x), inverse_p = 1 / sqrt(square_p);
    for (int k = lane; k < g.depth; k += lanes) {
      const A difference = widen(patch[depth_offset(g, k)]) * inverse_x - widen(prototype[k]) * inverse_p;
      total = multiply_add(difference, difference, total);
    }
    return sum(total) / 2;
  }
  for (int k = lane; k < g.depth; k += lanes) {
    const A x = widen(patch[depth_offset(g, k)]), p = widen(prototype[k]);
    if (metric == DOT) {
      total = multiply_add(-x, p, total);
    } else {
      const A difference = x - p;
      total = multiply_add(difference, difference, total);
    }
  }
  return sum(total);
}

template <class T>
__device__ inline double exact_distance(const Geometry& g, const T* patch, const T* prototype, Metric metric,
                                        int lane) {
  return direct_form<double>(g, patch, prototype, metric, lane, LANES, [](double v) { return warp_sum(v); });
}

// Where a sum in float32 has its full precision; beyond, float64 decides.
__device__ inline bool in_range(float value) { return fabsf(value) > 0x1p-80f && fabsf(value) < 0x1p120f; }

// In the arithmetic of the result, except where that would under- or overflow.
template <class T>
__device__ inline double result_distance(const Geometry& g, const T* patch, const T* prototype, Metric metric,
                                         int lane) {
  if constexpr (sizeof(Compute<T>) == 4) {
    const float value =
        direct_form<float>(g, patch, prototype, metric, lane, LANES, [](float v) { return warp_sum(v); });
    if (in_range(value)) return value;
  }
  return exact_distance(g, patch, prototype, metric, lane);
}

template <class R>
__device__ inline R finished(double distance, Metric metric) {
  return static_cast<R>(metric == EUCLIDEAN ? sqrt(distance) : distance);
}

// --- launches ---

inline const char* launched() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                          const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > MOST_BLOCKS) return TOO_LARGE;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launched();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace protofast
