// Farthest-first traversal. A block keeps its share of a cloud's points, in shared memory where they fit, for all
// rounds of a launch: it measures them against the round's center, and the blocks of a cloud meet to find the farthest
// point. Values and labels are exact at all times; float32 only tells which points a center leaves as they are.
#include "selection.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "grid.cuh"
#include "selection_measure.cuh"

namespace protofast {
namespace {

// Of a block; they leave 128 and 168 registers a thread.
template <bool wide>
constexpr int MOST_THREADS = wide ? 512 : 384;
constexpr int SMALL = 8;  // coordinates; a thread measures such points alone, eight threads together all others
constexpr const char* TOO_LARGE = "the points are too many, or have too many coordinates, for one launch";

// The farthest point of some. Keys sort as values do; 0 if all are chosen or not allowed.
struct Farthest {
  uint64_t key;
  int64_t index;
};

struct Traversal {
  const void* points;
  int64_t cloud, row, column, count;
  const void* centers;  // where nothing is chosen, their rows one after another
  int64_t center_row, center_column;
  const bool* allowed;
  const double* nearest;
  const int64_t* initial;
  int64_t given, rounds, from, to;
  int64_t share;  // points a block
  int parts;      // blocks a cloud
  Measuring measuring;
  bool choosing, precomputed, halved, rooted, vectors, together, last;
  double *values, *norms, *radii;
  int64_t *labels, *indices;
  Farthest* partial;  // (2, clouds, parts): of even rounds and of odd ones
  unsigned long long* arrived;
};

__device__ inline uint64_t key_of(double value) {
  return value < 0 ? 0 : static_cast<uint64_t>(__double_as_longlong(value)) + 1;
}

__device__ inline double value_of(uint64_t key) {
  return key == 0 ? 0 : __longlong_as_double(static_cast<int64_t>(key - 1));
}

__device__ inline double distance_of(const Traversal& a, double value) {
  return a.rooted ? sqrt(value) : a.halved ? value / 2 : value;
}

// The largest key in the warp, and the least place of those who have it.
struct Best {
  uint64_t key;
  unsigned place;
};

__device__ inline Best warp_best(uint64_t key, unsigned place) {
  const auto high = static_cast<unsigned>(key >> 32), low = static_cast<unsigned>(key);
  const unsigned most = __reduce_max_sync(ALL, high);
  const unsigned rest = __reduce_max_sync(ALL, high == most ? low : 0);
  const uint64_t best = uint64_t{most} << 32 | rest;
  return {best, __reduce_min_sync(ALL, key == best ? place : ~0u)};
}

// --- a block's points against a center ---

// Where a block has its points and what is known of them, from its first point on.
template <class T>
struct Own {
  Rows<T> points;
  double *nearest, *norms;
  int64_t* labels;
  int count;
};

template <class T>
struct Center {
  const T* data;
  int64_t column;
  double norm;
  int64_t round;
  int chosen;  // its place among the block's points, or -1
};

struct Tracked {
  double value = -1;
  int place = 0;
};

// Takes a point whose value has been decided into account.
template <class T>
__device__ inline void track(const Own<T>& own, const Center<T>& center, Tracked& best, double nearest, int i,
                             bool writes) {
  if (i == center.chosen) {
    nearest = -1;  // below every distance: never chosen again
    if (writes) own.nearest[i] = -1;
  }
  if (nearest > best.value) best = {nearest, i};
}

template <class T>
__device__ inline void lower(const Own<T>& own, const Center<T>& center, double& nearest, double value, int i,
                             bool writes) {
  if (!(value < nearest)) return;
  nearest = value;
  if (!writes) return;
  own.nearest[i] = value;
  own.labels[i] = center.round;
}

// Points of at most `most` coordinates, or exactly so many where there are fewer than eight.
template <int most, class T>
__device__ inline Tracked measure_small(const Traversal& a, const Own<T>& own, const Center<T>& center) {
  using C = Compute<T>;
  constexpr int AT_ONCE = most < SMALL ? 4 : 1;
  const int dim = most < SMALL ? most : a.measuring.dim, threads = blockDim.x;
  const bool cosine = a.measuring.cosine, manhattan = a.measuring.manhattan;
  double y[most];
#pragma unroll
  for (int c = 0; c < most; ++c) {
    y[c] = c < dim ? widen(center.data[c * center.column]) : 0;
    if (cosine) y[c] = unit(y[c], center.norm);
  }
  Tracked best;
  for (int start = 0; start < own.count; start += AT_ONCE * threads) {
    C x[AT_ONCE][most];
    double nearest[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * threads + static_cast<int>(threadIdx.x);
      nearest[u] = -INFINITY;
#pragma unroll
      for (int c = 0; c < most; ++c) x[u][c] = 0;
      if (i < own.count) {
        nearest[u] = own.nearest[i];
        const T* point = own.points.at(i);
#pragma unroll
        for (int c = 0; c < most; ++c, point += own.points.column)
          if (c < dim) x[u][c] = widen(*point);
      }
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * threads + static_cast<int>(threadIdx.x);
      if (i >= own.count) break;
      bool exact = nearest[u] > 0;
      const double norm = cosine ? own.norms[i] : 0;
      if constexpr (sizeof(C) == 4) {
        const float by = cosine ? inverse(norm) : 1;
        float sum = cosine ? static_cast<float>(of_zeros(norm, center.norm)) : 0;
#pragma unroll
        for (int c = 0; c < most; ++c)
          if (c < dim) sum = added(sum, x[u][c], by, static_cast<float>(y[c]), manhattan);
        exact = unsettled(a.measuring, sum, nearest[u]);
      }
      if (exact)
        lower(own, center, nearest[u], exact_value<most>(a.measuring, dim, x[u], y, norm, center.norm), i, true);
      track(own, center, best, nearest[u], i, true);
    }
  }
  return best;
}

// Distances from a center, one a point.
template <class T>
__device__ inline Tracked take(const Own<T>& own, const Center<T>& center) {
  constexpr int AT_ONCE = 4;
  const int threads = blockDim.x;
  Tracked best;
  for (int start = 0; start < own.count; start += AT_ONCE * threads) {
    double value[AT_ONCE], nearest[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * threads + static_cast<int>(threadIdx.x);
      const bool there = i < own.count;
      value[u] = there ? widen(center.data[i * center.column]) + 0.0 : 0;  // −0 becomes 0
      nearest[u] = there ? own.nearest[i] : -INFINITY;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * threads + static_cast<int>(threadIdx.x);
      if (i >= own.count) break;
      lower(own, center, nearest[u], value[u], i, true);
      track(own, center, best, nearest[u], i, true);
    }
  }
  return best;
}

constexpr int AT_ONCE = 4;  // points that a group of threads measures together

// Sums in float32 of a group's share of the coordinates.
template <class T, int width>
__device__ inline void sums(const Traversal& a, const T* const (&x)[AT_ONCE], int64_t column, const Center<T>& center,
                            const float (&scale)[AT_ONCE], float center_scale, int lane, float (&sum)[AT_ONCE]) {
  const bool manhattan = a.measuring.manhattan;
#pragma unroll 1
  for (int c = lane * width; c < a.measuring.dim; c += LANES * width) {
    Pack<T, width> of_center, of_point[AT_ONCE];
    if constexpr (width > 1) {
      of_center = *reinterpret_cast<const Pack<T, width>*>(center.data + c);
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) of_point[u] = *reinterpret_cast<const Pack<T, width>*>(x[u] + c);
    } else {
      of_center.lane[0] = center.data[c * center.column];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) of_point[u].lane[0] = x[u][c * column];
    }
#pragma unroll
    for (int v = 0; v < width; ++v) {
      const float y = widen(of_center.lane[v]) * center_scale;
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) sum[u] = added(sum[u], widen(of_point[u].lane[v]), scale[u], y, manhattan);
    }
  }
}

template <class T>
__device__ inline Tracked measure_wide(const Traversal& a, const Own<T>& own, const Center<T>& center) {
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, groups = blockDim.x / LANES;
  const bool cosine = a.measuring.cosine;
  Tracked best;
  for (int start = 0; start < own.count; start += AT_ONCE * groups) {
    const T* x[AT_ONCE];
    double nearest[AT_ONCE], norm[AT_ONCE];
    [[maybe_unused]] float sum[AT_ONCE], scale[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * groups + group;
      const bool there = i < own.count;
      x[u] = own.points.at(there ? i : 0);
      nearest[u] = there ? own.nearest[i] : -INFINITY;
      norm[u] = cosine ? own.norms[there ? i : 0] : 0;
      sum[u] = 0, scale[u] = cosine ? inverse(norm[u]) : 1;
    }
    if constexpr (sizeof(Compute<T>) == 4) {
      const float center_scale = cosine ? inverse(center.norm) : 1;
      if (a.vectors)
        sums<T, 16 / sizeof(T)>(a, x, own.points.column, center, scale, center_scale, lane, sum);
      else
        sums<T, 1>(a, x, own.points.column, center, scale, center_scale, lane, sum);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int i = start + u * groups + group;
      bool exact = nearest[u] > 0;
      if constexpr (sizeof(Compute<T>) == 4) {
        sum[u] = group_sum(sum[u]);
        if (cosine) sum[u] += static_cast<float>(of_zeros(norm[u], center.norm));
        exact = unsettled(a.measuring, sum[u], nearest[u]);
      }
      if (__any_sync(ALL, exact)) {
        const double value = exact_value(a.measuring, x[u], own.points.column, center.data, center.column, norm[u],
                                         center.norm, exact, lane);
        if (exact) lower(own, center, nearest[u], value, i, lane == 0);
      }
      if (i < own.count) track(own, center, best, nearest[u], i, lane == 0);
    }
  }
  return best;
}

// --- rounds ---

// The farthest point of a cloud, from what its blocks found; by a warp.
__device__ inline Farthest gathered(const Farthest* partial, int parts, int lane) {
  uint64_t key = 0, index = 0;
  unsigned part = ~0u;
  for (int p = lane; p < parts; p += WARP) {
    const uint64_t other = observed(&partial[p].key);
    const uint64_t at = observed(reinterpret_cast<const uint64_t*>(&partial[p].index));
    if (part == ~0u || other > key) key = other, index = at, part = static_cast<unsigned>(p);
  }
  const Best best = warp_best(key, part);  // lower parts have lower indices
  return {best.key, static_cast<int64_t>(__shfl_sync(ALL, index, static_cast<int>(best.place % WARP)))};
}

template <class T, bool wide, bool resident>
__global__ void __launch_bounds__(MOST_THREADS<wide>, 1) traverse_kernel(const __grid_constant__ Traversal a) {
  __shared__ uint64_t warp_key[MOST_THREADS<wide> / WARP];
  __shared__ unsigned warp_place[MOST_THREADS<wide> / WARP];
  __shared__ int64_t shared_index;  // of the round's center; -1 when no point is left
  __shared__ double shared_norm;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % WARP, warp = thread / WARP;
  const int64_t cloud = blockIdx.x / a.parts;
  const int part = static_cast<int>(blockIdx.x % a.parts);
  const int64_t first = min(part * a.share, a.count);
  const bool choosing = a.choosing, cosine = a.measuring.cosine;
  const int dim = a.measuring.dim;

  const Rows<T> all{static_cast<const T*>(a.points) + cloud * a.cloud, a.row, a.column};
  double* const values = a.values + cloud * a.count + first;
  Own<T> own{{all.at(first), a.row, a.column},
             values,
             cosine ? a.norms + cloud * a.count + first : nullptr,
             a.labels + cloud * a.count + first,
             static_cast<int>(min(a.share, a.count - first))};
  if constexpr (resident) {
    const int room = static_cast<int>(a.share);
    own.nearest = reinterpret_cast<double*>(dynamic_shared());
    own.norms = own.nearest + room;
    // Rows after an even number of doubles, so that they may be read by 16 bytes.
    T* const copy = reinterpret_cast<T*>(own.nearest + (cosine ? 2 : 1) * room);
    const int64_t row = wide ? dim : 1, column = wide ? 1 : room;
    for (int64_t e = thread; e < int64_t{own.count} * dim; e += threads)
      copy[e / dim * row + e % dim * column] = own.points.data[e / dim * a.row + e % dim * a.column];
    own.points = {copy, row, column};
  }
  for (int i = thread; i < own.count; i += threads) {
    if (a.from == 0) {
      const bool allowed = !a.allowed || a.allowed[cloud * a.count + first + i];
      own.nearest[i] = !allowed ? -INFINITY : a.nearest ? a.nearest[first + i] : INFINITY;
      own.labels[i] = choosing && allowed ? 0 : -1;
    } else if (resident) {
      own.nearest[i] = values[i];
    }
  }
  if (resident) __syncthreads();
  if (cosine && (resident || a.from == 0)) {
    for (int start = 0; start < own.count; start += threads / LANES) {
      const int i = start + thread / LANES;
      const bool there = i < own.count;
      const double norm = exact_norm(dim, own.points.at(there ? i : 0), own.points.column, there, thread % LANES);
      if (there && thread % LANES == 0) own.norms[i] = norm;
    }
  }

  const int64_t blocks = int64_t{gridDim.x};
  Farthest* const partial = a.partial + cloud * a.parts;
  Farthest farthest{1, 0};
  for (int64_t round = a.from;; ++round) {
    if (warp == 0) {
      if (choosing && round > 0 && (round == a.from || round < a.to || a.together || a.last)) {
        const int64_t before = round - 1;
        if (a.parts > 1 && round > a.from) {
          if (lane == 0) meet(a.arrived + cloud, static_cast<uint64_t>(a.parts), static_cast<uint64_t>(round));
          __syncwarp();
        }
        if (a.parts > 1 || round == a.from) farthest = gathered(partial + before % 2 * blocks, a.parts, lane);
        if (part == 0 && lane == 0) a.radii[cloud * a.rounds + before] = distance_of(a, value_of(farthest.key));
      }
      if (round < a.to) {
        int64_t index = round;
        if (choosing && round < a.given) index = a.initial[cloud * a.given + round];
        if (choosing && round >= a.given) index = farthest.key == 0 ? -1 : farthest.index;
        if (lane == 0) {
          shared_index = index;
          if (part == 0 && choosing && index >= 0) a.indices[cloud * a.rounds + round] = index;
        }
        if (cosine && index >= 0) {
          const T* const at = choosing ? all.at(index) : static_cast<const T*>(a.centers) + index * a.center_row;
          const double norm = exact_norm(dim, at, choosing ? a.column : a.center_column, true, lane % LANES);
          if (lane == 0) shared_norm = norm;
        }
      }
    }
    __syncthreads();
    if (round == a.to) break;
    const int64_t index = shared_index;
    if (index < 0) {  // all are chosen; later launches find it so
      if (thread == 0) partial[round % 2 * blocks + part] = {0, 0};
      if (part == 0) {
        for (int64_t i = round + thread; i < a.rounds; i += threads)
          a.indices[cloud * a.rounds + i] = -1, a.radii[cloud * a.rounds + i] = 0;
      }
      break;
    }
    Center<T> center{all.at(index), a.column, cosine ? shared_norm : 0, round, -1};
    const bool mine = choosing && index >= first && index < first + own.count;
    if (mine) center.chosen = static_cast<int>(index - first);
    if (!choosing) {
      center.data = static_cast<const T*>(a.centers) + index * a.center_row, center.column = a.center_column;
    } else if (resident && a.parts == 1) {
      center.data = own.points.at(index), center.column = own.points.column;
    }
    Tracked found;
    if constexpr (wide) {
      found = measure_wide(a, own, center);
    } else {
      if (a.precomputed) {
        center.data += first * a.column;
        found = take(own, center);
      } else if (dim == 2) {
        found = measure_small<2>(a, own, center);
      } else if (dim == 3) {
        found = measure_small<3>(a, own, center);
      } else {
        found = measure_small<SMALL>(a, own, center);
      }
    }
    const Best best = warp_best(key_of(found.value), static_cast<unsigned>(found.place));
    if (lane == 0) warp_key[warp] = best.key, warp_place[warp] = best.place;
    __syncthreads();
    if (warp == 0 && choosing) {
      const bool there = lane < threads / WARP;
      const Best of_all = warp_best(there ? warp_key[lane] : 0, there ? warp_place[lane] : ~0u);
      farthest = {of_all.key, first + of_all.place};
      if (lane == 0) partial[round % 2 * blocks + part] = farthest;
    }
  }

  if (!resident && !a.last) return;
  __syncthreads();
  for (int i = thread; i < own.count; i += threads) {
    double value = own.nearest[i];
    if (a.last && choosing) value = value == -INFINITY ? INFINITY : distance_of(a, fmax(value, 0.0));
    if (a.last && !choosing) value = value == -INFINITY ? INFINITY : value;
    values[i] = value;
  }
}

// --- launches ---

struct Device {
  int processors = 1, shared = 0, together = 0;

  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device);
    shared -= 2048;  // the kernel's own
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a traversal is cut: blocks of `threads`, each with `share` points and `bytes` of shared memory for them.
struct Cut {
  int64_t share;
  int parts, threads, bytes;
  bool resident, together;
};

int threads_for(int64_t items, int most) {
  int threads = 64;
  while (threads < most && threads < items) threads *= 2;
  return std::min(threads, most);
}

const char* problem_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

// One launch. What has many blocks a cloud that wait for each other is launched so that all run at once.
const char* launch(void (*kernel)(const Traversal), const Traversal& a, const Cut& cut, int64_t clouds, void* stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clouds * cut.parts));
  config.blockDim = dim3(static_cast<unsigned>(cut.threads));
  config.dynamicSmemBytes = static_cast<size_t>(cut.bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cut.together ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, a);
  return problem_of(cudaGetLastError());
}

// Bytes that a launch may read: beyond, rounds go into another one, as a GPU with a display ends kernels of seconds.
constexpr int64_t MOST_BYTES = int64_t{1} << 38;

template <class T, bool wide>
const char* traverse(Traversal& a, int64_t clouds, const Scratch& scratch, void* stream) {
  const Device device;
  const int64_t point = 8 + (a.measuring.cosine ? 8 : 0) + (a.precomputed ? 0 : a.measuring.dim * int64_t{sizeof(T)});
  const int64_t fitting = a.precomputed ? device.shared / 8 : device.shared / point / 2 * 2;
  const bool keeps = !a.precomputed && fitting >= 2;
  Cut cut{};
  cut.parts = 1, cut.share = a.count;
  if (!a.choosing) {  // blocks have nothing to tell each other
    cut.share =
        std::clamp<int64_t>(ceil_div(a.count, device.processors), 32, keeps ? std::max<int64_t>(fitting, 32) : 512);
    cut.resident = cut.share <= fitting && keeps;
    cut.parts = static_cast<int>(std::min<int64_t>(ceil_div(a.count, cut.share), 0x7fffffff));
  } else if (keeps && a.count <= fitting) {
    cut.resident = true;
  } else {
    int running = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&running, traverse_kernel<T, wide, false>, MOST_THREADS<wide>, 0);
    const int64_t most = std::min(device.processors / clouds, ceil_div(a.count, 64));
    if (most > 1 && keeps && ceil_div(a.count, most) <= fitting) {
      cut.resident = true, cut.parts = static_cast<int>(most);
    } else {
      const int64_t more = std::min(std::max(running, 1) * device.processors / clouds, ceil_div(a.count, 64));
      cut.parts = static_cast<int>(std::max<int64_t>(more, 1));
    }
    cut.together = cut.parts > 1 && device.together && running > 0;
    cut.resident = cut.resident && (cut.together || cut.parts == 1);
    cut.share = ceil_div(a.count, cut.parts);
  }
  cut.share += cut.share % 2;  // rows in shared memory begin at multiples of 16 bytes
  if (clouds * cut.parts > 0x7fffffff || cut.share > 0x7fff0000) return TOO_LARGE;
  if (cut.resident) cut.bytes = static_cast<int>(cut.share * point);
  cut.threads = threads_for(wide ? ceil_div(cut.share, AT_ONCE) * LANES : cut.share, MOST_THREADS<wide>);
  a.parts = cut.parts, a.share = cut.share, a.together = cut.together;

  void (*const kernel)(const Traversal) =
      cut.resident ? traverse_kernel<T, wide, true> : traverse_kernel<T, wide, false>;
  if (cut.bytes > 0) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cut.bytes);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  if (a.choosing) {
    a.partial = static_cast<Farthest*>(scratch(2 * clouds * cut.parts * int64_t{sizeof(Farthest)}));
    a.arrived = static_cast<unsigned long long*>(scratch(clouds * 8));
    const cudaError_t status = cudaMemsetAsync(a.arrived, 0, clouds * 8, static_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  if (a.measuring.cosine) a.norms = static_cast<double*>(scratch(std::max<int64_t>(clouds * a.count, 1) * 8));

  const bool one_by_one = a.choosing && cut.parts > 1 && !cut.together;
  const int64_t bytes = std::max<int64_t>(clouds * a.count * point, 1);
  const int64_t rounds = one_by_one ? 1 : std::max<int64_t>(MOST_BYTES / bytes, 1);
  for (a.from = 0;; a.from = a.to) {
    a.to = std::min(a.from + rounds, a.rounds);
    a.last = a.to == a.rounds && (!one_by_one || a.from == a.to);
    if (const char* problem = launch(kernel, a, cut, clouds, stream)) return problem;
    if (a.last) return nullptr;
  }
}

template <class T>
const char* traverse(Traversal& a, int64_t clouds, const Scratch& scratch, void* stream) {
  constexpr int64_t width = 16 / sizeof(T);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const auto readable = [&](const void* data, int64_t row, int64_t column) {
    return aligned(data) && row % width == 0 && column == 1;
  };
  a.vectors = a.measuring.dim % width == 0 && a.cloud % width == 0 && readable(a.points, a.row, a.column) &&
              (a.choosing || readable(a.centers, a.center_row, a.center_column));
  const bool small = a.precomputed || a.measuring.dim <= SMALL;
  return small ? traverse<T, false>(a, clouds, scratch, stream) : traverse<T, true>(a, clouds, scratch, stream);
}

const char* traverse(Dtype dtype, Traversal& a, int64_t clouds, const Scratch& scratch, void* stream) {
  switch (dtype) {
    case Dtype::f32:
      return traverse<float>(a, clouds, scratch, stream);
    case Dtype::f64:
      return traverse<double>(a, clouds, scratch, stream);
    case Dtype::bf16:
      return traverse<__nv_bfloat16>(a, clouds, scratch, stream);
    case Dtype::f16:
      return traverse<__half>(a, clouds, scratch, stream);
  }
  return "unknown dtype";
}

Traversal traversal(const PointClouds& points, Measure measure) {
  Traversal a{};
  a.points = points.data, a.cloud = points.clouds > 1 ? points.cloud : 0, a.row = points.row, a.column = points.column;
  a.count = points.count, a.allowed = points.allowed;
  a.precomputed = measure == Measure::precomputed;
  a.rooted = measure == Measure::euclidean, a.halved = measure == Measure::cosine;
  a.measuring = measuring(a.precomputed ? 0 : points.dim, measure == Measure::manhattan, measure == Measure::cosine);
  return a;
}

}  // namespace

const char* k_center_cuda(const KCenter& args, void* stream) {
  if (args.points.dim > 0x7fffff00) return TOO_LARGE;
  Traversal a = traversal(args.points, args.measure);
  a.choosing = true, a.initial = args.initial, a.given = args.given, a.rounds = args.k;
  a.indices = args.indices, a.radii = args.radii, a.labels = args.labels, a.values = args.distances;
  return traverse(args.points.dtype, a, args.points.clouds, args.scratch, stream);
}

const char* relax_cuda(const Relax& args, void* stream) {
  if (args.points.dim > 0x7fffff00) return TOO_LARGE;
  Traversal a = traversal(args.points, args.measure);
  a.rooted = a.halved = false;
  a.centers = args.centers.data, a.center_row = args.centers.row, a.center_column = args.centers.column;
  a.nearest = args.nearest, a.rounds = args.centers.count;
  a.labels = args.labels, a.values = args.values;
  return traverse(args.points.dtype, a, 1, args.scratch, stream);
}

}  // namespace protofast
